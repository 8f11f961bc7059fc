//! One test's world: namespaces, registry, coracled and crictl over a temporary directory. A test
//! ends with `finish`, which removes every pod, stops the daemon and fails on anything left.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::crictl::{self, Config, Crictl, LogLine};
use crate::daemon::Daemon;
use crate::isolation::Isolation;
use crate::leak::{self, Snapshot};
use crate::registry::{self, Registry};

pub const TOOLS: &str = "docker.io/coracle/tools:latest";
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    pub crictl: Crictl,
    pub daemon: Daemon,
    pub dir: PathBuf,
    pub mark: String,
    pub registry: Registry,
    ids: Vec<String>,
    count: u32,
    before: Snapshot,
    finished: bool,
    // Last: the namespaces are left when all the rest has ended.
    _isolation: Isolation,
}

impl World {
    pub fn start() -> Result<Self> {
        Self::start_with("")
    }

    /// With TOML over the configuration; keys of `[network]` come first in it.
    pub fn start_with(extra: &str) -> Result<Self> {
        let isolation = Isolation::enter()?;
        let mark = unique_mark();
        let dir = std::env::temp_dir().join(&mark);
        std::fs::create_dir_all(dir.join("logs"))?;
        Self::start_in(isolation, &mark, &dir, extra).inspect_err(|_| {
            leak::sweep(&mark, &dir);
            let _ = std::fs::remove_dir_all(&dir);
        })
    }

    fn start_in(isolation: Isolation, mark: &str, dir: &Path, extra: &str) -> Result<Self> {
        let registry = Registry::start(dir)?;
        let certs = dir.join("certs.d");
        registry::write_hosts(&certs, registry.address())?;
        let before = Snapshot::take(mark)?;
        let mut daemon = Daemon::configure(dir, &certs, extra)?;
        let crictl = Crictl::new(dir, &daemon.socket())?;
        daemon.start()?;
        Ok(Self {
            crictl,
            daemon,
            dir: dir.to_owned(),
            mark: mark.to_owned(),
            registry,
            ids: Vec::new(),
            count: 0,
            before,
            finished: false,
            _isolation: isolation,
        })
    }

    pub fn certs(&self) -> PathBuf {
        self.dir.join("certs.d")
    }

    pub fn pull(&self, image: &str) -> Result<String> {
        self.crictl.run(&["pull", image])
    }

    /// A pod config in this world: logs below the directory, cgroups below the mark.
    pub fn pod_config(&self, name: &str) -> Config {
        let logs = self.dir.join("logs").join(name);
        crictl::pod(name)
            .set("/log_directory", logs.display().to_string())
            .set("/linux/cgroup_parent", format!("/{}", self.mark))
    }

    fn write(&mut self, config: &Config) -> Result<String> {
        self.count += 1;
        let path = self.dir.join(format!("config-{}.json", self.count));
        config.write(&path)?;
        Ok(path.display().to_string())
    }

    pub fn run_pod(&mut self, config: &Config) -> Result<Pod> {
        let path = self.write(config)?;
        let id = self.crictl.run(&["runp", &path])?;
        ensure!(id.len() == 64, "not a pod id: {id:?}");
        self.ids.push(id.clone());
        Ok(Pod { id, config: path })
    }

    pub fn refuse_pod(&mut self, config: &Config) -> Result<String> {
        let path = self.write(config)?;
        self.crictl.refused(&["runp", &path])
    }

    pub fn pod(&mut self, name: &str) -> Result<Pod> {
        let config = self.pod_config(name);
        self.run_pod(&config)
    }

    pub fn create(&mut self, pod: &Pod, config: &Config) -> Result<String> {
        let path = self.write(config)?;
        let id = self
            .crictl
            .run(&["create", "--no-pull", &pod.id, &path, &pod.config])?;
        ensure!(id.len() == 64, "not a container id: {id:?}");
        self.ids.push(id.clone());
        Ok(id)
    }

    pub fn refuse_container(&mut self, pod: &Pod, config: &Config) -> Result<String> {
        let path = self.write(config)?;
        self.crictl
            .refused(&["create", "--no-pull", &pod.id, &path, &pod.config])
    }

