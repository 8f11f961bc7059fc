//! Owns one ttrpc connection to a shim: framing, matching answers to calls, and descriptors
//! that travel with a request. Knows no service.
//!
//! ```text
//! call() -> queue -> writer task -> socket -> shim
//! call() <- oneshot <- reader task <- socket <- shim
//! ```
//! A frame is written by one task from start to end, so a caller that goes away in the middle
//! never leaves half a frame behind. When the socket ends, every call still waiting fails with
//! [`ShimError::Gone`].

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::proto::shim::ttrpc;

/// The largest body a peer may send (ttrpc's own limit).
const MAX_BODY: usize = 4 << 20;
const HEADER: usize = 10;
const TYPE_REQUEST: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
/// Frames that may wait for a shim that does not read.
const QUEUE: usize = 64;

/// Why a call to a shim did not bring an answer.
#[derive(Debug, Clone)]
pub enum ShimError {
    /// The connection ended: the shim died.
    Gone,
    /// No answer in time. The shim may still act on the request.
    Timeout {
        /// The method that was called.
        method: &'static str,
    },
    /// The shim answered with an error; `code` is a gRPC code.
    Status {
        /// gRPC code.
        code: i32,
        /// The shim's text.
        message: String,
    },
    /// The answer could not be decoded.
    Garbled(String),
}

impl ShimError {
    /// The shim knows no such task or process.
    pub fn is_not_found(&self) -> bool {
        matches!(self, ShimError::Status { code: 5, .. })
    }
}

impl std::fmt::Display for ShimError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ShimError::Gone => f.write_str("the shim is gone"),
            ShimError::Timeout { method } => write!(f, "the shim did not answer {method} in time"),
            ShimError::Status { message, .. } => f.write_str(message),
            ShimError::Garbled(text) => write!(f, "garbled answer from the shim: {text}"),
        }
    }
}

impl std::error::Error for ShimError {}

