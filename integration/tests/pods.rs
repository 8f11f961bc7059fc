//! Pods and their networks, from image to HTTP answer, through crictl.

use std::process::Command;

use anyhow::{Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::registry::free_port;
use coracle_integration::world::{TOOLS, World, http_get, http_get_soon};
use serde_json::json;

#[test]
fn pod_ready_has_an_ip_and_answers_http() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("web")?;
    let status = world.pod_status(&pod)?;
    ensure!(status["state"] == "SANDBOX_READY", "{status:#}");
    let ip = world.pod_ip(&pod)?;
    let id = world.tools(&pod, "server", &["probe", "serve", "8080", "hello"])?;
    ensure!(http_get_soon(&format!("{ip}:8080"), "/")? == "hello\n");
    let logs = world.crictl.run(&["logs", &id])?;
    ensure!(logs == "serving on 8080", "{logs}");
    ensure!(world.exec(&id, &["cat", "/etc/from-image"])? == "image");
    let shown: serde_json::Value = serde_json::from_str(&world.exec(&id, &["probe"])?)?;
    ensure!(
        shown["interfaces"] == json!(["eth0", "lo"]),
        "{}",
        shown["interfaces"]
    );
    world.finish()
}

#[test]
fn pods_two_reach_each_other_and_the_host() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let (one, two) = (world.pod("one")?, world.pod("two")?);
    let ip = world.pod_ip(&one)?;
    ensure!(ip != world.pod_ip(&two)?, "both pods have {ip}");
    world.tools(&one, "server", &["probe", "serve", "80", "from one"])?;
    http_get_soon(&format!("{ip}:80"), "/")?;
    let client = world.tools(&two, "client", &["sleep", "1000"])?;
    let answer = world.exec(&client, &["wget", "-qO-", &format!("http://{ip}/")])?;
    ensure!(answer == "from one", "{answer}");
    // Seen by its own address, not by the bridge's.
    let peer = world.exec(&client, &["wget", "-qO-", &format!("http://{ip}/peer")])?;
    ensure!(
        peer.ends_with(&world.pod_ip(&two)?),
        "the server saw {peer}"
    );
    // To an address of the host, here the registry's loopback neighbour: the bridge itself.
    let route = world.exec(&client, &["ip", "route"])?;
    ensure!(route.contains("default via"), "{route}");
    world.finish()
}

#[test]
fn containers_of_a_pod_share_localhost_and_hostname_but_no_pids() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let config = world.pod_config("shared").set("/hostname", "shared-host");
    let pod = world.run_pod(&config)?;
    world.tools(&pod, "server", &["probe", "serve", "8080", "local"])?;
    let client = world.tools(&pod, "client", &["sleep", "1000"])?;
    let ip = world.pod_ip(&pod)?;
    http_get_soon(&format!("{ip}:8080"), "/")?;
    let answer = world.exec(&client, &["wget", "-qO-", "http://127.0.0.1:8080/"])?;
    ensure!(answer == "local", "{answer}");
    ensure!(world.exec(&client, &["hostname"])? == "shared-host");
    ensure!(world.exec(&client, &["cat", "/etc/hostname"])? == "shared-host");
    let hosts = world.exec(&client, &["cat", "/etc/hosts"])?;
    ensure!(hosts.contains("localhost"), "{hosts}");
    let processes = world.exec(&client, &["ps", "-o", "args"])?;
    ensure!(
        !processes.contains("serve"),
        "it sees its neighbour: {processes}"
    );
    world.finish()
}

#[test]
fn pod_with_shared_pids_sees_its_neighbours() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let options = json!({"pid": 0});
    let config = world
        .pod_config("pids")
        .set("/linux/security_context/namespace_options", options.clone());
    let pod = world.run_pod(&config)?;
    let of = |name: &str, command: &[&str]| {
        container(name, TOOLS, command)
            .set("/linux/security_context/namespace_options", options.clone())
    };
    world.start_container(&pod, &of("server", &["probe", "serve", "8080"]))?;
    let client = world.start_container(&pod, &of("client", &["sleep", "1000"]))?;
    let processes = world.exec(&client, &["ps", "-o", "pid,args"])?;
    ensure!(processes.contains("probe serve"), "{processes}");
    ensure!(
        !processes.contains("   1 sleep"),
        "pid 1 is the pod's: {processes}"
    );
    world.finish()
}

