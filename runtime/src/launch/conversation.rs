//! The parent's half of the talk with a child that prepares itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_oci::spec::Hooks;
use coracle_oci::state::{State, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::{Channel, Report};
use super::seccomp_agent;
use super::sources::Sources;
use crate::console::{ConsoleSocket, follow_size};
use crate::error::{Error, Kind, Result};
use crate::hooks;
use crate::seccomp::Compiled;

/// Who talks, and what the parent does when asked.
#[derive(Debug)]
pub struct Conversation<'a> {
    pub channel: &'a Channel,
    pub seccomp: Option<&'a Compiled>,
    /// The hooks of the runtime's side and their directory; none for an exec.
    pub hooks: Option<(&'a Hooks, &'a Path)>,
    /// What the mounts may ask for; none once they stand.
    pub sources: Option<Sources<'a>>,
    pub state: &'a State,
    pub console: Option<ConsoleSocket>,
    /// The terminal, when there is no socket to send it to.
    pub master: Option<OwnedFd>,
}

const IN_INIT: &str = "error during container init";

/// What the parent waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    Built,
    Ready,
    /// The channel closes without a report of failure.
    Executed,
}

impl<'a> Conversation<'a> {
    /// Serves the child until it is that far.
    ///
    /// # Errors
    /// The child's failure, or that of something it asked for.
    pub fn until(&mut self, goal: Goal, pid: i32) -> Result<()> {
        loop {
            match self.channel.next()? {
                Report::Built if goal == Goal::Built => return Ok(()),
                Report::Ready if goal == Goal::Ready => return Ok(()),
                Report::Closed if goal == Goal::Executed => return Ok(()),
                Report::Hooks => {
                    self.run_hooks()?;
                    self.channel.proceed()?;
                }
                Report::Console(master) => match &self.console {
                    Some(socket) => socket.send(master.as_fd(), b"/dev/ptmx")?,
                    None => {
                        // Before the program can ask for it.
                        follow_size(master.as_fd());
                        self.master = Some(master);
                    }
                },
                Report::Listener(listener) => {
                    if let Some(filter) = self.seccomp {
                        seccomp_agent::send(filter, &listener, pid, self.state)?;
                    }
                }
                Report::Mount(index, tree) => {
                    self.sources()?.map_ids(index, &tree)?;
                    self.channel.answer_served()?;
                }
                Report::Unreachable(index, namespace) => {
                    for file in self.open(index, &namespace)? {
                        self.channel.answer_tree(file.as_fd())?;
                    }
                }
                Report::Failed(error) => return Err(self.explained(error)),
                Report::Closed => {
                    return Err(Error::new(
                        Kind::System,
                        "container init exited prematurely",
                        "",
                    ));
                }
                report @ (Report::Built
                | Report::Ready
                | Report::Cloned(..)
                | Report::Tree(_)
                | Report::Continue
                | Report::Network(_)
                | Report::Served) => {
                    return Err(Error::new(
                        Kind::Internal,
                        format!("unexpected report {report:?} before {goal:?}"),
                        "",
                    ));
                }
            }
        }
    }

    fn sources(&mut self) -> Result<&mut Sources<'a>> {
        self.sources
            .as_mut()
            .ok_or_else(|| Error::new(Kind::Internal, "a mount was asked for too late", ""))
    }

    fn open(&mut self, index: Option<usize>, namespace: &OwnedFd) -> Result<Vec<OwnedFd>> {
        let sources = self.sources()?;
        match index {
            Some(index) => sources.open(index, namespace).map(|tree| vec![tree]),
            None => sources.open_root(namespace).map(Vec::from),
        }
        .map_err(|error| error.context("error opening mount source"))
    }

    fn run_hooks(&self) -> Result<()> {
        let Some((hooks, cwd)) = self.hooks else {
            return Ok(());
        };
        runtime_hooks(hooks, self.state, cwd)
    }

    /// runc's words for a failure inside the container's init; those of a program, and of an exec
    /// into a container that runs, keep to themselves.
    fn explained(&self, error: Error) -> Error {
        if error.kind() == Kind::Exec || self.state.status == Status::Running {
            return error;
        }
        error.context(IN_INIT)
    }
}

/// What a child that has ended had to say: the reason of what failed here for want of it. systemd
/// takes the cgroup of a scope away with its last process, under who still writes the limits.
pub fn last_words(channel: &Channel, pidfd: BorrowedFd<'_>) -> Option<Error> {
    let mut ended = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    if poll(&mut ended, Some(&Timespec::default())).ok()? == 0 {
        return None;
    }
    loop {
        match channel.next().ok()? {
            Report::Failed(error) if error.kind() == Kind::Exec => return Some(error),
            Report::Failed(error) => return Some(error.context(IN_INIT)),
            Report::Closed => return None,
            // What it asked for before is of no use to it now.
            _ => {}
        }
    }
}

/// The hooks that run in the runtime's namespaces once the container's stand.
///
/// # Errors
/// Those of the first that fails.
#[allow(deprecated)]
pub fn runtime_hooks(hooks: &Hooks, state: &State, cwd: &Path) -> Result<()> {
    for (point, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
    ] {
        hooks::run(point, list.as_deref().unwrap_or_default(), state, Some(cwd))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_have_last_words_and_the_living_none() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&sleeper);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        theirs.report_hooks().unwrap();
        let failure = Error::new(Kind::System, "mount", "/nowhere");
        theirs.report_failure(&failure).unwrap();
        drop(theirs);
        assert!(last_words(&ours, pidfd.as_fd()).is_none());
        sleeper.kill().unwrap();
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut ended, None).unwrap();
        let words = last_words(&ours, pidfd.as_fd()).unwrap();
        sleeper.wait().unwrap();
        assert!(format!("{words:#}").starts_with("error during container init: mount"));
        assert!(last_words(&ours, pidfd.as_fd()).is_none());
    }
}
