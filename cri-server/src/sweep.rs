//! Owns removing what no record names: after a crash in the middle of something, or when a record
//! was lost, there may be tasks, bundles, snapshots, namespaces and shims that belong to nobody.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::container::Container;
use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::netns;
use crate::shim_client::{self, ShimClient};
use crate::spec_builder::document::Spec;

/// How long a stray process may take to end after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// What lay about when the daemon started, before it served anything: whatever is made later is
/// not touched.
pub struct Strays {
    pods: Vec<String>,
    bundles: Vec<String>,
    snapshots: Vec<String>,
    volumes: Vec<String>,
}

impl Daemon {
    /// Looks for what no record names. The tables are loaded, nothing is served yet.
    pub fn find_strays(&self) -> Strays {
        let known = |id: &str| self.registry.containers.find(id).is_ok();
        let state = &self.config.state;
        let mut snapshots = self.images.snapshots();
        snapshots.retain(|id| !known(id));
        Strays {
            pods: ids_in(&state.join("sandboxes"), |id| {
                self.registry.sandboxes.find(id).is_ok()
            }),
            bundles: ids_in(&state.join("containers"), known),
            snapshots,
            volumes: ids_in(&self.config.root.join("volumes"), known),
        }
    }

    /// Takes connections back that no sandbox holds. New ones wait for this (`network_swept`),
    /// because they could not be told from strays.
    pub async fn sweep_network(&self) {
        let mut sandboxes = self.registry.sandboxes.all();
        sandboxes.retain(|sandbox| sandbox.live().network_held);
        let live: HashSet<String> = sandboxes.iter().map(|s| s.id().to_owned()).collect();
        if let Err(error) = self.network.gc(&live).await {
            tracing::warn!(%error, "network clean-up failed");
        }
        self.network_swept.send_replace(true);
    }

    /// Removes the strays, and `unfinished` containers: those that have a record but that nobody
    /// was told of, or whose sandbox is not known.
    pub async fn sweep(self: &Arc<Self>, strays: Strays, unfinished: Vec<Container>) {
        self.end_stray_tasks(&strays).await;
        for container in unfinished {
            report(container.id(), self.erase_container(&container.fixed).await);
        }
        for id in &strays.pods {
            report(id, self.remove_stray_pod(id).await);
        }
        for key in &strays.snapshots {
            if let Err(error) = self.images.remove_snapshot(key) {
                tracing::warn!(container = key, %error, "an orphaned snapshot remains");
            }
        }
        for id in &strays.volumes {
            let _ = std::fs::remove_dir_all(self.config.root.join("volumes").join(id));
        }
    }

    async fn end_stray_tasks(&self, strays: &Strays) {
        if strays.pods.is_empty() && strays.bundles.is_empty() {
            return;
        }
        let mut shims = Vec::new();
        for sandbox in self.registry.sandboxes.all() {
            shims.extend(self.running_shim(&sandbox).await);
        }
        let mut adopted = Vec::new();
        for id in &strays.pods {
            adopted.extend(self.adopt_shim(id).await.map(|shim| (id, shim)));
        }
        shims.extend(adopted.iter().map(|(_, shim)| shim.clone()));
        for id in &strays.bundles {
            report(id, self.remove_stray_container(id, &shims).await);
        }
        for (id, shim) in &adopted {
            end_task(shim, id).await;
            let _ = shim.shutdown(id).await;
            let _ = tokio::time::timeout(AFTER_KILL, shim.gone()).await;
        }
    }

    /// The shim of a sandbox whose record was lost: starting it again finds the one that runs.
    async fn adopt_shim(&self, id: &str) -> Option<ShimClient> {
        let dir = self.config.state.join("sandboxes").join(id);
        let handler = self.handler("").ok()?;
        let socket = shim_client::start(&handler.shim, id, &dir).await.ok()?;
        ShimClient::connect(&socket).await.ok()
    }

    async fn remove_stray_container(&self, id: &str, shims: &[ShimClient]) -> Result<()> {
        let dir = self.config.state.join("containers").join(id);
        for shim in shims {
            end_task(shim, id).await;
        }
        if let Some(path) = cgroups_path(&dir) {
            self.host.cgroups.kill(&path);
        }
        let handler = self.handler("")?;
        shim_client::delete_leftovers(&handler.shim, id, &dir).await?;
        blocking(move || remove_tree(&dir)).await
    }

    async fn remove_stray_pod(&self, id: &str) -> Result<()> {
        let dir = self.config.state.join("sandboxes").join(id);
        let short = id.get(..24).unwrap_or(id).to_owned();
        self.host.cgroups.remove_empty(&format!("/coracle/{id}"));
        self.host.cgroups.remove_empty("/coracle");
        blocking(move || {
            for pin in ["ns/ipc", "ns/uts", "shm"].map(|name| dir.join(name)) {
                unmount(&pin)?;
            }
            unmount(Path::new(&format!("/run/netns/coracle-{short}")))?;
            remove_tree(&dir)
        })
        .await
    }
}

/// Kills and deletes a task, if the shim has it.
async fn end_task(shim: &ShimClient, id: &str) {
    if shim.kill(id, "", 9, true).await.is_ok() {
        let _ = tokio::time::timeout(AFTER_KILL, shim.wait(id, "")).await;
    }
    let _ = shim.delete(id, "").await;
}

fn report(id: &str, outcome: Result<()>) {
    match outcome {
        Ok(()) => tracing::info!(id, "removed what no record names"),
        Err(error) => tracing::warn!(id, %error, "something that no record names remains"),
    }
}

/// Names in a directory that are ids and not known.
fn ids_in(dir: &Path, known: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| crate::id::ContainerId::try_from(name.clone()).is_ok() && !known(name))
        .collect()
}

fn cgroups_path(bundle: &Path) -> Option<String> {
    let bytes = std::fs::read(bundle.join("config.json")).ok()?;
    let spec: Spec = serde_json::from_slice(&bytes).ok()?;
    Some(spec.linux.cgroups_path).filter(|path| path.len() > 1)
}

/// A pinned namespace (a file) or a mounted directory; absent is fine.
fn unmount(path: &Path) -> Result<()> {
    match netns::remove(path) {
        // A directory is unmounted by then, and goes with the tree.
        Err(_) if path.is_dir() => Ok(()),
        Err(e) => Err(Error::io("unmount", path.display(), e)),
        Ok(()) => Ok(()),
    }
}

fn remove_tree(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", dir.display(), e))
        }
        _ => Ok(()),
    }
}
