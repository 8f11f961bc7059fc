//! What is known of one process of a task, its init or an exec: identity, stdio addresses, times
//! and how it ended.
//!
//! Owns: nothing of the kernel. The states are in `task::state`.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub pid: i32,
    /// 0-255, or 128 + signal.
    pub status: u32,
    pub at_nanos: u64,
}

impl Exit {
    pub fn timestamp(&self) -> Timestamp {
        timestamp(self.at_nanos)
    }
}

pub fn timestamp(nanos: u64) -> Timestamp {
    Timestamp {
        seconds: (nanos / 1_000_000_000) as i64,
        nanos: (nanos % 1_000_000_000) as i32,
    }
}

pub fn now_nanos() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

/// A task's id, and the exec's, which is empty for the init process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    pub task: String,
    pub exec: String,
}

impl ProcessId {
    pub fn new(task: &str, exec: &str) -> ProcessId {
        ProcessId {
            task: task.to_owned(),
            exec: exec.to_owned(),
        }
    }

    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }
}

/// Names a request gave for its streams, returned by State and put into events.
#[derive(Clone, Debug, Default)]
pub struct StdioNames {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// The environment of this process for a child of it.
pub fn environment() -> Vec<CString> {
    let entry = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
        CString::new([key.as_bytes(), b"=", value.as_bytes()].concat()).ok()
    };
    std::env::vars_os().filter_map(entry).collect()
}
