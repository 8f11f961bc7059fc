//! Watching for OOM kills, and for the end of the container.
//!
//! v1: an eventfd registered with the memory cgroup, which the kernel also signals when the cgroup
//! goes. v2: priority events of memory.events and cgroup.events.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::step::{Dir, read_fd};
use super::tree::Cgroup;
use crate::error::{Error, Result};

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub oom_kills: u64,
    /// Nobody is in the cgroup any more, or it has gone.
    pub ended: bool,
}

pub struct OomWatch<'a> {
    cgroup: &'a Cgroup,
    kills: u64,
    v1: Option<V1>,
    v2: Vec<OwnedFd>,
}

struct V1 {
    event: OwnedFd,
    /// The registration lasts as long as this is open.
    _control: OwnedFd,
}

impl<'a> OomWatch<'a> {
    /// # Errors
    /// The events of a controller that is there cannot be had.
    pub fn new(cgroup: &'a Cgroup) -> Result<OomWatch<'a>> {
        let kills = cgroup.oom_kills()?;
        let mut watch = OomWatch {
            cgroup,
            kills,
            v1: None,
            v2: Vec::new(),
        };
        if !cgroup.is_v2()
            && let Some(place) = cgroup.place_of("memory")
        {
            watch.v1 = Some(V1::new(&Dir::open(&place.path)?)?);
        }
        // On hybrid hosts the cgroup2 directory tells when the container ends.
        if let Some(place) = cgroup
            .dirs
            .iter()
            .find(|place| place.controllers.is_empty())
        {
            let dir = Dir::open(&place.path)?;
            for file in ["cgroup.events", "memory.events"] {
                match dir.open_file(file, OFlags::RDONLY) {
                    Ok(fd) => watch.v2.push(fd),
                    // memory.events: no memory controller here.
                    Err(Errno::NOENT) => {}
                    Err(errno) => {
                        let path = dir.path().join(file).display().to_string();
                        return Err(Error::system("open", path, errno));
                    }
                }
            }
        }
        Ok(watch)
    }

    /// Waits for an event, or until the deadline.
    ///
    /// # Errors
    /// poll fails.
    pub fn wait(&mut self, deadline: Instant) -> Result<Seen> {
        let mut seen = self.look();
        if seen == Seen::default() {
            self.poll(deadline)?;
            seen = self.look();
        }
        Ok(seen)
    }

    fn poll(&self, deadline: Instant) -> Result<()> {
        let mut fds: Vec<_> = self
            .v2
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::PRI))
            .collect();
        fds.extend(
            self.v1
                .iter()
                .map(|v1| PollFd::new(&v1.event, PollFlags::IN)),
        );
        let left = deadline.saturating_duration_since(Instant::now());
        match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(Error::system("poll", "cgroup events", errno)),
        }
    }

    fn look(&mut self) -> Seen {
        // Reading them arms the next event.
        let mut ended = false;
        for fd in &self.v2 {
            let text = rustix::fs::seek(fd, SeekFrom::Start(0)).and_then(|_| read_fd(fd.as_fd()));
            ended |= match text {
                Ok(text) => text.lines().any(|line| line == "populated 0"),
                Err(_) => true,
            };
        }
        if let Some(v1) = &self.v1 {
            let mut count = [0u8; 8];
            let _ = rustix::io::read(&v1.event, &mut count);
            let place = self.cgroup.place_of("memory");
            ended |= !place.is_some_and(|place| place.path.exists());
        }
        let kills = self.cgroup.oom_kills().unwrap_or(self.kills);
        let oom_kills = kills.saturating_sub(self.kills);
        self.kills = kills.max(self.kills);
        Seen { oom_kills, ended }
    }
}

impl V1 {
    /// `<eventfd> <fd of memory.oom_control>` written to cgroup.event_control.
    fn new(dir: &Dir) -> Result<V1> {
        let failed = |file: &'static str| {
            move |errno: Errno| {
                Error::system("open", dir.path().join(file).display().to_string(), errno)
            }
        };
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::system("eventfd", "", errno))?;
        let control = dir
            .open_file("memory.oom_control", OFlags::RDONLY)
            .map_err(failed("memory.oom_control"))?;
        let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
        dir.write("cgroup.event_control", &line)
            .map_err(failed("cgroup.event_control"))?;
        Ok(V1 {
            event,
            _control: control,
        })
    }
}
