//! What only the parent can do for the child's mounts: open what the child may not reach in its
//! user namespace, and map ids, which takes rights over the source's filesystem.
//!
//! The parent opens nothing in its own mount namespace: see `crate::init::bind`.

use std::os::fd::{AsFd, OwnedFd};

use coracle_oci::spec::LinuxNamespaceType;
use coracle_sys::clone::{Side, exit_now};
use coracle_sys::mount as sys;
use rustix::fs::{Mode, OFlags};

use super::channel::{Channel, Report};
use super::clone::clone;
use super::idmap;
use super::process::reap;
use crate::error::{Error, Kind, Result};
use crate::host::HostFacts;
use crate::init;
use crate::init::mount::clone_tree;
use crate::plan::mounts::{BindSource, IdMap};
use crate::plan::{MountKind, Plan};

/// Serves one child.
#[derive(Debug)]
pub struct Sources<'a> {
    plan: &'a Plan,
    host: &'a HostFacts,
    pid: i32,
    /// User namespaces that were made for mappings: many mounts have the same.
    made: Vec<(&'a (String, String), OwnedFd)>,
}

impl<'a> Sources<'a> {
    pub fn new(plan: &'a Plan, host: &'a HostFacts, pid: i32) -> Self {
        Self {
            plan,
            host,
            pid,
            made: Vec::new(),
        }
    }

    fn step(&self, index: usize) -> Result<&'a BindSource> {
        match self.plan.mounts.get(index).map(|step| &step.kind) {
            Some(MountKind::Bind(source)) => Ok(source),
            _ => Err(Error::new(Kind::Internal, "request for no bind mount", "")),
        }
    }

    /// Maps the ids of a tree that the child has cloned.
    ///
    /// # Errors
    /// Its filesystem takes no id mapping.
    pub fn map_ids(&mut self, index: usize, tree: &OwnedFd) -> Result<()> {
        let source = self.step(index)?;
        match &source.idmap {
            Some(idmap) => self.map(source, idmap, tree),
            None => Ok(()),
        }
    }

    fn map(&mut self, source: &BindSource, idmap: &'a IdMap, tree: &OwnedFd) -> Result<()> {
        let containers;
        let namespace = match &idmap.own {
            Some(maps) => self.namespace(maps)?,
            None => {
                containers = self.containers_namespace()?;
                &containers
            }
        };
        let attributes = sys::Attributes {
            idmap: Some(namespace.as_fd()),
            ..Default::default()
        };
        sys::set_attributes(tree.as_fd(), &attributes, idmap.recursive).map_err(|error| {
            let path = source.path.to_string_lossy();
            let hint = match error.raw_os_error() {
                Some(libc::EINVAL) => {
                    " (maybe the filesystem used doesn't support idmap mounts on this kernel?)"
                }
                _ => "",
            };
            Error::system(
                format!("failed to set MOUNT_ATTR_IDMAP on {path}{hint}"),
                "",
                error,
            )
        })
    }

    fn namespace(&mut self, maps: &'a (String, String)) -> Result<&OwnedFd> {
        let at = match self.made.iter().position(|(made, _)| *made == maps) {
            Some(at) => at,
            None => {
                let namespace = idmap::namespace(&maps.0, &maps.1, self.host)?;
                self.made.push((maps, namespace));
                self.made.len() - 1
            }
        };
        Ok(&self.made[at].1)
    }

    fn containers_namespace(&self) -> Result<OwnedFd> {
        let path = format!("/proc/{}/ns/user", self.pid);
        rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Error::system("open", path, error))
    }

    /// Clones the source of a step in the child's mount namespace, with the runtime's rights.
    ///
    /// # Errors
    /// It is not there, or its filesystem takes no id mapping.
    pub fn open(&mut self, index: usize, namespace: &OwnedFd) -> Result<OwnedFd> {
        let source = self.step(index)?;
        let [tree] = within(namespace, || {
            Ok([clone_tree(&source.path, source.recursive)?])
        })?;
        if let Some(idmap) = &source.idmap {
            self.map(source, idmap, &tree)?;
        }
        Ok(tree)
    }

    /// The container's root, and the place that it comes from.
    ///
    /// # Errors
    /// It is not there.
    pub fn open_root(&self, namespace: &OwnedFd) -> Result<[OwnedFd; 2]> {
        let path = &self.plan.rootfs.c_path;
        within(namespace, || {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let place = rustix::fs::open(path, flags, Mode::empty())
                .map_err(|error| Error::system("open", path.to_string_lossy(), error))?;
            Ok([clone_tree(path, true)?, place])
        })
    }
}

/// Opens in a mount namespace. In a process of its own, since setns(2) changes the caller's root
/// and working directory, and there is no sure way back.
fn within<const COUNT: usize>(
    namespace: &OwnedFd,
    open: impl FnOnce() -> Result<[OwnedFd; COUNT]>,
) -> Result<[OwnedFd; COUNT]> {
    let (mine, theirs) = Channel::pair()?;
    match clone(0, None)? {
        Side::Child => {
            drop(mine);
            let opened = init::enter(
                c"the container's mount namespace",
                LinuxNamespaceType::Mount,
                namespace,
            )
            .and_then(|()| open());
            let sent = match opened {
                Ok(files) => files
                    .iter()
                    .try_for_each(|file| theirs.answer_tree(file.as_fd())),
                Err(error) => theirs.report_failure(&error),
            };
            exit_now(i32::from(sent.is_err()))
        }
        Side::Parent { pid, pidfd: _ } => {
            drop(theirs);
            let files: Result<Vec<OwnedFd>> = (0..COUNT).map(|_| receive(&mine)).collect();
            reap(pid)?;
            files?.try_into().map_err(|_| ended())
        }
    }
}

fn receive(channel: &Channel) -> Result<OwnedFd> {
    match channel.next()? {
        Report::Tree(file) => Ok(file),
        Report::Failed(error) => Err(error),
        _ => Err(ended()),
    }
}

fn ended() -> Error {
    Error::new(Kind::Internal, "no mount source was reported", "")
}
