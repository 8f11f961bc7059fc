//! Pods of containerd's own CRI plugin with our shim, driven by crictl.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::containerd::{Containerd, Handler, RELEASES, Release};
use coracle_integration::crictl::{self, Config, parse_log};
use coracle_integration::registry::free_port;
use coracle_integration::world::{TOOLS, feed};
use coracle_integration::{binaries, terminal, wait_for};
use serde_json::{Value, json};

use crate::Cell;

const PATIENCE: Duration = Duration::from_secs(20);
const SLEEPER: &[&str] = &["sh", "-c", "echo started; exec sleep 1000"];

/// Every way to name our shim in a configuration.
pub fn handlers(release: (u32, u32)) -> Result<Vec<Handler>> {
    let shim = binaries::shim()?;
    let handler = |name, runtime_type: &str| Handler {
        name,
        runtime_type: runtime_type.to_owned(),
        runtime_path: None,
        sandboxer: None,
        options: Vec::new(),
    };
    let mut all = vec![handler("coracle", "io.containerd.coracle.v2")];
    let binary = format!("\"{}\"", binaries::coracle()?.display());
    if release < (1, 7) {
        // runtime_path came with 1.7; a path as the type was always good.
        all.push(handler("path", &shim.display().to_string()));
    } else {
        let mut path = handler("path", "io.containerd.runc.v2");
        path.runtime_path = Some(shim);
        path.options.push(("BinaryName", binary.clone()));
        all.push(path);
    }
    let mut options = handler("options", "io.containerd.coracle.v2");
    options.options.push(("BinaryName", binary));
    options.options.push(("SystemdCgroup", "false".to_owned()));
    all.push(options);
    if release >= (2, 0) {
        let mut shim = handler("shim", "io.containerd.coracle.v2");
        shim.sandboxer = Some("shim");
        all.push(shim);
    }
    Ok(all)
}

struct Pod<'a> {
    c: &'a Containerd,
    id: String,
    config: String,
}

impl<'a> Pod<'a> {
    fn run(c: &'a Containerd, handler: &str, name: &str) -> Result<Self> {
        Self::run_as(c, handler, name, |config| config)
    }

    fn run_as(
        c: &'a Containerd,
        handler: &str,
        name: &str,
        change: impl Fn(Config) -> Config,
    ) -> Result<Self> {
        c.crictl.run(&["pull", TOOLS])?;
        let logs = c.dir().join("logs").join(name);
        let config = change(
            crictl::pod(name)
                .set("/log_directory", logs.display().to_string())
                .set("/linux/cgroup_parent", format!("/{}", c.stage.mark)),
        );
        let path = c.dir().join(format!("{name}.pod.json"));
        config.write(&path)?;
        let config = path.display().to_string();
        let id = c.crictl.run(&["runp", "-r", handler, &config])?;
        Ok(Self { c, id, config })
    }

    fn start(&self, config: &Config) -> Result<String> {
        let name = config.0["metadata"]["name"].as_str().context("a name")?;
        let path = self.c.dir().join(format!("{name}.container.json"));
        config.write(&path)?;
        let path = path.display().to_string();
        let create = ["create", "--no-pull", &self.id, &path, &self.config];
        let id = self.c.crictl.run(&create)?;
        self.c.crictl.run(&["start", &id])?;
        Ok(id)
    }

    fn tools(&self, name: &str, command: &[&str]) -> Result<String> {
        self.start(&crictl::container(name, TOOLS, command))
    }

    fn status(&self, id: &str) -> Result<Value> {
        Ok(self.c.crictl.json(&["inspect", "-o", "json", id])?["status"].take())
    }

    fn exited(&self, id: &str) -> Result<Value> {
        wait_for(&format!("the end of {id}"), PATIENCE, || {
            let status = self.status(id)?;
            Ok((status["state"] == "CONTAINER_EXITED").then_some(status))
        })
    }

    /// Texts of a container's log.
    fn log(&self, id: &str) -> Result<Vec<String>> {
        let path = self.status(id)?["logPath"].take();
        let text = fs::read_to_string(path.as_str().context("a log")?)?;
        Ok(parse_log(&text)?.into_iter().map(|l| l.text).collect())
    }

