//! The one socketpair between parent and child: short messages, each a tag and a payload.
//!
//! ```text
//! parent --Continue-> child       the id maps are written (user namespaces only)
//! parent --Network--> child       the network namespace, where it is made apart
//! parent --Continue-> child       the limits are written (cgroup v1 only)
//! parent <--Mount--- child        map the ids of this tree, then Served
//! parent <-Unreachable- child     open a mount's source, then Tree
//! parent <--Hooks--- child        the mounts stand: prestart and createRuntime now, then Continue
//! parent <--Built--- child        the root is entered; the record is written while the child
//!                                 takes on its identity
//! parent --Continue-> child       exec, or
//! parent <--Ready--- child          wait at the gate
//! parent <--Failed-- child        instead of any of these; EOF without it: exec went well
//! ```
//!
//! SOCK_SEQPACKET keeps the messages apart; plain read and write keep them within what the
//! tightest seccomp profile allows, since the last ones pass after the filter is on.

use std::cell::{Cell, RefCell};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::{Error, Kind, Result};

/// The longest error text that is passed on; the rest is cut.
const MAX_MESSAGE: usize = 8192;

/// What a child says.
#[derive(Debug)]
pub enum Report {
    /// The process is where the container is.
    Built,
    /// Only `start` is missing.
    Ready,
    Hooks,
    /// The tree of a mount step, whose ids are to be mapped.
    Mount(usize, OwnedFd),
    /// A mount step whose source only the parent reaches, or the root, and the namespace to open
    /// it in.
    Unreachable(Option<usize>, OwnedFd),
    /// The parent's: go on.
    Continue,
    /// The parent's: the network namespace to join.
    Network(OwnedFd),
    /// The parent's: a request is served.
    Served,
    /// What was opened for one that could not.
    Tree(OwnedFd),
    /// The stage's child: its pid as the stage sees it, and a pidfd.
    Cloned(i32, OwnedFd),
    /// The master of the container's terminal.
    Console(OwnedFd),
    /// The fd of a seccomp filter that notifies.
    Listener(OwnedFd),
    Failed(Error),
    /// The other end is gone: closed by exec, or by death.
    Closed,
}

/// One end of the channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    /// Child: words to go on that came before an answer, and a network namespace that did.
    ahead: Cell<u32>,
    network: RefCell<Option<OwnedFd>>,
}

