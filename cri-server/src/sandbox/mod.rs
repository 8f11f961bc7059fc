//! Owns sandboxes: what is known of one ([`Sandbox`]), and one file for each thing that can be
//! done with it. A sandbox has no process of its own: pinned namespaces, files, an address and a
//! shim make it up; only a shared pid namespace needs an init (`pod_init`).

pub mod config;
pub mod files;
pub mod pod_init;
pub mod remove;
pub mod run;
pub mod shim;
pub mod state;
pub mod stats;
pub mod stop;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::container::watch::ExitRecord;
use crate::error::Result;
use crate::id::SandboxId;
use crate::network::Attached;
use crate::shim_client::ShimClient;
use crate::store::records::{Records, Table};
use config::SandboxConfig;
use state::SandboxState;

/// What never changes in the life of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fixed {
    /// Its id.
    pub id: SandboxId,
    /// What was asked for.
    pub config: SandboxConfig,
    /// Handler, as asked for: empty is the default one.
    pub handler: String,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The boot it belongs to.
    pub boot_id: String,
    /// Its directory in the state directory: files, namespaces, the shim's bundle.
    pub dir: PathBuf,
    /// The pinned network namespace; none: the host's.
    pub netns: Option<PathBuf>,
    /// The pinned IPC namespace; none: the host's.
    pub ipc: Option<PathBuf>,
    /// The pinned UTS namespace; none: the host's.
    pub uts: Option<PathBuf>,
    /// Hostname in it.
    pub hostname: String,
    /// Cgroup below which the containers' cgroups are.
    pub cgroup_parent: String,
    /// The parent is ours to remove.
    pub owns_cgroup_parent: bool,
}

/// What does change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Live {
    /// Life cycle.
    pub state: SandboxState,
    /// Its connection, while it has one.
    pub attached: Option<Attached>,
    /// The network was asked for an address, and has not been told to take it back.
    pub network_held: bool,
    /// Socket of the shim.
    pub shim: Option<PathBuf>,
    /// Pid of the shim.
    #[serde(default)]
    pub shim_pid: Option<u32>,
    /// The init of a shared pid namespace: its pid on the host.
    pub pod_init: Option<u32>,
}

/// The record on disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Constant part.
    pub fixed: Fixed,
    /// Changing part.
    pub live: Live,
}

/// One sandbox.
pub struct Sandbox {
    /// Constant part.
    pub fixed: Fixed,
    live: Mutex<Live>,
    /// Keeps the order of records on disk that of the changes.
    saving: Mutex<()>,
    /// Held for writing by what ends the sandbox, for reading by what makes or starts a container
    /// in it. Reads of state never take it.
    pub step: tokio::sync::RwLock<()>,
    /// Exit records read when the shim was found dead, for the containers not yet buried.
    pub last_exits: Mutex<BTreeMap<String, Option<ExitRecord>>>,
    /// Held while the init of a shared pid namespace is made.
    pub init_step: tokio::sync::Mutex<()>,
    /// The connection to the shim, made when it is first needed.
    pub shim: tokio::sync::Mutex<Option<ShimClient>>,
}

impl Sandbox {
    /// A sandbox in memory.
    pub fn new(record: SandboxRecord) -> Sandbox {
        Sandbox {
            fixed: record.fixed,
            live: Mutex::new(record.live),
            saving: Mutex::default(),
            step: tokio::sync::RwLock::default(),
            last_exits: Mutex::default(),
            init_step: tokio::sync::Mutex::default(),
            shim: tokio::sync::Mutex::default(),
        }
    }

    /// The id as text.
    pub fn id(&self) -> &str {
        self.fixed.id.as_str()
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the changing part.
    pub fn live(&self) -> Live {
        self.lock().clone()
    }

    /// Life cycle.
    pub fn state(&self) -> SandboxState {
        self.lock().state
    }

    /// Changes the changing part and writes the record. The change holds in memory even if the
    /// disk refuses it: the kernel is the truth, records are hints for the next start.
    pub fn change(&self, records: &Records, change: impl FnOnce(&mut Live)) -> Result<()> {
        let _order = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let live = {
            let mut live = self.lock();
            change(&mut live);
            live.clone()
        };
        let record = SandboxRecord {
            fixed: self.fixed.clone(),
            live,
        };
        records.save(Table::Sandboxes, self.id(), &record)
    }

    /// What the network needs to know of this pod.
    pub fn pod_network(&self) -> Option<crate::network::PodNetwork> {
        let config = &self.fixed.config;
        let netns = self.fixed.netns.clone()?;
        let dns = config.dns.clone().unwrap_or_default();
        Some(crate::network::PodNetwork {
            sandbox_id: self.id().to_owned(),
            pod_name: config.name.name.clone(),
            pod_namespace: config.name.namespace.clone(),
            pod_uid: config.name.uid.clone(),
            netns,
            hostname: self.fixed.hostname.clone(),
            port_mappings: config.ports.iter().map(port_mapping).collect(),
            annotations: config.annotations.clone(),
            labels: config.labels.clone(),
            cgroup_parent: self.fixed.cgroup_parent.clone(),
            dns: crate::network::DnsConfig {
                servers: dns.servers,
                searches: dns.searches,
                options: dns.options,
            },
        })
    }
}

fn port_mapping(port: &config::Port) -> crate::network::PortMapping {
    use crate::network::Protocol;
    crate::network::PortMapping {
        protocol: match port.protocol {
            config::PortProtocol::Tcp => Protocol::Tcp,
            config::PortProtocol::Udp => Protocol::Udp,
            config::PortProtocol::Sctp => Protocol::Sctp,
        },
        container_port: port.container_port,
        host_port: port.host_port,
        host_ip: port.host_ip,
    }
}
