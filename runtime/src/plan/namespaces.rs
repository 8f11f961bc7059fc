//! Which namespaces the clone makes, which are joined, and how the ids map. Pure.
//!
//! ```text
//! plain      clone3(all new but net)              child joins net and the rest by setns
//! userns     clone3(all new | NEWUSER)            parent writes the maps
//! both       clone3 -> stage: setns(all paths) -> clone3(CLONE_PARENT | all new)
//! ```
//!
//! The stage is for a user namespace together with joined ones: a process that has entered a user
//! namespace can no longer join what the host's owns, and what it makes belongs to that namespace.

use std::ffi::CString;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;

use coracle_oci::spec::{LinuxIdMapping, LinuxNamespaceType as Kind};

use super::{c_string, namespace_flag};
use crate::error::Result;
use crate::host::HostFacts;
use crate::spec::CheckedSpec;

/// A namespace joined by path.
#[derive(Debug)]
pub struct JoinStep {
    pub kind: Kind,
    pub flag: u64,
    pub path: CString,
}

/// The namespaces of a container.
#[derive(Debug, Default)]
pub struct NamespacePlan {
    /// CLONE_NEW* of the one clone: all new namespaces but those that the child unshares.
    pub clone_flags: u64,
    /// Unshared by the child once it is in its cgroup: the namespace's root is where it stands.
    pub new_cgroup: bool,
    /// Somebody else makes the child's cgroup and puts it there, after the clone.
    pub late_cgroup: bool,
    pub new_time: bool,
    /// Unshared by the child, too: the root of its mqueue belongs to who makes the namespace, and
    /// at the clone of a user namespace that is nobody in it.
    pub late_ipc: bool,
    /// "monotonic 1 0\nboottime ...", written before the time namespace is entered.
    pub time_offsets: Option<String>,
    pub joins: Vec<JoinStep>,
    pub new_user: bool,
    pub joined_user: bool,
    pub new_network: bool,
    /// Made by the parent while the child mounts: see `crate::launch::network`.
    pub network_apart: bool,
    /// Whether the runtime can leave the host's namespaces and come back: not from inside a user
    /// namespace, as under rootless podman, which does not own them.
    pub returns: bool,
    pub new_pid: bool,
    pub uid_map: String,
    pub gid_map: String,
    pub uid_mappings: Vec<LinuxIdMapping>,
    pub gid_mappings: Vec<LinuxIdMapping>,
    /// False where an unprivileged caller has to give up setgroups(2) to write a gid map.
    pub setgroups_allowed: bool,
}

impl NamespacePlan {
    pub(super) fn new(spec: &CheckedSpec, host: &HostFacts) -> Result<Self> {
        let wanted = spec.namespaces();
        let linux = spec.spec().linux().as_ref();
        let mut plan = Self {
            new_cgroup: wanted.creates(Kind::Cgroup),
            new_time: wanted.creates(Kind::Time),
            late_ipc: wanted.creates(Kind::User) && wanted.creates(Kind::Ipc),
            new_user: wanted.creates(Kind::User),
            joined_user: wanted.joins(Kind::User).is_some(),
            new_network: wanted.creates(Kind::Network),
            new_pid: wanted.creates(Kind::Pid),
            ..Self::default()
        };
        for kind in wanted.created() {
            let late = *kind == Kind::Ipc && plan.late_ipc;
            if !late && !matches!(kind, Kind::Cgroup | Kind::Time) {
                plan.clone_flags |= namespace_flag(*kind);
            }
        }
        // Devices move to where the child is from the first.
        let devices = linux.and_then(|linux| linux.net_devices().as_ref());
        let devices = devices.is_some_and(|devices| !devices.is_empty());
        plan.returns = !host.in_user_namespace;
        plan.network_apart = plan.new_network && !plan.has_user() && !devices && plan.returns;
        if plan.network_apart {
            plan.clone_flags &= !namespace_flag(Kind::Network);
        }
        for (kind, path) in wanted.joined() {
            plan.joins.push(JoinStep {
                kind: *kind,
                flag: namespace_flag(*kind),
                path: c_string("linux.namespaces", path.as_os_str().as_bytes())?,
            });
        }
        // The user namespace comes last: joining it gives up the right to join the host's others.
        plan.joins.sort_by_key(|join| join.kind == Kind::User);
        if let Some(linux) = linux {
            plan.uid_mappings = linux.uid_mappings().clone().unwrap_or_default();
            plan.gid_mappings = linux.gid_mappings().clone().unwrap_or_default();
            plan.uid_map = id_map(&plan.uid_mappings);
            plan.gid_map = id_map(&plan.gid_mappings);
            plan.time_offsets = time_offsets(linux.time_offsets().as_ref());
        }
        // An unprivileged caller writes a map of its own gid only, and loses setgroups(2) by it; more
        // take newgidmap(1), which keeps it.
        let own = matches!(plan.gid_mappings.as_slice(),
            [one] if one.host_id() == host.egid && one.size() == 1);
        plan.setgroups_allowed = host.setgroups && (!plan.new_user || host.is_root() || !own);
        Ok(plan)
    }

    /// Whether ids in the container are not the host's.
    pub fn has_user(&self) -> bool {
        self.new_user || self.joined_user
    }

    /// Whether the join has to happen before the clone, in a process of its own.
    pub fn needs_stage(&self) -> bool {
        let pid = |join: &JoinStep| join.kind == Kind::Pid;
        !self.joins.is_empty() && (self.has_user() || (!self.returns && self.joins.iter().any(pid)))
    }

    /// Whether the child has to be told to go on before it enters its last namespaces and mounts
    /// anything: its cgroup namespace begins, and its cgroup mount ends, in a cgroup that is there.
    pub fn waits(&self) -> bool {
        // What a stage's child asks for must not overtake the stage's word of who it is.
        self.waits_for_maps() || self.late_cgroup || self.joined_user
    }

    /// Whether the child may go on before the parent has written the id maps.
    pub fn waits_for_maps(&self) -> bool {
        self.new_user
    }
}

/// The text of uid_map and gid_map.
pub fn id_map(mappings: &[LinuxIdMapping]) -> String {
    let mut text = String::new();
    for mapping in mappings {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{} {} {}",
            mapping.container_id(),
            mapping.host_id(),
            mapping.size()
        );
    }
    text
}

fn time_offsets(
    offsets: Option<&std::collections::HashMap<String, coracle_oci::spec::LinuxTimeOffset>>,
) -> Option<String> {
    let mut lines: Vec<String> = offsets?
        .iter()
        .map(|(clock, offset)| {
            format!(
                "{clock} {} {}\n",
                offset.secs().unwrap_or(0),
                offset.nanosecs().unwrap_or(0)
            )
        })
        .collect();
    lines.sort();
    (!lines.is_empty()).then(|| lines.concat())
}
