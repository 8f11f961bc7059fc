//! coracled: the CRI server that crictl and the kubelet drive.
//!
//! ```text
//! crictl, kubelet --gRPC--> grpc --> sandbox, container --> shim_client --ttrpc--> shim
//!                            |         |      |     |
//!                     convert, present |      |     +--> spec_builder --> config.json
//!                                      |      +--> image store
//!                                      +--> netns, network
//! client --SPDY--> streaming --> streaming_backend --> container (exec, attach)
//! ```
//! `daemon` holds what all share, `store` the tables and their records, `recover` brings them up
//! to date after a restart. Containers never depend on this process: their shims hold them, and
//! write their logs.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod config;
pub mod container;
pub mod daemon;
pub mod error;
pub mod events;
pub mod grpc;
pub mod host;
pub mod id;
pub mod listen;
pub mod netns;
pub mod network;
pub mod process_tree;
pub mod proto;
pub mod recover;
pub mod sandbox;
pub mod shim_client;
pub mod signal;
pub mod spec_builder;
pub mod store;
pub mod streaming;
pub mod streaming_backend;
pub mod sweep;
