//! Taking back what a launch has done, in reverse, collecting every failure.

use std::os::fd::{AsFd, OwnedFd};

use coracle_oci::record::{ContainerRecord, MountRecord, ResctrlRecord};
use coracle_oci::spec::{Hook, Hooks};
use coracle_oci::state::{State, Status};

use super::{host_root, process};
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::hooks;
use crate::plan::Plan;
use crate::resctrl;
use crate::state::{Entry, Intent};

/// What there is to undo so far.
#[derive(Default)]
pub struct Undo {
    pub cgroup: Option<Cgroup>,
    pub mounts: Vec<MountRecord>,
    pub resctrl: Option<ResctrlRecord>,
    child: Option<(i32, OwnedFd)>,
    poststop: Option<(Vec<Hook>, State)>,
}

impl Undo {
    /// Notes the child; gives back what the caller goes on with.
    pub fn child(&mut self, pid: i32, pidfd: OwnedFd) -> Result<(i32, OwnedFd)> {
        let copy = rustix::io::fcntl_dupfd_cloexec(&pidfd, 3)
            .map_err(|error| Error::system("fcntl(F_DUPFD_CLOEXEC)", "pidfd", error));
        self.child = Some((pid, pidfd));
        copy.map(|copy| (pid, copy))
    }

    /// Notes the hooks that have to run once others of the container have.
    pub fn poststop(&mut self, plan: &Plan, state: &State) {
        if let Some(list) = plan
            .hooks
            .poststop()
            .as_ref()
            .filter(|list| !list.is_empty())
        {
            self.poststop = Some((list.clone(), state.clone()));
        }
    }

    /// Undoes all of it. The error is the one that made it necessary, with those of the undoing.
    pub fn run(self, intent: Intent, error: Error) -> Error {
        let mut failures = Failures::default();
        if let Some((pid, pidfd)) = &self.child {
            failures.note(process::end(*pid, pidfd.as_fd()));
        }
        if let Some(cgroup) = &self.cgroup {
            if self.child.is_some() {
                failures.note(cgroup.kill_all());
            }
            failures.note(cgroup.made_here().delete());
        }
        for mount in &self.mounts {
            failures.note(host_root::remove(mount));
        }
        if let Some(resctrl) = &self.resctrl {
            failures.note(resctrl::remove(resctrl));
        }
        failures.note(intent.abandon());
        if let Some((list, mut state)) = self.poststop {
            state.status = Status::Stopped;
            failures.note(hooks::run("poststop", &list, &state, None));
        }
        failures.join(error)
    }
}

/// Ends a container that is on record: the last leg of `run`, and of a start that failed.
pub fn destroy(
    record: &ContainerRecord,
    cgroup: &Cgroup,
    entry: &Entry,
    hooks: &Hooks,
    state: &State,
) -> Result<()> {
    let mut failures = Failures::default();
    if !record.private_pid_namespace {
        failures.note(cgroup.kill_all());
    }
    failures.note(cgroup.delete());
    for mount in &record.mounts {
        failures.note(host_root::remove(mount));
    }
    if let Some(resctrl) = &record.resctrl {
        failures.note(resctrl::remove(resctrl));
    }
    failures.note(entry.remove());
    let mut state = state.clone();
    state.status = Status::Stopped;
    state.pid = 0;
    failures.note(hooks::run(
        "poststop",
        hooks.poststop().as_deref().unwrap_or_default(),
        &state,
        None,
    ));
    failures.result()
}

/// The failures of an undoing: all are done, all are told.
#[derive(Default)]
struct Failures {
    texts: Vec<String>,
    first: Option<Error>,
}

impl Failures {
    fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.texts.push(format!("{error:#}"));
            self.first.get_or_insert(error);
        }
    }

    fn join(self, error: Error) -> Error {
        if self.texts.is_empty() {
            return error;
        }
        Error::new(
            error.kind(),
            format!("{error:#} (undo: {})", self.texts.join("; ")),
            "",
        )
    }

    fn result(self) -> Result<()> {
        match self.first {
            None => Ok(()),
            Some(first) if self.texts.len() == 1 => Err(first),
            Some(first) => Err(Error::new(first.kind(), self.texts.join("; "), "")),
        }
    }
}
