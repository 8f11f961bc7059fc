//! Owns what a client asked of a sandbox, parsed once from the CRI (grpc/convert). Plain data:
//! no wire types, no I/O.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::container::config::{Resources, SeccompRequest};

/// The four fields that together name a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SandboxName {
    /// Pod name.
    pub name: String,
    /// Pod uid.
    pub uid: String,
    /// Pod namespace.
    pub namespace: String,
    /// Tells retries apart.
    pub attempt: u32,
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SandboxName {
            name,
            uid,
            namespace,
            attempt,
        } = self;
        write!(f, "{name}_{namespace}_{uid}_{attempt}")
    }
}

/// Who shares a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceMode {
    /// All containers of the pod.
    #[default]
    Pod,
    /// Nobody: one for each container.
    Container,
    /// Everybody on the host.
    Node,
    /// The named container (pid only).
    Target,
}

/// Modes of the namespaces that CRI lets a client choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NamespaceModes {
    /// Network.
    pub network: NamespaceMode,
    /// Process ids.
    pub pid: NamespaceMode,
    /// System V IPC, message queues and /dev/shm.
    pub ipc: NamespaceMode,
    /// The container whose pid namespace is joined with [`NamespaceMode::Target`].
    pub target_id: String,
}

/// resolv.conf as the client wants it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search list.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

/// Transport of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// A port of the pod, and of the host when `host_port` is not 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Transport.
    pub protocol: PortProtocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host; 0: none.
    pub host_port: u16,
    /// Address on the host; none: all.
    pub host_ip: Option<IpAddr>,
}

/// What a client asked of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Its name.
    pub name: SandboxName,
    /// Hostname of its UTS namespace.
    pub hostname: String,
    /// Directory that log paths of containers are relative to.
    pub log_directory: String,
    /// Contents of resolv.conf; none: the host's.
    pub dns: Option<DnsConfig>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Cgroup that the containers' cgroups are made in; empty: one of ours.
    pub cgroup_parent: String,
    /// Namespaces.
    pub namespaces: NamespaceModes,
    /// Sysctls of the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Whether containers may be privileged.
    pub privileged: bool,
    /// Profile of the sandbox's own process, where there is one (pod-init).
    pub seccomp: Option<SeccompRequest>,
    /// Sum of the containers' resources, as the kubelet computed it.
    pub resources: Option<Resources>,
    /// What the pod costs beside its containers.
    pub overhead: Option<Resources>,
}
