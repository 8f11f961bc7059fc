//! Mounts of type "cgroup": what a container sees of its cgroups, on v1, v2 and hybrid hosts.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::mount::{attach, clone_tree, detached, finish, refuse_proc, set_attributes};
use super::resolve::{Root, TargetType, at};
use crate::error::Result;
use crate::plan::MountStep;
use crate::plan::mounts::V1Hierarchy;
use crate::plan::options::Attributes;

/// A tmpfs with the hierarchies, each anew in the cgroup namespace, or bound.
pub fn v1(
    root: &Root,
    step: &MountStep,
    (hierarchies, links): (&[V1Hierarchy], &[(CString, CString)]),
    namespaced: bool,
    label: Option<&CString>,
) -> Result<()> {
    let target = root.mount_target(&step.target, TargetType::Directory)?;
    refuse_proc(&target, step)?;
    let plain = Attributes {
        set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        clear: 0,
    };
    let mut options = vec![(c"mode".to_owned(), Some(c"755".to_owned()))];
    options.extend(label.map(|label| (c"context".to_owned(), Some(label.clone()))));
    let tmpfs = detached(c"tmpfs", c"tmpfs", &options, plain)?;
    for hierarchy in hierarchies {
        rustix::fs::mkdirat(&tmpfs, &hierarchy.name, Mode::from_raw_mode(0o755))
            .map_err(|error| at("mkdirat", &hierarchy.name, error))?;
    }
    for (link, name) in links {
        match rustix::fs::symlinkat(name, &tmpfs, link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(at("symlinkat", link, error)),
        }
    }
    // A mount can be moved below an attached mount only (before Linux 6.15).
    finish(&tmpfs, &target, step)?;
    let attributes = Attributes {
        set: step.attributes.set | plain.set,
        clear: 0,
    };
    for hierarchy in hierarchies {
        let place = rustix::fs::openat(
            &tmpfs,
            &hierarchy.name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| at("openat", &hierarchy.name, error))?;
        let mount = if namespaced {
            detached(c"cgroup", c"cgroup", &hierarchy.options, attributes)?
        } else {
            let tree = match clone_tree(&hierarchy.directory, false) {
                Err(error) if error.errno() == Some(libc::ENOENT) => {
                    clone_tree(&hierarchy.inherited, false)?
                }
                tree => tree?,
            };
            set_attributes(tree.as_fd(), attributes, false)?;
            tree
        };
        attach(mount.as_fd(), place.as_fd())
            .map_err(|error| at("move_mount", &hierarchy.name, error))?;
    }
    set_attributes(tmpfs.as_fd(), attributes, false)
}

/// The one hierarchy.
pub fn v2(
    root: &Root,
    step: &MountStep,
    directory: &CStr,
    mountpoint: &CStr,
    namespaced: bool,
) -> Result<()> {
    let target = root.mount_target(&step.target, TargetType::Directory)?;
    refuse_proc(&target, step)?;
    let bind = |path: &CStr| -> Result<OwnedFd> {
        let tree = clone_tree(path, false)?;
        set_attributes(tree.as_fd(), step.attributes, false)?;
        Ok(tree)
    };
    let mount = if namespaced {
        match detached(c"cgroup2", c"cgroup", &[], step.attributes) {
            // In a user namespace whose cgroup namespace is another's.
            Err(error) if matches!(error.errno(), Some(libc::EPERM | libc::EBUSY)) => {
                bind(directory)?
            }
            mount => mount?,
        }
    } else {
        // A new mount from the host's cgroup namespace would reset nsdelegate and
        // memory_recursiveprot for the whole host (kernel: apply_cgroup_root_flags).
        bind(mountpoint)?
    };
    finish(&mount, &target, step)
}
