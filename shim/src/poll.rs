//! The one epoll set of the process: which descriptor wakes which owner.
//!
//! Owns: the epoll descriptor and the meaning of its 64-bit keys. Never reads or writes a
//! registered descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::{Timespec, epoll};

/// Who is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Listener,
    Signals,
    Connection(u32),
    /// A part of a process's stdio; see `stdio` for the numbers.
    Stdio(u32, u16),
    /// inotify on memory.events of every v2 task.
    MemoryEvents,
    /// eventfd behind memory.oom_control of every v1 task.
    OomControl,
    Publisher,
}

impl Source {
    fn key(self) -> u64 {
        let (kind, part, id) = match self {
            Source::Listener => (0, 0, 0),
            Source::Signals => (1, 0, 0),
            Source::Connection(id) => (2, 0, id),
            Source::Stdio(id, part) => (3, part, id),
            Source::MemoryEvents => (4, 0, 0),
            Source::OomControl => (5, 0, 0),
            Source::Publisher => (6, 0, 0),
        };
        (kind << 56) | (u64::from(part) << 32) | u64::from(id)
    }

    fn from_key(key: u64) -> Source {
        let id = key as u32;
        match key >> 56 {
            0 => Source::Listener,
            1 => Source::Signals,
            2 => Source::Connection(id),
            3 => Source::Stdio(id, (key >> 32) as u16),
            4 => Source::MemoryEvents,
            5 => Source::OomControl,
            _ => Source::Publisher,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interest {
    pub read: bool,
    pub write: bool,
    /// Registered for errors and hang-up only.
    pub hangup: bool,
}

impl Interest {
    pub const NONE: Interest = Interest {
        read: false,
        write: false,
        hangup: false,
    };
    pub const READ: Interest = Interest {
        read: true,
        write: false,
        hangup: false,
    };
    pub const WRITE: Interest = Interest {
        read: false,
        write: true,
        hangup: false,
    };
    pub const BOTH: Interest = Interest {
        read: true,
        write: true,
        hangup: false,
    };
    pub const HANGUP: Interest = Interest {
        read: false,
        write: false,
        hangup: true,
    };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        if self.read {
            flags |= epoll::EventFlags::IN;
        }
        if self.write {
            flags |= epoll::EventFlags::OUT;
        }
        flags
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Ready {
    pub source: Source,
    /// Readable, or hung up: a read tells which.
    pub read: bool,
    pub write: bool,
    pub error: bool,
}

pub struct Poll {
    fd: Rc<OwnedFd>,
    buffer: Vec<epoll::Event>,
}

impl Poll {
    pub fn new() -> io::Result<Poll> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Poll {
            fd: Rc::new(fd),
            buffer: Vec::with_capacity(32),
        })
    }

    /// Waits and appends what is ready to `ready`.
    pub fn wait(&mut self, timeout: Option<Timespec>, ready: &mut Vec<Ready>) -> io::Result<()> {
        self.buffer.clear();
        let out = rustix::buffer::spare_capacity(&mut self.buffer);
        match epoll::wait(&*self.fd, out, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        for event in &self.buffer {
            let flags = event.flags;
            let hangup = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
            ready.push(Ready {
                source: Source::from_key(event.data.u64()),
                read: flags.intersects(epoll::EventFlags::IN | hangup),
                write: flags.intersects(epoll::EventFlags::OUT | hangup),
                error: flags.intersects(hangup),
            });
        }
        Ok(())
    }
}

/// A descriptor with its place in the epoll set. Dropping it takes it out of the set and closes
/// it: closing alone would not do, since the kernel keeps an entry for as long as anybody (the
/// client that passed us the descriptor) holds the open file.
pub struct Endpoint {
    fd: OwnedFd,
    registered: Option<Rc<OwnedFd>>,
    source: Source,
    interest: Interest,
    /// Regular files and /dev/null cannot be polled: they never block.
    pollable: bool,
}

impl Endpoint {
    pub fn new(fd: OwnedFd, source: Source) -> Endpoint {
        Endpoint {
            fd,
            registered: None,
            source,
            interest: Interest::NONE,
            pollable: true,
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Changes what wakes the owner. Level-triggered hang-ups are reported even for an empty
    /// interest, therefore NONE takes the descriptor out of the set.
    pub fn watch(&mut self, poll: &Poll, interest: Interest) -> io::Result<()> {
        if interest == self.interest || !self.pollable {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(self.source.key());
        let result = if interest == Interest::NONE {
            epoll::delete(&*poll.fd, &self.fd)
        } else if self.interest == Interest::NONE {
            epoll::add(&*poll.fd, &self.fd, data, interest.flags())
        } else {
            epoll::modify(&*poll.fd, &self.fd, data, interest.flags())
        };
        match result {
            Ok(()) => {
                self.interest = interest;
                self.registered = (interest != Interest::NONE).then(|| Rc::clone(&poll.fd));
            }
            Err(rustix::io::Errno::PERM) => self.pollable = false,
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(set) = &self.registered {
            // Only fails when the entry is gone already.
            let _ = epoll::delete(&**set, &self.fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_kernel() {
        let all = [
            Source::Listener,
            Source::Signals,
            Source::Connection(u32::MAX),
            Source::Stdio(7, 65535),
            Source::Stdio(u32::MAX, 0),
            Source::MemoryEvents,
            Source::OomControl,
            Source::Publisher,
        ];
        for source in all {
            assert_eq!(Source::from_key(source.key()), source);
        }
    }

    #[test]
    fn a_regular_file_is_not_pollable_and_no_error() {
        let poll = Poll::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut endpoint = Endpoint::new(file.into(), Source::Listener);
        endpoint.watch(&poll, Interest::READ).unwrap();
        assert!(!endpoint.pollable);
    }
}
