//! A network and mount namespace for one test. Bridges, rules, mounts and pinned namespaces of a
//! test are then out of the machine's way, and a leak is whatever is left in here.
//!
//! Namespaces belong to the calling thread: everything the test starts or connects to must come
//! from that thread or from threads and processes that it starts later.

use std::fs::File;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

pub struct Isolation {
    net: File,
    mnt: File,
}

impl Isolation {
    pub fn enter() -> Result<Self> {
        let open = |kind: &str| -> Result<File> {
            let path = format!("/proc/thread-self/ns/{kind}");
            File::open(&path).with_context(|| format!("open {path}"))
        };
        let old = Self {
            net: open("net")?,
            mnt: open("mnt")?,
        };
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare net, mnt")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context("make mounts private")?;
        // As after a boot: nothing pinned here, whatever the machine has.
        std::fs::create_dir_all("/run/netns")?;
        mount(
            Some("tmpfs"),
            "/run/netns",
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=755"),
        )
        .context("mount tmpfs on /run/netns")?;
        // /sys/class/net is the network namespace's in which sysfs was mounted.
        let status = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()?;
        ensure!(status.success(), "ip link set lo up: {status}");
        // As on every node of Kubernetes; the daemon leaves it to the administrator.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("turn on ip_forward")?;
        Ok(old)
    }
}

impl Drop for Isolation {
    fn drop(&mut self) {
        // A thread that cannot go back must not run the next test.
        // Threads that the test started share its root and working directory, which setns refuses.
        let back = unshare(CloneFlags::CLONE_FS)
            .and_then(|()| setns(&self.net, CloneFlags::CLONE_NEWNET))
            .and_then(|()| setns(&self.mnt, CloneFlags::CLONE_NEWNS));
        if let Err(error) = back {
            eprintln!("cannot leave the test's namespaces: {error}");
            std::process::abort();
        }
    }
}
