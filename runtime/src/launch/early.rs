//! What only the parent can open: trees that a child in a user namespace may not reach, and
//! id-mapped ones, which take rights over the source's filesystem.

use std::os::fd::{AsFd, OwnedFd};

use coracle_oci::spec::LinuxNamespaceType;
use coracle_sys::mount as sys;
use rustix::fs::{Mode, OFlags};

use super::idmap;
use crate::error::{Error, Result};
use crate::host::HostFacts;
use crate::init::mount::{clone_tree, set_propagation, set_step_attributes};
use crate::plan::mounts::IdMap;
use crate::plan::{MountKind, MountStep, Plan};

/// One place for each mount step.
///
/// # Errors
/// A source is missing, or its filesystem takes no id mapping.
pub fn trees(plan: &Plan, host: &HostFacts) -> Result<Vec<Option<OwnedFd>>> {
    plan.mounts
        .iter()
        .map(|step| match &step.kind {
            MountKind::Bind(source) if source.early => {
                let tree = clone_tree(&source.path, source.recursive)?;
                prepare(&tree, step, source.idmap.as_ref(), (plan, host)).map(|()| Some(tree))
            }
            _ => Ok(None),
        })
        .map(|tree| tree.map_err(|error| error.context("error opening mount source")))
        .collect()
}

fn prepare(
    tree: &OwnedFd,
    step: &MountStep,
    idmap: Option<&IdMap>,
    (plan, host): (&Plan, &HostFacts),
) -> Result<()> {
    // A clone made here is a peer of the host's mount: what is mounted below it in the container
    // would show up on the host.
    set_propagation(tree.as_fd(), libc::MS_SLAVE | libc::MS_REC)?;
    set_step_attributes(tree.as_fd(), step)?;
    let Some(idmap) = idmap else { return Ok(()) };
    let namespace = if idmap.uid_map.is_empty() || idmap.gid_map.is_empty() {
        joined_user_namespace(plan, step)?
    } else {
        idmap::namespace(&idmap.uid_map, &idmap.gid_map, host)?
    };
    let attributes = sys::Attributes {
        idmap: Some(namespace.as_fd()),
        ..Default::default()
    };
    sys::set_attributes(tree.as_fd(), &attributes, idmap.recursive).map_err(|error| {
        Error::system(
            "mount_setattr(MOUNT_ATTR_IDMAP)",
            step.destination.clone(),
            error,
        )
    })
}

/// The container's own mapping where it is not the config's but that of a namespace it joins.
fn joined_user_namespace(plan: &Plan, step: &MountStep) -> Result<OwnedFd> {
    let joins = &plan.namespaces.joins;
    let join = joins
        .iter()
        .find(|join| join.kind == LinuxNamespaceType::User);
    let join = join.ok_or_else(|| {
        let place = &step.destination;
        Error::invalid(format!("mounts: {place}: id-mapped mount without mappings"))
    })?;
    rustix::fs::open(&join.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::system("open namespace", join.path.to_string_lossy(), error))
}

/// The root, where the child could not reach its path.
///
/// # Errors
/// It is not there.
pub fn root(plan: &Plan, host: &HostFacts) -> Result<Option<OwnedFd>> {
    if !plan.namespaces.has_user() || !host.is_root() {
        return Ok(None);
    }
    let tree = clone_tree(&plan.rootfs.c_path, true)?;
    set_propagation(tree.as_fd(), libc::MS_SLAVE | libc::MS_REC)?;
    Ok(Some(tree))
}
