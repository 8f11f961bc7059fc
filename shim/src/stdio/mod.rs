//! The stdio of one process: what the process gets, and what the shim holds of it.
//!
//! ```text
//! FIFO, fd, attachments --> Feed --> pipe | console --> process
//! process --> pipe | console --> Drain --> CRI log | FIFO | fd | file, copied to attachments
//! process --> pipe --> logging binary, which holds the other end itself
//! ```
//! Owns: every descriptor of that picture. Never knows about tasks or requests; never blocks.

pub mod attach;
pub mod drain;
pub mod feed;
pub mod hold;
pub mod logger;
pub mod loss;
pub mod open;
pub mod spec;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::termios::Winsize;

use crate::error::{Error, Kind, Result};
use crate::log::CriLog;
use crate::poll::{Endpoint, Poll, Ready, Source};
use attach::Attachments;
use drain::{Drain, Progress};
use feed::Feed;
use hold::Hold;
use logger::Logger;

/// The numbers of a process's descriptors in the epoll set.
pub mod part {
    pub const STDIN_SOURCE: u16 = 0;
    pub const STDIN_SINK: u16 = 1;
    pub const OUT_SOURCE: u16 = 2;
    pub const ERR_SOURCE: u16 = 3;
    pub const OUT_SINK: u16 = 4;
    pub const ERR_SINK: u16 = 5;
    pub const LOGGER_READY: u16 = 6;
    const ATTACHMENTS: u16 = 16;

    pub fn attachment(slot: usize, which: u16) -> u16 {
        ATTACHMENTS + (slot as u16) * 4 + which
    }

    pub fn of_attachment(part: u16) -> Option<(usize, usize)> {
        let index = usize::from(part.checked_sub(ATTACHMENTS)?);
        Some((index / 4, index % 4))
    }
}

/// The process's buffers, shared by all streams and given back when there is nothing to copy.
#[derive(Default)]
pub struct Scratch {
    read: Vec<u8>,
    lines: Vec<u8>,
}

impl Scratch {
    const READ: usize = 128 * 1024;

    fn buffers(&mut self) -> (&mut Vec<u8>, &mut Vec<u8>) {
        if self.read.is_empty() {
            self.read = vec![0; Self::READ];
        }
        (&mut self.read, &mut self.lines)
    }

    pub fn in_use(&self) -> bool {
        !self.read.is_empty()
    }

    pub fn release(&mut self) {
        *self = Scratch::default();
    }
}

pub struct Ctx<'a> {
    pub poll: &'a Poll,
    pub scratch: &'a mut Scratch,
}

pub struct Io {
    id: u32,
    stdin: Option<Feed>,
    drains: [Option<Drain>; 2],
    log: Option<CriLog>,
    attachments: Attachments,
    console: Option<OwnedFd>,
    /// A terminal's streams end in descriptors of a client.
    passed: bool,
    logger: Option<Logger>,
    /// Looks in a row at which a reader had not moved, and looks at all.
    stuck: u32,
    looks: u32,
    hold: Hold,
}

/// After the process's exit: is its output all delivered?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    Yes,
    No,
}

impl Io {
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Copying starts when the process exists.
    pub fn start(&mut self, poll: &Poll) -> Result<()> {
        let failed = |e| Error::io("epoll_ctl", "stdio", e);
        for drain in self.drains.iter_mut().flatten() {
            drain.start(poll).map_err(failed)?;
        }
        if let Some(feed) = &mut self.stdin {
            feed.start(poll).map_err(failed)?;
        }
        Ok(())
    }

