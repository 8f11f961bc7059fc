//! Events for the daemon, by its ttrpc service containerd.services.events.ttrpc.v1.Events.
//!
//! Owns: the queue, in order, and the connection. One event is under way at a time; it leaves the
//! queue when the daemon has answered. While the daemon is away the queue is kept and tried with
//! growing pauses; past 4096 entries other events are dropped, exits never.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message;
use prost_types::Any;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::poll::{Endpoint, Interest, Poll, Ready, Source};
use crate::process::{now_nanos, timestamp};
use crate::proto::containerd::events as ev;
use crate::proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use crate::proto::containerd::types::Envelope;
use crate::proto::ttrpc;
use crate::ttrpc::frame::{self, HEADER};

const MAX_QUEUE: usize = 4096;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Refusals by the daemon itself before an event is given up.
const ATTEMPTS: u32 = 5;
const EXIT_ATTEMPTS: u32 = 200;

/// An event and its topic.
pub enum Event {
    Create(ev::TaskCreate),
    Start(ev::TaskStart),
    Exit(ev::TaskExit),
    Delete(ev::TaskDelete),
    Oom(ev::TaskOom),
    ExecAdded(ev::TaskExecAdded),
    ExecStarted(ev::TaskExecStarted),
    Paused(ev::TaskPaused),
    Resumed(ev::TaskResumed),
    Checkpointed(ev::TaskCheckpointed),
}

fn any<M: Message>(name: &str, message: &M) -> Any {
    Any {
        type_url: format!("containerd.events.{name}"),
        value: message.encode_to_vec(),
    }
}

impl Event {
    pub fn container(&self) -> &str {
        match self {
            Event::Create(m) => &m.container_id,
            Event::Start(m) => &m.container_id,
            Event::Exit(m) => &m.container_id,
            Event::Delete(m) => &m.container_id,
            Event::Oom(m) => &m.container_id,
            Event::ExecAdded(m) => &m.container_id,
            Event::ExecStarted(m) => &m.container_id,
            Event::Paused(m) => &m.container_id,
            Event::Resumed(m) => &m.container_id,
            Event::Checkpointed(m) => &m.container_id,
        }
    }

    fn parts(&self) -> (&'static str, Any) {
        match self {
            Event::Create(m) => ("/tasks/create", any("TaskCreate", m)),
            Event::Start(m) => ("/tasks/start", any("TaskStart", m)),
            Event::Exit(m) => ("/tasks/exit", any("TaskExit", m)),
            Event::Delete(m) => ("/tasks/delete", any("TaskDelete", m)),
            Event::Oom(m) => ("/tasks/oom", any("TaskOOM", m)),
            Event::ExecAdded(m) => ("/tasks/exec-added", any("TaskExecAdded", m)),
            Event::ExecStarted(m) => ("/tasks/exec-started", any("TaskExecStarted", m)),
            Event::Paused(m) => ("/tasks/paused", any("TaskPaused", m)),
            Event::Resumed(m) => ("/tasks/resumed", any("TaskResumed", m)),
            Event::Checkpointed(m) => ("/tasks/checkpointed", any("TaskCheckpointed", m)),
        }
    }
}

struct Queued {
    request: ttrpc::Request,
    exit: bool,
    refused: u32,
}

struct Link {
    endpoint: Endpoint,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    /// Stream and time limit of the event under way.
    waiting: Option<(u32, Instant)>,
    next_stream: u32,
}

pub struct Publisher {
    address: Option<PathBuf>,
    namespace: String,
    queue: VecDeque<Queued>,
    link: Option<Link>,
    pause: Duration,
    retry_at: Option<Instant>,
}

enum Broken {
    Link,
}

impl Publisher {
    /// `address`: a path, with or without `unix://`; empty for a daemon that wants no events.
    pub fn new(address: &str, namespace: &str) -> Publisher {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        Publisher {
            address: (!path.is_empty()).then(|| Path::new(path).to_owned()),
            namespace: namespace.to_owned(),
            queue: VecDeque::new(),
            link: None,
            pause: FIRST_PAUSE,
            retry_at: None,
        }
    }

