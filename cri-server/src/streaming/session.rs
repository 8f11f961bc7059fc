//! What exec and attach share: gathering the client's streams and pumping them to pipes.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::spdy::connection::{Connection, Incoming, Outgoing};
use super::spdy::frame::Reset;
use super::{SessionError, SessionIo, TerminalSize};

/// Pipes of this size need fewer wake-ups; where it may not be had the default does.
const PIPE: usize = 256 * 1024;
const READ: usize = 32 * 1024;
/// What is read from a pipe after the process has exited: all that it can have left in there, and
/// no endless stream of a child that it left behind.
const AFTER_EXIT: usize = 2 * PIPE;
/// How long such a pipe may stay silent.
const AFTER_EXIT_SILENCE: Duration = Duration::from_secs(1);
/// No resize message is longer.
const MAX_RESIZE: usize = 1024;

/// Which streams the session has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub resize: bool,
}

/// The client's streams. The halves that carry nothing are gone already.
pub(super) struct Streams {
    pub error: Outgoing,
    stdin: Option<(Incoming, Outgoing)>,
    stdout: Option<Outgoing>,
    stderr: Option<Outgoing>,
    resize: Option<(Incoming, Outgoing)>,
}

/// Waits until the client has opened every stream of the session.
pub(super) async fn gather(
    connection: &mut Connection,
    wanted: Wanted,
    patience: Duration,
) -> Result<Streams, SessionError> {
    let gathered = tokio::time::timeout(patience, gather_all(connection, wanted)).await;
    connection.refuse_streams();
    gathered.unwrap_or_else(|_| {
        Err(SessionError::new(
            "timed out waiting for client to create streams",
        ))
    })
}

async fn gather_all(connection: &mut Connection, wanted: Wanted) -> Result<Streams, SessionError> {
    let (mut error, mut stdin, mut stdout, mut stderr, mut resize) = (None, None, None, None, None);
    while error.is_none()
        || (wanted.stdin && stdin.is_none())
        || (wanted.stdout && stdout.is_none())
        || (wanted.stderr && stderr.is_none())
        || (wanted.resize && resize.is_none())
    {
        let gone = || SessionError::new("client went before it had created its streams");
        let stream = connection.next().await.ok_or_else(gone)?;
        let halves = (stream.incoming, stream.outgoing);
        match stream.headers.value("streamtype") {
            Some("error") if error.is_none() => error = Some(halves.1),
            Some("stdin") if wanted.stdin && stdin.is_none() => stdin = Some(halves),
            Some("stdout") if wanted.stdout && stdout.is_none() => stdout = Some(halves.1),
            Some("stderr") if wanted.stderr && stderr.is_none() => stderr = Some(halves.1),
            Some("resize") if wanted.resize && resize.is_none() => resize = Some(halves),
            _ => halves.1.reset(Reset::ProtocolError).await,
        }
    }
    let error = error.ok_or_else(|| SessionError::new("client created no error stream"))?;
    Ok(Streams {
        error,
        stdin,
        stdout,
        stderr,
        resize,
    })
}

/// The pumps between a session's streams and its pipes.
pub(super) struct Pumps {
    stdin: Option<(Incoming, Outgoing, pipe::Sender)>,
    stdout: Option<(Outgoing, pipe::Receiver)>,
    stderr: Option<(Outgoing, pipe::Receiver)>,
    resize: Option<(Incoming, Outgoing, mpsc::Sender<TerminalSize>)>,
}

/// Pipes for the streams: the process's ends, and pumps on ours.
pub(super) fn plumb(
    streams: Streams,
) -> io::Result<(SessionIo, mpsc::Receiver<TerminalSize>, Pumps, Outgoing)> {
    let (resize_sender, resize_receiver) = mpsc::channel(1);
    let mut io = SessionIo {
        stdin: None,
        stdout: None,
        stderr: None,
    };
    let mut pumps = Pumps {
        stdin: None,
        stdout: None,
        stderr: None,
        resize: None,
    };
    if let Some((incoming, outgoing)) = streams.stdin {
        let (read, write) = new_pipe()?;
        io.stdin = Some(read);
        pumps.stdin = Some((incoming, outgoing, pipe::Sender::from_owned_fd(write)?));
    }
    if let Some(outgoing) = streams.stdout {
        let (read, write) = new_pipe()?;
        io.stdout = Some(write);
        pumps.stdout = Some((outgoing, pipe::Receiver::from_owned_fd(read)?));
    }
    if let Some(outgoing) = streams.stderr {
        let (read, write) = new_pipe()?;
        io.stderr = Some(write);
        pumps.stderr = Some((outgoing, pipe::Receiver::from_owned_fd(read)?));
    }
    pumps.resize = streams
        .resize
        .map(|(incoming, outgoing)| (incoming, outgoing, resize_sender));
    Ok((io, resize_receiver, pumps, streams.error))
}

fn new_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Past the user's limit the kernel says EPERM.
    let _ = fcntl_setpipe_size(&write, PIPE);
    Ok((read, write))
}