    fn wait_log(&self, id: &str, text: &str) -> Result<()> {
        wait_for(&format!("{text:?} in the log"), PATIENCE, || {
            Ok(self.log(id)?.iter().any(|l| l == text).then_some(()))
        })
    }

    /// That it is our shim which keeps the container.
    fn kept_by_us(&self, id: &str) -> Result<()> {
        let info = self.c.crictl.json(&["inspect", "-o", "json", id])?;
        let pid = &info["info"]["pid"];
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"));
        let parent = parent.context("a parent")?.trim().to_owned();
        let program = fs::read_link(format!("/proc/{parent}/exe"))?;
        ensure!(
            program == binaries::shim()?,
            "{} keeps the container, not our shim",
            program.display()
        );
        Ok(())
    }

    fn remove(self) -> Result<()> {
        self.c.crictl.run(&["stopp", &self.id])?;
        self.c.crictl.run(&["rmp", &self.id])?;
        ensure!(self.c.crictl.ids(&["ps", "-aq"])?.is_empty());
        Ok(())
    }

    /// A pod's whole life: two containers in one shim, their logs, their ends.
    fn life(self) -> Result<()> {
        let sleeper = self.tools("sleeper", SLEEPER)?;
        self.kept_by_us(&sleeper)?;
        let words = ["sh", "-c", "echo out; echo err >&2; exit 3"];
        let worker = self.tools("worker", &words)?;
        let status = self.exited(&worker)?;
        ensure!(status["exitCode"] == 3, "{status:#}");
        let mut log = self.log(&worker)?;
        log.sort();
        ensure!(log == ["err", "out"], "{log:?}");
        self.wait_log(&sleeper, "started")?;
        let text = self.c.crictl.run(&["logs", &sleeper])?;
        ensure!(text == "started", "{text}");
        let text = self
            .c
            .crictl
            .run(&["exec", "--sync", &sleeper, "echo", "a"])?;
        ensure!(text == "a", "{text}");
        self.c.crictl.run(&["stop", "-t", "0", &sleeper])?;
        let status = self.exited(&sleeper)?;
        ensure!(status["exitCode"] == 137, "{status:#}");
        self.c.crictl.run(&["rm", &sleeper])?;
        self.remove()
    }
}

pub fn by_name(c: &mut Containerd) -> Result<Cell> {
    Pod::run(c, "coracle", "name")?.life()?;
    Ok(Cell::Ok)
}

pub fn by_path(c: &mut Containerd) -> Result<Cell> {
    Pod::run(c, "path", "path")?.life()?;
    Ok(Cell::Ok)
}

/// The plugin hands the table over as TOML.
pub fn with_options(c: &mut Containerd) -> Result<Cell> {
    Pod::run(c, "options", "options")?.life()?;
    Ok(Cell::Ok)
}

/// The shim is the sandbox: no pause container.
pub fn sandboxer_shim(c: &mut Containerd) -> Result<Cell> {
    if c.release.number() < (2, 0) {
        return Ok(Cell::Absent("no sandboxer that can be chosen before 2.0"));
    }
    Pod::run(c, "shim", "sandbox")?.life()?;
    Ok(Cell::Ok)
}

pub fn exec(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "exec")?;
    let id = pod.tools("exec", SLEEPER)?;
    let output = c
        .crictl
        .try_run(&["exec", "--sync", &id, "sh", "-c", "echo a; exit 7"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("exited with 7"), "{output:?}");
    let input = vec![b'x'; 1_000_003];
    let mut command = c.crictl.command(&["exec", "-i", &id, "wc", "-c"]);
    let output = feed(&mut command, &input)?;
    ensure!(output.stdout == b"1000003\n", "{output:?}");
    let output = c.crictl.try_run(&["exec", &id, "sh", "-c", "exit 5"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains('5'), "{output:?}");
    pod.remove()?;
    Ok(Cell::Ok)
}

pub fn exec_terminal(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "tty")?;
    let id = pod.tools("tty", SLEEPER)?;
    let script = "tty; sleep 0.5; probe tty";
    let mut command = Command::new(binaries::crictl()?);
    command
        .arg("--config")
        .arg(c.dir().join("crictl.yaml"))
        .args(["exec", "-it", &id, "sh", "-c", script]);
    let output = terminal::run(command, 35, 70)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("/dev/pts/"), "{text}");
    ensure!(text.contains("35 rows, 70 columns"), "{text}");
    pod.remove()?;
    Ok(Cell::Ok)
}

