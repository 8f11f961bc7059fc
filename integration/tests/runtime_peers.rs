//! What a container sees under coracle and under Debian's runc and crun, from the same config.
//! Differences that are allowed are listed with their reason; any other fails.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{need_root, skip};
use serde_json::{Value, json};

const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// Runs the probe under one runtime; what differs from run to run is taken out.
fn see(bench: &Bench, runtime: &Runtime, config: &Config) -> Result<Value> {
    let id = format!("{}-c", runtime.name);
    // Same path in every case, as it is part of what the container sees.
    let config = config
        .clone()
        .set("/linux/cgroupsPath", format!("/{}/c", bench.mark));
    let bundle = bench.bundle("b", &config)?;
    let text = runtime.run(&["run", "-b", &bundle.display().to_string(), &id])?;
    let mut seen: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let map = seen.as_object_mut().context("an object")?;
    // Inode numbers: only whether it is the host's matters.
    if let Some(namespaces) = map.get_mut("namespaces").and_then(Value::as_object_mut) {
        for (kind, inode) in namespaces.iter_mut() {
            let host = std::fs::read_link(format!("/proc/thread-self/ns/{kind}"))?;
            *inode = json!(inode.as_str() == host.to_str());
        }
    }
    if let Some(mounts) = map.get_mut("mounts").and_then(Value::as_array_mut) {
        for mount in mounts {
            *mount = comparable(mount);
        }
    }
    // Signals 32 and 33 are the C library's; a Go program takes them back from its caller.
    if let Some(ignored) = map.get_mut("signals").and_then(|s| s.get_mut("ignored")) {
        let bits = u64::from_str_radix(ignored.as_str().unwrap_or_default(), 16)?;
        *ignored = json!(format!("{:x}", bits & !(0b11 << 31)));
    }
    // Which descriptors are open; a runtime may pass its own stdio on or copy it.
    if let Some(fds) = map.get_mut("fds").and_then(Value::as_object_mut) {
        for target in fds.values_mut() {
            *target = Value::Null;
        }
    }
    Ok(seen)
}

/// Of a mount, what a process in the container can tell: where, what kind, and what it forbids.
/// Read-only may be the mount's or the file system's. Sources are names without a meaning.
fn comparable(mount: &Value) -> Value {
    let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
    let target = text("target");
    // A masked file is some null device, from wherever the runtime took it.
    if target.starts_with("/proc/") && text("type").ends_with("tmpfs") {
        return json!({"masked": target});
    }
    let read_only = |key: &str| text(key).split(',').any(|o| o == "ro");
    let mut flags: Vec<String> = text("flags")
        .split(',')
        .filter(|f| !matches!(*f, "ro" | "rw" | "relatime"))
        .map(str::to_owned)
        .collect();
    flags.sort();
    let size = text("options")
        .split(',')
        .find(|o| o.starts_with("size="))
        .map(str::to_owned);
    json!({
        "target": target,
        "type": text("type"),
        "readOnly": read_only("flags") || read_only("options"),
        "flags": flags,
        "size": size.filter(|_| target != "/" && !target.starts_with("/sys/firmware")),
        "propagation": text("propagation").split(':').next().unwrap_or_default(),
    })
}

/// Fields where two views differ.
fn differences(ours: &Value, theirs: &Value) -> Vec<String> {
    let (Some(a), Some(b)) = (ours.as_object(), theirs.as_object()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for key in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
        let (left, right) = (a.get(key), b.get(key));
        if left == right {
            continue;
        }
        match (
            left.and_then(Value::as_array),
            right.and_then(Value::as_array),
        ) {
            (Some(left), Some(right)) => {
                for item in left.iter().filter(|i| !right.contains(i)) {
                    found.push(format!("{key}: only ours: {item}"));
                }
                for item in right.iter().filter(|i| !left.contains(i)) {
                    found.push(format!("{key}: only theirs: {item}"));
                }
            }
            _ => found.push(format!("{key}: ours {left:?}, theirs {right:?}")),
        }
    }
    found
}

