//! OCI bundles for tests of a runtime's command line: a rootfs with the probe, a config that
//! `spec` would write, and the runtime to run it with.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::binaries;
use crate::crictl::Config;
use crate::isolation::Isolation;
use crate::leak::{self, Snapshot};
use crate::world::unique_mark;

/// Directories for one test of runtimes, in a mount and network namespace of its own.
pub struct Bench {
    pub dir: PathBuf,
    pub mark: String,
    before: Snapshot,
    finished: bool,
    _isolation: Isolation,
}

/// A runtime's program with its own root, so that several run side by side.
#[derive(Clone)]
pub struct Runtime {
    pub name: String,
    program: PathBuf,
    pub root: PathBuf,
}

impl Bench {
    pub fn new() -> Result<Self> {
        Self::within(Isolation::enter()?)
    }

    /// The same where every process sees cgroup v2 alone, as on a host that has no other.
    pub fn unified() -> Result<Self> {
        let isolation = Isolation::enter()?;
        let root = Path::new("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            umount2(root, MntFlags::MNT_DETACH).context("unmount the hierarchies")?;
            let none: Option<&str> = None;
            let kind = Some("cgroup2");
            mount(Some("none"), root, kind, MsFlags::empty(), none).context("mount cgroup2")?;
        }
        Self::within(isolation)
    }

    fn within(isolation: Isolation) -> Result<Self> {
        let mark = unique_mark();
        let dir = std::env::temp_dir().join(&mark);
        std::fs::create_dir_all(&dir)?;
        let before = Snapshot::take(&mark)?;
        Ok(Self {
            dir,
            mark,
            before,
            finished: false,
            _isolation: isolation,
        })
    }

    pub fn coracle(&self) -> Result<Runtime> {
        self.runtime("coracle", binaries::coracle()?)
    }

    /// Another runtime as Debian packages it; None when it is not installed.
    pub fn peer(&self, name: &str) -> Result<Option<Runtime>> {
        binaries::installed(name)
            .map(|program| self.runtime(name, program))
            .transpose()
    }

    fn runtime(&self, name: &str, program: PathBuf) -> Result<Runtime> {
        // A root that was asked for must be there, says runc.
        let root = self.dir.join(format!("root-{name}"));
        std::fs::create_dir_all(&root)?;
        Ok(Runtime {
            name: name.to_owned(),
            program,
            root,
        })
    }

    /// A bundle whose rootfs has /bin/probe and an empty set of directories.
    pub fn bundle(&self, name: &str, config: &Config) -> Result<PathBuf> {
        let bundle = self.dir.join(name);
        let rootfs = bundle.join("rootfs");
        for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "app"] {
            std::fs::create_dir_all(rootfs.join(dir))?;
        }
        let probe = rootfs.join("bin/probe");
        if !probe.exists() {
            std::fs::copy(binaries::probe()?, &probe)?;
            std::fs::set_permissions(&probe, std::fs::Permissions::from_mode(0o755))?;
        }
        config.write(&bundle.join("config.json"))?;
        Ok(bundle)
    }

    /// A config as `runc spec` writes it, with this test's cgroup, running the probe.
    pub fn config(&self, id: &str, args: &[&str]) -> Config {
        Config(default_config())
            .set("/process/args", [&["/bin/probe"], args].concat())
            .set("/linux/cgroupsPath", format!("/{}/{id}", self.mark))
    }

    /// Fails on anything left: no container may be there any more.
    pub fn finish(mut self) -> Result<()> {
        leak::remove_cgroups(&format!("/{}", self.mark));
        let left = Snapshot::take(&self.mark)?.since(&self.before);
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        self.finished = true;
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !self.finished {
            leak::sweep(&self.mark, &self.dir);
        }
        if std::env::var_os("CORACLE_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

impl Runtime {
    /// Any program with the command line of runc.
    pub fn at(name: &str, program: PathBuf, root: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            program,
            root,
        }
    }

    /// The same program with another state root.
    pub fn with_root(&self, root: PathBuf) -> Self {
        Self {
            root,
            ..self.clone()
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).args(args);
        command.stdin(std::process::Stdio::null());
        command
    }

    /// The runtime's command line as words, for a program that runs another.
    pub fn words(&self, args: &[&str]) -> Vec<String> {
        let program = self.program.display().to_string();
        let root = self.root.display().to_string();
        let head = [program, "--root".to_owned(), root];
        head.into_iter()
            .chain(args.iter().map(|a| (*a).to_owned()))
            .collect()
    }

    pub fn try_run(&self, args: &[&str]) -> Result<Output> {
        self.command(args)
            .output()
            .with_context(|| format!("run {}", self.name))
    }

    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.try_run(args)?;
        ensure!(
            output.status.success(),
            "{} {}: {}: {}",
            self.name,
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Stderr of a command that must fail.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let output = self.try_run(args)?;
        ensure!(
            !output.status.success(),
            "{} {} succeeded",
            self.name,
            args.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// A detached container's outputs are no pipes of ours: nothing would ever close them.
    pub fn detached(&self, args: &[&str], log: &Path) -> Result<()> {
        let file = std::fs::File::create(log)?;
        let status = self
            .command(args)
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()?;
        ensure!(
            status.success(),
            "{} {}: {status}: {}",
            self.name,
            args.join(" "),
            std::fs::read_to_string(log).unwrap_or_default()
        );
        Ok(())
    }

    pub fn state(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&["state", id])?)?)
    }

    pub fn wait_status(&self, id: &str, status: &str) -> Result<Value> {
        crate::wait_for(
            &format!("{id} to be {status}"),
            std::time::Duration::from_secs(10),
            || {
                let state = self.state(id)?;
                Ok((state["status"] == status).then_some(state))
            },
        )
    }
}

/// The defaults that every engine starts from.
pub fn default_config() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/probe"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "runtime-test",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}
