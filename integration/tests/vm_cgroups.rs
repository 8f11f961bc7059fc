//! Control groups as production has them: cgroup v2 alone, under a systemd that runs, with every
//! controller, through the cgroupfs driver.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{need_guest, wait_for};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// One container of one test.
struct Case {
    bench: Bench,
    coracle: Runtime,
    bundle: String,
}

impl Case {
    fn new(args: &[&str], change: impl FnOnce(Config) -> Config) -> Result<Self> {
        let bench = Bench::new()?;
        let coracle = bench.coracle()?;
        let config = change(bench.config("c", args));
        let bundle = bench.bundle("b", &config)?.display().to_string();
        Ok(Self {
            bench,
            coracle,
            bundle,
        })
    }

    fn with_resources(args: &[&str], resources: &Value) -> Result<Self> {
        Self::new(args, |config| {
            config.set("/linux/resources", resources.clone())
        })
    }

    fn start(&self) -> Result<()> {
        let log = self.bench.dir.join("log");
        self.coracle
            .detached(&["run", "-d", "-b", &self.bundle, "c"], &log)
    }

    fn run(&self) -> Result<std::process::Output> {
        self.coracle.try_run(&["run", "-b", &self.bundle, "c"])
    }

    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.bench.mark).join("c")
    }

    fn file(&self, name: &str) -> Result<String> {
        let path = self.cgroup().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().to_owned())
    }

    fn expect(&self, files: &[(&str, &str)]) -> Result<()> {
        for (file, want) in files {
            let have = self.file(file)?;
            ensure!(have == *want, "{file}: {have}, not {want}");
        }
        Ok(())
    }

    fn end(self) -> Result<()> {
        self.coracle.run(&["delete", "-f", "c"])?;
        ensure!(!self.cgroup().exists(), "the cgroup was left");
        self.bench.finish()
    }
}

/// Number of the guest's disk.
fn disk() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/sys/block/vda/dev").context("the guest's disk")?;
    let (major, minor) = text.trim().split_once(':').context("MAJOR:MINOR")?;
    Ok((major.parse()?, minor.parse()?))
}

#[test]
fn limits_of_every_controller_reach_the_kernel() -> Result<()> {
    need_guest!();
    let (major, minor) = disk()?;
    let rate = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let case = Case::with_resources(
        &["sleep", "600"],
        &json!({
            "memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "burst": 10_000,
                    "cpus": "0", "mems": "0"},
            "pids": {"limit": 42},
            "blockIO": {
                "throttleReadBpsDevice": rate(MIB),
                "throttleWriteBpsDevice": rate(2 * MIB),
                "throttleReadIOPSDevice": rate(100),
                "throttleWriteIOPSDevice": rate(200),
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],
            "unified": {"memory.high": "50331648", "memory.oom.group": "1", "cpu.weight.nice": "0"},
        }),
    )?;
    case.start()?;
    case.expect(&[
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "33554432"),
        ("memory.high", "50331648"),
        ("memory.oom.group", "1"),
        ("cpu.max", "50000 100000"),
        ("cpu.max.burst", "10000"),
        // unified comes last: a nice of 0 is the weight 100.
        ("cpu.weight", "100"),
        ("cpuset.cpus", "0"),
        ("cpuset.cpus.effective", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "42"),
        ("hugetlb.2MB.max", "4194304"),
        ("hugetlb.2MB.rsvd.max", "4194304"),
        (
            "io.max",
            &format!("{major}:{minor} rbps=1048576 wbps=2097152 riops=100 wiops=200"),
        ),
    ])?;
    case.end()
}

#[test]
fn cpu_shares_and_idle_become_weights() -> Result<()> {
    need_guest!();
    // runc's curve: the default of both scales meets, the ends too.
    for (shares, weight) in [(2, "1"), (1024, "100"), (262_144, "10000")] {
        let case = Case::with_resources(&["sleep", "600"], &json!({"cpu": {"shares": shares}}))?;
        case.start()?;
        case.expect(&[("cpu.weight", weight), ("cpu.idle", "0")])?;
        case.end()?;
    }
    let case = Case::with_resources(&["sleep", "600"], &json!({"cpu": {"idle": 1}}))?;
    case.start()?;
    case.expect(&[("cpu.idle", "1")])?;
    case.end()
}

