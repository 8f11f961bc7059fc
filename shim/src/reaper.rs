//! Collects every dead child: processes of containers, runtime calls, orphans that came to us as
//! the subreaper.
//!
//! Owns: exits that nobody has claimed yet. A process may end before the runtime call that
//! started it has told its pid: while such calls run, unknown exits are kept for them.

use std::collections::BTreeMap;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{WaitOptions, WaitStatus};

use crate::error::{Error, Result};
use crate::process::{Exit, now_nanos};

/// SIGCHLD wakes us; the others would end us and with us the supervision of every container.
pub fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
    ] {
        set.add(signal);
    }
    set.thread_block()
        .map_err(|e| Error::io("sigprocmask", "", std::io::Error::from(e)))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| Error::io("signalfd", "", std::io::Error::from(e)))
}

#[derive(Default)]
pub struct Reaper {
    unclaimed: BTreeMap<i32, Exit>,
}

fn exit_of(pid: i32, status: WaitStatus) -> Exit {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u32,
        (None, Some(signal)) => 128 + signal as u32,
        (None, None) => 255,
    };
    Exit {
        pid,
        status: code,
        at_nanos: now_nanos(),
    }
}

impl Reaper {
    /// Every child that is dead now.
    pub fn collect(&mut self) -> Vec<Exit> {
        let mut exits = Vec::new();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            exits.push(exit_of(pid.as_raw_nonzero().get(), status));
        }
        exits
    }

    pub fn keep(&mut self, exit: Exit) {
        self.unclaimed.insert(exit.pid, exit);
    }

    pub fn claim(&mut self, pid: i32) -> Option<Exit> {
        self.unclaimed.remove(&pid)
    }

    /// No call is running that could tell a pid: what is unclaimed was an orphan.
    pub fn forget(&mut self) {
        self.unclaimed.clear();
    }
}
