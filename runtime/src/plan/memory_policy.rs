//! `linux.memoryPolicy`: which NUMA nodes a container's memory comes from. Pure.

use coracle_oci::spec::{LinuxMemoryPolicy, MemoryPolicyFlagType, MemoryPolicyModeType};

use super::sets::IdSet;
use crate::error::{Error, Result};

/// What set_mempolicy(2) takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPolicy {
    /// With its flags.
    pub mode: i32,
    pub nodes: IdSet,
}

impl MemoryPolicy {
    /// Plans the policy.
    ///
    /// # Errors
    /// The nodes are no list, or not what the mode takes.
    pub fn new(policy: &LinuxMemoryPolicy) -> Result<Self> {
        let nodes = policy.nodes().as_deref().unwrap_or_default();
        let nodes = if nodes.is_empty() {
            IdSet::default()
        } else {
            IdSet::parse(nodes).map_err(|reason| {
                Error::invalid(format!("invalid memory policy nodes {nodes:?}: {reason}"))
            })?
        };
        use MemoryPolicyModeType as Mode;
        let count = nodes.count();
        match policy.mode() {
            Mode::MpolDefault | Mode::MpolLocal if count > 0 => {
                return Err(Error::invalid(format!(
                    "memory policy mode requires 0 nodes but got {count}"
                )));
            }
            Mode::MpolBind
            | Mode::MpolInterleave
            | Mode::MpolPreferredMany
            | Mode::MpolWeightedInterleave
                if count == 0 =>
            {
                return Err(Error::invalid(
                    "memory policy mode requires at least one node but got 0",
                ));
            }
            _ => {}
        }
        let flags = policy.flags().iter().flatten().map(|flag| flag_bit(*flag));
        Ok(Self {
            mode: flags.fold(mode_number(policy.mode()), |mode, flag| mode | flag),
            nodes,
        })
    }
}

/// include/uapi/linux/mempolicy.h
fn mode_number(mode: MemoryPolicyModeType) -> i32 {
    match mode {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    }
}

fn flag_bit(flag: MemoryPolicyFlagType) -> i32 {
    match flag {
        MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
        MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn plan(policy: Value) -> std::result::Result<(i32, String), String> {
        let policy: LinuxMemoryPolicy = serde_json::from_value(policy).unwrap();
        MemoryPolicy::new(&policy)
            .map(|planned| (planned.mode, planned.nodes.to_string()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn policies_become_numbers() {
        let cases = [
            (json!({"mode": "MPOL_DEFAULT"}), 0, "0x0"),
            (json!({"mode": "MPOL_PREFERRED"}), 1, "0x0"),
            (json!({"mode": "MPOL_PREFERRED", "nodes": "1"}), 1, "0x2"),
            (
                json!({"mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]}),
                2 | 0x8000,
                "0x3",
            ),
            (
                json!({"mode": "MPOL_INTERLEAVE", "nodes": "0", "flags": ["MPOL_F_RELATIVE_NODES"]}),
                3 | 0x4000,
                "0x1",
            ),
            (json!({"mode": "MPOL_LOCAL", "nodes": ""}), 4, "0x0"),
            (
                json!({"mode": "MPOL_PREFERRED_MANY", "nodes": "0", "flags": ["MPOL_F_NUMA_BALANCING"]}),
                5 | 0x2000,
                "0x1",
            ),
            (
                json!({"mode": "MPOL_WEIGHTED_INTERLEAVE", "nodes": "3"}),
                6,
                "0x8",
            ),
        ];
        for (policy, mode, nodes) in cases {
            assert_eq!(
                plan(policy.clone()),
                Ok((mode, nodes.to_owned())),
                "{policy}"
            );
        }
    }

    #[test]
    fn refusals_are_runcs() {
        let cases = [
            (
                json!({"mode": "MPOL_DEFAULT", "nodes": "0-7"}),
                "memory policy mode requires 0 nodes but got 8",
            ),
            (
                json!({"mode": "MPOL_LOCAL", "nodes": "3"}),
                "memory policy mode requires 0 nodes but got 1",
            ),
            (
                json!({"mode": "MPOL_BIND"}),
                "memory policy mode requires at least one node but got 0",
            ),
            (
                json!({"mode": "MPOL_BIND", "nodes": "0-9876543210"}),
                "invalid memory policy nodes \"0-9876543210\"",
            ),
        ];
        for (policy, want) in cases {
            let got = plan(policy).unwrap_err();
            assert!(got.starts_with(want), "{got}");
        }
    }
}