#[test]
fn limits_that_cannot_be_set_stop_the_start_and_name_the_field() -> Result<()> {
    need_guest!();
    let cases = [
        (
            json!({"unified": {"memory.nonsense": "1"}}),
            "memory.nonsense",
        ),
        (json!({"unified": {"memory/max": "1"}}), "memory/max"),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 99, "minor": 99, "rate": 1}]}}),
            "io.max",
        ),
        (json!({"cpu": {"cpus": "4000"}}), "cpuset.cpus"),
        (
            json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}),
            "3MB",
        ),
        (json!({"rdma": {"mlx5_99": {"hcaHandles": 2}}}), "rdma"),
        (json!({"memory": {"swappiness": 10}}), "swappiness"),
        (json!({"network": {"classID": 7}}), "classID"),
    ];
    for (resources, named) in cases {
        let case = Case::with_resources(&["true"], &resources)?;
        let error = case.coracle.refused(&["run", "-b", &case.bundle, "c"])?;
        ensure!(error.contains(named), "{resources}: {error}");
        ensure!(!case.cgroup().exists(), "{resources}: the cgroup was left");
        case.bench.finish()?;
    }
    Ok(())
}

#[test]
fn update_changes_limits_and_a_refused_one_changes_none() -> Result<()> {
    need_guest!();
    let case = Case::with_resources(
        &["sleep", "600"],
        &json!({"memory": {"limit": 64 * MIB}, "pids": {"limit": 40}}),
    )?;
    case.start()?;
    let update = |args: &[&str]| -> Vec<String> {
        ["update"]
            .iter()
            .chain(args)
            .chain(&["c"])
            .map(|a| (*a).to_owned())
            .collect()
    };
    let words = |words: &[String]| -> Result<String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        case.coracle.run(&words)
    };
    words(&update(&[
        "--memory",
        "96M",
        "--memory-swap",
        "128M",
        "--memory-reservation",
        "16M",
        "--pids-limit",
        "20",
        "--cpu-quota",
        "30000",
        "--cpu-period",
        "60000",
        "--cpu-burst",
        "3000",
        "--cpu-share",
        "2048",
        "--cpuset-cpus",
        "1",
        "--cpuset-mems",
        "0",
    ]))?;
    let changed = [
        ("memory.max", "100663296"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "16777216"),
        ("pids.max", "20"),
        ("cpu.max", "30000 60000"),
        ("cpu.max.burst", "3000"),
        ("cpuset.cpus", "1"),
    ];
    case.expect(&changed)?;
    let weight = case.file("cpu.weight")?;

    let refused = update(&[
        "--pids-limit",
        "5",
        "--memory",
        "80M",
        "--cpuset-cpus",
        "4000",
    ]);
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    let error = case.coracle.refused(&refused)?;
    ensure!(error.contains("cpuset"), "{error}");
    case.expect(&changed)?;
    case.expect(&[("cpu.weight", &weight)])?;

    words(&update(&["--pids-limit", "-1", "--memory", "-1"]))?;
    case.expect(&[("pids.max", "max"), ("memory.max", "max")])?;
    words(&update(&["--cpu-quota", "-1"]))?;
    case.expect(&[("cpu.max", "max 60000")])?;
    case.end()
}

#[test]
fn events_stats_hold_what_the_kernel_counts() -> Result<()> {
    need_guest!();
    let case = Case::with_resources(
        &["eat", "24"],
        &json!({
            "memory": {"limit": 64 * MIB}, "pids": {"limit": 30},
            "cpu": {"quota": 90_000, "period": 100_000, "cpus": "0-1"},
        }),
    )?;
    case.start()?;
    wait_for("the memory", Duration::from_secs(30), || {
        let used: u64 = case.file("memory.current")?.parse()?;
        Ok((used > 24 * MIB).then_some(()))
    })?;
    let text = case.coracle.run(&["events", "--stats", "c"])?;
    let event: Value = serde_json::from_str(&text)?;
    ensure!(event["type"] == "stats" && event["id"] == "c", "{event}");
    let number = |pointer: &str| -> Result<u64> {
        let value = event.pointer(&format!("/data{pointer}"));
        value
            .and_then(Value::as_u64)
            .with_context(|| format!("{pointer} in {event:#}"))
    };
    ensure!(number("/memory/usage/limit")? == 64 * MIB);
    ensure!(number("/memory/usage/usage")? > 24 * MIB);
    ensure!(number("/memory/usage/max")? > 24 * MIB);
    ensure!(number("/memory/raw/anon")? > 20 * MIB);
    ensure!(number("/memory/raw/pgfault")? > 0);
    ensure!(number("/pids/current")? == 1);
    ensure!(number("/pids/limit")? == 30);
    ensure!(number("/cpu/usage/total")? > 0);
    ensure!(number("/cpu/throttling/periods")? > 0);
    ensure!(event["data"]["hugetlb"]["2MB"].is_object(), "{event:#}");
    // Debian builds PSI in and leaves it on.
    for part in ["cpu", "memory", "blkio"] {
        let psi = &event["data"][part]["psi"];
        ensure!(psi.is_object(), "{part}: {psi}");
    }
    case.end()
}