impl Pumps {
    /// Runs until the process has exited and both outputs have ended: at their end of file, or
    /// when what the process left in them is out. Dropping it closes our ends of the pipes.
    pub(super) async fn run(self, exited: watch::Receiver<bool>) {
        let Self {
            stdin,
            stdout,
            stderr,
            resize,
        } = self;
        let mut exit = exited.clone();
        let outputs = async {
            tokio::join!(
                output(stdout, exited.clone()),
                output(stderr, exited),
                until_true(&mut exit)
            );
        };
        let inputs = async {
            tokio::join!(input(stdin), resizes(resize));
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = outputs => {}
            () = inputs => {}
        }
    }
}

/// Client to process. The end of the stream is the end of the file.
async fn input(pump: Option<(Incoming, Outgoing, pipe::Sender)>) {
    let Some((mut incoming, outgoing, mut pipe)) = pump else {
        return;
    };
    while let Some(piece) = incoming.next().await {
        if pipe.write_all(&piece).await.is_err() {
            // The process has closed its stdin: tell the client to stop sending.
            outgoing.reset(Reset::Cancel).await;
            return;
        }
    }
    outgoing.finish().await;
}

/// Process to client.
async fn output(pump: Option<(Outgoing, pipe::Receiver)>, mut exited: watch::Receiver<bool>) {
    let Some((mut outgoing, mut pipe)) = pump else {
        return;
    };
    let mut after_exit = 0;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ);
        let read = tokio::select! {
            read = pipe.read_buf(&mut buffer) => read,
            () = outgoing.closed() => return,
            () = silence(&mut exited) => break,
        };
        match read {
            Ok(0) | Err(_) => break,
            Ok(count) if *exited.borrow() => after_exit += count,
            Ok(_) => {}
        }
        let piece: Bytes = buffer.split().freeze();
        if outgoing.send(piece).await.is_err() {
            return;
        }
        if after_exit > AFTER_EXIT {
            break;
        }
    }
    outgoing.finish().await;
}

/// A while after the exit. Polled anew for every read, so it measures one silence.
async fn silence(exited: &mut watch::Receiver<bool>) {
    until_true(exited).await;
    tokio::time::sleep(AFTER_EXIT_SILENCE).await;
}

async fn until_true(flag: &mut watch::Receiver<bool>) {
    // An error means that nobody will ever set it: nobody waits for the process any more.
    let _ = flag.wait_for(|flag| *flag).await;
}

/// Terminal sizes: what the backend has not taken yet, a newer one replaces. The stream is always
/// drained, for one that is not stops the connection.
async fn resizes(pump: Option<(Incoming, Outgoing, mpsc::Sender<TerminalSize>)>) {
    let Some((mut incoming, _outgoing, sizes)) = pump else {
        return;
    };
    let mut decoder = ResizeDecoder::default();
    let mut newest = None;
    loop {
        tokio::select! {
            piece = incoming.next() => match piece {
                Some(piece) => newest = decoder.push(&piece).or(newest),
                None => break,
            },
            permit = sizes.reserve(), if newest.is_some() => match (permit, newest.take()) {
                (Ok(permit), Some(size)) => permit.send(size),
                // The backend wants no sizes.
                _ => while incoming.next().await.is_some() {},
            },
        }
    }
    if let Some(size) = newest {
        let _ = sizes.send(size).await;
    }
    // The channel's end would tell the backend nothing: it stays open with the session.
    std::future::pending::<()>().await;
}

/// JSON objects `{"Width":80,"Height":24}`, one after the other, however they are cut.
#[derive(Default)]
struct ResizeDecoder {
    text: Vec<u8>,
}

#[derive(serde::Deserialize)]
struct ResizeMessage {
    #[serde(alias = "Width")]
    width: u16,
    #[serde(alias = "Height")]
    height: u16,
}

impl ResizeDecoder {
    /// The newest size that is complete. Zero sizes are no sizes.
    fn push(&mut self, piece: &[u8]) -> Option<TerminalSize> {
        let mut newest = None;
        for byte in piece {
            self.text.push(*byte);
            if *byte == b'}' {
                if let Ok(ResizeMessage { width, height }) = serde_json::from_slice(&self.text)
                    && width > 0
                    && height > 0
                {
                    newest = Some(TerminalSize { width, height });
                }
                self.text.clear();
            } else if self.text.len() > MAX_RESIZE {
                self.text.clear();
            }
        }
        newest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_however_they_are_cut() {
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(b"{\"Width\":80,\"Hei"), None);
        let size = |width, height| Some(TerminalSize { width, height });
        assert_eq!(decoder.push(b"ght\":24}\n{\"Width\":"), size(80, 24));
        assert_eq!(
            decoder.push(b"100,\"Height\":50}{\"Width\":1,\"Height\":2}"),
            size(1, 2)
        );
        assert_eq!(decoder.push(b"{\"Width\":0,\"Height\":0}"), None);
        assert_eq!(decoder.push(b"nonsense}"), None);
        assert_eq!(decoder.push(&[b'x'; 5000]), None);
        assert!(decoder.text.len() <= MAX_RESIZE);
        assert_eq!(decoder.push(b"}{\"Width\":3,\"Height\":4}"), size(3, 4));
    }
}
