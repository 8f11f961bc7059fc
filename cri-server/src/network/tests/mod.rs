//! The network against the real kernel, in namespaces made for the test.
//!
//! Every test runs on a thread with a network and a mount namespace of its own, /run being a
//! tmpfs: the machine's links, rules, routes and mounts are never touched. That needs root; without
//! it a test says so and ends.

mod bridge;
mod cni;
mod host_ports;
mod recovery;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::*;
use crate::netns::{self, PinRequest};

/// A host of our own.
pub(crate) struct Host {
    pub dir: tempfile::TempDir,
}

/// Past libtest's capture, in the form that .ci/totals counts.
pub(crate) fn say_skipped(why: &str) {
    use std::io::Write as _;
    let _ = write!(std::io::stdout(), "\nSKIP network: {why}\n");
}

/// Runs the test as if on a fresh host: only loopback, no rules, forwarding off.
pub(crate) fn on_fresh_host(test: impl FnOnce(&Host) + Send) {
    if !rustix::process::geteuid().is_root() {
        say_skipped("making network namespaces needs root");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            rustix::mount::mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
            sh("ip link set lo up; sysctl -qw net.ipv4.ip_forward=0");
            // On the tmpfs, so that pinned namespaces do not keep it from going away.
            let dir = tempfile::tempdir_in("/run").unwrap();
            test(&Host { dir });
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// As `on_fresh_host`, inside a runtime whose threads are all in the host's namespaces.
pub(crate) fn async_on_fresh_host(test: impl AsyncFnOnce(&Host) + Send) {
    on_fresh_host(|host| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(host));
    });
}

/// Runs shell commands in the calling thread's namespaces; they must succeed.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{script}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

impl Host {
    pub fn config(&self) -> NetworkConfig {
        NetworkConfig {
            mode: Mode::Bridge,
            cni_conf_dir: self.dir.path().join("net.d"),
            cni_bin_dirs: vec![self.dir.path().join("bin"), PathBuf::from("/usr/lib/cni")],
            cni_cache_dir: self.dir.path().join("cni-cache"),
            cni_timeout_seconds: 20,
            state_dir: self.dir.path().join("state"),
            bridge: BridgeConfig {
                enable_forwarding: true,
                ..BridgeConfig::default()
            },
        }
    }

    pub fn network(&self) -> Network {
        Network::open(self.config()).unwrap()
    }

    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.dir.path().join("netns").join(id)
    }

    /// A pod with a network namespace that nothing is connected to yet.
    pub fn pod(&self, id: &str) -> PodNetwork {
        let netns = self.netns_path(id);
        netns::create(&PinRequest {
            net: Some(netns.clone()),
            ipc: None,
            uts: None,
            hostname: None,
            sysctls: &BTreeMap::new(),
        })
        .unwrap();
        PodNetwork {
            sandbox_id: id.to_owned(),
            pod_name: format!("pod-{id}"),
            pod_namespace: "default".to_owned(),
            pod_uid: format!("uid-{id}"),
            netns,
            ..PodNetwork::default()
        }
    }

    /// A machine beside the host: 192.0.2.2 behind the host's 192.0.2.1 (and fd02::2, fd02::1).
    pub fn world(&self) -> PathBuf {
        let netns = self.pod("world").netns;
        sh(&format!(
            "ip link add up0 type veth peer name up1
             ip addr add 192.0.2.1/24 dev up0; ip addr add 192.0.2.9/24 dev up0
             ip -6 addr add fd02::1/64 dev up0 nodad
             ip link set up0 up
             mkdir -p /run/netns; touch /run/netns/world; mount --bind {0} /run/netns/world
             ip link set up1 netns world
             ip -n world addr add 192.0.2.2/24 dev up1
             ip -n world -6 addr add fd02::2/64 dev up1 nodad
             ip -n world link set up1 up",
            netns.display()
        ));
        netns
    }
}

pub(crate) fn host_port(protocol: Protocol, host_port: u16, container_port: u16) -> PortMapping {
    PortMapping {
        protocol,
        container_port,
        host_port,
        host_ip: None,
    }
}

/// Runs in the namespace, or in the host's when None.
pub(crate) fn within<T: Send>(netns: Option<&Path>, work: impl FnOnce() -> T + Send) -> T {
    match netns {
        Some(path) => netns::run_in(path, work).unwrap(),
        None => work(),
    }
}

/// A server in the namespace that tells each client whom it takes it for. Ends with its last
/// expected connection or with the test's process.
pub(crate) fn tcp_server(netns: Option<&Path>, address: &str) {
    let listener = within(netns, || TcpListener::bind(address)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().unwrap();
            let _ = stream.write_all(peer.ip().to_canonical().to_string().as_bytes());
        }
    });
}

/// Whom the server took us for.
pub(crate) fn tcp_ask(netns: Option<&Path>, address: &str) -> std::result::Result<String, String> {
    let address: SocketAddr = address.parse().unwrap();
    within(netns, || {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        ask().map_err(|e| e.to_string())
    })
}

/// A UDP server that answers with `name`.
pub(crate) fn udp_server(netns: Option<&Path>, address: &str, name: &'static str) {
    let socket = within(netns, || UdpSocket::bind(address)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), peer);
        }
    });
}

pub(crate) fn udp_ask(socket: &UdpSocket, address: &str) -> std::result::Result<String, String> {
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut buffer = [0; 64];
    let ask = || -> std::io::Result<usize> {
        socket.send_to(b"?", address)?;
        socket.recv(&mut buffer)
    };
    let mut ask = ask;
    let count = ask().map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

/// What a pod must not leave: ports of the bridge, map entries, leases, records.
pub(crate) fn assert_clean(host: &Host) {
    let links = sh("ip -o link show type veth | grep -v up0 || true");
    assert_eq!(links, "", "links");
    for map in ["any_address", "one_address"] {
        let listing = sh(&format!("nft list map ip coracle {map}"));
        assert!(!listing.contains("elements"), "{listing}");
    }
    for dir in ["leases", "pods"] {
        let left = std::fs::read_dir(host.dir.path().join("state").join(dir))
            .unwrap()
            .count();
        assert_eq!(left, 0, "{dir}");
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
