//! Shims of both makes, behind the same calls.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coracle_integration::shim::events::Events;
use coracle_integration::shim::{NewTask, Shim, wire};
use nix::sys::stat::Mode;
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::runtime::{our, which};

const NAMESPACE: &str = "bench";
pub const SLEEPS: &[&str] = &["/bin/sleep", "1000"];

/// What `start` is told and says.
#[derive(Clone, Copy, PartialEq)]
enum Bootstrap {
    /// Nothing on stdin, the address comes back: containerd 1.6.
    Plain,
    /// BootstrapParams and BootstrapResult: containerd 2.3 and newer.
    Messages,
}

/// A shim with the runtime that it is told to run.
pub struct Handler {
    pub name: String,
    shim: PathBuf,
    runtime: PathBuf,
    bootstrap: Bootstrap,
    service: &'static str,
    /// Its runtime is the one that it comes with.
    own: bool,
}

/// Those that run what they come with.
pub fn with_own_runtimes(handlers: &[Handler]) -> Vec<&Handler> {
    handlers.iter().filter(|handler| handler.own).collect()
}

/// containerd.runtime.bootstrap.v1.BootstrapParams, as far as it is filled in.
#[derive(Clone, PartialEq, Message)]
struct BootstrapParams {
    #[prost(string, tag = "1")]
    instance_id: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "5")]
    containerd_ttrpc_address: String,
}

/// Bundles, sockets and the service that takes the shims' events.
pub struct Stand {
    dir: tempfile::TempDir,
    events: Events,
    config: Value,
}

impl Stand {
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("coracle-bench").tempdir()?;
        let rootfs = dir.path().join("rootfs");
        for name in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        let busybox = which("busybox").context("busybox is not installed: make deps")?;
        fs::copy(busybox, rootfs.join("bin/busybox"))?;
        for applet in ["sh", "sleep", "dd"] {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        let made = Command::new(which("runc").context("runc is not installed: make deps")?)
            .arg("spec")
            .current_dir(dir.path())
            .status()?;
        ensure!(made.success(), "runc spec: {made}");
        let mut config: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json"))?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["rlimits"] = json!([]);
        config["root"] = json!({"path": rootfs, "readonly": true});
        let events = Events::listen(&dir.path().join("events.sock"))?;
        Ok(Self {
            dir,
            events,
            config,
        })
    }

    /// Ours first; then containerd's newest shim, which `make deps` brings, with each runtime; then
    /// the distribution's.
    pub fn handlers(&self) -> Result<Vec<Handler>> {
        let coracle = our("coracle")?;
        let runc = which("runc").context("runc is not installed: make deps")?;
        let mut handlers = vec![Handler {
            name: "coracle's shim + coracle".to_owned(),
            shim: our("containerd-shim-coracle-v2")?,
            runtime: coracle.clone(),
            bootstrap: Bootstrap::Plain,
            service: "containerd.task.v2.Task",
            own: true,
        }];
        match newest() {
            Some((version, shim)) => {
                for (runtime, name, own) in
                    [(runc.clone(), "runc", true), (coracle, "coracle", false)]
                {
                    handlers.push(Handler {
                        name: format!("containerd {version}'s shim + {name}"),
                        shim: shim.clone(),
                        runtime,
                        bootstrap: Bootstrap::Messages,
                        service: "containerd.task.v3.Task",
                        own,
                    });
                }
            }
            None => eprintln!("left out: containerd 2's shim is not in the cache: make deps"),
        }
        handlers.push(Handler {
            name: "Debian's containerd shim + runc".to_owned(),
            shim: which("containerd-shim-runc-v2")
                .context("containerd is not installed: make deps")?,
            runtime: runc,
            bootstrap: Bootstrap::Plain,
            service: "containerd.task.v2.Task",
            own: true,
        });
        Ok(handlers)
    }

    /// A bundle of its own for a container of this group.
    pub fn bundle(&self, group: &str, id: &str, args: &[&str]) -> Result<PathBuf> {
        let bundle = self.dir.path().join("bundles").join(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        let mut config = self.config.clone();
        config["process"]["args"] = json!(args);
        config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": group});
        fs::write(bundle.join("config.json"), serde_json::to_vec(&config)?)?;
        Ok(bundle)
    }
}

/// containerd 2's shim in the cache.
fn newest() -> Option<(String, PathBuf)> {
    let cache = std::env::var_os("CORACLE_CACHE")?;
    let versions = fs::read_dir(Path::new(&cache).join("containerd")).ok()?;
    let mut found: Vec<(String, PathBuf)> = versions
        .flatten()
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                entry.path(),
            )
        })
        .filter(|(version, _)| version.starts_with("2."))
        .map(|(version, dir)| (version, dir.join("bin/containerd-shim-runc-v2")))
        .filter(|(_, shim)| shim.exists())
        .collect();
    found.sort();
    found.pop()
}

/// A shim that serves a group.
pub struct Pod {
    pub group: String,
    /// What was done before the shim was started.
    pub prepared: Duration,
    shim: Shim,
    pid: i32,
    service: &'static str,
    runtime: PathBuf,
    root: PathBuf,
    /// The shim's log: read ends are a daemon's to hold.
    _log: File,
    ended: bool,
}

