//! From the kubelet's description of a pod to the OCI config of its sandbox.
//!
//! Owns: which namespaces, limits and settings the pod has. What containerd's own CRI sandbox
//! would have been given holds here too, so that a pod sees no difference between the handlers.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::proto::containerd::types::Mount;
use crate::proto::runtime::v1::{
    IdMapping, LinuxPodSandboxConfig, NamespaceMode, NamespaceOption, PodSandboxConfig,
    UserNamespace,
};

/// Where the pause process is in its root, and the action by which it is one.
const PROGRAM: &str = "/pause";
const ACTION: &str = "pause";
/// The user of the usual pause images; the first one where it is not mapped.
const NOBODY: u32 = 65535;
const OOM_SCORE: i32 = -998;
const CAP_SYS_RESOURCE: u64 = 1 << 24;

pub struct Wanted<'a> {
    pub id: &'a str,
    pub namespace: &'a str,
    pub netns: &'a str,
    pub annotations: &'a BTreeMap<String, String>,
    pub pod: Option<&'a PodSandboxConfig>,
}

pub struct Made {
    pub spec: Value,
    pub rootfs: Mount,
    pub has_parent_cgroup: bool,
    pub userns: Option<OwnedFd>,
}

/// The root holds nothing but the place of the program. It belongs to the pod's root user, as
/// whom the runtime makes the places of the mounts.
fn rootfs(uid: u32, gid: u32) -> Mount {
    let mut options = ["size=64k", "nr_inodes=16", "mode=755", "nosuid", "nodev"]
        .map(str::to_owned)
        .to_vec();
    options.extend([format!("uid={uid}"), format!("gid={gid}")]);
    Mount {
        r#type: "tmpfs".to_owned(),
        source: "sandbox".to_owned(),
        target: String::new(),
        options,
    }
}

/// The node's id of the pod's root.
pub fn root_of(list: &[IdMapping]) -> Option<u32> {
    let first = list.iter().find(|m| m.container_id == 0 && m.length > 0);
    first.map(|m| m.host_id)
}

pub fn make(wanted: &Wanted<'_>, bundle: &Path) -> Result<Made> {
    let own = std::env::current_exe().map_err(|e| Error::io("readlink", "/proc/self/exe", e))?;
    let mut spec = base(&own, lowers_oom_score());
    let Some(pod) = wanted.pod else {
        from_spec(&mut spec, wanted, bundle)?;
        let root = |list: &str| {
            let first = &spec["linux"][list][0]["hostID"];
            first.as_u64().map_or(0, |id| id as u32)
        };
        return Ok(Made {
            rootfs: rootfs(root("uidMappings"), root("gidMappings")),
            spec,
            has_parent_cgroup: false,
            userns: None,
        });
    };
    let linux = pod.linux.clone().unwrap_or_default();
    let options = namespace_options(&linux);
    check_user_namespace(&options)?;
    let mut userns = None;
    let mut userns_path = String::new();
    let mut root = (0, 0);
    if let Some(mapped) = user_namespace(&options) {
        if options.network() != NamespaceMode::Node && !wanted.netns.is_empty() {
            // The network namespace was made in the pod's user namespace already.
            let owner = crate::hands::owner_of(wanted.netns)?;
            userns_path = format!("/proc/{}/fd/{}", std::process::id(), owner.as_raw_fd());
            userns = Some(owner);
        }
        // Runtimes want to know the mappings of a namespace that is there as well.
        spec["linux"]["uidMappings"] = mappings(&mapped.uids);
        spec["linux"]["gidMappings"] = mappings(&mapped.gids);
        root = (
            root_of(&mapped.uids).unwrap_or(0),
            root_of(&mapped.gids).unwrap_or(0),
        );
        spec["process"]["user"]["uid"] = user_of(&mapped.uids).into();
        spec["process"]["user"]["gid"] = user_of(&mapped.gids).into();
        // The runtime walks to the root as the pod's root user.
        open_the_way(bundle)?;
    }
    spec["linux"]["namespaces"] = namespaces(&options, wanted.netns, &userns_path);
    spec["linux"]["sysctl"] = json!(sysctls(&linux, &options));
    spec["linux"]["cgroupsPath"] = cgroups_path(&linux, wanted).into();
    if options.network() != NamespaceMode::Node && !pod.hostname.is_empty() {
        spec["hostname"] = pod.hostname.clone().into();
    }
    spec["annotations"] = json!(annotations(wanted, pod));
    Ok(Made {
        spec,
        rootfs: rootfs(root.0, root.1),
        has_parent_cgroup: !linux.cgroup_parent.is_empty(),
        userns,
    })
}

