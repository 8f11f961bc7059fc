//! The server's end of a SPDY connection: two tasks around one socket, and the streams they feed.
//!
//! ```text
//! socket -> reader --(bounded channel per stream)--> Incoming
//! socket <- writer <--(one bounded channel)--------- Outgoing, and the reader's pings and resets
//! ```
//!
//! Memory is bounded by the channels: a stream that nobody drains stops the reader, a client that
//! reads nothing stops the writers. While stopped, the reader still notices that the client went.
//! Dropping `Connection` ends both tasks. The reader is in `reader`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::frame::{self, Farewell, FrameError, MAX_DATA, Reset};
use super::headers::{Deflater, Headers};
use super::reader::{Reader, Sinks};

/// Frames that wait for the socket.
const WRITE_QUEUE: usize = 8;
/// Streams that wait for the session to look at them.
const NEW_QUEUE: usize = 16;
/// How long the last frames may take to leave.
const FLUSH: Duration = Duration::from_secs(60);
/// How long a client may take to close after our farewell.
const LINGER: Duration = Duration::from_secs(5);

/// What stops a connection from its side.
#[derive(Debug)]
pub enum ConnectionError {
    Io(io::Error),
    Frame(FrameError),
    /// The client is gone, or the session no longer wants streams.
    Gone,
}

impl std::fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(f, "spdy connection: {error}"),
            Self::Frame(error) => write!(f, "spdy connection: {error}"),
            Self::Gone => f.write_str("spdy connection closed"),
        }
    }
}

impl std::error::Error for ConnectionError {}

/// A stream that the client opened and that has been answered.
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub incoming: Incoming,
    pub outgoing: Outgoing,
}

/// The client's half of a stream.
pub struct Incoming(pub(super) mpsc::Receiver<Bytes>);

impl Incoming {
    /// The next piece; None once the client has finished, reset the stream or gone.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

/// Our half of a stream.
pub struct Outgoing {
    pub(super) id: u32,
    pub(super) writer: mpsc::Sender<Outbound>,
    pub(super) reset: watch::Receiver<bool>,
    pub(super) finished: Arc<AtomicBool>,
}

/// The client wants no more of a stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed;

impl Outgoing {
    /// Sends a piece, in as many frames as it takes, when there is room for it.
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), Closed> {
        while !data.is_empty() {
            if *self.reset.borrow() {
                return Err(Closed);
            }
            let data = data.split_to(data.len().min(MAX_DATA));
            let frame = Outbound::Data {
                stream: self.id,
                fin: false,
                data,
            };
            self.writer.send(frame).await.map_err(|_| Closed)?;
        }
        Ok(())
    }

    /// Says that nothing more comes.
    pub async fn finish(mut self) {
        self.last(|stream| Outbound::Data {
            stream,
            fin: true,
            data: Bytes::new(),
        })
        .await;
    }

    /// Breaks the stream off in both directions.
    pub async fn reset(mut self, status: Reset) {
        self.last(|stream| Outbound::Control(frame::rst_stream(stream, status)))
            .await;
    }

    async fn last(&mut self, frame: impl FnOnce(u32) -> Outbound) {
        if !*self.reset.borrow() {
            // A writer that is gone has nobody to tell.
            let _ = self.writer.send(frame(self.id)).await;
        }
        self.finished.store(true, Ordering::Release);
    }

    /// Waits until the client resets the stream or goes.
    pub async fn closed(&mut self) {
        // An error means that the reader dropped the stream, with the connection.
        let _ = self.reset.wait_for(|reset| *reset).await;
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.finished.store(true, Ordering::Release);
    }
}

pub(super) enum Outbound {
    Data { stream: u32, fin: bool, data: Bytes },
    Reply { stream: u32 },
    Control(Bytes),
    Goodbye { last: u32, status: Farewell },
}

/// When bytes last moved, in seconds since the connection began.
pub(super) struct Activity {
    start: Instant,
    last: AtomicU64,
}

impl Activity {
    pub(super) fn touch(&self) {
        self.last
            .store(self.start.elapsed().as_secs(), Ordering::Relaxed);
    }

