//! I1: another container that shares a volume renames while the runtime mounts.
//!
//! A thread exchanges a directory and a symlink to the canary with renameat2(2) as fast as it can,
//! while containers are run whose mounts lie in that directory. One that lands outside shows as a
//! file on the host, or as a mount that is missing inside.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::json;

use super::stage::Stage;
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "runc 2021-30465, 2024-45310",
            "a directory of a volume and a symlink exchanged while mounts are made in it",
            volume,
        ),
        case(
            "runc 2025-31133, 2025-52565, 2025-52881",
            "nodes of a /dev from a volume exchanged for symlinks while they are used",
            nodes,
        ),
    ]
}

/// Exchanges two names until told to stop; gives how often.
fn spin(a: &Path, b: &Path, stop: &AtomicBool, count: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        if renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Runs `attempt` until the time is over, or something was harmed, while `pairs` are exchanged.
fn race(
    stage: &Stage<'_>,
    pairs: &[(&Path, &Path)],
    mut attempt: impl FnMut() -> Result<Option<String>>,
) -> Result<Verdict> {
    let stop = AtomicBool::new(false);
    let count = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_secs(stage.options.seconds);
    let mut runs = 0u64;
    let found = std::thread::scope(|scope| {
        for (a, b) in pairs {
            scope.spawn(|| spin(a, b, &stop, &count));
        }
        let mut found = Ok(None);
        while Instant::now() < end {
            found = attempt();
            runs += 1;
            if !matches!(found, Ok(None)) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        found
    })?;
    let count = count.load(Ordering::Relaxed);
    ensure!(count > 100, "the race never ran: {count} exchanges");
    Ok(match found {
        Some(what) => Verdict::Vulnerable(format!("after {runs} containers: {what}")),
        None => Verdict::Safe(format!("{runs} containers, {count} exchanges")),
    })
}

fn volume(stage: &Stage<'_>) -> Result<Verdict> {
    let mut set = stage.set()?.script("cat /proc/self/mountinfo");
    let shared = set.bundle.join("shared");
    fs::create_dir_all(shared.join("place"))?;
    symlink(&set.canary, shared.join("link"))?;
    set = set.mount(
        json!({"destination": "/mnt", "type": "bind", "source": shared,
        "options": ["bind", "rw"]}),
    );
    let hosts = set.bundle.join("hosts");
    fs::write(&hosts, "")?;
    let plain = set.config["mounts"].clone();
    let (place, link) = (shared.join("place"), shared.join("link"));
    let mut number = 0;
    race(stage, &[(&place, &link)], || {
        // Made by none before: the runtime makes directories and a file to mount on.
        number += 1;
        let at = |name: &str| format!("/mnt/place/{name}-{number}");
        let mut mounts = plain.clone();
        if let Some(list) = mounts.as_array_mut() {
            let tmpfs = |destination: String| {
                json!({"destination": destination, "type": "tmpfs", "source": "raced",
                    "options": ["size=64k"]})
            };
            list.push(tmpfs(at("deep/below/dir")));
            list.push(tmpfs(at("dir")));
            list.push(
                json!({"destination": at("file"), "type": "bind", "source": hosts,
                "options": ["bind"]}),
            );
            list.push(tmpfs("/mnt/place".to_owned()));
        }
        set.config["mounts"] = mounts;
        let ran = stage.run(&set)?;
        if let Some(harm) = set.harm()? {
            return Ok(Some(harm));
        }
        if !ran.status.is_some_and(|status| status.success()) {
            return Ok(None);
        }
        // One that was made outside of the root has gone with the old root. One on a symlink that
        // was resolved inside lies elsewhere, but is there.
        let raced = ran
            .out
            .lines()
            .filter(|line| line.contains("raced"))
            .count();
        if raced != 3 {
            return Ok(Some(format!(
                "the container runs with {raced} of its 3 mounts"
            )));
        }
        Ok(None)
    })
}

fn nodes(stage: &Stage<'_>) -> Result<Verdict> {
    let script = "echo keys $(stat -L -c '%F %t:%T' /proc/keys); \
        echo pattern $(stat -c %F /proc/sys/kernel/core_pattern); cat /proc/self/mountinfo";
    let set = stage.set()?.script(script).unmounted("/dev");
    let shared = set.bundle.join("dev");
    fs::create_dir_all(shared.join("pts"))?;
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(
        &shared.join("null"),
        SFlag::S_IFCHR,
        Mode::S_IRWXU,
        makedev(1, 3),
    )?;
    fs::write(shared.join("console"), "")?;
    symlink("/proc/sys/kernel/core_pattern", shared.join("a"))?;
    symlink(set.canary.join("secret"), shared.join("b"))?;
    let set = set
        .mount(
            json!({"destination": "/dev", "type": "bind", "source": shared,
            "options": ["bind", "rw", "dev"]}),
        )
        .with("/process/terminal", json!(true));
    let path = |name: &str| shared.join(name);
    let (null, console, a, b) = (path("null"), path("console"), path("a"), path("b"));
    let attempt = || {
        let ran = stage.run_on_terminal(&set)?;
        if let Some(harm) = set.harm()? {
            return Ok(Some(harm));
        }
        let line = |name: &str| {
            let mut lines = ran.out.lines();
            lines
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        match line("keys") {
            None | Some("character special file 1:3") => {}
            Some(other) => return Ok(Some(format!("/proc/keys is {other:?}, not masked"))),
        }
        // Over /proc/sys/kernel/core_pattern there is the procfs itself, read-only, and no more.
        match line("pattern") {
            None | Some("regular file" | "regular empty file") => Ok(None),
            Some(other) => Ok(Some(format!("core_pattern is a {other}"))),
        }
    };
    race(stage, &[(&null, &a), (&console, &b)], attempt)
}
