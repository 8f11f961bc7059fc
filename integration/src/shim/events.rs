//! The event service of a daemon, which shims send to: keeps what comes, in order.

use std::io::{ErrorKind, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use prost::Message as _;

use super::{read_frame, wire};

const RESPONSE: u8 = 2;

/// Topic and body of an event.
pub type Seen = (String, Vec<u8>);

pub struct Events {
    path: PathBuf,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Events {
    pub fn listen(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (all, end) = (seen.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let all = all.clone();
                        // Ends with its shim.
                        std::thread::spawn(move || drop(serve(stream, &all)));
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Err(_) => return,
                }
            }
        });
        Ok(Self {
            path: path.to_owned(),
            seen,
            stop,
            thread: Some(thread),
        })
    }

    pub fn address(&self) -> String {
        self.path.display().to_string()
    }

    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    /// Exits, in the order in which they came.
    pub fn exits(&self) -> Result<Vec<wire::TaskExit>> {
        let seen = self.seen();
        let exits = seen.iter().filter(|(topic, _)| topic == "/tasks/exit");
        exits
            .map(|(_, body)| Ok(wire::TaskExit::decode(body.as_slice())?))
            .collect()
    }
}

fn serve(mut stream: UnixStream, seen: &Mutex<Vec<Seen>>) -> Result<()> {
    stream.set_nonblocking(false)?;
    loop {
        let (id, _, body) = read_frame(&mut stream)?;
        let request = wire::Request::decode(body.as_slice())?;
        let forward = wire::Forward::decode(request.payload.as_slice())?;
        let envelope = forward.envelope.context("an envelope")?;
        let body = envelope.event.context("an event")?.value;
        seen.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((envelope.topic, body));
        let answer = wire::Response::default().encode_to_vec();
        let mut frame = u32::try_from(answer.len())?.to_be_bytes().to_vec();
        frame.extend(id.to_be_bytes());
        frame.extend([RESPONSE, 0]);
        frame.extend(answer);
        stream.write_all(&frame)?;
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
