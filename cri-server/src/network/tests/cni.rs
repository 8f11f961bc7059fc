//! CNI with the reference plugins of the distribution, and with small ones of our own where a
//! misbehaving or a newer plugin is needed.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;

const PLUGINS: &str = "/usr/lib/cni";

/// The reference plugins are there, or the test says that it is skipped.
fn have_plugins() -> bool {
    let have = Path::new(PLUGINS).join("bridge").exists();
    if !have {
        say_skipped(&format!("no CNI plugins in {PLUGINS}"));
    }
    have
}

fn conf(host: &Host, file: &str, value: &Value) {
    let dir = host.config().cni_conf_dir;
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(file), value.to_string()).unwrap();
}

fn plugin(host: &Host, name: &str, script: &str) {
    let dir = &host.config().cni_bin_dirs[0];
    std::fs::create_dir_all(dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
}

fn auto(host: &Host) -> Network {
    Network::open(NetworkConfig {
        mode: Mode::Auto,
        ..host.config()
    })
    .unwrap()
}

fn bridge_plugin(host: &Host) -> Value {
    json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
        "hairpinMode": true, "capabilities": {"mac": true, "ips": true},
        "ipam": {
            "type": "host-local", "dataDir": host.dir.path().join("host-local"),
            "ranges": [[{"subnet": "10.22.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    })
}

fn chain(host: &Host, version: &str) -> Value {
    let mut plugins = vec![
        bridge_plugin(host),
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}),
    ];
    // The firewall plugin speaks 0.4.0 and later only.
    if version != "0.3.1" {
        plugins.push(json!({"type": "firewall", "backend": "iptables"}));
    }
    json!({"cniVersion": version, "name": "testnet", "plugins": plugins})
}

fn host_local_leases(host: &Host) -> Vec<String> {
    let dir = host.dir.path().join("host-local/testnet");
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.parse::<IpAddr>().is_ok()).collect()
}

fn cached(host: &Host) -> usize {
    std::fs::read_dir(host.config().cni_cache_dir)
        .unwrap()
        .count()
}

/// Nothing of any pod is left by the plugins or by us.
fn assert_cni_clean(host: &Host) {
    assert_eq!(host_local_leases(host), [""; 0]);
    assert_eq!(cached(host), 0);
    assert_eq!(sh("ip -o link show type veth | grep -v up0 || true"), "");
    let rules = sh("iptables-save");
    assert!(
        !rules.contains("10.22.0.") && !rules.contains("CNI-DN-"),
        "{rules}"
    );
}

#[test]
fn reference_chain_connects_pods_in_every_version() {
    if !have_plugins() {
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        async_on_fresh_host(async |host| {
            sh("sysctl -qw net.ipv4.ip_forward=1");
            conf(host, "10-test.conflist", &chain(host, version));
            let network = auto(host);
            network.status().unwrap();
            assert_eq!(network.describe()["provider"], "cni");
            let world = host.world();
            let (mut a, mut b) = (host.pod("a"), host.pod("b"));
            a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
            b.annotations = BTreeMap::from([(ANNOTATION_MAC.into(), "02:00:00:00:00:0b".into())]);
            let of_a = network.attach(&a).await.unwrap();
            assert_eq!(of_a.ips, [ip("10.22.0.2")], "{version}");
            assert_eq!(network.attach(&a).await.unwrap(), of_a);
            let result = of_a.cni_result.unwrap();
            assert_eq!(result["cniVersion"], version);
            let of_b = network.attach(&b).await.unwrap();
            assert!(of_b.interfaces.iter().any(|i| i.mac == "02:00:00:00:00:0b"));
            within(Some(&a.netns), || {
                assert_eq!(sh("cat /proc/sys/net/core/somaxconn"), "500\n");
                assert_eq!(sh("cat /proc/sys/net/ipv6/conf/eth0/accept_ra"), "0\n");
                sh("busybox ping -c 1 -W 2 10.22.0.3");
            });
            tcp_server(Some(&a.netns), "0.0.0.0:80");
            assert_eq!(
                tcp_ask(Some(&b.netns), "10.22.0.2:80").unwrap(),
                "10.22.0.3"
            );
            assert_eq!(
                tcp_ask(Some(&world), "192.0.2.1:8080").unwrap(),
                "192.0.2.2"
            );
            tcp_ask(None, "127.0.0.1:8080").unwrap();
            // Not of a pod with ports: this portmap's CHECK looks for IPv6 rules without IPv6.
            network.check("b").await.unwrap();
            for pod in [&a, &b] {
                network.detach(pod).await.unwrap();
                network.detach(pod).await.unwrap();
            }
            assert_cni_clean(host);
        });
    }
}

#[test]
fn old_single_plugin_file_and_loopback_work() {
    if !have_plugins() {
        return;
    }
    async_on_fresh_host(async |host| {
        let mut single = bridge_plugin(host);
        single["name"] = json!("testnet");
        single["cniVersion"] = json!("0.2.0");
        conf(host, "10-test.conf", &single);
        let network = auto(host);
        let pod = host.pod("a");
        let attached = network.attach(&pod).await.unwrap();
        assert_eq!(attached.ips, [ip("10.22.0.2")]);
        network.detach(&pod).await.unwrap();
        assert_cni_clean(host);
        let lo = json!({"cniVersion": "1.0.0", "name": "lo", "type": "loopback"});
        conf(host, "05-lo.conf", &lo);
        let attached = network.attach(&pod).await.unwrap();
        assert!(attached.ips.contains(&ip("127.0.0.1")));
        network.detach(&pod).await.unwrap();
    });
}

#[test]
fn detach_needs_neither_namespace_nor_conf_nor_cache() {
    if !have_plugins() {
        return;
    }
    async_on_fresh_host(async |host| {
        let file = host.config().cni_conf_dir.join("10-test.conflist");
        let network_conf = chain(host, "1.0.0");
        conf(host, "10-test.conflist", &network_conf);
        let network = auto(host);
        let mut pod = host.pod("a");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        network.attach(&pod).await.unwrap();
        // The namespace is gone and the file is another one.
        netns::remove(&pod.netns).unwrap();
        std::fs::remove_file(&file).unwrap();
        network.detach(&pod).await.unwrap();
        // The bridge plugin itself leaves its masquerade rules when the namespace went first, so
        // the rest is looked at one by one.
        assert_eq!((host_local_leases(host).len(), cached(host)), (0, 0));
        // The kernel takes the pod's end, and the host's with it, once it gets to the namespace.
        let gone = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !sh("ip -o link show type veth").is_empty() && std::time::Instant::now() < gone {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(sh("ip -o link show type veth"), "");
        assert!(!sh("iptables-save").contains("CNI-DN-"));

        conf(host, "10-test.conflist", &network_conf);
        let mut pod = host.pod("b");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        network.attach(&pod).await.unwrap();
        std::fs::remove_dir_all(host.config().cni_cache_dir).unwrap();
        network.detach(&pod).await.unwrap();
        std::fs::create_dir_all(host.config().cni_cache_dir).unwrap();
        assert_eq!(host_local_leases(host), [""; 0]);
        assert_eq!(sh("ip -o link show type veth"), "");
    });
}

#[test]
fn gc_deletes_what_a_crash_left() {
    if !have_plugins() {
        return;
    }
    async_on_fresh_host(async |host| {
        conf(host, "10-test.conflist", &chain(host, "1.0.0"));
        let network = auto(host);
        let (a, b) = (host.pod("a"), host.pod("b"));
        network.attach(&a).await.unwrap();
        network.attach(&b).await.unwrap();
        drop(network);
        let network = auto(host);
        network.gc(&HashSet::from(["b".to_owned()])).await.unwrap();
        assert_eq!(host_local_leases(host), ["10.22.0.3"]);
        // A cache entry that cannot be read is dropped, one that is being written is not seen.
        std::fs::write(host.config().cni_cache_dir.join("x.json"), "{").unwrap();
        network.gc(&HashSet::new()).await.unwrap();
        assert_cni_clean(host);
    });
}

#[test]
fn failing_plugin_is_quoted_and_undone() {
    if !have_plugins() {
        return;
    }
    async_on_fresh_host(async |host| {
        let log = host.dir.path().join("calls");
        plugin(
            host,
            "broken",
            &format!(
                "echo $CNI_COMMAND >> {0}
                 [ $CNI_COMMAND = DEL ] && exit 0
                 echo '{{\"code\":999,\"msg\":\"cni0 already has an IP address\",\"details\":\"no\"}}'
                 exit 1",
                log.display()
            ),
        );
        let mut list = chain(host, "1.0.0");
        list["plugins"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "broken"}));
        conf(host, "10-test.conflist", &list);
        let network = auto(host);
        let mut pod = host.pod("a");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        let error = network.attach(&pod).await.unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::Plugin);
        assert_eq!(
            error.to_string(),
            "sandbox a: plugin type=\"broken\" name=\"testnet\" failed (add): \
             cni0 already has an IP address; no"
        );
        assert_eq!(std::fs::read_to_string(log).unwrap(), "ADD\nDEL\n");
        assert_cni_clean(host);
    });
}

