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
use crate::plan::namespaces::JoinStep;
use crate::plan::{NamespacePlan, Plan};

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
    let proc = proc_for_maps(plan)?;
    // The host's rights join what the host owns; what they do not reach, an unprivileged caller's
    // own namespaces, is joined from inside the user namespace.
    let mut refused = Vec::new();
    for (join, fd) in opened {
        match init::enter(&join.path, join.kind, &fd) {
            Ok(()) => {
                if join.kind == Kind::User {
                    init::become_root()?;
                    if let Some(proc) = &proc {
                        check_maps(plan, proc)?;
                    }
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

/// The host's /proc, where a joined user namespace comes with mappings, as containerd and CRI-O
/// write it: what else is joined may have another.
fn proc_for_maps(plan: &NamespacePlan) -> Result<Option<OwnedFd>> {
    if !plan.joined_user || (plan.uid_map.is_empty() && plan.gid_map.is_empty()) {
        return Ok(None);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/proc", flags, Mode::empty())
        .map(Some)
        .map_err(|error| Error::system("open", "/proc", error))
}

/// The mappings that were given must be those that the namespace has.
fn check_maps(plan: &NamespacePlan, proc: &OwnedFd) -> Result<()> {
    for (file, wanted) in [("uid_map", &plan.uid_map), ("gid_map", &plan.gid_map)] {
        let fail = |error| Error::system("read", format!("/proc/self/{file}"), error);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let map = rustix::fs::openat(proc, format!("self/{file}"), flags, Mode::empty())
            .map_err(|error| fail(error.into()))?;
        let found = std::io::read_to_string(std::fs::File::from(map)).map_err(fail)?;
        if !same_map(&found, wanted) {
            return Err(Error::invalid(
                "user namespaces enabled, but both namespace path and non-matching mapping \
                 specified -- you may only provide one",
            ));
        }
    }
    Ok(())
}

/// Whether two id maps say the same, however they are laid out.
fn same_map(one: &str, other: &str) -> bool {
    let lines = |map: &str| {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        let mut lines: Vec<Vec<String>> = map.lines().map(words).collect();
        lines.sort();
        lines
    };
    lines(one) == lines(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_compared_by_their_numbers() {
        let kernels = "         0     100000      65536\n     65536          5          1\n";
        assert!(same_map(kernels, "65536 5 1\n0 100000 65536\n"));
        assert!(!same_map(kernels, "0 100000 65536\n"));
        assert!(!same_map(kernels, "65536 5 1\n0 100000 65535\n"));
    }
}
