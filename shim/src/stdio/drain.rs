//! One stream of output on its way from a process to where it is kept.
//!
//! Owns: our end of the process's pipe (or console), the sink, and the bytes that the sink did
//! not take yet. While such bytes exist the process's pipe is not read, so memory is bounded and
//! the process feels a slow reader as it would feel any full pipe. The log file is a sink that
//! always takes everything.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

use super::Ctx;
use super::attach::Attachments;
use super::loss::Loss;
use crate::log::{CriLog, Lines, Stamp, write_most};
use crate::poll::{Endpoint, Interest, Poll};

/// Reads per wake-up: other descriptors get their turn in between.
const BUDGET: usize = 16;
const LARGE_PIPE: usize = 1 << 20;
/// So many bytes at once mean more to come, for which a pipe of the usual size is too small.
const MUCH: usize = 32 * 1024;
const FORMAT_CHUNK: usize = 16 * 1024;
const WRITE_BATCH: usize = 64 * 1024;

pub enum Sink {
    Log(Lines),
    /// A FIFO or a descriptor of a client.
    Peer(Endpoint),
    File(OutputFile),
    Discard,
}

/// A file that output is appended to as it is.
pub struct OutputFile {
    path: PathBuf,
    file: File,
    loss: Loss,
}

impl OutputFile {
    pub fn new(path: PathBuf, file: File) -> OutputFile {
        OutputFile {
            path,
            file,
            loss: Loss::default(),
        }
    }

    fn append(&mut self, chunk: &[u8]) {
        match write_most(&mut self.file, chunk) {
            (_, None) => self.loss.over(&self.path),
            (written, Some(e)) => self.loss.lost(&self.path, chunk.len() - written, &e),
        }
    }
}

pub struct Drain {
    source: Option<Endpoint>,
    sink: Sink,
    pending: Vec<u8>,
    /// Pipe to FIFO moves pages and copies nothing.
    splice: bool,
    enlarged: bool,
    /// Something moved since the last look; for the bounded end.
    moved: bool,
    /// The sink is a FIFO, whose reader may be late.
    fifo: bool,
    /// A reader's end of the FIFO when ours is closed: it shows what is unread, and is no writer.
    unread: Option<OwnedFd>,
}

/// Fewer wake-ups for the same bytes. Refused for a console, and over the user's quota of pipe pages: then
/// the pipe stays as it is.
fn enlarge(pipe: &Endpoint) {
    let _ = rustix::pipe::fcntl_setpipe_size(pipe.fd(), LARGE_PIPE);
}

enum Step {
    Again,
    Wait,
    Eof,
}

/// What the end of the process's output depends on.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Finished,
    /// A slow reader still takes what the process left.
    Moving,
    /// The reader of the sink does not take what is there.
    Stuck,
    /// All that the process itself wrote is delivered: another process holds the pipe open.
    Held,
}

impl Drain {
    pub fn new(source: Option<Endpoint>, sink: Sink, splice: bool) -> Drain {
        Drain {
            source,
            sink,
            pending: Vec::new(),
            splice,
            enlarged: false,
            moved: false,
            fifo: false,
            unread: None,
        }
    }

    pub fn with_fifo(mut self, fifo: bool) -> Drain {
        self.fifo = fifo;
        self
    }

    /// Bytes on their way to a FIFO's reader, which has not taken them.
    pub fn unread(&self) -> usize {
        if !self.fifo {
            return 0;
        }
        let in_pipe = |fd: BorrowedFd<'_>| rustix::io::ioctl_fionread(fd).unwrap_or(0) as usize;
        let source = self.source.as_ref().map_or(0, |s| in_pipe(s.fd()));
        let sink = match (&self.sink, &self.unread) {
            (Sink::Peer(sink), _) => in_pipe(sink.fd()),
            (_, Some(end)) => in_pipe(end.as_fd()),
            _ => 0,
        };
        source + self.pending.len() + sink
    }

    /// Closes our ends of the FIFO, so that its reader sees the end after the last byte.
    fn close_sink(&mut self) {
        if let (true, Sink::Peer(sink)) = (self.fifo, &self.sink)
            && rustix::io::ioctl_fionread(sink.fd()).is_ok_and(|n| n > 0)
        {
            let path = format!("/proc/self/fd/{}", sink.fd().as_raw_fd());
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            self.unread = rustix::fs::open(path, flags, Mode::empty()).ok();
        }
        self.sink = Sink::Discard;
    }

    pub fn set_source(&mut self, source: Endpoint) {
        self.source = Some(source);
    }

    pub fn start(&mut self, poll: &Poll) -> std::io::Result<()> {
        match &mut self.source {
            Some(source) => source.watch(poll, Interest::READ),
            None => Ok(()),
        }
    }

    pub fn news(&mut self) -> Option<String> {
        match &mut self.sink {
            Sink::File(file) => file.loss.news(),
            _ => None,
        }
    }

    pub fn finished(&self) -> bool {
        self.source.is_none() && self.pending.is_empty()
    }

    /// The process's side is readable or hung up.
    pub fn pump(
        &mut self,
        ctx: &mut Ctx<'_>,
        log: &mut Option<CriLog>,
        attachments: &mut Attachments,
        stream: usize,
    ) {
        for _ in 0..BUDGET {
            if self.source.is_none() || !self.pending.is_empty() {
                return;
            }
            let step = if self.splice && !attachments.want(stream) {
                self.splice_once(ctx.poll)
            } else {
                self.copy_once(ctx, log, attachments, stream)
            };
            match step {
                Step::Again => self.moved = true,
                Step::Wait => return,
                Step::Eof => return self.end(ctx, log),
            }
        }
    }

