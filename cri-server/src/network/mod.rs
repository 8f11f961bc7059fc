//! The pod network: connects a sandbox's network namespace and takes it off again.
//!
//! ```text
//!   Network -- auto/cni --> cni/     plugins by the CNI specification (processes)
//!           -- auto/bridge-> bridge/ built in: veth, bridge, leases, nf_tables (netlink only)
//!                             |-> netlink/ (route, attrs)   nft/ (expr, ruleset)   conntrack
//! ```
//! Owns the choice between the two, and the order of calls for one sandbox. A sandbox is taken
//! off by whoever connected it, whatever the configuration says by then. Calls survive their
//! caller: an aborted request does not leave a half-made connection unattended.
//!
//! Everything works in the network namespace of the thread (and of the runtime's threads) that
//! calls; nothing looks at the process's main one.

mod activity;
mod bridge;
mod cni;
mod config;
mod conntrack;
mod error;
pub(crate) mod netlink;
mod nft;
mod pod;
mod subnet;

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Value, json};
use tracing::warn;

pub use config::{BridgeConfig, Mode, NetworkConfig};
pub use error::{NetworkError, NetworkErrorKind, Result};
pub use pod::{
    ANNOTATION_EGRESS, ANNOTATION_INGRESS, ANNOTATION_IPS, ANNOTATION_MAC, Attached, DnsConfig,
    Interface, PodNetwork, PortMapping, Protocol,
};
pub use subnet::Subnet;

use activity::Activity;
use bridge::Bridge;
use cni::Cni;

/// The pod network; clones share it.
#[derive(Clone)]
pub struct Network {
    mode: Mode,
    bridge: Arc<Bridge>,
    cni: Arc<Cni>,
    activity: Arc<Activity>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Provider {
    Bridge,
    Cni,
}

impl Network {
    /// Reads what earlier runs left. Blocks; in mode `bridge` the host is set up at once, and a
    /// failure of that is told by `status` rather than here.
    pub fn open(config: NetworkConfig) -> Result<Network> {
        let bridge = Bridge::open(config.bridge.clone(), &config.state_dir)?;
        let cni = Cni::open(&config)?;
        if config.mode == Mode::Bridge
            && let Err(error) = bridge.prepare()
        {
            warn!(%error, "the pod bridge is not ready");
        }
        Ok(Network {
            mode: config.mode,
            bridge: Arc::new(bridge),
            cni: Arc::new(cni),
            activity: Arc::default(),
        })
    }

    fn provider(&self) -> Provider {
        match self.mode {
            Mode::Bridge => Provider::Bridge,
            Mode::Cni => Provider::Cni,
            Mode::Auto if self.cni.configured() => Provider::Cni,
            Mode::Auto => Provider::Bridge,
        }
    }

    /// Connects the pod. Idempotent while the connection stands; a failure leaves nothing behind.
    pub async fn attach(&self, pod: &PodNetwork) -> Result<Attached> {
        let (network, pod) = (self.clone(), pod.clone());
        detached_task(async move { network.attach_now(pod).await }).await
    }

    async fn attach_now(&self, pod: PodNetwork) -> Result<Attached> {
        pod.check_id()?;
        let _turn = self.activity.turn(&pod.sandbox_id).await;
        let provider = if self.bridge.knows(&pod.sandbox_id) {
            Provider::Bridge
        } else if self.cni.knows(&pod.sandbox_id) {
            Provider::Cni
        } else {
            self.provider()
        };
        let id = pod.sandbox_id.clone();
        let attached = match provider {
            Provider::Cni => self.cni.attach(&pod).await?,
            Provider::Bridge => {
                let bridge = Arc::clone(&self.bridge);
                blocking(move || bridge.attach(&pod)).await?
            }
        };
        self.activity.own(&id);
        Ok(attached)
    }

    /// Disconnects the pod and frees its addresses and host ports. Idempotent; needs neither the
    /// namespace nor what `attach` cached.
    pub async fn detach(&self, pod: &PodNetwork) -> Result<()> {
        let (network, pod) = (self.clone(), pod.clone());
        detached_task(async move { network.detach_now(pod).await }).await
    }

    async fn detach_now(&self, pod: PodNetwork) -> Result<()> {
        pod.check_id()?;
        let _turn = self.activity.turn(&pod.sandbox_id).await;
        self.activity.disown(&pod.sandbox_id);
        let of_bridge = self.bridge.knows(&pod.sandbox_id);
        let of_cni = self.cni.knows(&pod.sandbox_id);
        if of_bridge || !of_cni {
            let (bridge, id) = (Arc::clone(&self.bridge), pod.sandbox_id.clone());
            blocking(move || bridge.detach(&id)).await?;
        }
        if of_cni || (!of_bridge && self.provider() == Provider::Cni) {
            self.cni.detach(&pod).await?;
        }
        Ok(())
    }

    /// Whether pods can be connected, and if not, why. Quick; runs no plugin before it answers.
    pub fn status(&self) -> std::result::Result<(), String> {
        match self.provider() {
            Provider::Bridge => self.bridge.status(),
            Provider::Cni => self.cni.status(),
        }
    }

    /// What is in force, for the verbose status.
    pub fn describe(&self) -> Value {
        let provider = match self.provider() {
            Provider::Bridge => "bridge",
            Provider::Cni => "cni",
        };
        json!({
            "mode": self.mode,
            "provider": provider,
            "bridge": self.bridge.describe(),
            "cni": self.cni.describe(),
        })
    }

    /// Whether the pod's connection is still as `attach` made it.
    pub async fn check(&self, sandbox_id: &str) -> Result<()> {
        pod::check_sandbox_id(sandbox_id)?;
        if self.bridge.knows(sandbox_id) {
            let (bridge, id) = (Arc::clone(&self.bridge), sandbox_id.to_owned());
            return blocking(move || bridge.check(&id)).await;
        }
        self.cni.check(sandbox_id).await
    }

    /// Removes the built-in bridge and its rules when no pod is connected any more; false when
    /// one is. The next attach makes them again.
    pub async fn teardown(&self) -> Result<bool> {
        let bridge = Arc::clone(&self.bridge);
        blocking(move || bridge.teardown()).await
    }

    /// Removes whatever belongs neither to a sandbox of `live` nor to one that this process has
    /// attached or is busy with: what a crash or a failed detach left.
    pub async fn gc(&self, live: &HashSet<String>) -> Result<()> {
        let (network, live) = (self.clone(), Arc::new(live.clone()));
        detached_task(async move { network.gc_now(live).await }).await
    }

    async fn gc_now(&self, live: Arc<HashSet<String>>) -> Result<()> {
        let (network, kept) = (self.clone(), Arc::clone(&live));
        let of_bridge = blocking(move || {
            network
                .bridge
                .gc(|id| kept.contains(id) || network.activity.knows(id))
        })
        .await;
        let of_cni = self
            .cni
            .gc(|id| live.contains(id) || self.activity.knows(id))
            .await;
        of_bridge.and(of_cni)
    }
}

/// Runs to its end even when the caller stops waiting.
async fn detached_task<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(lost(error)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(lost(error)))
}

fn lost(error: tokio::task::JoinError) -> NetworkError {
    NetworkError::new(NetworkErrorKind::Kernel, "network task", "").cause(error)
}

#[cfg(test)]
pub(crate) mod tests;
