//! Owns the capability sets of a container: containerd's default fourteen, ALL, adds, drops,
//! ambient. Pure, but for the set that the daemon itself holds, which is a parameter.

use crate::container::config::SecurityRequest;
use crate::error::{Error, Result};

use super::document::Capabilities;

/// All capabilities in the order of their numbers (linux/capability.h).
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What every container gets unless told otherwise, as containerd gives it.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const FIELD: &str = "config.linux.security_context.capabilities";

/// Capabilities that this process may hand on: its bounding set.
pub fn held(bounding: u64) -> Vec<String> {
    let set = |(bit, name): (usize, &&str)| (bounding >> bit & 1 == 1).then(|| (*name).to_owned());
    ALL.iter().enumerate().filter_map(set).collect()
}

/// The sets of a container: ALL first, then adds, then drops.
pub fn plan(security: &SecurityRequest, held: &[String]) -> Result<Capabilities> {
    let mut set: Vec<String> = if security.privileged {
        held.to_vec()
    } else {
        DEFAULT.iter().map(|c| (*c).to_owned()).collect()
    };
    if !security.privileged {
        let adds = names(&security.add_capabilities, "add_capabilities")?;
        let drops = names(&security.drop_capabilities, "drop_capabilities")?;
        if adds.iter().any(|c| c == "ALL") {
            set = held.to_vec();
        }
        if drops.iter().any(|c| c == "ALL") {
            set.clear();
        }
        for add in adds.into_iter().filter(|c| c != "ALL") {
            if !set.contains(&add) {
                set.push(add);
            }
        }
        set.retain(|c| !drops.contains(c));
    }
    let ambient = names(&security.ambient_capabilities, "add_ambient_capabilities")?;
    for capability in &ambient {
        if capability == "ALL" || !set.contains(capability) {
            // An ambient capability has to be permitted and inheritable: it is added.
            let field = format!("{FIELD}.add_ambient_capabilities");
            if capability == "ALL" {
                return Err(Error::invalid(field, "ALL is not possible here"));
            }
            set.push(capability.clone());
        }
    }
    Ok(Capabilities {
        bounding: set.clone(),
        effective: set.clone(),
        permitted: set,
        inheritable: ambient.clone(),
        ambient,
    })
}

/// Upper-case names with their prefix; `ALL` stays `ALL`.
fn names(list: &[String], which: &str) -> Result<Vec<String>> {
    let mut out = Vec::with_capacity(list.len());
    for name in list {
        let upper = name.to_ascii_uppercase();
        let full = match upper.as_str() {
            "ALL" | "CAP_ALL" => "ALL".to_owned(),
            text if text.starts_with("CAP_") => upper,
            text => format!("CAP_{text}"),
        };
        if full != "ALL" && !ALL.contains(&full.as_str()) {
            let text = format!("{name:?} is no capability");
            return Err(Error::invalid(format!("{FIELD}.{which}"), text));
        }
        out.push(full);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_of(adds: &[&str], drops: &[&str]) -> Vec<String> {
        let list = |l: &[&str]| l.iter().map(|c| (*c).to_owned()).collect();
        let security = SecurityRequest {
            add_capabilities: list(adds),
            drop_capabilities: list(drops),
            ..SecurityRequest::default()
        };
        plan(&security, &held((1 << 41) - 1)).unwrap().effective
    }

    #[test]
    fn sets_follow_all_then_adds_then_drops() {
        assert_eq!(plan_of(&[], &[]).len(), 14);
        assert_eq!(plan_of(&["NET_ADMIN"], &[]).len(), 15);
        assert_eq!(plan_of(&["cap_net_admin"], &["NET_ADMIN"]).len(), 14);
        assert_eq!(plan_of(&["ALL"], &[]).len(), 41);
        assert_eq!(plan_of(&["ALL"], &["CAP_SYS_ADMIN"]).len(), 40);
        assert_eq!(plan_of(&[], &["ALL"]), Vec::<String>::new());
        assert_eq!(plan_of(&["NET_RAW"], &["ALL"]), ["CAP_NET_RAW"]);
    }

    #[test]
    fn unknown_name_is_refused() {
        let security = SecurityRequest {
            add_capabilities: vec!["ROOT".to_owned()],
            ..SecurityRequest::default()
        };
        let error = plan(&security, &[]).unwrap_err().to_string();
        assert!(
            error.contains("add_capabilities") && error.contains("ROOT"),
            "{error}"
        );
    }
}
