//! What a case stands on: a bundle with busybox, a canary outside of it, the runtime, and a look at
//! the canary before and after.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Verdict;
use crate::binaries;
use crate::bundle::{Bench, Runtime, default_config};
use crate::process::{Ended, run_within};

/// A runtime that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(20);

const APPLETS: [&str; 16] = [
    "cat", "echo", "env", "grep", "head", "id", "ls", "mknod", "pwd", "readlink", "sh", "sleep",
    "stat", "true", "touch", "wc",
];

#[derive(Clone, Debug)]
pub struct Options {
    /// How long each race is run.
    pub seconds: u64,
    /// A config.json's `linux.seccomp` whose refusals are tried.
    pub seccomp: Option<Value>,
}

pub struct Stage<'a> {
    bench: &'a Bench,
    pub runtime: Runtime,
    pub options: Options,
    next: Cell<usize>,
    unusable: Option<String>,
}

impl<'a> Stage<'a> {
    /// Tries a harmless container first. Where that fails, once more without the cgroup2 mount of a
    /// hybrid host, which old versions of crun refuse: the caller's mount namespace is a private one.
    pub fn new(bench: &'a Bench, runtime: Runtime, options: Options) -> Result<Self> {
        let mut stage = Self {
            bench,
            runtime,
            options,
            next: Cell::new(0),
            unusable: None,
        };
        if let Err(first) = stage.harmless() {
            let _ = nix::mount::umount2("/sys/fs/cgroup/unified", nix::mount::MntFlags::MNT_DETACH);
            if stage.harmless().is_err() {
                stage.unusable = Some(format!("runs no harmless container: {first:#}"));
            }
        }
        Ok(stage)
    }

    /// The same stage with another copy of the runtime.
    pub fn with_runtime(&self, runtime: Runtime) -> Stage<'a> {
        Stage {
            bench: self.bench,
            runtime,
            options: self.options.clone(),
            // Ids go on beyond those of the first.
            next: Cell::new(self.next.get() + 10_000),
            unusable: self.unusable.clone(),
        }
    }

    pub fn unusable(&self) -> Option<String> {
        self.unusable.clone()
    }

    fn harmless(&self) -> Result<()> {
        let set = self.set()?.script("echo fine");
        let ran = self.run(&set)?;
        ensure!(ran.out.trim() == "fine", "{}", ran.error.trim());
        Ok(())
    }

    /// A fresh bundle, id and canary.
    pub fn set(&self) -> Result<Set> {
        let number = self.next.get() + 1;
        self.next.set(number);
        let id = format!("cve-{number}");
        let bundle = self.bench.dir.join(&id);
        let rootfs = bundle.join("rootfs");
        for dir in ["app", "bin", "dev", "etc", "mnt", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
        let shared = self.bench.dir.join("busybox");
        if !shared.exists() {
            let busybox = binaries::installed("busybox").context("busybox is not installed")?;
            fs::copy(busybox, &shared)?;
        }
        fs::hard_link(&shared, rootfs.join("bin/busybox"))?;
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        let canary = self.bench.dir.join(format!("{id}-canary"));
        for dir in ["dir", "pts", "shm"] {
            fs::create_dir_all(canary.join(dir))?;
        }
        for file in ["console", "file", "hosts", "null", "ptmx", "secret"] {
            fs::write(canary.join(file), format!("canary {file}\n"))?;
        }
        let mut config = default_config();
        config["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.bench.mark));
        // Without root's rights over files, a container could touch no canary to begin with.
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_SETGID",
            "CAP_SETUID"
        ]);
        for kind in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][kind] = capabilities.clone();
        }
        Ok(Set {
            id,
            bundle,
            rootfs,
            before: look(&canary)?,
            canary,
            config,
        })
    }

    /// `run` in the foreground, then whatever is left of it is deleted.
    pub fn run(&self, set: &Set) -> Result<Ended> {
        set.write_config()?;
        let bundle = set.bundle.display().to_string();
        let ended = self.call(&["run", "-b", &bundle, &set.id])?;
        self.delete(&set.id)?;
        Ok(ended)
    }

    /// The same with a terminal, which `script` holds.
    pub fn run_on_terminal(&self, set: &Set) -> Result<Ended> {
        set.write_config()?;
        let bundle = set.bundle.display().to_string();
        let line = self
            .runtime
            .words(&["run", "-b", &bundle, &set.id])
            .join(" ");
        let mut command = Command::new("script");
        command
            .args(["-qec", &line, "/dev/null"])
            .stdin(Stdio::null());
        let ended = run_within(&mut command, LIMIT)?;
        self.delete(&set.id)?;
        Ok(ended)
    }

    /// In the background; the caller deletes it.
    pub fn start(&self, set: &Set) -> Result<Ended> {
        set.write_config()?;
        let bundle = set.bundle.display().to_string();
        self.call(&["run", "-d", "-b", &bundle, &set.id])
    }

    pub fn call(&self, args: &[&str]) -> Result<Ended> {
        run_within(&mut self.runtime.command(args), LIMIT)
    }

    /// By a program that does something first and then executes the runtime.
    pub fn call_by(&self, program: &[&str], args: &[&str]) -> Result<Ended> {
        let words = self.runtime.words(args);
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).args(words).stdin(Stdio::null());
        run_within(&mut command, LIMIT)
    }

    pub fn delete(&self, id: &str) -> Result<()> {
        let ended = self.call(&["delete", "-f", id])?;
        ensure!(ended.status.is_some(), "delete -f does not end");
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.bench.dir
    }
}

