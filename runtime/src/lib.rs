//! coracle: an OCI runtime with runc's command line.
//!
//! Data flows one way, each phase consuming the one before:
//!
//! ```text
//! argv -> cli -> bundle -> spec (CheckedSpec) -> plan (Plan, pure)
//!                                                  |
//!            parent: launch  <--one socketpair-->  child: init -> execve
//!               |    (clone3, cgroup, id maps, hooks, undo)
//!            state (intent record first, then state.json)
//! ```
//!
//! `join` is the same last leg for `exec`. Nothing here starts a thread, and nothing but `main`
//! prints.
#![deny(unsafe_code)]

pub mod bundle;
pub mod cgroup;
pub mod cli;
pub mod console;
pub mod criu;
pub mod error;
pub mod hooks;
pub mod host;
pub mod init;
pub mod join;
pub mod launch;
pub mod log;
pub mod plan;
pub mod resctrl;
pub mod sealed;
pub mod seccomp;
pub mod spec;
pub mod state;

pub use error::{Error, Kind, Result};
