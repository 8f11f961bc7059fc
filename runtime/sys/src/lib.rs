//! Every raw system call of the workspace, and nearly all of its `unsafe`, behind sound wrappers.
//!
//! One file per kernel concept. Wrappers take and return owned or borrowed fds, never raw ones,
//! and report failures as `std::io::Error`; naming the call and its subject is the caller's part.
#![cfg(target_os = "linux")]
pub mod bpf;
pub mod clone;
pub mod entry;
pub mod exec;
pub mod loopdev;
pub mod mount;
pub mod namespace;
pub mod network;
pub mod process;
pub mod seccomp;
pub mod signal;
pub mod spawn;
