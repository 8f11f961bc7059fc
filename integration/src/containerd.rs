//! containerd of several releases (.ci/containerd brings them): where they are, and one of them
//! running over a stage with root, state, sockets and configuration of its own.
//!
//! Owns: the daemon's process, its configuration in the form of its release, what it may leave
//! behind. The machine's own containerd, if there is one, is out of sight: /run/containerd is a
//! tmpfs of the test's mount namespace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount, umount};

use crate::crictl::Crictl;
use crate::process::Process;
use crate::stage::{Stage, success};
use crate::{binaries, leak, registry, wait_for};

pub const RELEASES: [&str; 4] = ["1.6", "1.7", "testing", "2.4"];
const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];
/// Where a daemon's FIFOs and shims' sockets and runtimes' states are by default.
const RUN: &str = "/run/containerd";
const SUBNET: &str = "10.77.0.0/24";
const BRIDGE: &str = "coract0";

#[derive(Clone, Debug)]
pub struct Release {
    pub name: &'static str,
    /// As the program itself says it: "1.6.20".
    pub version: String,
    bin: PathBuf,
}

impl Release {
    /// Why it is not here, as the error.
    pub fn find(name: &'static str) -> Result<Self> {
        let dir = binaries::cache()?.join("containerd").join(name);
        if let Ok(why) = fs::read_to_string(dir.join("why")) {
            bail!("{}", why.trim());
        }
        let bin = dir.join("bin");
        for program in PROGRAMS {
            let path = bin.join(program);
            ensure!(
                path.exists(),
                "{} is missing: run make deps",
                path.display()
            );
        }
        let text = success({
            let mut command = Command::new(bin.join("containerd"));
            command.arg("--version");
            command
        })?;
        let word = text.split_whitespace().nth(2).context("a version")?;
        let version = word.trim_start_matches('v');
        let end = version.find(['~', '+', '-']).unwrap_or(version.len());
        Ok(Self {
            name,
            version: version[..end].to_owned(),
            bin,
        })
    }

    /// (1, 6) of 1.6.20.
    pub fn number(&self) -> (u32, u32) {
        let mut words = self.version.split('.').map(|w| w.parse().unwrap_or(0));
        (words.next().unwrap_or(0), words.next().unwrap_or(0))
    }
}

/// A runtime of the CRI plugin: what stands below `containerd.runtimes.<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    pub name: &'static str,
    pub runtime_type: String,
    pub runtime_path: Option<PathBuf>,
    pub sandboxer: Option<&'static str>,
    pub options: Vec<(&'static str, String)>,
}

/// How one daemon is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// The name that our shim has in the daemon's PATH; None: containerd's own is there.
    pub shim: Option<&'static str>,
    /// The CRI plugin with these handlers, the first being the default; empty: no such plugin.
    pub handlers: Vec<Handler>,
    /// The daemon sees a cgroup2 hierarchy alone.
    pub unified: bool,
}

impl Setup {
    pub fn plain() -> Self {
        Self {
            shim: Some("containerd-shim-coracle-v2"),
            handlers: Vec::new(),
            unified: false,
        }
    }
}

pub struct Containerd {
    pub stage: Stage,
    pub release: Release,
    pub image: String,
    pub crictl: Crictl,
    setup: Setup,
    process: Option<Process>,
}

impl Containerd {
    pub fn set(release: Release, setup: Setup) -> Result<Self> {
        let stage = Stage::set()?;
        fs::create_dir_all(RUN)?;
        mount(
            Some("tmpfs"),
            RUN,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=755"),
        )
        .context("mount tmpfs on /run/containerd")?;
        registry::write_hosts(&stage.dir.join("certs.d"), stage.registry.address())?;
        write_network(&stage.dir)?;
        fs::create_dir(stage.dir.join("logs"))?;
        let crictl = Crictl::new(&stage.dir, &stage.dir.join("containerd.sock"))?;
        let mut containerd = Self {
            image: stage.tools(),
            crictl,
            stage,
            release,
            setup,
            process: None,
        };
        containerd.start()?;
        containerd.ctr(&["image", "pull", "--plain-http", &containerd.image])?;
        Ok(containerd)
    }

    pub fn dir(&self) -> &Path {
        &self.stage.dir
    }

