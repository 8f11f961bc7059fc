//! Owns what happens between two lives of the daemon: records are read, each pod is compared with
//! its shim (all pods in parallel, one bad pod blocks no other), and `sweep` removes what no
//! record names. Reads are served from the records meanwhile.

use std::sync::Arc;
use std::time::Duration;

use crate::container::state::{ContainerState, Exit};
use crate::container::{Container, ContainerRecord};
use crate::daemon::{Daemon, now_ns};
use crate::error::{Error, Result};
use crate::proto::shim::coracle::shim::v1::StatusResponse;
use crate::sandbox::state::SandboxState;
use crate::sandbox::{Sandbox, SandboxRecord};
use crate::shim_client::{ShimClient, nanos, was_started};
use crate::store::records::Table;
use crate::sweep::Strays;

/// What loading the records found that is not part of the tables.
pub struct Unfinished {
    /// Sandboxes that nobody was told of: undone.
    sandboxes: Vec<Arc<Sandbox>>,
    /// Containers that nobody was told of: erased.
    containers: Vec<Container>,
    /// What has no record at all: removed.
    strays: Option<Strays>,
}

impl Daemon {
    /// Fills the tables from the records. After a reboot everything has ended.
    pub fn load_records(&self) -> Result<Unfinished> {
        let mut unfinished = Unfinished {
            sandboxes: Vec::new(),
            containers: Vec::new(),
            strays: None,
        };
        let sandboxes = self.records.load::<SandboxRecord>(Table::Sandboxes)?;
        let containers = self.records.load::<ContainerRecord>(Table::Containers)?;
        for (path, why) in sandboxes.quarantined.iter().chain(&containers.quarantined) {
            tracing::error!(path = %path.display(), why, "unreadable record put aside");
        }
        for record in sandboxes.records {
            let sandbox = Arc::new(Sandbox::new(record));
            if sandbox.state() == SandboxState::Creating {
                unfinished.sandboxes.push(sandbox);
                continue;
            }
            if sandbox.fixed.boot_id != self.host.boot_id {
                self.end_of_boot(&sandbox)?;
            }
            let (name, id) = (sandbox.fixed.config.name.clone(), sandbox.fixed.id.clone());
            self.sandbox_names.restore(name, id.clone());
            self.registry.sandboxes.insert(id.as_str(), sandbox);
        }
        for record in containers.records {
            let container = Container::new(record);
            let sandbox_id = container.fixed.sandbox_id.clone();
            let orphan = self.registry.sandboxes.find(sandbox_id.as_str()).is_err();
            if orphan || container.state() == ContainerState::Creating {
                unfinished.containers.push(container);
                continue;
            }
            if container.fixed.boot_id != self.host.boot_id {
                self.container_end_of_boot(&container)?;
            }
            let fixed = &container.fixed;
            let key = (sandbox_id, fixed.config.name.clone());
            self.container_names.restore(key, fixed.id.clone());
            let id = fixed.id.clone();
            self.registry
                .containers
                .insert(id.as_str(), Arc::new(container));
        }
        unfinished.strays = Some(self.find_strays());
        Ok(unfinished)
    }

    fn end_of_boot(&self, sandbox: &Sandbox) -> Result<()> {
        sandbox.change(&self.records, |live| {
            live.shim = None;
            live.shim_pid = None;
            live.pod_init = None;
            // `network_held` stays: a CNI plugin may keep leases over a reboot.
            if live.state == SandboxState::Ready {
                live.state = SandboxState::Stopping;
            }
        })
    }

    fn container_end_of_boot(&self, container: &Container) -> Result<()> {
        let started = match container.state() {
            ContainerState::Running { started_at_ns, .. } => started_at_ns,
            ContainerState::Created | ContainerState::Creating | ContainerState::Starting => 0,
            ContainerState::Exited { .. } | ContainerState::Removing { .. } => return Ok(()),
        };
        let exit = Exit::unknown("ended by a reboot of the host", started, now_ns());
        container.change(&self.records, |live| {
            live.state = ContainerState::Exited { exit }
        })
    }