    fn splice_once(&mut self, poll: &Poll) -> Step {
        let (Some(source), Sink::Peer(sink)) = (&self.source, &self.sink) else {
            self.splice = false;
            return Step::Again;
        };
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::pipe::splice(source.fd(), None, sink.fd(), None, LARGE_PIPE, flags) {
            Ok(0) => Step::Eof,
            Ok(n) => {
                if !self.enlarged && n >= MUCH {
                    self.enlarged = true;
                    enlarge(source);
                    enlarge(sink);
                }
                Step::Again
            }
            Err(Errno::INTR) => Step::Again,
            // Either side may be meant. Bytes in the source tell that it is the sink.
            Err(Errno::AGAIN) => {
                if rustix::io::ioctl_fionread(source.fd()).unwrap_or(0) > 0 {
                    self.block(poll);
                }
                Step::Wait
            }
            Err(Errno::PIPE) => {
                self.sink = Sink::Discard;
                self.splice = false;
                Step::Again
            }
            Err(_) => {
                self.splice = false;
                Step::Again
            }
        }
    }

    fn copy_once(
        &mut self,
        ctx: &mut Ctx<'_>,
        log: &mut Option<CriLog>,
        attachments: &mut Attachments,
        stream: usize,
    ) -> Step {
        let Some(source) = &self.source else {
            return Step::Eof;
        };
        let (read, lines) = ctx.scratch.buffers();
        let n = match rustix::io::read(source.fd(), &mut *read) {
            Ok(0) => return Step::Eof,
            Ok(n) => n,
            Err(Errno::AGAIN) => return Step::Wait,
            Err(Errno::INTR) => return Step::Again,
            // A console whose last slave is closed reads as EIO.
            Err(_) => return Step::Eof,
        };
        if !self.enlarged && n >= MUCH {
            self.enlarged = true;
            enlarge(source);
        }
        let chunk = &read[..n];
        match &mut self.sink {
            Sink::Log(cutter) => {
                if let Some(log) = log {
                    let stamp = Stamp::now();
                    for piece in chunk.chunks(FORMAT_CHUNK) {
                        cutter.push(piece, &stamp, lines);
                        if lines.len() >= WRITE_BATCH {
                            log.append(lines);
                            lines.clear();
                        }
                    }
                    log.append(lines);
                    lines.clear();
                }
            }
            Sink::Peer(sink) => match write_some(sink, chunk) {
                Ok(taken) if taken < n => self.pending.extend_from_slice(&chunk[taken..]),
                Ok(_) => {}
                Err(_) => self.sink = Sink::Discard,
            },
            // A full disk must not stop the process.
            Sink::File(file) => file.append(chunk),
            Sink::Discard => {}
        }
        attachments.offer(ctx.poll, stream, chunk);
        if !self.pending.is_empty() {
            self.block(ctx.poll);
            self.moved = true;
            return Step::Wait;
        }
        Step::Again
    }

    fn block(&mut self, poll: &Poll) {
        // Both calls only change registrations of descriptors that we own.
        if let Some(source) = &mut self.source {
            let _ = source.watch(poll, Interest::NONE);
        }
        if let Sink::Peer(sink) = &mut self.sink {
            let _ = sink.watch(poll, Interest::WRITE);
        }
    }

    /// The sink takes bytes again, or its reader is gone.
    pub fn sink_ready(&mut self, poll: &Poll) {
        if let Sink::Peer(sink) = &mut self.sink {
            match write_some(sink, &self.pending) {
                Ok(taken) => {
                    self.moved |= taken > 0;
                    self.pending.drain(..taken);
                    if !self.pending.is_empty() {
                        return;
                    }
                    let _ = sink.watch(poll, Interest::NONE);
                }
                Err(_) => {
                    self.sink = Sink::Discard;
                }
            }
        }
        self.pending = Vec::new();
        match &mut self.source {
            Some(source) => {
                let _ = source.watch(poll, Interest::READ);
            }
            None => self.close_sink(),
        }
    }

    /// No more output: closes what can be closed.
    pub fn end(&mut self, ctx: &mut Ctx<'_>, log: &mut Option<CriLog>) {
        self.source = None;
        if let (Sink::Log(cutter), Some(log)) = (&mut self.sink, log) {
            let (_, lines) = ctx.scratch.buffers();
            cutter.finish(&Stamp::now(), lines);
            log.append(lines);
            lines.clear();
        }
        if self.pending.is_empty() {
            self.close_sink();
        }
    }

    pub fn abandon(&mut self, ctx: &mut Ctx<'_>, log: &mut Option<CriLog>) {
        self.pending = Vec::new();
        self.end(ctx, log);
    }

    /// Looked at now and then after the process's exit.
    pub fn progress(&mut self) -> Progress {
        let moved = std::mem::take(&mut self.moved);
        let Some(source) = &self.source else {
            return match (self.pending.is_empty(), moved) {
                (true, _) => Progress::Finished,
                (false, true) => Progress::Moving,
                (false, false) => Progress::Stuck,
            };
        };
        // A log takes everything at once: what is there now was written after the exit.
        if !matches!(self.sink, Sink::Peer(_)) {
            return Progress::Held;
        }
        let waiting = rustix::io::ioctl_fionread(source.fd()).unwrap_or(0) > 0;
        match (waiting || !self.pending.is_empty(), moved) {
            (true, true) => Progress::Moving,
            (true, false) => Progress::Stuck,
            (false, _) => Progress::Held,
        }
    }
}

/// Writes without waiting; how much was taken.
pub fn write_some(to: &Endpoint, bytes: &[u8]) -> Result<usize, Errno> {
    let mut taken = 0;
    while taken < bytes.len() {
        match rustix::io::write(to.fd(), &bytes[taken..]) {
            Ok(n) => taken += n,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(taken)
}