/// One bundle and its canary.
pub struct Set {
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub canary: PathBuf,
    pub config: Value,
    before: BTreeMap<String, String>,
}

impl Set {
    /// What the container runs, in a shell.
    pub fn script(mut self, text: &str) -> Self {
        self.config["process"]["args"] = json!(["/bin/sh", "-c", text]);
        self
    }

    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        if let Some(place) = self.config.pointer_mut(pointer) {
            *place = value;
        } else if let Some((parent, name)) = pointer.rsplit_once('/')
            && let Some(parent) = self.config.pointer_mut(parent)
        {
            parent[name] = value;
        }
        self
    }

    pub fn mount(mut self, mount: Value) -> Self {
        if let Some(mounts) = self.config["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        self
    }

    /// The config with one value replaced.
    pub fn config_with(&self, pointer: &str, value: Value) -> Value {
        let mut config = self.config.clone();
        if let Some(place) = config.pointer_mut(pointer) {
            *place = value;
        }
        config
    }

    /// Without the mounts at and below a destination.
    pub fn unmounted(mut self, destination: &str) -> Self {
        if let Some(mounts) = self.config["mounts"].as_array_mut() {
            mounts.retain(|mount| {
                let at = mount["destination"].as_str().unwrap_or_default();
                !Path::new(at).starts_with(destination)
            });
        }
        self
    }

    /// Puts a symlink in place of whatever the rootfs has there.
    pub fn link(&self, place: &str, target: &Path) -> Result<()> {
        let path = self.rootfs.join(place);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path)?,
            Ok(_) => fs::remove_file(&path)?,
            Err(_) => {}
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        symlink(target, &path).with_context(|| path.display().to_string())
    }

    pub fn write_config(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.config)?;
        Ok(fs::write(self.bundle.join("config.json"), text)?)
    }

    /// Vulnerable if anything about the canary is not as it was.
    pub fn judge(&self, ran: &Ended) -> Result<Verdict> {
        if let Some(harm) = self.harm()? {
            return Ok(Verdict::Vulnerable(harm));
        }
        Ok(Verdict::Safe(tell(ran)))
    }

    pub fn harm(&self) -> Result<Option<String>> {
        let after = look(&self.canary)?;
        for (path, was) in &self.before {
            match after.get(path) {
                None => return Ok(Some(format!("host file {path} is gone"))),
                Some(is) if is != was => {
                    return Ok(Some(format!("host file {path} was {was} and is {is}")));
                }
                Some(_) => {}
            }
        }
        if let Some(new) = after.keys().find(|path| !self.before.contains_key(*path)) {
            return Ok(Some(format!("host file {new} was made")));
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
        let below = self.canary.display().to_string();
        Ok(mounts
            .lines()
            .find(|line| line.contains(&below))
            .map(|line| format!("mounted on the host: {line}")))
    }
}

/// In short how a run ended.
pub fn tell(ran: &Ended) -> String {
    match ran.status {
        None => "did not end".to_owned(),
        Some(status) if status.success() => "ran, nothing outside was touched".to_owned(),
        Some(_) => {
            let text = if ran.error.trim().is_empty() {
                &ran.out
            } else {
                &ran.error
            };
            let last = text.trim().lines().last().unwrap_or("without a word");
            let message = last.split_once("msg=").map_or(last, |(_, message)| message);
            let plain = message.chars().filter(|c| !c.is_control());
            let mut last: String = plain.map(|c| if c == '|' { '/' } else { c }).collect();
            last.truncate(last.floor_char_boundary(110));
            format!("refused: {last}")
        }
    }
}

/// Everything below a directory: kind, mode, owner, link target or content. Never follows.
fn look(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let mut queue = vec![dir.to_owned()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir)?.flatten() {
            let path = entry.path();
            let stat = fs::symlink_metadata(&path)?;
            let content = if stat.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else if stat.is_file() {
                fs::read_to_string(&path).unwrap_or_default()
            } else {
                String::new()
            };
            if stat.is_dir() {
                queue.push(path.clone());
            }
            found.insert(
                path.display().to_string(),
                format!(
                    "{:o} {}:{} {content:?}",
                    stat.mode(),
                    stat.uid(),
                    stat.gid()
                ),
            );
        }
    }
    Ok(found)
}