impl Channel {
    /// Both ends, close-on-exec.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| Error::system("socketpair", "", error))?;
        let end = |socket| Self {
            socket,
            ahead: Cell::new(0),
            network: RefCell::new(None),
        };
        Ok((end(a), end(b)))
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&self, tag: u8, payload: &[u8]) -> Result<()> {
        let mut message = [0u8; MAX_MESSAGE];
        let length = payload.len().min(MAX_MESSAGE - 1);
        message[0] = tag;
        message[1..=length].copy_from_slice(&payload[..length]);
        rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, &message[..=length]))
            .map(drop)
            .map_err(|error| Error::system("write", "the start channel", error))
    }

    fn send_fd(&self, tag: u8, payload: &[u8], fd: BorrowedFd<'_>) -> Result<()> {
        let mut message = Vec::with_capacity(payload.len() + 1);
        message.push(tag);
        message.extend_from_slice(payload);
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
        .map_err(|error| Error::system("sendmsg(SCM_RIGHTS)", "the start channel", error))
    }

    /// Child: the mounts stand.
    pub fn report_hooks(&self) -> Result<()> {
        self.send(b'H', &[])
    }

    /// Child: the root is entered.
    pub fn report_built(&self) -> Result<()> {
        self.send(b'B', &[])
    }

    /// Child: waits at the gate.
    pub fn report_ready(&self) -> Result<()> {
        self.send(b'R', &[])
    }

    /// Child: what went wrong.
    pub fn report_failure(&self, error: &Error) -> Result<()> {
        let kind = kind_byte(error.kind());
        let mut payload = vec![kind];
        payload.extend_from_slice(format!("{error:#}").as_bytes());
        self.send(b'E', &payload)
    }

    /// Stage: the child it made.
    pub fn report_clone(&self, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
        self.send_fd(b'P', &pid.to_ne_bytes(), pidfd)
    }

    /// Child: a tree whose ids are to be mapped.
    pub fn report_mount(&self, index: usize, tree: BorrowedFd<'_>) -> Result<()> {
        self.send_fd(b'M', &(index as u64).to_ne_bytes(), tree)
    }

    /// Child: the source of a step, or the root, is to be opened in its mount namespace.
    pub fn report_unreachable(&self, index: Option<usize>) -> Result<()> {
        let path = c"/proc/self/ns/mnt";
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| Error::system("open", "/proc/self/ns/mnt", error))?;
        let index = index.map_or(u64::MAX, |index| index as u64);
        self.send_fd(b'N', &index.to_ne_bytes(), namespace.as_fd())
    }

    /// Parent: the ids are mapped.
    pub fn answer_served(&self) -> Result<()> {
        self.send(b'S', &[])
    }

    /// Parent: what it has opened.
    pub fn answer_tree(&self, tree: BorrowedFd<'_>) -> Result<()> {
        self.send_fd(b'F', &[], tree)
    }

    /// Child: the terminal it has opened.
    pub fn report_console(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.send_fd(b'T', &[], master)
    }

    /// Child: the filter's listener.
    pub fn report_listener(&self, listener: BorrowedFd<'_>) -> Result<()> {
        self.send_fd(b'L', &[], listener)
    }

    /// Parent: go on. A child that is gone has left its reason to be read, or its end.
    pub fn proceed(&self) -> Result<()> {
        match self.send(b'C', &[]) {
            Err(error) if is_gone(&error) => Ok(()),
            sent => sent,
        }
    }

    /// Child: waits for [`Channel::proceed`]; an error when the parent is gone.
    pub fn wait(&self) -> Result<()> {
        if self.ahead.get() > 0 {
            self.ahead.set(self.ahead.get() - 1);
            return Ok(());
        }
        let mut byte = [0u8; 1];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut byte)) {
            Ok(1) => Ok(()),
            Ok(_) => Err(parent_is_gone()),
            Err(error) => Err(Error::system("read", "the start channel", error)),
        }
    }

    /// Child: the parent's answer to a request, past what it said before it had heard that.
    fn answer(&self) -> Result<Report> {
        loop {
            match self.next()? {
                Report::Continue => self.ahead.set(self.ahead.get() + 1),
                Report::Network(namespace) => {
                    self.network.replace(Some(namespace));
                }
                Report::Closed => return Err(parent_is_gone()),
                answer => return Ok(answer),
            }
        }
    }

    /// Child: waits for [`Channel::answer_served`].
    pub fn served(&self) -> Result<()> {
        match self.answer()? {
            Report::Served => Ok(()),
            _ => Err(broken()),
        }
    }

    /// Child: waits for [`Channel::answer_tree`].
    pub fn tree(&self) -> Result<OwnedFd> {
        match self.answer()? {
            Report::Tree(tree) => Ok(tree),
            _ => Err(broken()),
        }
    }

    /// Parent: the network namespace that the child is to join. A child that is gone has left its
    /// reason to be read, or its end.
    pub fn send_network(&self, namespace: BorrowedFd<'_>) -> Result<()> {
        match self.send_fd(b'W', &[], namespace) {
            Err(error) if is_gone(&error) => Ok(()),
            sent => sent,
        }
    }

    /// Child: waits for [`Channel::send_network`].
    pub fn wait_network(&self) -> Result<OwnedFd> {
        if let Some(namespace) = self.network.take() {
            return Ok(namespace);
        }
        match self.next()? {
            Report::Network(namespace) => Ok(namespace),
            Report::Closed => Err(parent_is_gone()),
            _ => Err(broken()),
        }
    }

    /// Parent: the next report of the child.
    pub fn next(&self) -> Result<Report> {
        let mut bytes = [0u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(
                &self.socket,
                &mut parts,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received.bytes,
                // A child that dies with a message unread resets the connection. The kernel tells
                // of that once and before what the child had still sent, so what comes next is
                // its last words, or the end.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(error) => return Err(Error::system("recvmsg", "the start channel", error)),
            }
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        decode(&bytes[..received], fd)
    }
}

/// The other end is closed; a reset says so where it was closed with a message unread.
fn is_gone(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::EPIPE | libc::ECONNRESET))
}

fn parent_is_gone() -> Error {
    Error::new(Kind::Internal, "the runtime ended during the start", "")
}

fn broken() -> Error {
    Error::new(Kind::Internal, "malformed message on the start channel", "")
}

fn number(payload: &[u8]) -> Result<u64> {
    let bytes = payload.try_into().map_err(|_| broken())?;
    Ok(u64::from_ne_bytes(bytes))
}