fn base(own: &Path, oom_score: Option<i32>) -> Value {
    let mut process = json!({
        "args": [PROGRAM, ACTION],
        "env": [],
        "cwd": "/",
        "user": {"uid": NOBODY, "gid": NOBODY},
        "capabilities": {},
        "noNewPrivileges": true,
    });
    if let Some(score) = oom_score {
        process["oomScoreAdj"] = score.into();
    }
    json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "noexec", "mode=755", "size=64k"]},
            {"destination": PROGRAM, "type": "bind", "source": own,
             "options": ["bind", "ro", "nosuid", "nodev"]},
        ],
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "cpu": {"shares": 2},
            },
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger"],
        },
    })
}

/// Without CAP_SYS_RESOURCE a score can only rise: the inherited one stays.
fn lowers_oom_score() -> Option<i32> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mask = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
    (mask & CAP_SYS_RESOURCE != 0).then_some(OOM_SCORE)
}

fn namespace_options(linux: &LinuxPodSandboxConfig) -> NamespaceOption {
    let context = linux.security_context.as_ref();
    context
        .and_then(|c| c.namespace_options.clone())
        .unwrap_or_default()
}

fn user_namespace(options: &NamespaceOption) -> Option<&UserNamespace> {
    let asked = options.userns_options.as_ref()?;
    (asked.mode() == NamespaceMode::Pod).then_some(asked)
}

/// The kubelet's API knows the pod's and the node's user namespace, and a pod's has ids.
fn check_user_namespace(options: &NamespaceOption) -> Result<()> {
    let bad = |why: &str| Err(Error::new(Kind::Invalid, "userns_options", why));
    match &options.userns_options {
        None => Ok(()),
        Some(asked) => match asked.mode() {
            NamespaceMode::Node => Ok(()),
            NamespaceMode::Pod if asked.uids.is_empty() || asked.gids.is_empty() => {
                bad("a pod's own without mappings")
            }
            NamespaceMode::Pod => Ok(()),
            mode => bad(&format!("mode {}", mode.as_str_name())),
        },
    }
}

/// Of a process's namespaces the path opens to those who may trace it.
pub fn owner_of(netns: &str) -> Result<OwnedFd> {
    let failed = |e: std::io::Error| Error::io("user namespace of", netns, e);
    let file = std::fs::File::open(netns).map_err(failed)?;
    coracle_sys::namespace::owner(&file).map_err(failed)
}

fn open_the_way(bundle: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(bundle, std::fs::Permissions::from_mode(0o711))
        .map_err(|e| Error::io("chmod", bundle.display().to_string(), e))
}

fn mappings(list: &[IdMapping]) -> Value {
    let one = |m: &IdMapping| json!({"containerID": m.container_id, "hostID": m.host_id, "size": m.length});
    list.iter().map(one).collect()
}

fn user_of(list: &[IdMapping]) -> u32 {
    let covers = |m: &IdMapping| {
        NOBODY
            .checked_sub(m.container_id)
            .is_some_and(|offset| offset < m.length)
    };
    if list.iter().any(covers) { NOBODY } else { 0 }
}

fn namespaces(options: &NamespaceOption, netns: &str, userns: &str) -> Value {
    let mut list = vec![json!({"type": "mount"})];
    let mut add = |kind: &str, path: &str| {
        list.push(match path {
            "" => json!({"type": kind}),
            path => json!({"type": kind, "path": path}),
        });
    };
    if user_namespace(options).is_some() {
        add("user", userns);
    }
    if options.network() != NamespaceMode::Node {
        add("network", netns);
        add("uts", "");
    }
    if options.ipc() != NamespaceMode::Node {
        add("ipc", "");
    }
    if options.pid() != NamespaceMode::Node {
        add("pid", "");
    }
    list.into()
}

