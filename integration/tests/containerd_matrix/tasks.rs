//! What `ctr` asks of a shim, feature by feature.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::containerd::Containerd;
use coracle_integration::process::Process;
use coracle_integration::stage::{failure, success};
use coracle_integration::world::{feed, sha256};
use coracle_integration::{binaries, terminal, wait_for};
use serde_json::{Value, json};

use crate::{Cell, layers};

const OURS: &str = "io.containerd.coracle.v2";
const RUNC: &str = "io.containerd.runc.v2";
const PATIENCE: Duration = Duration::from_secs(15);

/// Counts up until a SIGTERM, which ends it with code 5.
const WORKER: &[&str] = &[
    "sh",
    "-c",
    "trap 'exit 5' TERM; while :; do sleep 0.05; done",
];

/// Containers of one feature, by the runtime that ctr names.
struct Tasks<'a> {
    c: &'a Containerd,
    runtime: String,
}

impl<'a> Tasks<'a> {
    fn of(c: &'a Containerd, runtime: &str) -> Self {
        Self {
            c,
            runtime: runtime.to_owned(),
        }
    }

    fn run(&self, flags: &[&str], id: &str, words: &[&str]) -> Command {
        let cgroup = format!("/{}/{id}", self.c.stage.mark);
        let head = ["run", "--runtime", &self.runtime];
        // A flag that is given twice is taken from the end.
        let cgroup = ["--cgroup", &cgroup];
        let id = [self.c.image.as_str(), id];
        self.c
            .command(&[&head, &cgroup[..], flags, &id[..], words].concat())
    }

    fn detached(&self, flags: &[&str], id: &str, words: &[&str]) -> Result<()> {
        let log = format!("file://{}", self.log(id).display());
        let flags = [&["-d", "--log-uri", &log], flags].concat();
        success(self.run(&flags, id, words))?;
        self.wait_status(id, "RUNNING")
    }

    fn log(&self, id: &str) -> PathBuf {
        self.c.dir().join(format!("{id}.log"))
    }

    fn exec(&self, id: &str, name: &str, flags: &[&str], words: &[&str]) -> Command {
        self.c
            .command(&[&["task", "exec", "--exec-id", name], flags, &[id], words].concat())
    }

    /// The line of a task: its id, its first process, its status.
    fn line(&self, id: &str) -> Result<Vec<String>> {
        let list = self.c.ctr(&["task", "list"])?;
        let lines = list.lines().map(|l| l.split_whitespace());
        let mut lines = lines.map(|l| l.map(str::to_owned).collect::<Vec<_>>());
        lines
            .find(|l| l.first().is_some_and(|word| word == id))
            .with_context(|| format!("no task {id} in\n{list}"))
    }

    fn pid(&self, id: &str) -> Result<u32> {
        let line = self.line(id)?;
        Ok(line.get(1).context("a pid")?.parse()?)
    }

    fn wait_status(&self, id: &str, status: &str) -> Result<()> {
        wait_for(&format!("{id} to be {status}"), PATIENCE, || {
            let line = self.line(id)?;
            Ok((line.get(2).map(String::as_str) == Some(status)).then_some(()))
        })
    }

    /// What `task rm` says of a task that has ended.
    fn remove(&self, id: &str) -> Result<Output> {
        let output = self.c.command(&["task", "rm", id]).output()?;
        self.c.ctr(&["container", "rm", id])?;
        Ok(output)
    }

    fn kill(&self, id: &str) -> Result<()> {
        self.c.ctr(&["task", "kill", "--signal", "SIGKILL", id])?;
        self.wait_status(id, "STOPPED")?;
        self.remove(id)?;
        Ok(())
    }

    /// That it is our shim which keeps the container, and its pid.
    fn shim(&self, id: &str) -> Result<u32> {
        let pid = self.pid(id)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"));
        let parent: u32 = parent.context("a parent")?.trim().parse()?;
        let program = fs::read_link(format!("/proc/{parent}/exe"))?;
        ensure!(
            program == binaries::shim()?,
            "{} keeps the container, not our shim",
            program.display()
        );
        Ok(parent)
    }

