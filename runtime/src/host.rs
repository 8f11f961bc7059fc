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
    pub apparmor: bool,
    pub selinux: bool,
}

impl HostFacts {
    /// Asks the host.
    ///
    /// # Errors
    /// The cgroup mounts cannot be read.
    pub fn probe() -> Result<Self> {
        Ok(Self {
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

fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.first() == Some(&b'Y'))
}