/// containerd's CRI plugin opens low ports and ping to every user of a pod unless the pod says
/// otherwise (enable_unprivileged_ports, enable_unprivileged_icmp, on since 2.0); it does not
/// hand these to a shim.
fn sysctls(linux: &LinuxPodSandboxConfig, options: &NamespaceOption) -> BTreeMap<String, String> {
    let mut sysctls = linux.sysctls.clone();
    if options.network() != NamespaceMode::Node {
        let mut default = |name: &str, value: &str| {
            sysctls
                .entry(name.to_owned())
                .or_insert_with(|| value.to_owned());
        };
        default("net.ipv4.ip_unprivileged_port_start", "0");
        if user_namespace(options).is_none() {
            default("net.ipv4.ping_group_range", "0 2147483647");
        }
    }
    sysctls
}

/// As containerd's CRI plugin names the cgroups of its containers.
fn cgroups_path(linux: &LinuxPodSandboxConfig, wanted: &Wanted<'_>) -> String {
    let parent = linux.cgroup_parent.as_str();
    let base = parent.rsplit('/').next().unwrap_or(parent);
    match parent {
        "" => format!("/{}/{}", wanted.namespace, wanted.id),
        _ if base.ends_with(".slice") => format!("{base}:cri-containerd:{}", wanted.id),
        _ => format!("{}/{}", parent.trim_end_matches('/'), wanted.id),
    }
}

fn annotations(wanted: &Wanted<'_>, pod: &PodSandboxConfig) -> BTreeMap<String, String> {
    let metadata = pod.metadata.clone().unwrap_or_default();
    let mut annotations = wanted.annotations.clone();
    for (name, value) in [
        ("container-type", "sandbox"),
        ("sandbox-id", wanted.id),
        ("sandbox-name", &metadata.name),
        ("sandbox-namespace", &metadata.namespace),
        ("sandbox-uid", &metadata.uid),
    ] {
        annotations.insert(format!("io.kubernetes.cri.{name}"), value.to_owned());
    }
    annotations
}

