//! Owns what a client asked of a container, parsed once from the CRI (grpc/convert). Plain data:
//! no wire types, no I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::sandbox::config::NamespaceModes;

/// Name and attempt, unique within a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerName {
    /// Name.
    pub name: String,
    /// Tells restarts apart.
    pub attempt: u32,
}

/// An image as the client named it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// Reference or id.
    pub image: String,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The name in the pod's spec.
    pub user_specified_image: String,
    /// The runtime handler that the image was pulled for.
    pub runtime_handler: String,
}

/// How mounts travel between a mount's source and the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// From the host.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// A bind mount from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// Where in the container.
    pub container_path: String,
    /// From where on the host.
    pub host_path: String,
    /// Read-only.
    pub readonly: bool,
    /// Read-only for mounts below as well.
    pub recursive_read_only: bool,
    /// Set the SELinux label.
    pub selinux_relabel: bool,
    /// Propagation.
    pub propagation: Propagation,
}

/// A host device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRequest {
    /// Where in the container.
    pub container_path: String,
    /// Which on the host: a device, or a directory of them.
    pub host_path: String,
    /// Some of `rwm`.
    pub permissions: String,
}

/// Limits. Zero and empty mean "not asked for".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// CFS period in microseconds.
    pub cpu_period: i64,
    /// CFS quota in microseconds; negative: none.
    pub cpu_quota: i64,
    /// Relative weight.
    pub cpu_shares: i64,
    /// Bytes; negative: none.
    pub memory_limit: i64,
    /// Memory plus swap in bytes; negative: none.
    pub memory_swap_limit: i64,
    /// OOM score adjustment.
    pub oom_score_adj: i64,
    /// Cpus.
    pub cpuset_cpus: String,
    /// Memory nodes.
    pub cpuset_mems: String,
    /// Page size (such as `2MB`) and limit in bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files and values.
    pub unified: BTreeMap<String, String>,
}

/// A seccomp profile as CRI names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompRequest {
    /// Ours.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// The one in this file.
    Localhost(String),
}

/// An AppArmor profile as CRI names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AppArmorRequest {
    /// Ours.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A loaded one.
    Localhost(String),
}

/// Who the process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserRequest {
    /// Numeric uid.
    pub uid: Option<u32>,
    /// Numeric gid.
    pub gid: Option<u32>,
    /// Name, resolved in the image.
    pub username: String,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
    /// Ignore the groups that the image's /etc/group gives the user.
    pub strict_groups: bool,
}

/// Everything about isolation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SecurityRequest {
    /// All capabilities, devices and paths of the host.
    pub privileged: bool,
    /// Namespaces.
    pub namespaces: NamespaceModes,
    /// User and groups.
    pub user: UserRequest,
    /// Capabilities added to the default set.
    pub add_capabilities: Vec<String>,
    /// Capabilities taken from it.
    pub drop_capabilities: Vec<String>,
    /// Capabilities raised into the ambient set.
    pub ambient_capabilities: Vec<String>,
    /// Read-only root file system.
    pub readonly_rootfs: bool,
    /// Set no_new_privs.
    pub no_new_privs: bool,
    /// Paths hidden; empty: the default list.
    pub masked_paths: Vec<String>,
    /// Paths made read-only; empty: the default list.
    pub readonly_paths: Vec<String>,
    /// Seccomp profile; none: unconfined.
    pub seccomp: Option<SeccompRequest>,
    /// AppArmor profile; none: nothing asked.
    pub apparmor: Option<AppArmorRequest>,
    /// SELinux label parts (user, role, type, level); none: nothing asked.
    pub selinux: Option<[String; 4]>,
}

/// What a client asked of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Name and attempt.
    pub name: ContainerName,
    /// Image.
    pub image: ImageRequest,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's cmd.
    pub args: Vec<String>,
    /// Working directory; empty: the image's.
    pub working_dir: String,
    /// Environment, over the image's.
    pub envs: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<MountRequest>,
    /// Devices.
    pub devices: Vec<DeviceRequest>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Log file, relative to the sandbox's log directory.
    pub log_path: String,
    /// Keep standard input open.
    pub stdin: bool,
    /// Close standard input after the first attachment.
    pub stdin_once: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// Limits, as far as asked for.
    pub resources: Option<Resources>,
    /// Isolation.
    pub security: SecurityRequest,
    /// CRI's number of the stop signal; 0: the image's.
    pub stop_signal: i32,
}
