//! The hands of a confined shim: a process that starts programs and mounts for it.
//!
//! Landlock forbids every mount, and both it and seccomp are inherited by children, so a shim that
//! confined itself could start no runtime. Before it does, it forks one small process that does
//! those two things and nothing else:
//!
//! ```text
//! shim (confined) --one message, descriptors--> hands --clone(CLONE_PARENT)--> runtime
//!   ^                <--pid or errno------------                                  |
//!   +----------------------- reaps it: it is the shim's own child ---------------+
//! ```
//! The hands hold no state, never wait for what they start, and die with the shim. They cannot be
//! made anew: a shim that has lost them goes on supervising, and starts nothing any more.
//! Owns: the shim's end of the socket. Without hands (confinement is off, `start`, `delete`) the
//! same calls are made in this process.

mod serve;
#[cfg(test)]
mod tests;

use std::ffi::{CString, OsStr};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use coracle_sys::spawn::Spawn;
use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};

use crate::error::{Error, Kind, Result};
use crate::proto::containerd::types::Mount;
use crate::proto::coracle::hands::v1 as wire;
use wire::request::What;

/// A request is one message of the socket, whose buffer is some 200 KiB by default.
const MAX_REQUEST: usize = 128 * 1024;
/// A logging binary has six.
const MAX_FDS: usize = 8;

const DEAD: &str = "the shim's hands are dead: it can start and mount nothing any more";
const LATE: &str = "the shim's hands did not answer in time and were killed: \
                    it can start and mount nothing any more";

struct Hands {
    socket: OwnedFd,
    pid: i32,
}

/// One process has one pair of hands or none, as it is confined or is not.
static HANDS: OnceLock<Hands> = OnceLock::new();

/// A program for the shim to supervise. It leads no session, sees `fds` under their numbers, and
/// has our environment and `env`.
pub struct Program<'a> {
    pub program: &'a CString,
    pub args: &'a [CString],
    pub env: Vec<CString>,
    pub fds: &'a [(BorrowedFd<'a>, i32)],
    pub new_group: bool,
}

/// Forks the hands. Before anything is supervised, and before the process is confined. They have
/// `patience` for whatever they are asked: a disk that does not answer must not hold up the shim.
pub fn grow(patience: Duration) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(patience))?;
    let kept = [theirs.as_fd()];
    let pid = coracle_sys::spawn::fork_companion(&kept, || serve::serve(&theirs))?;
    let hands = Hands { socket: ours, pid };
    HANDS
        .set(hands)
        .map_err(|_| io::Error::other("has hands already"))
}

/// Whether this pid, just reaped, was the hands'.
pub fn were(pid: i32) -> bool {
    HANDS.get().is_some_and(|hands| hands.pid == pid)
}

/// Starts the program as a child of this process and gives its pid.
pub fn start(program: &Program<'_>) -> io::Result<i32> {
    let Some(hands) = HANDS.get() else {
        let mut env = crate::process::environment();
        env.extend(program.env.iter().cloned());
        return spawn(program, &env).run();
    };
    let bytes = |list: &[CString]| list.iter().map(|s| s.as_bytes().to_vec()).collect();
    let (fds, targets): (Vec<BorrowedFd<'_>>, Vec<i32>) = program.fds.iter().copied().unzip();
    let what = What::Start(wire::Start {
        program: program.program.as_bytes().to_vec(),
        args: bytes(program.args),
        env: bytes(&program.env),
        targets,
        new_group: program.new_group,
    });
    let (answer, _) = hands.ask(what, &fds, 0)?;
    match (answer.pid, answer.errno) {
        (1.., _) => Ok(answer.pid),
        (_, 1..) => Err(io::Error::from_raw_os_error(answer.errno)),
        _ => Err(io::Error::other(answer.text)),
    }
}

fn spawn<'a>(program: &'a Program<'a>, env: &'a [CString]) -> Spawn<'a> {
    Spawn {
        program: program.program,
        args: program.args,
        env,
        fds: program.fds,
        new_session: false,
        new_group: program.new_group,
        cwd: None,
    }
}

/// `mounts::mount_all`, by whoever may mount.
pub fn mount(mounts: &[Mount], target: &Path) -> Result<()> {
    let Some(hands) = HANDS.get() else {
        return crate::mounts::mount_all(mounts, target);
    };
    hands.have_done(
        What::Mount(wire::Mount {
            mounts: mounts.to_vec(),
            target: target.as_os_str().as_bytes().to_vec(),
        }),
        "mount on",
        target,
    )
}