    /// Output, errors and exit code of a container, and that our shim keeps one.
    fn work(&self, flags: &[&str]) -> Result<()> {
        let words = ["sh", "-c", "echo out; echo err >&2; exit 3"];
        let output = self
            .run(&[&["--rm"], flags].concat(), "r1", &words)
            .output()?;
        ensure!(output.status.code() == Some(3), "{output:?}");
        ensure!(output.stdout == b"out\n", "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(said.lines().any(|l| l == "err"), "{said}");
        self.detached(flags, "r2", WORKER)?;
        self.shim("r2")?;
        self.kill("r2")
    }
}

pub fn run_by_name(c: &mut Containerd) -> Result<Cell> {
    Tasks::of(c, OURS).work(&[])?;
    Ok(Cell::Ok)
}

pub fn run_by_path(c: &mut Containerd) -> Result<Cell> {
    Tasks::of(c, &binaries::shim()?.display().to_string()).work(&[])?;
    Ok(Cell::Ok)
}

/// containerd takes our shim for its own; ctr then passes runc's options.
pub fn run_as_runc_shim(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, RUNC);
    tasks.work(&[])?;
    let coracle = binaries::coracle()?.display().to_string();
    let root = c.dir().join("runc-root").display().to_string();
    tasks.work(&["--runc-binary", &coracle, "--runc-root", &root])?;
    // Its state was there.
    ensure!(Path::new(&root).join("default").is_dir());
    Ok(Cell::Ok)
}

/// The form of the answer that each release asks `start` for, seen in what it wrote down.
pub fn bootstrap(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "b", WORKER)?;
    let bundle = c.bundle("default", "b");
    let address = fs::read_to_string(bundle.join("address"));
    let params = fs::read_to_string(bundle.join("bootstrap.json"));
    if c.release.number() < (2, 0) {
        let address = address.context("read the bundle's address")?;
        ensure!(
            address.starts_with("unix:///run/containerd/s/"),
            "{address}"
        );
        ensure!(params.is_err(), "{params:?}");
    } else {
        let params: Value = serde_json::from_str(&params.context("bootstrap.json")?)?;
        let protobuf = c.release.number() >= (2, 3);
        let version = if protobuf { 3 } else { 2 };
        ensure!(
            params["version"] == version && params["protocol"] == "ttrpc",
            "{params}"
        );
    }
    tasks.kill("b")?;
    Ok(Cell::Ok)
}

pub fn refused_start(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let error = failure(tasks.run(&["--rm"], "f", &["nosuchprogram"]), 1)?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    // ctr 1.6 leaves the container's record.
    let _ = c.command(&["container", "rm", "f"]).output()?;
    Ok(Cell::Ok)
}

pub fn terminal(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    // ctr sets the size when the task runs already.
    let words = ["sh", "-c", "tty; sleep 0.5; probe tty; exit 4"];
    let output = terminal::run(tasks.run(&["--rm", "--tty"], "t", &words), 33, 77)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(4), "{output:?}");
    ensure!(text.contains("/dev/pts/0"), "{text}");
    ensure!(text.contains("33 rows, 77 columns"), "{text}");
    Ok(Cell::Ok)
}

pub fn detached(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "d", WORKER)?;
    let processes = c.ctr(&["task", "ps", "d"])?;
    let pid = tasks.pid("d")?.to_string();
    ensure!(
        processes.lines().any(|l| l.starts_with(&pid)),
        "no {pid} in {processes}"
    );
    c.ctr(&["task", "kill", "--signal", "SIGTERM", "d"])?;
    tasks.wait_status("d", "STOPPED")?;
    let said = String::from_utf8_lossy(&tasks.remove("d")?.stderr).into_owned();
    ensure!(said.contains("exit code 5"), "{said}");
    Ok(Cell::Ok)
}

pub fn exec(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "e", WORKER)?;
    let words = ["probe", "show"];
    let flags = ["--cwd", "/tmp", "--user", "1000"];
    let seen: Value = serde_json::from_str(&success(tasks.exec("e", "e1", &flags, &words))?)?;
    ensure!(seen["uids"][0] == 1000 && seen["cwd"] == "/tmp", "{seen:#}");
    failure(tasks.exec("e", "e2", &[], &["sh", "-c", "exit 9"]), 9)?;
    let error = failure(tasks.exec("e", "e3", &[], &["nosuch"]), 1)?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    tasks.kill("e")?;
    Ok(Cell::Ok)
}

pub fn exec_terminal(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "x", WORKER)?;
    let words = ["sh", "-c", "tty; sleep 0.5; probe tty; exit 6"];
    let output = terminal::run(tasks.exec("x", "x1", &["--tty"], &words), 44, 88)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(6), "{output:?}");
    ensure!(text.contains("/dev/pts/"), "{text}");
    ensure!(text.contains("44 rows, 88 columns"), "{text}");
    tasks.kill("x")?;
    Ok(Cell::Ok)
}

