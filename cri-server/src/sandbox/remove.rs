//! Owns RemovePodSandbox: stops it if need be, removes its containers, then every trace of it.

use std::sync::Arc;

use super::Sandbox;
use super::state::{Decision, Request, SandboxState, decide};
use crate::daemon::{Daemon, blocking};
use crate::error::{Collected, Error, Result};
use crate::events::EventKind;
use crate::store::records::Table;

impl Daemon {
    /// Removes a sandbox.
    pub async fn remove_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _step = sandbox.step.write().await;
        if self
            .registry
            .sandboxes
            .find_optional(sandbox.id())?
            .is_none()
        {
            return Ok(());
        }
        if decide(sandbox.state(), Request::Remove) == Decision::StopFirst {
            self.stop_locked(sandbox).await?;
        }
        sandbox.change(&self.records, |live| live.state = SandboxState::Removing)?;
        let mut failures = Collected::default();
        for container in self.registry.containers_of(sandbox.id()) {
            failures.push(self.remove_container(&container).await);
        }
        failures.finish("remove containers of sandbox", sandbox.id())?;
        self.erase_sandbox(sandbox).await?;
        self.registry.sandboxes.remove(sandbox.id());
        self.sandbox_names.release(&sandbox.fixed.config.name);
        self.events
            .publish(EventKind::Deleted, sandbox.id(), sandbox.id());
        Ok(())
    }

    /// Removes directory and record of a sandbox that holds nothing any more.
    pub async fn erase_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let dir = sandbox.fixed.dir.clone();
        blocking(move || match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", dir.display(), e))
            }
            _ => Ok(()),
        })
        .await?;
        self.records.remove(Table::Sandboxes, sandbox.id())
    }
}