    fn idle(&self) -> Duration {
        let last = Duration::from_secs(self.last.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

/// A connection's tasks, and the streams that the client opens.
pub struct Connection {
    streams: mpsc::Receiver<Stream>,
    closed: watch::Receiver<bool>,
    writer: mpsc::Sender<Outbound>,
    activity: Arc<Activity>,
    reading: Option<JoinHandle<Result<(), ConnectionError>>>,
    writing: Option<JoinHandle<()>>,
}

impl Connection {
    /// Serves SPDY on a socket; `early` is what was read of it already. At most `max_streams` are
    /// open at a time, the others are refused.
    pub fn serve(socket: TcpStream, early: &[u8], max_streams: usize) -> Self {
        let (read, write) = socket.into_split();
        let (new, streams) = mpsc::channel(NEW_QUEUE);
        let (writer, outbound) = mpsc::channel(WRITE_QUEUE);
        let (closed_sender, closed) = watch::channel(false);
        let activity = Arc::new(Activity {
            start: Instant::now(),
            last: AtomicU64::new(0),
        });
        let sinks = Sinks {
            new,
            writer: writer.clone(),
            activity: activity.clone(),
        };
        let reader = Reader::new(read, early, max_streams, sinks);
        let reading = tokio::spawn(async move {
            let result = reader.run().await;
            closed_sender.send_replace(true);
            result
        });
        let writing = tokio::spawn(write_all(write, outbound, activity.clone()));
        Self {
            streams,
            closed,
            writer,
            activity,
            reading: Some(reading),
            writing: Some(writing),
        }
    }

    /// The next stream; None once the client has gone.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// Takes no more streams: the reader refuses new ones and discards their data.
    pub fn refuse_streams(&mut self) {
        self.streams.close();
        while let Ok(stream) = self.streams.try_recv() {
            drop(stream);
        }
    }

    /// Waits until the client goes, or nothing has moved for `idle`.
    pub fn ended(&self, idle: Duration) -> impl Future<Output = ()> + Send + use<> {
        let (mut closed, activity) = (self.closed.clone(), self.activity.clone());
        async move {
            loop {
                let left = idle.saturating_sub(activity.idle());
                if left.is_zero() {
                    return;
                }
                let wait = left.max(Duration::from_millis(100));
                match tokio::time::timeout(wait, closed.wait_for(|closed| *closed)).await {
                    Ok(_) => return,
                    Err(_elapsed) => {}
                }
            }
        }
    }

    /// Whether the reader came to its end without a panic.
    #[cfg(test)]
    pub async fn read_to_the_end(mut self) -> bool {
        match self.reading.take() {
            Some(reading) => reading.await.is_ok(),
            None => false,
        }
    }

    /// Says goodbye once all that was sent is out, and waits for the client to close. All streams
    /// have been finished or dropped.
    pub async fn finish(mut self) -> Result<(), ConnectionError> {
        let (reading, writing) = (self.reading.take(), self.writing.take());
        self.refuse_streams();
        let _abort_reading = reading
            .as_ref()
            .map(|task| AbortOnDrop(task.abort_handle()));
        let _abort_writing = writing
            .as_ref()
            .map(|task| AbortOnDrop(task.abort_handle()));
        let goodbye = Outbound::Goodbye {
            last: 0,
            status: Farewell::Ok,
        };
        let flush = async {
            let _ = self.writer.send(goodbye).await;
            if let Some(writing) = writing {
                let _ = writing.await;
            }
        };
        if tokio::time::timeout(FLUSH, flush).await.is_err() {
            return Err(ConnectionError::Gone);
        }
        let Some(reading) = reading else {
            return Ok(());
        };
        // Closing a socket with unread data would reset it and take our last frames along.
        match tokio::time::timeout(LINGER, reading).await {
            Ok(Ok(result)) => result,
            _ => Ok(()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(task) = &self.reading {
            task.abort();
        }
        if let Some(task) = &self.writing {
            task.abort();
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn write_all(
    mut socket: OwnedWriteHalf,
    mut outbound: mpsc::Receiver<Outbound>,
    activity: Arc<Activity>,
) {
    let mut deflater = Deflater::new();
    while let Some(frame) = outbound.recv().await {
        let (last, result) = match frame {
            Outbound::Data { stream, fin, data } => {
                let head = frame::data_head(stream, fin, data.len());
                (
                    false,
                    socket
                        .write_all_buf(&mut Buf::chain(head.as_slice(), data))
                        .await,
                )
            }
            Outbound::Reply { stream } => match frame::syn_reply(stream, &mut deflater) {
                Ok(frame) => (false, socket.write_all(&frame).await),
                Err(error) => (false, Err(io::Error::other(error))),
            },
            Outbound::Control(frame) => (false, socket.write_all(&frame).await),
            Outbound::Goodbye { last, status } => {
                (true, socket.write_all(&frame::goaway(last, status)).await)
            }
        };
        activity.touch();
        // The reader sees what broke; the queue closes and tells all streams.
        if last || result.is_err() {
            break;
        }
    }
    let _ = socket.shutdown().await;
}
