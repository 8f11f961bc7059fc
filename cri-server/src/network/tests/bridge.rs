//! Pods on the built-in bridge: addresses, reachability, limits, speed.

use std::time::Instant;

use super::*;

#[test]
fn two_pods_reach_each_other_the_host_and_the_world() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        network.status().unwrap();
        let world = host.world();
        let (a, b) = (host.pod("a"), host.pod("b"));
        let of_a = network.attach(&a).await.unwrap();
        let of_b = network.attach(&b).await.unwrap();
        assert_eq!(of_a.ips, [ip("10.88.0.2")]);
        assert_eq!(of_b.ips, [ip("10.88.0.3")]);
        assert_eq!(of_a.interfaces[0].name, "eth0");
        assert_eq!(of_a.interfaces[0].mac, "0a:58:0a:58:00:02");
        let shown = within(Some(&a.netns), || {
            sh("ip -o addr show eth0; ip route; ip link show eth0")
        });
        assert!(
            shown.contains("10.88.0.2/16") && shown.contains("0a:58:0a:58:00:02"),
            "{shown}"
        );
        assert!(shown.contains("default via 10.88.0.1 dev eth0"), "{shown}");

        let ping = |from: &PodNetwork, to: &str| {
            within(Some(&from.netns), || {
                sh(&format!("busybox ping -c 1 -W 2 {to}"))
            });
        };
        ping(&a, "10.88.0.3");
        ping(&b, "10.88.0.2");
        ping(&a, "10.88.0.1");
        sh("busybox ping -c 1 -W 2 10.88.0.2");

        tcp_server(Some(&b.netns), "0.0.0.0:80");
        assert_eq!(
            tcp_ask(Some(&a.netns), "10.88.0.3:80").unwrap(),
            "10.88.0.2"
        );
        assert_eq!(tcp_ask(None, "10.88.0.3:80").unwrap(), "10.88.0.1");
        // Localhost inside works, and is the pod's own.
        assert_eq!(
            tcp_ask(Some(&b.netns), "127.0.0.1:80").unwrap(),
            "127.0.0.1"
        );
        assert!(tcp_ask(Some(&a.netns), "127.0.0.1:80").is_err());
        // Outside, pods hide behind the host.
        tcp_server(Some(&world), "0.0.0.0:80");
        assert_eq!(
            tcp_ask(Some(&a.netns), "192.0.2.2:80").unwrap(),
            "192.0.2.1"
        );

        let stats = netns::netns_stats(&a.netns).unwrap();
        let eth0 = stats.iter().find(|s| s.name == "eth0").unwrap();
        assert!(eth0.rx_bytes > 0 && eth0.tx_packets > 0, "{stats:?}");
        assert!(stats.iter().any(|s| s.name == "lo"));

        for pod in [&a, &b] {
            network.detach(pod).await.unwrap();
            network.detach(pod).await.unwrap();
        }
        assert_clean(host);
        assert!(network.teardown().await.unwrap());
        assert_eq!(sh("ip -o link show type bridge; nft list ruleset"), "");
    });
}

#[test]
fn router_advertisements_are_refused_in_pods_and_on_the_bridge() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pod = host.pod("a");
        network.attach(&pod).await.unwrap();
        let read = |netns: Option<&Path>, dev: &str| {
            within(netns, || {
                sh(&format!("cat /proc/sys/net/ipv6/conf/{dev}/accept_ra"))
            })
        };
        assert_eq!(read(Some(&pod.netns), "eth0"), "0\n");
        assert_eq!(read(None, "coracle0"), "0\n");
        network.detach(&pod).await.unwrap();
    });
}

#[test]
fn attach_is_idempotent_and_names_a_missing_namespace() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pod = host.pod("a");
        let first = network.attach(&pod).await.unwrap();
        assert_eq!(network.attach(&pod).await.unwrap(), first);
        network.check("a").await.unwrap();
        // Its cable cut, the pod is connected anew.
        sh("ip link del $(ip -o link show type veth | cut -d: -f2 | cut -d@ -f1)");
        assert!(
            network
                .check("a")
                .await
                .unwrap_err()
                .to_string()
                .contains("sandbox a is gone")
        );
        network.attach(&pod).await.unwrap();
        network.check("a").await.unwrap();
        network.detach(&pod).await.unwrap();

        let mut lost = pod.clone();
        lost.netns = host.dir.path().join("none");
        let error = network.attach(&lost).await.unwrap_err().to_string();
        assert!(
            error.contains("open network namespace") && error.contains("/none"),
            "{error}"
        );
        lost.sandbox_id = "../x".to_owned();
        assert_eq!(
            network.attach(&lost).await.unwrap_err().kind(),
            NetworkErrorKind::Invalid
        );
        assert_clean(host);
    });
}