impl Drop for Pod {
    /// After a failure: the shim and what it runs go with the benchmark.
    fn drop(&mut self) {
        if self.ended || self.pid == 0 {
            return;
        }
        let children = format!("/proc/{0}/task/{0}/children", self.pid);
        let children = fs::read_to_string(children).unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        for pid in children.chain([self.pid]).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Pod {
    pub fn open(stand: &Stand, handler: &Handler, group: &str) -> Result<Self> {
        let began = Instant::now();
        let bundle = stand.bundle(group, group, SLEEPS)?;
        let log = bundle.join("log");
        if !log.exists() {
            nix::unistd::mkfifo(&log, Mode::from_bits_truncate(0o700))?;
        }
        let log = OpenOptions::new().read(true).write(true).open(log)?;
        let prepared = began.elapsed();
        let output = start(stand, handler, &bundle, group)?;
        let runtime = handler.runtime.file_name().unwrap_or_default();
        let mut pod = Self {
            group: group.to_owned(),
            prepared,
            shim: Shim {
                socket: address(&output)?,
            },
            pid: 0,
            service: handler.service,
            runtime: handler.runtime.clone(),
            root: stand.dir.path().join("roots").join(runtime),
            _log: log,
            ended: false,
        };
        let answer: wire::Pid = pod.call(
            "Connect",
            &wire::Task {
                id: group.to_owned(),
            },
        )?;
        pod.pid = i32::try_from(answer.pid)?;
        if pod.pid == 0 {
            pod.pid = peer_pid(&pod.shim.socket)?;
        }
        Ok(pod)
    }

    fn call<Request: Message, Response: Message + Default>(
        &self,
        method: &str,
        request: &Request,
    ) -> Result<Response> {
        self.shim
            .call(self.service, method, request)
            .with_context(|| format!("{method} of {}", self.group))
    }

    pub fn create(&self, id: &str, bundle: &Path, stdout: &str) -> Result<()> {
        let mut task = NewTask::new(id, bundle, &self.runtime, &self.root).stdout(stdout);
        // containerd's shim wants both or none.
        task.request.stderr = stdout.to_owned();
        self.call::<_, wire::Pid>("Create", &task.request).map(drop)
    }

    pub fn start(&self, id: &str) -> Result<()> {
        self.call::<_, wire::Pid>("Start", &named(id)).map(drop)
    }

    pub fn run(&self, id: &str, bundle: &Path, stdout: &str) -> Result<()> {
        self.create(id, bundle, stdout)?;
        self.start(id)
    }

    /// Kills, waits for and deletes a container.
    pub fn end(&self, id: &str) -> Result<()> {
        let kill = wire::Kill {
            id: id.to_owned(),
            signal: 9,
            ..Default::default()
        };
        self.call::<_, ()>("Kill", &kill)?;
        self.gone(id)
    }

    /// Waits for and deletes a container.
    pub fn gone(&self, id: &str) -> Result<()> {
        self.call::<_, wire::Waited>("Wait", &named(id))?;
        self.call::<_, wire::Deleted>("Delete", &named(id))
            .map(drop)
    }

    pub fn shut_down(mut self) -> Result<()> {
        self.ended = true;
        // The shim may go before it has answered.
        let _ = self.call::<_, ()>(
            "Shutdown",
            &wire::Task {
                id: self.group.clone(),
            },
        );
        self.shim.gone()
    }

    /// The shim, and what it keeps of itself.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let program = fs::read_link(format!("/proc/{}/exe", self.pid))?;
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid))
            .unwrap_or_default();
        let own = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        let same = own.filter(|pid| {
            fs::read_link(format!("/proc/{pid}/exe")).ok().as_ref() == Some(&program)
        });
        Ok(std::iter::once(self.pid).chain(same).collect())
    }
}

fn named(id: &str) -> wire::Named {
    wire::Named {
        id: id.to_owned(),
        exec_id: String::new(),
    }
}

fn start(stand: &Stand, handler: &Handler, bundle: &Path, id: &str) -> Result<Vec<u8>> {
    let mut child = Command::new(&handler.shim)
        .args([
            "-namespace",
            NAMESPACE,
            "-address",
            "",
            "-publish-binary",
            "/bin/true",
            "-id",
            id,
        ])
        .arg("-bundle")
        .arg(bundle)
        .arg("start")
        .current_dir(bundle)
        .env("CORACLE_SHIM_SOCKET_DIR", stand.dir.path().join("s"))
        .env("TTRPC_ADDRESS", stand.events.address())
        .env_remove("GRPC_ADDRESS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| handler.shim.display().to_string())?;
    let mut stdin = child.stdin.take().context("stdin")?;
    if handler.bootstrap == Bootstrap::Messages {
        let parameters = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            containerd_ttrpc_address: stand.events.address(),
        };
        stdin.write_all(&parameters.encode_to_vec())?;
    }
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{} start: {}: {}",
        handler.name,
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// The socket, in whatever form the answer has: plain, or a field of a message.
fn address(answer: &[u8]) -> Result<PathBuf> {
    let text = String::from_utf8_lossy(answer);
    let (_, rest) = text
        .split_once("unix://")
        .with_context(|| format!("no address in {text:?}"))?;
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "/._-".contains(c)));
    Ok(rest[..end.unwrap_or(rest.len())].into())
}

/// Who serves a socket.
fn peer_pid(socket: &Path) -> Result<i32> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok(peer.pid())
}
