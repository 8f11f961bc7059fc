//! Owns RemoveContainer: kills it if need be, then removes task, root file system, volumes and
//! record. The log file is the client's.

use std::sync::Arc;
use std::time::Duration;

use super::Container;
use super::state::{ContainerState, Decision, Exit, Request, decide};
use crate::daemon::{Daemon, now_ns};
use crate::error::Result;
use crate::events::EventKind;

impl Daemon {
    /// Removes a container.
    pub async fn remove_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        if decide(&container.state(), Request::Remove) == Decision::KillFirst {
            self.stop_container(container, Duration::ZERO).await?;
        }
        let _step = container.step.lock().await;
        if self
            .registry
            .containers
            .find_optional(container.id())?
            .is_none()
        {
            // Another removal was faster.
            return Ok(());
        }
        let before = container.state();
        let had_task = !matches!(before, ContainerState::Created | ContainerState::Creating);
        let exit = match before {
            ContainerState::Exited { exit } | ContainerState::Removing { exit } => exit,
            ContainerState::Creating
            | ContainerState::Created
            | ContainerState::Starting
            | ContainerState::Running { .. } => Exit::of_process(0, now_ns(), false, 0),
        };
        container.change(&self.records, |live| {
            live.state = ContainerState::Removing { exit };
        })?;
        if had_task {
            self.delete_task(container).await?;
        }
        self.erase_container(&container.fixed).await?;
        self.registry.containers.remove(container.id());
        let fixed = &container.fixed;
        self.container_names
            .release(&(fixed.sandbox_id.clone(), fixed.config.name.clone()));
        self.events.publish(
            EventKind::Deleted,
            container.id(),
            fixed.sandbox_id.as_str(),
        );
        Ok(())
    }

    /// Makes sure that neither task nor mount is left.
    async fn delete_task(&self, container: &Container) -> Result<()> {
        let Some(sandbox) = self
            .registry
            .sandboxes
            .find_optional(container.fixed.sandbox_id.as_str())?
        else {
            return Ok(());
        };
        let in_shim = match self.running_shim(&sandbox).await {
            Some(shim) => shim.delete(container.id(), "").await.is_ok(),
            None => false,
        };
        if !in_shim || is_mounted(&container.fixed.bundle.join("rootfs")) {
            self.clear_leftovers(&sandbox, &container.fixed).await?;
        }
        Ok(())
    }
}

/// Whether a directory is the root of a mount: then its device differs from its parent's.
fn is_mounted(dir: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &std::path::Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    dir.parent()
        .is_some_and(|parent| device(dir) != device(parent))
}
