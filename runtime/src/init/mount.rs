//! The mount steps of a plan, each through file descriptors: a detached mount is made and
//! configured, then moved onto a handle of its target.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use coracle_sys::mount as sys;
use rustix::fs::{CWD, FileType};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::bind::{self, Parent};
use super::cgroup;
use super::copy_up;
use super::resolve::{Root, TargetType, at};
use crate::error::{Error, Result};
use crate::plan::mounts::{FsSource, may_be_inside_proc};
use crate::plan::options::Attributes;
use crate::plan::{MountKind, MountStep};

pub const PROC_SUPER_MAGIC: u64 = 0x9fa0;
const SYSFS_MAGIC: u64 = 0x6265_6572;

/// Makes the mount of the plan's step number `index`. Gives it back where more is to be done to it.
pub fn apply(root: &Root, step: &MountStep, at: (usize, Parent<'_>)) -> Result<Option<OwnedFd>> {
    let wrap = |error: Error| {
        error.context(format!(
            "error mounting {:?} to rootfs at {:?}",
            source_name(step),
            step.destination
        ))
    };
    match &step.kind {
        MountKind::Bind(source) => bind::apply(root, step, source, at),
        MountKind::Fs(source) => {
            return filesystem(root, step, source)
                .map(|mount| step.late_read_only.then_some(mount))
                .map_err(wrap);
        }
        MountKind::Legacy {
            fstype,
            source,
            flags,
            data,
        } => legacy(
            root,
            step,
            &Legacy {
                fstype,
                source,
                flags: *flags,
                data,
            },
        ),
        MountKind::CgroupV1 {
            hierarchies,
            links,
            namespaced,
            label,
        } => cgroup::v1(
            root,
            step,
            (hierarchies, links),
            *namespaced,
            label.as_ref(),
        ),
        MountKind::CgroupV2 {
            directory,
            mountpoint,
            namespaced,
        } => cgroup::v2(root, step, directory, mountpoint, *namespaced),
    }
    .map(|()| None)
    .map_err(wrap)
}

fn source_name(step: &MountStep) -> String {
    match &step.kind {
        MountKind::Bind(source) => source.path.to_string_lossy().into_owned(),
        MountKind::Fs(source) => source.source.to_string_lossy().into_owned(),
        MountKind::Legacy { source, .. } => source.to_string_lossy().into_owned(),
        MountKind::CgroupV1 { .. } | MountKind::CgroupV2 { .. } => "cgroup".to_owned(),
    }
}

/// Clones the tree that a path names.
pub fn clone_tree(path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags)
        .map_err(|error| Error::system("open_tree", path.to_string_lossy(), error))
}

/// Clones the mount that a handle stands on.
pub fn clone_handle(handle: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(handle, c"", flags)
}

/// Moves a detached mount onto a handle.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    move_mount(
        mount,
        c"",
        target,
        c"",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

pub fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let wanted = sys::Attributes {
        set: attributes.set,
        clear: attributes.clear,
        ..sys::Attributes::default()
    };
    sys::set_attributes(mount, &wanted, recursive).map_err(|error| {
        Error::system(
            format!(
                "mount_setattr(set {:#x}, clear {:#x})",
                attributes.set, attributes.clear
            ),
            "",
            error,
        )
    })
}

/// Sets one propagation, given as MS_SHARED and so on with or without MS_REC.
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: u64) -> Result<()> {
    let wanted = sys::Attributes {
        propagation: propagation & !libc::MS_REC,
        ..sys::Attributes::default()
    };
    sys::set_attributes(mount, &wanted, propagation & libc::MS_REC != 0).map_err(|error| {
        Error::system(
            format!("mount_setattr(propagation {propagation:#x})"),
            "",
            error,
        )
    })
}

pub fn finish(mount: &OwnedFd, target: &OwnedFd, step: &MountStep) -> Result<()> {
    attach(mount.as_fd(), target.as_fd()).map_err(|error| at("move_mount", &step.target, error))?;
    for propagation in &step.propagation {
        set_propagation(mount.as_fd(), *propagation)?;
    }
    Ok(())
}

/// A target on a procfs could be any of its files by way of a symlink of the image: only the
/// targets that the plan has checked by name may be there.
pub fn refuse_proc(target: &OwnedFd, step: &MountStep) -> Result<()> {
    if may_be_inside_proc(step) {
        return Ok(());
    }
    let stat = rustix::fs::fstatfs(target).map_err(|error| at("fstatfs", &step.target, error))?;
    if stat.f_type as u64 == PROC_SUPER_MAGIC && step.target.to_bytes() != b"proc" {
        return Err(Error::invalid(format!(
            "{:?} cannot be mounted because it is inside /proc",
            step.destination
        )));
    }
    Ok(())
}

/// A mount of a filesystem with its options, not attached anywhere yet.
pub fn detached(
    fstype: &CStr,
    source: &CStr,
    options: &[(CString, Option<CString>)],
    attributes: Attributes,
) -> Result<OwnedFd> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|error| Error::system("fsopen", fstype.to_string_lossy(), error))?;
    let fail = |call: &str, error: Errno| {
        Error::system(
            format!("{call}{}", kernel_message(&context)),
            fstype.to_string_lossy(),
            error,
        )
    };
    fsconfig_set_string(&context, c"source", source).map_err(|e| fail("fsconfig(source)", e))?;
    for (key, value) in options {
        match value {
            Some(value) => fsconfig_set_string(&context, key.as_c_str(), value.as_c_str()),
            None => fsconfig_set_flag(&context, key.as_c_str()),
        }
        .map_err(|e| fail(&format!("fsconfig({})", key.to_string_lossy()), e))?;
    }
    fsconfig_create(&context).map_err(|e| fail("fsconfig(FSCONFIG_CMD_CREATE)", e))?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes.set as u32),
    )
    .map_err(|e| fail("fsmount", e))
}

