//! Debian's Docker Engine with coracle as its runtime, in a daemon of the test's own.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::process::Process;
use coracle_integration::stage::{Stage, failure, success};
use coracle_integration::{binaries, leak, need_root, skip, terminal, wait_for};
use serde_json::{Value, json};

struct Docker {
    stage: Stage,
    image: String,
    client: PathBuf,
    daemon: Option<Process>,
}

enum Start {
    Running(Box<Docker>),
    Cannot(String),
}

impl Docker {
    fn start() -> Result<Start> {
        let (Some(dockerd), Some(client)) = (
            binaries::installed("dockerd"),
            binaries::installed("docker"),
        ) else {
            return Ok(Start::Cannot("docker.io is not installed".to_owned()));
        };
        let stage = Stage::set()?;
        let path = |part: &str| stage.dir.join(part).display().to_string();
        let config = json!({
            "data-root": path("data"), "exec-root": path("exec"), "pidfile": path("docker.pid"),
            "hosts": [format!("unix://{}", path("docker.sock"))],
            // No network of its own, and nobody else's containerd.
            "bridge": "none", "iptables": false, "ip6tables": false, "ip-forward": false,
            "ip-masq": false, "userland-proxy": false,
            "runtimes": {"coracle": {"path": binaries::coracle()?}},
            "default-runtime": "coracle",
            "cgroup-parent": format!("/{}", stage.mark),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
        });
        std::fs::write(path("daemon.json"), config.to_string())?;
        std::fs::create_dir(path("client"))?;
        let mut command = Command::new(dockerd);
        command
            .arg("--config-file")
            .arg(path("daemon.json"))
            .env("TMPDIR", &stage.dir);
        let mut daemon = Process::start(&mut command, &stage.dir.join("dockerd.log"))?;
        let mut docker = Self {
            image: stage.tools(),
            stage,
            client,
            daemon: None,
        };
        let up = wait_for("dockerd", Duration::from_secs(30), || {
            if let Some(status) = daemon.ended()? {
                bail!("dockerd: {status}");
            }
            Ok(docker
                .command(&["version"])
                .output()?
                .status
                .success()
                .then_some(()))
        });
        if let Err(error) = up {
            // What this machine lacks is no fault of the runtime.
            return Ok(Start::Cannot(format!(
                "dockerd does not start here: {error}: {}",
                daemon.log_tail()
            )));
        }
        docker.daemon = Some(daemon);
        docker.run(&["pull", "-q", &docker.image])?;
        Ok(Start::Running(Box::new(docker)))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.client);
        let socket = self.stage.dir.join("docker.sock");
        command
            .args(["--host", &format!("unix://{}", socket.display())])
            .arg("--config")
            .arg(self.stage.dir.join("client"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        success(self.command(args))
    }

    fn fails(&self, code: i32, args: &[&str]) -> Result<String> {
        failure(self.command(args), code)
    }

    fn container<'a>(&'a self, flags: &[&'a str], words: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run"];
        if !flags.iter().any(|f| f.starts_with("--net")) {
            args.push("--net=none");
        }
        args.extend(flags);
        args.push(&self.image);
        args.extend(words);
        args
    }

    fn try_container(&self, flags: &[&str], words: &[&str]) -> Result<Output> {
        Ok(self.command(&self.container(flags, words)).output()?)
    }

    fn see(&self, flags: &[&str]) -> Result<Value> {
        let flags = [&["--rm"], flags].concat();
        let text = self.run(&self.container(&flags, &["probe", "show", "/mnt", "/data", "/"]))?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    fn inspect(&self, name: &str, format: &str) -> Result<String> {
        Ok(self
            .run(&["inspect", "--format", format, name])?
            .trim()
            .to_owned())
    }

    fn finish(mut self) -> Result<()> {
        let left = self.run(&["ps", "-aq"])?;
        ensure!(left.is_empty(), "containers are left: {left}");
        if let Some(daemon) = self.daemon.take() {
            let ended = daemon.stop(Duration::from_secs(15))?;
            ensure!(ended.is_some(), "dockerd had to be killed");
        }
        wait_for(
            "the end of docker's helpers",
            Duration::from_secs(10),
            || {
                let registry = format!("{} ", self.stage.registry.pid());
                let left = leak::processes(&self.stage.mark);
                Ok((!left.iter().any(|p| !p.starts_with(&registry))).then_some(()))
            },
        )?;
        // The daemon keeps its network namespaces' directory mounted.
        for part in ["exec/netns/default", "exec", "data"] {
            let path = self.stage.dir.join(part);
            while nix::mount::umount(&path).is_ok() {}
        }
        self.stage.strike()
    }
}

macro_rules! docker {
    () => {{
        need_root!();
        match Docker::start()? {
            Start::Running(docker) => *docker,
            Start::Cannot(why) => skip!("{why}"),
        }
    }};
}

#[test]
fn docker_run_passes_output_and_exit_codes_on() -> Result<()> {
    let docker = docker!();
    let output =
        docker.try_container(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 3"])?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        output.stdout == b"out\n" && output.stderr == b"err\n",
        "{output:?}"
    );
    // The codes that the daemon gives to what it reads in the runtime's message.
    let error = docker.fails(127, &docker.container(&["--rm"], &["nosuch"]))?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    let error = docker.fails(126, &docker.container(&["--rm"], &["/etc/passwd"]))?;
    ensure!(error.contains("permission denied"), "{error}");
    let mut command = docker.command(&docker.container(&["--rm", "-i"], &["probe", "sink"]));
    let file = docker.stage.dir.join("input");
    std::fs::write(&file, vec![b'x'; 1 << 20])?;
    command.stdin(std::fs::File::open(&file)?);
    ensure!(success(command)?.starts_with("1048576 "));
    let args = docker.container(
        &["--rm", "-it"],
        &["sh", "-c", "tty; read line; echo got $line"],
    );
    let output = terminal::talk(docker.command(&args), 33, 77, "hello\n")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        text.contains("/dev/pts/0") && text.contains("got hello"),
        "{text}"
    );
    docker.finish()
}

#[test]
fn docker_container_goes_through_its_life() -> Result<()> {
    let docker = docker!();
    let script = "trap 'echo term; exit 5' TERM; echo started; while :; do sleep 0.05; done";
    let flags = [
        "-d",
        "--name=cc",
        "--memory=64m",
        "--cpus=0.5",
        "--pids-limit=50",
    ];
    docker.run(&docker.container(&flags, &["sh", "-c", script]))?;
    wait_for("output", Duration::from_secs(5), || {
        Ok((docker.run(&["logs", "cc"])? == "started\n").then_some(()))
    })?;
    ensure!(docker.inspect("cc", "{{.HostConfig.Runtime}}")? == "coracle");
    ensure!(docker.run(&["exec", "cc", "cat", "/etc/from-image"])? == "image\n");
    docker.fails(7, &["exec", "cc", "sh", "-c", "exit 7"])?;
    let output = docker.command(&["exec", "cc", "nosuch"]).output()?;
    let error = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(matches!(output.status.code(), Some(126 | 127)), "{error}");
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    let seen = docker.run(&[
        "exec",
        "-u",
        "1000:1001",
        "-w",
        "/tmp",
        "-e",
        "A=b",
        "cc",
        "probe",
        "show",
    ])?;
    let seen: Value = serde_json::from_str(&seen)?;
    ensure!(seen["uids"][0] == 1000 && seen["gids"][0] == 1001, "{seen}");
    ensure!(seen["cwd"] == "/tmp" && seen["env"]["A"] == "b", "{seen}");
    let output = terminal::run(docker.command(&["exec", "-it", "cc", "tty"]), 30, 90)?;
    ensure!(output.stdout.starts_with(b"/dev/pts/"), "{output:?}");
    ensure!(docker.run(&["top", "cc"])?.contains("trap"));
    let stats = docker.run(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.MemUsage}} {{.PIDs}}",
        "cc",
    ])?;
    ensure!(stats.contains("64MiB"), "{stats}");
    docker.run(&[
        "update",
        "--memory=128m",
        "--memory-swap=256m",
        "--pids-limit=60",
        "--cpus=1",
        "cc",
    ])?;
    let limit = docker.run(&[
        "exec",
        "cc",
        "cat",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/pids/pids.max",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    ])?;
    ensure!(limit == "134217728\n60\n100000\n", "{limit}");
    docker.run(&["pause", "cc"])?;
    ensure!(docker.inspect("cc", "{{.State.Status}}")? == "paused");
    docker.fails(1, &["exec", "cc", "true"])?;
    docker.run(&["unpause", "cc"])?;
    docker.run(&["stop", "-t", "10", "cc"])?;
    ensure!(docker.inspect("cc", "{{.State.Status}} {{.State.ExitCode}}")? == "exited 5");
    ensure!(docker.run(&["logs", "cc"])? == "started\nterm\n");
    docker.run(&["start", "cc"])?;
    docker.run(&["restart", "-t", "10", "cc"])?;
    docker.run(&["kill", "-s", "KILL", "cc"])?;
    ensure!(docker.run(&["wait", "cc"])?.trim() == "137");
    docker.run(&["start", "cc"])?;
    docker.run(&["rm", "-f", "cc"])?;
    docker.finish()
}

#[test]
fn docker_flags_reach_the_container() -> Result<()> {
    let docker = docker!();
    let dir = docker.stage.dir.display().to_string();
    let volume = format!("{dir}:/mnt:ro");
    let seen = docker.see(&[
        "--user=1000:1001",
        "--cap-drop=all",
        "--cap-add=NET_RAW",
        "--security-opt=no-new-privileges",
        "--read-only",
        "--tmpfs=/data:size=1m,mode=700",
        "-v",
        &volume,
        "--hostname=another",
        "--domainname=example.org",
        "--init",
        "--ulimit=nofile=100:200",
        "--oom-score-adj=500",
        "-w",
        "/mnt",
        "-e",
        "A=b",
        "--sysctl=kernel.msgmax=4096",
        "--device=/dev/fuse:/dev/mine:r",
        "--shm-size=128k",
        "--group-add=7",
    ])?;
    ensure!(
        seen["uids"][0] == 1000 && seen["gids"][0] == 1001,
        "{seen:#}"
    );
    ensure!(
        seen["groups"] == json!([7, 1001]) || seen["groups"] == json!([7]),
        "{seen:#}"
    );
    ensure!(
        seen["capabilities"]["bounding"] == "0000000000002000",
        "{seen:#}"
    );
    ensure!(
        seen["noNewPrivs"] == "1" && seen["seccomp"] == "2",
        "{seen:#}"
    );
    ensure!(
        seen["hostname"] == "another" && seen["pid"] != 1,
        "{seen:#}"
    );
    ensure!(seen["domainname"] == "example.org", "{seen:#}");
    ensure!(seen["oomScoreAdj"] == "500", "{seen:#}");
    ensure!(
        seen["rlimits"]["Max open files"] == json!(["100", "200"]),
        "{seen:#}"
    );
    ensure!(seen["cwd"] == "/mnt" && seen["env"]["A"] == "b", "{seen:#}");
    ensure!(seen["sysctls"]["kernel/msgmax"] == "4096", "{seen:#}");
    ensure!(
        seen["nodes"]["mine"]
            .as_str()
            .is_some_and(|n| n.contains("10:229")),
        "{seen:#}"
    );
    ensure!(seen["paths"]["/"]["write"] != "ok", "{seen:#}");
    let seen = docker.see(&[
        "--pid=host",
        "--net=host",
        "--uts=host",
        "--ipc=host",
        "--privileged",
    ])?;
    for kind in ["pid", "net", "uts", "ipc"] {
        let host = std::fs::read_link(format!("/proc/thread-self/ns/{kind}"))?;
        ensure!(
            seen["namespaces"][kind].as_str() == host.to_str(),
            "{kind}: {seen:#}"
        );
    }
    let profile = docker.stage.dir.join("seccomp.json");
    std::fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#,
    )?;
    let seccomp = format!("--security-opt=seccomp={}", profile.display());
    let seen = docker.see(&[&seccomp, "--cpuset-cpus=0", "--cpu-shares=512"])?;
    ensure!(
        seen["attempts"]["mkdir"] == "EOPNOTSUPP" && seen["cpusAllowed"] == "0",
        "{seen:#}"
    );
    // A device node of the image's, with another in its place.
    let seen = docker.see(&["-v", "/dev/urandom:/dev/random"])?;
    ensure!(
        seen["nodes"]["random"]
            .as_str()
            .is_some_and(|n| n.contains("1:9")),
        "{seen:#}"
    );
    docker.finish()
}

#[test]
fn docker_restarts_and_sees_an_oom_kill() -> Result<()> {
    let docker = docker!();
    let flags = ["-d", "--name=rr", "--restart=on-failure:2"];
    docker.run(&docker.container(&flags, &["sh", "-c", "echo again; exit 1"]))?;
    wait_for("two restarts", Duration::from_secs(15), || {
        Ok((docker.run(&["logs", "rr"])?.matches("again").count() == 3).then_some(()))
    })?;
    docker.run(&["rm", "-f", "rr"])?;
    let output = docker.try_container(&["--name=oo", "--memory=32m"], &["probe", "eat", "100"])?;
    ensure!(output.status.code() == Some(137), "{output:?}");
    wait_for("the OOM kill to be noted", Duration::from_secs(5), || {
        Ok((docker.inspect("oo", "{{.State.OOMKilled}}")? == "true").then_some(()))
    })?;
    // Without those of the second that has not ended yet.
    wait_for("the event", Duration::from_secs(5), || {
        let events = docker.run(&["events", "--since", "10m", "--until", "0s"])?;
        Ok(events.contains("container oom ").then_some(()))
    })?;
    docker.run(&["rm", "oo"])?;
    docker.finish()
}