#[test]
fn container_with_host_pids_sees_the_host() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let options = json!({"pid": 2});
    let config = world
        .pod_config("hostpid")
        .set("/linux/security_context/namespace_options", options.clone());
    let pod = world.run_pod(&config)?;
    let config = container("c", TOOLS, &["sleep", "1000"])
        .set("/linux/security_context/namespace_options", options);
    let id = world.start_container(&pod, &config)?;
    let pid = world.daemon.pid()?.to_string();
    let comm = world.exec(&id, &["cat", &format!("/proc/{pid}/comm")])?;
    ensure!(comm == "coracled", "{comm}");
    world.finish()
}

#[test]
fn host_port_reaches_the_container_until_the_pod_stops() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let port = free_port()?;
    let config = world.pod_config("ported").push(
        "/port_mappings",
        json!({"protocol": 0, "container_port": 8080, "host_port": port}),
    );
    let pod = world.run_pod(&config)?;
    world.tools(&pod, "server", &["probe", "serve", "8080", "mapped"])?;
    ensure!(http_get_soon(&format!("127.0.0.1:{port}"), "/")? == "mapped\n");
    // From another pod, through the bridge's address.
    let other = world.pod("other")?;
    let client = world.tools(&other, "client", &["sleep", "1000"])?;
    let gateway = world.exec(
        &client,
        &["sh", "-c", "ip route | awk '/default/{print $3}'"],
    )?;
    let url = format!("http://{gateway}:{port}/");
    let answer = world.exec(&client, &["wget", "-qO-", &url])?;
    ensure!(answer == "mapped", "{answer}");
    world.crictl.run(&["stopp", &pod.id])?;
    ensure!(
        http_get(&format!("127.0.0.1:{port}"), "/").is_err(),
        "the port is still served"
    );
    let again = world.run_pod(&config.clone().set("/metadata/attempt", 1))?;
    ensure!(again.id != pod.id);
    world.finish()
}

#[test]
fn host_network_pod_has_the_hosts_interfaces_and_no_ip_of_its_own() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let options = json!({"network": 2});
    let config = world
        .pod_config("hostnet")
        .set("/linux/security_context/namespace_options", options.clone());
    let pod = world.run_pod(&config)?;
    let port = free_port()?.to_string();
    let config = container("server", TOOLS, &["probe", "serve", &port, "host"])
        .set("/linux/security_context/namespace_options", options);
    let id = world.start_container(&pod, &config)?;
    ensure!(http_get_soon(&format!("127.0.0.1:{port}"), "/")? == "host\n");
    let shown: serde_json::Value = serde_json::from_str(&world.exec(&id, &["probe"])?)?;
    let here = std::fs::read_link("/proc/thread-self/ns/net")?;
    ensure!(
        shown["namespaces"]["net"] == json!(here),
        "{}",
        shown["namespaces"]
    );
    world.finish()
}

#[test]
fn dns_config_is_what_resolv_conf_says() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let config = world.pod_config("dns").set(
        "/dns_config",
        json!({"servers": ["10.10.10.10"], "searches": ["a.example", "b.example"],
               "options": ["ndots:8"]}),
    );
    let pod = world.run_pod(&config)?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    let text = world.exec(&id, &["cat", "/etc/resolv.conf"])?;
    let want = "search a.example b.example\nnameserver 10.10.10.10\noptions ndots:8";
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let mut wanted: Vec<&str> = want.lines().collect();
    wanted.sort_unstable();
    ensure!(lines == wanted, "{text}");
    world.finish()
}

#[test]
fn sysctl_of_the_pod_is_seen_inside_only() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced")?;
    let config = world.pod_config("sysctl").set(
        "/linux/sysctls",
        json!({"kernel.shm_rmid_forced": "1", "net.core.somaxconn": "77"}),
    );
    let pod = world.run_pod(&config)?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    ensure!(world.exec(&id, &["cat", "/proc/sys/kernel/shm_rmid_forced"])? == "1");
    ensure!(world.exec(&id, &["cat", "/proc/sys/net/core/somaxconn"])? == "77");
    ensure!(std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced")? == host);
    world.finish()
}

