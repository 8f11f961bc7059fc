//! What this host can do: asked once, before anything is planned.

use rustix::process::{getegid, geteuid};

use crate::cgroup::{self, CgroupMode};
use crate::error::Result;

/// Facts about the host that decide a plan.
#[derive(Debug, Clone)]
pub struct HostFacts {
    pub cgroup: CgroupMode,
    pub euid: u32,
    pub egid: u32,
    /// Root here is no more than some user outside.
    pub in_user_namespace: bool,
    /// False where the runtime's own user namespace has given up setgroups(2).
    pub setgroups: bool,
    pub apparmor: bool,
    pub selinux: bool,
}

impl HostFacts {
    /// Asks the host.
    ///
    /// # Errors
    /// The cgroup mounts cannot be read.
    pub fn probe() -> Result<Self> {
        let in_user_namespace = in_user_namespace();
        Ok(Self {
            in_user_namespace,
            setgroups: !in_user_namespace || setgroups_allowed(),
            cgroup: cgroup::detect()?,
            euid: geteuid().as_raw(),
            egid: getegid().as_raw(),
            apparmor: apparmor_enabled(),
            selinux: rustix::fs::access("/sys/fs/selinux/enforce", rustix::fs::Access::EXISTS)
                .is_ok(),
        })
    }

    pub fn is_root(&self) -> bool {
        self.euid == 0
    }
}

/// The initial user namespace has a number of its own (the kernel's PROC_USER_INIT_INO).
pub fn in_user_namespace() -> bool {
    rustix::fs::readlink("/proc/self/ns/user", [0u8; 32])
        .is_ok_and(|name| name.as_bytes() != b"user:[4026531837]")
}

/// user_namespaces(7): a namespace whose maps an unprivileged process has written has not.
pub fn setgroups_allowed() -> bool {
    !std::fs::read("/proc/self/setgroups").is_ok_and(|text| text.starts_with(b"deny"))
}

fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.first() == Some(&b'Y'))
}
