//! Pinned namespaces against the real kernel.

use super::*;
use crate::network::tests::{on_fresh_host, sh};

fn owned(net: bool, ipc: bool) -> Owned {
    Owned { net, ipc }
}

#[test]
fn sysctls_of_an_own_namespace_become_paths() {
    let cases = [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        (
            "net.ipv4.conf.eth0/100.forwarding",
            "net/ipv4/conf/eth0.100/forwarding",
        ),
        (
            "net/ipv4/conf/eth0.100/forwarding",
            "net/ipv4/conf/eth0.100/forwarding",
        ),
        ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced"),
        ("kernel.msgmax", "kernel/msgmax"),
        ("kernel.sem", "kernel/sem"),
        ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
    ];
    for (name, path) in cases {
        let (found, _) = sysctl_path(name, "1", owned(true, true)).unwrap();
        assert_eq!(found, Path::new("/proc/sys").join(path), "{name}");
    }
}

#[test]
fn sysctls_that_reach_further_are_refused() {
    let both = owned(true, true);
    for name in [
        "kernel.core_pattern",
        "kernel.hostname",
        "vm.swappiness",
        "fs.file-max",
        "fs.mqueue",
        "fs.mqueue.a.b",
        "kernel.shm.x",
        "kernel",
        "net",
        "net.",
        "net..ipv4",
        "netx.ipv4",
        "net/../kernel/core_pattern",
        "net/ipv4/../../kernel/core_pattern",
        "net.ipv4.//.kernel.core_pattern",
        "/net/ipv4/ip_forward",
        ".net.ipv4.ip_forward",
        "net.ipv4.ip_forward\n",
        "net.ipv4.ip_forward=1+kernel.core_pattern",
        "net.ipv4.ip forward",
        "",
    ] {
        assert!(sysctl_path(name, "1", both).is_err(), "{name:?}");
    }
    for value in ["1\nkernel.core_pattern=|/x", "1\r", "1\0"] {
        assert!(
            sysctl_path("net.ipv4.ip_forward", value, both).is_err(),
            "{value:?}"
        );
    }
    let refusal = |name, owned| sysctl_path(name, "1", owned).unwrap_err().to_string();
    assert_eq!(
        refusal("net.ipv4.ip_forward", owned(false, true)),
        "sysctl \"net.ipv4.ip_forward\": the pod shares the host's network namespace"
    );
    for name in ["kernel.sem", "fs.mqueue.msg_max"] {
        assert!(refusal(name, owned(true, false)).ends_with("the host's IPC namespace"));
    }
}

fn request<'a>(dir: &Path, sysctls: &'a BTreeMap<String, String>) -> PinRequest<'a> {
    PinRequest {
        net: Some(dir.join("net")),
        ipc: Some(dir.join("ipc")),
        uts: Some(dir.join("uts")),
        hostname: Some("pod-1".to_owned()),
        sysctls,
    }
}

