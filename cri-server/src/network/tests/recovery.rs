//! The built-in bridge after crashes and after others' interference.

use super::*;

#[test]
fn restarted_daemon_keeps_pods_and_removes_the_rest() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let (mut a, b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        let before = network.attach(&a).await.unwrap();
        network.attach(&b).await.unwrap();
        tcp_server(Some(&a.netns), "0.0.0.0:80");
        drop(network);
        // While the daemon is away traffic flows.
        tcp_ask(None, "127.0.0.1:8080").unwrap();

        let network = host.network();
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        assert_eq!(network.attach(&a).await.unwrap(), before);
        let mut c = host.pod("c");
        c.port_mappings = a.port_mappings.clone();
        assert_eq!(
            network.attach(&c).await.unwrap_err().kind(),
            NetworkErrorKind::Conflict
        );
        network.gc(&HashSet::from(["a".to_owned()])).await.unwrap();
        assert_eq!(sh("ip -o link show type veth | wc -l").trim(), "1");
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        network.detach(&a).await.unwrap();
        assert_clean(host);
    });
}

/// Leaves the state of a crash after each step of attach and lets gc find it.
#[test]
fn crash_between_any_two_steps_leaks_nothing() {
    async_on_fresh_host(async |host| {
        let state = host.dir.path().join("state");
        for keep in ["leases", "pods", "leases pods"] {
            let network = host.network();
            let mut pod = host.pod("a");
            pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
            network.attach(&pod).await.unwrap();
            drop(network);
            // Whichever of the two writes came last, the other one is there; and the journal of
            // an unfinished attach says pending.
            for dir in ["leases", "pods"] {
                if !keep.split(' ').any(|kept| kept == dir) {
                    sh(&format!("rm {}/{dir}/*", state.display()));
                }
            }
            let done = state.join("pods/a.json");
            if done.exists() {
                std::fs::rename(&done, state.join("pods/a.pending")).unwrap();
            }
            let network = host.network();
            network.gc(&HashSet::new()).await.unwrap();
            assert_clean(host);
            // The same sandbox can be connected at once.
            network.attach(&pod).await.unwrap();
            network.detach(&pod).await.unwrap();
            assert_clean(host);
            netns::remove(&pod.netns).unwrap();
        }
    });
}

#[test]
fn half_done_attach_is_done_again() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pod = host.pod("a");
        network.attach(&pod).await.unwrap();
        drop(network);
        let pods = host.dir.path().join("state/pods");
        std::fs::rename(pods.join("a.json"), pods.join("a.pending")).unwrap();
        let network = host.network();
        network.attach(&pod).await.unwrap();
        network.check("a").await.unwrap();
        network.detach(&pod).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn stray_ports_without_any_record_are_swept() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        network.attach(&host.pod("a")).await.unwrap();
        drop(network);
        sh(&format!(
            "rm -r {}",
            host.dir.path().join("state").display()
        ));
        let network = host.network();
        network.gc(&HashSet::new()).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn flushed_rules_come_back() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let (mut a, mut b) = (host.pod("a"), host.pod("b"));
        a.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        b.port_mappings = vec![host_port(Protocol::Tcp, 8081, 80)];
        network.attach(&a).await.unwrap();
        tcp_server(Some(&a.netns), "0.0.0.0:80");
        sh("nft flush ruleset");
        assert!(tcp_ask(None, "127.0.0.1:8080").is_err());
        network.attach(&b).await.unwrap();
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        sh("nft flush ruleset");
        network.status().unwrap();
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        sh("nft flush ruleset");
        network.detach(&b).await.unwrap();
        tcp_ask(None, "127.0.0.1:8080").unwrap();
        network.detach(&a).await.unwrap();
        assert_clean(host);
    });
}

#[test]
fn deleted_bridge_is_made_again_with_its_pods() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let (a, b) = (host.pod("a"), host.pod("b"));
        network.attach(&a).await.unwrap();
        tcp_server(Some(&a.netns), "0.0.0.0:80");
        sh("ip link del coracle0");
        let of_b = network.attach(&b).await.unwrap().ips[0].to_string();
        assert_eq!(tcp_ask(Some(&b.netns), "10.88.0.2:80").unwrap(), of_b);
        sh("ip link del coracle0");
        network.status().unwrap();
        assert_eq!(tcp_ask(Some(&b.netns), "10.88.0.2:80").unwrap(), of_b);
        for pod in [&a, &b] {
            network.detach(pod).await.unwrap();
        }
        assert_clean(host);
    });
}

#[test]
fn aborted_caller_leaves_a_finished_attach() {
    async_on_fresh_host(async |host| {
        let network = host.network();
        let pod = host.pod("a");
        let attach = {
            let (network, pod) = (network.clone(), pod.clone());
            tokio::spawn(async move { network.attach(&pod).await })
        };
        tokio::task::yield_now().await;
        attach.abort();
        let _ = attach.await;
        // Detach takes its turn after the attach that nobody waits for any more.
        network.detach(&pod).await.unwrap();
        assert_clean(host);
    });
}

/// Runs `fault_sweep` in a process of its own: its faults would strike every test of this one.
#[test]
fn every_failing_conversation_with_the_kernel_leaves_nothing() {
    let program = std::env::current_exe().unwrap();
    let path = std::thread::current().name().unwrap().to_owned();
    let sweep = format!("{}::fault_sweep", path.rsplit_once("::").unwrap().0);
    let output = Command::new(program)
        .args([sweep.as_str(), "--exact", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "run by every_failing_conversation_with_the_kernel_leaves_nothing"]
fn fault_sweep() {
    use crate::network::netlink::faults;
    use std::sync::atomic::Ordering::SeqCst;

    async_on_fresh_host(async |host| {
        let mut pod = host.pod("a");
        pod.port_mappings = vec![host_port(Protocol::Tcp, 8080, 80)];
        // One failure, which attach undoes; and failures without end, which stand for a crash:
        // even the undoing fails, and the next start has to find what is left.
        for count in [1, i64::MAX] {
            let mut until = 0;
            loop {
                let network = host.network();
                faults::COUNT.store(count, SeqCst);
                faults::UNTIL.store(until, SeqCst);
                let outcome = network.attach(&pod).await;
                let untouched = faults::UNTIL.swap(-1, SeqCst) >= 0 && count == 1;
                if count == 1 && outcome.is_err() {
                    assert_clean(host);
                }
                let done = outcome.is_ok();
                if done && (untouched || count > 1) {
                    network.detach(&pod).await.unwrap();
                    break;
                }
                drop(network);
                let network = host.network();
                network.gc(&HashSet::new()).await.unwrap();
                assert_clean(host);
                network.attach(&pod).await.unwrap();
                // The same for detach: it tells, and works the second time.
                faults::COUNT.store(count, SeqCst);
                faults::UNTIL.store(until, SeqCst);
                let _ = network.detach(&pod).await;
                faults::UNTIL.store(-1, SeqCst);
                network.detach(&pod).await.unwrap();
                assert_clean(host);
                until += 1;
                assert!(until < 100, "no end of conversations");
            }
            println!("{until} conversations");
        }
    });
}
