//! The root filesystem of a task: mounts that a daemon asks for in Create, undone at Delete.
//!
//! Owns: the translation of mount options. The target is the daemon's own bundle, never a path
//! inside an untrusted tree. An option that cannot be honoured is an error that names it.
//! `overlay` knows what that file system needs, `idmap` the owners that a mount shows, `device`
//! files that are mounted, `helper` the programs that mount.

mod device;
mod helper;
mod idmap;
mod overlay;

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags};

use crate::error::{Error, Kind, Result};
use crate::proto::containerd::types::Mount;
use idmap::Staged;

#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    flags: Flags,
    data: Vec<String>,
    /// The source is a file that a loop device is put before.
    loopdev: Option<device::Loop>,
    /// uidmap= and gidmap=, as the kernel takes them.
    idmap: Option<(String, String)>,
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
    let (mut uids, mut gids) = (None, None);
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
        } else if option == "loop" {
            plan.loopdev.get_or_insert_default();
        } else if let Some(device) = option.strip_prefix("loop=") {
            return unsupported(&format!("the device is chosen here, not {device}"));
        } else if let Some(map) = option.strip_prefix("uidmap=") {
            uids = Some(idmap::lines(map).ok_or_else(|| idmap::bad(option))?);
        } else if let Some(map) = option.strip_prefix("gidmap=") {
            gids = Some(idmap::lines(map).ok_or_else(|| idmap::bad(option))?);
        } else if option.starts_with("X-containerd.") {
            return unsupported("meant for the daemon's own mount manager");
        } else {
            plan.data.push(option.clone());
        }
    }
    plan.flags.set = set.bits();
    plan.flags.bind |= mount.r#type == "bind";
    plan.idmap = match (uids, gids) {
        (Some(uids), Some(gids)) => Some((uids, gids)),
        (None, None) => None,
        _ => return Err(idmap::bad("uidmap= without gidmap=, or the reverse")),
    };
    if plan.loopdev.is_some() && (plan.flags.bind || mount.r#type == "overlay") {
        let why = format!("a mount of type {} has no device", mount.r#type);
        return Err(Error::new(Kind::Unsupported, "rootfs mount option", "loop").source(why));
    }
    if let Some(device) = &mut plan.loopdev {
        device.read_only = set.contains(MountFlags::RDONLY);
        // Elsewhere it is the file system's own.
        let before = plan.data.len();
        plan.data.retain(|o| o != "direct-io");
        device.direct_io = plan.data.len() < before;
    }
    Ok(plan)
}

/// Mounts all in order; what was mounted is undone when a later one fails.
pub fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(mount, rootfs) {
            return Err(match (done > 0).then(|| unmount_rootfs(rootfs)) {
                Some(Err(undo)) => e.source(format!("then undoing failed: {undo}")),
                _ => e,
            });
        }
    }
    Ok(())
}

fn target_of(mount: &Mount, rootfs: &Path) -> Result<PathBuf> {
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
    Ok(match mount.target.as_str() {
        "" => rootfs.to_owned(),
        _ => rootfs.join(relative),
    })
}

fn mount_one(mount: &Mount, rootfs: &Path) -> Result<()> {
    let target = target_of(mount, rootfs)?;
    if let Some((program, name)) = helper::of(&mount.r#type) {
        // Its options are its own.
        return helper::mount(mount, program, name, &target);
    }
    let plan = plan(mount)?;
    let failed = |e: Errno| {
        let text = format!("{} {} on {}", mount.r#type, mount.source, target.display());
        Error::io("mount", text, e)
    };
    let userns = match &plan.idmap {
        Some((uids, gids)) => Some(idmap::namespace(uids, gids)?),
        None => None,
    };
    if plan.flags.bind {
        bind(mount, &target, &plan.flags, userns.as_ref()).map_err(failed)?;
    } else if mount.r#type == "overlay" {
        let stage = match &userns {
            Some(userns) => Some(Staged::new(rootfs, &plan.data, userns)?),
            None => None,
        };
        let data = stage.as_ref().map_or(&plan.data, |s| &s.data);
        overlay::mount(mount, &target, plan.flags.mount(), data).map_err(failed)?;
    } else {
        filesystem(mount, &target, &plan)?;
        if let Some(userns) = &userns {
            idmap::replace(&target, userns).map_err(|e| {
                // Without its mapping it must not stay.
                let _ = rustix::mount::unmount(&target, UnmountFlags::DETACH);
                failed(e)
            })?;
        }
    }
    if plan.flags.propagation != 0 {
        let flags = MountPropagationFlags::from_bits_retain(plan.flags.propagation);
        rustix::mount::mount_change(&target, flags).map_err(failed)?;
    }
    Ok(())
}

