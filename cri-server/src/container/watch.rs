//! Owns learning that a container has ended: one task for each running container, waiting on its
//! shim. When the shim dies, its exit record on disk is believed; without one the container's
//! processes are killed, because nobody could tell how they end.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use super::state::{ContainerState, Exit};
use super::{Container, Fixed};
use crate::daemon::{Daemon, now_ns};
use crate::error::Result;
use crate::events::EventKind;
use crate::sandbox::Sandbox;
use crate::shim_client::{self, ShimClient, ShimError};

/// What the shim leaves in the bundle when a task ends.
#[derive(Debug, Deserialize)]
pub struct ExitRecord {
    exit_status: u32,
    exited_at_unix_nano: i64,
    #[serde(default)]
    oom_killed: bool,
}

impl ExitRecord {
    fn read(bundle: &Path) -> Option<ExitRecord> {
        let bytes = std::fs::read(bundle.join("exit.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

impl Daemon {
    /// Watches a running container in the background.
    pub fn watch(
        self: &Arc<Self>,
        sandbox: Arc<Sandbox>,
        container: Arc<Container>,
        shim: ShimClient,
    ) {
        let daemon = self.clone();
        tokio::spawn(async move {
            let exit = daemon.await_exit(&sandbox, &container, shim).await;
            if let Err(error) = daemon.settle(&container, exit) {
                tracing::warn!(container = container.id(), %error, "the exit was not recorded");
            }
            // The end is known; what the task held (mount, cgroup) goes next.
            if let Some(shim) = daemon.running_shim(&sandbox).await
                && let Err(error) = shim.delete(container.id(), "").await
            {
                tracing::warn!(container = container.id(), %error, "the task was not deleted");
            }
        });
    }

    async fn await_exit(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        mut shim: ShimClient,
    ) -> Exit {
        let id = container.id();
        let mut patience = 5_u32;
        loop {
            match shim.wait(id, "").await {
                Ok(exit) => {
                    let oom = match shim.status(id, "").await {
                        Ok(status) => status.oom_killed,
                        Err(_) => ExitRecord::read(&container.fixed.bundle)
                            .is_some_and(|record| record.oom_killed),
                    };
                    return Exit::of_process(exit.status, exit.at_ns, oom, started_at(container));
                }
                Err(error) if error.is_not_found() || patience == 0 => {
                    return self.bury(sandbox, container, &error.to_string()).await;
                }
                Err(ShimError::Gone) => match self.running_shim(sandbox).await {
                    Some(again) => shim = again,
                    None => {
                        return self.bury(sandbox, container, "the shim died").await;
                    }
                },
                Err(error) => {
                    tracing::warn!(container = id, %error, "waiting for the container failed");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
            patience -= 1;
        }
    }

    /// The end of a container that no shim can tell about.
    pub async fn bury(&self, sandbox: &Sandbox, container: &Container, why: &str) -> Exit {
        let started = started_at(container);
        let record = self.last_record(sandbox, container);
        if let Err(error) = self.clear_leftovers(sandbox, &container.fixed).await {
            tracing::warn!(container = container.id(), %error, "clean-up after a dead shim failed");
        }
        match record {
            Some(exit) => Exit::of_process(
                exit.exit_status,
                exit.exited_at_unix_nano,
                exit.oom_killed,
                started,
            ),
            None => {
                tracing::warn!(container = container.id(), why, "killed: its shim was lost");
                Exit::unknown(why, started, now_ns())
            }
        }
    }

    /// The exit record that the shim of a container wrote before it died. The clean-up after a
    /// dead shim kills every container of the pod and writes records that only say so; therefore
    /// the first container to be buried reads the records of all.
    fn last_record(&self, sandbox: &Sandbox, container: &Container) -> Option<ExitRecord> {
        let mut last = sandbox
            .last_exits
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !last.contains_key(container.id()) {
            let lives = |member: &Arc<Container>| {
                let state = member.state();
                matches!(
                    state,
                    ContainerState::Running { .. } | ContainerState::Starting
                )
            };
            let members = self.registry.containers_of(sandbox.id());
            for member in members.into_iter().filter(lives) {
                last.entry(member.id().to_owned())
                    .or_insert_with(|| ExitRecord::read(&member.fixed.bundle));
            }
        }
        last.remove(container.id()).flatten()
    }

    /// Kills and removes what a dead shim left of a container: processes, cgroup, mount.
    pub async fn clear_leftovers(&self, sandbox: &Sandbox, fixed: &Fixed) -> Result<()> {
        let handler = self.handler(&sandbox.fixed.handler)?;
        self.host.cgroups.kill(&fixed.cgroups_path);
        shim_client::delete_leftovers(&handler.shim, fixed.id.as_str(), &fixed.bundle).await
    }

    /// Records how a container ended and tells everyone, the first time.
    pub fn settle(&self, container: &Container, exit: Exit) -> Result<()> {
        let mut news = false;
        let saved = container.change(&self.records, |live| {
            news = matches!(
                live.state,
                ContainerState::Starting | ContainerState::Running { .. }
            );
            if news {
                live.state = ContainerState::Exited { exit };
            }
        });
        if news {
            self.events.publish(
                EventKind::Stopped,
                container.id(),
                container.fixed.sandbox_id.as_str(),
            );
        }
        saved
    }
}

fn started_at(container: &Container) -> i64 {
    match container.state() {
        ContainerState::Running { started_at_ns, .. } => started_at_ns,
        _ => 0,
    }
}