#[test]
fn detach_works_without_the_namespace() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let mut pod = host.pod("a");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        network.attach(&pod).await.unwrap();
        netns::remove(&pod.netns).unwrap();
        network.detach(&pod).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn pod_may_ask_for_its_addresses() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let mut pod = host.pod("a");
        pod.annotations
            .insert(ANNOTATION_IPS.into(), "10.88.7.7".into());
        pod.annotations
            .insert(ANNOTATION_MAC.into(), "02:00:00:00:00:07".into());
        let attached = network.attach(&pod).await.unwrap();
        assert_eq!(attached.ips, [ip("10.88.7.7")]);
        assert_eq!(attached.interfaces[0].mac, "02:00:00:00:00:07");
        let mut other = host.pod("b");
        other
            .annotations
            .insert(ANNOTATION_IPS.into(), "10.88.7.7".into());
        let error = network.attach(&other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "lease address 10.88.7.7: held by sandbox a"
        );
        other
            .annotations
            .insert(ANNOTATION_IPS.into(), "10.88.7.8,10.88.7.9".into());
        let error = network.attach(&other).await.unwrap_err().to_string();
        assert!(error.contains("10.88.7.9 is one address more"), "{error}");
        other.annotations = BTreeMap::from([(ANNOTATION_INGRESS.into(), "1M".into())]);
        let error = network.attach(&other).await.unwrap_err().to_string();
        assert!(error.contains("does not shape traffic"), "{error}");
        network.detach(&pod).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn exhausted_subnet_is_told_and_leaves_nothing() {
    async_on_fresh_host(async |host| {
        let mut config = host.config();
        config.bridge.subnet = Some("10.9.9.0/29".parse().unwrap());
        let network = Network::open(config).unwrap();
        for i in 0..5 {
            network.attach(&host.pod(&format!("p{i}"))).await.unwrap();
        }
        let error = network.attach(&host.pod("p5")).await.unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::Exhausted);
        assert!(
            error.to_string().contains("all 5 addresses are held"),
            "{error}"
        );
        assert_eq!(sh("ip -o link show type veth | wc -l").trim(), "5");
        network.gc(&HashSet::new()).await.unwrap();
        assert_eq!(
            sh("ip -o link show type veth | wc -l").trim(),
            "5",
            "gc took attached pods"
        );
    });
}

#[test]
fn subnet_avoids_the_hosts_routes_or_says_what_is_in_the_way() {
    async_on_fresh_host(async |host| {
        sh(
            "ip link add d0 type veth peer name d1; ip link set d1 up; ip addr add 10.88.5.1/24 dev d0; ip link set d0 up",
        );
        let mut config = host.config();
        config.bridge.subnet = Some("10.88.0.0/16".parse().unwrap());
        let network = Network::open(config.clone()).unwrap();
        let reason = network.status().unwrap_err();
        assert!(
            reason.contains("10.88.0.0/16") && reason.contains("10.88.5.0/24 elsewhere"),
            "{reason}"
        );
        assert_eq!(
            network.attach(&host.pod("a")).await.unwrap_err().kind(),
            NetworkErrorKind::Conflict
        );
        drop(network);
        config.bridge.subnet = None;
        let network = Network::open(config.clone()).unwrap();
        network.status().unwrap();
        let pod = host.pod("b");
        assert_eq!(network.attach(&pod).await.unwrap().ips, [ip("10.89.0.2")]);
        // The choice holds when the obstacle has gone, and a change waits for the pods.
        sh("ip link del d0");
        drop(network);
        let network = Network::open(config.clone()).unwrap();
        assert_eq!(
            network.attach(&host.pod("c")).await.unwrap().ips,
            [ip("10.89.0.3")]
        );
        drop(network);
        config.bridge.subnet = Some("10.50.0.0/16".parse().unwrap());
        let network = Network::open(config).unwrap();
        let reason = network.status().unwrap_err();
        assert!(reason.contains("still has 10.89.0."), "{reason}");
        network.gc(&HashSet::new()).await.unwrap();
        network.status().unwrap();
        assert_eq!(
            network.attach(&host.pod("d")).await.unwrap().ips,
            [ip("10.50.0.2")]
        );
        assert!(!sh("ip -o addr show coracle0").contains("10.89."));
    });
}

