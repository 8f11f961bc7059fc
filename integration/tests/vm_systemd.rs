//! The systemd cgroup driver, on a machine with systemd and cgroup v2.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{need_guest, wait_for};
use serde_json::{Value, json};

/// What systemd says of its units.
#[derive(Clone, Copy)]
struct Systemctl;

impl Systemctl {
    fn run(self, args: &[&str]) -> Result<String> {
        let output = Command::new("systemctl").args(args).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn property(self, unit: &str, name: &str) -> Result<String> {
        self.run(&["show", "--value", "-p", name, unit])
    }

    /// Neither running, nor failed, nor remembered.
    fn is_gone(self, unit: &str) -> Result<bool> {
        let listed = self.run(&["list-units", "--all", "--no-legend", "--plain", unit])?;
        Ok(listed.is_empty())
    }
}

/// A test's container in a scope of its own.
struct Scope {
    bench: Bench,
    runtime: Runtime,
    id: String,
}

impl Scope {
    fn new(id: &str) -> Result<Scope> {
        let bench = Bench::new()?;
        let runtime = bench.coracle()?;
        Ok(Scope {
            bench,
            runtime,
            id: id.to_owned(),
        })
    }

    /// The mark is part of the unit's name, and of its cgroup, which the leak check looks for.
    fn unit(&self) -> String {
        format!("{}-{}.scope", self.bench.mark, self.id)
    }

    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/system.slice").join(self.unit())
    }