/// ctr closes the stdin of the process when its own has ended: the process must see the end, and
/// every byte before it.
pub fn stdin_half_close(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "i", WORKER)?;
    let file = c.dir().join("input");
    let source = Command::new(binaries::probe()?)
        .args(["source", "3000001"])
        .output()?;
    fs::write(&file, &source.stdout)?;
    let output = feed(
        &mut tasks.exec("i", "i1", &[], &["probe", "sink"]),
        &source.stdout,
    )?;
    let want = format!("{} {}\n", source.stdout.len(), sha256(&file)?);
    ensure!(
        output.stdout == want.as_bytes(),
        "sent {want}, arrived {output:?}"
    );
    tasks.kill("i")?;
    Ok(Cell::Ok)
}

pub fn output_is_whole(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let words = ["probe", "source", "16777216"];
    let output = tasks.run(&["--rm"], "o", &words).output()?;
    ensure!(output.status.success(), "{}", output.status);
    let want = Command::new(binaries::probe()?)
        .args(&words[1..])
        .output()?;
    ensure!(
        output.stdout == want.stdout,
        "{} bytes came, or others",
        output.stdout.len()
    );
    // A process that ends before its reader has begun: all of it is in pipes then, and ctr
    // closes its end when it knows of the exit.
    let words = ["probe", "source", "900000"];
    let mut command = tasks.run(&["--rm"], "o2", &words);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let child = command.spawn()?;
    std::thread::sleep(Duration::from_millis(700));
    let late = child.wait_with_output()?.stdout;
    ensure!(
        late == want.stdout[..900_000],
        "{} of 900000 bytes came to a late reader",
        late.len()
    );
    Ok(Cell::Ok)
}

pub fn pause_and_resume(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "p", WORKER)?;
    c.ctr(&["task", "pause", "p"])?;
    tasks.wait_status("p", "PAUSED")?;
    c.ctr(&["task", "resume", "p"])?;
    tasks.wait_status("p", "RUNNING")?;
    success(tasks.exec("p", "p1", &[], &["true"]))?;
    tasks.kill("p")?;
    Ok(Cell::Ok)
}

pub fn kill_all(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "k", &["sh", "-c", "sleep 900 & sleep 901 & wait"])?;
    c.ctr(&["task", "kill", "--all", "--signal", "SIGKILL", "k"])?;
    tasks.wait_status("k", "STOPPED")?;
    tasks.remove("k")?;
    Ok(Cell::Ok)
}

/// Twenty at once, and the code of each is its own.
pub fn many_execs(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&[], "m", WORKER)?;
    let mut children = Vec::new();
    for n in 0..20 {
        let script = format!("exit {n}");
        let mut command = tasks.exec("m", &format!("m{n}"), &[], &["sh", "-c", &script]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        children.push((n, command.spawn()?));
    }
    for (n, mut child) in children {
        let status = child.wait()?;
        ensure!(status.code() == Some(n), "exec {n}: {status}");
    }
    tasks.kill("m")?;
    Ok(Cell::Ok)
}

/// `name value` lines of `task metrics`.
fn metric(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    })
}

pub fn metrics_v1(c: &mut Containerd) -> Result<Cell> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Ok(Cell::Skip("no cgroup v1 here".to_owned()));
    }
    let tasks = Tasks::of(c, OURS);
    tasks.detached(&["--memory-limit=67108864"], "s", WORKER)?;
    let text = c.ctr(&["task", "metrics", "s"])?;
    let limit = metric(&text, "memory.limit_in_bytes");
    let used = metric(&text, "memory.usage_in_bytes");
    ensure!(used.is_some_and(|n| n > 0), "{text}");
    ensure!(limit.is_none() || limit == Some(67_108_864), "{text}");
    let processor = metric(&text, "cpuacct.usage");
    ensure!(processor.is_some_and(|n| n > 0), "{text}");
    tasks.kill("s")?;
    Ok(Cell::Ok)
}