#[test]
fn pods_many_at_once_all_become_ready_with_their_own_ip() -> Result<()> {
    need_root!();
    let world = World::start()?;
    world.pull(TOOLS)?;
    let mut children = Vec::new();
    for n in 0..12 {
        let path = world.dir.join(format!("many-{n}.json"));
        world.pod_config(&format!("many-{n}")).write(&path)?;
        let mut command = world.crictl.command(&["runp", &path.display().to_string()]);
        command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        children.push(command.spawn()?);
    }
    for child in children {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let mut ips = std::collections::BTreeSet::new();
    for id in world.crictl.ids(&["pods", "-q", "--state", "ready"])? {
        let status = world.crictl.json(&["inspectp", "-o", "json", &id])?;
        ips.insert(status["status"]["network"]["ip"].to_string());
    }
    ensure!(ips.len() == 12, "{ips:?}");
    world.finish()
}

#[test]
fn pod_stopped_is_shown_not_ready_and_keeps_nothing_running() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("stopped")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    world.crictl.run(&["stopp", &pod.id])?;
    world.crictl.run(&["stopp", &pod.id])?;
    let status = world.pod_status(&pod)?;
    ensure!(status["state"] == "SANDBOX_NOTREADY", "{status:#}");
    ensure!(world.container_status(&id)?["state"] == "CONTAINER_EXITED");
    ensure!(
        world
            .crictl
            .ids(&["pods", "-q", "--state", "ready"])?
            .is_empty()
    );
    let listed = world
        .crictl
        .ids(&["pods", "-q", "--state", "notready", "--no-trunc"])?;
    ensure!(listed == std::slice::from_ref(&pod.id), "{listed:?}");
    let links = Command::new("ip").args(["-o", "link"]).output()?;
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    ensure!(!links.contains("veth"), "{links}");
    world.crictl.run(&["rmp", &pod.id])?;
    world.crictl.refused(&["inspectp", &pod.id])?;
    world.finish()
}

#[test]
fn network_by_cni_plugins_gives_the_pod_an_ip_and_takes_it_back() -> Result<()> {
    need_root!();
    if !std::path::Path::new("/usr/lib/cni/bridge").exists() {
        coracle_integration::skip!("containernetworking-plugins is not installed");
    }
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let leases = world.dir.join("leases");
    let conf = json!({
        "cniVersion": "1.0.0", "name": "testnet",
        "plugins": [
            {"type": "bridge", "bridge": "cnitest0", "isGateway": true, "ipMasq": false,
             "ipam": {"type": "host-local", "dataDir": leases,
                      "ranges": [[{"subnet": "10.222.33.0/24"}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
        ],
    });
    // Hot: the daemon runs already.
    std::fs::write(world.dir.join("net.d/10-test.conflist"), conf.to_string())?;
    let info = coracle_integration::wait_for(
        "the CNI network",
        std::time::Duration::from_secs(10),
        || {
            let info = world.crictl.json(&["info", "-o", "json"])?;
            let ready = info["status"]["conditions"]
                .as_array()
                .is_some_and(|c| c.iter().all(|c| c["status"] == true));
            Ok(ready.then_some(info))
        },
    )?;
    ensure!(info["status"].is_object());
    let pod = world.pod("cni")?;
    let ip = world.pod_ip(&pod)?;
    ensure!(ip.starts_with("10.222.33."), "{ip}");
    world.tools(&pod, "server", &["probe", "serve", "80", "cni"])?;
    ensure!(http_get_soon(&format!("{ip}:80"), "/")? == "cni\n");
    world.remove_pod(&pod)?;
    let left: Vec<String> = std::fs::read_dir(leases.join("testnet"))?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("10."))
        .collect();
    ensure!(left.is_empty(), "leases are left: {left:?}");
    let _ = Command::new("ip")
        .args(["link", "delete", "cnitest0"])
        .status()?;
    world.finish()
}