    fn file(&self, name: &str) -> Result<String> {
        let path = self.cgroup().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    fn config(&self, args: &[&str]) -> Config {
        let path = format!(":{}:{}", self.bench.mark, self.id);
        self.bench
            .config(&self.id, args)
            .set("/linux/cgroupsPath", path)
    }

    fn bundle(&self, config: &Config) -> Result<String> {
        let bundle = self.bench.bundle(&self.id, config)?;
        Ok(bundle.display().to_string())
    }

    fn start(&self, config: &Config) -> Result<()> {
        let bundle = self.bundle(config)?;
        self.runtime.detached(
            &["--systemd-cgroup", "run", "-d", "-b", &bundle, &self.id],
            &self.bench.dir.join("log"),
        )
    }

    fn run(&self, command: &str, args: &[&str]) -> Result<String> {
        let all = [&["--systemd-cgroup", command], args].concat();
        self.runtime.run(&all)
    }

    fn delete(self) -> Result<()> {
        self.run("delete", &["-f", &self.id])?;
        ensure!(!self.cgroup().exists(), "the cgroup is left");
        ensure!(Systemctl.is_gone(&self.unit())?, "the unit is left");
        self.bench.finish()
    }
}

#[test]
fn life_of_a_container_in_a_scope() -> Result<()> {
    need_guest!();
    let scope = Scope::new("life")?;
    let (id, unit) = (scope.id.clone(), scope.unit());
    scope.start(&scope.config(&["sleep", "600"]))?;
    let pid = scope.runtime.state(&id)?["pid"].to_string();
    ensure!(scope.file("cgroup.procs")? == pid);
    for (property, want) in [
        ("ActiveState", "active"),
        ("SubState", "running"),
        ("Slice", "system.slice"),
        ("Delegate", "yes"),
        ("DefaultDependencies", "no"),
        ("MemoryAccounting", "yes"),
        ("CPUAccounting", "yes"),
        ("IOAccounting", "yes"),
        ("TasksAccounting", "yes"),
        ("DevicePolicy", "strict"),
    ] {
        let found = Systemctl.property(&unit, property)?;
        ensure!(found == want, "{property}={found}, not {want}");
    }
    let allowed = Systemctl.property(&unit, "DeviceAllow")?;
    ensure!(allowed.contains("char-136 rwm"), "{allowed}");

    let seen: Value = serde_json::from_str(&scope.run("exec", &[&id, "/bin/probe", "show"])?)?;
    ensure!(seen.is_object());
    scope.run("pause", &[&id])?;
    ensure!(scope.file("cgroup.freeze")? == "1");
    scope.runtime.wait_status(&id, "paused")?;
    scope.run("resume", &[&id])?;
    ensure!(scope.file("cgroup.freeze")? == "0");
    let event: Value = serde_json::from_str(&scope.run("events", &["--stats", &id])?)?;
    ensure!(event["data"]["pids"]["current"] == 1, "{event}");
    ensure!(
        event["data"]["memory"]["usage"]["usage"].as_u64() > Some(0),
        "{event}"
    );
    let listed = scope.run("ps", &["-f", "json", &id])?;
    ensure!(listed.trim() == format!("[{pid}]"), "{listed}");

    scope.run("kill", &[&id, "KILL"])?;
    scope.runtime.wait_status(&id, "stopped")?;
    scope.run("delete", &[&id])?;
    ensure!(Systemctl.is_gone(&unit)?, "the unit is left");
    ensure!(!scope.cgroup().exists());
    scope.bench.finish()
}

#[test]
fn limits_are_properties_and_files() -> Result<()> {
    need_guest!();
    let scope = Scope::new("limits")?;
    let unit = scope.unit();
    let config = scope
        .config(&["sleep", "600"])
        .set(
            "/linux/resources/memory",
            json!({"limit": 67_108_864, "swap": 100_663_296, "reservation": 33_554_432}),
        )
        .set(
            "/linux/resources/cpu",
            json!({"shares": 512, "quota": 3333, "period": 10_000, "cpus": "0", "mems": "0"}),
        )
        .set("/linux/resources/pids", json!({"limit": 42}))
        .set(
            "/linux/resources/unified",
            json!({"memory.high": "60000000", "memory.oom.group": "1"}),
        )
        .set(
            "/annotations",
            json!({
                "org.systemd.property.TimeoutStopSec": "uint64 7",
                "org.systemd.property.CollectMode": "'inactive-or-failed'",
                "org.systemd.property.Documentation": "['man:coracle(8)']",
            }),
        );
    scope.start(&config)?;
    let properties = |table: &[(&str, &str)]| -> Result<()> {
        for (property, want) in table {
            let found = Systemctl.property(&unit, property)?;
            ensure!(found == *want, "{property}={found}, not {want}");
        }
        Ok(())
    };
    let files = |table: &[(&str, &str)]| -> Result<()> {
        for (file, want) in table {
            let found = scope.file(file)?;
            ensure!(found == *want, "{file}: {found}, not {want}");
        }
        Ok(())
    };
    properties(&[
        ("MemoryMax", "67108864"),
        ("MemoryLow", "33554432"),
        ("MemorySwapMax", "33554432"),
        ("MemoryHigh", "60000000"),
        ("CPUWeight", "59"),
        ("CPUQuotaPerSecUSec", "340ms"),
        ("CPUQuotaPeriodUSec", "10ms"),
        ("TasksMax", "42"),
        ("AllowedCPUs", "0"),
        ("AllowedMemoryNodes", "0"),
        ("OOMPolicy", "kill"),
        ("TimeoutStopUSec", "7s"),
        ("CollectMode", "inactive-or-failed"),
        ("Documentation", "\"man:coracle(8)\""),
    ])?;
    let old = [
        ("memory.max", "67108864"),
        ("memory.low", "33554432"),
        ("memory.swap.max", "33554432"),
        ("memory.oom.group", "1"),
        ("cpu.weight", "59"),
        ("cpu.max", "3400 10000"),
        ("pids.max", "42"),
        ("cpuset.cpus", "0"),
    ];
    files(&old)?;
    // A reload applies what systemd knows: it must know the same.
    Systemctl.run(&["daemon-reload"])?;
    files(&old)?;

    scope.run(
        "update",
        &[
            "--memory",
            "128M",
            "--memory-swap",
            "128M",
            "--pids-limit",
            "7",
            "--cpu-share",
            "1024",
            &scope.id,
        ],
    )?;
    let new = [
        ("memory.max", "134217728"),
        ("memory.swap.max", "0"),
        ("pids.max", "7"),
        ("cpu.weight", "100"),
        ("cpu.max", "3400 10000"),
    ];
    files(&new)?;
    let new_properties = [
        ("MemoryMax", "134217728"),
        ("MemorySwapMax", "0"),
        ("TasksMax", "7"),
        ("CPUWeight", "100"),
    ];
    properties(&new_properties)?;
    Systemctl.run(&["daemon-reload"])?;
    files(&new)?;

    // A later limit that the kernel refuses takes back those before it, systemd's too.
    let refused = scope.runtime.refused(&[
        "--systemd-cgroup",
        "update",
        "--memory",
        "256M",
        "--memory-swap",
        "256M",
        "--pids-limit",
        "9",
        "--cpuset-mems",
        "63",
        &scope.id,
    ])?;
    ensure!(refused.contains("cpuset.mems"), "{refused}");
    files(&new)?;
    properties(&new_properties)?;

    let idle = ["--cpu-idle", "1", &scope.id];
    scope.run("update", &idle)?;
    files(&[("cpu.idle", "1")])?;
    properties(&[("CPUWeight", "idle")])?;
    let document = scope.bench.dir.join("r.json");
    std::fs::write(
        &document,
        json!({"cpu": {"idle": 0, "shares": 2048}, "unified": {"memory.high": "max"}}).to_string(),
    )?;
    scope.run(
        "update",
        &["-r", &document.display().to_string(), &scope.id],
    )?;
    files(&[
        ("cpu.idle", "0"),
        ("cpu.weight", "174"),
        ("memory.high", "max"),
    ])?;
    properties(&[("CPUWeight", "174"), ("MemoryHigh", "infinity")])?;
    scope.delete()
}

/// systemd makes a unit idle by its weight, so there is none beside it: the update says so and
/// takes effect, instead of failing at a weight that the idle cgroup refuses.
#[test]
fn idle_and_a_weight_in_one_update() -> Result<()> {
    need_guest!();
    let scope = Scope::new("idle")?;
    scope.start(&scope.config(&["sleep", "600"]))?;
    let update = |document: Value| -> Result<()> {
        let path = scope.bench.dir.join("r.json").display().to_string();
        std::fs::write(&path, document.to_string())?;
        scope.run("update", &["-r", &path, &scope.id]).map(drop)
    };
    let idle = |want: &str| -> Result<()> {
        let found = scope.file("cpu.idle")?;
        ensure!(found == want, "cpu.idle: {found}, not {want}");
        Ok(())
    };
    for (both, weight) in [
        (
            json!({"cpu": {"idle": 1, "shares": 200}}),
            json!({"cpu": {"shares": 200}}),
        ),
        (
            json!({"unified": {"cpu.idle": "1", "cpu.weight": "8"}}),
            json!({"unified": {"cpu.weight": "8"}}),
        ),
    ] {
        update(both)?;
        idle("1")?;
        update(weight)?;
        idle("0")?;
    }
    scope.delete()
}

/// As Go's decoder, and so runc, reads them.
#[test]
fn members_in_capitals_are_limits_too() -> Result<()> {
    need_guest!();
    let scope = Scope::new("capitals")?;
    let config = scope
        .config(&["sleep", "600"])
        .set("/linux/resources/cpu", json!({"shares": 512}))
        .set("/linux/resources/CPU", json!({"Cpus": "0", "Mems": "0"}));
    scope.start(&config)?;
    let cpus = |want: &str| -> Result<()> {
        let property = Systemctl.property(&scope.unit(), "AllowedCPUs")?;
        let file = scope.file("cpuset.cpus")?;
        ensure!(property == want && file == want, "{property}, {file}");
        Ok(())
    };
    cpus("0")?;
    ensure!(scope.file("cpu.weight")? == "59", "the shares");
    let path = scope.bench.dir.join("r.json").display().to_string();
    std::fs::write(&path, json!({"CPU": {"Cpus": "1"}}).to_string())?;
    scope.run("update", &["-r", &path, &scope.id])?;
    cpus("1")?;
    scope.delete()
}

/// systemd applies its own list of devices on a reload: without the terminals in it, no
/// `exec --tty` works from then on. And an update must not lose devices either.
#[test]
fn terminals_and_devices_survive_a_reload() -> Result<()> {
    need_guest!();
    let scope = Scope::new("tty")?;
    let id = scope.id.clone();
    let fuse = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"},
    ]);
    let config = scope
        .config(&["sleep", "600"])
        .set("/linux/resources/devices", fuse)
        .set("/linux/devices", json!([{"path": "/dev/log", "type": "c", "major": 1, "minor": 11}, {"path": "/dev/denied", "type": "c", "major": 1, "minor": 1}]));
    scope.start(&config)?;
    let check = |when: &str| -> Result<()> {
        let tty = scope.run("exec", &["-t", &id, "/bin/probe", "tty"])?;
        ensure!(!tty.contains("not a tty"), "{when}: {tty}");
        scope.run("exec", &[&id, "/bin/probe", "write", "/dev/null", "x"])?;
        scope.run(
            "exec",
            &[&id, "/bin/probe", "write", "/dev/log", "coracle's test"],
        )?;
        let denied =
            scope
                .runtime
                .refused(&["exec", &id, "/bin/probe", "write", "/dev/denied", "x"])?;
        ensure!(denied.contains("not permitted"), "{when}: {denied}");
        Ok(())
    };
    check("at first")?;
    Systemctl.run(&["daemon-reload"])?;
    check("after a reload")?;
    scope.run("update", &["--pids-limit", "100", &id])?;
    check("after an update")?;
    Systemctl.run(&["daemon-reload"])?;
    check("after an update and a reload")?;
    scope.delete()
}

