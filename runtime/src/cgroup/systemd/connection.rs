//! A blocking D-Bus connection: SASL, calls, and the signals that come between.
//!
//! ```text
//! connect --AUTH EXTERNAL--> --BEGIN--> [Hello, on a bus] --call--> reply
//!                                                            signals queue up until asked for
//! ```
//! One thread, one descriptor (close-on-exec), every wait with a deadline. Never receives
//! descriptors and never serves a call.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::address::Socket;
use super::wire::{FIXED_HEADER, Kind, Message, Value};
use crate::error::{Error, Kind as ErrorKind, Result};

/// What libdbus and sd-bus wait for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(25);

/// A bus that is starting may have its queue of connections full for a while.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Lines of the authentication are short; this is longer than any.
const MAX_LINE: usize = 1024;

/// Signals that nobody has asked for are dropped beyond this many.
const MAX_QUEUE: usize = 1024;

const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";

/// An answer that says no: its D-Bus name and its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub name: String,
    pub text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.text.as_str() {
            "" => f.write_str(&self.name),
            text => f.write_str(text),
        }
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    /// The D-Bus name of the refusal that caused an error, if one did.
    pub fn name_of(error: &Error) -> Option<&str> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = next {
            if let Some(refusal) = error.downcast_ref::<Refusal>() {
                return Some(&refusal.name);
            }
            next = error.source();
        }
        None
    }
}

/// What a call addresses.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub destination: &'a str,
    pub path: &'a str,
    pub interface: &'a str,
}

#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    serial: u32,
    received: Vec<u8>,
    signals: VecDeque<Message>,
    /// Talks to one peer, without a bus between: no names, no Hello, no match rules.
    direct: bool,
    /// What the bus calls us.
    pub(super) name: String,
}

impl Connection {
    /// Connects to a bus and says hello.
    ///
    /// # Errors
    /// Nobody listens, or the bus refuses this user.
    pub fn bus(socket: &Socket) -> Result<Connection> {
        let mut connection = Connection::open(socket, false)?;
        let welcome = connection.call(bus_target(), "Hello", Vec::new())?;
        let name = welcome.body.first().and_then(Value::as_text);
        connection.name = name.unwrap_or_default().to_owned();
        Ok(connection)
    }

    /// Connects to a peer that speaks D-Bus without a bus.
    ///
    /// # Errors
    /// Nobody listens, or the peer refuses this user.
    pub fn direct(socket: &Socket) -> Result<Connection> {
        Connection::open(socket, true)
    }

    fn open(socket: &Socket, direct: bool) -> Result<Connection> {
        let mut connection = Connection {
            socket: connect(socket)?,
            serial: 0,
            received: Vec::new(),
            signals: VecDeque::new(),
            direct,
            name: String::new(),
        };
        connection
            .authenticate()
            .map_err(|error| error.context("D-Bus authentication"))?;
        Ok(connection)
    }

