//! The root filesystem of a task: mounts that a daemon asks for in Create, undone at Delete.
//!
//! Owns: the translation of mount options. The target is the daemon's own bundle, never a path
//! inside an untrusted tree. An option that cannot be honoured is an error that names it.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags,
};

use crate::error::{Error, Kind, Result};
use crate::proto::containerd::types::Mount;

/// mount(2) takes one page of options, its final zero included.
const MAX_DATA: usize = 4095;

#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    flags: Flags,
    data: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Flags {
    set: u32,
    bind: bool,
    recursive: bool,
    propagation: u32,
}

fn flag(option: &str) -> Option<(MountFlags, bool)> {
    Some(match option {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let recursive = MountPropagationFlags::REC;
    Some(match option {
        "private" => MountPropagationFlags::PRIVATE,
        "rprivate" => MountPropagationFlags::PRIVATE | recursive,
        "shared" => MountPropagationFlags::SHARED,
        "rshared" => MountPropagationFlags::SHARED | recursive,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "rslave" => MountPropagationFlags::DOWNSTREAM | recursive,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "runbindable" => MountPropagationFlags::UNBINDABLE | recursive,
        _ => return None,
    })
}

fn plan(mount: &Mount) -> Result<Plan> {
    let mut plan = Plan::default();
    let mut set = MountFlags::empty();
    for option in &mount.options {
        let unsupported = |why: &str| {
            Err(Error::new(Kind::Unsupported, "rootfs mount option", option).source(why))
        };
        if let Some((flag, on)) = flag(option) {
            set.set(flag, on);
        } else if let Some(flags) = propagation(option) {
            plan.flags.propagation = flags.bits();
        } else if option == "bind" || option == "rbind" {
            plan.flags.bind = true;
            plan.flags.recursive = option == "rbind";
        } else if option == "defaults" || option.is_empty() {
        } else if option == "loop" || option.starts_with("loop=") {
            return unsupported("loop devices are not set up by this shim");
        } else if option.starts_with("uidmap=") || option.starts_with("gidmap=") {
            return unsupported("idmapped root filesystems are not supported");
        } else if option.starts_with("X-containerd.") {
            return unsupported("a mount of the daemon's own mount manager");
        } else {
            plan.data.push(option.clone());
        }
    }
    plan.flags.set = set.bits();
    plan.flags.bind |= mount.r#type == "bind";
    Ok(plan)
}

/// Mounts all in order; what was mounted is undone when a later one fails.
pub fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(mount, rootfs) {
            return Err(match (done > 0).then(|| unmount_all(rootfs)) {
                Some(Err(undo)) => e.source(format!("then undoing failed: {undo}")),
                _ => e,
            });
        }
    }
    Ok(())
}

fn mount_one(mount: &Mount, rootfs: &Path) -> Result<()> {
    let plan = plan(mount)?;
    let relative = Path::new(mount.target.trim_start_matches('/'));
    if relative
        .components()
        .any(|c| matches!(c, std::path::Component::ParentDir))
    {
        return Err(Error::new(
            Kind::Invalid,
            "rootfs mount target",
            &mount.target,
        ));
    }
    let target = if mount.target.is_empty() {
        rootfs.to_owned()
    } else {
        rootfs.join(relative)
    };
    let failed = |e: Errno| {
        let text = format!("{} {} on {}", mount.r#type, mount.source, target.display());
        Error::io("mount", text, e)
    };
    let flags = MountFlags::from_bits_retain(plan.flags.set);
    if plan.flags.bind {
        match plan.flags.recursive {
            true => rustix::mount::mount_bind_recursive(mount.source.as_str(), &target),
            false => rustix::mount::mount_bind(mount.source.as_str(), &target),
        }
        .map_err(failed)?;
        if !flags.is_empty() {
            let result = rustix::mount::mount_remount(&target, flags | MountFlags::BIND, c"");
            if let Err(e) = result {
                // The bind without its flags must not stay.
                let _ = rustix::mount::unmount(&target, UnmountFlags::DETACH);
                return Err(failed(e));
            }
        }
    } else {
        let data = plan.data.join(",");
        let long = data.len() > MAX_DATA;
        let result = match long && mount.r#type == "overlay" {
            false => plain(mount, &target, flags, &data),
            true => match long_overlay(&plan.data, &target, flags) {
                Err(Errno::INVAL | Errno::NOSYS) => relative_overlay(mount, &plan, &target),
                result => result,
            },
        };
        result.map_err(failed)?;
    }
    if plan.flags.propagation != 0 {
        let flags = MountPropagationFlags::from_bits_retain(plan.flags.propagation);
        rustix::mount::mount_change(&target, flags).map_err(failed)?;
    }
    Ok(())
}

fn plain(
    mount: &Mount,
    target: &Path,
    flags: MountFlags,
    data: &str,
) -> std::result::Result<(), Errno> {
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    let source = mount.source.as_str();
    rustix::mount::mount(
        source,
        target,
        mount.r#type.as_str(),
        flags,
        Some(data.as_c_str()),
    )
}

