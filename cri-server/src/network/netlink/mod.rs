//! A netlink conversation with the kernel: frame, send, collect the answers.
//!
//! Owns sequence numbers and acknowledgements. Never knows what a message means: `route` and
//! `nft` build the bodies. A connection talks to the network namespace of the thread that opened
//! it, for as long as it lives.

pub(crate) mod attrs;
pub(crate) mod route;

use std::fmt;
use std::io;

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

use attrs::{Attributes, align};

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// The kernel fills dumps up to this size when the reader offers it (netlink_dump).
const RECEIVE_BUFFER: usize = 64 * 1024;

/// One message before it gets its sequence number.
#[derive(Debug)]
pub(crate) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub body: Vec<u8>,
}

/// The kernel's refusal: the error number and, where it gave one, its sentence.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub errno: i32,
    pub reason: Option<String>,
}

impl Refusal {
    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.errno == errno.raw_os_error()
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Refusal {
                errno,
                reason: None,
            },
            None => Refusal {
                errno: libc::EIO,
                reason: Some(error.to_string()),
            },
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.errno))?;
        match &self.reason {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

/// A reply that is not an acknowledgement.
pub(crate) struct Reply {
    pub kind: u16,
    pub body: Vec<u8>,
}

pub(crate) struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    pub(crate) fn route() -> io::Result<Connection> {
        Connection::open(NETLINK_ROUTE)
    }

    pub(crate) fn netfilter() -> io::Result<Connection> {
        Connection::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Connection> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel's sentence (4.12) and errors without an echo of the request (4.3).
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Connection {
            socket,
            sequence: 0,
        })
    }

    /// Sends all messages with one system call; one outcome per message that asked for one.
    ///
    /// The kernel works off the whole buffer before `send` returns (netlink_unicast_kernel), so
    /// every answer is already queued and the reads never wait.
    pub(crate) fn send(&mut self, messages: &[Message]) -> Result<Outcome, Refusal> {
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::with_capacity(messages.iter().map(|m| m.body.len() + 32).sum());
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let length = u32::try_from(HEADER + message.body.len()).unwrap_or(u32::MAX);
            buffer.extend_from_slice(&length.to_ne_bytes());
            buffer.extend_from_slice(&message.kind.to_ne_bytes());
            buffer.extend_from_slice(&message.flags.to_ne_bytes());
            buffer.extend_from_slice(&self.sequence.to_ne_bytes());
            buffer.extend_from_slice(&0u32.to_ne_bytes());
            buffer.extend_from_slice(&message.body);
            buffer.resize(align(buffer.len()), 0);
        }
        #[cfg(test)]
        faults::strike()?;
        self.socket.send(&buffer, 0)?;
        let mut outcome = Outcome {
            results: vec![None; messages.len()],
            replies: Vec::new(),
        };
        self.collect(first, &mut outcome)?;
        Ok(outcome)
    }

    /// Sends and wants every message that asked for an acknowledgement acknowledged.
    pub(crate) fn apply(&mut self, messages: &[Message]) -> Result<Vec<Reply>, (usize, Refusal)> {
        let outcome = self.send(messages).map_err(|refusal| (0, refusal))?;
        // nf_tables tries the rest of a failing batch too: the first failure is the culprit, what
        // comes after it may only be its consequence.
        let mut failed = None;
        for (index, result) in outcome.results.into_iter().enumerate() {
            match result {
                Some(Ok(())) => {}
                Some(Err(refusal)) => {
                    failed.get_or_insert((index, refusal));
                }
                None if messages[index].flags & NLM_F_ACK != 0 => {
                    let reason = Some("no acknowledgement from the kernel".to_owned());
                    failed.get_or_insert((
                        index,
                        Refusal {
                            errno: libc::EIO,
                            reason,
                        },
                    ));
                }
                None => {}
            }
        }
        match failed {
            Some(failure) => Err(failure),
            None => Ok(outcome.replies),
        }
    }

    /// A request whose answer is a list of messages.
    pub(crate) fn dump(&mut self, kind: u16, body: Vec<u8>) -> Result<Vec<Reply>, Refusal> {
        let message = Message {
            kind,
            flags: NLM_F_REQUEST | NLM_F_DUMP,
            body,
        };
        let outcome = self.send(&[message])?;
        match outcome.results.into_iter().next().flatten() {
            Some(Err(refusal)) => Err(refusal),
            _ => Ok(outcome.replies),
        }
    }

    fn collect(&mut self, first: u32, outcome: &mut Outcome) -> Result<(), Refusal> {
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => outcome.take(first, &buffer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

pub(crate) struct Outcome {
    pub results: Vec<Option<Result<(), Refusal>>>,
    pub replies: Vec<Reply>,
}

impl Outcome {
    fn take(&mut self, first: u32, mut datagram: &[u8]) {
        while datagram.len() >= HEADER {
            let length = read_u32(datagram, 0) as usize;
            if length < HEADER || length > datagram.len() {
                return;
            }
            let kind = read_u16(datagram, 4);
            let flags = read_u16(datagram, 6);
            let index = read_u32(datagram, 8).wrapping_sub(first) as usize;
            let body = &datagram[HEADER..length];
            // An answer to an earlier request of this connection has a sequence below `first`.
            if index < self.results.len() {
                match kind {
                    NLMSG_ERROR => self.results[index] = Some(verdict(flags, body)),
                    NLMSG_DONE => self.results[index] = Some(verdict(0, body)),
                    _ => self.replies.push(Reply {
                        kind,
                        body: body.to_vec(),
                    }),
                }
            }
            datagram = &datagram[align(length).min(datagram.len())..];
        }
    }
}

fn verdict(flags: u16, body: &[u8]) -> Result<(), Refusal> {
    let code = read_u32(body, 0) as i32;
    if code >= 0 {
        return Ok(());
    }
    let mut reason = None;
    if flags & NLM_F_ACK_TLVS != 0 && body.len() >= 4 + HEADER {
        let echoed = if flags & NLM_F_CAPPED != 0 {
            HEADER
        } else {
            align(read_u32(body, 4) as usize)
        };
        let trailer = body.get(4 + echoed..).unwrap_or_default();
        reason = Attributes::new(trailer)
            .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
            .map(|(_, text)| {
                String::from_utf8_lossy(text)
                    .trim_end_matches('\0')
                    .to_owned()
            });
    }
    Err(Refusal {
        errno: -code,
        reason,
    })
}

pub(crate) fn read_u16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]))
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// Makes conversations fail, for tests that have a process of their own.
#[cfg(test)]
pub(crate) mod faults {
    use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