    /// Without naming an id: the peer takes the one that the socket vouches for, which is the
    /// right one in a user namespace as well.
    fn authenticate(&mut self) -> Result<()> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        self.send(b"\0AUTH EXTERNAL\r\nDATA\r\n", deadline)?;
        let refused = |line: &str| Error::new(ErrorKind::System, "refused:", line);
        let line = self.line(deadline)?;
        if line != "DATA" && !line.starts_with("DATA ") {
            return Err(refused(&line));
        }
        let line = self.line(deadline)?;
        if !line.starts_with("OK ") {
            return Err(refused(&line));
        }
        self.send(b"BEGIN\r\n", deadline)
    }

    fn line(&mut self, deadline: Instant) -> Result<String> {
        loop {
            if let Some(end) = self.received.windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8_lossy(&self.received[..end]).into_owned();
                self.received.drain(..end + 2);
                return Ok(line);
            }
            if self.received.len() > MAX_LINE {
                return Err(Error::new(ErrorKind::System, "too long a line", ""));
            }
            self.receive(deadline)?;
        }
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    /// The peer refuses (a [`Refusal`] is the source), does not answer in time, or goes away.
    pub fn call(&mut self, target: Target<'_>, member: &str, body: Vec<Value>) -> Result<Message> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let serial = self.next_serial();
        let call = Message {
            path: target.path.to_owned(),
            interface: target.interface.to_owned(),
            member: member.to_owned(),
            // Without a bus there is nobody else to address.
            destination: if self.direct {
                String::new()
            } else {
                target.destination.to_owned()
            },
            body,
            ..Message::empty(Kind::Call, serial)
        };
        let failed =
            |error: Error| error.context(format!("D-Bus call {}.{member}", target.interface));
        self.send(&call.encode(), deadline).map_err(failed)?;
        loop {
            let message = self.next(deadline).map_err(failed)?;
            match message.kind {
                Kind::Return if message.reply_to == serial => return Ok(message),
                Kind::Error if message.reply_to == serial => {
                    let text = message.body.first().and_then(Value::as_text);
                    let refusal = Refusal {
                        text: text.unwrap_or_default().to_owned(),
                        name: message.error,
                    };
                    return Err(Error::new(ErrorKind::System, "", "").source(refusal));
                }
                Kind::Signal => self.queue(message),
                // Late answers to calls that were given up, and calls to us, who serve none.
                Kind::Return | Kind::Error | Kind::Call | Kind::Other => {}
            }
        }
    }

    /// Asks the bus for signals; a peer without a bus sends them anyway.
    ///
    /// # Errors
    /// As for [`Connection::call`].
    pub fn add_match(&mut self, rule: &str) -> Result<()> {
        if self.direct {
            return Ok(());
        }
        self.call(bus_target(), "AddMatch", vec![Value::text(rule)])
            .map(|_| ())
    }

    /// The user that the bus takes us for: as seen from outside when in a user namespace.
    ///
    /// # Errors
    /// As for [`Connection::call`].
    pub fn user_on_bus(&mut self) -> Result<Option<u32>> {
        if self.direct {
            return Ok(None);
        }
        let name = Value::text(self.name.clone());
        let reply = self.call(bus_target(), "GetConnectionUnixUser", vec![name])?;
        match reply.body.first() {
            Some(Value::U32(uid)) => Ok(Some(*uid)),
            _ => Ok(None),
        }
    }

    /// The next signal that `wanted` is true of, of those that wait and those to come. `None`
    /// when the deadline comes first.
    ///
    /// # Errors
    /// The peer goes away or sends what is no D-Bus.
    pub fn signal(
        &mut self,
        deadline: Instant,
        wanted: impl Fn(&Message) -> bool,
    ) -> Result<Option<Message>> {
        if let Some(at) = self.signals.iter().position(&wanted) {
            return Ok(self.signals.remove(at));
        }
        loop {
            match self.next(deadline) {
                Ok(message) if message.kind == Kind::Signal && wanted(&message) => {
                    return Ok(Some(message));
                }
                Ok(message) if message.kind == Kind::Signal => self.queue(message),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn queue(&mut self, signal: Message) {
        if self.signals.len() < MAX_QUEUE {
            self.signals.push_back(signal);
        }
    }

    pub(super) fn next_serial(&mut self) -> u32 {
        // 0 is no serial.
        self.serial = self.serial.checked_add(1).unwrap_or(1);
        self.serial
    }

    pub(super) fn next(&mut self, deadline: Instant) -> Result<Message> {
        let malformed = |error| Error::new(ErrorKind::System, "", "").source(error);
        loop {
            if let Some(fixed) = self.received.first_chunk::<FIXED_HEADER>() {
                let length = Message::length(fixed).map_err(malformed)?;
                if let Some(frame) = self.received.get(..length) {
                    let message = Message::decode(frame).map_err(malformed);
                    self.received.drain(..length);
                    return message;
                }
            }
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<()> {
        let mut buffer = [0u8; 8192];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(failed("read from", Errno::CONNRESET)),
                Ok((_, count)) => {
                    self.received.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(errno) => return Err(failed("read from", errno)),
            }
        }
    }

    pub(super) fn send(&self, mut bytes: &[u8], deadline: Instant) -> Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !bytes.is_empty() {
            match rustix::net::send(&self.socket, bytes, flags) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(failed("write to", errno)),
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&self.socket, flags)];
        match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => Err(failed("wait for", Errno::TIMEDOUT)),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(failed("poll", errno)),
        }
    }
}

fn bus_target() -> Target<'static> {
    Target {
        destination: BUS,
        path: BUS_PATH,
        interface: BUS,
    }
}

fn failed(call: &'static str, errno: Errno) -> Error {
    Error::system(call, "the D-Bus socket", errno)
}

fn is_timeout(error: &Error) -> bool {
    error.errno() == Some(Errno::TIMEDOUT.raw_os_error())
}

fn connect(socket: &Socket) -> Result<OwnedFd> {
    let (address, name) = match socket {
        Socket::Path(path) => (SocketAddrUnix::new(path), path.display().to_string()),
        Socket::Abstract(name) => (
            SocketAddrUnix::new_abstract_name(name),
            format!("@{}", String::from_utf8_lossy(name)),
        ),
    };
    let failed = |errno: Errno| Error::system("connect to D-Bus socket", name.clone(), errno);
    let address = address.map_err(failed)?;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| Error::system("socket", "AF_UNIX", errno))?;
    // Bounds a connect that finds the queue full.
    let timeout = Some(CONNECT_TIMEOUT);
    rustix::net::sockopt::set_socket_timeout(
        fd.as_fd(),
        rustix::net::sockopt::Timeout::Send,
        timeout,
    )
    .map_err(failed)?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&fd, &address)).map_err(failed)?;
    Ok(fd)
}

#[cfg(test)]
#[path = "connection_tests.rs"]
pub(super) mod tests;
