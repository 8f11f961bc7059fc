//! Bind mounts: a tree is cloned in the container's own mount namespace, changed, attached.
//!
//! Never cloned on the host and handed in: what a user namespace takes over from the host comes
//! with its flags locked and its mounts tied to what they cover (mount_namespaces(7)). A tree from
//! the host's namespace would come free of that, and the container's root could make it writable
//! or look beneath it.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, StatVfsMountFlags};

use super::mount::{
    PROC_SUPER_MAGIC, clone_handle, clone_tree, finish, refuse_proc, set_attributes,
};
use super::resolve::{Root, TargetType, at};
use crate::error::{Error, Kind, Result};
use crate::launch::channel::Channel;
use crate::plan::MountStep;
use crate::plan::mounts::{BindSource, is_proc, not_of_type_proc};
use crate::plan::options::{FlagChange, MS_LOCKABLE, MS_NOSYMFOLLOW};

/// How the parent is asked for what the child cannot do.
#[derive(Debug, Clone, Copy)]
pub struct Parent<'a> {
    pub channel: &'a Channel,
    /// It has rights beyond the container's user namespace.
    pub opens: bool,
}

/// Makes the bind mount of the plan's step number `index`.
pub fn apply(
    root: &Root,
    step: &MountStep,
    source: &BindSource,
    (index, parent): (usize, Parent<'_>),
) -> Result<()> {
    let tree = open(root, source, (index, parent))?;
    if let Some(change) = source.change {
        change_flags(tree.as_fd(), change)
            .map_err(|error| error.context("failed to set user-requested vfs flags"))?;
    }
    set_attributes(tree.as_fd(), step.recursive_attributes, true)?;
    if is_proc(step) {
        let stat =
            rustix::fs::fstatfs(&tree).map_err(|error| at("fstatfs", &source.path, error))?;
        if stat.f_type as u64 != PROC_SUPER_MAGIC {
            return Err(not_of_type_proc(&step.destination));
        }
    }
    let stat = rustix::fs::fstat(&tree).map_err(|error| at("fstat", &source.path, error))?;
    let want = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => TargetType::Directory,
        _ => TargetType::File,
    };
    let target = root.mount_target(&step.target, want)?;
    refuse_proc(&target, step)?;
    finish(&tree, &target, step).map_err(|error| mismatch(error, step, &target, want))
}

/// A file on a directory, or the other way round: engines know mount(2)'s word for it.
fn mismatch(error: Error, step: &MountStep, target: &OwnedFd, source: TargetType) -> Error {
    let directory = rustix::fs::fstat(target)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
    if error.errno() == Some(libc::EINVAL) && directory != (source == TargetType::Directory) {
        return at("move_mount", &step.target, rustix::io::Errno::NOTDIR);
    }
    error
}

/// The source's tree, id-mapped where that is asked for.
fn open(root: &Root, source: &BindSource, (index, parent): (usize, Parent<'_>)) -> Result<OwnedFd> {
    let tree = match &source.inside {
        Some(path) => clone_inside(root, path, source.recursive),
        None => clone_tree(&source.path, source.recursive),
    };
    let tree = match tree {
        Err(error) if error.errno() == Some(libc::EACCES) && parent.opens => {
            // The parent opens it, and maps its ids.
            parent.channel.report_unreachable(Some(index))?;
            return parent.channel.tree();
        }
        tree => tree?,
    };
    if source.idmap.is_some() {
        // That takes rights over the filesystem.
        parent.channel.report_mount(index, tree.as_fd())?;
        parent.channel.served()?;
    }
    Ok(tree)
}

fn clone_inside(root: &Root, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let found = root
        .find(path)
        .map_err(|error| at("openat2", path, error))?;
    clone_handle(found.as_fd(), recursive).map_err(|error| at("open_tree", path, error))
}

/// Changes the flags as mount(2) with MS_REMOUNT|MS_BIND would. Where the kernel holds some of them
/// locked, those stay as they are, unless the config wants the opposite.
fn change_flags(tree: BorrowedFd<'_>, change: FlagChange) -> Result<()> {
    let Err(error) = set_attributes(tree, change.attributes(0), false) else {
        return Ok(());
    };
    if error.errno() != Some(libc::EPERM) {
        return Err(error);
    }
    let source = flags(tree)?;
    if let Some(refusal) = change.refusal(source) {
        return Err(Error::new(Kind::System, refusal, "").source(rustix::io::Errno::PERM));
    }
    set_attributes(tree, change.attributes(source & MS_LOCKABLE), false)
}

/// The MS_* flags of a mount.
fn flags(mount: BorrowedFd<'_>) -> Result<u64> {
    const PAIRS: [(StatVfsMountFlags, u64); 7] = [
        (StatVfsMountFlags::RDONLY, libc::MS_RDONLY),
        (StatVfsMountFlags::NOSUID, libc::MS_NOSUID),
        (StatVfsMountFlags::NODEV, libc::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, libc::MS_NOEXEC),
        (StatVfsMountFlags::NOATIME, libc::MS_NOATIME),
        (StatVfsMountFlags::NODIRATIME, libc::MS_NODIRATIME),
        (StatVfsMountFlags::RELATIME, libc::MS_RELATIME),
    ];
    /// Not in libc.
    const ST_NOSYMFOLLOW: u64 = 0x2000;
    let stat = rustix::fs::fstatvfs(mount)
        .map_err(|error| Error::system("fstatvfs", "the bind mount's source", error))?;
    let mut flags = 0;
    for (have, flag) in PAIRS {
        if stat.f_flag.contains(have) {
            flags |= flag;
        }
    }
    if stat.f_flag.bits() & ST_NOSYMFOLLOW != 0 {
        flags |= MS_NOSYMFOLLOW;
    }
    // The one mode without a flag to be seen.
    if flags & (libc::MS_NOATIME | libc::MS_RELATIME) == 0 {
        flags |= libc::MS_STRICTATIME;
    }
    Ok(flags)
}
