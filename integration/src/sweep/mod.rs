//! The crash sweep: one command of a runtime, with a fault at each of its system calls, then
//! `delete --force`, then a look at what is left.
//!
//! ```text
//! plan    which system calls the command makes: one run under strace, without a fault
//! case    set-up -> strace -e inject=CALL:FAULT:when=N RUNTIME COMMAND -> delete -f -> what is left
//! sweep   all cases on as many workers as there are processors, each with its own state root
//! ```
//! strace counts `when=N` for each call by its name, and in each process by itself. With `-f` the
//! fault hits the runtime and its children, each at its own N-th; without it the runtime alone, and
//! its child lives on. `-DDD` keeps strace out of the way: a tracer that is the parent would end
//! with, and reap, the traced.
//!
//! What is looked at is told by the id of each case, which is in every path and command line, so
//! that cases run side by side.

mod case;
mod left;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

use crate::bundle::{Bench, Runtime};

pub use case::{Case, Verdict};

/// A command that is swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Create,
    /// In the foreground, of a program that ends.
    Run,
    /// Of a container that runs, without force.
    Exec,
    /// Of a container that runs, by force.
    Delete,
    Update,
}

impl Verb {
    pub const ALL: [Verb; 5] = [
        Verb::Create,
        Verb::Run,
        Verb::Exec,
        Verb::Delete,
        Verb::Update,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Verb::Create => "create",
            Verb::Run => "run",
            Verb::Exec => "exec",
            Verb::Delete => "delete",
            Verb::Update => "update",
        }
    }

    /// Acts on a container that is there already.
    fn needs_container(self) -> bool {
        matches!(self, Verb::Exec | Verb::Delete | Verb::Update)
    }
}

/// What happens at the N-th system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Kill,
    Error(&'static str),
}

pub const ERRORS: [&str; 5] = ["EIO", "ENOSPC", "EMFILE", "ENOMEM", "EPERM"];

impl Fault {
    fn inject(self, point: &Point) -> String {
        let Point { call, nth, .. } = point;
        match self {
            Fault::Kill => format!("inject={call}:signal=SIGKILL:when={nth}"),
            Fault::Error(error) => format!("inject={call}:error={error}:when={nth}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Kill => "SIGKILL",
            Fault::Error(error) => error,
        })
    }
}

/// Whom a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The runtime's first process alone.
    Runtime,
    /// It and everything that it starts, each at its own N-th call.
    Everyone,
}

/// What is asked of a sweep.
#[derive(Clone, Debug)]
pub struct Asked {
    pub verb: Verb,
    pub faults: Vec<Fault>,
    pub reach: Reach,
    /// Every how many calls.
    pub stride: usize,
    /// How many calls are left out at first.
    pub first: usize,
    /// One error a call, in turn, in place of all at each call.
    pub rotate: bool,
}

/// What a sweep has found.
#[derive(Debug, Default)]
pub struct Found {
    pub cases: usize,
    /// By how the command ended: killed, failed, succeeded.
    pub ends: BTreeMap<&'static str, usize>,
    /// Errors after which the runtime had not undone everything by itself: `delete -f` did.
    pub late: Vec<String>,
    pub wrong: Vec<String>,
}

impl Found {
    pub fn summary(&self) -> String {
        let ends: Vec<String> = self.ends.iter().map(|(k, n)| format!("{n} {k}")).collect();
        format!(
            "{} cases ({}), {} undone by delete only, {} wrong",
            self.cases,
            ends.join(", "),
            self.late.len(),
            self.wrong.len()
        )
    }