/// `mounts::unmount_rootfs`, by whoever may unmount.
pub fn unmount_rootfs(target: &Path) -> Result<()> {
    let Some(hands) = HANDS.get() else {
        return crate::mounts::unmount_rootfs(target);
    };
    hands.have_unmounted(target, true)
}

/// `mounts::unmount_all`, by whoever may unmount.
pub fn unmount_all(target: &Path) -> Result<()> {
    let Some(hands) = HANDS.get() else {
        return crate::mounts::unmount_all(target);
    };
    hands.have_unmounted(target, false)
}

/// `sandbox::config::owner_of`, by whoever may open the namespaces of others.
pub fn owner_of(path: &str) -> Result<OwnedFd> {
    let Some(hands) = HANDS.get() else {
        return crate::sandbox::config::owner_of(path);
    };
    let what = What::Owner(wire::Owner {
        path: path.as_bytes().to_vec(),
    });
    let (answer, fds) = hands
        .ask(what, &[], 1)
        .map_err(|e| Error::io("user namespace of", path, e))?;
    let missing = || Error::told(Kind::from_code(answer.code), answer.text);
    fds.into_iter().next().ok_or_else(missing)
}

impl Hands {
    fn have_unmounted(&self, target: &Path, rootfs: bool) -> Result<()> {
        let what = What::Unmount(wire::Unmount {
            target: target.as_os_str().as_bytes().to_vec(),
            rootfs,
        });
        self.have_done(what, "unmount", target)
    }

    fn have_done(&self, what: What, operation: &'static str, target: &Path) -> Result<()> {
        let (answer, _) = self
            .ask(what, &[], 0)
            .map_err(|e| Error::io(operation, target.display().to_string(), e))?;
        match (answer.code, answer.done) {
            (0, true) => Ok(()),
            (code, _) => Err(Error::told(Kind::from_code(code), answer.text)),
        }
    }

    /// Sends `fds`, and takes at most `back` with the answer.
    fn ask(
        &self,
        what: What,
        fds: &[BorrowedFd<'_>],
        back: usize,
    ) -> io::Result<(wire::Answer, Vec<OwnedFd>)> {
        let request = wire::Request { what: Some(what) }.encode_to_vec();
        if request.len() > MAX_REQUEST || fds.len() > MAX_FDS {
            return Err(rustix::io::Errno::TOOBIG.into());
        }
        send(self.socket.as_fd(), &request, fds)
            .and_then(|()| self.answer(back))
            .map_err(|e| match e.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    io::Error::new(e.kind(), DEAD)
                }
                io::ErrorKind::WouldBlock => {
                    // A late answer would be taken for that to another question.
                    let _ = coracle_sys::spawn::kill(self.pid, 9);
                    io::Error::new(io::ErrorKind::TimedOut, LATE)
                }
                _ => e,
            })
    }

    fn answer(&self, back: usize) -> io::Result<(wire::Answer, Vec<OwnedFd>)> {
        let (bytes, fds) = receive(self.socket.as_fd(), back)?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok((wire::Answer::decode(bytes.as_slice())?, fds))
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::TOOBIG.into());
    }
    let flags = SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            // One message goes as a whole or not at all.
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// One whole message, of any size, and at most `fds` descriptors. No bytes at the end.
fn receive(socket: BorrowedFd<'_>, fds: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC;
    let mut nothing = [0u8; 1];
    let (_, length) = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut nothing, peek))?;
    let mut bytes = vec![0; length.min(MAX_REQUEST)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(match fds {
        0 => &mut [],
        _ => &mut space,
    });
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::io::retry_on_intr(|| {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(socket, &mut slices, &mut control, flags)
    })?;
    let mut passed = Vec::new();
    for message in control.drain() {
        if let rustix::net::RecvAncillaryMessage::ScmRights(rights) = message {
            passed.extend(rights);
        }
    }
    bytes.truncate(got.bytes);
    let cut = rustix::net::ReturnFlags::CTRUNC | rustix::net::ReturnFlags::TRUNC;
    if length > MAX_REQUEST || got.flags.intersects(cut) || passed.len() > fds {
        return Err(rustix::io::Errno::MSGSIZE.into());
    }
    Ok((bytes, passed))
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}
