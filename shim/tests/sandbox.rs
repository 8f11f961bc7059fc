//! Pods by the sandbox service: what a containerd 2.x with `sandboxer = "shim"` calls.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Child, Command};

use prost::Message;
use prost_types::Any;
use serde_json::{Value, json};
use support::proto::containerd::runtime::sandbox::v1 as wire;
use support::proto::containerd::task::v2 as task;
use support::proto::containerd::types::Mount;
use support::proto::runtime::v1 as cri;
use support::*;

/// A network namespace, as long as its process lives.
struct Network(Child);

impl Network {
    fn new(args: &[&str]) -> Network {
        let mut command = Command::new("unshare");
        let child = command.args(args).args(["sleep", "1000"]).spawn().unwrap();
        let network = Network(child);
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        wait_until("the namespace", || {
            fs::read_link(network.path()).is_ok_and(|it| it != own)
        });
        network
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pod_config(parent: &str) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "web-0".to_owned(),
            uid: "uid".to_owned(),
            namespace: "default".to_owned(),
        }),
        hostname: "web".to_owned(),
        dns_config: Some(cri::DnsConfig {
            servers: vec!["10.9.8.7".to_owned()],
            searches: vec!["cluster.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: parent.to_owned(),
            security_context: None,
            sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
        }),
        ..Default::default()
    }
}

fn request(
    pod: &Pod,
    id: &str,
    netns: &str,
    config: &cri::PodSandboxConfig,
) -> wire::CreateSandboxRequest {
    wire::CreateSandboxRequest {
        sandbox_id: id.to_owned(),
        bundle_path: pod.dir.join("sandbox").display().to_string(),
        options: Some(Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value: config.encode_to_vec(),
        }),
        netns_path: netns.to_owned(),
        ..Default::default()
    }
}

fn create(pod: &mut Pod, request: &wire::CreateSandboxRequest) -> Result<(), Refused> {
    pod.client
        .sandbox::<wire::CreateSandboxResponse>("CreateSandbox", request)
        .map(drop)
}

fn start(pod: &mut Pod, id: &str) -> Result<wire::StartSandboxResponse, Refused> {
    let sandbox_id = id.to_owned();
    pod.client
        .sandbox("StartSandbox", &wire::StartSandboxRequest { sandbox_id })
}

fn stop(pod: &mut Pod, id: &str) -> Result<(), Refused> {
    let request = wire::StopSandboxRequest {
        sandbox_id: id.to_owned(),
        timeout_secs: 5,
    };
    pod.client.sandbox("StopSandbox", &request)
}

fn status(pod: &mut Pod, id: &str) -> Result<wire::SandboxStatusResponse, Refused> {
    let request = wire::SandboxStatusRequest {
        sandbox_id: id.to_owned(),
        verbose: true,
    };
    pod.client.sandbox("SandboxStatus", &request)
}

/// A container as the CRI plugin describes it: the sandbox's namespaces by its pid.
fn member(pod: &Pod, pid: u32, container: &str, script: &str) -> Value {
    let mut config = pod.config(container, script);
    let joined = |kind: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{kind}")});
    config["linux"]["namespaces"] = json!([
        {"type": "mount"}, joined("ipc"), joined("uts"), joined("pid"),
        {"type": "network", "path": format!("/proc/{pid}/ns/net")},
    ]);
    config.as_object_mut().unwrap().remove("hostname");
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
    );
    config
}

fn run(pod: &mut Pod, config: &Value, container: &str) {
    let request = pod.request(container, config);
    pod.create(&request).unwrap();
    pod.start(container, "").unwrap();
}

fn namespace(pid: u32, kind: &str) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    link.display().to_string()
}

/// The parent cgroup of a pod is the kubelet's: here ours.
fn remove_parents(name: &str) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(name.trim_start_matches('/')));
    }
    let _ = fs::remove_dir(format!("/sys/fs/cgroup{name}"));
}