/// A client of crictl that is ended when it was of use.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn attach(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "attach")?;
    let script = "echo ready; while read l; do echo got $l; done";
    let config = crictl::container("attach", TOOLS, &["sh", "-c", script]).set("/stdin", true);
    let id = pod.start(&config)?;
    pod.wait_log(&id, "ready")?;
    let mut command = c.crictl.command(&["attach", "-i", &id]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = Client(command.stderr(Stdio::null()).spawn()?);
    let mut stdin = client.0.stdin.take().context("stdin")?;
    stdin.write_all(b"one\ntwo\n")?;
    pod.wait_log(&id, "got two")?;
    let mut output = vec![0; 16];
    let stdout = client.0.stdout.as_mut().context("stdout")?;
    stdout.read_exact(&mut output)?;
    ensure!(output == b"got one\ngot two\n", "{output:?}");
    drop(client);
    ensure!(pod.status(&id)?["state"] == "CONTAINER_RUNNING");
    pod.remove()?;
    Ok(Cell::Ok)
}

/// Figures of a container and of its pod, and a limit that is changed meanwhile.
pub fn stats(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "stats")?;
    let id = pod.tools("stats", &["probe", "burn", "1", "60"])?;
    let read = |args: &[&str]| -> Result<(u64, u64)> {
        let all = c.crictl.json(args)?;
        let one = &all["stats"][0];
        let one = if one["linux"].is_object() {
            &one["linux"]
        } else {
            one
        };
        let number = |path: &str| -> u64 {
            let value = one.pointer(path).and_then(Value::as_str);
            value.and_then(|v| v.parse().ok()).unwrap_or(0)
        };
        Ok((
            number("/cpu/usageCoreNanoSeconds/value"),
            number("/memory/workingSetBytes/value"),
        ))
    };
    for args in [
        ["stats", "-o", "json", id.as_str()],
        ["statsp", "-o", "json", pod.id.as_str()],
    ] {
        // 2.x looks at intervals.
        wait_for(args[0], PATIENCE, || {
            let (processor, memory) = read(&args)?;
            Ok((processor > 0 && memory > 0).then_some(()))
        })?;
    }
    pod.remove()?;
    Ok(Cell::Ok)
}

pub fn update(c: &mut Containerd) -> Result<Cell> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Ok(Cell::Skip("no cgroup v1 here".to_owned()));
    }
    let pod = Pod::run(c, "coracle", "update")?;
    let id = pod.tools("update", SLEEPER)?;
    let change = ["update", "--memory", "67108864", "--cpu-share", "333", &id];
    c.crictl.run(&change)?;
    let read = |file: &str| -> Result<String> {
        let (controller, name) = file.split_once('/').context("a controller")?;
        let mark = &c.stage.mark;
        let path = format!("/sys/fs/cgroup/{controller}/{mark}/{id}/{name}");
        Ok(fs::read_to_string(&path).context(path)?.trim().to_owned())
    };
    ensure!(read("memory/memory.limit_in_bytes")? == "67108864");
    ensure!(read("cpu/cpu.shares")? == "333");
    pod.remove()?;
    Ok(Cell::Ok)
}

pub fn out_of_memory(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "oom")?;
    let config = crictl::container("oom", TOOLS, &["probe", "eat", "200"])
        .set("/linux/resources/memory_limit_in_bytes", 33_554_432);
    let id = pod.start(&config)?;
    let status = pod.exited(&id)?;
    ensure!(
        status["exitCode"] == 137 && status["reason"] == "OOMKilled",
        "{status:#}"
    );
    pod.remove()?;
    Ok(Cell::Ok)
}

