//! One `criu swrk`: CRIU as a child that serves the requests of one socket.
//!
//! ```text
//! spawn -> request -> (notify -> answer)* -> response -> CRIU ends
//! ```
//! CRIU is never killed: it has tasks of the container stopped, with its own code in them, and
//! takes that back by itself once its socket closes.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};

use prost::Message as _;
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    Shutdown, SocketFlags, SocketType,
};

use super::host_cgroup::HostCgroup;
use super::rpc::{Features, Notify, Request, RequestType, Response, Version};
use crate::error::{Error, Kind, Result};

const PROGRAM: &str = "criu";

/// The socket keeps messages apart; none that CRIU sends comes near this.
const MAX_MESSAGE: usize = 40960;

/// What CRIU has to say before its response: asks for an answer each time.
pub trait Notified {
    /// # Errors
    /// CRIU gives up then, and undoes what it did.
    fn notified(&mut self, notify: &Notify, file: Option<OwnedFd>) -> Result<()>;

    /// CRIU has taken the request in: what it had to open by number, it has.
    fn accepted(&mut self) {}
}

/// For requests that notify nobody.
struct Nobody;

impl Notified for Nobody {
    fn notified(&mut self, notify: &Notify, _: Option<OwnedFd>) -> Result<()> {
        Err(unexpected(format!("notification {:?}", notify.script())))
    }
}

fn unexpected(what: String) -> Error {
    Error::new(Kind::System, format!("criu sent an unexpected {what}"), "")
}

/// A CRIU that runs and has not been asked anything yet.
pub struct Swrk {
    child: Child,
    socket: Option<OwnedFd>,
    /// Put back when CRIU has ended, and this with it.
    _host: Option<HostCgroup>,
}

impl Swrk {
    /// Starts CRIU. It has this process's stdio, or /dev/null, and inherits `files` under the
    /// numbers that they have here.
    ///
    /// # Errors
    /// It is not installed.
    pub fn spawn(stdio: bool, files: &[OwnedFd]) -> Result<Self> {
        let system = |call: &'static str| {
            move |error: Errno| Error::system(call, "the socket of criu", error)
        };
        let (mine, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(system("socketpair"))?;
        for file in files.iter().chain([&theirs]) {
            rustix::io::fcntl_setfd(file, FdFlags::empty()).map_err(system("fcntl(F_SETFD)"))?;
        }
        let mut command = Command::new(PROGRAM);
        command
            .arg("swrk")
            .arg(OsString::from(theirs.as_raw_fd().to_string()));
        if !stdio {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        }
        let host = HostCgroup::read();
        let child = command.spawn().map_err(|error| {
            if error.raw_os_error() == Some(libc::ENOENT) {
                return Error::new(
                    Kind::Unsupported,
                    format!("exec: {PROGRAM:?}: executable file not found in $PATH"),
                    "",
                );
            }
            Error::system("exec", PROGRAM, error)
        })?;
        for file in files {
            rustix::io::fcntl_setfd(file, FdFlags::CLOEXEC).map_err(system("fcntl(F_SETFD)"))?;
        }
        Ok(Self {
            child,
            socket: Some(mine),
            _host: host,
        })
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Asks, answers notifications, and waits for CRIU to end.
    ///
    /// # Errors
    /// CRIU refuses or fails, or an answer to a notification does.
    pub fn ask(mut self, request: &Request, notified: &mut impl Notified) -> Result<Response> {
        let response = self.talk(request, notified)?;
        let status = self.finish()?;
        // A pre-dump ends with CRIU waiting for the dump proper, which never comes: it calls
        // that a failure of its own.
        if !status.success() && request.kind() != RequestType::PreDump {
            return Err(Error::new(
                Kind::System,
                format!("criu failed: {status}"),
                "",
            ));
        }
        Ok(response)
    }

    fn talk(&self, request: &Request, notified: &mut impl Notified) -> Result<Response> {
        self.send(request)?;
        loop {
            let (response, file) = self.receive(notified)?;
            if !response.success {
                return Err(failure(&response));
            }
            if response.kind() != RequestType::Notify {
                return match response.kind == request.kind {
                    true => Ok(response),
                    false => Err(unexpected(format!("response of type {}", response.kind))),
                };
            }
            let notify = response.notify.unwrap_or_default();
            notified.notified(&notify, file)?;
            let mut answer = Request::new(RequestType::Notify);
            answer.notify_success = Some(true);
            self.send(&answer)?;
        }
    }

    fn send(&self, request: &Request) -> Result<()> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN);
        let sent = socket.and_then(|socket| {
            let bytes = request.encode_to_vec();
            let mut control = rustix::net::SendAncillaryBuffer::default();
            let parts = [IoSlice::new(&bytes)];
            rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)
            })
        });
        sent.map(drop)
            .map_err(|error| Error::system("sendmsg", "criu", error))
    }

    /// One message and the file that came with it.
    fn receive(&self, notified: &mut impl Notified) -> Result<(Response, Option<OwnedFd>)> {
        let fail = |error: Errno| Error::system("recvmsg", "criu", error);
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN).map_err(fail)?;
        let mut bytes = vec![0u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        notified.accepted();
        let received = received.map_err(fail)?;
        if received.bytes == 0 {
            return Err(Error::new(Kind::System, "criu ended without an answer", ""));
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(unexpected("message: too long".to_owned()));
        }
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        let response = Response::decode(&bytes[..received.bytes])
            .map_err(|error| Error::system("decode", "the message of criu", error))?;
        Ok((response, file))
    }

    /// Nothing more will be asked; CRIU ends by itself.
    fn finish(&mut self) -> Result<ExitStatus> {
        if let Some(socket) = self.socket.take() {
            // CRIU may have gone already.
            let _ = rustix::net::shutdown(&socket, Shutdown::Write);
            drop(socket);
        }
        self.child
            .wait()
            .map_err(|error| Error::system("waitpid", PROGRAM, error))
    }
}

