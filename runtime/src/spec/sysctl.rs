//! Which sysctls a container may set: only those of namespaces that it owns. Pure.

use crate::error::{Error, Result};

/// Kernel sysctls that belong to the IPC namespace.
const IPC: [&str; 9] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.msg_next_id",
];

/// The namespaces that are the container's own.
#[derive(Debug, Default, Clone, Copy)]
pub struct Owned {
    pub ipc: bool,
    pub network: bool,
    pub uts: bool,
    pub user: bool,
}

pub fn is_network(name: &str) -> bool {
    name.starts_with("net.")
}

/// Rewrites "a/b.c" to the dotted form, as sysctl(8) does: a slash first means that slashes
/// separate and dots are literal.
fn dotted(name: &str) -> String {
    match (name.find('/'), name.find('.')) {
        (Some(slash), Some(dot)) if slash < dot => swap(name),
        (Some(_), None) => swap(name),
        _ => name.to_owned(),
    }
}

fn swap(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '/' => '.',
            '.' => '/',
            c => c,
        })
        .collect()
}

/// Checks one sysctl and gives its path under /proc/sys.
///
/// # Errors
/// It is not namespaced, its namespace is not the container's own, or its name or value could
/// smuggle a second setting (CVE-2022-0811).
pub fn check(name: &str, value: &str, owned: Owned) -> Result<String> {
    if name.is_empty()
        || name.contains(['+', '=', '\n', '\0', ' '])
        || value.contains(['\n', '\0'])
        || name.split(['.', '/']).any(str::is_empty)
    {
        return Err(Error::invalid(format!(
            "sysctl {name:?}: invalid name or value"
        )));
    }
    let dotted = dotted(name);
    let allowed = if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        if !owned.ipc {
            return Err(Error::invalid(format!(
                "sysctl {name:?} is not allowed in the hosts ipc namespace"
            )));
        }
        true
    } else if is_network(&dotted) {
        if !owned.network {
            return Err(Error::invalid(format!(
                "sysctl {name:?} not allowed in host network namespace"
            )));
        }
        true
    } else if dotted == "kernel.domainname" {
        if !owned.uts {
            return Err(Error::invalid(format!(
                "sysctl {name:?} is not allowed in the hosts uts namespace"
            )));
        }
        true
    } else if dotted == "kernel.hostname" {
        return Err(Error::invalid(format!(
            "sysctl {name:?} is not allowed as it conflicts with the OCI \"hostname\" field"
        )));
    } else {
        owned.user && dotted.starts_with("user.")
    };
    if !allowed {
        return Err(Error::invalid(format!(
            "sysctl {name:?} is not in a separate kernel namespace"
        )));
    }
    // A dot inside a component (an interface name) is a slash in the dotted form.
    Ok(swap(&dotted))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Owned = Owned {
        ipc: true,
        network: true,
        uts: true,
        user: true,
    };
    const NONE: Owned = Owned {
        ipc: false,
        network: false,
        uts: false,
        user: false,
    };

    #[test]
    fn sysctl_table() {
        let cases: &[(&str, &str, Owned, Option<&str>)] = &[
            ("net.ipv4.ip_forward", "1", ALL, Some("net/ipv4/ip_forward")),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "1",
                ALL,
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                "1",
                ALL,
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("net.ipv4.ip_forward", "1", NONE, None),
            ("kernel.shmmax", "1", ALL, Some("kernel/shmmax")),
            ("kernel.shmmax", "1", NONE, None),
            ("fs.mqueue.msg_max", "5", ALL, Some("fs/mqueue/msg_max")),
            ("kernel.domainname", "x", ALL, Some("kernel/domainname")),
            ("kernel.domainname", "x", NONE, None),
            ("kernel.hostname", "x", ALL, None),
            ("kernel.core_pattern", "x", ALL, None),
            ("vm.swappiness", "1", ALL, None),
            (
                "user.max_user_namespaces",
                "1",
                ALL,
                Some("user/max_user_namespaces"),
            ),
            ("user.max_user_namespaces", "1", NONE, None),
            (
                "kernel.shm_rmid_forced",
                "1+kernel.core_pattern=|/x",
                ALL,
                Some("kernel/shm_rmid_forced"),
            ),
            (
                "kernel.shm_rmid_forced=1+kernel.core_pattern",
                "x",
                ALL,
                None,
            ),
            (
                "kernel.shm_rmid_forced",
                "1\nkernel.core_pattern=x",
                ALL,
                None,
            ),
            ("net..x", "1", ALL, None),
            ("net.ipv4.conf.../../../kernel/core_pattern", "x", ALL, None),
            ("", "1", ALL, None),
        ];
        for (name, value, owned, want) in cases {
            assert_eq!(
                check(name, value, *owned).ok().as_deref(),
                *want,
                "{name}={value}"
            );
        }
    }
}