fn has_namespaces_and_answers(
    pod: &mut Pod,
    id: &str,
    started: &wire::StartSandboxResponse,
    network: &Network,
) {
    let (pid, id) = (started.pid, id.to_owned());
    assert!(alive(pid) && started.created_at.is_some());
    assert_eq!(
        namespace(pid, "net"),
        fs::read_link(network.path()).unwrap().display().to_string()
    );
    for kind in ["ipc", "uts", "pid", "mnt"] {
        assert_ne!(
            namespace(pid, kind),
            namespace(std::process::id(), kind),
            "{kind}"
        );
    }
    let got = status(pod, &id).unwrap();
    assert_eq!((got.state.as_str(), got.pid), ("SANDBOX_READY", pid));
    assert!(got.info["info"].contains("\"running\"") && got.created_at == started.created_at);
    let platform = wire::PlatformRequest {
        sandbox_id: id.clone(),
    };
    let platform: wire::PlatformResponse = pod.client.sandbox("Platform", &platform).unwrap();
    assert_eq!(platform.platform.unwrap().os, "linux");
    let ping = wire::PingRequest {
        sandbox_id: id.clone(),
    };
    pod.client.sandbox::<()>("PingSandbox", &ping).unwrap();
}

/// By a first container, which is deleted again.
fn shares_files_and_buries_orphans(pod: &mut Pod, pid: u32) {
    let script = "cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/shm_rmid_forced; \
                  busybox hostname; cat /proc/1/cmdline | busybox tr '\\0' ' '; echo; \
                  echo shared > /dev/shm/file; (sleep 0.2 &)";
    let config = member(pod, pid, "a", script);
    run(pod, &config, "a");
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    let want = [
        "web",
        "search cluster.local",
        "nameserver 10.9.8.7",
        "options ndots:5",
        "1",
        "web",
        "/pause pause ",
    ];
    assert_eq!(pod.lines("a"), want.map(|l| format!("stdout F {l}")));
    pod.delete("a", "").unwrap();
    wait_until("the orphan to be buried", || children(pid).is_empty());
}

fn has_metrics(pod: &mut Pod, id: &str) {
    let id = id.to_owned();
    let metrics = wire::SandboxMetricsRequest {
        sandbox_id: id.clone(),
    };
    let metrics: wire::SandboxMetricsResponse =
        pod.client.sandbox("SandboxMetrics", &metrics).unwrap();
    let metric = metrics.metrics.unwrap();
    assert_eq!(metric.id, id);
    assert!(
        metric
            .data
            .unwrap()
            .type_url
            .starts_with("io.containerd.cgroups.v")
    );
}

#[test]
fn pod_lives_from_create_to_shutdown() {
    let events = events::Daemon::start();
    let Some(mut pod) = Pod::by(
        "pod",
        events.address(),
        Command::new(shim_program()),
        |_| {},
    ) else {
        return;
    };
    let network = Network::new(&["--net"]);
    let id = pod.id("sandbox");
    let parent = format!("/coracle-shim-{id}");
    let asked = request(&pod, &id, &network.path(), &pod_config(&parent));
    create(&mut pod, &asked).unwrap();
    assert_eq!(status(&mut pod, &id).unwrap().state, "SANDBOX_NOTREADY");
    let started = start(&mut pod, &id).unwrap();
    let pid = started.pid;
    has_namespaces_and_answers(&mut pod, &id, &started, &network);
    shares_files_and_buries_orphans(&mut pod, pid);
    // Deleting the only container, and the Shutdown that daemons send after that, leave the pod.
    let shutdown = task::ShutdownRequest {
        id: pod.id("a"),
        now: false,
    };
    pod.client.call::<()>("Shutdown", &shutdown).unwrap();
    let config = member(&pod, pid, "b", "cat /dev/shm/file; sleep 100");
    run(&mut pod, &config, "b");
    wait_until("output", || {
        pod.log("b").exists() && !pod.lines("b").is_empty()
    });
    assert_eq!(pod.lines("b"), ["stdout F shared"]);
    has_metrics(&mut pod, &id);

    let mut waiter = pod.connect();
    let wait = wire::WaitSandboxRequest {
        sandbox_id: id.clone(),
    };
    waiter.send(SANDBOX, "WaitSandbox", &wait, &[]);
    stop(&mut pod, &id).unwrap();
    stop(&mut pod, &id).unwrap();
    let waited: wire::WaitSandboxResponse = waiter.receive().unwrap();
    assert!(waited.exit_status == 137 && waited.exited_at.is_some());
    let got = status(&mut pod, &id).unwrap();
    assert_eq!((got.state.as_str(), got.pid), ("SANDBOX_NOTREADY", 0));
    assert!(got.exited_at.is_some() && !alive(pid));
    // Nobody of the pod outlives it.
    assert_eq!(pod.wait("b", "").unwrap(), 137);
    pod.delete("b", "").unwrap();
    let member = pod.id("b");
    pod.shutdown_sandbox(&id);
    remove_parents(&parent);
    // Of the sandbox itself nothing is told as of a task.
    let told = events.topics();
    assert_eq!(
        told.iter().filter(|t| **t == "/tasks/create").count(),
        2,
        "{told:?}"
    );
    assert!(events.lines().iter().all(|l| !l.contains(&id)), "{member}");
}

