//! Owns the connection between a sandbox and its shim: made when first needed, made again when
//! the shim died.

use super::Sandbox;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::shim_client::{self, ShimClient, ShimError};

impl From<ShimError> for Error {
    fn from(error: ShimError) -> Self {
        let kind = match &error {
            ShimError::Gone => Kind::Unavailable,
            ShimError::Timeout { .. } => Kind::DeadlineExceeded,
            ShimError::Status { code: 5, .. } => Kind::NotFound,
            ShimError::Status { code: 3, .. } => Kind::InvalidArgument,
            ShimError::Status { code: 9, .. } => Kind::FailedPrecondition,
            ShimError::Status { code: 12, .. } => Kind::Unimplemented,
            ShimError::Status { .. } | ShimError::Garbled(_) => Kind::Internal,
        };
        Error::new(kind, error.to_string(), "")
    }
}

impl Daemon {
    /// The shim of a sandbox, started if it does not run.
    pub async fn shim(&self, sandbox: &Sandbox) -> Result<ShimClient> {
        let mut slot = sandbox.shim.lock().await;
        if let Some(client) = self.connect(sandbox, &mut slot).await {
            return Ok(client);
        }
        let handler = self.handler(&sandbox.fixed.handler)?;
        let socket = shim_client::start(&handler.shim, sandbox.id(), &sandbox.fixed.dir).await?;
        let client = ShimClient::connect(&socket)
            .await
            .map_err(|e| Error::io("connect to shim", socket.display(), e))?;
        let pid = client.shim_pid(sandbox.id()).await?;
        *slot = Some(client.clone());
        sandbox.change(&self.records, |live| {
            live.shim = Some(socket);
            live.shim_pid = Some(pid);
        })?;
        Ok(client)
    }

    /// Kills a shim that does not answer. Its containers are then treated as those of a dead one,
    /// which is what a stop needs: nothing may hang for ever.
    pub fn kill_shim(&self, sandbox: &Sandbox) {
        let Some(pid) = sandbox.live().shim_pid else {
            return;
        };
        // Pids are used again: only a process that was started for this sandbox is ours.
        let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let ours = cmdline
            .split(|b| *b == 0)
            .any(|arg| arg == sandbox.id().as_bytes());
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid.filter(|_| ours) {
            tracing::warn!(
                sandbox = sandbox.id(),
                "killing a shim that does not answer"
            );
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// The shim of a sandbox, if it runs.
    pub async fn running_shim(&self, sandbox: &Sandbox) -> Option<ShimClient> {
        let mut slot = sandbox.shim.lock().await;
        self.connect(sandbox, &mut slot).await
    }

    async fn connect(
        &self,
        sandbox: &Sandbox,
        slot: &mut Option<ShimClient>,
    ) -> Option<ShimClient> {
        if let Some(client) = slot.as_ref().filter(|client| !client.is_gone()) {
            return Some(client.clone());
        }
        let socket = sandbox.live().shim?;
        *slot = ShimClient::connect(&socket).await.ok();
        slot.clone()
    }
}
