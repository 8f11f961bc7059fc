//! Owns what is known of the host, probed once at start: cgroups, capabilities, security modules,
//! boot id. Never changes it.

use std::path::Path;

use crate::cgroup::Mounts;
use crate::error::{Error, Result};

/// Facts that do not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Cgroup mounts.
    pub cgroups: Mounts,
    /// Only the unified hierarchy.
    pub unified: bool,
    /// The hugetlb controller is there.
    pub hugetlb: bool,
    /// Swap can be limited.
    pub swap_accounting: bool,
    /// Capabilities that we can give to containers.
    pub capabilities: Vec<String>,
    /// AppArmor confines processes here.
    pub apparmor: bool,
    /// Our own OOM score adjustment.
    pub oom_score_adj: i64,
    /// Tells one boot from the next.
    pub boot_id: String,
}

impl HostFacts {
    /// Probes the host.
    pub fn probe() -> Result<HostFacts> {
        let cgroups = Mounts::detect().map_err(|e| Error::io("read", "/proc/self/mountinfo", e))?;
        let status = read("/proc/self/status")?;
        let bounding = status
            .lines()
            .find_map(|line| line.strip_prefix("CapBnd:"))
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .unwrap_or(0);
        let apparmor = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y'));
        Ok(HostFacts {
            unified: cgroups.is_unified(),
            hugetlb: cgroups.has_controller("hugetlb"),
            swap_accounting: cgroups.accounts_for_swap(),
            capabilities: crate::spec_builder::capabilities::held(bounding),
            apparmor: apparmor && Path::new("/sys/kernel/security/apparmor/profiles").exists(),
            oom_score_adj: read("/proc/self/oom_score_adj")?
                .trim()
                .parse()
                .unwrap_or(0),
            boot_id: read("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            cgroups,
        })
    }

    /// Facts of no particular host.
    #[cfg(test)]
    pub fn for_tests() -> HostFacts {
        HostFacts {
            cgroups: Mounts::V2("/sys/fs/cgroup".into()),
            unified: true,
            hugetlb: true,
            swap_accounting: true,
            capabilities: crate::spec_builder::capabilities::held(u64::MAX),
            apparmor: false,
            oom_score_adj: -999,
            boot_id: "test".to_owned(),
        }
    }
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))
}
