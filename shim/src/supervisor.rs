//! The one loop of the process.
//!
//! ```text
//! listener -> connections -> service::decode -> task::owner -> answers
//! signalfd -> reaper -> runtime calls that end, processes that exit
//! pipes, FIFOs, consoles -> stdio
//! inotify / eventfd -> OOM         publisher -> the daemon's event service
//! ```
//! Owns: the epoll set, the clock of everything that waits for time, and the tables of what the
//! shim supervises. What requests do to tasks is in `task`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use prost::Message;
use rustix::event::Timespec;
use rustix::net::SocketFlags;

use crate::cgroup_events::OomWatch;
use crate::error::{Error, Result};
use crate::events::{Event, Publisher};
use crate::journal::Journal;
use crate::poll::{Endpoint, Interest, Poll, Ready, Source};
use crate::process::{Exit, ProcessId};
use crate::proto::ttrpc;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::service::{self, Reply, Request};
use crate::stdio::{Ctx, Drained, Io, Scratch};
use crate::task::Task;
use crate::task::call::Running;
use crate::ttrpc::connection::{Connection, Frame};
use crate::ttrpc::frame;

/// How often undelivered output of a dead process is looked at.
pub const LOOK: Duration = Duration::from_secs(2);
/// Looks without movement before a reader that does not read is given up.
const PATIENCE: u32 = 5;
const SCRATCH_IDLE: Duration = Duration::from_secs(2);
const ORPHANED: Duration = Duration::from_secs(60);
const LAST_EVENTS: Duration = Duration::from_secs(5);

pub struct Config {
    pub id: String,
    pub namespace: String,
    pub bundle: PathBuf,
    pub socket: PathBuf,
    pub events: String,
    pub debug: bool,
    pub boot_id: String,
    /// How long a runtime call may take.
    pub call_limit: Duration,
}

#[derive(Clone, Debug)]
pub enum Timer {
    /// Looks at the output of a dead process.
    Drain {
        io: u32,
        owner: Option<ProcessId>,
    },
    /// Looks whether a dead process's FIFOs are read.
    Hold {
        io: u32,
        owner: ProcessId,
    },
    ReleaseScratch,
    Oom {
        left: u32,
    },
    LoggerReady {
        owner: ProcessId,
    },
    LoggerTerm {
        io: u32,
    },
    LoggerKill {
        io: u32,
    },
    /// Without tasks, clients and bundle there is no reason to stay.
    Orphaned,
}

pub struct Supervisor {
    pub config: Config,
    pub poll: Poll,
    pub scratch: Scratch,
    pub journal: Journal,
    pub tasks: BTreeMap<String, Task>,
    pub sandbox: Option<Sandbox>,
    pub ios: BTreeMap<u32, Io>,
    /// Live processes of tasks.
    pub pids: BTreeMap<i32, ProcessId>,
    pub calls: BTreeMap<i32, Running>,
    pub reaper: Reaper,
    pub oom: OomWatch,
    publisher: Publisher,
    listener: Endpoint,
    signals: SignalFd,
    connections: BTreeMap<u32, Connection>,
    timers: BTreeMap<(Instant, u64), Timer>,
    last_number: u32,
    scratch_timer: bool,
    /// Set by Shutdown: when to leave at the latest.
    ending: Option<Instant>,
}

impl Supervisor {
    pub fn new(config: Config, listener: OwnedFd, signals: SignalFd) -> Result<Supervisor> {
        let poll = Poll::new().map_err(|e| Error::io("epoll_create", "", e))?;
        let failed = |e| Error::io("epoll_ctl", "", e);
        let mut listener = Endpoint::new(listener, Source::Listener);
        listener.watch(&poll, Interest::READ).map_err(failed)?;
        let journal = Journal::open(&config.bundle, &config.id, &config.namespace, config.debug);
        let publisher = Publisher::new(&config.events, &config.namespace);
        let mut supervisor = Supervisor {
            config,
            poll,
            scratch: Scratch::default(),
            journal,
            tasks: BTreeMap::new(),
            sandbox: None,
            ios: BTreeMap::new(),
            pids: BTreeMap::new(),
            calls: BTreeMap::new(),
            reaper: Reaper::default(),
            oom: OomWatch::default(),
            publisher,
            listener,
            signals,
            connections: BTreeMap::new(),
            timers: BTreeMap::new(),
            last_number: 0,
            scratch_timer: false,
            ending: None,
        };
        supervisor.after(ORPHANED, Timer::Orphaned);
        Ok(supervisor)
    }

