//! I7: what belongs to the whole host: sysctls without a namespace of their own, devices.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;

use super::stage::{Stage, tell};
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "CRI-O 2022-0811",
            "sysctls of the whole host, plain and smuggled by + = / . and newlines",
            sysctls,
        ),
        case(
            "-",
            "network, IPC and UTS sysctls without a namespace of that kind",
            shared_sysctls,
        ),
        case(
            "-",
            "a device that the config denies, opened inside run and exec",
            devices,
        ),
    ]
}

/// A setting of the whole host that may be another for a moment.
const KNOB: &str = "/proc/sys/fs/lease-break-time";

fn sysctls(stage: &Stage<'_>) -> Result<Verdict> {
    let was = fs::read_to_string(KNOB)?;
    let mut verdicts = Vec::new();
    for (name, value) in [
        ("fs.lease-break-time", "44"),
        ("fs/lease-break-time", "44"),
        ("kernel.shm_rmid_forced", "1+fs.lease-break-time=44"),
        ("kernel.shm_rmid_forced", "1\nfs.lease-break-time=44"),
        ("kernel.shm_rmid_forced=1+fs.lease-break-time", "44"),
        ("kernel.shm_rmid_forced=1\nfs.lease-break-time", "44"),
        ("net.ipv4.../../fs/lease-break-time", "44"),
        ("net/../fs/lease-break-time", "44"),
        ("net.ipv4/../../fs.lease-break-time", "44"),
        ("net./../fs/lease-break-time", "44"),
        ("fs.mqueue./../lease-break-time", "44"),
        ("fs.mqueue/../../lease-break-time", "44"),
        ("kernel.sem/../../fs/lease-break-time", "44"),
        ("/fs/lease-break-time", "44"),
        ("user./../fs/lease-break-time", "44"),
    ] {
        let set = stage
            .set()?
            .script("true")
            .with("/linux/sysctl", json!({name: value}));
        let ran = stage.run(&set)?;
        let is = fs::read_to_string(KNOB)?;
        verdicts.push(if is == was {
            Verdict::Safe(tell(&ran))
        } else {
            fs::write(KNOB, &was)?;
            Verdict::Vulnerable(format!("{name:?} = {value:?} has set {KNOB}"))
        });
    }
    Ok(Verdict::worst(verdicts))
}

fn shared_sysctls(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for (kind, name, value) in [
        ("network", "net.ipv4.ip_default_ttl", "63"),
        ("network", "net/ipv4/ip_default_ttl", "63"),
        ("ipc", "kernel.msgmax", "8191"),
        ("ipc", "fs.mqueue.msg_max", "9"),
        ("uts", "kernel.domainname", "evil"),
        ("uts", "kernel.hostname", "evil"),
    ] {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let was = fs::read_to_string(&path)?;
        let mut set = stage
            .set()?
            .script("true")
            .with("/linux/sysctl", json!({name: value}))
            .with("/hostname", json!(""));
        if let Some(list) = set.config["linux"]["namespaces"].as_array_mut() {
            list.retain(|namespace| namespace["type"] != kind);
        }
        let ran = stage.run(&set)?;
        let is = fs::read_to_string(&path)?;
        verdicts.push(if is == was {
            Verdict::Safe(tell(&ran))
        } else {
            fs::write(&path, &was)?;
            Verdict::Vulnerable(format!("{name} of the host is {}", is.trim()))
        });
    }
    Ok(Verdict::worst(verdicts))
}

fn devices(stage: &Stage<'_>) -> Result<Verdict> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    // One that root of the host can open, so that it is the cgroup that refuses.
    let candidates = [(10, 229), (10, 200), (10, 237), (1, 11)];
    let script = "(exec 3</node) && echo opened; (exec 3</dev/null) && echo null; true";
    for (major, minor) in candidates {
        let set = stage.set()?.script(&format!("{script}; sleep 600"));
        let node = set.rootfs.join("node");
        mknod(&node, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(major, minor))?;
        if fs::File::open(&node).is_err() {
            continue;
        }
        let started = stage.start(&set)?;
        ensure!(
            started.status.is_some_and(|s| s.success()),
            "{}",
            started.error
        );
        let executed = stage.call(&["exec", &set.id, "/bin/sh", "-c", script])?;
        stage.delete(&set.id)?;
        let foreground = stage.set()?.script(script);
        let node = foreground.rootfs.join("node");
        mknod(&node, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(major, minor))?;
        let ran = stage.run(&foreground)?;
        for (what, ran) in [("exec", &executed), ("run", &ran)] {
            ensure!(
                ran.out.contains("null"),
                "{what}: {} {}",
                ran.out,
                ran.error
            );
            if ran.out.contains("opened") {
                return Ok(Verdict::Vulnerable(format!(
                    "{major}:{minor} is opened by {what}"
                )));
            }
        }
        return Ok(Verdict::Safe(format!("{major}:{minor} is denied in both")));
    }
    Ok(Verdict::Unsupported("no device to try with".to_owned()))
}
