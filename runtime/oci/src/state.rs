//! The JSON documents about a container's state: what hooks read on stdin (the runtime spec's
//! State) and what `state` and `list` print (runc's superset of it).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::record::ContainerRecord;

/// The runtime spec's states, and runc's `paused`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Between the first side effect of `create` and its end.
    Creating,
    /// Waiting for `start`.
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub const ALL: [Status; 5] = [
        Status::Creating,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Stopped,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The State document of the runtime spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub oci_version: String,
    pub id: String,
    pub status: Status,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pid: i32,
    pub bundle: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl State {
    pub fn new(record: &ContainerRecord, status: Status) -> State {
        State {
            oci_version: record.oci_version.clone(),
            id: record.id.as_str().to_owned(),
            status,
            pid: if status == Status::Stopped {
                0
            } else {
                record.init_pid
            },
            bundle: record.bundle.to_string_lossy().into_owned(),
            annotations: record.annotations.clone(),
        }
    }
}

/// What `state` and `list --format json` print, in runc's order of members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    pub status: Status,
    pub bundle: String,
    pub rootfs: String,
    pub created: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    pub owner: String,
}

impl StateReport {
    pub fn new(record: &ContainerRecord, status: Status) -> StateReport {
        StateReport {
            oci_version: record.oci_version.clone(),
            id: record.id.as_str().to_owned(),
            pid: if status == Status::Stopped {
                0
            } else {
                record.init_pid
            },
            status,
            bundle: record.bundle.to_string_lossy().into_owned(),
            rootfs: record.rootfs.to_string_lossy().into_owned(),
            created: record.created.clone(),
            annotations: record.annotations.clone(),
            owner: record.owner.clone(),
        }
    }
}

// serde's skip_serializing_if passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(pid: &i32) -> bool {
    *pid == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ContainerId;
    use crate::record::CgroupRecord;

    fn record() -> ContainerRecord {
        ContainerRecord {
            oci_version: "1.2.0".into(),
            id: ContainerId::parse("c1").unwrap(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            init_pid: 42,
            init_start_time: 7,
            created: "2026-11-20T09:15:32Z".into(),
            owner: "root".into(),
            annotations: BTreeMap::new(),
            cgroup: CgroupRecord::None,
            namespaces: Vec::new(),
            private_pid_namespace: true,
            rootless_cgroups: false,
            no_new_keyring: false,
            mounts: Vec::new(),
            resctrl: None,
        }
    }

    #[test]
    fn report_has_runcs_member_order() {
        assert_eq!(
            serde_json::to_string(&StateReport::new(&record(), Status::Running)).unwrap(),
            concat!(
                r#"{"ociVersion":"1.2.0","id":"c1","pid":42,"status":"running","bundle":"/b","#,
                r#""rootfs":"/b/rootfs","created":"2026-11-20T09:15:32Z","owner":"root"}"#
            )
        );
    }

    #[test]
    fn stopped_container_has_no_pid() {
        assert_eq!(StateReport::new(&record(), Status::Stopped).pid, 0);
        let state = serde_json::to_string(&State::new(&record(), Status::Stopped)).unwrap();
        assert_eq!(
            state,
            r#"{"ociVersion":"1.2.0","id":"c1","status":"stopped","bundle":"/b"}"#
        );
    }
}
