//! Clients that watch a running process: copies of its output, and input for it.
//!
//! Owns: the clients' descriptors and what a slow client has not read yet, at most 1 MiB; past
//! that the client is dropped, never the log delayed.

use std::os::fd::OwnedFd;

use super::drain::write_some;
use super::part;
use crate::poll::{Endpoint, Interest, Poll, Ready, Source};

const MAX_BEHIND: usize = 1 << 20;

struct Output {
    endpoint: Endpoint,
    behind: Vec<u8>,
    /// The process's stream has ended; closes when `behind` is delivered.
    ending: bool,
}

pub struct Attachment {
    stdin: Option<Endpoint>,
    outputs: [Option<Output>; 2],
    watching: bool,
}

pub struct Attachments {
    id: u32,
    slots: Vec<Option<Attachment>>,
}

impl Attachments {
    pub fn new(id: u32) -> Attachments {
        Attachments {
            id,
            slots: Vec::new(),
        }
    }

    pub fn want(&self, stream: usize) -> bool {
        self.slots
            .iter()
            .flatten()
            .any(|a| a.outputs[stream].is_some())
    }

    pub fn behind(&self) -> bool {
        self.slots
            .iter()
            .flatten()
            .flat_map(|a| &a.outputs)
            .flatten()
            .any(|o| !o.behind.is_empty())
    }

    /// Adds a client.
    pub fn add(
        &mut self,
        poll: &Poll,
        stdin: Option<OwnedFd>,
        outputs: [Option<OwnedFd>; 2],
    ) -> std::io::Result<()> {
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        let endpoint = |fd: OwnedFd, which: u16| -> std::io::Result<Endpoint> {
            super::set_nonblocking(&fd)?;
            Ok(Endpoint::new(
                fd,
                Source::Stdio(self.id, part::attachment(slot, which)),
            ))
        };
        let stdin = match stdin {
            Some(fd) => {
                let mut endpoint = endpoint(fd, 0)?;
                endpoint.watch(poll, Interest::READ)?;
                Some(endpoint)
            }
            None => None,
        };
        let mut streams = [None, None];
        for (i, fd) in outputs.into_iter().enumerate() {
            if let Some(fd) = fd {
                let mut endpoint = endpoint(fd, i as u16 + 1)?;
                endpoint.watch(poll, Interest::HANGUP)?;
                streams[i] = Some(Output {
                    endpoint,
                    behind: Vec::new(),
                    ending: false,
                });
            }
        }
        let watching = streams.iter().any(Option::is_some);
        self.slots[slot] = Some(Attachment {
            stdin,
            outputs: streams,
            watching,
        });
        Ok(())
    }

    /// A copy of output for every client of this stream.
    pub fn offer(&mut self, poll: &Poll, stream: usize, chunk: &[u8]) {
        for slot in &mut self.slots {
            let Some(attachment) = slot else { continue };
            let Some(output) = &mut attachment.outputs[stream] else {
                continue;
            };
            let mut rest = chunk;
            if output.behind.is_empty() {
                match write_some(&output.endpoint, rest) {
                    Ok(taken) => rest = &rest[taken..],
                    Err(_) => {
                        attachment.outputs[stream] = None;
                        if attachment.over() {
                            *slot = None;
                        }
                        continue;
                    }
                }
            }
            if rest.is_empty() {
                continue;
            }
            if output.behind.len() + rest.len() > MAX_BEHIND {
                *slot = None;
                continue;
            }
            output.behind.extend_from_slice(rest);
            // Changes only the registration of a descriptor that we own.
            let _ = output.endpoint.watch(poll, Interest::WRITE);
        }
    }

    /// One of a client's output descriptors is writable or hung up.
    pub fn output_ready(&mut self, poll: &Poll, slot: usize, stream: usize, ready: Ready) {
        let Some(entry) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(attachment) = entry else { return };
        let Some(output) = &mut attachment.outputs[stream] else {
            return;
        };
        let gone = match write_some(&output.endpoint, &output.behind) {
            Ok(taken) => {
                output.behind.drain(..taken);
                ready.error
            }
            Err(_) => true,
        };
        if gone || (output.behind.is_empty() && output.ending) {
            attachment.outputs[stream] = None;
            if attachment.over() {
                *entry = None;
            }
        } else if output.behind.is_empty() {
            output.behind = Vec::new();
            let _ = output.endpoint.watch(poll, Interest::HANGUP);
        }
    }

    /// The process's stream has ended.
    pub fn end(&mut self, stream: usize) {
        for slot in &mut self.slots {
            let Some(attachment) = slot else { continue };
            if let Some(output) = &mut attachment.outputs[stream] {
                output.ending = true;
                if output.behind.is_empty() {
                    attachment.outputs[stream] = None;
                }
            }
            if attachment.over() {
                *slot = None;
            }
        }
    }

    pub fn stdin(&self, slot: usize) -> Option<&Endpoint> {
        self.slots.get(slot)?.as_ref()?.stdin.as_ref()
    }

    pub fn stdin_ended(&mut self, slot: usize) {
        let Some(entry) = self.slots.get_mut(slot) else {
            return;
        };
        if let Some(attachment) = entry {
            attachment.stdin = None;
            if attachment.over() {
                *entry = None;
            }
        }
    }

    /// Stops or resumes reading the clients' input.
    pub fn pause_stdin(&mut self, poll: &Poll, pause: bool) {
        for attachment in self.slots.iter_mut().flatten() {
            if let Some(stdin) = &mut attachment.stdin {
                let _ = stdin.watch(
                    poll,
                    if pause {
                        Interest::NONE
                    } else {
                        Interest::READ
                    },
                );
            }
        }
    }

    pub fn any_stdin(&self) -> bool {
        self.slots.iter().flatten().any(|a| a.stdin.is_some())
    }

    pub fn clear(&mut self) {
        self.slots = Vec::new();
    }
}

impl Attachment {
    /// Nothing is left of the client: its outputs are gone, or it had only input and that has
    /// ended.
    fn over(&self) -> bool {
        if self.watching {
            self.outputs.iter().all(Option::is_none)
        } else {
            self.stdin.is_none()
        }
    }
}
