//! The container's root as CRIU wants it on restore: a mount, with every mount point in place.
//!
//! All of it is mounted in a mount namespace that only CRIU is started in, and goes with it: a
//! restore that is killed leaves no mount on the host, whose removal could reach into the root.

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use coracle_oci::spec::LinuxNamespaceType;
use coracle_sys::process::unshare;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use super::mounts::{absolute, place_of, stands_in_another};
use crate::error::{Error, Result};
use crate::init::mount::{attach, clone_handle, clone_tree, set_propagation};
use crate::init::resolve::{Root, TargetType, at};
use crate::plan::mounts::BindSource;
use crate::plan::{MountKind, MountStep, Plan, c_string};

/// Does the work in a mount namespace of its own, in which mounts at `place` concern nobody else.
///
/// # Errors
/// Those of the work; or the way back is barred, and nothing more can be done in this process.
pub fn in_private_mounts<T>(place: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let open = |path: &str, flags: OFlags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Error::system("open", path, error))
    };
    let namespace = open("/proc/self/ns/mnt", OFlags::RDONLY)?;
    let root = open("/", OFlags::PATH | OFlags::DIRECTORY)?;
    let directory = open(".", OFlags::PATH | OFlags::DIRECTORY)?;
    unshare(libc::CLONE_NEWNS.cast_unsigned())
        .map_err(|error| Error::system("unshare(CLONE_NEWNS)", "", error))?;
    let done = keep_inside(place).and_then(|()| work());
    let kind = LinuxNamespaceType::Mount;
    crate::init::enter(c"/proc/self/ns/mnt", kind, &namespace)?;
    // setns(2) has moved both to the top of the namespace.
    rustix::process::fchdir(&root)
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::fchdir(&directory))
        .map_err(|error| Error::system("fchdir", "back", error))?;
    done
}

/// Keeps what is mounted at a path from showing up on the host: the mount that holds the path
/// gives nothing away. Others stay as they are, since CRIU copies their propagation.
fn keep_inside(path: &Path) -> Result<()> {
    let fail = |call: &'static str, error| Error::system(call, path.display().to_string(), error);
    let look = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory =
        rustix::fs::open(path, look, Mode::empty()).map_err(|error| fail("open", error))?;
    loop {
        let stat = rustix::fs::statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
            .map_err(|error| fail("statx", error))?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return set_propagation(directory.as_fd(), libc::MS_SLAVE);
        }
        directory = rustix::fs::openat(&directory, c"..", look, Mode::empty())
            .map_err(|error| fail("openat(..)", error))?;
    }
}

/// Mounts the root at `place` and sees to its mount points. Gives the place of each mount step
/// inside the root, links followed.
///
/// # Errors
/// A mount point cannot be made, or a bind mount's source is not there.
pub fn mount(plan: &Plan, place: &Path) -> Result<Vec<String>> {
    let root = mount_once(plan, place)?;
    let mut places = Vec::with_capacity(plan.mounts.len());
    for (index, step) in plan.mounts.iter().enumerate() {
        let inside = match stands_in_another(&plan.mounts, index) {
            true => None,
            false => mount_point(&root, step, place)?,
        };
        places.push(inside.unwrap_or_else(|| absolute(&step.target)));
    }
    drop(root);
    // What was bound for the sake of mount points inside goes with the mount below it.
    unmount(place, UnmountFlags::DETACH)
        .map_err(|error| Error::system("umount2", place.display().to_string(), error))?;
    mount_once(plan, place)?;
    Ok(places)
}

fn mount_once(plan: &Plan, place: &Path) -> Result<Root> {
    let tree = clone_tree(&plan.rootfs.c_path, true)?;
    let path = c_string("root", place.as_os_str().as_bytes())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree.as_fd(), c"", CWD, &path, flags)
        .map_err(|error| Error::system("move_mount", place.display().to_string(), error))?;
    Ok(Root::new(tree))
}

/// Makes one mount point, and binds what the mounts after it may have to be made in.
fn mount_point(root: &Root, step: &MountStep, place: &Path) -> Result<Option<String>> {
    let wrap = |error: Error| {
        error.context(format!(
            "create criu restore mountpoint for {:?}",
            step.destination
        ))
    };
    let target = match &step.kind {
        MountKind::Bind(source) => bind(root, step, source, place),
        MountKind::CgroupV1 { .. } | MountKind::CgroupV2 { .. } => return Ok(None),
        MountKind::Fs(_) | MountKind::Legacy { .. } => {
            let made = root.mount_target(&step.target, TargetType::Directory);
            made.and_then(|target| inside(&target, place))
        }
    };
    target.map(Some).map_err(wrap)
}

fn bind(root: &Root, step: &MountStep, source: &BindSource, place: &Path) -> Result<String> {
    let tree = match &source.inside {
        None => clone_tree(&source.path, true)?,
        Some(path) => {
            let found = root
                .find(path)
                .map_err(|error| at("openat2", path, error))?;
            clone_handle(found.as_fd(), true).map_err(|error| at("open_tree", path, error))?
        }
    };
    let want = file_type(&tree, &source.path)?;
    let target = root.mount_target(&step.target, want)?;
    let inside = inside(&target, place)?;
    attach(tree.as_fd(), target.as_fd()).map_err(|error| at("move_mount", &step.target, error))?;
    Ok(inside)
}

fn file_type(file: &OwnedFd, path: &CString) -> Result<TargetType> {
    let stat = rustix::fs::fstat(file).map_err(|error| at("fstat", path, error))?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => TargetType::Directory,
        _ => TargetType::File,
    })
}

/// A path below `place` as the container has it.
fn inside(target: &OwnedFd, place: &Path) -> Result<String> {
    let path = place_of(target)?;
    let inside = path.strip_prefix(place).unwrap_or(&path);
    Ok(format!("/{}", inside.display()))
}