#[test]
fn hanging_plugin_is_killed_in_time() {
    async_on_fresh_host(async |host| {
        plugin(host, "slow", "[ $CNI_COMMAND = DEL ] && exit 0; sleep 60");
        conf(
            host,
            "1.conf",
            &json!({"cniVersion": "1.0.0", "name": "n", "type": "slow"}),
        );
        let config = NetworkConfig {
            mode: Mode::Cni,
            cni_timeout_seconds: 1,
            ..host.config()
        };
        let network = Network::open(config).unwrap();
        let error = network.attach(&host.pod("a")).await.unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::Timeout);
        assert!(
            error
                .to_string()
                .ends_with("failed (add): no answer within 1 s; killed"),
            "{error}"
        );
        assert_eq!(cached(host), 0);
    });
}

#[test]
fn status_follows_the_directory_without_restart() {
    async_on_fresh_host(async |host| {
        let config = NetworkConfig {
            mode: Mode::Cni,
            ..host.config()
        };
        let network = Network::open(config).unwrap();
        let reason = network.status().unwrap_err();
        assert!(
            reason.starts_with("no valid network configuration in "),
            "{reason}"
        );
        let error = network.attach(&host.pod("a")).await.unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::NotReady);
        conf(host, "00-bad.conf", &json!({"name": "x", "type": "../sh"}));
        let reason = network.status().unwrap_err();
        assert!(
            reason.contains("00-bad.conf: plugin \"type\" \"../sh\" is not a bare"),
            "{reason}"
        );
        conf(host, "10-n.conf", &json!({"name": "n", "type": "mine"}));
        let reason = network.status().unwrap_err();
        assert!(
            reason.starts_with("failed to find plugin \"mine\" in path ["),
            "{reason}"
        );
        plugin(host, "mine", "exit 0");
        network.status().unwrap();
        assert_eq!(
            network.describe()["cni"]["skipped"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
    });
}

#[test]
fn auto_takes_each_pod_off_by_whoever_connected_it() {
    if !have_plugins() {
        return;
    }
    async_on_fresh_host(async |host| {
        let network = auto(host);
        assert_eq!(network.describe()["provider"], "bridge");
        assert_eq!(sh("ip -o link show type bridge"), "", "made without need");
        let (a, b) = (host.pod("a"), host.pod("b"));
        assert_eq!(network.attach(&a).await.unwrap().ips, [ip("10.88.0.2")]);
        conf(host, "10-test.conflist", &chain(host, "1.0.0"));
        assert_eq!(network.attach(&b).await.unwrap().ips, [ip("10.22.0.2")]);
        network.detach(&a).await.unwrap();
        assert_eq!(host_local_leases(host), ["10.22.0.2"]);
        std::fs::remove_dir_all(host.config().cni_conf_dir).unwrap();
        network.detach(&b).await.unwrap();
        assert_cni_clean(host);
        assert_clean(host);
    });
}

/// STATUS and GC came with 1.1.0, newer than the distribution's plugins.
#[test]
fn status_and_gc_verbs_are_used_from_1_1_0_on() {
    async_on_fresh_host(async |host| {
        let calls = host.dir.path().join("calls");
        let ready = host.dir.path().join("ready");
        plugin(
            host,
            "new",
            &format!(
                "in=$(cat); echo \"$CNI_COMMAND $in\" >> {0}
                 case $CNI_COMMAND in
                 ADD) echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.3.0.9/24\"}}]}}';;
                 STATUS) [ -e {1} ] || {{ echo '{{\"code\":50,\"msg\":\"no backend\"}}'; exit 1; }};;
                 esac",
                calls.display(),
                ready.display()
            ),
        );
        let list = json!({
            "cniVersions": ["1.0.0", "1.1.0"], "cniVersion": "1.0.0", "name": "n",
            "plugins": [{"type": "new", "capabilities": {"dns": true, "cgroupPath": true}}],
        });
        conf(host, "1.conflist", &list);
        let network = auto(host);
        let settled = async || {
            for _ in 0..200 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if !network.status().is_err_and(|reason| reason.contains("yet")) {
                    break;
                }
            }
            network.status()
        };
        assert_eq!(
            settled().await.unwrap_err(),
            "CNI plugin \"new\": no backend"
        );
        std::fs::write(&ready, "").unwrap();
        // Another file state is another network: asked at once.
        conf(
            host,
            "1.conflist",
            &json!({"x": 1, "cniVersion": "1.1.0", "name": "n", "plugins": list["plugins"]}),
        );
        settled().await.unwrap();

        let mut pod = host.pod("a");
        pod.cgroup_parent = "/pods/a".into();
        pod.dns.servers = vec!["10.0.0.10".into()];
        network.attach(&pod).await.unwrap();
        network.gc(&HashSet::new()).await.unwrap();
        network.check("a").await.unwrap();
        network.detach(&pod).await.unwrap();
        let text = std::fs::read_to_string(calls).unwrap();
        let call = |verb: &str| -> Value {
            let line = text.lines().rfind(|l| l.starts_with(verb)).unwrap();
            serde_json::from_str(&line[verb.len()..]).unwrap()
        };
        assert_eq!(call("ADD")["runtimeConfig"]["cgroupPath"], "/pods/a");
        assert_eq!(
            call("ADD")["runtimeConfig"]["dns"]["servers"][0],
            "10.0.0.10"
        );
        assert!(call("ADD").get("prevResult").is_none());
        let valid = json!([{"containerID": "a", "ifname": "eth0"}]);
        assert_eq!(call("GC")["cni.dev/valid-attachments"], valid);
        assert_eq!(
            call("CHECK")["prevResult"]["ips"][0]["address"],
            "10.3.0.9/24"
        );
        assert_eq!(
            call("DEL")["prevResult"]["ips"][0]["address"],
            "10.3.0.9/24"
        );
    });
}