#[test]
fn oom_kill_is_an_event_and_the_exit_code_is_137() -> Result<()> {
    need_guest!();
    let case = Case::with_resources(
        &["sleep", "600"],
        &json!({"memory": {"limit": 24 * MIB, "swap": 24 * MIB}}),
    )?;
    case.start()?;
    let log = case.bench.dir.join("events");
    let mut events = case
        .coracle
        .command(&["events", "--interval", "1h", "c"])
        .stdout(std::fs::File::create(&log)?)
        .spawn()?;
    // It watches once it has the event file open.
    let fds = format!("/proc/{}/fd", events.id());
    wait_for("the watch", Duration::from_secs(10), || {
        let open = std::fs::read_dir(&fds)?
            .flatten()
            .filter_map(|e| std::fs::read_link(e.path()).ok())
            .any(|l| l.ends_with("memory.events") || l.to_string_lossy().contains("inotify"));
        Ok(open.then_some(()))
    })?;
    let eater = case
        .coracle
        .try_run(&["exec", "c", "/bin/probe", "eat", "128", "1"])?;
    ensure!(eater.status.code() == Some(137), "{eater:?}");
    let line = wait_for("an oom event", Duration::from_secs(20), || {
        let text = std::fs::read_to_string(&log)?;
        Ok(text.lines().next().map(str::to_owned))
    });
    case.coracle.run(&["kill", "c", "KILL"])?;
    // The watch ends with the container.
    let status = events.wait()?;
    let event: Value = serde_json::from_str(&line?)?;
    ensure!(event == json!({"type": "oom", "id": "c"}), "{event}");
    ensure!(status.success(), "events: {status}");
    case.end()
}

#[test]
fn pids_limit_holds_in_the_container() -> Result<()> {
    need_guest!();
    let case = Case::with_resources(&["burn", "20", "1"], &json!({"pids": {"limit": 8}}))?;
    let output = case.run()?;
    ensure!(!output.status.success(), "20 threads under a limit of 8");
    case.bench.finish()
}

#[test]
fn pause_freezes_the_cgroup_and_a_frozen_container_can_be_killed() -> Result<()> {
    need_guest!();
    let case = Case::new(&["sleep", "600"], |c| c)?;
    case.start()?;
    let frozen = |want: &str| -> Result<()> {
        let events = case.file("cgroup.events")?;
        ensure!(
            events.lines().any(|l| l == format!("frozen {want}")),
            "{events}"
        );
        Ok(())
    };
    case.coracle.run(&["pause", "c"])?;
    frozen("1")?;
    ensure!(case.coracle.state("c")?["status"] == "paused");
    case.coracle.run(&["resume", "c"])?;
    frozen("0")?;
    case.coracle.run(&["pause", "c"])?;
    case.coracle.run(&["kill", "c", "KILL"])?;
    case.coracle.wait_status("c", "stopped")?;
    case.end()
}

