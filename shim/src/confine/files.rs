//! Landlock: nothing is executed, no device is made or driven, no TCP port is bound or connected,
//! and the system's own directories are not written to.
//!
//! A domain grants by directory, and whatever it does not grant is refused. So every directory of
//! the root is granted but for the system's: logs (`file://`, CRI) may lie anywhere else. Reading
//! is not restricted. The rights of a descriptor are those of whoever opened it: consoles and
//! FIFOs that come to us by SCM_RIGHTS work as ever.
//! Owns: the lists. A directory that appears in `/` later, or a file system that is mounted over
//! one of them, is not writable for this shim any more.

use std::path::Path;

use landlock::{
    AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
    make_bitflags,
};

/// Directories of `/` that hold programs, configuration, devices and the kernel's own files.
const SYSTEM: [&str; 14] = [
    "bin", "boot", "dev", "etc", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "proc", "sbin",
    "sys", "usr",
];
/// What a log may be told to go to in spite of that.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/full", "/dev/pts", "/dev/shm"];
/// cgroup.kill, freezer.state, cgroup.event_control.
const CGROUPS: &str = "/sys/fs/cgroup";

/// To change files: content, and names.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate});
const CHANGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    WriteFile | Truncate | MakeReg | MakeDir | MakeFifo | MakeSock | MakeSym | RemoveFile | RemoveDir
});
/// Nowhere at all.
const NEVER: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    Execute | MakeChar | MakeBlock | IoctlDev | Refer
});

fn is_system(name: &str) -> bool {
    SYSTEM.contains(&name)
}

/// What the kernel does of it, or why nothing.
pub fn restrict(own: &[&Path]) -> Result<String, String> {
    let status = ruleset(own)
        .and_then(RulesetCreated::restrict_self)
        .map_err(|e| format!("no Landlock: {e}"))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(format!("Landlock ABI {}", effective_abi as i32))
        }
        (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(format!(
                "Landlock ABI {}, which lacks a part of what was asked for",
                effective_abi as i32
            ))
        }
        (_, LandlockStatus::NotEnabled) => Err("no Landlock: not enabled at boot".to_owned()),
        (_, LandlockStatus::NotImplemented) => Err("no Landlock: not in this kernel".to_owned()),
        _ => Err("no Landlock: nothing of it was enforced".to_owned()),
    }
}

fn ruleset(own: &[&Path]) -> Result<RulesetCreated, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(CHANGE | NEVER)?
        .handle_access(make_bitflags!(AccessNet::{BindTcp | ConnectTcp}))?
        .create()?;
    let entries = std::fs::read_dir("/").into_iter().flatten().flatten();
    let open = entries.filter(|entry| {
        // A link's target is one of the others, or lies below it.
        entry.file_type().is_ok_and(|kind| kind.is_dir())
            && !entry.file_name().to_str().is_some_and(is_system)
    });
    for entry in open {
        ruleset = grant(ruleset, &entry.path(), CHANGE)?;
    }
    for path in own {
        ruleset = grant(ruleset, path, CHANGE)?;
    }
    for path in DEVICES {
        let rights = match path {
            "/dev/shm" => CHANGE,
            _ => WRITE,
        };
        ruleset = grant(ruleset, Path::new(path), rights)?;
    }
    grant(ruleset, Path::new(CGROUPS), WRITE)
}

/// What is not there is not granted.
fn grant(
    ruleset: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => ruleset.add_rule(PathBeneath::new(fd, rights)),
        Err(_) => Ok(ruleset),
    }
}