#[test]
fn namespaces_are_pinned_with_their_settings_and_removed() {
    on_fresh_host(|host| {
        let dir = host.dir.path().join("ns");
        let sysctls = BTreeMap::from([
            (
                "net.ipv4.ip_unprivileged_port_start".to_owned(),
                "0".to_owned(),
            ),
            ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
            ("fs.mqueue.msg_max".to_owned(), "17".to_owned()),
            ("kernel.sem".to_owned(), "300 32000 32 128".to_owned()),
        ]);
        let request = request(&dir, &sysctls);
        let before = sh("hostname; readlink /proc/self/ns/net /proc/self/ns/uts /proc/self/ns/ipc");
        let pinned = create(&request).unwrap();
        assert_eq!(pinned.net, Some(dir.join("net")));
        let after = sh("hostname; readlink /proc/self/ns/net /proc/self/ns/uts /proc/self/ns/ipc");
        assert_eq!(before, after, "the caller's own namespaces changed");

        let enter = format!(
            "nsenter --net={0}/net --ipc={0}/ipc --uts={0}/uts",
            dir.display()
        );
        let inside = sh(&format!(
            "{enter} sh -ec 'hostname; cd /proc/sys
             cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced fs/mqueue/msg_max \
                 kernel/sem net/ipv6/conf/default/accept_ra
             ip -o link show lo; ip -o addr show lo'"
        ));
        let lines: Vec<&str> = inside.lines().collect();
        assert_eq!(
            lines[..6],
            ["pod-1", "0", "1", "17", "300\t32000\t32\t128", "0"],
            "{inside}"
        );
        assert!(
            lines[6].contains("LOOPBACK,UP") && inside.contains("127.0.0.1/8"),
            "{inside}"
        );
        assert_eq!(netns_stats(&dir.join("net")).unwrap()[0].name, "lo");

        // A second mount over it, as a lost race leaves it, goes as well.
        sh(&format!("mount --bind {0}/net {0}/net", dir.display()));
        for name in ["net", "ipc", "uts"] {
            remove(&dir.join(name)).unwrap();
            remove(&dir.join(name)).unwrap();
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        assert!(!sh("cat /proc/self/mountinfo").contains(&dir.display().to_string()));
        assert!(netns_stats(&dir.join("net")).is_err());
    });
}

#[test]
fn failed_create_leaves_nothing() {
    on_fresh_host(|host| {
        let dir = host.dir.path().join("ns");
        let left = || {
            let names = std::fs::read_dir(&dir).map_or(0, Iterator::count);
            (
                names,
                sh("cat /proc/self/mountinfo")
                    .matches(&dir.display().to_string())
                    .count(),
            )
        };
        // A value that the kernel refuses.
        let sysctls = BTreeMap::from([(
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "x".to_owned(),
        )]);
        let error = create(&request(&dir, &sysctls)).unwrap_err().to_string();
        assert!(
            error.contains("ip_unprivileged_port_start to \"x\""),
            "{error}"
        );
        assert_eq!(left(), (0, 0));
        // A sysctl that does not exist.
        let sysctls = BTreeMap::from([("net.ipv4.no_such".to_owned(), "1".to_owned())]);
        assert!(create(&request(&dir, &sysctls)).is_err());
        // The last of the three files is already there: the others are taken back.
        let none = BTreeMap::new();
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("uts"), "").unwrap();
        let error = create(&request(&dir, &none)).unwrap_err().to_string();
        assert!(
            error.contains("create namespace file") && error.contains("/uts"),
            "{error}"
        );
        assert_eq!(left(), (1, 0));
        let mut hostless = request(&dir, &none);
        hostless.uts = None;
        assert!(
            create(&hostless)
                .unwrap_err()
                .to_string()
                .contains("shares the host's UTS")
        );
    });
}

#[test]
fn pinned_network_namespace_is_one_of_ip_netns() {
    on_fresh_host(|_| {
        let path = Path::new("/run/netns/coracle-1");
        let pin = || {
            create(&PinRequest {
                net: Some(path.to_owned()),
                ipc: None,
                uts: None,
                hostname: None,
                sysctls: &BTreeMap::new(),
            })
        };
        pin().unwrap();
        assert!(sh("ip netns list").contains("coracle-1"));
        assert!(sh("ip -n coracle-1 -o link").contains("lo"));
        let mountinfo = sh("cat /proc/self/mountinfo");
        let line = mountinfo
            .lines()
            .rfind(|l| l.contains(" /run/netns "))
            .unwrap();
        assert!(line.contains("shared:"), "{line}");
        // `ip netns` and we can remove each other's.
        sh("ip netns add other; ip netns del coracle-1");
        remove(path).unwrap();
        pin().unwrap();
        remove(Path::new("/run/netns/other")).unwrap();
        assert_eq!(sh("ip netns list").trim(), "coracle-1");
        remove(path).unwrap();
    });
}