    pub fn set_console(&mut self, master: OwnedFd) -> Result<()> {
        let failed = |e: std::io::Error| Error::io("fcntl", "console", e);
        set_nonblocking(&master).map_err(failed)?;
        // epoll knows a descriptor by its number: reading and writing need one each.
        let dup = |fd: &OwnedFd| fd.try_clone().map_err(failed);
        if let Some(drain) = &mut self.drains[0] {
            let source = Source::Stdio(self.id, part::OUT_SOURCE);
            drain.set_source(Endpoint::new(dup(&master)?, source));
        }
        if let Some(feed) = &mut self.stdin {
            feed.set_sink(Endpoint::new(
                dup(&master)?,
                Source::Stdio(self.id, part::STDIN_SINK),
            ));
        }
        self.console = Some(master);
        Ok(())
    }

    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let Some(console) = &self.console else {
            return Err(Error::new(
                Kind::Precondition,
                "resize",
                "process without a terminal",
            ));
        };
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: cells(height),
            ws_col: cells(width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(console, size)
            .map_err(|e| Error::io("ioctl(TIOCSWINSZ)", format!("{width}x{height}"), e))
    }

    /// A descriptor of ours is ready.
    pub fn ready(&mut self, ctx: &mut Ctx<'_>, part: u16, ready: Ready) {
        match part {
            part::STDIN_SOURCE => {
                if let Some(feed) = &mut self.stdin {
                    feed.pump(ctx);
                }
            }
            part::STDIN_SINK => {
                if let Some(feed) = &mut self.stdin {
                    feed.sink_ready(ctx.poll);
                    if !feed.blocked() {
                        self.attachments.pause_stdin(ctx.poll, false);
                    }
                }
            }
            part::OUT_SOURCE | part::ERR_SOURCE => {
                self.pump(ctx, usize::from(part - part::OUT_SOURCE));
            }
            part::OUT_SINK | part::ERR_SINK => {
                let stream = usize::from(part - part::OUT_SINK);
                if let Some(drain) = &mut self.drains[stream] {
                    drain.sink_ready(ctx.poll);
                }
                self.pump(ctx, stream);
            }
            part::LOGGER_READY => {
                if let Some(logger) = &mut self.logger {
                    logger.ready();
                }
            }
            part => match part::of_attachment(part) {
                Some((slot, 0)) => self.attached_input(ctx, slot),
                Some((slot, which)) if which <= 2 => {
                    self.attachments
                        .output_ready(ctx.poll, slot, which - 1, ready);
                    self.end_once();
                }
                _ => {}
            },
        }
    }

    fn pump(&mut self, ctx: &mut Ctx<'_>, stream: usize) {
        if let Some(drain) = &mut self.drains[stream] {
            drain.pump(ctx, &mut self.log, &mut self.attachments, stream);
            if drain.finished() {
                self.attachments.end(stream);
            }
        }
    }