struct Frame {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

type Answer = Result<Vec<u8>, ShimError>;

/// Calls without an answer yet; `None` once the connection has ended.
type Pending = Mutex<Option<HashMap<u32, oneshot::Sender<Answer>>>>;

/// A live or dead connection. Dropping the last handle closes it.
pub struct Connection {
    queue: mpsc::Sender<Frame>,
    pending: Arc<Pending>,
    next_stream: AtomicU32,
    closed: watch::Receiver<bool>,
    reader: tokio::task::AbortHandle,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Connection {
    /// Connects to a shim's socket.
    pub async fn open(socket: &Path) -> io::Result<Connection> {
        let stream = Arc::new(UnixStream::connect(socket).await?);
        let (queue, frames) = mpsc::channel(QUEUE);
        let (closing, closed) = watch::channel(false);
        let pending: Arc<Pending> = Arc::new(Mutex::new(Some(HashMap::new())));
        let writer = tokio::spawn(write_frames(stream.clone(), frames)).abort_handle();
        let shared = pending.clone();
        let reader = tokio::spawn(async move {
            read_frames(&stream, &shared).await;
            let waiting = lock(&shared).take().unwrap_or_default();
            for answer in waiting.into_values() {
                let _ = answer.send(Err(ShimError::Gone));
            }
            writer.abort();
            closing.send_replace(true);
        })
        .abort_handle();
        Ok(Connection {
            queue,
            pending,
            next_stream: AtomicU32::new(1),
            closed,
            reader,
        })
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Returns when the connection has ended.
    pub async fn wait_closed(&self) {
        let mut closed = self.closed.clone();
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// One unary call. `fds` are sent with the frame and closed here. Without a deadline the
    /// call waits as long as the connection lives.
    pub async fn call<Req: Message, Resp: Message + Default>(
        &self,
        target: Target,
        request: &Req,
        fds: Vec<OwnedFd>,
    ) -> Result<Resp, ShimError> {
        let Some(limit) = target.deadline else {
            return self.exchange(target, request, fds).await;
        };
        tokio::time::timeout(limit, self.exchange(target, request, fds))
            .await
            .unwrap_or(Err(ShimError::Timeout {
                method: target.method,
            }))
    }

    async fn exchange<Req: Message, Resp: Message + Default>(
        &self,
        target: Target,
        request: &Req,
        fds: Vec<OwnedFd>,
    ) -> Result<Resp, ShimError> {
        let stream_id = self.next_stream.fetch_add(2, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match lock(&self.pending).as_mut() {
            Some(pending) => pending.insert(stream_id, sender),
            None => return Err(ShimError::Gone),
        };
        // Takes the entry away again when this future is dropped (deadline, cancelled caller).
        let _entry = PendingEntry {
            pending: &self.pending,
            stream_id,
        };
        let bytes = encode(target, stream_id, request)?;
        let frame = Frame { bytes, fds };
        self.queue.send(frame).await.map_err(|_| ShimError::Gone)?;
        let payload = answer.await.unwrap_or(Err(ShimError::Gone))?;
        Resp::decode(payload.as_slice()).map_err(|e| ShimError::Garbled(e.to_string()))
    }
}

/// Which method of which service, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Full service name.
    pub service: &'static str,
    /// Method name.
    pub method: &'static str,
    /// Time for the whole call; `None` waits for ever.
    pub deadline: Option<Duration>,
}

struct PendingEntry<'a> {
    pending: &'a Pending,
    stream_id: u32,
}

impl Drop for PendingEntry<'_> {
    fn drop(&mut self) {
        if let Some(pending) = lock(self.pending).as_mut() {
            pending.remove(&self.stream_id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under this lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encode<Req: Message>(
    target: Target,
    stream_id: u32,
    request: &Req,
) -> Result<Vec<u8>, ShimError> {
    let nanos = target.deadline.map_or(0, |d| d.as_nanos());
    let body = ttrpc::Request {
        service: target.service.to_owned(),
        method: target.method.to_owned(),
        payload: request.encode_to_vec(),
        timeout_nano: i64::try_from(nanos).unwrap_or(i64::MAX),
        metadata: vec![ttrpc::KeyValue {
            key: "containerd-namespace-ttrpc".to_owned(),
            value: super::NAMESPACE.to_owned(),
        }],
    };
    let len = body.encoded_len();
    if len > MAX_BODY {
        let text = format!("a request of {len} bytes is over ttrpc's limit of 4 MiB");
        return Err(ShimError::Garbled(text));
    }
    let mut bytes = Vec::with_capacity(HEADER + len);
    bytes.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(&stream_id.to_be_bytes());
    bytes.push(TYPE_REQUEST);
    bytes.push(0);
    body.encode(&mut bytes)
        .map_err(|e| ShimError::Garbled(e.to_string()))?;
    Ok(bytes)
}

async fn write_frames(stream: Arc<UnixStream>, mut frames: mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        if write_frame(&stream, &frame).await.is_err() {
            // The reader sees the end of the socket and fails the calls.
            return;
        }
    }
}

async fn write_frame(stream: &UnixStream, frame: &Frame) -> io::Result<()> {
    let mut sent = 0;
    while sent < frame.bytes.len() {
        stream.writable().await?;
        // Descriptors go with the first byte only.
        let fds: &[OwnedFd] = if sent == 0 { &frame.fds } else { &[] };
        match stream.try_io(Interest::WRITABLE, || {
            send(stream, &frame.bytes[sent..], fds)
        }) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other(
            "more than three descriptors in one request",
        ));
    }
    let slices = [IoSlice::new(bytes)];
    Ok(rustix::net::sendmsg(
        stream,
        &slices,
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?)
}

/// Returns when the connection has ended, for whatever reason.
async fn read_frames(stream: &UnixStream, pending: &Pending) {
    let mut buffer = Vec::new();
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        buffer.reserve(16 << 10);
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        }
        let mut used = 0;
        while let Some((stream_id, kind, body, len)) = next_frame(&buffer[used..]) {
            if body.len() > MAX_BODY {
                return;
            }
            if kind == TYPE_RESPONSE {
                let sender = lock(pending).as_mut().and_then(|p| p.remove(&stream_id));
                if let Some(sender) = sender {
                    let _ = sender.send(decode(body));
                }
            }
            used += len;
        }
        buffer.drain(..used);
        if buffer.len() > MAX_BODY + HEADER {
            return;
        }
    }
}

/// Stream id, type, body and whole length of the first complete frame.
fn next_frame(bytes: &[u8]) -> Option<(u32, u8, &[u8], usize)> {
    let (head, rest) = bytes.split_at_checked(HEADER)?;
    let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let stream_id = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    let body = rest.get(..len)?;
    Some((stream_id, head[8], body, HEADER + len))
}

fn decode(body: &[u8]) -> Answer {
    let response = ttrpc::Response::decode(body).map_err(|e| ShimError::Garbled(e.to_string()))?;
    match response.status {
        Some(status) if status.code != 0 => Err(ShimError::Status {
            code: status.code,
            message: status.message,
        }),
        _ => Ok(response.payload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_frame_waits_for_the_whole_body() {
        let mut bytes = vec![0, 0, 0, 2, 0, 0, 0, 3, 2, 0, b'h'];
        assert!(next_frame(&bytes).is_none());
        bytes.push(b'i');
        bytes.push(9);
        assert_eq!(next_frame(&bytes), Some((3, 2, &b"hi"[..], 12)));
    }

    #[tokio::test]
    async fn call_fails_when_the_peer_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let connection = Connection::open(&path).await.unwrap();
        let (peer, _) = listener.accept().await.unwrap();
        let target = Target {
            service: "s",
            method: "m",
            deadline: None,
        };
        let request = ttrpc::KeyValue::default();
        let call = connection.call::<_, ttrpc::KeyValue>(target, &request, Vec::new());
        let end = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(peer);
        };
        let (answer, ()) = tokio::join!(call, end);
        assert!(matches!(answer, Err(ShimError::Gone)));
        assert!(connection.is_closed());
    }

    #[tokio::test]
    async fn call_to_a_mute_peer_ends_at_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let connection = Connection::open(&path).await.unwrap();
        let target = Target {
            service: "s",
            method: "Slow",
            deadline: Some(Duration::from_millis(20)),
        };
        let request = ttrpc::KeyValue::default();
        let answer = connection
            .call::<_, ttrpc::KeyValue>(target, &request, Vec::new())
            .await;
        assert!(matches!(answer, Err(ShimError::Timeout { method: "Slow" })));
    }
}
