//! `coracle spec`: writes a starter config.json, the same that `runc spec` writes.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::{GlobalArgs, SPEC_VERSION};
use crate::error::{Error, Kind, Result};

const CONFIG: &str = "config.json";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// path to the root of the bundle directory
    #[arg(long, short, value_name = "value")]
    bundle: Option<PathBuf>,
    /// generate a configuration for a rootless container
    #[arg(long)]
    rootless: bool,
}

pub fn run(args: &Args, _global: &GlobalArgs) -> Result<ExitCode> {
    let path = args.bundle.as_deref().unwrap_or(Path::new("")).join(CONFIG);
    let ids = args.rootless.then(|| {
        (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        )
    });
    let mut text = serde_json::to_string_pretty(&starter(ids))
        .map_err(|e| Error::new(Kind::Internal, "write as JSON", CONFIG).source(e))?;
    text.push('\n');
    let opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o666)
        .open(&path);
    match opened.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::new(
            Kind::Exists,
            format!("File {CONFIG} exists. Remove it first"),
            "",
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let bundle = args.bundle.as_deref().unwrap_or(Path::new("."));
            Err(Error::system("chdir", bundle.display().to_string(), e))
        }
        Err(e) => Err(Error::system("write", path.display().to_string(), e)),
    }
}

/// The starter config; with the caller's (uid, gid) it is the rootless one.
fn starter(rootless: Option<(u32, u32)>) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm"
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "coracle",
        "mounts": mounts(rootless.is_some()),
        "linux": linux(rootless)
    })
}

fn mounts(rootless: bool) -> Value {
    // Group 5 (tty) is not mapped for a user who maps only himself.
    let mut devpts = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    if !rootless {
        devpts.push("gid=5");
    }
    // A new sysfs needs an owned network namespace, and rootless starts without one.
    let sys = if rootless {
        json!({ "destination": "/sys", "type": "none", "source": "/sys",
                "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] })
    } else {
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"] })
    };
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
          "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": devpts },
        { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
          "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
          "options": ["nosuid", "noexec", "nodev"] },
        sys,
        { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
          "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
    ])
}

fn linux(rootless: Option<(u32, u32)>) -> Value {
    let mut kinds = vec!["pid", "network", "ipc", "uts", "mount"];
    // runc's spec adds a cgroup namespace where cgroup v2 is the only hierarchy.
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        kinds.push("cgroup");
    }
    if rootless.is_some() {
        kinds.retain(|kind| *kind != "network");
        kinds.push("user");
    }
    let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    let mut linux = json!({
        "namespaces": namespaces,
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
            "/proc/scsi"
        ],
        "readonlyPaths": [
            "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
        ]
    });
    match rootless {
        Some((uid, gid)) => {
            linux["uidMappings"] = json!([{ "containerID": 0, "hostID": uid, "size": 1 }]);
            linux["gidMappings"] = json!([{ "containerID": 0, "hostID": gid, "size": 1 }]);
        }
        None => {
            linux["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
        }
    }
    linux
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starter_parses_as_a_runtime_spec() {
        for rootless in [None, Some((1000, 1001))] {
            let text = starter(rootless).to_string();
            let spec: coracle_oci::config::spec::Spec = serde_json::from_str(&text).unwrap();
            assert_eq!(spec.version(), SPEC_VERSION);
        }
    }

    #[test]
    fn rootless_maps_the_caller_and_keeps_the_network() {
        let value = starter(Some((1000, 1001)));
        assert_eq!(value["linux"]["uidMappings"][0]["hostID"], 1000);
        assert_eq!(value["linux"]["gidMappings"][0]["hostID"], 1001);
        assert!(value["linux"].get("resources").is_none());
        let kinds = value["linux"]["namespaces"].to_string();
        assert!(kinds.contains("user") && !kinds.contains("network"));
        assert!(!value["mounts"].to_string().contains("gid=5"));
    }

    #[test]
    fn an_existing_config_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let args = Args {
            bundle: Some(dir.path().into()),
            rootless: false,
        };
        let global = GlobalArgs {
            root: dir.path().into(),
            log: None,
            log_format: super::super::LogFormat::Text,
            debug: false,
            systemd_cgroup: false,
            rootless: super::super::Rootless::Auto,
        };
        run(&args, &global).unwrap();
        let error = run(&args, &global).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
        assert!(error.to_string().ends_with("exists. Remove it first"));
    }
}