impl Drop for Swrk {
    /// Also after a failure CRIU has cleaning up to do, and is waited for.
    fn drop(&mut self) {
        if self.socket.is_some() {
            let _ = self.finish();
        }
    }
}

fn failure(response: &Response) -> Error {
    let kind = match response.kind() {
        RequestType::Dump => "DUMP",
        RequestType::Restore => "RESTORE",
        RequestType::PreDump => "PRE_DUMP",
        RequestType::Notify => "NOTIFY",
        RequestType::FeatureCheck => "FEATURE_CHECK",
        RequestType::Version => "VERSION",
        RequestType::Empty => "EMPTY",
    };
    // CRIU tells its first error here, which is often one that it went on from: the log has all.
    let text = format!("criu failed: type {kind} errno {}", response.cr_errno());
    Error::new(Kind::System, text, "")
}

/// The installed CRIU: what it can do.
#[derive(Clone, Copy, Debug)]
pub struct Criu {
    version: i32,
}

impl Criu {
    /// Asks for the version.
    ///
    /// # Errors
    /// There is none, or it is older than `least` (31100 is 3.11.0).
    pub fn find(least: i32) -> Result<Self> {
        let asked = Swrk::spawn(false, &[])
            .and_then(|criu| criu.ask(&Request::new(RequestType::Version), &mut Nobody));
        let response = asked.map_err(|error| error.context("CRIU version check failed"))?;
        let version = response
            .version
            .ok_or_else(|| unexpected("answer without its version".to_owned()))?;
        let found = Self {
            version: number(&version),
        };
        if !found.has(least) {
            return Err(Error::unsupported(format!(
                "CRIU version {} must be {least} or higher",
                found.version
            )));
        }
        Ok(found)
    }

    pub fn has(self, least: i32) -> bool {
        self.version >= least
    }

    /// # Errors
    /// CRIU or this kernel lacks what is asked for.
    pub fn require(self, wanted: Features) -> Result<()> {
        let mut request = Request::new(RequestType::FeatureCheck);
        request.features = Some(wanted);
        let asked = Swrk::spawn(false, &[]).and_then(|criu| criu.ask(&request, &mut Nobody));
        let response = asked.map_err(|error| error.context("CRIU feature check failed"))?;
        let has = response.features.unwrap_or_default();
        let missing: Vec<&str> = [
            ("MemTrack", wanted.mem_track, has.mem_track),
            ("LazyPages", wanted.lazy_pages, has.lazy_pages),
        ]
        .into_iter()
        .filter(|(_, wanted, has)| *wanted == Some(true) && *has != Some(true))
        .map(|(name, ..)| name)
        .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "CRIU is missing features: {missing:?}"
        )))
    }
}

/// As runc counts: a build from git comes after the release that it calls itself.
fn number(version: &Version) -> i32 {
    let release = version.major * 10_000 + version.minor * 100;
    match &version.gitid {
        Some(_) => release + 100,
        None => release + version.sublevel.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_table() {
        let version = |major, minor, sublevel, gitid: Option<&str>| Version {
            major,
            minor,
            sublevel,
            gitid: gitid.map(str::to_owned),
        };
        for (version, want) in [
            (version(3, 17, Some(1), None), 31701),
            (version(4, 1, None, None), 40100),
            (version(3, 11, Some(2), Some("v3.11-2-g")), 31200),
        ] {
            assert_eq!(number(&version), want);
        }
    }
}
