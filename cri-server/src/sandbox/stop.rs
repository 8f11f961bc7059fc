//! Owns StopPodSandbox: ends the containers, gives the address back, lets the shim go. Every step
//! is idempotent and all of them are tried, so that a stop works with a dead shim, a missing
//! network namespace or an empty CNI cache, and a stop that failed can be repeated.

use std::sync::Arc;
use std::time::Duration;

use super::state::{Decision, Request, SandboxState, decide};
use super::{Sandbox, files};
use crate::container::Container;
use crate::daemon::{Daemon, blocking};
use crate::error::{Collected, Error, Result};
use crate::events::EventKind;
use crate::netns;
use crate::shim_client::{ShimClient, ShimError};

impl Daemon {
    /// Stops a sandbox.
    pub async fn stop_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _step = sandbox.step.write().await;
        self.stop_locked(sandbox).await
    }

    /// The same for a caller that holds `step`.
    pub async fn stop_locked(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        if decide(sandbox.state(), Request::Stop) == Decision::AlreadyDone {
            return Ok(());
        }
        sandbox.change(&self.records, |live| live.state = SandboxState::Stopping)?;
        self.kill_containers(sandbox).await?;
        self.tear_down(sandbox)
            .await
            .map_err(|e| e.within("stop sandbox", sandbox.id()))?;
        sandbox.change(&self.records, |live| live.state = SandboxState::NotReady)?;
        self.events
            .publish(EventKind::Stopped, sandbox.id(), sandbox.id());
        Ok(())
    }

    async fn kill_containers(self: &Arc<Self>, sandbox: &Sandbox) -> Result<()> {
        let kill = |container: Arc<Container>| {
            let daemon = self.clone();
            tokio::spawn(async move { daemon.stop_container(&container, Duration::ZERO).await })
        };
        let containers = self.registry.containers_of(sandbox.id());
        let kills: Vec<_> = containers.into_iter().map(kill).collect();
        let mut failures = Collected::default();
        for kill in kills {
            if let Ok(answer) = kill.await {
                failures.push(answer);
            }
        }
        failures.finish("stop containers of sandbox", sandbox.id())
    }

    /// Ends everything that belongs to the sandbox itself.
    pub async fn tear_down(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let mut failures = Collected::default();
        let init = self.stop_pod_init(sandbox);
        let network = self.disconnect(sandbox);
        let (init, network) = tokio::join!(init, network);
        failures.push(init);
        failures.push(network);
        let pinned = sandbox.clone();
        failures.push(blocking(move || unpin(&pinned)).await);
        failures.push(self.let_shim_go(sandbox).await);
        if sandbox.fixed.owns_cgroup_parent {
            self.host.cgroups.remove_empty(&sandbox.fixed.cgroup_parent);
            self.host.cgroups.remove_empty("/coracle");
        }
        failures.finish("tear down", "")
    }

    async fn disconnect(&self, sandbox: &Sandbox) -> Result<()> {
        if !sandbox.live().network_held {
            return Ok(());
        }
        if let Some(pod) = sandbox.pod_network() {
            self.network.detach(&pod).await?;
        }
        sandbox.change(&self.records, |live| live.network_held = false)
    }

    async fn ask_shim_to_end(
        &self,
        sandbox: &Sandbox,
        shim: &ShimClient,
    ) -> std::result::Result<(), ShimError> {
        // Asked first, because it is quick: a hung shim is found out here.
        shim.shim_pid(sandbox.id()).await?;
        // Their watchers delete the tasks as well; a shim that has one left would stay.
        for container in self.registry.containers_of(sandbox.id()) {
            shim.delete(container.id(), "").await?;
        }
        shim.shutdown(sandbox.id()).await
    }

    async fn let_shim_go(&self, sandbox: &Sandbox) -> Result<()> {
        if let Some(shim) = self.running_shim(sandbox).await {
            let ended = self.ask_shim_to_end(sandbox, &shim).await;
            if let Err(ShimError::Timeout { .. }) = ended {
                self.kill_shim(sandbox);
            } else {
                ended?;
            }
            // A shim that stays has a task that no record names.
            if tokio::time::timeout(Duration::from_secs(5), shim.gone())
                .await
                .is_err()
            {
                self.kill_shim(sandbox);
                if sandbox.fixed.owns_cgroup_parent {
                    self.host.cgroups.kill(&sandbox.fixed.cgroup_parent);
                }
            }
        }
        *sandbox.shim.lock().await = None;
        if let Some(socket) = sandbox.live().shim {
            // A killed shim leaves its socket behind.
            let _ = std::fs::remove_file(socket);
            sandbox.change(&self.records, |live| {
                live.shim = None;
                live.shim_pid = None;
            })?;
        }
        Ok(())
    }
}

fn unpin(sandbox: &Sandbox) -> Result<()> {
    let mut failures = Collected::default();
    let fixed = &sandbox.fixed;
    for path in [&fixed.netns, &fixed.ipc, &fixed.uts].into_iter().flatten() {
        failures.push(netns::remove(path).map_err(|e| Error::io("unpin", path.display(), e)));
    }
    failures.push(files::unmount(fixed));
    failures.finish("unpin", "")
}
