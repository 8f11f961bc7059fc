//! Debian's containerd with the shim that it comes with, `containerd-shim-runc-v2`, and coracle
//! in runc's place.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::process::Process;
use coracle_integration::stage::{Stage, failure, success};
use coracle_integration::{binaries, leak, need_root, skip, terminal, wait_for};
use serde_json::Value;

struct Containerd {
    stage: Stage,
    image: String,
    coracle: PathBuf,
    process: Option<Process>,
}

impl Containerd {
    /// None when Debian's containerd is not installed.
    fn start() -> Result<Option<Self>> {
        let programs = ["containerd", "ctr", "containerd-shim-runc-v2"];
        if programs.iter().any(|p| binaries::installed(p).is_none()) {
            return Ok(None);
        }
        let stage = Stage::set()?;
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/containerd.sock\"\n\
             [ttrpc]\naddress = \"{0}/containerd.sock.ttrpc\"\n",
            stage.dir.display()
        );
        std::fs::write(stage.dir.join("containerd.toml"), text)?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(stage.dir.join("containerd.toml"));
        let mut process = Process::start(&mut command, &stage.dir.join("containerd.log"))?;
        let mut containerd = Self {
            image: stage.tools(),
            stage,
            coracle: binaries::coracle()?,
            process: None,
        };
        wait_for("containerd", Duration::from_secs(15), || {
            if let Some(status) = process.ended()? {
                bail!("containerd: {status}\n{}", process.log_tail());
            }
            let output = containerd.command(&["version"]).output()?;
            Ok(output.status.success().then_some(()))
        })?;
        containerd.process = Some(process);
        containerd.ctr(&["image", "pull", "--plain-http", &containerd.image])?;
        Ok(Some(containerd))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.stage.dir.join("containerd.sock"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        success(self.command(args))
    }

    fn run(&self, flags: &[&str], id: &str, words: &[&str]) -> Command {
        let cgroup = format!("/{}/{id}", self.stage.mark);
        let binary = self.coracle.display().to_string();
        let head = [
            "run",
            "--runtime=io.containerd.runc.v2",
            "--runc-binary",
            &binary,
            "--cgroup",
            &cgroup,
        ];
        self.command(&[&head, flags, &[&self.image, id], words].concat())
    }

    fn run_detached(&self, id: &str, words: &[&str]) -> Result<()> {
        let log = format!("file://{}/{id}.log", self.stage.dir.display());
        success(self.run(&["-d", "--log-uri", &log], id, words))?;
        Ok(())
    }

    fn exec(&self, id: &str, name: &str, flags: &[&str], words: &[&str]) -> Command {
        self.command(&[&["task", "exec", "--exec-id", name], flags, &[id], words].concat())
    }

    fn status(&self, id: &str) -> Result<String> {
        let list = self.ctr(&["task", "list"])?;
        let line = list
            .lines()
            .find(|l| l.split_whitespace().next() == Some(id));
        Ok(line
            .and_then(|l| l.split_whitespace().nth(2))
            .unwrap_or_default()
            .to_owned())
    }

    fn wait_status(&self, id: &str, status: &str) -> Result<()> {
        wait_for(
            &format!("{id} to be {status}"),
            Duration::from_secs(10),
            || Ok((self.status(id)? == status).then_some(())),
        )
    }

    fn finish(mut self) -> Result<()> {
        let tasks = self.ctr(&["task", "list"])?;
        ensure!(tasks.lines().count() == 1, "tasks are left: {tasks}");
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(10))?;
        }
        wait_for("the shims' end", Duration::from_secs(10), || {
            let registry = format!("{} ", self.stage.registry.pid());
            let left = leak::processes(&self.stage.mark);
            Ok((!left.iter().any(|p| !p.starts_with(&registry))).then_some(()))
        })?;
        self.stage.strike()
    }
}

macro_rules! containerd {
    () => {{
        need_root!();
        match Containerd::start()? {
            Some(containerd) => containerd,
            None => skip!("containerd and its shim are not installed"),
        }
    }};
}