pub fn port_forward(c: &mut Containerd) -> Result<Cell> {
    let pod = Pod::run(c, "coracle", "forward")?;
    let id = pod.tools("forward", &["probe", "echo", "7000"])?;
    wait_for("the echo", PATIENCE, || {
        Ok(pod
            .log(&id)?
            .iter()
            .any(|l| l.contains("echo on"))
            .then_some(()))
    })?;
    let port = free_port()?;
    let ports = format!("{port}:7000");
    let mut command = c.crictl.command(&["port-forward", &pod.id, &ports]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let client = Client(command.spawn()?);
    let mut stream = wait_for("the port", PATIENCE, || {
        Ok(TcpStream::connect(("127.0.0.1", port)).ok())
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"there and back\n")?;
    let mut got = [0; 15];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"there and back\n", "{got:?}");
    drop((stream, client));
    pod.remove()?;
    Ok(Cell::Ok)
}

/// The plugin asks the runtime for its features before it lets a pod have one.
pub fn user_namespace(c: &mut Containerd) -> Result<Cell> {
    if c.release.number() < (2, 0) {
        return Ok(Cell::Absent("pods with user namespaces came with 2.0"));
    }
    let map = json!([{"container_id": 0, "host_id": 200_000, "length": 65_536}]);
    let options = json!({"mode": 0, "uids": map, "gids": map});
    let namespaces = "/linux/security_context/namespace_options";
    let pod = Pod::run_as(c, "coracle", "userns", |config| {
        config.set(namespaces, json!({"pid": 1, "userns_options": options}))
    })?;
    let words = [
        "sh",
        "-c",
        "cat /proc/self/uid_map; stat -c %u /etc/from-image",
    ];
    let config = crictl::container("userns", TOOLS, &words)
        .set(namespaces, json!({"pid": 1, "userns_options": options}));
    let id = pod.start(&config)?;
    let status = pod.exited(&id)?;
    ensure!(status["exitCode"] == 0, "{status:#}");
    let log = pod.log(&id)?.join(" ");
    let words: Vec<&str> = log.split_whitespace().collect();
    ensure!(words == ["0", "200000", "65536", "0"], "{log}");
    pod.remove()?;
    Ok(Cell::Ok)
}

/// A pod goes on while the daemon is away.
pub fn daemon_restart(c: &mut Containerd) -> Result<Cell> {
    let (id, pod_id) = {
        let pod = Pod::run(c, "coracle", "restart")?;
        (pod.tools("restart", SLEEPER)?, pod.id)
    };
    c.stop()?;
    c.start()?;
    wait_for("the pod", PATIENCE, || {
        let list = c.crictl.ids(&["ps", "-q", "--no-trunc"])?;
        Ok(list.contains(&id).then_some(()))
    })?;
    let text = c.crictl.run(&["exec", "--sync", &id, "echo", "again"])?;
    if text != "again" {
        bail!("{text}");
    }
    c.crictl.run(&["stopp", &pod_id])?;
    c.crictl.run(&["rmp", &pod_id])?;
    Ok(Cell::Ok)
}

/// The newest containerd takes over what this one started: the pod, its shim and its container.
/// There is no way back, so this feature is the last.
pub fn upgrade(c: &mut Containerd) -> Result<Cell> {
    let newest = match Release::find(RELEASES[RELEASES.len() - 1]) {
        Ok(newest) => newest,
        Err(why) => return Ok(Cell::Skip(format!("{why:#}"))),
    };
    if c.release.name == newest.name {
        return Ok(Cell::Absent("it is the newest here"));
    }
    let (id, pod_id, config) = {
        let pod = Pod::run(c, "coracle", "upgrade")?;
        (pod.tools("before", SLEEPER)?, pod.id, pod.config)
    };
    c.stop()?;
    c.release = newest;
    c.start()?;
    let pod = Pod {
        c,
        id: pod_id,
        config,
    };
    let text = c.crictl.run(&["exec", "--sync", &id, "echo", "still"])?;
    ensure!(text == "still", "{text}");
    pod.kept_by_us(&id)?;
    // In the shim that the old one started.
    let worker = pod.tools("after", &["sh", "-c", "exit 4"])?;
    let status = pod.exited(&worker)?;
    ensure!(status["exitCode"] == 4, "{status:#}");
    c.crictl.run(&["stop", "-t", "0", &id])?;
    let status = pod.exited(&id)?;
    ensure!(status["exitCode"] == 137, "{status:#}");
    pod.remove()?;
    Ok(Cell::Ok)
}