#[test]
fn delete_kills_all_below_in_a_shared_pid_namespace() -> Result<()> {
    need_guest!();
    let case = Case::new(&["sleep", "600"], |config| {
        let without_pid = json!([
            {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        ]);
        config.set("/linux/namespaces", without_pid)
    })?;
    case.start()?;
    let log = case.bench.dir.join("exec.log");
    for _ in 0..3 {
        let args = ["exec", "-d", "c", "/bin/probe", "sleep", "600"];
        case.coracle.detached(&args, &log)?;
    }
    // Two of them into cgroups of their own below, as a nested manager would.
    let pids = case.file("cgroup.procs")?;
    let below = case.cgroup().join("below/deeper");
    std::fs::create_dir_all(&below)?;
    for pid in pids.lines().skip(2) {
        std::fs::write(below.join("cgroup.procs"), pid)?;
    }
    ensure!(pids.lines().count() == 4, "{pids}");
    case.coracle.run(&["kill", "c", "KILL"])?;
    case.coracle.run(&["delete", "-f", "c"])?;
    for pid in pids.lines() {
        // A zombie of a parent that is not ours has no executable.
        let alive = std::fs::read_link(format!("/proc/{pid}/exe"));
        ensure!(alive.is_err(), "{pid} lives on: {alive:?}");
    }
    ensure!(!case.cgroup().exists(), "the cgroup was left");
    case.bench.finish()
}

#[test]
fn exec_follows_an_init_that_moved_to_a_cgroup_below() -> Result<()> {
    need_guest!();
    let case = Case::new(&["sleep", "600"], |c| c)?;
    case.start()?;
    let below = case.cgroup().join("init");
    std::fs::create_dir(&below)?;
    let init = case.coracle.state("c")?["pid"].to_string();
    std::fs::write(below.join("cgroup.procs"), &init)?;
    // From now on the container's own cgroup takes no process.
    std::fs::write(case.cgroup().join("cgroup.subtree_control"), "+memory")?;
    let seen = case.coracle.run(&["exec", "c", "/bin/probe", "show"])?;
    let seen: Value = serde_json::from_str(&seen)?;
    let cgroup = seen["cgroup"][0].as_str().context("a cgroup")?;
    ensure!(cgroup.ends_with("/c/init"), "{cgroup}");
    // Who names the cgroup gets that one or none.
    let own = ["exec", "--cgroup", "/", "c", "/bin/probe", "show"];
    let refused = case.coracle.refused(&own)?;
    let (_, adding) = refused.split_once("adding pid ").unwrap_or_default();
    ensure!(
        adding.contains(" to cgroups: ") && adding.contains("resource busy"),
        "{refused}"
    );
    case.end()
}

#[test]
fn cgroup_namespace_shows_its_own_root() -> Result<()> {
    need_guest!();
    let case = Case::new(&["show"], |config| {
        config.push("/linux/namespaces", json!({"type": "cgroup"}))
    })?;
    let seen: Value = serde_json::from_slice(&case.run()?.stdout)?;
    ensure!(seen["cgroup"] == json!(["0::/"]), "{}", seen["cgroup"]);
    let mounts = seen["mounts"].to_string();
    ensure!(mounts.contains("/sys/fs/cgroup"), "{mounts}");
    case.bench.finish()
}

/// /dev/kmsg is none of the devices that every container gets.
#[test]
fn devices_are_refused_by_a_program_and_allowed_by_a_rule() -> Result<()> {
    need_guest!();
    let node =
        json!([{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 438}]);
    let deny = json!({"allow": false, "access": "rwm"});
    let cases = [
        (json!([deny]), false),
        (
            json!([deny, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]),
            false,
        ),
        (
            json!([deny, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"}]),
            true,
        ),
    ];
    for (rules, writable) in cases {
        let case = Case::new(&["write", "/dev/kmsg", "coracle test"], |config| {
            config
                .set("/linux/devices", node.clone())
                .set("/linux/resources/devices", rules.clone())
        })?;
        let output = case.run()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() == writable, "{rules}: {said}");
        ensure!(writable || said.contains("os error 1"), "{rules}: {said}");
        case.bench.finish()?;
    }
    Ok(())
}

/// Every container of a host at once: the kernel takes 64 programs for a cgroup and its parents
/// together, so one that is not replaced or not detached shows up here.
#[test]
fn device_programs_of_one_cgroup_do_not_pile_up() -> Result<()> {
    need_guest!();
    let case = Case::new(&["write", "/dev/null", "x"], |c| c)?;
    for _ in 0..3 {
        let output = case.run()?;
        ensure!(output.status.success(), "{output:?}");
    }
    case.bench.finish()
}