#[test]
fn failed_starts_leave_no_unit() -> Result<()> {
    need_guest!();
    let scope = Scope::new("failed")?;
    let cases = [
        (
            scope
                .config(&["true"])
                .set("/process/args", json!(["/no/such/program"])),
            "no such file",
        ),
        (
            scope.config(&["true"]).set(
                "/annotations",
                json!({"org.systemd.property.NoSuchThing": "1"}),
            ),
            "unable to start unit",
        ),
        (
            scope.config(&["true"]).set(
                "/annotations",
                json!({"org.systemd.property.CollectMode": "bad"}),
            ),
            "value parse error",
        ),
        (
            scope
                .config(&["true"])
                .set("/linux/resources/unified", json!({"memory.nope": "1"})),
            "memory.nope",
        ),
        (
            scope
                .config(&["true"])
                .set("/linux/resources/cpu", json!({"mems": "63"})),
            "",
        ),
        (
            scope.config(&["true"]).set("/linux/cgroupsPath", "/a/b"),
            "slice:prefix:name",
        ),
    ];
    for (config, want) in cases {
        let bundle = scope.bundle(&config)?;
        let error =
            scope
                .runtime
                .refused(&["--systemd-cgroup", "run", "-b", &bundle, &scope.id])?;
        ensure!(error.contains(want), "{want}: {error}");
        ensure!(!error.contains("undo"), "{error}");
        ensure!(
            Systemctl.is_gone(&scope.unit())?,
            "{want}: the unit is left"
        );
        ensure!(
            !scope.runtime.root.join(&scope.id).exists(),
            "{want}: the state is left"
        );
    }
    // The name is free again.
    scope.start(&scope.config(&["sleep", "600"]))?;
    // And taken for others: neither the unit nor its processes are theirs.
    let bundle = scope.bundle(&scope.config(&["true"]))?;
    let error = scope
        .runtime
        .refused(&["--systemd-cgroup", "run", "-b", &bundle, "other"])?;
    ensure!(error.contains("cgroup is not empty"), "{error}");
    scope.runtime.wait_status(&scope.id, "running")?;
    ensure!(Systemctl.property(&scope.unit(), "ActiveState")? == "active");
    scope.delete()
}