fn decode(message: &[u8], fd: Option<OwnedFd>) -> Result<Report> {
    let Some((tag, payload)) = message.split_first() else {
        return Ok(Report::Closed);
    };
    Ok(match (*tag, fd) {
        (b'B', None) => Report::Built,
        (b'R', None) => Report::Ready,
        (b'H', None) => Report::Hooks,
        (b'P', Some(fd)) => {
            let pid = payload.try_into().map_err(|_| broken())?;
            Report::Cloned(i32::from_ne_bytes(pid), fd)
        }
        (b'C', None) => Report::Continue,
        (b'W', Some(fd)) => Report::Network(fd),
        (b'S', None) => Report::Served,
        (b'F', Some(fd)) => Report::Tree(fd),
        (b'M', Some(fd)) => Report::Mount(number(payload)? as usize, fd),
        (b'N', Some(fd)) => {
            let index = number(payload)?;
            Report::Unreachable((index != u64::MAX).then_some(index as usize), fd)
        }
        (b'T', Some(fd)) => Report::Console(fd),
        (b'L', Some(fd)) => Report::Listener(fd),
        (b'E', None) => {
            let (kind, text) = payload.split_first().ok_or_else(broken)?;
            let text = String::from_utf8_lossy(text).into_owned();
            Report::Failed(Error::new(kind_of(*kind), text, ""))
        }
        _ => return Err(broken()),
    })
}

const KINDS: [Kind; 9] = [
    Kind::Invalid,
    Kind::Unsupported,
    Kind::NotFound,
    Kind::Exists,
    Kind::State,
    Kind::Exec,
    Kind::Hook,
    Kind::System,
    Kind::Internal,
];

fn kind_byte(kind: Kind) -> u8 {
    KINDS
        .iter()
        .position(|known| *known == kind)
        .map_or(0, |at| at as u8)
}

fn kind_of(byte: u8) -> Kind {
    KINDS
        .get(usize::from(byte))
        .copied()
        .unwrap_or(Kind::Internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_in_order_and_whole() {
        let (parent, child) = Channel::pair().unwrap();
        child.report_hooks().unwrap();
        let error = Error::new(Kind::Exec, "exec: \"x\"", "").source(Errno::NOENT);
        child.report_failure(&error).unwrap();
        child.report_clone(7, child.as_fd()).unwrap();
        child.report_ready().unwrap();
        assert!(matches!(parent.next().unwrap(), Report::Hooks));
        match parent.next().unwrap() {
            Report::Failed(error) => {
                assert_eq!(error.kind(), Kind::Exec);
                assert_eq!(error.to_string(), "exec: \"x\": no such file or directory");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(parent.next().unwrap(), Report::Cloned(7, _)));
        assert!(matches!(parent.next().unwrap(), Report::Ready));
        parent.proceed().unwrap();
        child.wait().unwrap();
        drop(child);
        assert!(matches!(parent.next().unwrap(), Report::Closed));
    }

    #[test]
    fn words_to_go_on_are_kept_while_an_answer_is_awaited() {
        let (parent, child) = Channel::pair().unwrap();
        child.report_mount(3, child.as_fd()).unwrap();
        child.report_unreachable(None).unwrap();
        parent.proceed().unwrap();
        parent.answer_served().unwrap();
        parent.answer_tree(parent.as_fd()).unwrap();
        assert!(matches!(parent.next().unwrap(), Report::Mount(3, _)));
        assert!(matches!(
            parent.next().unwrap(),
            Report::Unreachable(None, _)
        ));
        child.served().unwrap();
        child.tree().unwrap();
        drop(parent);
        child.wait().unwrap();
        assert!(child.wait().is_err());
    }

    #[test]
    fn last_words_outlive_a_reset_connection() {
        let (parent, child) = Channel::pair().unwrap();
        child
            .report_failure(&Error::new(Kind::Exec, "last words", ""))
            .unwrap();
        parent.proceed().unwrap();
        // Gone with the parent's message unread.
        drop(child);
        match parent.next().unwrap() {
            Report::Failed(error) => assert_eq!(error.to_string(), "last words"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(parent.next().unwrap(), Report::Closed));
    }

    #[test]
    fn child_notices_a_dead_parent() {
        let (parent, child) = Channel::pair().unwrap();
        drop(parent);
        assert!(child.wait().is_err());
    }
}
