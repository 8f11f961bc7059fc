//! Debian's podman with `--runtime coracle`, with and without root.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::stage::{Stage, failure, success};
use coracle_integration::{binaries, need_root, skip, terminal, wait_for};
use serde_json::Value;

/// No user of the machine has it; its files are the test's own copies.
const USER: u32 = 61_234;
const NONE: Option<&str> = None;

struct Podman {
    stage: Stage,
    image: String,
    runtime: PathBuf,
    home: PathBuf,
    user: Option<u32>,
}

impl Podman {
    /// None when podman or what it stands on is not installed.
    fn start(user: Option<u32>) -> Result<Option<Self>> {
        if binaries::installed("podman").is_none() || binaries::installed("conmon").is_none() {
            return Ok(None);
        }
        let stage = Stage::set()?;
        let home = stage.dir.join("home");
        std::fs::create_dir_all(home.join("run"))?;
        // No limit above the caller's: this machine may not let it raise one.
        let text = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n\
                    [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n";
        std::fs::write(home.join("containers.conf"), text)?;
        std::fs::write(
            home.join("policy.json"),
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
        )?;
        // Inside a directory that anybody may enter.
        let runtime = stage.dir.join("coracle");
        std::fs::copy(binaries::coracle()?, &runtime)?;
        let podman = Self {
            image: stage.tools(),
            stage,
            runtime,
            home,
            user,
        };
        if let Some(user) = user {
            podman.become_known(user)?;
        }
        let policy = podman.home.join("policy.json").display().to_string();
        let image = podman.image.clone();
        podman.run(&[
            "pull",
            "-q",
            "--tls-verify=false",
            "--signature-policy",
            &policy,
            &image,
        ])?;
        Ok(Some(podman))
    }

    /// The user and its subordinate ids, in copies of the files that this mount namespace sees.
    fn become_known(&self, user: u32) -> Result<()> {
        let dir = self.stage.dir.join("etc");
        std::fs::create_dir_all(&dir)?;
        for (file, line) in [
            (
                "passwd",
                format!(
                    "coracle-test:x:{user}:{user}::{}:/bin/sh\n",
                    self.home.display()
                ),
            ),
            ("group", format!("coracle-test:x:{user}:\n")),
            ("subuid", "coracle-test:700000:65536\n".to_owned()),
            ("subgid", "coracle-test:700000:65536\n".to_owned()),
        ] {
            let (host, own) = (Path::new("/etc").join(file), dir.join(file));
            let old = std::fs::read_to_string(&host).unwrap_or_default();
            std::fs::write(&own, format!("{old}{line}"))?;
            ensure!(host.exists(), "{} is missing", host.display());
            let bind = nix::mount::MsFlags::MS_BIND;
            nix::mount::mount(Some(&own), &host, NONE, bind, NONE)?;
        }
        let (uid, gid) = (Some(user.into()), Some(user.into()));
        for path in [&self.home, &self.home.join("run")] {
            nix::unistd::chown(path, uid, gid)?;
        }
        std::fs::set_permissions(
            self.home.join("run"),
            std::fs::Permissions::from_mode(0o700),
        )?;
        Ok(())
    }

    fn command(&self, args: &[&str]) -> Command {
        let home = |part: &str| self.home.join(part).display().to_string();
        let mut command = Command::new("podman");
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", &self.home)
            .env("TMPDIR", &self.home)
            .env("XDG_RUNTIME_DIR", home("run"))
            .env("CONTAINERS_CONF", home("containers.conf"))
            .args(["--root", &home("root"), "--runroot", &home("run/storage")])
            .args(["--tmpdir", &home("run/tmp"), "--storage-driver", "overlay"])
            .args(["--runtime", &self.runtime.display().to_string()])
            .args(args)
            .current_dir(&self.home)
            .stdin(Stdio::null());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        success(self.command(args))
    }

    fn fails(&self, code: i32, args: &[&str]) -> Result<String> {
        failure(self.command(args), code)
    }

    /// `run` without a network, in a cgroup of this test.
    fn container<'a>(&'a self, flags: &[&'a str], words: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run", "--cgroup-parent", &self.stage.mark];
        // Without root there is no cgroup to be had from a v1 hierarchy.
        if self.user.is_some() {
            args = vec!["run"];
        }
        if !flags
            .iter()
            .any(|f| f.starts_with("--net") || f.starts_with("--pod"))
        {
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

    /// What the probe sees in a container of these flags.
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

    fn finish(self) -> Result<()> {
        let left = self.run(&["ps", "-aq"])?;
        ensure!(left.is_empty(), "containers are left: {left}");
        if self.user.is_some() {
            // Ends the process that holds the user namespace.
            self.run(&["system", "migrate"])?;
        }
        // conmon and podman's cleanup end a moment after the container.
        wait_for(
            "the end of podman's helpers",
            Duration::from_secs(10),
            || {
                let left = coracle_integration::leak::processes(&self.stage.mark);
                let registry = format!("{} ", self.stage.registry.pid());
                Ok((!left.iter().any(|p| !p.starts_with(&registry))).then_some(()))
            },
        )?;
        if self.user.is_none() {
            // The storage keeps itself mounted.
            let _ = nix::mount::umount(&self.home.join("root/overlay"));
        }
        for file in ["passwd", "group", "subuid", "subgid"] {
            if self.user.is_some() {
                nix::mount::umount(&Path::new("/etc").join(file))?;
            }
        }
        self.stage.strike()
    }
}

macro_rules! podman {
    ($user:expr) => {{
        need_root!();
        match Podman::start($user)? {
            Some(podman) => podman,
            None => skip!("podman and conmon are not installed"),
        }
    }};
}

#[test]
fn podman_run_passes_output_and_exit_codes_on() -> Result<()> {
    let podman = podman!(None);
    let output =
        podman.try_container(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 3"])?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(
        output.stdout == b"out\n" && output.stderr == b"err\n",
        "{output:?}"
    );
    let output = podman.try_container(&["--rm"], &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?;
    ensure!(output.status.code() == Some(137), "{output:?}");
    // The codes that podman gives to what it reads in the runtime's message.
    let error = podman.fails(127, &podman.container(&["--rm"], &["nosuch"]))?;
    ensure!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    podman.fails(126, &podman.container(&["--rm"], &["/etc"]))?;
    podman.fails(126, &podman.container(&["--rm"], &["/etc/passwd"]))?;
    let error = podman.fails(
        126,
        &podman.container(&["--rm", "-v", "/etc:/etc/from-image"], &["true"]),
    )?;
    ensure!(error.contains("/etc/from-image"), "{error}");
    let mut command = podman.command(&podman.container(&["--rm", "-i"], &["probe", "sink"]));
    let file = podman.stage.dir.join("input");
    std::fs::write(&file, vec![b'x'; 1 << 20])?;
    command.stdin(std::fs::File::open(&file)?);
    ensure!(success(command)?.starts_with("1048576 "));
    podman.finish()
}

#[test]
fn podman_container_goes_through_its_life() -> Result<()> {
    let podman = podman!(None);
    let script = "trap 'echo term; exit 5' TERM; echo started; while :; do sleep 0.05; done";
    let flags = [
        "-d",
        "--name=c",
        "--memory=64m",
        "--cpus=0.5",
        "--pids-limit=50",
    ];
    podman.run(&podman.container(&flags, &["sh", "-c", script]))?;
    wait_for("output", Duration::from_secs(5), || {
        Ok((podman.run(&["logs", "c"])? == "started\n").then_some(()))
    })?;
    ensure!(podman.run(&["exec", "c", "cat", "/etc/from-image"])? == "image\n");
    podman.fails(7, &["exec", "c", "sh", "-c", "exit 7"])?;
    podman.fails(127, &["exec", "c", "nosuch"])?;
    let seen = podman.run(&[
        "exec",
        "-u",
        "1000:1001",
        "-w",
        "/tmp",
        "-e",
        "A=b",
        "c",
        "probe",
        "show",
    ])?;
    let seen: Value = serde_json::from_str(&seen)?;
    ensure!(seen["uids"][0] == 1000 && seen["gids"][0] == 1001, "{seen}");
    ensure!(seen["cwd"] == "/tmp" && seen["env"]["A"] == "b", "{seen}");
    let output = terminal::run(podman.command(&["exec", "-it", "c", "tty"]), 30, 90)?;
    ensure!(output.stdout.starts_with(b"/dev/pts/"), "{output:?}");
    ensure!(podman.run(&["top", "c"])?.contains("trap"));
    let stats = podman.run(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.MemUsage}} {{.PIDS}}",
        "c",
    ])?;
    ensure!(stats.contains("67.11MB"), "{stats}");
    podman.run(&["update", "--memory=128m", "c"])?;
    let limit = podman.run(&[
        "exec",
        "c",
        "cat",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/pids/pids.max",
    ])?;
    ensure!(limit == "134217728\n50\n", "{limit}");
    podman.run(&["pause", "c"])?;
    ensure!(podman.inspect("c", "{{.State.Status}}")? == "paused");
    podman.fails(255, &["exec", "c", "true"])?;
    podman.run(&["unpause", "c"])?;
    podman.run(&["stop", "-t", "10", "c"])?;
    ensure!(podman.inspect("c", "{{.State.Status}} {{.State.ExitCode}}")? == "exited 5");
    ensure!(podman.run(&["logs", "c"])? == "started\nterm\n");
    podman.run(&["start", "c"])?;
    podman.run(&["restart", "-t", "10", "c"])?;
    podman.run(&["kill", "-s", "KILL", "c"])?;
    ensure!(podman.run(&["wait", "c"])?.trim() == "137");
    podman.run(&["start", "c"])?;
    podman.run(&["rm", "-f", "-t", "0", "c"])?;
    podman.finish()
}

#[test]
fn podman_flags_reach_the_container() -> Result<()> {
    let podman = podman!(None);
    std::fs::write(podman.stage.dir.join("file"), "on the host\n")?;
    let dir = podman.stage.dir.display().to_string();
    let volume = format!("{dir}:/mnt:ro,nosuid,noexec,rslave");
    let seen = podman.see(&[
        "--user=1000:1001",
        "--cap-drop=all",
        "--cap-add=NET_RAW",
        "--security-opt=no-new-privileges",
        "--read-only",
        "--tmpfs=/data:size=1m,mode=700",
        "-v",
        &volume,
        "--hostname=another",
        "--init",
        "--ulimit=nofile=100:200",
        "--ulimit=nproc=4096:4096",
        "--oom-score-adj=500",
        "--umask=0027",
        "-w",
        "/mnt",
        "-e",
        "A=b",
        "--sysctl=kernel.msgmax=4096",
        "--device=/dev/fuse:/dev/mine:r",
        "--shm-size=128k",
    ])?;
    ensure!(
        seen["uids"][0] == 1000 && seen["gids"][0] == 1001,
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
        seen["hostname"] == "another" && seen["pid"] == 2,
        "{seen:#}"
    );
    ensure!(
        seen["umask"] == "0027" && seen["oomScoreAdj"] == "500",
        "{seen:#}"
    );
    ensure!(
        seen["rlimits"]["Max open files"] == serde_json::json!(["100", "200"]),
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
    let mount = |target: &str| -> String {
        let all = seen["mounts"].as_array().into_iter().flatten();
        let of = all.filter(|m| m["target"] == target);
        of.map(|m| format!("{} {}", m["flags"], m["options"]))
            .collect()
    };
    for (target, words) in [
        ("/mnt", &["ro", "nosuid", "noexec"] as &[&str]),
        ("/data", &["size=1024k", "mode=700"]),
        ("/dev/shm", &["size=128k"]),
    ] {
        ensure!(
            words.iter().all(|w| mount(target).contains(w)),
            "{target}: {}",
            mount(target)
        );
    }
    let seen = podman.see(&[
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
    ensure!(seen["seccomp"] == "0", "{seen:#}");
    let profile = podman.stage.dir.join("seccomp.json");
    std::fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#,
    )?;
    let seccomp = format!("--security-opt=seccomp={}", profile.display());
    let seen = podman
        .see(&[&seccomp, "--cgroupns=private", "--userns=auto:size=5000"])
        .or_else(|_| podman.see(&[&seccomp, "--cgroupns=private"]))?;
    ensure!(seen["attempts"]["mkdir"] == "EOPNOTSUPP", "{seen:#}");
    ensure!(
        seen["cgroup"]
            .as_array()
            .into_iter()
            .flatten()
            .all(|c| c.as_str().is_some_and(|c| c.ends_with(":/"))),
        "{}",
        seen["cgroup"]
    );
    let seen = podman.see(&["--uidmap=0:100000:5000", "--gidmap=0:100000:5000"])?;
    ensure!(
        seen["uidMap"] == serde_json::json!(["0 100000 5000"]),
        "{seen:#}"
    );
    podman.finish()
}

#[test]
fn podman_pod_shares_its_namespaces() -> Result<()> {
    let podman = podman!(None);
    let image = podman.image.clone();
    podman.run(&[
        "pod",
        "create",
        "--cgroup-parent",
        &podman.stage.mark,
        "--name=p",
        "--net=none",
        "--share=net,ipc,uts,pid",
        "--infra-image",
        &image,
        "--infra-command=sleep 1000",
    ])?;
    podman.run(&[
        "run", "-d", "--pod=p", "--name=a", &image, "probe", "sleep", "1000",
    ])?;
    podman.run(&[
        "run", "-d", "--pod=p", "--name=b", &image, "probe", "sleep", "1000",
    ])?;
    let see = |name: &str| -> Result<Value> {
        Ok(serde_json::from_str(
            &podman.run(&["exec", name, "probe", "show"])?,
        )?)
    };
    let (a, b) = (see("a")?, see("b")?);
    for kind in ["net", "ipc", "uts", "pid"] {
        ensure!(
            a["namespaces"][kind] == b["namespaces"][kind],
            "{kind} is not shared"
        );
    }
    ensure!(a["namespaces"]["mnt"] != b["namespaces"]["mnt"]);
    ensure!(
        podman
            .run(&["exec", "a", "ps"])?
            .matches("sleep 1000")
            .count()
            == 3
    );
    podman.run(&["pod", "stop", "-t", "0", "p"])?;
    podman.run(&["pod", "rm", "p"])?;
    podman.finish()
}

#[test]
fn podman_terminal_restart_policy_and_health_check_work() -> Result<()> {
    let podman = podman!(None);
    let args = podman.container(
        &["--rm", "-it"],
        &["sh", "-c", "tty; read line; echo got $line"],
    );
    let output = terminal::talk(podman.command(&args), 33, 77, "hello\n")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        text.contains("/dev/pts/0") && text.contains("got hello"),
        "{text}"
    );
    let flags = ["--name=r", "--restart=on-failure:2"];
    podman.fails(
        1,
        &podman.container(&flags, &["sh", "-c", "echo again; exit 1"]),
    )?;
    wait_for("two restarts", Duration::from_secs(10), || {
        Ok((podman.run(&["logs", "r"])?.matches("again").count() == 3).then_some(()))
    })?;
    podman.run(&["rm", "-f", "r"])?;
    let flags = [
        "-d",
        "--name=h",
        "--health-cmd=test -e /tmp/well",
        "--health-interval=disable",
    ];
    podman.run(&podman.container(&flags, &["sleep", "1000"]))?;
    podman.fails(1, &["healthcheck", "run", "h"])?;
    podman.run(&["exec", "h", "touch", "/tmp/well"])?;
    podman.run(&["healthcheck", "run", "h"])?;
    podman.run(&["rm", "-f", "-t", "0", "h"])?;
    podman.finish()
}

#[test]
fn podman_without_root_runs_stops_and_removes() -> Result<()> {
    need_root!();
    if binaries::installed("newuidmap").is_none() {
        skip!("newuidmap is not installed")
    }
    let podman = podman!(Some(USER));
    let output = podman.try_container(&["--rm"], &["sh", "-c", "id -u; exit 3"])?;
    ensure!(
        output.status.code() == Some(3) && output.stdout == b"0\n",
        "{output:?}"
    );
    let seen = podman.see(&[
        "--user=1000",
        "--cap-drop=all",
        "--tmpfs=/data",
        "--read-only",
        "--init",
    ])?;
    ensure!(seen["uidMap"][0] == format!("0 {USER} 1"), "{seen:#}");
    ensure!(seen["uids"][0] == 1000, "{seen:#}");
    podman.run(&podman.container(
        &["-d", "--name=c", "-v", "/etc/hostname:/the/name:ro"],
        &["probe", "trap", "6"],
    ))?;
    podman.fails(7, &["exec", "c", "sh", "-c", "exit 7"])?;
    ensure!(podman.run(&["exec", "c", "cat", "/etc/from-image"])? == "image\n");
    let output = terminal::run(podman.command(&["exec", "-it", "c", "tty"]), 30, 90)?;
    ensure!(output.stdout.starts_with(b"/dev/pts/"), "{output:?}");
    ensure!(podman.run(&["top", "c"])?.contains("probe"));
    podman.run(&["stop", "-t", "10", "c"])?;
    ensure!(podman.inspect("c", "{{.State.ExitCode}}")? == "6");
    ensure!(podman.run(&["logs", "c"])? == "ready\ngot SIGTERM\n");
    podman.run(&["start", "c"])?;
    podman.run(&["rm", "-f", "-t", "0", "c"])?;
    // A pod's pids are joined from inside the user namespace.
    let image = podman.image.clone();
    podman.run(&[
        "pod",
        "create",
        "--name=p",
        "--net=none",
        "--share=ipc,uts,pid",
        "--infra-image",
        &image,
        "--infra-command=sleep 1000",
    ])?;
    podman.run(&[
        "run",
        "-d",
        "--pod=p",
        "--net=none",
        "--name=a",
        &image,
        "probe",
        "sleep",
        "1000",
    ])?;
    ensure!(
        podman
            .run(&["exec", "a", "ps"])?
            .matches("sleep 1000")
            .count()
            == 2
    );
    podman.run(&["pod", "rm", "-f", "-t", "0", "p"])?;
    podman.finish()
}