/// The daemon has a view of cgroup2 alone. On a hybrid machine it is one without controllers,
/// where ctr's usual cpu.shares cannot be set: the config is our own.
pub fn metrics_v2(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let root = c.dir().join("rootfs-v2");
    fs::create_dir_all(root.join("proc"))?;
    fs::copy(binaries::probe()?, root.join("probe"))?;
    let config = c.dir().join("v2.json");
    let kinds = ["pid", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": root},
        "process": {"args": ["/probe", "burn", "1", "30"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": kinds, "cgroupsPath": format!("/{}/s", c.stage.mark)},
    });
    fs::write(&config, spec.to_string())?;
    let config = config.display().to_string();
    let words = [
        "run",
        "-d",
        "--null-io",
        "--runtime",
        OURS,
        "--config",
        &config,
        "s",
    ];
    c.ctr(&words)?;
    tasks.wait_status("s", "RUNNING")?;
    let text = wait_for("use of the CPU", PATIENCE, || {
        let text = c.ctr(&["task", "metrics", "s"])?;
        let used = metric(&text, "cpu.usage_usec");
        ensure!(used.is_some(), "{text}");
        Ok(used.is_some_and(|n| n > 0).then_some(text))
    })?;
    ensure!(metric(&text, "pids.current").is_some(), "{text}");
    tasks.kill("s")?;
    Ok(Cell::Ok)
}

/// `ctr events` beside a feature; `Process` ends it.
struct Events {
    log: PathBuf,
    _process: Process,
}

impl Events {
    fn listen(c: &Containerd, name: &str) -> Result<Self> {
        let log = c.dir().join(format!("{name}.events"));
        let process = Process::start(&mut c.command(&["events"]), &log)?;
        // It is there when it says the first thing.
        wait_for("ctr events", PATIENCE, || {
            c.ctr(&["image", "label", &c.image, "listened=yes"])?;
            Ok(fs::read_to_string(&log)?
                .contains("/images/update")
                .then_some(()))
        })?;
        Ok(Self {
            log,
            _process: process,
        })
    }

    /// Topics and bodies of a container's events, when the last of them is `last`.
    fn until(&self, id: &str, last: &str) -> Result<Vec<(String, Value)>> {
        let found = wait_for(&format!("{last} of {id}"), PATIENCE, || {
            let text = fs::read_to_string(&self.log)?;
            let mut found = Vec::new();
            for line in text.lines() {
                let Some(start) = line.find(" /tasks/") else {
                    continue;
                };
                let (topic, body) = line[start + 1..].split_once(' ').unwrap_or_default();
                let body: Value = serde_json::from_str(body).with_context(|| line.to_owned())?;
                if body["container_id"] == id {
                    found.push((topic.to_owned(), body));
                }
            }
            let there = found.iter().any(|(topic, _)| topic == last);
            Ok(there.then_some(found))
        });
        found.with_context(|| fs::read_to_string(&self.log).unwrap_or_default())
    }
}

pub fn events_in_order(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let events = Events::listen(c, "order")?;
    tasks.detached(&[], "v", WORKER)?;
    failure(tasks.exec("v", "v1", &[], &["sh", "-c", "exit 7"]), 7)?;
    c.ctr(&["task", "pause", "v"])?;
    c.ctr(&["task", "resume", "v"])?;
    tasks.kill("v")?;
    let found = events.until("v", "/tasks/delete")?;
    let topics: Vec<&str> = found.iter().map(|(topic, _)| topic.as_str()).collect();
    let want = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(topics == want, "{found:#?}");
    ensure!(
        found[4].1["id"] == "v1" && found[4].1["exit_status"] == 7,
        "{found:#?}"
    );
    ensure!(
        found[7].1["id"] == "v" && found[7].1["exit_status"] == 137,
        "{found:#?}"
    );
    Ok(Cell::Ok)
}

pub fn out_of_memory(c: &mut Containerd) -> Result<Cell> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Ok(Cell::Skip("no cgroup v1 here".to_owned()));
    }
    let tasks = Tasks::of(c, OURS);
    let events = Events::listen(c, "oom")?;
    let flags = ["-d", "--null-io", "--memory-limit=33554432"];
    success(tasks.run(&flags, "w", &["probe", "eat", "200"]))?;
    tasks.wait_status("w", "STOPPED")?;
    let said = String::from_utf8_lossy(&tasks.remove("w")?.stderr).into_owned();
    ensure!(said.contains("exit code 137"), "{said}");
    let found = events.until("w", "/tasks/delete")?;
    let place = |topic: &str| found.iter().position(|(t, _)| t == topic);
    let (oom, exit) = (place("/tasks/oom"), place("/tasks/exit"));
    ensure!(oom.is_some() && oom < exit, "{found:#?}");
    Ok(Cell::Ok)
}