/// Killed at any moment, `create` leaves what `delete --force` takes away: the unit above all.
/// systemd takes the scope away as soon as the init has ended, maybe while its limits are still
/// being written: the reason is the init's, not that the cgroup is gone.
#[test]
fn init_that_fails_at_once_says_why() -> Result<()> {
    need_guest!();
    let scope = Scope::new("early")?;
    let mount = json!({"destination": "/x", "type": "nosuchfs", "source": "none"});
    let config = scope
        .config(&["true"])
        .push("/mounts", mount)
        .set("/linux/resources/pids", json!({"limit": 42}));
    let bundle = scope.bundle(&config)?;
    for _ in 0..5 {
        let run = ["--systemd-cgroup", "run", "-b", &bundle, &scope.id];
        let error = scope.runtime.refused(&run)?;
        ensure!(
            error.contains("error during container init") && error.contains("nosuchfs"),
            "{error}"
        );
    }
    ensure!(Systemctl.is_gone(&scope.unit())?, "the unit is left");
    scope.bench.finish()
}

#[test]
fn killed_create_leaves_no_unit() -> Result<()> {
    need_guest!();
    let scope = Scope::new("killed")?;
    let bundle = scope.bundle(&scope.config(&["sleep", "600"]))?;
    let create = || -> Result<std::process::Child> {
        let mut command =
            scope
                .runtime
                .command(&["--systemd-cgroup", "create", "-b", &bundle, &scope.id]);
        command.stdout(std::process::Stdio::null());
        Ok(command.stderr(std::process::Stdio::null()).spawn()?)
    };
    // An emulated machine has a time of its own.
    let begin = Instant::now();
    ensure!(create()?.wait()?.success(), "create failed");
    let whole = begin.elapsed();
    scope.run("delete", &["-f", &scope.id])?;
    let mut seen_unit = false;
    for step in 0..=10 {
        let mut child = create()?;
        std::thread::sleep(whole * step / 10);
        child.kill()?;
        child.wait()?;
        seen_unit |= scope.cgroup().exists();
        scope.run("delete", &["-f", &scope.id])?;
        // What was on its way to systemd comes before the order to stop.
        wait_for("the unit to go", Duration::from_secs(20), || {
            let gone = Systemctl.is_gone(&scope.unit())? && !scope.cgroup().exists();
            Ok(gone.then_some(()))
        })?;
        ensure!(
            !scope.runtime.root.join(&scope.id).exists(),
            "{step}: the state is left"
        );
    }
    ensure!(seen_unit, "no create got as far as a unit");
    scope.bench.finish()
}

