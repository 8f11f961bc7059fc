//! The root of a container that shares the runtime's mount namespace: it is mounted on itself
//! there, the container's mounts go inside, and whoever takes the container away takes it along.
//!
//! Known by path and mount id, on disk before it is attached: a mount of somebody else at that
//! path is left alone.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_oci::record::MountRecord;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

use crate::error::{Error, Result};
use crate::init::mount::{clone_tree, set_propagation};
use crate::plan::RootfsPlan;

/// The root, not attached yet.
#[derive(Debug)]
pub struct HostRoot {
    pub tree: OwnedFd,
    pub record: MountRecord,
}

impl HostRoot {
    /// Clones the root; None for a container with a mount namespace.
    ///
    /// # Errors
    /// It cannot be cloned, or the kernel has no mount ids to tell (before Linux 5.8).
    pub fn new(plan: &RootfsPlan) -> Result<Option<Self>> {
        if !plan.shares_mounts {
            return Ok(None);
        }
        let tree = clone_tree(&plan.c_path, true)?;
        let stat = rustix::fs::statx(&tree, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
            .map_err(|error| Error::system("statx", plan.path.display().to_string(), error))?;
        if stat.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
            return Err(Error::unsupported(
                "a container without a mount namespace needs Linux 5.8",
            ));
        }
        Ok(Some(Self {
            tree,
            record: MountRecord {
                path: plan.path.clone(),
                id: stat.stx_mnt_id,
            },
        }))
    }

    /// Attaches the root where it comes from. Nothing propagates from it, nor to it.
    ///
    /// # Errors
    /// Those of move_mount(2).
    pub fn attach(&self) -> Result<()> {
        let path = &self.record.path;
        move_mount(
            self.tree.as_fd(),
            c"",
            CWD,
            path,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
        )
        .map_err(|error| Error::system("move_mount", path.display().to_string(), error))?;
        set_propagation(self.tree.as_fd(), libc::MS_PRIVATE | libc::MS_REC)
    }
}

/// Takes away what a record names, if it is still there, with all that was mounted inside.
///
/// # Errors
/// Those of umount2(2).
pub fn remove(record: &MountRecord) -> Result<()> {
    if mounted_at(&record.path)? != Some(record.id) {
        return Ok(());
    }
    match unmount(&record.path, UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::system(
            "umount2(MNT_DETACH)",
            record.path.display().to_string(),
            error,
        )),
    }
}

/// The mount whose root is at the path.
fn mounted_at(path: &Path) -> Result<Option<u64>> {
    match rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID) {
        Ok(stat) => Ok(Some(stat.stx_mnt_id)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(Error::system("statx", path.display().to_string(), error)),
    }
}