/// Configs, each with one thing that is not the default.
fn cases(bench: &Bench) -> Vec<(&'static str, Config)> {
    let base = || bench.config("c", &["show"]);
    let all = json!(["CAP_CHOWN", "CAP_NET_RAW", "CAP_SETUID", "CAP_SYS_ADMIN"]);
    vec![
        ("default", base()),
        (
            "user",
            base().set(
                "/process/user",
                json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8]}),
            ),
        ),
        ("umask", base().set("/process/user/umask", 0o027)),
        ("cwd", base().set("/process/cwd", "/app")),
        (
            "new privileges",
            base().set("/process/noNewPrivileges", false),
        ),
        (
            "capabilities",
            base().set(
                "/process/capabilities",
                json!({"bounding": all, "effective": all, "permitted": all}),
            ),
        ),
        (
            "ambient capabilities",
            base()
                .set("/process/user", json!({"uid": 1000, "gid": 1000}))
                .set(
                    "/process/capabilities",
                    json!({"bounding": all, "effective": all, "permitted": all,
                           "inheritable": all, "ambient": all}),
                ),
        ),
        (
            "no capabilities",
            base().set("/process/capabilities", json!({})),
        ),
        (
            "rlimits",
            base().set(
                "/process/rlimits",
                json!([{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256},
                       {"type": "RLIMIT_CORE", "hard": 0, "soft": 0}]),
            ),
        ),
        ("oom score", base().set("/process/oomScoreAdj", 100)),
        ("read-only root", base().set("/root/readonly", true)),
        ("hostname", base().set("/hostname", "another")),
        (
            "host network",
            base().set(
                "/linux/namespaces",
                json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]),
            ),
        ),
        (
            "sysctl",
            base().set(
                "/linux/sysctl",
                json!({"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}),
            ),
        ),
        (
            "cgroup namespace",
            base().push("/linux/namespaces", json!({"type": "cgroup"})),
        ),
        (
            "tmpfs and bind mounts",
            base()
                .push(
                    "/mounts",
                    json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                      "options": ["nosuid", "nodev", "size=1m", "mode=1777"]}),
                )
                .push(
                    "/mounts",
                    json!({"destination": "/app", "type": "bind", "source": "/etc",
                      "options": ["rbind", "ro", "nosuid"]}),
                ),
        ),
        (
            "device",
            base().set(
                "/linux/devices",
                json!([{"path": "/dev/fuse", "type": "c", "major": 10,
                      "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}]),
            ),
        ),
        (
            "seccomp",
            base().set(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                       "architectures": ["SCMP_ARCH_X86_64"],
                       "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}),
            ),
        ),
        (
            "user namespace",
            base()
                .push("/linux/namespaces", json!({"type": "user"}))
                .set(
                    "/linux/uidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 5000}]),
                )
                .set(
                    "/linux/gidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 5000}]),
                ),
        ),
        (
            "limits",
            base()
                .set("/linux/resources/memory", json!({"limit": 67_108_864}))
                .set(
                    "/linux/resources/cpu",
                    json!({"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"}),
                )
                .set("/linux/resources/pids", json!({"limit": 20})),
        ),
    ]
}

/// What may differ from a peer, and why.
fn allowed(peer: &str, difference: &str) -> bool {
    // Asked to mount the hierarchies read-only, Debian's runc and crun leave the tmpfs above them
    // writable; newer releases and we do not.
    let above_hierarchies = "\"target\":\"/sys/fs/cgroup\",\"type\":\"tmpfs\"";
    if difference.starts_with("mounts: ") && difference.contains(above_hierarchies) {
        return true;
    }
    // crun makes /dev/core where the kernel has no /proc/kcore for it to point to, and binds the
    // host's device nodes into a user namespace with flags that runc does not add.
    peer == "crun"
        && (difference == "devices: only theirs: \"core\""
            || (difference.contains("\"target\":\"/dev/")
                && difference.contains("\"type\":\"devtmpfs\"")))
}

fn compare_with(peer: &str) -> Result<Option<Vec<String>>> {
    let bench = Bench::new()?;
    let Some(theirs) = bench.peer(peer)? else {
        return Ok(None);
    };
    if peer == "crun" {
        // crun refuses a hybrid host whose cgroup2 mount has controllers. In the test's own mount
        // namespace that mount can go, for both alike.
        let _ = nix::mount::umount(UNIFIED);
    }
    let ours = bench.coracle()?;
    let mut found = Vec::new();
    for (case, config) in cases(&bench) {
        let left = see(&bench, &ours, &config);
        let right = see(&bench, &theirs, &config);
        match (left, right) {
            (Ok(left), Ok(right)) => {
                let new = differences(&left, &right);
                found.extend(
                    new.into_iter()
                        .filter(|d| !allowed(peer, d))
                        .map(|d| format!("{case}: {d}")),
                );
            }
            (Err(error), Ok(_)) => found.push(format!("{case}: only ours fails: {error:#}")),
            (Ok(_), Err(error)) => found.push(format!("{case}: only theirs fails: {error:#}")),
            (Err(_), Err(_)) => {}
        }
    }
    if peer == "crun" {
        // It writes there all the same, and what lies below the mount is a plain directory.
        let _ = std::fs::remove_dir_all(Path::new(UNIFIED).join(&bench.mark));
    }
    bench.finish()?;
    Ok(Some(found))
}

#[test]
fn container_under_coracle_sees_what_it_sees_under_runc() -> Result<()> {
    need_root!();
    let Some(found) = compare_with("runc")? else {
        skip!("runc is not installed")
    };
    ensure!(found.is_empty(), "differences:\n  {}", found.join("\n  "));
    Ok(())
}

#[test]
fn container_under_coracle_sees_what_it_sees_under_crun() -> Result<()> {
    need_root!();
    let Some(found) = compare_with("crun")? else {
        skip!("crun is not installed")
    };
    ensure!(found.is_empty(), "differences:\n  {}", found.join("\n  "));
    Ok(())
}