/// A client without a pod's description (`ctr sandboxes run`) gives a runtime spec: its word
/// counts for everything but the process and its files, which are ours.
fn from_spec(spec: &mut Value, wanted: &Wanted<'_>, bundle: &Path) -> Result<()> {
    let path = bundle.join("config.json");
    let bad = |e: &dyn std::fmt::Display| {
        Error::new(
            Kind::Invalid,
            "spec of a sandbox",
            path.display().to_string(),
        )
        .source(e)
    };
    let given: Value = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| bad(&e))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Value::Null,
        Err(e) => return Err(bad(&e)),
    };
    let options = NamespaceOption::default();
    spec["linux"]["namespaces"] = namespaces(&options, wanted.netns, "");
    spec["linux"]["cgroupsPath"] = format!("/{}/{}", wanted.namespace, wanted.id).into();
    spec["annotations"] = json!(wanted.annotations);
    for key in ["hostname", "domainname", "annotations"] {
        if !given[key].is_null() {
            spec[key] = given[key].clone();
        }
    }
    for key in [
        "namespaces",
        "uidMappings",
        "gidMappings",
        "sysctl",
        "cgroupsPath",
        "resources",
    ] {
        if !given["linux"][key].is_null() {
            spec["linux"][key] = given["linux"][key].clone();
        }
    }
    let list = spec["linux"]["namespaces"].as_array_mut();
    for namespace in list.into_iter().flatten() {
        // The network is the daemon's where it has made one.
        if namespace["type"] == "network" && !wanted.netns.is_empty() {
            namespace["path"] = wanted.netns.into();
        }
    }
    if !given["linux"]["uidMappings"].is_null() {
        open_the_way(bundle)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(options: NamespaceOption) -> PodSandboxConfig {
        let context = crate::proto::runtime::v1::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        };
        PodSandboxConfig {
            hostname: "web".into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                security_context: Some(context),
                sysctls: [("net.ipv4.ping_group_range".into(), "1 0".into())].into(),
            }),
            ..Default::default()
        }
    }

    fn made(pod: Option<&PodSandboxConfig>, bundle: &Path) -> Made {
        let wanted = Wanted {
            id: "s1",
            namespace: "k8s.io",
            netns: "/run/netns/x",
            annotations: &BTreeMap::new(),
            pod,
        };
        make(&wanted, bundle).unwrap()
    }

    fn kinds(spec: &Value) -> Vec<String> {
        let list = spec["linux"]["namespaces"].as_array().unwrap();
        list.iter()
            .map(|n| {
                let path = n["path"].as_str().map(|p| format!("={p}"));
                format!(
                    "{}{}",
                    n["type"].as_str().unwrap(),
                    path.unwrap_or_default()
                )
            })
            .collect()
    }

    #[test]
    fn a_pod_has_its_own_namespaces() {
        let dir = tempfile::tempdir().unwrap();
        let got = made(Some(&pod(NamespaceOption::default())), dir.path());
        assert_eq!(
            kinds(&got.spec),
            ["mount", "network=/run/netns/x", "uts", "ipc", "pid"]
        );
        assert_eq!(got.spec["hostname"], "web");
        assert_eq!(got.spec["linux"]["cgroupsPath"], "/kubepods/pod1/s1");
        assert!(got.has_parent_cgroup);
        let sysctl = &got.spec["linux"]["sysctl"];
        assert_eq!(sysctl["net.ipv4.ping_group_range"], "1 0");
        assert_eq!(sysctl["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(
            got.spec["annotations"]["io.kubernetes.cri.container-type"],
            "sandbox"
        );
    }

    #[test]
    fn the_nodes_namespaces_are_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let options = NamespaceOption {
            network: NamespaceMode::Node as i32,
            pid: NamespaceMode::Node as i32,
            ipc: NamespaceMode::Node as i32,
            ..Default::default()
        };
        let got = made(Some(&pod(options)), dir.path());
        assert_eq!(kinds(&got.spec), ["mount"]);
        assert!(got.spec["hostname"].is_null());
        let sysctl = &got.spec["linux"]["sysctl"];
        assert!(sysctl["net.ipv4.ip_unprivileged_port_start"].is_null());
    }

    #[test]
    fn slices_become_units() {
        let dir = tempfile::tempdir().unwrap();
        let mut pod = pod(NamespaceOption::default());
        let linux = pod.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
        let got = made(Some(&pod), dir.path());
        assert_eq!(
            got.spec["linux"]["cgroupsPath"],
            "kubepods-pod1.slice:cri-containerd:s1"
        );
    }

    #[test]
    fn a_user_namespace_of_the_host_network_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let map = |length| IdMapping {
            host_id: 100_000,
            container_id: 0,
            length,
        };
        let options = NamespaceOption {
            network: NamespaceMode::Node as i32,
            userns_options: Some(UserNamespace {
                mode: NamespaceMode::Pod as i32,
                uids: vec![map(65536)],
                gids: vec![map(1000)],
            }),
            ..Default::default()
        };
        let got = made(Some(&pod(options)), dir.path());
        assert_eq!(kinds(&got.spec), ["mount", "user", "ipc", "pid"]);
        let user = &got.spec["process"]["user"];
        assert_eq!((&user["uid"], &user["gid"]), (&json!(65535), &json!(0)));
        assert_eq!(got.spec["linux"]["uidMappings"][0]["hostID"], 100_000);
    }

    #[test]
    fn only_the_pods_and_the_nodes_user_namespace_are_known() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, text) in [
            (NamespaceMode::Container, "mode CONTAINER"),
            (NamespaceMode::Target, "mode TARGET"),
            (NamespaceMode::Pod, "without mappings"),
        ] {
            let options = NamespaceOption {
                userns_options: Some(UserNamespace {
                    mode: mode as i32,
                    ..Default::default()
                }),
                ..Default::default()
            };
            let pod = pod(options);
            let wanted = Wanted {
                id: "s1",
                namespace: "k8s.io",
                netns: "",
                annotations: &BTreeMap::new(),
                pod: Some(&pod),
            };
            let error = make(&wanted, dir.path()).err().unwrap();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn a_clients_spec_counts_but_for_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let given = json!({"hostname": "h", "process": {"args": ["x"]},
            "linux": {"namespaces": [{"type": "network"}, {"type": "ipc"}], "cgroupsPath": "/g"}});
        std::fs::write(dir.path().join("config.json"), given.to_string()).unwrap();
        let got = made(None, dir.path());
        assert_eq!(kinds(&got.spec), ["network=/run/netns/x", "ipc"]);
        assert_eq!(got.spec["hostname"], "h");
        assert_eq!(got.spec["process"]["args"], json!(["/pause", "pause"]));
        assert_eq!(got.spec["linux"]["cgroupsPath"], "/g");
    }
}
