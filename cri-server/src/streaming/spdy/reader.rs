//! The reading task of a connection: frames off the socket, pieces of data to the streams.
//!
//! Owns the table of open streams and the inflating context. It never waits without noticing that
//! the client hung up.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::{mpsc, watch};

use super::connection::{Activity, ConnectionError, Incoming, Outbound, Outgoing, Stream};
use super::frame::{self, Control, Farewell, FrameError, HEAD, Head, MAX_CONTROL, Reset};
use super::headers::{Headers, Inflater};

/// Bytes of the socket read at once, and so the longest piece of a stream's data.
const READ: usize = 64 * 1024;
/// Pieces below this are copied.
const SMALL: usize = READ / 8;
/// Pieces that wait in a stream.
const STREAM_QUEUE: usize = 4;
/// How often a stopped reader looks whether the client is still there.
const HANGUP_CHECK: Duration = Duration::from_millis(500);

/// An open stream as the reader sees it.
struct Open {
    /// None once the client has finished.
    data: Option<mpsc::Sender<Bytes>>,
    reset: watch::Sender<bool>,
    finished: Arc<AtomicBool>,
}

impl Open {
    fn is_over(&self) -> bool {
        let theirs = self.data.as_ref().is_none_or(mpsc::Sender::is_closed);
        theirs && self.finished.load(Ordering::Acquire)
    }
}

/// Where the reader puts what it reads.
pub(super) struct Sinks {
    pub new: mpsc::Sender<Stream>,
    pub writer: mpsc::Sender<Outbound>,
    pub activity: Arc<Activity>,
}

pub(super) struct Reader {
    socket: OwnedReadHalf,
    buffer: BytesMut,
    inflater: Inflater,
    streams: HashMap<u32, Open>,
    max_streams: usize,
    /// The newest stream's id; ids only grow.
    last: u32,
    /// The client has said goodbye: what is open goes on.
    going: bool,
    sinks: Sinks,
}

impl Reader {
    /// `early` is what was read of the socket already.
    pub(super) fn new(
        socket: OwnedReadHalf,
        early: &[u8],
        max_streams: usize,
        sinks: Sinks,
    ) -> Self {
        Self {
            socket,
            buffer: BytesMut::from(early),
            inflater: Inflater::new(),
            streams: HashMap::new(),
            max_streams,
            last: 0,
            going: false,
            sinks,
        }
    }

    pub(super) async fn run(mut self) -> Result<(), ConnectionError> {
        let result = self.frames().await;
        if let Err(ConnectionError::Frame(_)) = &result {
            let goodbye = Outbound::Goodbye {
                last: self.last,
                status: Farewell::ProtocolError,
            };
            let _ = self.sinks.writer.try_send(goodbye);
        }
        result
    }

    async fn frames(&mut self) -> Result<(), ConnectionError> {
        loop {
            if !self.fill(HEAD).await? {
                return Ok(());
            }
            let mut head = [0; HEAD];
            self.buffer.copy_to_slice(&mut head);
            match Head::parse(head) {
                Head::Data {
                    stream,
                    fin,
                    length,
                } => self.data(stream, fin, length).await?,
                Head::Control {
                    version,
                    kind,
                    flags,
                    length,
                } => {
                    if length > MAX_CONTROL {
                        return Err(ConnectionError::Frame(FrameError::Length { kind, length }));
                    }
                    if !self.fill(length).await? {
                        return Err(ConnectionError::Gone);
                    }
                    let payload = self.buffer.split_to(length);
                    let control =
                        frame::parse_control(version, kind, flags, &payload, &mut self.inflater)
                            .map_err(ConnectionError::Frame)?;
                    self.control(control).await?;
                }
            }
        }
    }

    /// Reads until `wanted` bytes are there; false if the client has closed.
    async fn fill(&mut self, wanted: usize) -> Result<bool, ConnectionError> {
        while self.buffer.len() < wanted {
            if self.buffer.capacity() - self.buffer.len() < READ / 2 {
                self.buffer.reserve(READ);
            }
            let mut room = (&mut self.buffer).limit(READ);
            if self
                .socket
                .read_buf(&mut room)
                .await
                .map_err(ConnectionError::Io)?
                == 0
            {
                return Ok(false);
            }
            self.sinks.activity.touch();
        }
        Ok(true)
    }

