//! Containers for tests of checkpoint and restore: a shell of busybox that counts, so that what
//! was stopped and goes on can be told from what begins again.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::bundle::{Bench, Runtime};
use crate::crictl::Config;
use crate::{binaries, wait_for};

/// How long a process may take to count, where everything is emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// Counts in /tmp/count, which the host sees in the root of the bundle.
pub const COUNT: &str =
    "i=0; while :; do i=$((i+1)); echo $i >/tmp/new; mv /tmp/new /tmp/count; sleep 0.05; done";

/// Why nothing can be checkpointed here; None if it can.
pub fn missing(feature: Option<&str>) -> Option<String> {
    if busybox().is_none() {
        return Some("needs a static busybox".to_owned());
    }
    let mut check = Command::new("criu");
    check
        .arg("check")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(feature) = feature {
        check.args(["--feature", feature]);
    }
    match check.status() {
        Err(_) => Some("needs criu".to_owned()),
        Ok(status) if status.success() => None,
        Ok(_) => Some(format!(
            "criu check {} fails here",
            feature.unwrap_or_default()
        )),
    }
}

fn busybox() -> Option<PathBuf> {
    let path = binaries::installed("busybox")?;
    let bytes = std::fs::read(&path).ok()?;
    // A dynamic one names its loader.
    let dynamic = bytes
        .windows(7)
        .any(|part| part == b"/ld-lin" || part == b"/ld-mus");
    (!dynamic).then_some(path)
}

/// One container of a test, by its bundle and its id.
pub struct Subject {
    pub runtime: Runtime,
    pub bundle: PathBuf,
    pub id: String,
    dir: PathBuf,
}

impl Subject {
    /// A bundle that runs a script of busybox's shell.
    pub fn new(bench: &Bench, id: &str, config: Config) -> Result<Self> {
        let bundle = bench.bundle(id, &config)?;
        let shell = bundle.join("rootfs/bin/busybox");
        std::fs::copy(busybox().context("no busybox")?, &shell)?;
        std::fs::set_permissions(&shell, std::fs::Permissions::from_mode(0o755))?;
        for name in ["sh", "sleep", "mv", "cat", "echo"] {
            std::os::unix::fs::symlink("busybox", bundle.join("rootfs/bin").join(name))?;
        }
        Ok(Self {
            runtime: bench.coracle()?,
            bundle,
            id: id.to_owned(),
            dir: bench.dir.clone(),
        })
    }

    pub fn config(bench: &Bench, id: &str, script: &str) -> Config {
        bench
            .config(id, &[])
            .set("/process/args", vec!["/bin/sh", "-c", script])
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// A command about this container that nobody's terminal or pipe belongs to.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.runtime.command(words);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// `run -d`, with the null device for stdio.
    pub fn run(&self) -> Result<()> {
        let bundle = self.bundle.display().to_string();
        self.quietly(&["run", "-d", "-b", &bundle, &self.id])
    }

    /// Runs a command that leaves a container behind: a pipe of ours would never end, and its
    /// complaints come from the log.
    pub fn quietly(&self, words: &[&str]) -> Result<()> {
        let log = self.dir.join("runtime.log");
        // Of this command only.
        let _ = std::fs::remove_file(&log);
        let log_path = log.display().to_string();
        let words = [&["--log", log_path.as_str()], words].concat();
        let status = self.command(&words).status()?;
        ensure!(
            status.success(),
            "{}: {status}: {}",
            words.join(" "),
            std::fs::read_to_string(&log).unwrap_or_default()
        );
        Ok(())
    }

    /// `checkpoint` into a directory of the test.
    pub fn checkpoint(&self, images: &str, flags: &[&str]) -> Result<()> {
        let images = self.path(images);
        let words = [&["checkpoint", "--image-path", &images], flags, &[&self.id]].concat();
        self.runtime.run(&words).map(drop)
    }

    /// The complaint of a `checkpoint` that must fail.
    pub fn checkpoint_refused(&self, images: &str, flags: &[&str]) -> Result<String> {
        let images = self.path(images);
        let words = [&["checkpoint", "--image-path", &images], flags, &[&self.id]].concat();
        self.runtime.refused(&words)
    }

    /// `restore -d`.
    pub fn restore(&self, images: &str, flags: &[&str]) -> Result<()> {
        self.quietly(
            &self
                .words(images, flags)
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        )
    }

    pub fn words(&self, images: &str, flags: &[&str]) -> Vec<String> {
        let (images, bundle) = (self.path(images), self.bundle.display().to_string());
        let head = ["restore", "-d", "--image-path", &images, "-b", &bundle];
        [&head[..], flags, &[&self.id]]
            .concat()
            .iter()
            .map(|word| (*word).to_owned())
            .collect()
    }

    /// The complaint of a `restore` that must fail.
    pub fn restore_refused(&self, images: &str, flags: &[&str]) -> Result<String> {
        let words = self.words(images, flags);
        self.runtime
            .refused(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    pub fn status(&self) -> Result<String> {
        let state = self.runtime.state(&self.id)?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }

    pub fn pid(&self) -> Result<u64> {
        self.runtime.state(&self.id)?["pid"]
            .as_u64()
            .context("no pid")
    }

    /// Whether the runtime knows nothing of it any more.
    pub fn is_gone(&self) -> Result<()> {
        let complaint = self.runtime.refused(&["state", &self.id])?;
        ensure!(complaint.contains("does not exist"), "{complaint}");
        let list = self.runtime.run(&["list", "-q"])?;
        ensure!(
            !list.lines().any(|id| id == self.id),
            "still listed: {list}"
        );
        Ok(())
    }

    /// A file of the container.
    pub fn file(&self, path: &str) -> PathBuf {
        self.bundle
            .join("rootfs")
            .join(path.trim_start_matches('/'))
    }

    pub fn count(&self) -> Result<u64> {
        let text = std::fs::read_to_string(self.file("/tmp/count")).unwrap_or_default();
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// Waits until the container has counted beyond a number; gives the new one.
    pub fn counts_beyond(&self, before: u64) -> Result<u64> {
        wait_for(
            &format!("{} to count beyond {before}", self.id),
            PATIENCE,
            || {
                let now = self.count()?;
                Ok((now > before).then_some(now))
            },
        )
    }

    pub fn delete(&self) -> Result<()> {
        self.runtime.run(&["delete", "--force", &self.id]).map(drop)
    }
}

/// The namespace of a process, as the kernel names it.
pub fn namespace(pid: u64, kind: &str) -> Result<String> {
    let link = std::fs::read_link(Path::new("/proc").join(format!("{pid}/ns/{kind}")))?;
    Ok(link.display().to_string())
}