    pub fn publish(&mut self, poll: &Poll, event: &Event) {
        if self.address.is_none() {
            return;
        }
        let exit = matches!(event, Event::Exit(_));
        if self.queue.len() >= MAX_QUEUE
            && let Some(at) = self.queue.iter().skip(1).position(|q| !q.exit)
        {
            self.queue.remove(at + 1);
        }
        let (topic, any) = event.parts();
        let envelope = Envelope {
            timestamp: Some(timestamp(now_nanos())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(any),
        };
        let request = ttrpc::Request {
            service: "containerd.services.events.ttrpc.v1.Events".to_owned(),
            method: "Forward".to_owned(),
            payload: ForwardRequest {
                envelope: Some(envelope),
            }
            .encode_to_vec(),
            timeout_nano: ANSWER_TIME.as_nanos() as i64,
            metadata: vec![ttrpc::KeyValue {
                key: "containerd-namespace-ttrpc".to_owned(),
                value: self.namespace.clone(),
            }],
        };
        self.queue.push_back(Queued {
            request,
            exit,
            refused: 0,
        });
        self.advance(poll);
    }

    pub fn idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// When `tick` has something to do.
    pub fn next_wake(&self) -> Option<Instant> {
        let answer = self
            .link
            .as_ref()
            .and_then(|l| l.waiting)
            .map(|(_, limit)| limit);
        match (self.retry_at, answer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    pub fn tick(&mut self, poll: &Poll, now: Instant) {
        let late = self
            .link
            .as_ref()
            .and_then(|l| l.waiting)
            .is_some_and(|(_, at)| at <= now);
        if late {
            self.broken();
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.advance(poll);
        }
    }

    fn broken(&mut self) {
        self.link = None;
        self.later();
    }

    fn later(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        self.retry_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn advance(&mut self, poll: &Poll) {
        if self.retry_at.is_some() {
            return;
        }
        if let Err(Broken::Link) = self.try_advance(poll) {
            self.broken();
        }
    }

    fn try_advance(&mut self, poll: &Poll) -> Result<(), Broken> {
        let (Some(next), Some(address)) = (self.queue.front(), &self.address) else {
            return Ok(());
        };
        if self.link.is_none() {
            let socket = crate::socket::stream().map_err(|_| Broken::Link)?;
            crate::socket::connect(&socket, address).map_err(|_| Broken::Link)?;
            let mut endpoint = Endpoint::new(socket, Source::Publisher);
            endpoint
                .watch(poll, Interest::READ)
                .map_err(|_| Broken::Link)?;
            self.link = Some(Link {
                endpoint,
                output: Vec::new(),
                sent: 0,
                input: Vec::new(),
                waiting: None,
                next_stream: 1,
            });
        }
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        if link.waiting.is_none() {
            let stream = link.next_stream;
            link.next_stream += 2;
            frame::append(&mut link.output, stream, frame::REQUEST, &next.request);
            link.waiting = Some((stream, Instant::now() + ANSWER_TIME));
        }
        link.flush(poll)
    }

    pub fn ready(&mut self, poll: &Poll, ready: Ready) {
        let result = match &mut self.link {
            Some(link) => link.ready(poll, ready),
            None => return,
        };
        match result {
            Ok(Some(response)) => {
                self.answered(&response);
                self.advance(poll);
            }
            Ok(None) => {}
            // The daemon ended or restarted: without anything to tell, wait until there is.
            Err(Broken::Link) => self.broken(),
        }
    }

    fn answered(&mut self, response: &ttrpc::Response) {
        let code = response.status.as_ref().map_or(0, |s| s.code);
        let Some(first) = self.queue.front_mut() else {
            return;
        };
        if code == 0 {
            self.queue.pop_front();
            self.pause = FIRST_PAUSE;
            return;
        }
        first.refused += 1;
        if first.refused >= if first.exit { EXIT_ATTEMPTS } else { ATTEMPTS } {
            self.queue.pop_front();
            return;
        }
        self.later();
    }
}

impl Link {
    fn flush(&mut self, poll: &Poll) -> Result<(), Broken> {
        while self.sent < self.output.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(self.endpoint.fd(), &self.output[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    return self
                        .endpoint
                        .watch(poll, Interest::BOTH)
                        .map_err(|_| Broken::Link);
                }
                Err(_) => return Err(Broken::Link),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        self.endpoint
            .watch(poll, Interest::READ)
            .map_err(|_| Broken::Link)
    }

    fn ready(&mut self, poll: &Poll, ready: Ready) -> Result<Option<ttrpc::Response>, Broken> {
        if ready.write && !self.output.is_empty() {
            self.flush(poll)?;
        }
        let mut chunk = [0u8; 4096];
        // An answer before the end of the connection still counts, or its event would be told
        // twice.
        let ended = loop {
            match rustix::io::read(self.endpoint.fd(), &mut chunk) {
                Ok(0) => break true,
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(Errno::AGAIN) => break false,
                Err(Errno::INTR) => {}
                Err(_) => break true,
            }
        };
        let header = frame::parse(&self.input).map_err(|_| Broken::Link)?;
        let whole = header.filter(|h| self.input.len() >= HEADER + h.length);
        let header = match (whole, ended) {
            (Some(header), _) => header,
            (None, true) => return Err(Broken::Link),
            (None, false) => return Ok(None),
        };
        let end = HEADER + header.length;
        let body = self.input[HEADER..end].to_vec();
        self.input.drain(..end);
        if header.kind != frame::RESPONSE || self.waiting.map(|w| w.0) != Some(header.stream) {
            return Err(Broken::Link);
        }
        self.waiting = None;
        self.input = Vec::new();
        ttrpc::Response::decode(body.as_slice())
            .map(Some)
            .map_err(|_| Broken::Link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    fn exit(id: &str) -> Event {
        Event::Exit(ev::TaskExit {
            container_id: id.into(),
            ..Default::default()
        })
    }

    fn oom(id: &str) -> Event {
        Event::Oom(ev::TaskOom {
            container_id: id.into(),
        })
    }

    /// Serves one connection; answers with these codes; gives topic and id of each event.
    fn serve(listener: UnixListener, codes: Vec<i32>) -> std::thread::JoinHandle<Vec<String>> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut seen = Vec::new();
            for code in codes {
                let mut head = [0u8; HEADER];
                stream.read_exact(&mut head).unwrap();
                let header = frame::parse(&head).unwrap().unwrap();
                let mut body = vec![0; header.length];
                stream.read_exact(&mut body).unwrap();
                let request = ttrpc::Request::decode(body.as_slice()).unwrap();
                assert_eq!(request.method, "Forward");
                let envelope = ForwardRequest::decode(request.payload.as_slice())
                    .unwrap()
                    .envelope
                    .unwrap();
                let id = ev::TaskOom::decode(envelope.event.unwrap().value.as_slice()).unwrap();
                seen.push(format!("{} {}", envelope.topic, id.container_id));
                let status = (code != 0).then(|| ttrpc::Status {
                    code,
                    ..Default::default()
                });
                let mut out = Vec::new();
                let response = ttrpc::Response {
                    status,
                    payload: Vec::new(),
                };
                frame::append(&mut out, header.stream, frame::RESPONSE, &response);
                stream.write_all(&out).unwrap();
            }
            seen
        })
    }

    fn run(publisher: &mut Publisher, poll: &mut Poll, until: impl Fn(&Publisher) -> bool) {
        let limit = Instant::now() + Duration::from_secs(10);
        while !until(publisher) {
            assert!(Instant::now() < limit, "not in time");
            let mut ready = Vec::new();
            let step = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 5_000_000,
            };
            poll.wait(Some(step), &mut ready).unwrap();
            for r in ready {
                publisher.ready(poll, r);
            }
            publisher.tick(poll, Instant::now());
        }
    }

    #[test]
    fn events_arrive_in_order_though_the_daemon_comes_late_and_refuses_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut poll = Poll::new().unwrap();
        let mut publisher = Publisher::new(path.to_str().unwrap(), "ns");
        publisher.publish(&poll, &oom("a"));
        publisher.publish(&poll, &exit("b"));
        let server = serve(UnixListener::bind(&path).unwrap(), vec![14, 0, 0]);
        run(&mut publisher, &mut poll, Publisher::idle);
        assert_eq!(
            server.join().unwrap(),
            ["/tasks/oom a", "/tasks/oom a", "/tasks/exit b"]
        );
    }

    #[test]
    fn an_overfull_queue_drops_other_events_never_exits() {
        let poll = Poll::new().unwrap();
        let mut publisher = Publisher::new("unix:///nonexistent/sock", "ns");
        for i in 0..MAX_QUEUE {
            publisher.publish(&poll, &exit(&i.to_string()));
            publisher.publish(&poll, &oom(&i.to_string()));
        }
        assert_eq!(publisher.queue.iter().filter(|q| q.exit).count(), MAX_QUEUE);
        assert!(publisher.queue.len() <= MAX_QUEUE + 2);
    }

    #[test]
    fn without_an_address_nothing_is_kept() {
        let poll = Poll::new().unwrap();
        let mut publisher = Publisher::new("", "ns");
        publisher.publish(&poll, &exit("x"));
        assert!(publisher.idle() && publisher.next_wake().is_none());
    }
}
