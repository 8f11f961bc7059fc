//! Input on its way to a process: from a FIFO, from a client's descriptor or from attachments.
//!
//! Owns: our end of the process's stdin and the bytes that it did not take yet. While such bytes
//! exist no source is read.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::Ctx;
use super::drain::write_some;
use crate::poll::{Endpoint, Interest, Poll};

pub struct Feed {
    source: Option<Endpoint>,
    /// The FIFO's write end, so that a client's restart is no end of input. CloseIO drops it.
    keep_open: Option<OwnedFd>,
    /// The process's pipe or the console; `None` once closed.
    sink: Option<Endpoint>,
    pending: Vec<u8>,
    /// The sink closes when `pending` is empty.
    ending: bool,
    /// The end of a source does not end a console.
    tty: bool,
    /// Fed by attachments, and by the first of them only.
    pub once: bool,
    pub attachable: bool,
}

impl Feed {
    pub fn new(source: Option<Endpoint>, keep_open: Option<OwnedFd>, tty: bool) -> Feed {
        Feed {
            source,
            keep_open,
            sink: None,
            pending: Vec::new(),
            ending: false,
            tty,
            once: false,
            attachable: false,
        }
    }

    pub fn set_sink(&mut self, sink: Endpoint) {
        self.sink = Some(sink);
    }

    /// Begins to read the source; not before the process exists, so that nothing is swallowed.
    pub fn start(&mut self, poll: &Poll) -> std::io::Result<()> {
        match (&mut self.source, self.pending.is_empty()) {
            (Some(source), true) => source.watch(poll, Interest::READ),
            _ => Ok(()),
        }
    }

    pub fn open(&self) -> bool {
        self.sink.is_some() && !self.ending
    }

    pub fn blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The source is readable or hung up.
    pub fn pump(&mut self, ctx: &mut Ctx<'_>) {
        for _ in 0..16 {
            let Some(source) = &self.source else { return };
            if self.blocked() {
                return;
            }
            let (read, _) = ctx.scratch.buffers();
            match rustix::io::read(source.fd(), &mut *read) {
                Ok(n) if n > 0 => {
                    let poll = ctx.poll;
                    let (read, _) = ctx.scratch.buffers();
                    self.give(poll, &read[..n]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Ok(_) | Err(_) => {
                    self.source = None;
                    if !self.tty {
                        self.end();
                    }
                    return;
                }
            }
        }
    }

    /// Bytes for the process. What does not fit is kept; the caller stops reading meanwhile.
    pub fn give(&mut self, poll: &Poll, bytes: &[u8]) {
        let Some(sink) = &self.sink else { return };
        match write_some(sink, bytes) {
            Ok(taken) if taken < bytes.len() => {
                self.pending.extend_from_slice(&bytes[taken..]);
                self.watch(poll);
            }
            Ok(_) => {}
            // The process closed its stdin: whoever writes to us learns it from the closed source.
            Err(_) => self.close(),
        }
    }

    fn watch(&mut self, poll: &Poll) {
        let blocked = self.blocked();
        // Changes only the registrations of descriptors that we own.
        if let Some(sink) = &mut self.sink {
            let _ = sink.watch(
                poll,
                if blocked {
                    Interest::WRITE
                } else {
                    Interest::NONE
                },
            );
        }
        if let Some(source) = &mut self.source {
            let _ = source.watch(
                poll,
                if blocked {
                    Interest::NONE
                } else {
                    Interest::READ
                },
            );
        }
    }

    pub fn sink_ready(&mut self, poll: &Poll) {
        let Some(sink) = &self.sink else { return };
        match write_some(sink, &self.pending) {
            Ok(taken) => drop(self.pending.drain(..taken)),
            Err(_) => return self.close(),
        }
        if self.pending.is_empty() {
            self.pending = Vec::new();
            self.watch(poll);
            if self.ending {
                self.close();
            }
        }
    }

    /// No more input after what is pending.
    pub fn end(&mut self) {
        self.ending = true;
        if self.pending.is_empty() {
            self.close();
        }
    }

    pub fn close(&mut self) {
        self.source = None;
        self.keep_open = None;
        self.sink = None;
        self.pending = Vec::new();
    }

    /// CloseIO: our own hold on the input ends; what other writers still send is delivered.
    pub fn release(&mut self) {
        self.keep_open = None;
        if self.source.is_none() && !self.tty {
            self.end();
        }
    }
}
