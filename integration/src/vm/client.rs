//! The host's end of a guest's ports: runs a command there and hands on what it writes.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::wire::{self, Ended, Frames, Kind, Request};

/// Socket of a port below the guest's directory.
pub fn socket(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("port-{index}"))
}

/// Output as it comes: (kind, bytes).
pub type Sink<'a> = &'a mut dyn FnMut(Kind, &[u8]) -> Result<()>;

/// Runs a command in the guest of `dir`. Waits for the guest to boot when it does so; an error
/// when it dies, or has not ended the command when `limit` is over.
pub fn exec(dir: &Path, mut request: Request, limit: Duration, sink: Sink<'_>) -> Result<Ended> {
    let end = Instant::now() + limit;
    let (_lock, mut stream) = connect(dir, end)?;
    request.session = number();
    let line = format!("\n{}\n", serde_json::to_string(&request)?);
    stream.write_all(line.as_bytes())?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut frames = Frames::new(request.session);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => bail!("the guest is gone"),
            Ok(length) => frames.add(&buffer[..length]),
            Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {
                if Instant::now() > end {
                    bail!("no answer from the guest within {limit:?}");
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("read from the guest"),
        }
        while let Some((kind, payload)) = frames.take()? {
            if kind == Kind::End {
                return Ok(serde_json::from_slice(&payload)?);
            }
            sink(kind, &payload)?;
        }
    }
}

/// A port that no other process uses, and the lock that keeps it so.
fn connect(dir: &Path, end: Instant) -> Result<(Flock<File>, UnixStream)> {
    loop {
        for index in 0..wire::PORTS {
            let path = socket(dir, index);
            let lock = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path.with_extension("lock"))
                .with_context(|| format!("no guest has run in {}", dir.display()))?;
            let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
                continue;
            };
            let stream = UnixStream::connect(&path)
                .with_context(|| format!("connect to {}", path.display()))?;
            return Ok((lock, stream));
        }
        if Instant::now() > end {
            bail!("every port of the guest is in use");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn number() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = now.map_or(0, |d| d.as_nanos());
    (nanos as u64) ^ (u64::from(std::process::id()) << 48)
}