#[test]
fn pod_with_a_user_namespace_of_its_network() {
    let Some(mut pod) = Pod::new("userpod") else {
        return;
    };
    fs::set_permissions(&pod.dir, fs::Permissions::from_mode(0o711)).unwrap();
    let network = Network::new(&["--user", "--net"]);
    for map in ["uid_map", "gid_map"] {
        let path = format!("/proc/{}/{map}", network.0.id());
        fs::write(path, "0 100000 65536").unwrap();
    }
    let owner = format!("/proc/{}/ns/user", network.0.id());
    let id = pod.id("sandbox");
    let map = cri::IdMapping {
        host_id: 100_000,
        container_id: 0,
        length: 65536,
    };
    let mut config = pod_config(&format!("/coracle-shim-{id}"));
    config.linux.as_mut().unwrap().sysctls.clear();
    config.linux.as_mut().unwrap().security_context = Some(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(cri::NamespaceOption {
            userns_options: Some(cri::UserNamespace {
                mode: cri::NamespaceMode::Pod as i32,
                uids: vec![map],
                gids: vec![map],
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let asked = request(&pod, &id, &network.path(), &config);
    create(&mut pod, &asked).unwrap();
    let pid = start(&mut pod, &id).unwrap().pid;
    assert_eq!(
        namespace(pid, "user"),
        fs::read_link(owner).unwrap().display().to_string()
    );
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), 165_535);
    // Root of the pod owns its files.
    for name in ["hosts", "shm"] {
        let shared = pod.dir.join("sandbox/pod").join(name);
        assert_eq!(fs::metadata(shared).unwrap().uid(), 100_000, "{name}");
    }
    stop(&mut pod, &id).unwrap();
    pod.shutdown_sandbox(&id);
    remove_parents(&format!("/coracle-shim-{id}"));
}

#[test]
fn pod_of_the_node_and_of_a_plain_spec() {
    let Some(mut pod) = Pod::new("nodepod") else {
        return;
    };
    let id = pod.id("sandbox");
    let node = cri::NamespaceMode::Node as i32;
    let mut config = pod_config("");
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls.clear();
    linux.security_context = Some(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(cri::NamespaceOption {
            network: node,
            ipc: node,
            pid: node,
            ..Default::default()
        }),
        ..Default::default()
    });
    let asked = request(&pod, &id, "", &config);
    create(&mut pod, &asked).unwrap();
    let pid = start(&mut pod, &id).unwrap().pid;
    for kind in ["net", "ipc", "uts", "pid"] {
        assert_eq!(
            namespace(pid, kind),
            namespace(std::process::id(), kind),
            "{kind}"
        );
    }
    assert!(!pod.dir.join("sandbox/pod/shm").exists());
    pod.shutdown_sandbox(&id);
    // `ctr sandboxes run` gives an OCI spec and no pod.
    let Some(mut pod) = Pod::new("specpod") else {
        return;
    };
    let spec =
        json!({"hostname": "given", "linux": {"namespaces": [{"type": "uts"}, {"type": "mount"}]}});
    fs::write(pod.dir.join("sandbox/config.json"), spec.to_string()).unwrap();
    let mut request = request(&pod, &id, "", &config);
    request.options = None;
    create(&mut pod, &request).unwrap();
    let pid = start(&mut pod, &id).unwrap().pid;
    assert_ne!(namespace(pid, "uts"), namespace(std::process::id(), "uts"));
    assert_eq!(namespace(pid, "ipc"), namespace(std::process::id(), "ipc"));
    pod.shutdown_sandbox(&id);
    // Without a parent that the kubelet names, it is the daemon's namespace.
    remove_parents("/test");
}

#[test]
fn wrong_requests_of_a_pod_are_refused_and_leave_nothing() {
    let Some(mut pod) = Pod::new("wrongpod") else {
        return;
    };
    let id = pod.id("sandbox");
    assert_eq!(start(&mut pod, &id).unwrap_err().code, 5);
    assert_eq!(stop(&mut pod, &id).unwrap_err().code, 5);
    assert_eq!(status(&mut pod, &id).unwrap_err().code, 5);
    pod.client
        .send(SANDBOX, "Fly", &wire::PingRequest::default(), &[]);
    assert_eq!(pod.client.receive::<()>().unwrap_err().code, 12);
    let good = request(&pod, &id, "", &pod_config(&format!("/coracle-shim-{id}")));
    type Change<'a> = &'a dyn Fn(&mut wire::CreateSandboxRequest);
    let cases: [(i32, &str, Change<'_>); 6] = [
        (3, "../x", &|r| r.sandbox_id = "../x".into()),
        (3, "not absolute", &|r| r.bundle_path = "b".into()),
        (3, "x.Y", &|r| {
            r.options.as_mut().unwrap().type_url = "x.Y".into()
        }),
        (12, "no root filesystem", &|r| {
            r.rootfs.push(Mount::default())
        }),
        (2, "/nonexistent/net", &|r| {
            r.netns_path = "/nonexistent/net".into()
        }),
        (2, "nonexistent: no such file", &|r| {
            let mut config = pod_config("");
            config.linux.as_mut().unwrap().sysctls =
                [("net.nonexistent".into(), "1".into())].into();
            r.options.as_mut().unwrap().value = config.encode_to_vec();
        }),
    ];
    for (code, text, change) in cases {
        let mut bad = good.clone();
        change(&mut bad);
        let error = create(&mut pod, &bad).unwrap_err();
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.message.contains(text), "{error:?}");
        assert!(!pod.dir.join("sandbox/pod").exists(), "{text}");
    }
    create(&mut pod, &good).unwrap();
    assert_eq!(create(&mut pod, &good).unwrap_err().code, 6);
    let mut second = good.clone();
    second.sandbox_id = "another".into();
    assert_eq!(create(&mut pod, &second).unwrap_err().code, 6);
    start(&mut pod, &id).unwrap();
    assert_eq!(start(&mut pod, &id).unwrap_err().code, 9);
    pod.shutdown_sandbox(&id);
    remove_parents(&format!("/coracle-shim-{id}"));
    remove_parents("/test");
}

#[test]
fn pause_process_that_dies_ends_the_pod() {
    let Some(mut pod) = Pod::new("deadpod") else {
        return;
    };
    let id = pod.id("sandbox");
    let parent = format!("/coracle-shim-{id}");
    let asked = request(&pod, &id, "", &pod_config(&parent));
    create(&mut pod, &asked).unwrap();
    let pid = start(&mut pod, &id).unwrap().pid;
    // The first process of a pid namespace hears only what it waits for, once it does.
    wait_until("the process to wait for signals", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains("(pause) S ")
    });
    kill(pid, 15);
    let wait = wire::WaitSandboxRequest {
        sandbox_id: id.clone(),
    };
    let waited: wire::WaitSandboxResponse = pod.client.sandbox("WaitSandbox", &wait).unwrap();
    assert_eq!(waited.exit_status, 0);
    assert_eq!(status(&mut pod, &id).unwrap().state, "SANDBOX_NOTREADY");
    stop(&mut pod, &id).unwrap();
    pod.shutdown_sandbox(&id);
    remove_parents(&parent);
}

#[test]
fn shim_that_dies_takes_its_pod_along() {
    let Some(mut pod) = Pod::new("lostpod") else {
        return;
    };
    let id = pod.id("sandbox");
    let parent = format!("/coracle-shim-{id}");
    let asked = request(&pod, &id, "", &pod_config(&parent));
    create(&mut pod, &asked).unwrap();
    let pause = start(&mut pod, &id).unwrap().pid;
    let config = member(&pod, pause, "a", "sleep 100");
    run(&mut pod, &config, "a");
    let member = pod.state("a").unwrap().pid;
    let shim = pod.shim_pid();
    kill(shim, 9);
    wait_until("the shim to die", || !alive(shim));
    let deleted = shim_delete(&pod.dir.join("sandbox"), &id);
    assert_eq!((deleted.pid, deleted.exit_status), (pause, 137));
    assert!(!alive(pause) && !alive(member));
    assert!(!pod.dir.join("sandbox/pod").exists());
    remove_parents(&parent);
    pod.restart_shim();
    pod.shutdown();
}

mod events {
    include!("support/events.rs");
}