pub fn log_to_file(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let log = format!("file://{}", tasks.log("l").display());
    let words = ["sh", "-c", "echo out; echo err >&2"];
    success(tasks.run(&["-d", "--log-uri", &log], "l", &words))?;
    tasks.wait_status("l", "STOPPED")?;
    let text = fs::read_to_string(tasks.log("l"))?;
    ensure!(text.contains("out\n") && text.contains("err\n"), "{text}");
    tasks.remove("l")?;
    Ok(Cell::Ok)
}

/// The logger's descriptors: 3 and 4 to read, 5 to be closed when it is ready.
pub fn log_to_program(c: &mut Containerd) -> Result<Cell> {
    use std::os::unix::fs::PermissionsExt as _;
    let tasks = Tasks::of(c, OURS);
    let (logger, to) = (c.dir().join("logger"), c.dir().join("logged"));
    let script = "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE\" >\"$2.who\"\n\
                  cat <&3 >\"$2.out\" &\ncat <&4 >\"$2.err\" &\nwait\n";
    fs::write(&logger, script)?;
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?to={}", logger.display(), to.display());
    let words = ["sh", "-c", "echo out; echo err >&2"];
    success(tasks.run(&["-d", "--log-uri", &uri], "g", &words))?;
    tasks.wait_status("g", "STOPPED")?;
    tasks.remove("g")?;
    for (end, want) in [("who", "g default\n"), ("out", "out\n"), ("err", "err\n")] {
        let path = to.with_extension(end);
        wait_for(&format!("{want:?} from the logger"), PATIENCE, || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            Ok((text == want).then_some(()))
        })?;
    }
    Ok(Cell::Ok)
}

pub fn grouping(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let flags = ["--annotation", "io.containerd.runc.v2.group=together"];
    tasks.detached(&flags, "g1", WORKER)?;
    tasks.detached(&flags, "g2", WORKER)?;
    tasks.detached(&[], "g3", WORKER)?;
    let shims = [tasks.shim("g1")?, tasks.shim("g2")?, tasks.shim("g3")?];
    ensure!(shims[0] == shims[1] && shims[1] != shims[2], "{shims:?}");
    tasks.kill("g1")?;
    success(tasks.exec("g2", "x", &[], &["true"]))?;
    tasks.kill("g2")?;
    tasks.kill("g3")?;
    Ok(Cell::Ok)
}

/// ctr passes a file's name to a runtime that it does not know: the shim reads it.
pub fn options_file(c: &mut Containerd) -> Result<Cell> {
    use std::os::unix::fs::PermissionsExt as _;
    let tasks = Tasks::of(c, OURS);
    let dir = c.dir();
    let (wrapper, called) = (dir.join("wrapper"), dir.join("called"));
    let script = format!(
        "#!/bin/sh\necho \"$*\" >>{}\nexec {} \"$@\"\n",
        called.display(),
        binaries::coracle()?.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let cgroup = format!("{}/shim", c.stage.mark);
    let options = dir.join("options.toml");
    let text = format!(
        "BinaryName = \"{}\"\nRoot = \"{}\"\nShimCgroup = \"/{cgroup}\"\nIoUid = 1000\nIoGid = 1001\n",
        wrapper.display(),
        dir.join("option-root").display(),
    );
    fs::write(&options, text)?;
    let options = options.display().to_string();
    let flags = ["--runtime-config-path", options.as_str()];
    tasks.detached(&flags, "n", WORKER)?;
    let shim = tasks.shim("n")?;
    let at = fs::read_to_string(format!("/proc/{shim}/cgroup"))?;
    ensure!(at.contains(&cgroup), "{at}");
    ensure!(fs::read_to_string(&called)?.contains("create"));
    ensure!(dir.join("option-root/default/n").is_dir());
    tasks.kill("n")?;
    let words = ["stat", "-L", "-c", "%u:%g", "/proc/self/fd/1"];
    let flags = [&["--rm"], &flags[..]].concat();
    let text = success(tasks.run(&flags, "n2", &words))?;
    ensure!(text == "1000:1001\n", "stdout belongs to {text}");
    Ok(Cell::Ok)
}

/// Without systemd the request is refused in words that say so, and nothing stays.
pub fn systemd_cgroup(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, RUNC);
    let slice = format!("system.slice:coracle:{}", c.stage.mark);
    let flags = ["--rm", "--runc-systemd-cgroup", "--cgroup", &slice];
    let command = tasks.run(&flags, "y", &["true"]);
    if Path::new("/run/systemd/system").exists() {
        success(command)?;
        return Ok(Cell::Ok);
    }
    let error = failure(command, 1)?;
    ensure!(error.contains("systemd"), "{error}");
    let _ = c.command(&["container", "rm", "y"]).output()?;
    Ok(Cell::Ok)
}

