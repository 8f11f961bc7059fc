//! sd_notify(3) for a service whose main process is the runtime: the container has a socket of its
//! own, since the service manager believes no process of another namespace, and what arrives there
//! is passed on.
//!
//! ```text
//! create, run: <root>/<id>/notify mounted on /run/notify, NOTIFY_SOCKET set
//! run, start:  READY=... --> $NOTIFY_SOCKET, with MAINPID=, then a barrier
//! ```

use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::state::Entry;

const DIRECTORY: &str = "notify";
const NAME: &str = "notify.sock";
const INSIDE: &str = "/run/notify";

/// How long a service manager may take to see what it was sent.
const BARRIER: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// Where the service manager listens, if there is one.
pub fn host() -> Option<OsString> {
    std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty())
}

/// The config with the socket's directory and its name added.
///
/// # Errors
/// The config is no JSON object.
pub fn add_to(config: &[u8], root: &Path, id: &str) -> Result<Vec<u8>> {
    let invalid = |error: serde_json::Error| Error::invalid("config.json").source(error);
    let mut config: Value = serde_json::from_slice(config).map_err(invalid)?;
    let mount = json!({
        "destination": INSIDE,
        "source": root.join(id).join(DIRECTORY),
        "options": ["bind", "nosuid", "noexec", "nodev", "ro"],
    });
    push(&mut config["mounts"], mount);
    let variable = format!("NOTIFY_SOCKET={INSIDE}/{NAME}");
    push(&mut config["process"]["env"], Value::from(variable));
    serde_json::to_vec(&config).map_err(invalid)
}

/// What is no list is left for the checks of the config to refuse.
fn push(list: &mut Value, item: Value) {
    match list {
        Value::Null => *list = Value::Array(vec![item]),
        Value::Array(items) => items.push(item),
        _ => {}
    }
}

/// Makes the directory that the container sees.
///
/// # Errors
/// Those of mkdir(2).
pub fn make_directory(entry: &Entry) -> Result<()> {
    rustix::fs::mkdirat(entry, DIRECTORY, Mode::from_raw_mode(0o755))
        .map_err(|error| Error::system("mkdir", DIRECTORY, error))
}

/// The socket that the container writes to.
#[derive(Debug)]
pub struct NotifySocket {
    host: OsString,
    socket: OwnedFd,
    /// Whom the service manager shall watch.
    main_pid: i32,
}

impl NotifySocket {
    /// Makes the socket; None where the container was created without its directory.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn bind(entry: &Entry, host: OsString, main_pid: i32) -> Result<Option<Self>> {
        let fail = |call: &'static str| move |error: Errno| Error::system(call, NAME, error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match rustix::fs::openat(entry, DIRECTORY, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            directory => directory.map_err(fail("open the directory of"))?,
        };
        let socket = datagram().map_err(fail("socket"))?;
        // The state directory's own path may be longer than an address.
        let path = format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd());
        let address = SocketAddrUnix::new(path.as_str()).map_err(fail("bind"))?;
        rustix::net::bind(&socket, &address).map_err(fail("bind"))?;
        rustix::fs::chmod(path.as_str(), Mode::from_raw_mode(0o777)).map_err(fail("chmod"))?;
        Ok(Some(Self {
            host,
            socket,
            main_pid,
        }))
    }

    /// Readable when the container has said something.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Passes on what has arrived; whether the container is ready. Never waits for the container.
    ///
    /// # Errors
    /// The service manager does not listen any more.
    pub fn serve(&self) -> Result<bool> {
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    let mut lines = buffer[..length].split(|byte| *byte == b'\n');
                    if let Some(ready) = lines.find(|line| line.starts_with(b"READY=")) {
                        return self.tell(ready).map(|()| true);
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::system("recv", NAME, error)),
            }
        }
    }

    /// Waits until the container is ready or its init has ended.
    ///
    /// # Errors
    /// Those of [`NotifySocket::serve`].
    pub fn wait(&self, init: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(init, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::system("poll", NAME, error)),
            }
            let ended = !fds[1].revents().is_empty();
            if self.serve()? || ended {
                return Ok(());
            }
        }
    }

    fn tell(&self, ready: &[u8]) -> Result<()> {
        let fail = |call: &'static str| {
            let host = self.host.to_string_lossy().into_owned();
            move |error: Errno| Error::system(call, host, error)
        };
        let address = match self.host.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
            path => SocketAddrUnix::new(path),
        };
        let manager = datagram().map_err(fail("socket"))?;
        rustix::net::connect(&manager, &address.map_err(fail("connect"))?)
            .map_err(fail("connect"))?;
        let main_pid = format!("MAINPID={}\n", self.main_pid);
        for message in [[ready, b"\n"].concat(), main_pid.into_bytes()] {
            rustix::net::send(&manager, &message, SendFlags::NOSIGNAL).map_err(fail("send"))?;
        }
        let (theirs, ours) = {
            let (read, write) =
                rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(fail("pipe"))?;
            (write, read)
        };
        let fds = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let text = [IoSlice::new(b"BARRIER=1")];
        rustix::net::sendmsg(&manager, &text, &mut control, SendFlags::NOSIGNAL)
            .map_err(fail("sendmsg"))?;
        drop(theirs);
        // The other end is closed once the messages have been read; a manager that knows no
        // barriers closes nothing.
        let mut fds = [PollFd::new(&ours, PollFlags::IN)];
        poll(&mut fds, Some(&BARRIER))
            .map(drop)
            .map_err(fail("poll"))
    }
}

fn datagram() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_gets_mount_and_variable() {
        let config = add_to(br#"{"process":{"env":["A=b"]}}"#, Path::new("/r"), "c").unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(
            config["process"]["env"],
            json!(["A=b", "NOTIFY_SOCKET=/run/notify/notify.sock"])
        );
        assert_eq!(config["mounts"][0]["source"], "/r/c/notify");
        assert!(add_to(b"{", Path::new("/r"), "c").is_err());
    }
}