    pub fn start_container(&mut self, pod: &Pod, config: &Config) -> Result<String> {
        let id = self.create(pod, config)?;
        self.crictl.run(&["start", &id])?;
        Ok(id)
    }

    /// Creates and starts a container of the tools image with this command.
    pub fn tools(&mut self, pod: &Pod, name: &str, command: &[&str]) -> Result<String> {
        self.start_container(pod, &crictl::container(name, TOOLS, command))
    }

    /// Runs a container of the tools image to its end: its status and its stdout.
    pub fn run_to_end(&mut self, pod: &Pod, config: &Config) -> Result<(Value, String)> {
        let id = self.start_container(pod, config)?;
        let status = self.wait_exited(&id)?;
        let output: String = self
            .log_lines(&id)?
            .iter()
            .filter(|l| l.stream == "stdout")
            .map(|l| format!("{}{}", l.text, if l.partial { "" } else { "\n" }))
            .collect();
        Ok((status, output))
    }

    pub fn container_status(&self, id: &str) -> Result<Value> {
        Ok(self.crictl.json(&["inspect", "-o", "json", id])?["status"].take())
    }

    pub fn pod_status(&self, pod: &Pod) -> Result<Value> {
        Ok(self.crictl.json(&["inspectp", "-o", "json", &pod.id])?["status"].take())
    }

    pub fn pod_ip(&self, pod: &Pod) -> Result<String> {
        let status = self.pod_status(pod)?;
        let ip = status["network"]["ip"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(!ip.is_empty(), "the pod has no IP: {status:#}");
        Ok(ip)
    }

    pub fn wait_state(&self, id: &str, state: &str) -> Result<Value> {
        crate::wait_for(&format!("{state} of {id}"), PATIENCE, || {
            let status = self.container_status(id)?;
            Ok((status["state"] == state).then_some(status))
        })
    }

    pub fn wait_exited(&self, id: &str) -> Result<Value> {
        self.wait_state(id, "CONTAINER_EXITED")
    }

    pub fn log_path(&self, id: &str) -> Result<PathBuf> {
        let status = self.container_status(id)?;
        Ok(status["logPath"]
            .as_str()
            .context("no logPath in the status")?
            .into())
    }

    pub fn log_lines(&self, id: &str) -> Result<Vec<LogLine>> {
        let path = self.log_path(id)?;
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // A line that is being written is not there yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        crictl::parse_log(whole)
    }

    /// Waits until the log has a line with this text.
    pub fn wait_log(&self, id: &str, text: &str) -> Result<()> {
        let path = self.log_path(id)?;
        crate::wait_for(&format!("{text:?} in {}", path.display()), PATIENCE, || {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            Ok(log.contains(text).then_some(()))
        })
    }

    /// Through the streaming server, as a person does; any exit code.
    pub fn try_exec(&self, id: &str, command: &[&str]) -> Result<Output> {
        let args: Vec<&str> = ["exec", id].iter().chain(command).copied().collect();
        self.crictl.try_run(&args)
    }

    pub fn exec(&self, id: &str, command: &[&str]) -> Result<String> {
        let args: Vec<&str> = ["exec", id].iter().chain(command).copied().collect();
        self.crictl.run(&args)
    }

    pub fn exec_sync(&self, id: &str, command: &[&str]) -> Result<String> {
        let args: Vec<&str> = ["exec", "--sync", id]
            .iter()
            .chain(command)
            .copied()
            .collect();
        self.crictl.run(&args)
    }

    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.crictl.run(&["stopp", &pod.id])?;
        self.crictl.run(&["rmp", &pod.id])?;
        Ok(())
    }

    /// Ids of every pod and container made so far.
    pub fn ids(&self) -> &[String] {
        &self.ids
    }

