//! The server's side of one client connection.
//!
//! Owns: the bytes not yet parsed, the bytes not yet sent, and descriptors that arrived with a
//! frame that is not whole yet. Never blocks, never interprets a request.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};

use super::frame::{self, HEADER};
use crate::poll::{Endpoint, Interest, Poll, Source};

/// A client that does not read its answers is cut off at this many bytes.
const MAX_UNSENT: usize = 16 << 20;
const CHUNK: usize = 16 * 1024;
/// stdin, stdout, stderr and room for a client that gets it wrong.
const MAX_FDS: usize = 8;

pub struct Connection {
    endpoint: Endpoint,
    input: Vec<u8>,
    /// Offset in the stream of `input[0]`.
    start: u64,
    /// Received descriptors, by the offset of the last byte received with them. The kernel ends
    /// a receive after the message that carries descriptors, so that byte lies in their frame.
    fds: VecDeque<(u64, Vec<OwnedFd>)>,
    output: Vec<u8>,
    sent: usize,
}

pub struct Frame {
    pub stream: u32,
    pub kind: u8,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

pub struct Received {
    pub frames: Vec<Frame>,
    pub closed: bool,
}

impl Connection {
    pub fn new(fd: OwnedFd, id: u32, poll: &Poll) -> io::Result<Connection> {
        let mut endpoint = Endpoint::new(fd, Source::Connection(id));
        endpoint.watch(poll, Interest::READ)?;
        Ok(Connection {
            endpoint,
            input: Vec::new(),
            start: 0,
            fds: VecDeque::new(),
            output: Vec::new(),
            sent: 0,
        })
    }

    /// Reads what is there and gives the frames that are whole.
    pub fn receive(&mut self) -> Received {
        let mut frames = Vec::new();
        let closed = loop {
            match self.read_once() {
                Ok(0) => break true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break true,
            }
            if self.split(&mut frames).is_err() {
                break true;
            }
        };
        Received { frames, closed }
    }

    fn read_once(&mut self) -> io::Result<usize> {
        let mut chunk = [0u8; CHUNK];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = recvmsg(
            self.endpoint.fd(),
            &mut [IoSliceMut::new(&mut chunk)],
            &mut control,
            flags,
        )?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        self.input.extend_from_slice(&chunk[..got.bytes]);
        if !fds.is_empty() && got.bytes > 0 {
            self.fds
                .push_back((self.start + self.input.len() as u64 - 1, fds));
        }
        Ok(got.bytes)
    }

    fn split(&mut self, frames: &mut Vec<Frame>) -> Result<(), frame::TooLong> {
        let mut used = 0;
        while let Some(header) = frame::parse(&self.input[used..])? {
            let end = used + HEADER + header.length;
            if end > self.input.len() {
                break;
            }
            let mut fds = Vec::new();
            while self
                .fds
                .front()
                .is_some_and(|(at, _)| *at < self.start + end as u64)
            {
                if let Some((_, more)) = self.fds.pop_front() {
                    fds.extend(more);
                }
            }
            let body = self.input[used + HEADER..end].to_vec();
            frames.push(Frame {
                stream: header.stream,
                kind: header.kind,
                body,
                fds,
            });
            used = end;
        }
        self.start += used as u64;
        if used == self.input.len() {
            // Connections idle for days: hold no buffer meanwhile.
            self.input = Vec::new();
        } else {
            self.input.drain(..used);
        }
        Ok(())
    }

    /// Queues a frame and sends what the socket takes. An error means the client is gone.
    pub fn send(
        &mut self,
        poll: &Poll,
        stream: u32,
        kind: u8,
        body: &impl prost::Message,
    ) -> io::Result<()> {
        frame::append(&mut self.output, stream, kind, body);
        if self.output.len() - self.sent > MAX_UNSENT {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.flush(poll)
    }

    pub fn flush(&mut self, poll: &Poll) -> io::Result<()> {
        while self.sent < self.output.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(self.endpoint.fd(), &self.output[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(rustix::io::Errno::AGAIN) => {
                    return self.endpoint.watch(poll, Interest::BOTH);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        self.endpoint.watch(poll, Interest::READ)
    }

    pub fn unsent(&self) -> bool {
        self.sent < self.output.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ttrpc::Request;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType, sendmsg,
        socketpair,
    };
    use std::io::{IoSlice, Read};
    use std::os::fd::AsFd;

    fn pair() -> (Connection, OwnedFd, Poll) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let poll = Poll::new().unwrap();
        (Connection::new(ours, 1, &poll).unwrap(), theirs, poll)
    }

    fn frame_of(method: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let body = Request {
            method: method.into(),
            ..Default::default()
        };
        frame::append(&mut out, 1, frame::REQUEST, &body);
        out
    }

    fn send_with_fd(socket: &OwnedFd, bytes: &[u8], content: &str) {
        let file = {
            use std::io::{Seek, Write};
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content.as_bytes()).unwrap();
            file.rewind().unwrap();
            file
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let n = sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        assert_eq!(n, bytes.len());
    }

    fn text(fd: OwnedFd) -> String {
        let mut text = String::new();
        std::fs::File::from(fd).read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn descriptors_belong_to_the_frame_they_came_with() {
        let (mut server, client, _poll) = pair();
        rustix::io::write(&client, &frame_of("plain")).unwrap();
        send_with_fd(&client, &frame_of("first"), "one");
        send_with_fd(&client, &frame_of("second"), "two");
        rustix::io::write(&client, &frame_of("last")).unwrap();
        let got = server.receive();
        assert!(!got.closed);
        let counts: Vec<usize> = got.frames.iter().map(|f| f.fds.len()).collect();
        assert_eq!(counts, [0, 1, 1, 0]);
        let texts: Vec<String> = got
            .frames
            .into_iter()
            .flat_map(|f| f.fds)
            .map(text)
            .collect();
        assert_eq!(texts, ["one", "two"]);
    }

    #[test]
    fn a_frame_in_pieces_arrives_whole_with_its_descriptors() {
        let (mut server, client, _poll) = pair();
        let frame = frame_of(&"x".repeat(40_000));
        send_with_fd(&client, &frame[..3], "one");
        assert!(server.receive().frames.is_empty());
        rustix::io::write(&client, &frame[3..]).unwrap();
        let got = server.receive();
        assert_eq!(got.frames.len(), 1);
        assert_eq!(got.frames[0].body.len(), frame.len() - HEADER);
        assert_eq!(got.frames[0].fds.len(), 1);
    }

    #[test]
    fn an_oversized_announcement_or_a_hangup_closes() {
        let (mut server, client, _poll) = pair();
        rustix::io::write(&client, &[0xff; HEADER]).unwrap();
        assert!(server.receive().closed);
        let (mut server, client, _poll) = pair();
        drop(client);
        assert!(server.receive().closed);
    }
}