    /// Serves until Shutdown. The signal descriptor is polled by a duplicate of its own.
    pub fn run(&mut self) -> Result<()> {
        let failed = |e| Error::io("poll", "signals", e);
        let copy = {
            use std::os::fd::AsFd;
            self.signals.as_fd().try_clone_to_owned().map_err(failed)?
        };
        let mut signals = Endpoint::new(copy, Source::Signals);
        signals.watch(&self.poll, Interest::READ).map_err(failed)?;
        let mut ready = Vec::new();
        while !self.finished() {
            let timeout = self.timeout();
            self.poll
                .wait(timeout, &mut ready)
                .map_err(|e| Error::io("epoll_wait", "", e))?;
            for event in ready.drain(..) {
                self.wake(event);
            }
            self.expire();
        }
        Ok(())
    }

    pub fn next_number(&mut self) -> u32 {
        self.last_number += 1;
        self.last_number
    }

    pub fn after(&mut self, delay: Duration, timer: Timer) {
        let number = u64::from(self.next_number());
        self.timers.insert((Instant::now() + delay, number), timer);
    }

    fn finished(&self) -> bool {
        let Some(limit) = self.ending else {
            return false;
        };
        let busy = !self.publisher.idle()
            || !self.ios.is_empty()
            || self.connections.values().any(Connection::unsent);
        !busy || Instant::now() >= limit
    }