/// What the kernel says about a refused option: it can be read from the context.
fn kernel_message(context: &OwnedFd) -> String {
    let mut buffer = [0u8; 512];
    match rustix::io::read(context, &mut buffer) {
        Ok(length) if length > 2 => {
            format!(
                " ({})",
                String::from_utf8_lossy(&buffer[2..length]).trim_end()
            )
        }
        _ => String::new(),
    }
}

fn filesystem(root: &Root, step: &MountStep, source: &FsSource) -> Result<OwnedFd> {
    // A new target has no mode to take over: it gets the kernel's default, 1777.
    let inherit_mode = source.inherit_mode && root.find(&step.target).is_ok();
    let target = if source.strict_target {
        strict_target(root, step, source)?
    } else {
        let target = root.mount_target(&step.target, TargetType::Directory)?;
        refuse_proc(&target, step)?;
        target
    };
    let inherited;
    let mut options = source.options.as_slice();
    if inherit_mode {
        let stat = rustix::fs::fstat(&target).map_err(|error| at("fstat", &step.target, error))?;
        let mode = CString::new(format!("{:o}", stat.st_mode & 0o7777))
            .map_err(|_| Error::invalid("mode"))?;
        inherited = [(c"mode".to_owned(), Some(mode))]
            .into_iter()
            .chain(source.options.iter().cloned())
            .collect::<Vec<_>>();
        options = &inherited;
    }
    let mut attributes = step.attributes;
    if source.copy_up {
        attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    let mount = match detached(source.fstype, &source.source, options, attributes) {
        Ok(mount) => mount,
        Err(error) => match source.fallback {
            Some(host) if error.errno() == Some(libc::EPERM) => {
                let tree = clone_tree(host, true)?;
                is_of_kernel(&tree, source)?;
                set_attributes(tree.as_fd(), step.attributes, false)?;
                tree
            }
            _ => return Err(error),
        },
    };
    if let Some(label) = &source.root_label {
        // This is the host's /proc still.
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(path, c"security.selinux", label.to_bytes_with_nul(), flags)
            .map_err(|error| at("setxattr(security.selinux)", &step.target, error))?;
    }
    if source.copy_up {
        copy_up::copy(&target, &mount)?;
        set_attributes(mount.as_fd(), step.attributes, false)?;
    }
    set_attributes(mount.as_fd(), step.recursive_attributes, true)?;
    finish(&mount, &target, step)?;
    Ok(mount)
}

/// What a joined mount namespace has at /proc or /sys may be anything.
fn is_of_kernel(tree: &OwnedFd, source: &FsSource) -> Result<()> {
    let want = match source.fstype {
        fstype if fstype == c"proc" => PROC_SUPER_MAGIC,
        _ => SYSFS_MAGIC,
    };
    let name = source.fstype.to_string_lossy();
    let stat =
        rustix::fs::fstatfs(tree).map_err(|error| Error::system("fstatfs", name.clone(), error))?;
    if stat.f_type as u64 == want {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the host's /{} is not of type {name}",
        if want == PROC_SUPER_MAGIC {
            "proc"
        } else {
            "sys"
        }
    )))
}

/// proc and sysfs at a symlink or a file would put them elsewhere than the config says, and what
/// the runtime then reads would be the image's (CVE-2019-19921, CVE-2023-27561).
fn strict_target(root: &Root, step: &MountStep, source: &FsSource) -> Result<OwnedFd> {
    let refuse = || {
        Error::invalid(format!(
            "filesystem {:?} must be mounted on ordinary directory",
            source.fstype.to_string_lossy()
        ))
    };
    let target = match root.find_without_symlinks(&step.target) {
        Ok(found) => found,
        Err(Errno::NOENT) => root.make_directory(&step.target, 0o755)?,
        Err(Errno::LOOP) => return Err(refuse()),
        Err(error) => return Err(at("openat2", &step.target, error)),
    };
    let stat = rustix::fs::fstat(&target).map_err(|error| at("fstat", &step.target, error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(refuse());
    }
    Ok(target)
}

struct Legacy<'a> {
    fstype: &'a CStr,
    source: &'a CStr,
    flags: u64,
    data: &'a CStr,
}

/// mount(2) onto a handle, for the filesystems whose options only it parses, and for remounts.
fn legacy(root: &Root, step: &MountStep, mount: &Legacy<'_>) -> Result<()> {
    let target = root.mount_target(&step.target, TargetType::Directory)?;
    refuse_proc(&target, step)?;
    // This is the host's /proc still: the root is changed later.
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    let data = (!mount.data.is_empty()).then_some(mount.data);
    let flags = rustix::mount::MountFlags::from_bits_retain(mount.flags as u32);
    rustix::mount::mount(mount.source, path.as_str(), mount.fstype, flags, data).map_err(
        |error| {
            let call = format!(
                "mount(type {}, flags {:#x}, data {:?})",
                mount.fstype.to_string_lossy(),
                mount.flags,
                mount.data.to_string_lossy()
            );
            Error::system(call, format!("/{}", step.target.to_string_lossy()), error)
        },
    )?;
    let mounted = root
        .find(&step.target)
        .map_err(|error| at("openat2", &step.target, error))?;
    set_attributes(mounted.as_fd(), step.recursive_attributes, true)?;
    for propagation in &step.propagation {
        set_propagation(mounted.as_fd(), *propagation)?;
    }
    Ok(())
}
