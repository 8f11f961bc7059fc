//! Owns UpdateContainerResources: new limits for a created or a running container. What the
//! request does not name stays as it is.

use std::path::Path;

use super::Container;
use super::config::Resources;
use super::create::require;
use super::state::{ContainerState, Request};
use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::spec_builder::document::{LinuxResources, Spec};
use crate::spec_builder::resources;

impl Daemon {
    /// Changes limits. The new values are reported once they are in force.
    pub async fn update_container(&self, container: &Container, update: Resources) -> Result<()> {
        let _step = container.step.lock().await;
        require(container, Request::Update)?;
        let current = container.live().resources.unwrap_or_default();
        let wanted = resources::updated(&current, &update);
        let planned = resources::plan(&wanted, &self.host)?;
        if let ContainerState::Running { .. } = container.state() {
            let shim = self.shim_of(container).await?;
            let json = serde_json::to_vec(&planned)
                .map_err(|e| Error::io("serialise resources", container.id(), e))?;
            shim.update(container.id(), json)
                .await
                .map_err(|e| Error::from(e).within("update container", container.id()))?;
        }
        let config = container.fixed.bundle.join("config.json");
        blocking(move || rewrite(&config, planned)).await?;
        container.change(&self.records, |live| live.resources = Some(wanted))
    }
}

/// Puts the limits into config.json, so that a start that comes later uses them.
fn rewrite(path: &Path, planned: LinuxResources) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("rewrite", path.display(), e);
    let bytes = std::fs::read(path).map_err(failed)?;
    let mut spec: Spec = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
    let devices = std::mem::take(&mut spec.linux.resources.devices);
    spec.linux.resources = LinuxResources { devices, ..planned };
    let json = serde_json::to_vec(&spec).map_err(|e| failed(e.into()))?;
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, json)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(failed)
}
