//! I1: a /proc that is not the kernel's, and what a runtime covers or writes there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::stage::{Set, Stage, tell};
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "runc 2019-19921, 2023-27561",
            "/proc of the image is a symlink into a volume with a procfs of its own",
            proc_is_a_link,
        ),
        case(
            "runc 2019-19921",
            "/proc of the image is a file, or its mount a tmpfs or a bind",
            proc_is_no_procfs,
        ),
        case(
            "runc 2025-31133, youki 2025-62161",
            "/dev/null of the image is a symlink, a file or another device: masks cover by it",
            masks,
        ),
        case(
            "runc 2025-52881, youki 2025-62596",
            "writes of sysctls and labels redirected by a /proc from a volume",
            writes,
        ),
    ]
}

/// A directory that looks like procfs to who does not ask the kernel.
fn false_proc(set: &Set) -> Result<std::path::PathBuf> {
    let volume = set.bundle.join("proc");
    let secret = set.canary.join("secret");
    for dir in [
        "self/attr/apparmor",
        "thread-self/attr/apparmor",
        "sys/net/ipv4",
        "1/attr",
    ] {
        fs::create_dir_all(volume.join(dir))?;
    }
    for file in [
        "self/attr/exec",
        "self/attr/apparmor/exec",
        "thread-self/attr/exec",
        "thread-self/attr/apparmor/exec",
        "sys/net/ipv4/ip_forward",
        "sysrq-trigger",
        "keys",
    ] {
        symlink(&secret, volume.join(file))?;
    }
    Ok(volume)
}

/// Runs, and if the container runs, its /proc has to be a procfs and covered as asked.
fn closed(stage: &Stage<'_>, set: &Set) -> Result<Verdict> {
    let ran = stage.run(set)?;
    let verdict = set.judge(&ran)?;
    if verdict != Verdict::Safe(tell(&ran)) || !ran.out.contains("started") {
        return Ok(verdict);
    }
    let line = |name: &str| {
        let lines = ran.out.lines();
        lines
            .rev()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
            .unwrap_or_default()
            .to_owned()
    };
    if line("type") != "proc" {
        return Ok(Verdict::Vulnerable(format!(
            "the container runs with a /proc of type {:?}",
            line("type")
        )));
    }
    if line("keys") != "character special file 1:3" {
        return Ok(Verdict::Vulnerable(format!(
            "the container runs and /proc/keys, which is to be masked, is {:?}",
            line("keys")
        )));
    }
    Ok(verdict)
}

const LOOK: &str = "echo started; echo type $(stat -f -c %T /proc); \
    echo keys $(stat -L -c '%F %t:%T' /proc/keys)";

fn proc_is_a_link(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for target in ["/mnt/volume", "mnt/volume", "/mnt/volume/../volume"] {
        let set = stage.set()?.script(LOOK);
        let volume = false_proc(&set)?;
        set.link("proc", Path::new(target))?;
        let bind = bind("/mnt/volume", &volume);
        // Before /proc, so that it is there when /proc is mounted.
        let mut mounts = set.config["mounts"].clone();
        if let Some(list) = mounts.as_array_mut() {
            list.insert(0, bind);
        }
        let set = set.with("/mounts", mounts);
        verdicts.push(closed(stage, &set)?);
    }
    Ok(Verdict::worst(verdicts))
}

fn bind(destination: &str, source: &Path) -> Value {
    json!({"destination": destination, "type": "bind", "source": source,
        "options": ["bind", "rw"]})
}

fn proc_is_no_procfs(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    let set = stage.set()?.script(LOOK);
    fs::remove_dir(set.rootfs.join("proc"))?;
    fs::write(set.rootfs.join("proc"), "")?;
    verdicts.push(closed(stage, &set)?);
    let set = stage.set()?.script(LOOK);
    let volume = false_proc(&set)?;
    for mount in [
        json!({"destination": "/proc", "type": "tmpfs", "source": "tmpfs"}),
        bind("/proc", &volume),
        bind("/proc/self", &volume.join("self")),
        bind("/proc/sys", &volume.join("sys")),
    ] {
        for first in [true, false] {
            let set = stage.set()?.script(LOOK);
            let set = if first { set.unmounted("/proc") } else { set };
            let set = set.mount(mount.clone());
            verdicts.push(closed(stage, &set)?);
        }
    }
    Ok(Verdict::worst(verdicts))
}

fn masks(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for null in ["link", "proc link", "file", "device", "fifo", "directory"] {
        for mounted in [false, true] {
            let set = stage.set()?.script(LOOK).unmounted("/dev");
            let dev = if mounted {
                // A volume of the attacker's, where the node is not the runtime's own.
                let volume = set.bundle.join("dev");
                fs::create_dir(&volume)?;
                volume
            } else {
                set.rootfs.join("dev")
            };
            let path = dev.join("null");
            match null {
                "link" => symlink(set.canary.join("secret"), &path)?,
                "proc link" => symlink("/proc/sys/kernel/core_pattern", &path)?,
                "file" => fs::write(&path, "not the device\n")?,
                "device" => node(&path, 5)?,
                "fifo" => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?,
                _ => fs::create_dir(&path)?,
            }
            let set = if mounted {
                let mount = bind("/dev", &dev);
                set.mount(mount)
            } else {
                set
            };
            verdicts.push(match closed(stage, &set)? {
                Verdict::Vulnerable(what) => {
                    Verdict::Vulnerable(format!("/dev/null is a {null}: {what}"))
                }
                verdict => verdict,
            });
        }
    }
    Ok(Verdict::worst(verdicts))
}

/// A device of the memory driver, /dev/zero being 5.
fn node(path: &Path, minor: u64) -> Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    Ok(mknod(
        path,
        SFlag::S_IFCHR,
        Mode::S_IRWXU,
        makedev(1, minor),
    )?)
}

fn writes(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for place in [
        "/proc",
        "/proc/sys",
        "/proc/self",
        "/proc/self/attr",
        "/proc/thread-self",
    ] {
        for (sysctl, label) in [(true, ""), (false, "unconfined")] {
            let set = stage.set()?.script(LOOK);
            let volume = false_proc(&set)?;
            let below = place.strip_prefix("/proc").unwrap_or_default();
            let source = volume.join(below.trim_start_matches('/'));
            let mut set = if place == "/proc" {
                set.unmounted("/proc")
            } else {
                set
            };
            set = set.mount(bind(place, &source));
            if sysctl {
                set = set.with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
            }
            if !label.is_empty() {
                set = set
                    .with("/process/apparmorProfile", json!(label))
                    .with("/process/selinuxLabel", json!(label));
            }
            verdicts.push(closed(stage, &set)?);
        }
    }
    Ok(Verdict::worst(verdicts))
}
