//! Owns turning the bytes of one layer blob into a directory, in one pass on two threads:
//!
//! ```text
//! download --Bytes--> [inflate: blob digest, size, decompress] --buffers--> [extract: diffID, tar -> tree]
//! ```
//! Both channels are short, so memory is bounded whatever the layer holds. The first failure wins:
//! a later stage that merely saw its input end reports what ended it.

pub(crate) mod adopt;
pub(crate) mod apply;
pub(crate) mod inflate;
pub(crate) mod tar;
pub(crate) mod tree;
pub(crate) mod whiteout;

use std::io::{self, BufRead, Read};
use std::os::fd::OwnedFd;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, ErrorKind, Result};
use crate::registry::document::Descriptor;
use apply::{Applier, Stop, Unpacked};
use tar::{TarError, TarReader};

/// Buffers between inflating and extracting.
const BUFFERS: usize = 4;

/// One layer to unpack.
pub(crate) struct Job {
    /// The empty directory to fill.
    pub(crate) directory: OwnedFd,
    pub(crate) blob: Descriptor,
    pub(crate) diff_id: Digest,
}

/// Time each stage spent working rather than waiting.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StageTimes {
    pub(crate) inflate: Duration,
    pub(crate) extract: Duration,
}

/// What the threads answer.
pub(crate) type Outcome = Result<(Unpacked, StageTimes)>;

/// Starts the two threads. The blob's bytes, or why there are no more, come in through `source`;
/// the answer comes when both threads are done with the directory.
pub(crate) fn start(
    job: Job,
    source: mpsc::Receiver<Result<Bytes>>,
) -> Result<oneshot::Receiver<Outcome>> {
    let (buffers, filled) = blocking::sync_channel(BUFFERS);
    let (empty, returned) = blocking::channel();
    let (answer, outcome) = oneshot::channel();
    let spawn_failed = |error| Error::io("spawn thread", "for unpacking", error);
    let blob = job.blob.clone();
    let inflater = std::thread::Builder::new()
        .name("layer-inflate".to_owned())
        .spawn(move || inflate::run(&blob, source, &buffers, &returned))
        .map_err(spawn_failed)?;
    std::thread::Builder::new()
        .name("layer-extract".to_owned())
        .spawn(move || {
            let extracted = extract(job, filled, empty);
            let inflating = inflater.join();
            let outcome = match (extracted, inflating) {
                (Ok((unpacked, extract)), Ok(inflate)) => {
                    Ok((unpacked, StageTimes { inflate, extract }))
                }
                (Err(error), Ok(_)) => Err(error),
                (_, Err(_)) => Err(Error::new(
                    ErrorKind::Internal,
                    "inflate",
                    "thread panicked",
                )),
            };
            // Nobody waits for a pull whose runtime is gone.
            let _ = answer.send(outcome);
        })
        .map_err(spawn_failed)?;
    Ok(outcome)
}

fn extract(
    job: Job,
    filled: blocking::Receiver<Result<Vec<u8>>>,
    empty: blocking::Sender<Vec<u8>>,
) -> Result<(Unpacked, Duration)> {
    let started = Instant::now();
    let layer = |error: Error| error.within("unpack layer", job.blob.digest.to_string());
    let mut reader = TarReader::new(BufferReader {
        filled,
        empty,
        current: Vec::new(),
        position: 0,
        hasher: Hasher::new(job.diff_id.algorithm()),
        failure: None,
        waited: Duration::ZERO,
    });
    let mut applier = Applier::new(job.directory);
    let applied = applier.apply(&mut reader);
    let mut source = reader.into_source();
    let stopped = match applied {
        Ok(()) => None,
        Err(Stop::Failed(error)) if error.kind() != ErrorKind::Corrupt => return Err(layer(error)),
        Err(Stop::Failed(error)) => Some(error),
        Err(Stop::Tar(TarError::Corrupt(why))) => {
            Some(Error::new(ErrorKind::Corrupt, "read tar", "").because(why))
        }
        Err(Stop::Tar(TarError::Unsupported(why))) => {
            Some(Error::new(ErrorKind::Unsupported, "read tar", "").because(why))
        }
        Err(Stop::Tar(TarError::Io(error))) => Some(Error::io("read tar", "", error)),
    };
    // What follows the archive's end belongs to the diffID too; and if the blob turns out to be
    // the wrong one, that is why it could not be read.
    source.drain();
    if let Some(error) = source.failure.take() {
        return Err(error);
    }
    if let Some(error) = stopped {
        return Err(layer(error));
    }
    let waited = source.waited;
    let found = source.hasher.finish();
    if found != job.diff_id {
        return Err(layer(Error::new(ErrorKind::Corrupt, "verify", "").because(
            format!(
                "it unpacks to {found}, the image config says {}",
                job.diff_id
            ),
        )));
    }
    let unpacked = applier.finish().map_err(layer)?;
    Ok((unpacked, started.elapsed().saturating_sub(waited)))
}

/// Reads the buffers of the inflating thread, hashing them on the way.
struct BufferReader {
    filled: blocking::Receiver<Result<Vec<u8>>>,
    empty: blocking::Sender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
    hasher: Hasher,
    failure: Option<Error>,
    waited: Duration,
}

impl BufferReader {
    fn drain(&mut self) {
        loop {
            match self.fill_buf() {
                Ok([]) | Err(_) => return,
                Ok(rest) => {
                    let length = rest.len();
                    self.consume(length);
                }
            }
        }
    }
}

impl BufRead for BufferReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.current.len() && self.failure.is_none() {
            // The inflating thread may be done already; then nobody wants the buffer.
            let _ = self.empty.send(std::mem::take(&mut self.current));
            self.position = 0;
            let started = Instant::now();
            let received = self.filled.recv();
            self.waited += started.elapsed();
            match received {
                Ok(Ok(buffer)) => {
                    self.hasher.update(&buffer);
                    self.current = buffer;
                }
                Ok(Err(error)) => self.failure = Some(error),
                // Closed: the end of the stream.
                Err(blocking::RecvError) => {}
            }
        }
        match &self.failure {
            Some(_) => Err(io::Error::other("the layer's stream broke")),
            None => Ok(&self.current[self.position..]),
        }
    }

    fn consume(&mut self, amount: usize) {
        self.position = (self.position + amount).min(self.current.len());
    }
}

impl Read for BufferReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(into.len());
        into[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}