pub fn user_namespace(c: &mut Containerd) -> Result<Cell> {
    let tasks = Tasks::of(c, OURS);
    let map = "0:100000:65536";
    let flags = ["--rm", "--uidmap", map, "--gidmap", map];
    let words = [
        "sh",
        "-c",
        "cat /proc/self/uid_map; stat -c %u /etc/from-image",
    ];
    let text = success(tasks.run(&flags, "u", &words))?;
    let words: Vec<&str> = text.split_whitespace().collect();
    ensure!(words == ["0", "100000", "65536", "0"], "{text}");
    Ok(Cell::Ok)
}

/// One that overlay's options take more than a page for.
pub fn many_layers(c: &mut Containerd) -> Result<Cell> {
    let archive = layers::archive(c.dir())?;
    c.ctr(&["image", "import", &archive])?;
    fs::remove_file(&archive)?;
    let cgroup = format!("/{}/z", c.stage.mark);
    let last = format!("/layer-{}", layers::LAYERS - 1);
    let head = [
        "run",
        "--rm",
        "--runtime",
        OURS,
        "--cgroup",
        &cgroup,
        layers::NAME,
        "z",
    ];
    let words = ["/probe", "show", "/layer-1", &last, "/last"];
    let text = c.ctr(&[&head[..], &words].concat())?;
    let seen: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let content = |path: &str| seen["paths"][path]["text"].as_str().unwrap_or_default();
    let number = format!("{}\n", layers::LAYERS - 1);
    ensure!(content("/layer-1") == "1\n", "{seen:#}");
    ensure!(
        content(&last) == number && content("/last") == number,
        "{seen:#}"
    );
    c.ctr(&["image", "rm", "--sync", layers::NAME])?;
    Ok(Cell::Ok)
}

/// One container goes on while the daemon is away, another ends.
pub fn daemon_restart(c: &mut Containerd) -> Result<Cell> {
    Tasks::of(c, OURS).detached(&[], "a", WORKER)?;
    Tasks::of(c, OURS).detached(&[], "b", WORKER)?;
    let pid = Tasks::of(c, OURS).pid("b")?;
    c.stop()?;
    signal(pid, rustix::process::Signal::TERM)?;
    wait_for("the end of b", PATIENCE, || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        Ok(stat.is_err().then_some(()))
    })?;
    c.start()?;
    let tasks = Tasks::of(c, OURS);
    tasks.wait_status("b", "STOPPED")?;
    let said = String::from_utf8_lossy(&tasks.remove("b")?.stderr).into_owned();
    ensure!(said.contains("exit code 5"), "{said}");
    tasks.wait_status("a", "RUNNING")?;
    failure(tasks.exec("a", "a1", &[], &["sh", "-c", "exit 8"]), 8)?;
    tasks.kill("a")?;
    Ok(Cell::Ok)
}

fn signal(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    Ok(rustix::process::kill_process(
        pid.context("a pid")?,
        signal,
    )?)
}

pub fn runtime_info(c: &mut Containerd) -> Result<Cell> {
    if c.release.number() < (2, 0) {
        return Ok(Cell::Absent("ctr asks no runtime before 2.0"));
    }
    let text = c.ctr(&["plugins", "inspect-runtime", "--runtime", OURS])?;
    let info: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(info["Name"] == OURS, "{text}");
    let hooks = &info["Features"]["hooks"];
    ensure!(
        hooks.as_array().is_some_and(|h| !h.is_empty()),
        "no features in {text}"
    );
    Ok(Cell::Ok)
}

pub fn checkpoint_and_restore(c: &mut Containerd) -> Result<Cell> {
    if let Some(why) = coracle_integration::criu::missing(None) {
        return Ok(Cell::Skip(why));
    }
    let tasks = Tasks::of(c, RUNC);
    tasks.detached(&[], "q", &["probe", "lines", "0", "10000"])?;
    let image = format!("{}:checkpoint", c.stage.mark);
    c.ctr(&["container", "checkpoint", "--task", "q", &image])?;
    tasks.wait_status("q", "RUNNING")?;
    tasks.kill("q")?;
    c.ctr(&["container", "restore", "--live", "q", &image])?;
    tasks.wait_status("q", "RUNNING")?;
    tasks.shim("q")?;
    tasks.kill("q")?;
    Ok(Cell::Ok)
}