    pub fn socket(&self) -> PathBuf {
        self.stage.dir.join("containerd.sock")
    }

    /// Where the daemon keeps a container's bundle.
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        let tasks = "state/io.containerd.runtime.v2.task";
        self.stage.dir.join(tasks).join(namespace).join(id)
    }

    /// Goes over to another setup; the content stays.
    pub fn become_with(&mut self, setup: &Setup) -> Result<()> {
        if *setup != self.setup || self.process.is_none() {
            self.stop()?;
            self.setup = setup.clone();
            self.start()?;
        }
        Ok(())
    }

    pub fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// As the setup says, over whatever an earlier daemon left.
    pub fn start(&mut self) -> Result<()> {
        let dir = &self.stage.dir;
        let config = dir.join("containerd.toml");
        fs::write(&config, self.config())?;
        let programs = dir.join("bin");
        let _ = fs::remove_dir_all(&programs);
        fs::create_dir(&programs)?;
        if let Some(name) = self.setup.shim {
            symlink(binaries::shim()?, programs.join(name))?;
        }
        let daemon = self.release.bin.join("containerd");
        let mut command = if self.setup.unified {
            let mut command = Command::new("unshare");
            let script = "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
                          exec \"$0\" \"$@\"";
            command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
            command.arg(daemon);
            command
        } else {
            Command::new(daemon)
        };
        // The release's own shim, where ours has another name, and no other release's.
        command.arg("--config").arg(config).env(
            "PATH",
            format!(
                "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
                programs.display(),
                self.release.bin.display()
            ),
        );
        let mut process = Process::start(&mut command, &dir.join("containerd.log"))?;
        wait_for("containerd", Duration::from_secs(20), || {
            if let Some(status) = process.ended()? {
                bail!("containerd: {status}\n{}", process.log_tail());
            }
            let ready = self.command(&["version"]).output()?.status.success()
                && (self.setup.handlers.is_empty()
                    || self.crictl.try_run(&["version"])?.status.success());
            Ok(ready.then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(self.release.bin.join("ctr"));
        command
            .arg("--address")
            .arg(self.socket())
            .args(args.iter().map(AsRef::as_ref))
            .stdin(Stdio::null());
        command
    }

    pub fn ctr<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        success(self.command(args))
    }

    pub fn log_tail(&self) -> String {
        crate::process::tail(&self.stage.dir.join("containerd.log"))
    }

    /// What containers left, with every one of them removed. A shim takes a moment to end.
    pub fn nothing_left(&self) -> Result<()> {
        let tasks = self.ctr(&["task", "list", "-q"])?;
        ensure!(tasks.is_empty(), "tasks are left: {tasks}");
        let mut left = Vec::new();
        for _ in 0..100 {
            left = self.left_by_shims();
            if left.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("left behind:\n  {}", left.join("\n  "))
    }

    fn left_by_shims(&self) -> Vec<String> {
        let mut left: Vec<String> = leak::processes(&self.stage.mark)
            .into_iter()
            .filter(|p| p.contains("containerd-shim-"))
            .collect();
        for (dir, depth) in [("s", 1), ("coracle", 2), ("runc", 2)] {
            left.extend(entries(&Path::new(RUN).join(dir), depth));
        }
        // What a runtime keeps for all of its containers: no id begins so.
        left.retain(|path| !path.contains("/@"));
        left
    }

    /// Ends and removes whatever a feature that failed left, so that the next one can be tried.
    pub fn sweep(&self) {
        if !self.setup.handlers.is_empty() {
            let _ = self.crictl.try_run(&["rmp", "-af"]);
        }
        for namespace in ["default", "k8s.io"] {
            let all = |kind: &str| -> Vec<String> {
                let list = self.ctr(&["-n", namespace, kind, "list", "-q"]);
                let list = list.unwrap_or_default();
                list.lines().map(str::to_owned).collect()
            };
            for id in all("task") {
                let _ = self.ctr(&["-n", namespace, "task", "rm", "-f", &id]);
            }
            for id in all("container") {
                let _ = self.ctr(&["-n", namespace, "container", "rm", &id]);
            }
        }
        for process in leak::processes(&self.stage.mark) {
            if process.contains("containerd-shim-") {
                leak::kill(&process);
            }
        }
        for socket in entries(&Path::new(RUN).join("s"), 1) {
            let _ = fs::remove_file(socket);
        }
    }

    pub fn finish(mut self) -> Result<()> {
        self.nothing_left()?;
        self.stop()?;
        umount(RUN).context("unmount /run/containerd")?;
        // The plugins' bridge and chains stay when a pod goes; in here they are nobody else's.
        let mut command = Command::new("ip");
        command.args(["-o", "link", "show", "type", "bridge"]);
        if success(command)?.contains(BRIDGE) {
            let mut command = Command::new("ip");
            command.args(["link", "del", BRIDGE]);
            success(command)?;
            let mut command = Command::new("nft");
            command.args(["flush", "ruleset"]);
            success(command)?;
        }
        self.stage.strike()
    }

    fn config(&self) -> String {
        let dir = self.stage.dir.display();
        let new = self.release.number() >= (2, 0);
        let version = if new { 3 } else { 2 };
        let mut text = format!(
            "version = {version}\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\nimports = []\n"
        );
        if self.setup.handlers.is_empty() {
            text += "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        }
        text += &format!(
            "[grpc]\naddress = \"{dir}/containerd.sock\"\n\
             [ttrpc]\naddress = \"{dir}/containerd.sock.ttrpc\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{dir}/opt\"\n\
             [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n"
        );
        if self.setup.handlers.is_empty() {
            return text;
        }
        let (runtime, images) = if new {
            (
                "io.containerd.cri.v1.runtime",
                "io.containerd.cri.v1.images",
            )
        } else {
            ("io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri")
        };
        // Without CAP_SYS_RESOURCE no score can be lowered.
        text += &format!("[plugins.\"{runtime}\"]\nrestrict_oom_score_adj = true\n");
        let pause = "\"registry.k8s.io/pause:3.9\"\n";
        text += &if new {
            format!("[plugins.\"{images}\".pinned_images]\nsandbox = {pause}")
        } else {
            format!("sandbox_image = {pause}")
        };
        let plugins = if self.release.number() >= (2, 1) {
            "bin_dirs = [\"/usr/lib/cni\"]"
        } else {
            "bin_dir = \"/usr/lib/cni\""
        };
        text += &format!(
            "[plugins.\"{runtime}\".cni]\n{plugins}\nconf_dir = \"{dir}/cni\"\n\
             [plugins.\"{images}\".registry]\nconfig_path = \"{dir}/certs.d\"\n\
             [plugins.\"{runtime}\".containerd]\ndefault_runtime_name = \"{}\"\n",
            self.setup.handlers[0].name
        );
        for handler in &self.setup.handlers {
            let table = format!("plugins.\"{runtime}\".containerd.runtimes.{}", handler.name);
            text += &format!("[{table}]\nruntime_type = \"{}\"\n", handler.runtime_type);
            if let Some(path) = &handler.runtime_path {
                text += &format!("runtime_path = \"{}\"\n", path.display());
            }
            if let Some(sandboxer) = handler.sandboxer {
                text += &format!("sandboxer = \"{sandboxer}\"\n");
            }
            if !handler.options.is_empty() {
                text += &format!("[{table}.options]\n");
            }
            for (key, value) in &handler.options {
                text += &format!("{key} = {value}\n");
            }
        }
        text
    }
}

/// Debian's plugins on a bridge of the test's network namespace.
fn write_network(dir: &Path) -> Result<()> {
    fs::create_dir(dir.join("cni"))?;
    let config = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "coracle-test",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": dir.join("ipam"),
                    "ranges": [[{"subnet": SUBNET}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    Ok(fs::write(
        dir.join("cni/10-test.conflist"),
        config.to_string(),
    )?)
}

/// Paths `depth` levels below a directory.
fn entries(dir: &Path, depth: u32) -> Vec<String> {
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    let paths = below.map(|e| e.path());
    if depth == 1 {
        return paths.map(|p| p.display().to_string()).collect();
    }
    paths.flat_map(|p| entries(&p, depth - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_of_the_first_two_words() {
        let release = Release {
            name: "x",
            version: "1.6.20".to_owned(),
            bin: PathBuf::new(),
        };
        assert_eq!(release.number(), (1, 6));
    }
}
