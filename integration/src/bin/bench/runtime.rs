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
    busybox), same config made by `runc spec`, without resources on cgroup v2. Left out: unpacking of \
    an image, the shim, the daemon.";

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
        // crun 1.8 cannot load its device program where RLIMIT_MEMLOCK may not be raised.
        if on_v2()
            && let Some(linux) = config["linux"].as_object_mut()
        {
            linux.remove("resources");
        }
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

/// What /sys/fs/cgroup shows while runtimes are compared.
pub struct View {
    pub name: &'static str,
    /// Makes the view in a mount namespace of its own.
    script: &'static str,
    /// Peer and ratio that `run` is to stay under.
    goal: (&'static str, f64),
}

/// crun 1.8 refuses a hybrid host whose cgroup2 mount has a controller, so that mount is hidden.
const V1: View = View {
    name: "cgroup v1",
    script: "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi",
    goal: ("crun", 0.85),
};

/// The controllers stay with the host's v1 hierarchies.
const V2: View = View {
    name: "private cgroup v2 view without controllers",
    script: "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup",
    goal: ("crun", 0.6),
};

/// Every view that this host can show.
pub fn views() -> Vec<View> {
    if on_v2() {
        println!("left out: {}: the host has cgroup v2 alone", V1.name);
        return vec![V2];
    }
    vec![V1, V2]
}

fn on_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.procs").exists()
}

/// Compares in a mount namespace of its own that shows the view.
pub fn compare(view: &View, runs: usize) -> Result<Vec<Comparison>> {
    let script = format!("{} && exec \"$@\"", view.script);
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg("sh")
        .arg(std::env::current_exe()?)
        .args(["inner", &runs.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .context("unshare")?;
    ensure!(
        output.status.success(),
        "the view of {}: {}",
        view.name,
        output.status
    );
    let comparisons: Vec<Comparison> =
        serde_json::from_slice(&output.stdout).with_context(|| view.name.to_owned())?;
    let named = comparisons.into_iter().map(|mut comparison| {
        if comparison.what == "run" {
            let peer = comparison
                .series
                .iter()
                .find(|s| s.program.starts_with(view.goal.0));
            comparison.goal = peer.map(|s| (s.program.clone(), view.goal.1));
        }
        comparison.what = format!("{}, {}", comparison.what, view.name);
        comparison
    });
    Ok(named.collect())
}

/// The part that runs inside the view: prints its comparisons as JSON.
pub fn inner(runs: usize) -> Result<()> {
    let bench = Bench::new()?;
    let names = bench.names();
    let run = Comparison::take("run", CLOCK, &names, runs, |program, round| {
        bench.run(program, round)
    })?;
    bench.start_sleepers()?;
    let exec = Comparison::take("exec", CLOCK, &names, runs, |program, _| {
        bench.exec(program)
    })?;
    println!("{}", serde_json::to_string(&[run, exec])?);
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
