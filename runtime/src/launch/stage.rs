//! The stage: a short-lived process that joins namespaces by path and then clones the container's
//! init as its own sibling, so that the runtime's parent side sees a plain child.
//!
//! Only for a user namespace together with joined ones (see `crate::plan::namespaces`).

use std::os::fd::{AsFd, OwnedFd};

use coracle_oci::spec::LinuxNamespaceType as Kind;
use coracle_sys::clone::{Side, exit_now};
use rustix::fs::{Mode, OFlags};

use super::channel::Channel;
use super::clone::clone;
use super::process;
use crate::error::{Error, Result};
use crate::init;
use crate::plan::Plan;
use crate::plan::namespaces::JoinStep;

/// Whether this process is the stage's child, that is the container's init.
pub enum Staged {
    Init,
}

/// Joins, clones and ends; returns in the clone only.
pub fn run(plan: &Plan, channel: &Channel) -> Staged {
    match steps(plan) {
        Ok(Side::Child) => Staged::Init,
        Ok(Side::Parent { pid, pidfd }) => {
            let reported = channel.report_clone(pid, pidfd.as_fd());
            exit_now(i32::from(reported.is_err()))
        }
        Err(error) => {
            // Without the channel there is nobody to tell.
            let _ = channel.report_failure(&error);
            exit_now(1)
        }
    }
}

fn steps(plan: &Plan) -> Result<Side> {
    process::set_limits(None, &process::with_room_for_files(&plan.process.rlimits))?;
    let plan = &plan.namespaces;
    let mut opened: Vec<(&JoinStep, OwnedFd)> = Vec::with_capacity(plan.joins.len());
    for join in &plan.joins {
        let path = join.path.to_string_lossy();
        let fd = rustix::fs::open(&join.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Error::system("open namespace", path, error))?;
        opened.push((join, fd));
    }
    // The host's rights join what the host owns; what they do not reach, an unprivileged caller's
    // own namespaces, is joined from inside the user namespace.
    let mut refused = Vec::new();
    for (join, fd) in opened {
        match init::enter(&join.path, join.kind, &fd) {
            Ok(()) => {
                if join.kind == Kind::User {
                    init::become_root()?;
                }
            }
            Err(error) if error.errno() == Some(libc::EPERM) && join.kind != Kind::User => {
                refused.push((join, fd));
            }
            Err(error) => return Err(error),
        }
    }
    for (join, fd) in refused {
        init::enter(&join.path, join.kind, &fd)?;
    }
    clone(plan.clone_flags | libc::CLONE_PARENT as u64, None)
}
