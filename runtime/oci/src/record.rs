//! What the runtime keeps under `<root>/<id>/`: the intent, written before the first side effect,
//! and the container record, written once the container is created. Pure data; `runtime/src/state`
//! reads and writes them.
//!
//! ```text
//! begin --> intent.json --create ok--> state.json + config.json --delete--> (directory gone)
//!               |
//!               +-- killed in between: `delete -f` undoes what the intent names
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ContainerId;

/// Where the container's processes are accounted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    tag = "version"
)]
pub enum CgroupRecord {
    /// No cgroup of its own: a rootless container without delegation.
    #[default]
    None,
    /// Absolute directories by hierarchy name (`cpu`, `cpu,cpuacct`, `name=systemd`, ``).
    V1 {
        paths: BTreeMap<String, PathBuf>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<UnitRecord>,
    },
    /// Absolute directory under the cgroup2 mount.
    V2 {
        path: PathBuf,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<UnitRecord>,
    },
}

/// The systemd unit that a cgroup belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnitRecord {
    /// `runc-id.scope`
    pub name: String,
    /// The systemd of a user session has it, not the system's.
    #[serde(default)]
    pub user: bool,
}

impl CgroupRecord {
    pub fn unit(&self) -> Option<&UnitRecord> {
        match self {
            CgroupRecord::None => None,
            CgroupRecord::V1 { unit, .. } | CgroupRecord::V2 { unit, .. } => unit.as_ref(),
        }
    }

    #[must_use]
    pub fn with_unit(mut self, new: Option<UnitRecord>) -> CgroupRecord {
        match &mut self {
            CgroupRecord::None => {}
            CgroupRecord::V1 { unit, .. } | CgroupRecord::V2 { unit, .. } => *unit = new,
        }
        self
    }
}

/// A process, told apart from a later one with the same pid by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    pub pid: i32,
    /// Clock ticks since boot: field 22 of /proc/pid/stat.
    pub start_time: u64,
}

/// A namespace of the container and the file that joins it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceRecord {
    /// The name of the file under /proc/pid/ns.
    pub kind: String,
    pub path: PathBuf,
}

/// A mount of the container's in the runtime's own mount namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MountRecord {
    pub path: PathBuf,
    /// The kernel's id: tells it from another's mount at that path.
    pub id: u64,
}

/// The container's groups in the resctrl filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResctrlRecord {
    pub group: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<PathBuf>,
    /// The group was made for this container alone, and goes with it.
    pub owned: bool,
}

/// What `create` is about to do, on disk before it does any of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IntentRecord {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub cgroup: CgroupRecord,
    /// Directories of the cgroup that were there before: whatever is in them is another's.
    #[serde(default)]
    pub existing: Vec<PathBuf>,
    /// Processes known so far; the cgroup finds the rest.
    #[serde(default)]
    pub pids: Vec<ProcessRecord>,
    /// Mounts that the parent makes in its own mount namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<ResctrlRecord>,
}

/// A created container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerRecord {
    pub oci_version: String,
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub init_pid: i32,
    pub init_start_time: u64,
    /// RFC 3339 with nanoseconds, UTC.
    pub created: String,
    /// Name of the user who owns the state directory.
    #[serde(default)]
    pub owner: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    pub cgroup: CgroupRecord,
    /// Namespaces that `exec` joins, in the order of joining.
    #[serde(default)]
    pub namespaces: Vec<NamespaceRecord>,
    /// False when the pid namespace is shared with others: then SIGKILL of the init leaves
    /// processes behind, and kill and delete have to walk the cgroup.
    pub private_pid_namespace: bool,
    /// Set for containers whose cgroup may be out of reach without being a fault.
    #[serde(default)]
    pub rootless_cgroups: bool,
    /// `--no-new-keyring`: its processes, those of exec too, keep the caller's session keyring.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// Of a container that shares the runtime's mount namespace: its root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<ResctrlRecord>,
}

impl ContainerRecord {
    pub fn init(&self) -> ProcessRecord {
        ProcessRecord {
            pid: self.init_pid,
            start_time: self.init_start_time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_record_json() {
        let cases: &[(CgroupRecord, &str)] = &[
            (CgroupRecord::None, r#"{"version":"none"}"#),
            (
                CgroupRecord::V2 {
                    path: "/sys/fs/cgroup/a".into(),
                    unit: None,
                },
                r#"{"version":"v2","path":"/sys/fs/cgroup/a"}"#,
            ),
            (
                CgroupRecord::V2 {
                    path: "/sys/fs/cgroup/a".into(),
                    unit: Some(UnitRecord {
                        name: "runc-a.scope".into(),
                        user: true,
                    }),
                },
                r#"{"version":"v2","path":"/sys/fs/cgroup/a","unit":{"name":"runc-a.scope","user":true}}"#,
            ),
            (
                CgroupRecord::V1 {
                    paths: BTreeMap::from([("cpu".to_owned(), "/sys/fs/cgroup/cpu/a".into())]),
                    unit: None,
                },
                r#"{"version":"v1","paths":{"cpu":"/sys/fs/cgroup/cpu/a"}}"#,
            ),
        ];
        for (record, text) in cases {
            assert_eq!(serde_json::to_string(record).unwrap(), *text);
            assert_eq!(serde_json::from_str::<CgroupRecord>(text).unwrap(), *record);
        }
    }
}
