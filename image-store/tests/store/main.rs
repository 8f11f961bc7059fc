//! The store against real and hostile registries. Needs root (device nodes, trusted.* xattrs); what
//! a missing tool keeps from running prints `SKIP <test>: <why>` so that skips can be counted.

mod faults;
mod fixture;
mod hostile;
mod pulls;
mod recovery;
mod snapshots;
mod tls;
mod tokens;
mod trees;