#[test]
fn foreign_interface_of_the_name_and_bad_config_are_refused() {
    async_on_fresh_host(async |host| {
        sh("ip link add coracle0 type veth peer name other");
        let network = host.network();
        let reason = network.status().unwrap_err();
        assert!(reason.contains("exists and is not a bridge"), "{reason}");
        // The state is in use.
        let error = Network::open(host.config()).err().unwrap();
        assert!(error.to_string().contains("another daemon"), "{error}");
        let mut config = host.config();
        config.state_dir = host.dir.path().join("other");
        config.bridge.name = "a-very-long-bridge-name".to_owned();
        assert!(Network::open(config.clone()).is_err());
        config.bridge = BridgeConfig::default();
        config.bridge.subnet = Some("fd00::/64".parse().unwrap());
        assert!(Network::open(config).is_err());
    });
}

#[test]
fn forwarding_is_reported_and_changed_only_when_configured() {
    async_on_fresh_host(async |host| {
        let mut config = host.config();
        config.bridge.enable_forwarding = false;
        let network = Network::open(config.clone()).unwrap();
        let reason = network.status().unwrap_err();
        assert!(reason.contains("net.ipv4.ip_forward is 0"), "{reason}");
        network.attach(&host.pod("a")).await.unwrap();
        assert_eq!(sh("sysctl -n net.ipv4.ip_forward"), "0\n");
        drop(network);
        config.bridge.enable_forwarding = true;
        let network = Network::open(config).unwrap();
        network.status().unwrap();
        assert_eq!(sh("sysctl -n net.ipv4.ip_forward"), "1\n");
    });
}

#[test]
fn dual_stack_pods_use_ipv6_at_once() {
    async_on_fresh_host(async |host| {
        let mut config = host.config();
        config.bridge.subnet6 = Some("fd00:10:88::/64".parse().unwrap());
        let network = Network::open(config).unwrap();
        let world = host.world();
        let (mut a, b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        let of_a = network.attach(&a).await.unwrap();
        assert_eq!(of_a.ips, [ip("10.88.0.2"), ip("fd00:10:88::2")]);
        network.attach(&b).await.unwrap();
        tcp_server(Some(&a.netns), "[::]:80");
        assert_eq!(
            tcp_ask(Some(&b.netns), "[fd00:10:88::2]:80").unwrap(),
            "fd00:10:88::3"
        );
        assert_eq!(
            tcp_ask(None, "[fd00:10:88::2]:80").unwrap(),
            "fd00:10:88::1"
        );
        tcp_server(Some(&world), "[::]:80");
        assert_eq!(tcp_ask(Some(&b.netns), "[fd02::2]:80").unwrap(), "fd02::1");
        // Host ports in both families, from outside, from here, from a neighbour and from itself.
        assert_eq!(tcp_ask(Some(&world), "[fd02::1]:8080").unwrap(), "fd02::2");
        assert_eq!(
            tcp_ask(Some(&world), "192.0.2.1:8080").unwrap(),
            "192.0.2.2"
        );
        tcp_ask(None, "[fd02::1]:8080").unwrap();
        tcp_ask(Some(&b.netns), "[fd02::1]:8080").unwrap();
        tcp_ask(Some(&a.netns), "[fd02::1]:8080").unwrap();
        for pod in [&a, &b] {
            network.detach(pod).await.unwrap();
        }
        assert_clean(host);
        assert!(tcp_ask(Some(&world), "[fd02::1]:8080").is_err());
    });
}

#[test]
fn many_pods_at_once_get_different_addresses() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pods: Vec<PodNetwork> = (0..30).map(|i| host.pod(&format!("p{i}"))).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods.clone() {
            let network = network.clone();
            tasks.spawn(async move { network.attach(&pod).await.unwrap().ips[0] });
        }
        let ips: HashSet<IpAddr> = tasks.join_all().await.into_iter().collect();
        assert_eq!(ips.len(), 30);
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods {
            let network = network.clone();
            tasks.spawn(async move { network.detach(&pod).await.unwrap() });
        }
        tasks.join_all().await;
        assert_clean(host);
    });
}

/// Prints rather than asserts: the numbers depend on the machine.
#[test]
fn attach_time_is_measured() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        network.attach(&host.pod("warm")).await.unwrap();
        let (mut create, mut attach, mut detach) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..50 {
            let start = Instant::now();
            let mut pod = host.pod(&format!("p{i}"));
            create.push(start.elapsed());
            if i % 2 == 1 {
                pod.port_mappings = vec![host_port(Protocol::Tcp, 8000 + i, 80)];
            }
            let start = Instant::now();
            network.attach(&pod).await.unwrap();
            attach.push(start.elapsed());
            let start = Instant::now();
            network.detach(&pod).await.unwrap();
            detach.push(start.elapsed());
        }
        for (name, mut times) in [("netns", create), ("attach", attach), ("detach", detach)] {
            times.sort();
            println!(
                "{name}: median {:?}, worst {:?}",
                times[times.len() / 2],
                times[times.len() - 1]
            );
        }
    });
}