    /// Brings every pod up to date, then removes what belongs to none.
    pub async fn recover(self: Arc<Self>, unfinished: Unfinished) {
        let mut tasks = tokio::task::JoinSet::new();
        let daemon = self.clone();
        tasks.spawn(async move { daemon.sweep_network().await });
        for sandbox in self.registry.sandboxes.all() {
            let daemon = self.clone();
            tasks.spawn(async move {
                if let Err(error) = daemon.recover_pod(&sandbox).await {
                    tracing::warn!(sandbox = sandbox.id(), %error, "recovery of a pod failed");
                }
            });
        }
        for sandbox in unfinished.sandboxes {
            let daemon = self.clone();
            tasks.spawn(async move {
                if sandbox.fixed.dir.is_dir() {
                    // The last daemon may have started its shim and died before it could note
                    // the address: starting it again finds the one that runs.
                    let _ = daemon.shim(&sandbox).await;
                }
                if let Err(error) = daemon.undo_sandbox(&sandbox).await {
                    tracing::warn!(sandbox = sandbox.id(), %error, "an unfinished pod remains");
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        if let Some(strays) = unfinished.strays {
            self.sweep(strays, unfinished.containers).await;
        }
        tracing::info!(
            sandboxes = self.registry.sandboxes.all().len(),
            containers = self.registry.containers.all().len(),
            "recovered"
        );
    }

    async fn recover_pod(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let step = sandbox.step.write().await;
        let shim = self.running_shim(sandbox).await;
        for container in self.registry.containers_of(sandbox.id()) {
            self.recover_container(sandbox, &container, shim.as_ref())
                .await;
        }
        match sandbox.state() {
            SandboxState::Stopping => self.stop_locked(sandbox).await,
            SandboxState::Removing => {
                drop(step);
                self.remove_sandbox(sandbox).await
            }
            SandboxState::Creating | SandboxState::Ready | SandboxState::NotReady => Ok(()),
        }
    }

    async fn recover_container(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        shim: Option<&ShimClient>,
    ) {
        let id = container.id();
        let outcome = match (container.state(), shim) {
            (ContainerState::Running { .. } | ContainerState::Starting, Some(shim)) => {
                match shim.status(id, "").await {
                    Ok(status) if !was_started(status.status) => {
                        self.abandon_task(sandbox, shim, &container.fixed).await;
                        let why = "the daemon ended in the middle of the start";
                        self.settle(container, Exit::start_error(why.to_owned(), now_ns()))
                    }
                    Ok(status) => self
                        .resume(container, &status)
                        .map(|()| self.watch(sandbox.clone(), container.clone(), shim.clone())),
                    Err(error) => {
                        let exit = self.bury(sandbox, container, &error.to_string()).await;
                        self.settle(container, exit)
                    }
                }
            }
            (ContainerState::Running { .. } | ContainerState::Starting, None) => {
                let exit = self.bury(sandbox, container, "the shim died").await;
                self.settle(container, exit)
            }
            (ContainerState::Exited { .. }, Some(shim)) => {
                shim.delete(id, "").await.map_err(Error::from)
            }
            (ContainerState::Removing { .. }, _) => self.remove_container(container).await,
            (ContainerState::Exited { .. }, None)
            | (ContainerState::Creating | ContainerState::Created, _) => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(container = id, %error, "recovery of a container failed");
        }
    }

    /// A start that the last daemon did not see the end of, and that the shim has brought to one.
    fn resume(&self, container: &Container, status: &StatusResponse) -> Result<()> {
        if container.state() != ContainerState::Starting {
            return Ok(());
        }
        let started_at_ns = match nanos(status.started_at) {
            0 => now_ns(),
            at => at,
        };
        let pid = status.pid;
        container.change(&self.records, |live| {
            live.state = ContainerState::Running { pid, started_at_ns };
        })
    }

    /// Asks the runtimes what they can do; the answer is only for Status.
    pub async fn ask_features(self: Arc<Self>) {
        let mut features = std::collections::BTreeMap::new();
        for (name, handler) in &self.handlers {
            let mut command = tokio::process::Command::new(&handler.runtime);
            command.arg("features").kill_on_drop(true);
            let output = tokio::time::timeout(Duration::from_secs(5), command.output()).await;
            let json: Option<serde_json::Value> = match output {
                Ok(Ok(output)) => serde_json::from_slice(&output.stdout).ok(),
                Ok(Err(_)) | Err(_) => None,
            };
            let rro = json.is_some_and(|json| {
                let options = json["mountOptions"].as_array();
                options.is_some_and(|options| options.iter().any(|option| option == "rro"))
            });
            features.insert(name.clone(), rro);
        }
        let _ = self.rro_mounts.set(features);
    }
}