    fn add(&mut self, name: &str, verdict: Verdict) {
        self.cases += 1;
        *self.ends.entry(verdict.end).or_default() += 1;
        if !verdict.late.is_empty() {
            self.late
                .push(format!("{name}: {}", verdict.late.join("; ")));
        }
        self.wrong.extend(
            verdict
                .wrong
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    }
}

/// Runs the cases. Every worker is a thread of the caller's, so that they share its namespaces.
pub fn sweep(bench: &Bench, runtime: &Runtime, asked: &Asked) -> Result<Found> {
    let mut first = Case::new(bench, runtime, asked.verb, 0)?;
    let calls = first.count()?;
    let mut points = calls.points(asked.reach);
    if asked.faults != [Fault::Kill] {
        points.retain(|point| !CANNOT_FAIL.contains(&point.call.as_str()));
    }
    let mut jobs = Vec::new();
    let chosen = points.iter().skip(asked.first).step_by(asked.stride);
    for (turn, point) in chosen.enumerate() {
        if asked.rotate {
            jobs.push((point, asked.faults[turn % asked.faults.len()]));
        } else {
            jobs.extend(asked.faults.iter().map(|fault| (point, *fault)));
        }
    }
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Found::default());
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|worker| {
                let (jobs, next, found) = (&jobs, &next, &found);
                scope.spawn(move || -> Result<()> {
                    let mut case = Case::new(bench, runtime, asked.verb, worker)?;
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some((point, fault)) = jobs.get(at).copied() else {
                            return Ok(());
                        };
                        let verdict = case.run(fault, point, asked.reach)?;
                        let name = format!("{} {fault} at {point}", asked.verb.name());
                        let mut found = found
                            .lock()
                            .map_err(|_| anyhow::anyhow!("a worker panicked"))?;
                        found.add(&name, verdict);
                    }
                })
            })
            .collect();
        for handle in handles {
            handle
                .join()
                .map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        anyhow::Ok(())
    })?;
    found
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a worker panicked"))
}

/// One system call of one run: the N-th of its name in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub call: String,
    pub nth: usize,
    /// Made by the C library before the runtime's own code runs.
    pub start_up: bool,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.call, self.nth)
    }
}

/// The system calls of one run, by process, in order.
#[derive(Debug, Default)]
pub struct Calls {
    processes: Vec<(String, Vec<String>)>,
}

/// Calls that no kernel lets fail: a failing one is nothing that a program could meet. close(2) has
/// closed whatever it says, which an injected error, in place of the call, does not do.
const CANNOT_FAIL: [&str; 20] = [
    "brk",
    "close",
    "exit",
    "exit_group",
    "getegid",
    "geteuid",
    "getgid",
    "getpid",
    "getpgrp",
    "getppid",
    "getrandom",
    "gettid",
    "getuid",
    "munmap",
    "rt_sigreturn",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "rseq",
    "umask",
];

/// Calls before a program's main(), which can say nothing but panic: execve, the C library's, and
/// the Rust library's own stack and signals. The runtime executes itself once more early on.
const START_UP: usize = 42;

impl Calls {
    /// From a log of `strace -f -o`: `PID CALL(...`, with `<unfinished ...>` and `resumed` apart.
    fn read(log: &Path) -> Result<Self> {
        let mut calls = Self::default();
        for line in String::from_utf8_lossy(&std::fs::read(log)?).lines() {
            let Some((pid, rest)) = line.split_once(' ') else {
                continue;
            };
            let rest = rest.trim_start();
            let name: String = rest
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            if name.is_empty() || rest.starts_with("<...") {
                continue;
            }
            match calls.processes.iter_mut().find(|(found, _)| found == pid) {
                Some((_, names)) => names.push(name),
                None => calls.processes.push((pid.to_owned(), vec![name])),
            }
        }
        Ok(calls)
    }

    /// Where a fault can hit: every call of the runtime's first process, and with its children also
    /// those of theirs that it does not make as often itself, up to the container's program.
    fn points(&self, reach: Reach) -> Vec<Point> {
        let mut points: Vec<Point> = Vec::new();
        for (index, (_, names)) in self.processes.iter().enumerate() {
            let last = match (index, names.iter().rposition(|name| name == "execve")) {
                (0, _) | (_, None) => names.len(),
                (_, Some(at)) => at + 1,
            };
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            for (position, name) in names[..last].iter().enumerate() {
                let nth = counts.entry(name).or_default();
                *nth += 1;
                let point = Point {
                    call: name.clone(),
                    nth: *nth,
                    start_up: index == 0 && position < START_UP,
                };
                if !points
                    .iter()
                    .any(|p| p.call == point.call && p.nth == point.nth)
                {
                    points.push(point);
                }
            }
            if reach == Reach::Runtime {
                break;
            }
        }
        points
    }
}

/// Where the cgroup hierarchies are mounted: one directory, or one for each of v1. On some hosts
/// there are bare directories beside them.
pub fn hierarchies() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let point = left.split(' ').nth(4)?;
            let cgroup = right.starts_with("cgroup ") || right.starts_with("cgroup2 ");
            (cgroup && point.starts_with("/sys/fs/cgroup")).then(|| PathBuf::from(point))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}
