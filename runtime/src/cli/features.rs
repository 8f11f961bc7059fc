//! `coracle features`: what this runtime does, as the runtime-spec's features document.
//!
//! It tells only what is true of this build; a kernel may still lack some of it.

use std::io::Write as _;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::{GlobalArgs, SPEC_VERSION};
use crate::error::{Error, Kind, Result};
use crate::seccomp;

/// The recognised mount options; file systems' own options are passed on and not listed.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

const MEMORY_POLICY_MODES: &[&str] = &[
    "MPOL_BIND",
    "MPOL_DEFAULT",
    "MPOL_INTERLEAVE",
    "MPOL_LOCAL",
    "MPOL_PREFERRED",
    "MPOL_PREFERRED_MANY",
    "MPOL_WEIGHTED_INTERLEAVE",
];
const MEMORY_POLICY_FLAGS: &[&str] = &[
    "MPOL_F_NUMA_BALANCING",
    "MPOL_F_RELATIVE_NODES",
    "MPOL_F_STATIC_NODES",
];

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, _global: &GlobalArgs) -> Result<ExitCode> {
    let mut text = serde_json::to_string_pretty(&features())
        .map_err(|e| Error::new(Kind::Internal, "write as JSON", "features").source(e))?;
    text.push('\n');
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| Error::system("write", "stdout", e))?;
    Ok(ExitCode::SUCCESS)
}

fn features() -> Value {
    let mut capabilities: Vec<String> = caps::all()
        .into_iter()
        .map(|capability| capability.to_string())
        .collect();
    capabilities.sort();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart",
            "poststop"
        ],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {
                "v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true
            },
            "seccomp": seccomp_features(),
            "apparmor": { "enabled": true },
            "selinux": { "enabled": true },
            "intelRdt": { "enabled": true, "schemata": true, "monitoring": true },
            "memoryPolicy": { "modes": MEMORY_POLICY_MODES, "flags": MEMORY_POLICY_FLAGS },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": true }
        },
        "annotations": {
            "org.coracle.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.runc.checkpoint.enabled": "true"
        },
        // The second is a prefix.
        "potentiallyUnsafeConfigAnnotations": ["org.criu.config", "org.systemd.property."]
    })
}

fn seccomp_features() -> Value {
    json!({
        "enabled": true,
        "actions": seccomp::ACTIONS,
        "operators": seccomp::OPERATORS,
        "archs": seccomp::ARCHITECTURES,
        "knownFlags": seccomp::FLAGS,
        "supportedFlags": seccomp::supported_flags()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_mount_option_is_understood() {
        for name in MOUNT_OPTIONS {
            let parsed = crate::plan::options::parse(&[(*name).to_owned()]);
            assert!(
                parsed.data.is_empty(),
                "{name} would be left to the file system"
            );
        }
    }

    /// What the runtime-spec's features.md has for Linux, and nothing else.
    #[test]
    fn features_have_the_specs_shape() {
        let value = features();
        let keys = |value: &Value| -> Vec<String> {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        assert_eq!(
            keys(&value["linux"]),
            [
                "apparmor",
                "capabilities",
                "cgroup",
                "intelRdt",
                "memoryPolicy",
                "mountExtensions",
                "namespaces",
                "netDevices",
                "seccomp",
                "selinux"
            ]
        );
        assert_eq!(
            keys(&value["linux"]["seccomp"]),
            [
                "actions",
                "archs",
                "enabled",
                "knownFlags",
                "operators",
                "supportedFlags"
            ]
        );
        for mode in MEMORY_POLICY_MODES {
            let document = json!({"mode": mode, "nodes": "0", "flags": MEMORY_POLICY_FLAGS});
            serde_json::from_value::<coracle_oci::spec::LinuxMemoryPolicy>(document).unwrap();
        }
        let supported = value["linux"]["seccomp"]["supportedFlags"]
            .as_array()
            .unwrap();
        assert!(supported.contains(&json!("SECCOMP_FILTER_FLAG_LOG")));
    }

    #[test]
    fn features_lists_are_sorted_and_say_what_is_missing() {
        let value = features();
        let mut sorted = MOUNT_OPTIONS.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, MOUNT_OPTIONS);
        assert_eq!(value["linux"]["seccomp"]["enabled"], true);
        assert!(
            value["linux"]["capabilities"]
                .to_string()
                .contains("CAP_SYS_ADMIN")
        );
    }
}