    fn attached_input(&mut self, ctx: &mut Ctx<'_>, slot: usize) {
        let Some(source) = self.attachments.stdin(slot) else {
            return;
        };
        let poll = ctx.poll;
        let (read, _) = ctx.scratch.buffers();
        match rustix::io::read(source.fd(), &mut *read) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok(n) if n > 0 => {
                if let Some(feed) = &mut self.stdin {
                    feed.give(poll, &read[..n]);
                    if feed.blocked() {
                        self.attachments.pause_stdin(poll, true);
                    }
                }
            }
            Ok(_) | Err(_) => {
                self.attachments.stdin_ended(slot);
                self.end_once();
            }
        }
    }

    /// `attach:once`: the end of the only client's input is the end of the process's.
    fn end_once(&mut self) {
        if let Some(feed) = &mut self.stdin
            && feed.once
            && feed.attachable
            && !self.attachments.any_stdin()
            && feed.open()
        {
            feed.end();
        }
    }

    /// `fds`: stdin, stdout, stderr.
    pub fn attach(&mut self, poll: &Poll, fds: [Option<OwnedFd>; 3]) -> Result<()> {
        let [stdin, stdout, stderr] = fds;
        let feedable = self
            .stdin
            .as_ref()
            .is_some_and(|f| f.attachable && f.open());
        let stdin = stdin.filter(|_| feedable);
        let live = |stream: usize| self.drains[stream].as_ref().is_some_and(|d| !d.finished());
        let outputs = [stdout.filter(|_| live(0)), stderr.filter(|_| live(1))];
        if stdin.is_none() && outputs.iter().all(Option::is_none) {
            // The client sees the end of its streams at once.
            return Ok(());
        }
        self.attachments
            .add(poll, stdin, outputs)
            .map_err(|e| Error::io("attach", "descriptors", e))?;
        if self.stdin.as_ref().is_some_and(Feed::blocked) {
            self.attachments.pause_stdin(poll, true);
        }
        Ok(())
    }

    pub fn close_stdin(&mut self) {
        if let Some(feed) = &mut self.stdin {
            feed.release();
        }
    }

    pub fn reopen_log(&mut self) -> Result<()> {
        match &mut self.log {
            Some(log) => log.reopen().map_err(|e| Error::io("open", "log", e)),
            None => Err(Error::new(
                Kind::Precondition,
                "reopen",
                "task without a log file",
            )),
        }
    }

    /// What people should know of this output.
    pub fn news(&mut self) -> Vec<String> {
        let files = self.drains.iter_mut().flatten().filter_map(Drain::news);
        let log = self.log.as_mut().and_then(CriLog::news);
        files.chain(log).collect()
    }

    pub fn log_bytes_dropped(&self) -> u64 {
        self.log.as_ref().map_or(0, CriLog::dropped)
    }

    /// The exit waits for the readers of FIFOs, within bounds: when it is to be asked again.
    pub fn hold_exit(&mut self) -> Option<Duration> {
        if self.hold.over() {
            return None;
        }
        let unread = self.drains.iter().flatten().map(Drain::unread).sum();
        self.hold.look(unread, Instant::now())
    }

    /// Somebody asks again already.
    pub fn exit_is_held(&self) -> bool {
        self.hold.waiting()
    }

    /// The exit is told only after what the process wrote is where its readers look: a log file
    /// or a client's descriptor. For a FIFO see `hold_exit`.
    pub fn delays_exit(&self) -> bool {
        self.log.is_some() || self.passed
    }

    pub fn logger(&self) -> Option<&Logger> {
        self.logger.as_ref()
    }

    pub fn logger_mut(&mut self) -> Option<&mut Logger> {
        self.logger.as_mut()
    }

    /// Takes what is readable now; then tells whether all is delivered.
    pub fn settle(&mut self, ctx: &mut Ctx<'_>) -> Drained {
        for stream in 0..2 {
            self.pump(ctx, stream);
        }
        if let Some(feed) = &mut self.stdin {
            feed.close();
        }
        self.drained()
    }

    pub fn drained(&self) -> Drained {
        let open = self.drains.iter().flatten().any(|d| !d.finished());
        if open || self.attachments.behind() {
            Drained::No
        } else {
            Drained::Yes
        }
    }

    /// Called every two seconds after the exit. A pipe that another process holds open is given
    /// up at once, a reader that does not move after `patience` looks, one that moves after six
    /// times that.
    pub fn look(&mut self, ctx: &mut Ctx<'_>, patience: u32) -> Drained {
        let mut stuck = self.attachments.behind();
        for stream in 0..2 {
            let Some(drain) = &mut self.drains[stream] else {
                continue;
            };
            match drain.progress() {
                Progress::Finished | Progress::Moving => {}
                Progress::Stuck => stuck = true,
                Progress::Held => {
                    drain.end(ctx, &mut self.log);
                    self.attachments.end(stream);
                }
            }
        }
        self.stuck = if stuck { self.stuck + 1 } else { 0 };
        self.looks += 1;
        let enough = if self.passed { patience } else { patience * 6 };
        if self.stuck >= patience || self.looks >= enough {
            for drain in self.drains.iter_mut().flatten() {
                drain.abandon(ctx, &mut self.log);
            }
            self.attachments.clear();
        }
        self.drained()
    }
}

pub fn set_nonblocking(fd: impl AsFd) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}