    /// Passes a data frame on piece by piece: it may be 16 MiB long.
    async fn data(&mut self, id: u32, fin: bool, length: usize) -> Result<(), ConnectionError> {
        let mut left = length;
        while left > 0 {
            if !self.fill(1).await? {
                return Err(ConnectionError::Gone);
            }
            let piece = self.buffer.split_to(left.min(self.buffer.len()));
            left -= piece.len();
            // A small piece must not keep a whole read buffer alive while it waits.
            let piece = match piece.len() {
                ..SMALL => Bytes::copy_from_slice(&piece),
                _ => piece.freeze(),
            };
            self.deliver(id, piece).await?;
        }
        if fin && let Some(open) = self.streams.get_mut(&id) {
            open.data = None;
        }
        Ok(())
    }

    async fn deliver(&mut self, id: u32, piece: Bytes) -> Result<(), ConnectionError> {
        let Some(data) = self.streams.get(&id).and_then(|open| open.data.clone()) else {
            // Data that was on its way when the stream ended.
            return Ok(());
        };
        tokio::select! {
            // A session that dropped its half wants no more of it.
            _ = data.send(piece) => Ok(()),
            () = self.hangup() => Err(ConnectionError::Gone),
        }
    }

    /// Waits until the client has hung up, seen past the data that is not read yet.
    async fn hangup(&self) {
        loop {
            tokio::time::sleep(HANGUP_CHECK).await;
            let ready = self.socket.ready(Interest::READABLE).now_or_never();
            if matches!(ready, Some(Ok(ready)) if ready.is_read_closed()) {
                return;
            }
        }
    }

    async fn control(&mut self, control: Control) -> Result<(), ConnectionError> {
        match control {
            Control::SynStream {
                stream,
                fin,
                unidirectional,
                headers,
            } => self.open(stream, fin, unidirectional, headers).await,
            Control::RstStream { stream, .. } => {
                if let Some(open) = self.streams.remove(&stream) {
                    open.reset.send_replace(true);
                }
                Ok(())
            }
            // Even ids would answer pings of ours, and we send none.
            Control::Ping { id } if !id.is_multiple_of(2) => {
                self.send(Outbound::Control(frame::ping(id))).await
            }
            Control::GoAway { .. } => {
                self.going = true;
                Ok(())
            }
            Control::Headers { stream, fin: true } => {
                if let Some(open) = self.streams.get_mut(&stream) {
                    open.data = None;
                }
                Ok(())
            }
            Control::Ping { .. }
            | Control::Headers { .. }
            | Control::SynReply { .. }
            | Control::Ignored => Ok(()),
        }
    }

    async fn send(&mut self, frame: Outbound) -> Result<(), ConnectionError> {
        let writer = self.sinks.writer.clone();
        tokio::select! {
            sent = writer.send(frame) => sent.map_err(|_| ConnectionError::Gone),
            () = self.hangup() => Err(ConnectionError::Gone),
        }
    }

    async fn open(
        &mut self,
        id: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    ) -> Result<(), ConnectionError> {
        self.streams.retain(|_, open| !open.is_over());
        // A client's ids are odd and grow; one-way streams have no use here.
        let status = if id.is_multiple_of(2) || id <= self.last || unidirectional {
            Some(Reset::ProtocolError)
        } else if self.going || self.sinks.new.is_closed() || self.streams.len() >= self.max_streams
        {
            Some(Reset::RefusedStream)
        } else {
            None
        };
        self.last = self.last.max(id);
        if let Some(status) = status {
            return self
                .send(Outbound::Control(frame::rst_stream(id, status)))
                .await;
        }
        self.send(Outbound::Reply { stream: id }).await?;
        let (data_sender, data) = mpsc::channel(STREAM_QUEUE);
        let (reset_sender, reset) = watch::channel(false);
        let finished = Arc::new(AtomicBool::new(false));
        let outgoing = Outgoing {
            id,
            writer: self.sinks.writer.clone(),
            reset,
            finished: finished.clone(),
        };
        let data_sender = (!fin).then_some(data_sender);
        self.streams.insert(
            id,
            Open {
                data: data_sender,
                reset: reset_sender,
                finished,
            },
        );
        let stream = Stream {
            id,
            headers,
            incoming: Incoming(data),
            outgoing,
        };
        let new = self.sinks.new.clone();
        tokio::select! {
            // A session that takes no more streams drops this one.
            _ = new.send(stream) => Ok(()),
            () = self.hangup() => Err(ConnectionError::Gone),
        }
    }
}
