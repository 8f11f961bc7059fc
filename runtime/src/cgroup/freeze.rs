//! Freezing and thawing: `freezer.state` on v1, `cgroup.freeze` on v2.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::step::{Dir, read_fd};
use crate::error::{Error, Result};

/// A task that does not freeze (in an uninterruptible sleep) is given up on after this.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Attempts on v1 between thaws; see `freeze_v1`.
const V1_ATTEMPTS: u32 = 50;

fn failed(call: &'static str, dir: &Dir, file: &str, errno: Errno) -> Error {
    Error::system(call, dir.path().join(file).display().to_string(), errno)
}

/// Whether the cgroup itself was frozen, by itself and not by an ancestor.
pub(super) fn is_frozen(version: u8, dir: &Dir) -> Result<bool> {
    let (state_file, frozen) = match version {
        2 => ("cgroup.freeze", "1"),
        // 1 as soon as freezing was asked for, and only if it was asked of this cgroup.
        _ => ("freezer.self_freezing", "1"),
    };
    match dir.read(state_file) {
        Ok(text) => Ok(text.trim() == frozen),
        // The cgroup went away, or the kernel has no freezer: nothing is frozen.
        Err(Errno::NOENT | Errno::NODEV) => Ok(false),
        Err(errno) => Err(failed("read", dir, state_file, errno)),
    }
}

pub(super) fn freeze(version: u8, dir: &Dir) -> Result<()> {
    let frozen = if version == 2 {
        freeze_v2(dir)
    } else {
        freeze_v1(dir)
    };
    if frozen.is_err() {
        // Half frozen is worse than running: kills would hang.
        let _ = thaw(version, dir);
    }
    frozen
}

pub(super) fn thaw(version: u8, dir: &Dir) -> Result<()> {
    let (file, value) = if version == 2 {
        ("cgroup.freeze", "0")
    } else {
        ("freezer.state", "THAWED")
    };
    dir.write(file, value)
        .map_err(|errno| failed("write", dir, file, errno))
}

/// Waits for "frozen 1" in cgroup.events.
fn freeze_v2(dir: &Dir) -> Result<()> {
    // Opened before the write, so that its event cannot pass unseen.
    let events = Events::open(dir)?;
    dir.write("cgroup.freeze", "1")
        .map_err(|errno| failed("write", dir, "cgroup.freeze", errno))?;
    if events.wait("frozen 1", Instant::now() + FREEZE_TIMEOUT)? {
        return Ok(());
    }
    Err(timed_out(dir))
}

/// v1 has no event for it, and cannot reliably freeze a cgroup in which processes keep appearing:
/// a write of FROZEN is repeated while the state is FREEZING, with a thaw now and then that lets
/// forks in flight finish.
fn freeze_v1(dir: &Dir) -> Result<()> {
    let file = "freezer.state";
    let deadline = Instant::now() + FREEZE_TIMEOUT;
    let mut attempt = 0u32;
    while Instant::now() < deadline {
        attempt += 1;
        if attempt.is_multiple_of(V1_ATTEMPTS) {
            thaw(1, dir)?;
            std::thread::sleep(Duration::from_millis(10));
        }
        dir.write(file, "FROZEN")
            .map_err(|errno| failed("write", dir, file, errno))?;
        let state = dir
            .read(file)
            .map_err(|errno| failed("read", dir, file, errno))?;
        match state.trim() {
            "FROZEN" => return Ok(()),
            "FREEZING" => std::thread::sleep(Duration::from_micros(20)),
            other => {
                return Err(Error::system(
                    "unexpected state while freezing",
                    dir.path().display().to_string(),
                    other.to_owned(),
                ));
            }
        }
    }
    Err(timed_out(dir))
}

fn timed_out(dir: &Dir) -> Error {
    Error::new(
        crate::error::Kind::System,
        "unable to freeze",
        dir.path().display().to_string(),
    )
    .source(Errno::TIMEDOUT)
}

/// An open cgroup.events file: the kernel signals each change of it as a priority event.
pub(super) struct Events {
    fd: OwnedFd,
    path: String,
}

impl Events {
    pub fn open(dir: &Dir) -> Result<Events> {
        let fd = dir
            .open_file("cgroup.events", OFlags::RDONLY)
            .map_err(|errno| failed("open", dir, "cgroup.events", errno))?;
        Ok(Events {
            fd,
            path: dir.path().join("cgroup.events").display().to_string(),
        })
    }

    /// Waits until the file has the line; false when the deadline comes first. A cgroup that goes
    /// away counts as having it: it is neither populated nor in the way.
    pub fn wait(&self, line: &str, deadline: Instant) -> Result<bool> {
        loop {
            let text = rustix::fs::seek(&self.fd, SeekFrom::Start(0))
                .and_then(|_| read_fd(self.fd.as_fd()));
            match text {
                Ok(text) if text.lines().any(|found| found == line) => return Ok(true),
                Ok(_) => {}
                Err(Errno::NODEV) => return Ok(true),
                Err(errno) => return Err(Error::system("read", &self.path, errno)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let mut fds = [PollFd::new(&self.fd, PollFlags::PRI)];
            match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("poll", &self.path, errno)),
            }
        }
    }
}
