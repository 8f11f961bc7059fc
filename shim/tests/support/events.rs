// The daemon's event service, which can go away and come back.

use super::support::proto::containerd::events as ev;
use super::support::proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use super::support::proto::ttrpc;
use prost::Message;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[allow(dead_code)]
pub struct Daemon {
    _dir: tempfile::TempDir,
    address: String,
    seen: Arc<Mutex<Vec<String>>>,
    /// Events that are still answered before the connection is cut.
    left: Arc<AtomicUsize>,
    listener: Option<std::thread::JoinHandle<()>>,
}

#[allow(dead_code)]
impl Daemon {
    pub fn absent() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        Daemon {
            address: dir.path().join("events").display().to_string(),
            _dir: dir,
            seen: Arc::default(),
            left: Arc::new(AtomicUsize::new(usize::MAX)),
            listener: None,
        }
    }

    pub fn start() -> Daemon {
        let mut daemon = Daemon::absent();
        daemon.serve(usize::MAX);
        daemon
    }

    /// Answers this many events, takes one more without an answer, and goes away.
    pub fn serve(&mut self, events: usize) {
        let _ = std::fs::remove_file(&self.address);
        let listener = UnixListener::bind(&self.address).unwrap();
        self.left.store(events, Ordering::SeqCst);
        let (seen, left) = (Arc::clone(&self.seen), Arc::clone(&self.left));
        let address = self.address.clone();
        self.listener = Some(std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                converse(stream, &seen, &left);
                if left.load(Ordering::SeqCst) == 0 {
                    let _ = std::fs::remove_file(&address);
                    return;
                }
            }
        }));
    }

    /// Until it has gone away.
    pub fn gone(&mut self) {
        self.listener.take().unwrap().join().unwrap();
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// `<topic> <container> [<what else tells one from another>]`
    pub fn lines(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    pub fn topics(&self) -> Vec<String> {
        let first = |line: &String| line.split(' ').next().unwrap().to_owned();
        self.lines().iter().map(first).collect()
    }
}

fn converse(mut stream: UnixStream, seen: &Mutex<Vec<String>>, left: &AtomicUsize) {
    let mut head = [0u8; 10];
    while stream.read_exact(&mut head).is_ok() {
        let length = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        if left.load(Ordering::SeqCst) == 0 {
            return;
        }
        let request = ttrpc::Request::decode(body.as_slice()).unwrap();
        let forward = ForwardRequest::decode(request.payload.as_slice()).unwrap();
        let envelope = forward.envelope.unwrap();
        let event = envelope.event.unwrap();
        seen.lock().unwrap().push(line(&envelope.topic, &event));
        if left.load(Ordering::SeqCst) != usize::MAX {
            left.fetch_sub(1, Ordering::SeqCst);
        }
        let mut frame = vec![0, 0, 0, 0];
        frame.extend(&head[4..8]);
        frame.extend([2, 0]);
        stream.write_all(&frame).unwrap();
    }
}

fn line(topic: &str, event: &prost_types::Any) -> String {
    let bytes = event.value.as_slice();
    match event.type_url.as_str() {
        "containerd.events.TaskExit" => {
            let e = ev::TaskExit::decode(bytes).unwrap();
            format!("{topic} {} {} {}", e.container_id, e.id, e.exit_status)
        }
        "containerd.events.TaskExecAdded" => {
            let e = ev::TaskExecAdded::decode(bytes).unwrap();
            format!("{topic} {} {}", e.container_id, e.exec_id)
        }
        "containerd.events.TaskExecStarted" => {
            let e = ev::TaskExecStarted::decode(bytes).unwrap();
            format!("{topic} {} {}", e.container_id, e.exec_id)
        }
        // In all others the container is the first field.
        _ => {
            let e = ev::TaskOom::decode(bytes).unwrap();
            format!("{topic} {}", e.container_id)
        }
    }
}
