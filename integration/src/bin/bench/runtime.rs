//! `run` and `exec` of the runtimes on one and the same bundle, in the host's own cgroups and in a
//! private view with cgroup v2 alone.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::series::Comparison;

const CLOCK: &str = "Clock: from fork of the runtime's command to its exit. Same bundle (static \
    busybox), same config made by `runc spec`. Left out: unpacking of an image, the shim, the daemon.";

struct Runtime {
    name: String,
    path: PathBuf,
    root: PathBuf,
}

/// A folder with a bundle and one state root a runtime; gone with the value.
struct Bench {
    dir: tempfile::TempDir,
    runtimes: Vec<Runtime>,
}

impl Bench {
    fn new() -> Result<Bench> {
        let dir = tempfile::tempdir().context("a temporary folder")?;
        let mut runtimes = Vec::new();
        let ours = our("coracle")?;
        for (name, path) in [
            ("coracle", Some(ours)),
            ("crun", which("crun")),
            ("runc", which("runc")),
        ] {
            let path = path.with_context(|| format!("{name} is not installed: make deps"))?;
            let root = dir.path().join(format!("root-{name}"));
            fs::create_dir(&root)?;
            runtimes.push(Runtime {
                name: label(name, &path)?,
                path,
                root,
            });
        }
        let bench = Bench { dir, runtimes };
        bench.bundle("true", &["/bin/true"])?;
        bench.bundle("sleep", &["/bin/sleep", "1000"])?;
        Ok(bench)
    }

    fn bundle(&self, name: &str, args: &[&str]) -> Result<()> {
        let bundle = self.dir.path().join(name);
        for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(bundle.join("rootfs").join(dir))?;
        }
        let busybox = which("busybox").context("busybox is not installed: make deps")?;
        fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
        for applet in ["true", "sleep"] {
            symlink("busybox", bundle.join("rootfs/bin").join(applet))?;
        }
        let runc = which("runc").context("runc is not installed: make deps")?;
        let made = Command::new(runc)
            .arg("spec")
            .current_dir(&bundle)
            .status()?;
        ensure!(made.success(), "runc spec: {made}");
        let path = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(args);
        // No limit is raised: the hard limit of open files of the machine may be lower.
        config["process"]["rlimits"] = json!([]);
        fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(())
    }

    fn command(&self, runtime: &Runtime) -> Command {
        let mut command = Command::new(&runtime.path);
        command
            .arg("--root")
            .arg(&runtime.root)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    fn run(&self, index: usize, round: usize) -> Result<Duration> {
        let runtime = &self.runtimes[index];
        let mut command = self.command(runtime);
        let id = format!("bench-{}-{index}-{round}", std::process::id());
        command
            .args(["run", "--bundle"])
            .arg(self.dir.path().join("true"))
            .arg(id);
        timed(&mut command)
    }

    fn exec(&self, index: usize) -> Result<Duration> {
        let mut command = self.command(&self.runtimes[index]);
        command.args(["exec", &self.sleeper(index), "/bin/true"]);
        timed(&mut command)
    }

    fn sleeper(&self, index: usize) -> String {
        format!("bench-{}-{index}-sleep", std::process::id())
    }

    fn start_sleepers(&self) -> Result<()> {
        for (index, runtime) in self.runtimes.iter().enumerate() {
            let mut command = self.command(runtime);
            command.args(["run", "--detach", "--bundle"]);
            command
                .arg(self.dir.path().join("sleep"))
                .arg(self.sleeper(index));
            timed(command.stderr(Stdio::null()))?;
        }
        Ok(())
    }

    fn names(&self) -> Vec<&str> {
        self.runtimes.iter().map(|r| r.name.as_str()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for (index, runtime) in self.runtimes.iter().enumerate() {
            let mut command = self.command(runtime);
            command
                .args(["delete", "--force", &self.sleeper(index)])
                .stderr(Stdio::null());
            if let Err(error) = command.status() {
                eprintln!(
                    "{}: delete {}: {error}",
                    runtime.path.display(),
                    self.sleeper(index)
                );
            }
        }
    }
}

/// Compares in the cgroups of whoever calls.
pub fn here(view: &str, runs: usize) -> Result<Vec<Comparison>> {
    let bench = Bench::new()?;
    let names = bench.names();
    let goal = if Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        0.6
    } else {
        0.85
    };
    let run = Comparison::take(
        &format!("run, {view}"),
        CLOCK,
        &names,
        runs,
        |program, round| bench.run(program, round),
    )?
    .goal(names[1], goal);
    bench.start_sleepers()?;
    let exec = Comparison::take(
        &format!("exec, {view}"),
        CLOCK,
        &names,
        runs,
        |program, _| bench.exec(program),
    )?;
    Ok(vec![run, exec])
}

/// Compares in a mount namespace of its own, where /sys/fs/cgroup is cgroup v2 alone.
pub fn in_v2_view(runs: usize) -> Result<Vec<Comparison>> {
    let script = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"";
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(std::env::current_exe()?)
        .args(["inner", &runs.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .context("unshare")?;
    ensure!(
        output.status.success(),
        "the cgroup v2 view: {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the comparisons of the cgroup v2 view")
}

/// The part that runs inside the view: prints its comparisons as JSON.
pub fn inner(runs: usize) -> Result<()> {
    let comparisons = here("private cgroup v2 view without controllers", runs)?;
    println!("{}", serde_json::to_string(&comparisons)?);
    Ok(())
}

fn timed(command: &mut Command) -> Result<Duration> {
    let started = Instant::now();
    let status = command.status().with_context(|| format!("{command:?}"))?;
    let took = started.elapsed();
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(took)
}

/// One of our own binaries, from the folder that the Makefile names.
pub fn our(name: &str) -> Result<PathBuf> {
    let dir =
        std::env::var_os("CORACLE_BIN_DIR").context("CORACLE_BIN_DIR is not set: make bench")?;
    let path = Path::new(&dir).join(name);
    ensure!(
        path.exists(),
        "{} does not exist: make build",
        path.display()
    );
    Ok(path)
}

pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Name and version, as the program prints it.
fn label(name: &str, path: &Path) -> Result<String> {
    let output = Command::new(path)
        .arg("--version")
        .output()
        .context(name.to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text
        .split_whitespace()
        .nth(2)
        .unwrap_or("?")
        .trim_end_matches(',')
        .to_owned();
    Ok(format!("{name} {version}"))
}