#[test]
fn slices_and_names() -> Result<()> {
    need_guest!();
    let scope = Scope::new("slice")?;
    // The default: what the other runtimes call it.
    let id = format!("{}-d", scope.bench.mark);
    let config = scope
        .config(&["sleep", "600"])
        .set("/linux/cgroupsPath", Value::Null);
    let bundle = scope.bundle(&config)?;
    let log = scope.bench.dir.join("log");
    scope
        .runtime
        .detached(&["--systemd-cgroup", "run", "-d", "-b", &bundle, &id], &log)?;
    let unit = format!("runc-{id}.scope");
    ensure!(Systemctl.property(&unit, "Slice")? == "system.slice");
    scope.run("delete", &["-f", &id])?;
    ensure!(Systemctl.is_gone(&unit)?);

    let mark = scope.bench.mark.replace('-', "_");
    let path = format!("machine-{mark}.slice:p:{mark}");
    let bundle = scope.bundle(&config.set("/linux/cgroupsPath", path))?;
    scope
        .runtime
        .detached(&["--systemd-cgroup", "run", "-d", "-b", &bundle, &id], &log)?;
    let dir = format!("/sys/fs/cgroup/machine.slice/machine-{mark}.slice/p-{mark}.scope");
    ensure!(Path::new(&dir).join("cgroup.procs").exists());
    scope.run("delete", &["-f", &id])?;
    ensure!(!Path::new(&dir).exists());
    Systemctl.run(&["stop", &format!("machine-{mark}.slice")])?;
    scope.bench.finish()
}

/// A container with a cgroup namespace and a writable cgroup mount owns its cgroup, and `exec`
/// finds it where its init has gone.
#[test]
fn delegated_cgroup_is_the_containers() -> Result<()> {
    need_guest!();
    let scope = Scope::new("owner")?;
    let mut config = scope.config(&["sleep", "600"]);
    let namespaces = config.0["linux"]["namespaces"]
        .as_array_mut()
        .context("namespaces")?;
    namespaces.push(json!({"type": "cgroup"}));
    for mount in config.0["mounts"].as_array_mut().context("mounts")? {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev"]);
        }
    }
    let config = config.set("/process/user", json!({"uid": 1000, "gid": 1000}));
    scope.start(&config)?;
    let owner = |name: &str| -> Result<u32> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(std::fs::metadata(scope.cgroup().join(name))?.uid())
    };
    for (name, want) in [("", 1000), ("cgroup.procs", 1000), ("memory.max", 0)] {
        ensure!(owner(name)? == want, "{name:?}: {}", owner(name)?);
    }
    // The namespace's root is the scope.
    let seen: Value = serde_json::from_str(&scope.run("exec", &[&scope.id, "/bin/probe"])?)?;
    let cgroup = seen
        .pointer("/cgroup")
        .map(Value::to_string)
        .unwrap_or_default();
    ensure!(!cgroup.contains("scope"), "{cgroup}");
    let sub = scope.cgroup().join("sub");
    std::fs::create_dir(&sub)?;
    let pid = scope.runtime.state(&scope.id)?["pid"].to_string();
    std::fs::write(sub.join("cgroup.procs"), &pid)?;
    std::fs::write(scope.cgroup().join("cgroup.subtree_control"), "+pids")?;
    scope.run("exec", &[&scope.id, "/bin/probe", "true"])?;
    scope.delete()
}

