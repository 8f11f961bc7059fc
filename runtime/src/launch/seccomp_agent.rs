//! Hands the listener of a notifying seccomp filter to the agent behind `listenerPath`.

use std::os::fd::AsFd;

use coracle_oci::state::State;
use serde::Serialize;

use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result};
use crate::seccomp::Compiled;

/// The runtime spec's ContainerProcessState.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerProcessState<'a> {
    oci_version: &'a str,
    fds: [&'static str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "str::is_empty")]
    metadata: &'a str,
    state: &'a State,
}

/// Sends the fd with the process's state.
///
/// # Errors
/// The profile names no agent, or nobody listens there.
pub fn send(filter: &Compiled, listener: impl AsFd, pid: i32, state: &State) -> Result<()> {
    let path = filter.listener_path.as_ref().ok_or_else(|| {
        Error::invalid("linux.seccomp.listenerPath must be set for a profile that notifies")
    })?;
    let document = ContainerProcessState {
        oci_version: &state.oci_version,
        fds: ["seccompFd"],
        pid,
        metadata: filter.listener_metadata.as_deref().unwrap_or_default(),
        state,
    };
    let document = serde_json::to_vec(&document)
        .map_err(|error| Error::new(Kind::Internal, "encode state", "").source(error))?;
    ConsoleSocket::connect(path)
        .and_then(|agent| agent.send(listener.as_fd(), &document))
        .map_err(|error| error.context("failed to connect with seccomp agent"))
}
