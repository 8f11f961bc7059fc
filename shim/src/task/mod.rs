//! Tasks (containers) and their processes.
//!
//! `state` decides purely; `owner` takes requests; `create`, `exec`, `exit`, `checkpoint` and
//! `restore` perform the steps that have phases; `call` holds the runtime calls under way, `deadline` ends those
//! that hang.
//! Owns: everything the shim knows of a task in memory.

pub mod call;
pub mod checkpoint;
pub mod create;
pub mod deadline;
pub mod exec;
pub mod exit;
pub mod owner;
pub mod restore;
pub mod state;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::cgroup::Cgroup;
use crate::console::ConsoleSocket;
use crate::options::Options;
use crate::process::{ProcessId, StdioNames};
use crate::runtime_cli::Runtime;
use crate::service::Reply;
use crate::stdio::open::{ProcessEnds, Wanted};
use crate::supervisor::Parked;
use state::State;

/// A container's init or one of its execs.
pub struct Process {
    pub id: ProcessId,
    pub state: State,
    pub names: StdioNames,
    pub io: Option<u32>,
    pub started_nanos: u64,
    pub waiters: Vec<Reply>,
    pub parked: Vec<Parked>,
}

impl Process {
    pub fn new(id: ProcessId, state: State, names: StdioNames) -> Process {
        Process {
            id,
            state,
            names,
            io: None,
            started_nanos: 0,
            waiters: Vec::new(),
            parked: Vec::new(),
        }
    }
}

/// An exec and what it needs until it is started.
pub struct Exec {
    pub process: Process,
    /// The OCI Process as JSON.
    pub spec: Vec<u8>,
    pub wanted: Wanted,
    pub fds: Vec<OwnedFd>,
}

/// A process whose logging binary is not ready yet: the runtime is called then.
pub struct Launch {
    pub ends: ProcessEnds,
    pub console: Option<ConsoleSocket>,
    pub reply: Reply,
}

/// A task that was created from images: nothing runs before its start.
pub struct Images {
    pub path: PathBuf,
    /// Gone after the first attempt.
    pub streams: Option<(ProcessEnds, Option<ConsoleSocket>)>,
}

pub struct Task {
    pub id: String,
    pub bundle: PathBuf,
    pub runtime: Runtime,
    pub options: Options,
    pub init: Process,
    pub execs: BTreeMap<String, Exec>,
    pub launches: BTreeMap<String, Launch>,
    pub cgroup: Cgroup,
    /// Other processes outlive init: its pid namespace is not the container's own.
    pub shared_pids: bool,
    pub oom_killed: bool,
    pub images: Option<Images>,
    /// The daemon asked for mounts on <bundle>/rootfs.
    pub mounted: bool,
}

impl Task {
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.init).chain(self.execs.values().map(|e| &e.process))
    }

    pub fn process(&self, exec: &str) -> Option<&Process> {
        match exec {
            "" => Some(&self.init),
            exec => self.execs.get(exec).map(|e| &e.process),
        }
    }

    pub fn process_mut(&mut self, exec: &str) -> Option<&mut Process> {
        match exec {
            "" => Some(&mut self.init),
            exec => self.execs.get_mut(exec).map(|e| &mut e.process),
        }
    }

    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }
}
