//! Pure OCI data: container ids, config.json, the records under the state root and the JSON that
//! `state`, `list` and hooks see.
//!
//! This crate never does I/O and depends on no other crate of the workspace. `runtime` parses and
//! plans with it, `shim` and `cri-server` read the same records and build the same documents.

#![forbid(unsafe_code)]

pub mod config;
pub mod fold;
pub mod id;
mod names;
pub mod record;
pub mod signal;
pub mod state;
pub mod time;

pub use config::spec;
pub use id::ContainerId;