/// `lowerdir=a:b`, where `\:` is a colon of a name.
fn lower_dirs(value: &str) -> Vec<String> {
    let mut dirs = vec![String::new()];
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, dirs.last_mut()) {
            ('\\', Some(dir)) => dir.extend(chars.next()),
            (':', _) => dirs.push(String::new()),
            (c, Some(dir)) => dir.push(c),
            (_, None) => {}
        }
    }
    dirs
}

/// The mount API of Linux 5.2 has no page limit; `lowerdir+` is from Linux 6.8.
fn long_overlay(
    data: &[String],
    target: &Path,
    flags: MountFlags,
) -> std::result::Result<(), Errno> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => {
                for dir in lower_dirs(dirs) {
                    rustix::mount::fsconfig_set_string(&fs, "lowerdir+", dir)?;
                }
            }
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str())?,
        }
    }
    rustix::mount::fsconfig_create(&fs)?;
    let mut attributes = MountAttrFlags::empty();
    for (flag, attribute) in [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ] {
        attributes.set(attribute, flags.contains(flag));
    }
    let mounted = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let here = rustix::fs::CWD;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mounted, "", here, target, flags)
}

/// For older kernels: the layers by paths relative to their common directory. The process has
/// one thread, so nobody else sees the working directory change.
fn relative_overlay(mount: &Mount, plan: &Plan, target: &Path) -> std::result::Result<(), Errno> {
    let lower = plan.data.iter().find_map(|o| o.strip_prefix("lowerdir="));
    let dirs = lower_dirs(lower.ok_or(Errno::INVAL)?);
    let common = common_directory(&dirs).ok_or(Errno::INVAL)?;
    let short = |dir: &String| {
        let below = Path::new(dir)
            .strip_prefix(&common)
            .map_err(|_| Errno::INVAL)?;
        let text = String::from_utf8_lossy(below.as_os_str().as_bytes());
        Ok::<_, Errno>(text.replace('\\', "\\\\").replace(':', "\\:"))
    };
    let lower = dirs
        .iter()
        .map(short)
        .collect::<std::result::Result<Vec<String>, Errno>>()?;
    let mut data = vec![format!("lowerdir={}", lower.join(":"))];
    data.extend(
        plan.data
            .iter()
            .filter(|o| !o.starts_with("lowerdir="))
            .cloned(),
    );
    let data = data.join(",");
    if data.len() > MAX_DATA {
        return Err(Errno::TOOBIG);
    }
    let before = rustix::fs::open(
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::process::chdir(&common)?;
    let result = plain(
        mount,
        target,
        MountFlags::from_bits_retain(plan.flags.set),
        &data,
    );
    rustix::process::fchdir(before)?;
    result
}

fn common_directory(dirs: &[String]) -> Option<PathBuf> {
    let mut common = Path::new(dirs.first()?).parent()?.to_owned();
    for dir in dirs {
        while !Path::new(dir).starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    Some(common)
}

/// Removes every mount on the target. Absence of the mount or of the target is success.
pub fn unmount_all(target: &Path) -> Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) => match rustix::mount::unmount(target, UnmountFlags::DETACH) {
                Ok(()) => {}
                Err(e) => return Err(Error::io("umount2", target.display().to_string(), e)),
            },
            Err(e) => return Err(Error::io("umount2", target.display().to_string(), e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: kind.into(),
            source: "s".into(),
            target: String::new(),
            options: options.iter().map(|o| o.to_string()).collect(),
        }
    }

    #[test]
    fn options_become_flags_and_data() {
        let got = plan(&mount(
            "overlay",
            &["ro", "lowerdir=/a:/b", "index=off", "rw", "nodev"],
        ));
        let got = got.unwrap();
        assert_eq!(got.flags.set, MountFlags::NODEV.bits());
        assert_eq!(got.data, ["lowerdir=/a:/b", "index=off"]);
        let got = plan(&mount("bind", &["rbind", "ro", "rprivate"])).unwrap();
        assert!(got.flags.bind && got.flags.recursive && got.flags.propagation != 0);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for option in ["loop", "uidmap=0:1:1", "X-containerd.mkdir.path=/x"] {
            let error = plan(&mount("overlay", &[option])).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains(option));
        }
        let mut escaping = mount("tmpfs", &[]);
        escaping.target = "../../etc".into();
        assert_eq!(
            mount_one(&escaping, Path::new("/nonexistent"))
                .unwrap_err()
                .kind(),
            Kind::Invalid
        );
    }

    #[test]
    fn lower_dirs_keep_escaped_colons() {
        assert_eq!(lower_dirs("/a:/b\\:c:/d\\\\e"), ["/a", "/b:c", "/d\\e"]);
    }

    #[test]
    fn common_directory_of_layers() {
        let dirs = ["/v/s/1/fs", "/v/s/12/fs"].map(String::from);
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/v/s"));
        let dirs = ["/v/s/1/fs", "/w"].map(String::from);
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/"));
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_done() {
        let dir = tempfile::tempdir().unwrap();
        unmount_all(dir.path()).unwrap();
        unmount_all(&dir.path().join("absent")).unwrap();
    }
}
