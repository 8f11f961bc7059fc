//! I1: symlinks of the image, at every place that a runtime mounts on or makes something at.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::stage::{Set, Stage};
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "runc 2019-19921, 2023-27561; crun #111",
            "mount destinations and cwd as absolute symlinks to the host",
            |stage| places(stage, Kind::Absolute),
        ),
        case(
            "runc 2019-19921, 2023-27561; crun #111",
            "mount destinations and cwd as relative symlinks with `..`",
            |stage| places(stage, Kind::Relative),
        ),
        case(
            "runc 2019-19921, 2023-27561; crun #111",
            "mount destinations and cwd as dangling symlinks",
            |stage| places(stage, Kind::Dangling),
        ),
        case(
            "runc 2019-19921, 2023-27561; crun #111",
            "mount destinations and cwd as magic links of the host's /proc",
            |stage| places(stage, Kind::Magic),
        ),
        case(
            "runc 2026-41579, crun 2026-47766",
            "/dev of the image is a symlink, nothing is mounted there",
            dev_link,
        ),
        case(
            "runc 2026-41579 class",
            "nodes of /dev as symlinks of every kind, nothing mounted on /dev",
            nodes,
        ),
        case(
            "crun 2026-88264, runc 2025-52565",
            "/dev/console as a symlink, with a terminal, nothing mounted on /dev",
            console,
        ),
        case(
            "crun 2026-88265",
            "/dev/null as a symlink to a host file, stdio changes its owner",
            null_stdio,
        ),
    ]
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Absolute,
    Relative,
    Dangling,
    Magic,
}

const KINDS: [Kind; 4] = [Kind::Absolute, Kind::Relative, Kind::Dangling, Kind::Magic];

impl Kind {
    /// A target that leads to `name` in the canary.
    fn target(self, set: &Set, name: &str) -> PathBuf {
        let canary = &set.canary;
        let stripped = canary.strip_prefix("/").unwrap_or(canary);
        match self {
            Kind::Absolute => canary.join(name),
            Kind::Relative => Path::new("../../../../../../../../../../..")
                .join(stripped)
                .join(name),
            Kind::Dangling => canary.join("made").join(name),
            // Of the runtime itself, whose root is the host's.
            Kind::Magic => Path::new("/proc/self/root").join(stripped).join(name),
        }
    }
}

/// Where something is mounted or entered, and what the symlink there leads to.
const PLACES: [(&str, &str); 10] = [
    ("dev", "dir"),
    ("proc", "dir"),
    ("sys", "dir"),
    ("etc", "dir"),
    ("tmp", "dir"),
    ("app", "dir"),
    ("mnt", "dir"),
    ("mnt/volume", "dir"),
    ("etc/hosts", "hosts"),
    ("mnt/file", "file"),
];

fn full(stage: &Stage<'_>) -> Result<Set> {
    let set = stage.set()?.script("touch /app/x /mnt/volume/y; true");
    let volume = set.bundle.join("volume");
    fs::create_dir(&volume)?;
    fs::write(set.bundle.join("hosts"), "127.0.0.1 localhost\n")?;
    let hosts = set.bundle.join("hosts");
    let bind = |destination: &str, source: &Path| {
        json!({"destination": destination, "type": "bind", "source": source,
            "options": ["bind", "rw"]})
    };
    Ok(set
        .mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}))
        .mount(bind("/mnt/volume", &volume))
        .mount(bind("/mnt/file", &hosts))
        .mount(bind("/etc/hosts", &hosts))
        .with("/process/cwd", json!("/app")))
}

fn places(stage: &Stage<'_>, kind: Kind) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for (place, name) in PLACES {
        let set = full(stage)?;
        // /app is no mount: what the program itself writes there is inside, wherever the link leads.
        set.link(place, &kind.target(&set, name))?;
        let ran = stage.run(&set)?;
        verdicts.push(match set.judge(&ran)? {
            Verdict::Vulnerable(what) => Verdict::Vulnerable(format!("/{place}: {what}")),
            verdict => verdict,
        });
    }
    Ok(Verdict::worst(verdicts))
}

fn dev_link(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for kind in KINDS {
        for target in ["dir", "."] {
            let set = stage.set()?.script("true").unmounted("/dev");
            set.link("dev", &kind.target(&set, target))?;
            let ran = stage.run(&set)?;
            verdicts.push(set.judge(&ran)?);
        }
    }
    Ok(Verdict::worst(verdicts))
}

fn nodes(stage: &Stage<'_>) -> Result<Verdict> {
    const NODES: [&str; 14] = [
        "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stdin",
        "stdout", "tty", "zero",
    ];
    let mut verdicts = Vec::new();
    for kind in KINDS {
        for node in NODES {
            let set = stage.set()?.script("true").unmounted("/dev");
            let name = match node {
                "console" | "null" | "ptmx" | "pts" | "shm" => node,
                "mqueue" => "dir",
                _ => "file",
            };
            set.link(&format!("dev/{node}"), &kind.target(&set, name))?;
            let ran = stage.run(&set)?;
            verdicts.push(match set.judge(&ran)? {
                Verdict::Vulnerable(what) => Verdict::Vulnerable(format!("/dev/{node}: {what}")),
                verdict => verdict,
            });
        }
    }
    Ok(Verdict::worst(verdicts))
}

fn console(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for kind in KINDS {
        for readonly in [false, true] {
            let set = stage
                .set()?
                .script("grep -c . /proc/self/mountinfo >/dev/null")
                .unmounted("/dev")
                .with("/root/readonly", json!(readonly))
                .with("/process/terminal", json!(true));
            set.link("dev/console", &kind.target(&set, "console"))?;
            let ran = stage.run_on_terminal(&set)?;
            verdicts.push(set.judge(&ran)?);
        }
    }
    Ok(Verdict::worst(verdicts))
}

fn null_stdio(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for kind in KINDS {
        let set = stage
            .set()?
            .script("echo overwritten; readlink /proc/self/fd/0; readlink /proc/self/fd/1; true")
            .unmounted("/dev")
            .with("/process/user", json!({"uid": 1000, "gid": 1000}));
        set.link("dev/null", &kind.target(&set, "secret"))?;
        let ran = stage.run(&set)?;
        verdicts.push(set.judge(&ran)?);
    }
    Ok(Verdict::worst(verdicts))
}