impl Flags {
    fn mount(&self) -> MountFlags {
        MountFlags::from_bits_retain(self.set)
    }
}

/// The same flags for the mount API of Linux 5.2.
fn attributes(flags: MountFlags) -> MountAttrFlags {
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
    attributes
}

fn bind(
    mount: &Mount,
    target: &Path,
    flags: &Flags,
    userns: Option<&OwnedFd>,
) -> std::result::Result<(), Errno> {
    let source = Path::new(&mount.source);
    if let Some(userns) = userns {
        return idmap::bind(
            source,
            target,
            flags.recursive,
            attributes(flags.mount()),
            userns,
        );
    }
    match flags.recursive {
        true => rustix::mount::mount_bind_recursive(source, target),
        false => rustix::mount::mount_bind(source, target),
    }?;
    if flags.mount().is_empty() {
        return Ok(());
    }
    rustix::mount::mount_remount(target, flags.mount() | MountFlags::BIND, c"").inspect_err(|_| {
        // The bind without its flags must not stay.
        let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
    })
}

/// A file system on a device, on a file, or on nothing.
fn filesystem(mount: &Mount, target: &Path, plan: &Plan) -> Result<()> {
    let flags = plan.flags.mount();
    let data = plan.data.join(",");
    let failed = |e: Errno| {
        let text = format!("{} {} on {}", mount.r#type, mount.source, target.display());
        Error::io("mount", text, e)
    };
    let through = |device: &device::Loop| {
        let device = device.attach(Path::new(&mount.source))?;
        plain(&device.path, &mount.r#type, target, flags, &data).map_err(failed)
    };
    if let Some(device) = &plan.loopdev {
        return through(device);
    }
    match plain(&mount.source, &mount.r#type, target, flags, &data) {
        // erofs takes a file itself since Linux 6.12, where the kernel is built so.
        Err(Errno::NOTBLK) if mount.r#type == "erofs" => through(&device::Loop {
            read_only: true,
            direct_io: false,
        }),
        result => result.map_err(failed),
    }
}

fn plain(
    source: &str,
    kind: &str,
    target: &Path,
    flags: MountFlags,
    data: &str,
) -> std::result::Result<(), Errno> {
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(source, target, kind, flags, Some(data.as_c_str()))
}

/// Removes what a Create has mounted for this root filesystem, and what its death left half-way.
pub fn unmount_rootfs(rootfs: &Path) -> Result<()> {
    unmount_all(rootfs)?;
    idmap::clean(rootfs)
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
        for option in ["loop", "loop=/dev/loop7", "X-containerd.mkdir.path=/x"] {
            let error = plan(&mount("overlay", &[option])).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains(option));
        }
        for options in [&["uidmap=0:1:1"][..], &["uidmap=x", "gidmap=0:1:1"]] {
            let error = plan(&mount("overlay", options)).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{options:?}");
            assert!(error.to_string().contains("uidmap="), "{error}");
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
    fn loop_and_mappings_are_understood() {
        let got = plan(&mount("ext4", &["loop", "ro", "direct-io", "norecovery"])).unwrap();
        let device = got.loopdev.unwrap();
        assert!(device.read_only && device.direct_io);
        assert_eq!(got.data, ["norecovery"]);
        let got = plan(&mount(
            "bind",
            &["uidmap=0:9:2,7:3:1", "gidmap=0:9:1", "rw"],
        ))
        .unwrap();
        let maps = ("0 9 2\n7 3 1\n".to_owned(), "0 9 1\n".to_owned());
        assert_eq!(got.idmap, Some(maps));
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_done() {
        let dir = tempfile::tempdir().unwrap();
        unmount_all(dir.path()).unwrap();
        unmount_all(&dir.path().join("absent")).unwrap();
    }
}