    fn timeout(&self) -> Option<Timespec> {
        let next = self.timers.keys().next().map(|(at, _)| *at);
        let wakes = [
            next,
            self.publisher.next_wake(),
            self.ending,
            self.next_deadline(),
        ];
        let at = wakes.into_iter().flatten().min()?;
        let left = at.saturating_duration_since(Instant::now());
        // Rounded up: waking early would spin until the time has come.
        Some(Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        })
    }

    fn wake(&mut self, event: Ready) {
        match event.source {
            Source::Listener => self.accept(),
            Source::Signals => self.signalled(),
            Source::Connection(id) => self.converse(id, event),
            Source::Stdio(id, part) => self.copy(id, part, event),
            Source::MemoryEvents | Source::OomControl => {
                self.oom.acknowledge(event.source);
                self.look_for_oom(3);
            }
            Source::Publisher => self.publisher.ready(&self.poll, event),
        }
    }

    fn accept(&mut self) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Ok(fd) = rustix::net::accept_with(self.listener.fd(), flags) else {
                return;
            };
            let allowed = rustix::net::sockopt::socket_peercred(&fd)
                .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid());
            if !allowed {
                self.journal.warn("connection of another user refused");
                continue;
            }
            let id = self.next_number();
            match Connection::new(fd, id, &self.poll) {
                Ok(connection) => drop(self.connections.insert(id, connection)),
                Err(e) => self.journal.warn(&format!("connection: {e}")),
            }
        }
    }

    fn converse(&mut self, id: u32, event: Ready) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if event.write && connection.unsent() && connection.flush(&self.poll).is_err() {
            return self.hang_up(id);
        }
        if !event.read {
            return;
        }
        let received = connection.receive();
        for frame in received.frames {
            self.request(id, frame);
        }
        if received.closed {
            self.hang_up(id);
        }
    }

    /// Whoever asked is still there to hear the answer.
    pub fn is_heard(&self, reply: Reply) -> bool {
        self.connections.contains_key(&reply.connection)
    }

    /// What a client asked for goes on; only its answers are lost.
    fn hang_up(&mut self, id: u32) {
        self.connections.remove(&id);
        if self.tasks.is_empty() && self.connections.is_empty() {
            self.after(ORPHANED, Timer::Orphaned);
        }
    }

    fn request(&mut self, connection: u32, frame: Frame) {
        if frame.kind != frame::REQUEST {
            return;
        }
        let reply = Reply {
            connection,
            stream: frame.stream,
        };
        let decoded = ttrpc::Request::decode(frame.body.as_slice())
            .map_err(|e| {
                Error::new(crate::error::Kind::Invalid, "decode", "request frame").source(e)
            })
            .and_then(|request| {
                self.journal.debug(&request.method);
                service::decode(&request)
            });
        match decoded {
            Ok(request) => self.dispatch(request, frame.fds, reply),
            Err(e) => self.answer(reply, Err(e)),
        }
    }

    pub fn answer(&mut self, reply: Reply, result: Result<Vec<u8>>) {
        let response = service::response(result);
        let Some(connection) = self.connections.get_mut(&reply.connection) else {
            return;
        };
        if connection
            .send(&self.poll, reply.stream, frame::RESPONSE, &response)
            .is_err()
        {
            self.hang_up(reply.connection);
        }
    }

    /// A sandbox's daemon waits for it by the sandbox service: to it the events would be those of
    /// a task that it has never made.
    pub fn publish(&mut self, event: &Event) {
        if !self.is_sandbox(event.container()) {
            self.publisher.publish(&self.poll, event);
        }
    }

    fn signalled(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let number = signal.ssi_signo as i32;
            let asks_to_end = number == Signal::SIGTERM as i32 || number == Signal::SIGINT as i32;
            // The containers would lose their supervisor: only an idle shim obeys.
            if asks_to_end && self.tasks.is_empty() {
                self.end();
            }
        }
        for exit in self.reaper.collect() {
            self.reaped(exit);
        }
        if !self.calls.values().any(Running::may_tell_a_pid) {
            self.reaper.forget();
        }
    }

    /// After everything that takes more rights than supervision does.
    pub fn confine(&mut self) {
        // Bundles of a group lie side by side.
        let places = [self.config.bundle.parent(), self.config.socket.parent()];
        let own: Vec<&Path> = places.into_iter().flatten().collect();
        let confined = crate::confine::confine(&own);
        match confined.whole {
            true => self.journal.info(&confined.text),
            false => self.journal.warn(&confined.text),
        }
    }

    fn reaped(&mut self, exit: Exit) {
        if crate::hands::were(exit.pid) {
            let status = exit.status;
            let text = format!(
                "the shim's hands died (status {status}): what runs goes on, nothing can be started or mounted any more"
            );
            self.journal.warn(&text);
        } else if let Some(running) = self.calls.remove(&exit.pid) {
            self.call_ended(running, exit);
        } else if let Some(id) = self.pids.remove(&exit.pid) {
            self.exited(&id, exit);
        } else if let Some(io) = self.ios.values_mut().find(|io| {
            io.logger()
                .is_some_and(|l| l.alive() && l.pid() == exit.pid)
        }) {
            let id = io.id();
            if let Some(logger) = io.logger_mut() {
                logger.exited();
            }
            self.logger_changed(id);
        } else {
            self.reaper.keep(exit);
        }
    }

    fn copy(&mut self, id: u32, part: u16, event: Ready) {
        let Some(io) = self.ios.get_mut(&id) else {
            return;
        };
        let mut ctx = Ctx {
            poll: &self.poll,
            scratch: &mut self.scratch,
        };
        io.ready(&mut ctx, part, event);
        for news in io.news() {
            self.journal.warn(&news);
        }
        let drained = io.drained();
        if self.scratch.in_use() && !self.scratch_timer {
            self.scratch_timer = true;
            self.after(SCRATCH_IDLE, Timer::ReleaseScratch);
        }
        if part == crate::stdio::part::LOGGER_READY {
            self.logger_changed(id);
        } else if drained == Drained::Yes {
            self.drained(id);
        }
    }

    /// Every stream of these has ended: an exit may wait for that.
    fn drained(&mut self, io: u32) {
        let owner = self
            .tasks
            .values()
            .flat_map(Task::processes)
            .find(|p| p.io == Some(io));
        match owner.map(|p| p.id.clone()) {
            Some(id) => self.try_publish_exit(&id),
            None => self.drop_io(io),
        }
    }

    /// Streams whose process is deleted: kept until they are delivered.
    pub fn drop_io(&mut self, io: u32) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        let logging = entry.logger().is_some_and(|l| l.alive());
        if entry.drained() == Drained::Yes && !logging {
            self.ios.remove(&io);
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.publisher.tick(&self.poll, now);
        self.kill_late_calls(now);
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let timer = entry.remove();
            self.time_came(timer);
        }
    }

    fn time_came(&mut self, timer: Timer) {
        match timer {
            Timer::Drain { io, owner } => self.look_at_drain(io, owner),
            Timer::Hold { io, owner } => self.look_at_hold(io, &owner),
            Timer::ReleaseScratch => {
                self.scratch.release();
                self.scratch_timer = false;
            }
            Timer::Oom { left } => self.look_for_oom(left),
            Timer::LoggerReady { owner } => self.logger_late(&owner),
            Timer::LoggerTerm { io } => self.signal_logger(io, 15),
            Timer::LoggerKill { io } => self.signal_logger(io, 9),
            Timer::Orphaned => {
                let alone = self.tasks.is_empty() && self.connections.is_empty();
                if alone && !self.config.bundle.exists() {
                    self.end();
                } else if alone {
                    self.after(ORPHANED, Timer::Orphaned);
                }
            }
        }
    }

    fn look_at_drain(&mut self, io: u32, owner: Option<ProcessId>) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        let mut ctx = Ctx {
            poll: &self.poll,
            scratch: &mut self.scratch,
        };
        // A deleted process's reader gets one more look, a living one's more.
        let deleted = owner
            .as_ref()
            .is_none_or(|id| !self.tasks.contains_key(&id.task));
        let patience = if deleted || self.ending.is_some() {
            1
        } else {
            PATIENCE
        };
        if entry.look(&mut ctx, patience) == Drained::Yes {
            self.drained(io);
        } else {
            self.after(LOOK, Timer::Drain { io, owner });
        }
    }

    fn signal_logger(&mut self, io: u32, signal: i32) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        if let Some(logger) = entry.logger()
            && logger.alive()
        {
            // Not reaped yet, so the pid is its own.
            let _ = coracle_sys::spawn::kill(logger.pid(), signal);
            if signal != 9 {
                self.after(Duration::from_secs(10), Timer::LoggerKill { io });
            }
        }
    }

    /// The counter may follow its notification: looked at again, a few times.
    fn look_for_oom(&mut self, left: u32) {
        let struck = self.oom.struck();
        for id in &struck {
            self.tell_oom(id);
        }
        if struck.is_empty() && left > 0 {
            self.after(Duration::from_millis(20), Timer::Oom { left: left - 1 });
        }
    }

    /// Shutdown was accepted. A start that looks for the group from now on gets a new shim.
    pub fn end(&mut self) {
        if self.ending.is_none() {
            self.ending = Some(Instant::now() + LAST_EVENTS);
            crate::records::remove_socket(&self.config.socket);
        }
    }

    pub fn is_ending(&self) -> bool {
        self.ending.is_some()
    }
}

/// The message's bytes as an answer.
pub fn encoded(message: &impl Message) -> Result<Vec<u8>> {
    Ok(message.encode_to_vec())
}

pub fn empty() -> Result<Vec<u8>> {
    Ok(Vec::new())
}

/// A request that waits for a transition to end.
pub type Parked = (Request, Vec<OwnedFd>, Reply);
