//! A container as a command finds it: its directory, its record, and its status at this moment.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use coracle_oci::ContainerId;
use coracle_oci::record::{ContainerRecord, ProcessRecord};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::store::{Entry, Store};
use super::transition::{Decision, Request, decide};
use super::{Status, is_alive, status};
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};

#[derive(Debug)]
pub struct Container {
    pub entry: Entry,
    pub record: ContainerRecord,
}

impl Container {
    /// Finds a created container.
    ///
    /// # Errors
    /// The id is none, or there is no such container.
    pub fn open(root: &Path, id: &str) -> Result<Container> {
        let id = parse_id(id)?;
        let entry = Store::open(root).entry(&id)?;
        let record = entry.record()?;
        Ok(Container { entry, record })
    }

    pub fn id(&self) -> &ContainerId {
        &self.record.id
    }

    pub fn cgroup(&self) -> Cgroup {
        Cgroup::open(&self.record.cgroup)
    }

    /// # Errors
    /// The kernel cannot be asked.
    pub fn status(&self) -> Result<Status> {
        status(&self.record, self.entry.path())
    }

    /// Whether the request is still to be done in the container's present status.
    ///
    /// # Errors
    /// The status forbids the request, with runc's text.
    pub fn allows(&self, request: Request) -> Result<bool> {
        match decide(self.status()?, request) {
            Decision::Do => Ok(true),
            Decision::AlreadyDone => Ok(false),
            Decision::Deny(reason) => Err(reason.error(self.id())),
        }
    }
}

/// # Errors
/// The text is no container id.
pub fn parse_id(id: &str) -> Result<ContainerId> {
    ContainerId::parse(id).map_err(|invalid| Error::invalid(invalid.to_string()))
}

/// Opens a process so that no later one with its pid can take its place. `None` if it is gone.
///
/// # Errors
/// The kernel has no pidfds (before 5.3), or no descriptors are left.
pub fn open_process(process: ProcessRecord) -> Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return Ok(None);
    };
    let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
        Err(errno) => return Err(Error::system("pidfd_open", process.pid.to_string(), errno)),
    };
    // Checked after the descriptor was opened: it is this process from now on.
    Ok(is_alive(process).then_some(fd))
}

/// Waits until the process has exited; false if it has not in time.
///
/// # Errors
/// poll fails.
pub fn wait_exit(process: &OwnedFd, timeout: Duration) -> Result<bool> {
    let deadline = std::time::Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::system("poll", "pidfd", errno)),
        }
    }
}
