//! Owns the first half of unpacking: checks the blob's size and digest and decompresses it. Which
//! compression it is, the first bytes say; media types are wrong too often.

use std::io::{self, BufRead, Cursor, Read};
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use tokio::sync::mpsc;

use crate::digest::Hasher;
use crate::error::{Error, ErrorKind, Result};
use crate::registry::document::Descriptor;

const BUFFER: usize = 256 << 10;
/// Compression better than this, past `FREE_OUTPUT`, is a bomb. gzip cannot do better than 1032;
/// real layers rarely reach 100.
const RATIO_MAX: u64 = 1100;
const FREE_OUTPUT: u64 = 4 << 30;
const OUTPUT_MAX: u64 = 1 << 40;
/// 128 MiB, what `zstd --ultra -22` needs and the format's own default limit.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

type Buffers = blocking::SyncSender<Result<Vec<u8>>>;

/// Runs until the blob ends or nobody wants the output. Returns the time spent working.
pub(super) fn run(
    blob: &Descriptor,
    source: mpsc::Receiver<Result<Bytes>>,
    output: &Buffers,
    returned: &blocking::Receiver<Vec<u8>>,
) -> Duration {
    let started = Instant::now();
    let mut reader = BlobReader {
        source,
        current: Bytes::new(),
        hasher: Hasher::new(blob.digest.algorithm()),
        received: 0,
        failure: None,
        waited: Duration::ZERO,
    };
    let mut sink = Sink {
        output,
        returned,
        blob,
        produced: 0,
        waited: Duration::ZERO,
    };
    let decoded = decode(&mut reader, &mut sink);
    let outcome = match decoded {
        Err(Halt::NobodyListens) => return work_time(started, &reader, &sink),
        Err(Halt::Refused(error)) => Err(error),
        Ok(()) => reader.finish(blob),
        Err(Halt::Broken(error)) => reader.finish(blob).and_then(|()| {
            Err(Error::new(
                ErrorKind::Corrupt,
                "decompress layer",
                blob.digest.to_string(),
            )
            .because(error))
        }),
    };
    if let Err(error) = outcome {
        // A closed channel means that the other side failed first.
        let _ = output.send(Err(error));
    }
    work_time(started, &reader, &sink)
}

fn work_time(started: Instant, reader: &BlobReader, sink: &Sink<'_>) -> Duration {
    started
        .elapsed()
        .saturating_sub(reader.waited + sink.waited)
}

enum Halt {
    /// The extracting thread is gone.
    NobodyListens,
    Refused(Error),
    /// Decompressing, or the stream before it, failed.
    Broken(io::Error),
}

fn decode(reader: &mut BlobReader, sink: &mut Sink<'_>) -> std::result::Result<(), Halt> {
    let mut head = [0; 4];
    let mut length = 0;
    while length < head.len() {
        match reader.read(&mut head[length..]).map_err(Halt::Broken)? {
            0 => break,
            n => length += n,
        }
    }
    let gzip = head.starts_with(&[0x1f, 0x8b]);
    let zstd = head == [0x28, 0xb5, 0x2f, 0xfd]
        // A skippable frame may come first (RFC 8878, section 3.1.2).
        || (head[0] & 0xf0 == 0x50 && head[1..] == [0x2a, 0x4d, 0x18]);
    let whole = Cursor::new(head[..length].to_vec()).chain(&mut *reader);
    if gzip {
        sink.copy(MultiGzDecoder::new(whole))
    } else if zstd {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole).map_err(Halt::Broken)?;
        decoder
            .window_log_max(ZSTD_WINDOW_LOG_MAX)
            .map_err(Halt::Broken)?;
        sink.copy(decoder)
    } else {
        sink.copy(whole)
    }
}

struct Sink<'a> {
    output: &'a Buffers,
    returned: &'a blocking::Receiver<Vec<u8>>,
    blob: &'a Descriptor,
    produced: u64,
    waited: Duration,
}

impl Sink<'_> {
    fn copy(&mut self, mut decoder: impl Read) -> std::result::Result<(), Halt> {
        loop {
            let mut buffer = self.returned.try_recv().unwrap_or_default();
            buffer.resize(BUFFER, 0);
            let mut filled = 0;
            while filled < BUFFER {
                match decoder.read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Halt::Broken(error)),
                }
            }
            if filled == 0 {
                return Ok(());
            }
            self.produced += filled as u64;
            let bomb = self.produced > FREE_OUTPUT && self.produced / RATIO_MAX > self.blob.size;
            if bomb || self.produced > OUTPUT_MAX {
                return Err(Halt::Refused(
                    Error::new(
                        ErrorKind::Unsupported,
                        "decompress layer",
                        self.blob.digest.to_string(),
                    )
                    .because(format!(
                        "{} bytes unpack to more than {}",
                        self.blob.size, self.produced
                    )),
                ));
            }
            buffer.truncate(filled);
            let started = Instant::now();
            let sent = self.output.send(Ok(buffer));
            self.waited += started.elapsed();
            if sent.is_err() {
                return Err(Halt::NobodyListens);
            }
        }
    }
}

/// Reads the downloaded pieces, hashing them on the way.
struct BlobReader {
    source: mpsc::Receiver<Result<Bytes>>,
    current: Bytes,
    hasher: Hasher,
    received: u64,
    failure: Option<Error>,
    waited: Duration,
}

impl BlobReader {
    /// Reads what the decoder left and verifies the whole.
    fn finish(&mut self, blob: &Descriptor) -> Result<()> {
        loop {
            match self.fill_buf() {
                Ok([]) | Err(_) => break,
                Ok(rest) => {
                    let length = rest.len();
                    self.consume(length);
                }
            }
        }
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let wrong = |why: String| {
            Error::new(ErrorKind::Corrupt, "verify layer", blob.digest.to_string()).because(why)
        };
        if self.received != blob.size {
            return Err(wrong(format!(
                "received {} bytes, its descriptor says {}",
                self.received, blob.size
            )));
        }
        let hasher = std::mem::replace(&mut self.hasher, Hasher::new(blob.digest.algorithm()));
        let found = hasher.finish();
        if found != blob.digest {
            return Err(wrong(format!("was sent content with digest {found}")));
        }
        Ok(())
    }
}

impl BufRead for BlobReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && self.failure.is_none() {
            let started = Instant::now();
            let received = self.source.blocking_recv();
            self.waited += started.elapsed();
            match received {
                Some(Ok(bytes)) => {
                    self.hasher.update(&bytes);
                    self.received += bytes.len() as u64;
                    self.current = bytes;
                }
                Some(Err(error)) => self.failure = Some(error),
                None => break,
            }
        }
        match &self.failure {
            Some(_) => Err(io::Error::other("the download broke")),
            None => Ok(&self.current),
        }
    }

    fn consume(&mut self, amount: usize) {
        let amount = amount.min(self.current.len());
        drop(self.current.split_to(amount));
    }
}

impl Read for BlobReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(into.len());
        into[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}