    /// Nothing of any pod may be left; the daemon runs on.
    pub fn nothing_left(&self) -> Result<()> {
        ensure!(
            self.crictl.ids(&["pods", "-q"])?.is_empty(),
            "pods are left"
        );
        ensure!(
            self.crictl.ids(&["ps", "-aq"])?.is_empty(),
            "containers are left"
        );
        let mut left = Vec::new();
        for _ in 0..40 {
            left = self.things_left()?;
            if left.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("left behind:\n  {}", left.join("\n  "))
    }

    /// Of pods: the daemon itself, its bridge and its own directories may be there.
    fn things_left(&self) -> Result<Vec<String>> {
        let now = Snapshot::take(&self.mark)?;
        let daemon = self
            .daemon
            .pid()
            .map(|p| format!("process {p} "))
            .unwrap_or_default();
        let registry = format!("process {} ", self.registry.pid());
        let mut left: Vec<String> = now
            .since(&self.before)
            .into_iter()
            .filter(|t| daemon.is_empty() || !t.starts_with(&daemon))
            .filter(|t| !t.starts_with(&registry))
            .filter(|t| !is_of_the_bridge(t))
            // The pods' common parent is the client's.
            .filter(|t| !t.ends_with(&self.mark))
            .collect();
        for dir in [self.daemon.root(), self.daemon.state()] {
            let named = leak::files_named(&dir, &self.ids);
            left.extend(named.iter().map(|f| format!("file {}", f.display())));
        }
        Ok(left)
    }

    /// Removes every pod, looks for leaks, stops the daemon and looks again.
    pub fn finish(mut self) -> Result<()> {
        self.clean_up()?;
        self.finished = true;
        Ok(())
    }

    fn clean_up(&mut self) -> Result<()> {
        for pod in self.crictl.ids(&["pods", "-q"])? {
            self.crictl.run(&["stopp", &pod])?;
            self.crictl.run(&["rmp", &pod])?;
        }
        self.nothing_left().context("with every pod removed")?;
        self.daemon.stop()?;
        let left = self.things_left()?;
        ensure!(
            left.is_empty(),
            "after the daemon's end:\n  {}",
            left.join("\n  ")
        );
        ensure!(!self.daemon.socket().exists(), "the socket is left");
        leak::remove_cgroups(&self.mark);
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.finished {
            eprintln!("--- coracled's log ---\n{}\n---", self.daemon.log_tail());
            let _ = self.crictl.try_run(&["rmp", "-af"]);
            let _ = self.daemon.stop();
            leak::sweep(&self.mark, &self.dir);
        }
        if std::env::var_os("CORACLE_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

#[derive(Clone, Debug)]
pub struct Pod {
    pub id: String,
    pub config: String,
}

/// In every path of one test, and of no other.
pub fn unique_mark() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("coracle-test-{}-{n}", std::process::id())
}

/// The bridge and the frame of its rules stay as long as the machine does. What belongs to a pod
/// is a port of the bridge (a link) or an element of a set or map.
fn is_of_the_bridge(thing: &str) -> bool {
    match thing.split_once(' ') {
        Some(("link", name)) => name == "coracle0",
        Some(("nft", line)) => !line.contains("elements"),
        _ => false,
    }
}

/// Copies `bytes` to the stdin of a command; its output.
pub fn feed(command: &mut Command, bytes: &[u8]) -> Result<Output> {
    use std::io::Write as _;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output()?;
    let written = writer.join();
    ensure!(
        matches!(written, Ok(Ok(()))),
        "stdin was closed early: {output:?}"
    );
    Ok(output)
}

/// HTTP GET from this thread's network namespace: status and body.
pub fn http_get(address: &str, path: &str) -> Result<(u16, String)> {
    use std::io::{Read as _, Write as _};
    let target: std::net::SocketAddr = address.parse()?;
    let mut stream = std::net::TcpStream::connect_timeout(&target, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .context("no status")?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}

/// As `http_get`, but a server that is not up yet is asked again.
pub fn http_get_soon(address: &str, path: &str) -> Result<String> {
    crate::wait_for(
        &format!("http://{address}{path}"),
        Duration::from_secs(10),
        || match http_get(address, path) {
            Ok((200, body)) => Ok(Some(body)),
            Ok((status, body)) => bail!("status {status}: {body}"),
            Err(_) => Ok(None),
        },
    )
}

pub fn sha256(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}
