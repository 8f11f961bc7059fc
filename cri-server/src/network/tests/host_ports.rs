//! Host ports on the built-in bridge.

use super::*;

#[test]
fn host_port_answers_from_everywhere_until_detach() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let world = host.world();
        let (mut a, b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        network.attach(&a).await.unwrap();
        network.attach(&b).await.unwrap();
        tcp_server(Some(&a.netns), "0.0.0.0:80");
        // From outside the client's address is kept.
        assert_eq!(
            tcp_ask(Some(&world), "192.0.2.1:8080").unwrap(),
            "192.0.2.2"
        );
        assert_eq!(
            tcp_ask(Some(&world), "192.0.2.9:8080").unwrap(),
            "192.0.2.2"
        );
        tcp_ask(None, "192.0.2.1:8080").unwrap();
        assert_eq!(tcp_ask(None, "127.0.0.1:8080").unwrap(), "10.88.0.1");
        tcp_ask(None, "10.88.0.1:8080").unwrap();
        for pod in [&a, &b] {
            for address in ["192.0.2.1:8080", "10.88.0.1:8080"] {
                assert_eq!(tcp_ask(Some(&pod.netns), address).unwrap(), "10.88.0.1");
            }
        }
        // Another machine's port 8080 is not ours to take.
        tcp_server(Some(&world), "0.0.0.0:8080");
        assert_eq!(
            tcp_ask(Some(&b.netns), "192.0.2.2:8080").unwrap(),
            "192.0.2.1"
        );
        assert!(tcp_ask(Some(&world), "192.0.2.1:8081").is_err());

        network.detach(&a).await.unwrap();
        assert!(tcp_ask(Some(&world), "192.0.2.1:8080").is_err());
        assert!(tcp_ask(None, "127.0.0.1:8080").is_err());
        network.detach(&b).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn host_port_without_bridge_netfilter_answers_too() {
    async_on_fresh_host(async |host| {
        // Machines differ in this; the rest of the tests run with the kernel's default.
        let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        let network = host.network();
        let mut pod = host.pod("a");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        network.attach(&pod).await.unwrap();
        let other = host.pod("b");
        network.attach(&other).await.unwrap();
        tcp_server(Some(&pod.netns), "0.0.0.0:80");
        for from in [Some(pod.netns.as_path()), Some(other.netns.as_path()), None] {
            assert_eq!(tcp_ask(from, "10.88.0.1:8080").unwrap(), "10.88.0.1");
        }
    });
}

#[test]
fn host_ip_limits_a_port_to_one_address() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let world = host.world();
        let (mut a, mut b) = (host.pod("a"), host.pod("b"));
        let on = |address: &str| PortMapping {
            host_ip: Some(ip(address)),
            ..host_port(Protocol::Tcp, 8080, 80)
        };
        a.port_mappings = vec![on("192.0.2.1")];
        b.port_mappings = vec![on("127.0.0.1")];
        network.attach(&a).await.unwrap();
        network.attach(&b).await.unwrap();
        tcp_server(Some(&a.netns), "0.0.0.0:80");
        assert_eq!(
            tcp_ask(Some(&world), "192.0.2.1:8080").unwrap(),
            "192.0.2.2"
        );
        assert!(tcp_ask(Some(&world), "192.0.2.9:8080").is_err());
        assert!(tcp_ask(None, "127.0.0.1:8080").is_err(), "b has no server");
        tcp_server(Some(&b.netns), "0.0.0.0:80");
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        assert!(sh("nft list map ip coracle one_address").contains("192.0.2.1 . tcp . 8080"));
        for pod in [&a, &b] {
            network.detach(pod).await.unwrap();
        }
        assert_clean(host);
    });
}

#[test]
fn every_protocol_has_its_own_port_and_conflicts_name_the_holder() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let (mut a, mut b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .map(|protocol| host_port(protocol, 53, 53))
            .to_vec();
        a.port_mappings.push(host_port(Protocol::Tcp, 0, 99));
        network.attach(&a).await.unwrap();
        let listing = sh("nft list map ip coracle any_address");
        for entry in ["tcp . 53", "udp . 53", "sctp . 53"] {
            let expected = format!("{entry} comment \"a default/pod-a\" : 10.88.0.2 . 53");
            assert!(listing.contains(&expected), "{listing}");
        }
        b.port_mappings = vec![
            host_port(Protocol::Tcp, 80, 80),
            host_port(Protocol::Udp, 53, 53),
        ];
        let error = network.attach(&b).await.unwrap_err();
        assert_eq!(error.kind(), NetworkErrorKind::Conflict);
        assert_eq!(
            error.to_string(),
            "host port 53/udp: held by pod default/pod-a (sandbox a)"
        );
        // Nothing of the refused pod is left, and it can come back when the port is free.
        assert!(!sh("nft list map ip coracle any_address").contains("pod-b"));
        network.detach(&a).await.unwrap();
        network.attach(&b).await.unwrap();
        network.detach(&b).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn udp_client_follows_the_port_to_another_pod() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let world = host.world();
        let (mut a, mut b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = vec![host_port(Protocol::Udp, 5353, 53)];
        b.port_mappings = a.port_mappings.clone();
        network.attach(&a).await.unwrap();
        udp_server(Some(&a.netns), "0.0.0.0:53", "a");
        udp_server(Some(&b.netns), "0.0.0.0:53", "b");
        let client = within(Some(&world), || UdpSocket::bind("0.0.0.0:0")).unwrap();
        assert_eq!(udp_ask(&client, "192.0.2.1:5353").unwrap(), "a");
        network.detach(&a).await.unwrap();
        // The same client socket goes on sending while nobody serves.
        assert!(udp_ask(&client, "192.0.2.1:5353").is_err());
        network.attach(&b).await.unwrap();
        assert_eq!(udp_ask(&client, "192.0.2.1:5353").unwrap(), "b");
        network.detach(&b).await.unwrap();
    });
}

/// CVE-2020-8558: what route_localnet would let a pod reach.
#[test]
fn pods_cannot_reach_the_hosts_loopback() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pod = host.pod("a");
        network.attach(&pod).await.unwrap();
        tcp_server(None, "127.0.0.1:9999");
        within(Some(&pod.netns), || {
            sh("sysctl -qw net.ipv4.conf.all.route_localnet=1
                ip addr del 127.0.0.1/8 dev lo
                ip route add 127.0.0.1/32 via 10.88.0.1")
        });
        assert!(tcp_ask(Some(&pod.netns), "127.0.0.1:9999").is_err());
        // The guard is what holds it.
        sh("nft flush chain ip coracle guard");
        assert_eq!(
            tcp_ask(Some(&pod.netns), "127.0.0.1:9999").unwrap(),
            "10.88.0.2"
        );
        network.detach(&pod).await.unwrap();
    });
}
