//! Owns RunPodSandbox: namespaces, files, network and shim, or nothing at all.

use std::path::PathBuf;
use std::sync::Arc;

use super::config::{NamespaceMode, SandboxConfig};
use super::state::SandboxState;
use super::{Fixed, Live, Sandbox, SandboxRecord, files};
use crate::daemon::{Daemon, blocking, now_ns};
use crate::error::{Error, Kind, Result};
use crate::events::EventKind;
use crate::id::SandboxId;
use crate::netns;
use crate::store::records::make_private_dir;

impl Daemon {
    /// Runs a sandbox and answers with its id once it is ready.
    pub async fn run_sandbox(
        self: &Arc<Self>,
        config: SandboxConfig,
        handler: String,
    ) -> Result<SandboxId> {
        self.handler(&handler)?;
        let fingerprint = serde_json::to_string(&(&config, &handler)).unwrap_or_default();
        let name = config.name.clone();
        let text = name.to_string();
        let daemon = self.clone();
        let work = async move { daemon.make_sandbox(config, handler).await };
        self.sandbox_names
            .run(name, fingerprint, work, |id| {
                let subject = format!("it belongs to sandbox {id}");
                Error::new(
                    Kind::AlreadyExists,
                    format!("sandbox name {text:?} is taken"),
                    subject,
                )
            })
            .await
    }

    async fn make_sandbox(
        self: Arc<Self>,
        config: SandboxConfig,
        handler: String,
    ) -> Result<SandboxId> {
        let id = SandboxId::random()?;
        let fixed = self.plan_sandbox(id.clone(), config, handler)?;
        let live = Live {
            state: SandboxState::Creating,
            attached: None,
            network_held: fixed.netns.is_some(),
            shim: None,
            shim_pid: None,
            pod_init: None,
        };
        let sandbox = Arc::new(Sandbox::new(SandboxRecord { fixed, live }));
        match self.build_sandbox(&sandbox).await {
            Ok(()) => {
                self.registry.sandboxes.insert(id.as_str(), sandbox);
                self.events
                    .publish(EventKind::Created, id.as_str(), id.as_str());
                self.events
                    .publish(EventKind::Started, id.as_str(), id.as_str());
                Ok(id)
            }
            Err(error) => {
                let undo = self.undo_sandbox(&sandbox).await;
                let name = sandbox.fixed.config.name.to_string();
                let error = error.within("run sandbox", name);
                match undo {
                    Ok(()) => Err(error),
                    Err(left) => Err(error.within("clean-up failed too", left.to_string())),
                }
            }
        }
    }

    fn plan_sandbox(&self, id: SandboxId, config: SandboxConfig, handler: String) -> Result<Fixed> {
        let dir = self.sandbox_dir(&id);
        let own_network = config.namespaces.network != NamespaceMode::Node;
        let own_ipc = config.namespaces.ipc != NamespaceMode::Node;
        let short = &id.as_str()[..24];
        let pin = |kind: &str| dir.join("ns").join(kind);
        let owns_cgroup_parent = config.cgroup_parent.is_empty();
        let cgroup_parent = match config.cgroup_parent.as_str() {
            "" => format!("/coracle/{id}"),
            parent => format!("/{}", parent.trim_matches('/')),
        };
        // With the host's network goes the host's name, as with containerd.
        let hostname = match (own_network, config.hostname.as_str()) {
            (true, name) if !name.is_empty() => name.to_owned(),
            _ => host_name(),
        };
        Ok(Fixed {
            netns: own_network.then(|| PathBuf::from(format!("/run/netns/coracle-{short}"))),
            ipc: own_ipc.then(|| pin("ipc")),
            uts: own_network.then(|| pin("uts")),
            hostname,
            cgroup_parent,
            owns_cgroup_parent,
            created_at_ns: now_ns(),
            boot_id: self.host.boot_id.clone(),
            dir,
            id,
            config,
            handler,
        })
    }

    async fn build_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        make_private_dir(&sandbox.fixed.dir)?;
        // The record is the intent: after a crash the next start undoes what it names.
        sandbox.change(&self.records, |_| {})?;
        let network = self.connect_sandbox(sandbox);
        let (shim, network) = tokio::join!(self.shim(sandbox), network);
        shim?;
        network?;
        sandbox.change(&self.records, |live| live.state = SandboxState::Ready)
    }

    async fn connect_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let inside = sandbox.clone();
        blocking(move || {
            let fixed = &inside.fixed;
            files::create(fixed)?;
            if fixed.ipc.is_some() || fixed.uts.is_some() {
                make_private_dir(&fixed.dir.join("ns"))?;
            }
            netns::create(&netns::PinRequest {
                net: fixed.netns.clone(),
                ipc: fixed.ipc.clone(),
                uts: fixed.uts.clone(),
                hostname: fixed.uts.is_some().then(|| fixed.hostname.clone()),
                sysctls: &fixed.config.sysctls,
            })?;
            Ok(())
        })
        .await?;
        if let Some(pod) = sandbox.pod_network() {
            let mut swept = self.network_swept.subscribe();
            // The sender lives as long as the daemon.
            let _ = swept.wait_for(|swept| *swept).await;
            let attached = self.network.attach(&pod).await?;
            sandbox.change(&self.records, |live| live.attached = Some(attached))?;
        }
        Ok(())
    }

    /// Takes back everything that a sandbox that never became ready may have.
    pub async fn undo_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        self.tear_down(sandbox).await?;
        self.erase_sandbox(sandbox).await
    }
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}