#[test]
fn runc_shim_passes_output_exit_code_and_errors_on() -> Result<()> {
    let containerd = containerd!();
    let words = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let output: Output = containerd.run(&["--rm"], "c1", &words).output()?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        output.stdout == b"out\n" && output.stderr == b"err\n",
        "{output:?}"
    );
    let error = failure(containerd.run(&["--rm"], "c2", &["nosuchprogram"]), 1)?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    let _ = containerd.command(&["container", "rm", "c2"]).output()?;
    let command = containerd.run(&["--rm", "--tty"], "c3", &["sh", "-c", "tty; exit 4"]);
    let output = terminal::run(command, 30, 90)?;
    ensure!(output.stdout.starts_with(b"/dev/pts/0"), "{output:?}");
    ensure!(output.status.code() == Some(4), "{output:?}");
    let flags = [
        "--rm",
        "--memory-limit=67108864",
        "--seccomp",
        "--read-only",
        "--env=A=b",
    ];
    let text = success(containerd.run(
        &flags,
        "c4",
        &[
            "probe",
            "show",
            "/",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ],
    ))?;
    let seen: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(
        seen["env"]["A"] == "b" && seen["seccomp"] == "2",
        "{seen:#}"
    );
    ensure!(seen["paths"]["/"]["write"] == "EROFS", "{seen:#}");
    let limit = &seen["paths"]["/sys/fs/cgroup/memory/memory.limit_in_bytes"]["text"];
    ensure!(limit.is_null() || limit == "67108864\n", "{seen:#}");
    containerd.finish()
}

#[test]
fn runc_shim_drives_a_task_through_its_life() -> Result<()> {
    let containerd = containerd!();
    containerd.run_detached(
        "c",
        &[
            "sh",
            "-c",
            "trap 'exit 5' TERM; while :; do sleep 0.05; done",
        ],
    )?;
    containerd.wait_status("c", "RUNNING")?;
    let text = success(containerd.exec("c", "e1", &[], &["cat", "/etc/from-image"]))?;
    ensure!(text == "image\n", "{text}");
    failure(containerd.exec("c", "e2", &[], &["sh", "-c", "exit 9"]), 9)?;
    let error = failure(containerd.exec("c", "e3", &[], &["nosuch"]), 1)?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    let output = terminal::run(containerd.exec("c", "e4", &["--tty"], &["tty"]), 30, 90)?;
    ensure!(output.stdout.starts_with(b"/dev/pts/"), "{output:?}");
    let text = success(containerd.exec(
        "c",
        "e5",
        &["--cwd", "/tmp", "--user", "1000"],
        &["probe", "show"],
    ))?;
    let seen: Value = serde_json::from_str(&text)?;
    ensure!(seen["uids"][0] == 1000 && seen["cwd"] == "/tmp", "{seen:#}");
    let ps = containerd.ctr(&["task", "ps", "c"])?;
    ensure!(ps.lines().count() >= 2, "{ps}");
    let metrics = containerd.ctr(&["task", "metrics", "c"])?;
    ensure!(
        metrics.contains("memory") && metrics.contains("cpu"),
        "{metrics}"
    );
    containerd.ctr(&["task", "pause", "c"])?;
    containerd.wait_status("c", "PAUSED")?;
    containerd.ctr(&["task", "resume", "c"])?;
    containerd.wait_status("c", "RUNNING")?;
    containerd.ctr(&["task", "kill", "--signal", "SIGTERM", "c"])?;
    containerd.wait_status("c", "STOPPED")?;
    let output = containerd.command(&["task", "rm", "c"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("exit code 5"), "{output:?}");
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}

#[test]
fn runc_shim_kills_all_and_loses_no_exit_of_many() -> Result<()> {
    let containerd = containerd!();
    containerd.run_detached("c", &["sh", "-c", "sleep 900 & sleep 901 & wait"])?;
    let mut children = Vec::new();
    for n in 0..12 {
        let mut command = containerd.exec(
            "c",
            &format!("e{n}"),
            &[],
            &["sh", "-c", &format!("exit {n}")],
        );
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
    containerd.ctr(&["task", "kill", "--all", "--signal", "SIGKILL", "c"])?;
    containerd.wait_status("c", "STOPPED")?;
    let _ = containerd.command(&["task", "rm", "c"]).output()?;
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}

#[test]
fn runc_shim_checkpoints_a_task_that_goes_on() -> Result<()> {
    let containerd = containerd!();
    if binaries::installed("criu").is_none() {
        containerd.finish()?;
        skip!("criu is not installed")
    }
    containerd.run_detached("c", &["probe", "lines", "0", "10000"])?;
    containerd.wait_status("c", "RUNNING")?;
    let image = format!("{}:checkpoint", containerd.stage.mark);
    containerd.ctr(&["container", "checkpoint", "--task", "c", &image])?;
    ensure!(containerd.ctr(&["image", "list"])?.contains(&image));
    containerd.wait_status("c", "RUNNING")?;
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    containerd.wait_status("c", "STOPPED")?;
    let _ = containerd.command(&["task", "rm", "c"]).output()?;
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}