/// The user manager, from a session that has no right on the cgroups between its own and the
/// container's.
#[test]
fn user_manager_runs_rootless_containers() -> Result<()> {
    need_guest!();
    const UID: u32 = 1000;
    let runtime_dir = format!("/run/user/{UID}");
    ensure!(
        Command::new("systemctl")
            .args(["start", &format!("user@{UID}")])
            .status()?
            .success(),
        "the user manager does not start"
    );
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let id = format!("{}-user", bench.mark);
    let config = bench
        .config(&id, &["sleep", "600"])
        .set("/linux/cgroupsPath", Value::Null)
        .set("/linux/namespaces", json!([
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "user"}, {"type": "cgroup"},
        ]))
        .set("/linux/uidMappings", json!([{"containerID": 0, "hostID": UID, "size": 1}]))
        .set("/linux/gidMappings", json!([{"containerID": 0, "hostID": UID, "size": 1}]))
        .set("/linux/resources", json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 20}}))
        .set("/mounts", json!([{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}]));
    let bundle = bench.bundle("b", &config)?;
    for dir in [&bench.dir, &coracle.root, &bundle, &bundle.join("rootfs")] {
        std::os::unix::fs::chown(dir, Some(UID), Some(UID))?;
    }
    // Not under the manager: in a cgroup of root's, as a login session is.
    let words = coracle.words(&["--systemd-cgroup"]);
    let shell = |args: &str| -> Result<std::process::Output> {
        let line = format!("exec {} {args}", words.join(" "));
        Ok(Command::new("setpriv")
            .args([
                "--reuid",
                "1000",
                "--regid",
                "1000",
                "--clear-groups",
                "sh",
                "-c",
                &line,
            ])
            .env("XDG_RUNTIME_DIR", &runtime_dir)
            .env_remove("DBUS_SESSION_BUS_ADDRESS")
            .output()?)
    };
    let works = |args: &str| -> Result<String> {
        let output = shell(args)?;
        ensure!(
            output.status.success(),
            "{args}: {}{}",
            String::from_utf8_lossy(&output.stderr),
            std::fs::read_to_string(bench.dir.join("log")).unwrap_or_default()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    works(&format!(
        "run -d -b {} {id} >/dev/null 2>{}/log </dev/null",
        bundle.display(),
        bench.dir.display()
    ))?;
    let dir = PathBuf::from(format!(
        "/sys/fs/cgroup/user.slice/user-{UID}.slice/user@{UID}.service/user.slice/runc-{id}.scope"
    ));
    let file = |name: &str| -> Result<String> {
        Ok(std::fs::read_to_string(dir.join(name))?.trim().to_owned())
    };
    ensure!(file("memory.max")? == "67108864");
    ensure!(file("pids.max")? == "20");
    let state: Value = serde_json::from_str(&works(&format!("state {id}"))?)?;
    ensure!(file("cgroup.procs")? == state["pid"].to_string());
    // exec: by way of the manager, since the common ancestor is root's.
    let seen = works(&format!("exec {id} /bin/probe show"))?;
    ensure!(seen.contains('{'));
    works(&format!(
        "exec -d --pid-file {}/pid {id} /bin/probe sleep 600 >/dev/null 2>&1 </dev/null",
        bench.dir.display()
    ))?;
    let pid = std::fs::read_to_string(bench.dir.join("pid"))?;
    ensure!(
        file("cgroup.procs")?.lines().any(|line| line == pid),
        "exec is elsewhere"
    );
    works(&format!("update --memory 33554432 {id}"))?;
    ensure!(file("memory.max")? == "33554432");
    works(&format!("pause {id}"))?;
    works(&format!("resume {id}"))?;
    works(&format!("delete -f {id}"))?;
    ensure!(!dir.exists(), "the scope is left");
    bench.finish()
}