    use super::Refusal;

    /// Conversations until the failing one; off below zero.
    pub(crate) static UNTIL: AtomicI64 = AtomicI64::new(-1);
    /// How many fail from there on.
    pub(crate) static COUNT: AtomicI64 = AtomicI64::new(0);

    pub(super) fn strike() -> Result<(), Refusal> {
        if UNTIL.load(SeqCst) < 0 || UNTIL.fetch_sub(1, SeqCst) > 0 {
            return Ok(());
        }
        if COUNT.fetch_sub(1, SeqCst) > 1 {
            UNTIL.store(0, SeqCst);
        }
        Err(Refusal {
            errno: libc::ENOMEM,
            reason: Some("injected".to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_carries_the_kernels_sentence() {
        // nlmsgerr: -ENOENT, capped header, then NLMSGERR_ATTR_MSG "no such thing".
        let mut body = (-libc::ENOENT).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        let text = b"no such thing\0";
        body.extend_from_slice(&(4 + text.len() as u16).to_ne_bytes());
        body.extend_from_slice(&NLMSGERR_ATTR_MSG.to_ne_bytes());
        body.extend_from_slice(text);
        let refusal = verdict(NLM_F_CAPPED | NLM_F_ACK_TLVS, &body).unwrap_err();
        assert_eq!(refusal.errno, libc::ENOENT);
        assert_eq!(
            refusal.to_string(),
            "No such file or directory (os error 2) (no such thing)"
        );
    }

    #[test]
    fn short_and_lying_datagrams_are_ignored() {
        let mut outcome = Outcome {
            results: vec![None],
            replies: Vec::new(),
        };
        outcome.take(1, &[1, 2, 3]);
        outcome.take(1, &[0xff; 32]);
        outcome.take(1, &[0; 64]);
        assert!(outcome.results[0].is_none() && outcome.replies.is_empty());
    }
}
