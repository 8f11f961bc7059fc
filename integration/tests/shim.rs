//! The shim and the runtime under Debian's containerd, driven by ctr.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::isolation::Isolation;
use coracle_integration::leak::{self, Snapshot};
use coracle_integration::process::Process;
use coracle_integration::registry::Registry;
use coracle_integration::world::unique_mark;
use coracle_integration::{binaries, need_root, skip, wait_for};

struct Containerd {
    dir: PathBuf,
    mark: String,
    process: Option<Process>,
    registry: Registry,
    before: Snapshot,
    finished: bool,
    _isolation: Isolation,
}

impl Containerd {
    /// None when Debian's containerd is not installed.
    fn start() -> Result<Option<Self>> {
        if binaries::installed("containerd").is_none() || binaries::installed("ctr").is_none() {
            return Ok(None);
        }
        let isolation = Isolation::enter()?;
        let mark = unique_mark();
        let dir = std::env::temp_dir().join(&mark);
        std::fs::create_dir_all(&dir)?;
        let registry = Registry::start(&dir)?;
        let before = Snapshot::take(&mark)?;
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/containerd.sock\"\n\
             [ttrpc]\naddress = \"{0}/containerd.sock.ttrpc\"\n",
            dir.display()
        );
        std::fs::write(dir.join("containerd.toml"), text)?;
        let mut containerd = Self {
            dir,
            mark,
            process: None,
            registry,
            before,
            finished: false,
            _isolation: isolation,
        };
        containerd.launch()?;
        let image = format!("{}/coracle/tools:latest", containerd.registry.address());
        containerd.ctr(&["image", "pull", "--plain-http", &image])?;
        Ok(Some(containerd))
    }

    fn launch(&mut self) -> Result<()> {
        let shim = binaries::shim()?;
        let beside = shim.parent().context("the shim has a directory")?;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.dir.join("containerd.toml"))
            .env("PATH", format!("{}:{path}", beside.display()));
        let mut process = Process::start(&mut command, &self.dir.join("containerd.log"))?;
        wait_for("containerd", Duration::from_secs(15), || {
            if let Some(status) = process.ended()? {
                bail!("containerd: {status}\n{}", process.log_tail());
            }
            Ok(self.try_ctr(&["version"])?.status.success().then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.dir.join("containerd.sock"))
            .args(args);
        command.stdin(Stdio::null());
        command
    }

    fn try_ctr(&self, args: &[&str]) -> Result<Output> {
        Ok(self.command(args).output()?)
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        let output = self.try_ctr(args)?;
        ensure!(
            output.status.success(),
            "ctr {}: {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `ctr run` with our runtime, in a cgroup of this test.
    fn run<'a>(&'a self, flags: &[&'a str], id: &'a str, command: &[&'a str]) -> Result<Output> {
        let image = format!("{}/coracle/tools:latest", self.registry.address());
        let cgroup = format!("/{}/{id}", self.mark);
        let head = [
            "run",
            "--runtime",
            "io.containerd.coracle.v2",
            "--cgroup",
            &cgroup,
        ];
        let args: Vec<&str> = head
            .iter()
            .chain(flags)
            .copied()
            .chain([image.as_str(), id])
            .chain(command.iter().copied())
            .collect();
        self.try_ctr(&args)
    }

    fn run_detached(&self, id: &str, command: &[&str]) -> Result<()> {
        let image = format!("{}/coracle/tools:latest", self.registry.address());
        let cgroup = format!("/{}/{id}", self.mark);
        let log = self.dir.join(format!("{id}.log"));
        let uri = format!("file://{}", log.display());
        let head = [
            "run",
            "-d",
            "--runtime",
            "io.containerd.coracle.v2",
            "--cgroup",
            &cgroup,
            "--log-uri",
            &uri,
        ];
        let args: Vec<&str> = head
            .iter()
            .copied()
            .chain([image.as_str(), id])
            .chain(command.iter().copied())
            .collect();
        self.ctr(&args)?;
        Ok(())
    }

    fn tasks(&self) -> Result<String> {
        self.ctr(&["task", "list"])
    }

    fn finish(mut self) -> Result<()> {
        ensure!(
            self.tasks()?.lines().count() == 1,
            "tasks are left: {}",
            self.tasks()?
        );
        let shims = || {
            leak::processes(&self.mark)
                .into_iter()
                .filter(|p| p.contains("shim"))
                .collect::<Vec<_>>()
        };
        wait_for("the shims' end", Duration::from_secs(5), || {
            Ok(shims().is_empty().then_some(()))
        })?;
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(10))?;
        }
        leak::remove_cgroups(&format!("/{}", self.mark));
        let registry = format!("process {} ", self.registry.pid());
        let mut left = Snapshot::take(&self.mark)?.since(&self.before);
        left.retain(|t| !t.starts_with(&registry));
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        self.finished = true;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if !self.finished {
            let log = coracle_integration::process::tail(&self.dir.join("containerd.log"));
            eprintln!("--- containerd's log ---\n{log}\n---");
            self.process = None;
            leak::sweep(&self.mark, &self.dir);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn ctr_run_gives_output_and_exit_code() -> Result<()> {
    need_root!();
    let Some(containerd) = Containerd::start()? else {
        skip!("containerd is not installed")
    };
    let output = containerd.run(
        &["--rm"],
        "c1",
        &["sh", "-c", "echo out; echo err >&2; exit 3"],
    )?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        output.stdout == b"out\n" && output.stderr == b"err\n",
        "{output:?}"
    );
    let output = containerd.run(&["--rm"], "c2", &["nosuchprogram"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && error.contains("nosuchprogram"),
        "{error}"
    );
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    containerd.try_ctr(&["container", "rm", "c2"])?;
    containerd.finish()
}

#[test]
fn ctr_exec_kill_pause_metrics_and_delete_work() -> Result<()> {
    need_root!();
    let Some(containerd) = Containerd::start()? else {
        skip!("containerd is not installed")
    };
    containerd.run_detached("c", &["sleep", "1000"])?;
    ensure!(
        containerd.tasks()?.contains("RUNNING"),
        "{}",
        containerd.tasks()?
    );
    let output = containerd.ctr(&[
        "task",
        "exec",
        "--exec-id",
        "e1",
        "c",
        "cat",
        "/etc/from-image",
    ])?;
    ensure!(output == "image\n", "{output}");
    let output =
        containerd.try_ctr(&["task", "exec", "--exec-id", "e2", "c", "sh", "-c", "exit 9"])?;
    ensure!(output.status.code() == Some(9), "{output:?}");
    let ps = containerd.ctr(&["task", "ps", "c"])?;
    ensure!(ps.lines().count() == 2, "{ps}");
    containerd.ctr(&["task", "pause", "c"])?;
    ensure!(
        containerd.tasks()?.contains("PAUSED"),
        "{}",
        containerd.tasks()?
    );
    containerd.ctr(&["task", "resume", "c"])?;
    let metrics = containerd.ctr(&["task", "metrics", "c"])?;
    ensure!(
        metrics.contains("memory") && metrics.contains("cpu"),
        "{metrics}"
    );
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    wait_for("the exit", Duration::from_secs(5), || {
        Ok(containerd.tasks()?.contains("STOPPED").then_some(()))
    })?;
    let output = containerd.try_ctr(&["task", "rm", "c"])?;
    ensure!(
        output.status.code() == Some(137) || output.status.success(),
        "{output:?}"
    );
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}

#[test]
fn ctr_exec_storm_loses_no_exit() -> Result<()> {
    need_root!();
    let Some(containerd) = Containerd::start()? else {
        skip!("containerd is not installed")
    };
    containerd.run_detached("c", &["sleep", "1000"])?;
    let started = Instant::now();
    for round in 0..5 {
        let mut children = Vec::new();
        for n in 0..8 {
            let id = format!("e{round}-{n}");
            let code = format!("exit {n}");
            let mut command =
                containerd.command(&["task", "exec", "--exec-id", &id, "c", "sh", "-c", &code]);
            children.push((
                n,
                command
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()?,
            ));
        }
        for (n, mut child) in children {
            let status = child.wait()?;
            ensure!(status.code() == Some(n), "exec {n}: {status}");
        }
    }
    ensure!(started.elapsed() < Duration::from_secs(60));
    let ps = containerd.ctr(&["task", "ps", "c"])?;
    ensure!(ps.lines().count() == 2, "processes are left: {ps}");
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    wait_for("the exit", Duration::from_secs(5), || {
        Ok(containerd.tasks()?.contains("STOPPED").then_some(()))
    })?;
    containerd.try_ctr(&["task", "rm", "c"])?;
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}

#[test]
fn containerd_killed_leaves_the_task_running_and_attaches_again() -> Result<()> {
    need_root!();
    let Some(mut containerd) = Containerd::start()? else {
        skip!("containerd is not installed")
    };
    containerd.run_detached("c", &["probe", "lines", "0", "5000"])?;
    let log = containerd.dir.join("c.log");
    let size = || std::fs::metadata(&log).map(|m| m.len()).unwrap_or(0);
    wait_for("output", Duration::from_secs(5), || {
        Ok((size() > 0).then_some(()))
    })?;
    containerd.process.take().context("containerd")?.crash()?;
    let before = size();
    wait_for("output without containerd", Duration::from_secs(5), || {
        Ok((size() > before + 500).then_some(()))
    })?;
    containerd.launch()?;
    ensure!(
        containerd.tasks()?.contains("RUNNING"),
        "{}",
        containerd.tasks()?
    );
    let output = containerd.ctr(&["task", "exec", "--exec-id", "e", "c", "echo", "again"])?;
    ensure!(output == "again\n", "{output}");
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    wait_for("the exit", Duration::from_secs(5), || {
        Ok(containerd.tasks()?.contains("STOPPED").then_some(()))
    })?;
    containerd.try_ctr(&["task", "rm", "c"])?;
    containerd.ctr(&["container", "rm", "c"])?;
    let text = std::fs::read_to_string(&log)?;
    for (n, line) in text.lines().enumerate() {
        ensure!(line == format!("line {n}"), "line {n} is {line:?}");
    }
    containerd.finish()
}

#[test]
fn ctr_kill_all_and_force_remove_leave_no_process() -> Result<()> {
    need_root!();
    let Some(containerd) = Containerd::start()? else {
        skip!("containerd is not installed")
    };
    containerd.run_detached("c", &["sh", "-c", "sleep 900 & sleep 901 & wait"])?;
    wait_for("three processes", Duration::from_secs(5), || {
        Ok((containerd.ctr(&["task", "ps", "c"])?.lines().count() == 4).then_some(()))
    })?;
    containerd.ctr(&["task", "kill", "--all", "--signal", "SIGKILL", "c"])?;
    wait_for("the exit", Duration::from_secs(5), || {
        Ok(containerd.tasks()?.contains("STOPPED").then_some(()))
    })?;
    containerd.try_ctr(&["task", "rm", "c"])?;
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}
