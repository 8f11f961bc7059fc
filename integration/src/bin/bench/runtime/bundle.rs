//! The bundles that runtimes are compared on, the runtimes, and their commands.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// What a container of the benchmark is.
#[derive(Clone, Copy, Debug)]
pub enum Bundle {
    /// /bin/true in five namespaces, as `runc spec` writes it.
    True,
    /// The same with the seccomp profile that containerd and coracled give by default.
    Confined,
    /// A container that stays.
    Sleep,
}

impl Bundle {
    fn folder(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::Confined => "confined",
            Self::Sleep => "sleep",
        }
    }
}

pub struct Runtime {
    pub name: String,
    pub path: PathBuf,
    root: PathBuf,
}

/// A folder with the bundles and one state root a runtime; gone with the value.
pub struct Bench {
    dir: tempfile::TempDir,
    pub runtimes: Vec<Runtime>,
}

impl Bench {
    /// Needs a mount namespace of its own: the state roots lie on a tmpfs, as /run is one.
    pub fn new() -> Result<Bench> {
        let dir = tempfile::tempdir().context("a temporary folder")?;
        let roots = dir.path().join("roots");
        fs::create_dir(&roots)?;
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &roots, Some("tmpfs"), flags, none)
            .context("mount a tmpfs for the state roots")?;
        let mut bench = Bench {
            dir,
            runtimes: Vec::new(),
        };
        for path in [our("coracle")?].into_iter().chain(peers()?) {
            let root = roots.join(bench.runtimes.len().to_string());
            fs::create_dir(&root)?;
            bench.runtimes.push(Runtime {
                name: label(&path)?,
                path,
                root,
            });
        }
        bench.bundle(Bundle::True, &["/bin/true"])?;
        bench.bundle(Bundle::Confined, &["/bin/true"])?;
        bench.bundle(Bundle::Sleep, &["/bin/sleep", "1000"])?;
        Ok(bench)
    }

    fn bundle(&self, bundle: Bundle, args: &[&str]) -> Result<()> {
        let folder = self.folder(bundle);
        for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(folder.join("rootfs").join(dir))?;
        }
        let busybox = which("busybox").context("busybox is not installed: make deps")?;
        fs::copy(busybox, folder.join("rootfs/bin/busybox"))?;
        for applet in ["true", "sleep"] {
            symlink("busybox", folder.join("rootfs/bin").join(applet))?;
        }
        let runc = which("runc").context("runc is not installed: make deps")?;
        let made = Command::new(runc)
            .arg("spec")
            .current_dir(&folder)
            .status()?;
        ensure!(made.success(), "runc spec: {made}");
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(args);
        // No limit is raised: the hard limit of open files of the machine may be lower.
        config["process"]["rlimits"] = json!([]);
        if let Bundle::Confined = bundle {
            config["linux"]["seccomp"] = profile(&config)?;
        }
        // crun 1.8 cannot load its device program where RLIMIT_MEMLOCK may not be raised.
        if super::on_v2()
            && let Some(linux) = config["linux"].as_object_mut()
        {
            linux.remove("resources");
        }
        fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(())
    }

    pub fn folder(&self, bundle: Bundle) -> PathBuf {
        self.dir.path().join(bundle.folder())
    }

    /// The runtime with its state root; the command's own words are still to come.
    pub fn command(&self, index: usize) -> Command {
        let runtime = &self.runtimes[index];
        let mut command = Command::new(&runtime.path);
        command.arg("--root").arg(&runtime.root);
        silent(&mut command);
        command
    }

    pub fn run(&self, index: usize, bundle: Bundle, id: &str) -> Command {
        let mut command = self.command(index);
        command.args(["run", "--bundle"]);
        command.arg(self.folder(bundle)).arg(id);
        command
    }

    pub fn names(&self) -> Vec<&str> {
        self.runtimes.iter().map(|r| r.name.as_str()).collect()
    }

    /// The id of the container that `exec` goes into.
    pub fn sleeper(&self, index: usize) -> String {
        format!("bench-{}-{index}-sleep", std::process::id())
    }

    pub fn start_sleepers(&self) -> Result<()> {
        for index in 0..self.runtimes.len() {
            let mut command = self.command(index);
            command.args(["run", "--detach", "--bundle"]);
            command.arg(self.folder(Bundle::Sleep));
            timed(command.arg(self.sleeper(index)))?;
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for index in 0..self.runtimes.len() {
            let mut command = self.command(index);
            command.args(["delete", "--force", &self.sleeper(index)]);
            if let Err(error) = command.status() {
                eprintln!("delete {}: {error}", self.sleeper(index));
            }
        }
        if let Err(error) = nix::mount::umount(&self.dir.path().join("roots")) {
            eprintln!("umount the state roots: {error}");
        }
    }
}

/// What is printed is not what is measured.
pub fn silent(command: &mut Command) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
}

pub fn timed(command: &mut Command) -> Result<Duration> {
    let started = Instant::now();
    let status = command.status().with_context(|| format!("{command:?}"))?;
    let took = started.elapsed();
    ensure!(status.success(), "{command:?}: {status}");
    Ok(took)
}

/// The default profile for the capabilities of the config, as `linux.seccomp`.
fn profile(config: &Value) -> Result<Value> {
    let mut command = Command::new(our("coracled")?);
    command.args(["config", "seccomp"]);
    let bounding = config["process"]["capabilities"]["bounding"].as_array();
    for capability in bounding.into_iter().flatten() {
        let name = capability.as_str().context("a capability is a string")?;
        command.args(["--cap", name]);
    }
    let output = command.output().context("coracled config seccomp")?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    serde_json::from_slice(&output.stdout).context("coracled config seccomp")
}

/// Every crun and runc on PATH: the distribution's, and newer ones that somebody put beside them.
fn peers() -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = Vec::new();
    for name in ["crun", "runc"] {
        let mut real: Vec<PathBuf> = Vec::new();
        for path in on_path(name) {
            let target = fs::canonicalize(&path)?;
            if !real.contains(&target) {
                real.push(target);
                found.push(path);
            }
        }
        if real.is_empty() {
            bail!("{name} is not installed: make deps");
        }
    }
    Ok(found)
}

/// One of our own binaries, from the folder that the Makefile names.
pub fn our(name: &str) -> Result<PathBuf> {
    let dir =
        std::env::var_os("CORACLE_BIN_DIR").context("CORACLE_BIN_DIR is not set: make bench")?;
    let path = Path::new(&dir).join(name);
    ensure!(
        path.exists(),
        "{} does not exist: make build tools",
        path.display()
    );
    Ok(path)
}

fn on_path(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let name = name.to_owned();
    folders
        .into_iter()
        .map(move |dir| dir.join(&name))
        .filter(|file| file.is_file())
}

pub fn which(name: &str) -> Option<PathBuf> {
    on_path(name).next()
}

/// Name and version, as the program prints it.
fn label(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let output = Command::new(path)
        .arg("--version")
        .output()
        .with_context(|| path.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text
        .split_whitespace()
        .nth(2)
        .unwrap_or("?")
        .trim_end_matches(',');
    Ok(format!("{name} {version}"))
}
