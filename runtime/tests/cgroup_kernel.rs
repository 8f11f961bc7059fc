//! The cgroup module against the kernel of this machine: its own mode, and a private view of pure
//! cgroup v2 in which the tests run again.
//!
//! Needs root. Without it each test prints "skipped" and passes.

#![forbid(unsafe_code)]
// Also in what the tests share: a failed expectation is the answer.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coracle::cgroup::{self, Cgroup, CgroupMode, CgroupPlan, OomWatch, PlanOptions, Stats};
use coracle_oci::ContainerId;
use coracle_oci::record::CgroupRecord;
use coracle_oci::spec::Spec;
use serde_json::{Value, json};

/// Set in the private view.
const V2_VIEW: &str = "CORACLE_TEST_V2_VIEW";

/// Past libtest's capture, in the form that .ci/totals counts.
fn say_skipped(why: &str) {
    use std::io::Write as _;
    let _ = write!(std::io::stdout(), "\nSKIP {why}\n");
}

fn skipped(test: &str) -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        say_skipped(&format!("{test}: needs root"));
    }
    skip
}

fn spec(path: &str, resources: &Value) -> Spec {
    let config = json!({
        "ociVersion": "1.2.0",
        "linux": {"cgroupsPath": path, "resources": resources},
    });
    coracle_oci::config::parse(config.to_string().as_bytes())
        .unwrap()
        .spec
}

/// On a hybrid host the controllers are bound to v1 and missing in the private view of v2.
fn has_memory_controller() -> bool {
    let of_v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    match cgroup::detect().unwrap() {
        CgroupMode::V1 { .. } => true,
        _ => of_v2.is_ok_and(|names| names.split_whitespace().any(|name| name == "memory")),
    }
}

/// A plan under a name of this process's own.
fn plan(name: &str, resources: &Value) -> CgroupPlan {
    let path = format!("/coracle-test-{}/{name}", std::process::id());
    let id = ContainerId::parse(name).unwrap();
    let mode = cgroup::detect().unwrap();
    cgroup::plan(&spec(&path, resources), &id, &mode, PlanOptions::default()).unwrap()
}

fn dirs(record: &CgroupRecord) -> Vec<PathBuf> {
    match record {
        CgroupRecord::None => Vec::new(),
        CgroupRecord::V1 { paths, .. } => paths.values().cloned().collect(),
        CgroupRecord::V2 { path, .. } => vec![path.clone()],
    }
}

/// The cgroup of a test: gone at its end, however it ends, and its parent with it.
struct Made {
    cgroup: Cgroup,
    plan: CgroupPlan,
}

impl Made {
    fn new(name: &str, resources: &Value) -> Made {
        let plan = plan(name, resources);
        let cgroup = plan.create().unwrap();
        Made { cgroup, plan }
    }

    fn v1_dir(&self, controller: &str) -> Option<PathBuf> {
        match self.cgroup.record() {
            CgroupRecord::V1 { paths, .. } => paths
                .into_iter()
                .find(|(key, _)| key.split(',').any(|name| name == controller))
                .map(|(_, path)| path),
            _ => None,
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = self.cgroup.kill_all();
        let _ = self.cgroup.delete();
        for dir in dirs(&self.cgroup.record()) {
            if let Some(parent) = dir.parent() {
                let _ = std::fs::remove_dir(parent);
            }
        }
    }
}

/// A process that is killed and reaped at the end of the test.
struct Process(Child);

impl Process {
    fn sleep() -> Process {
        Process(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .chars()
            .next()
            .unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// 64 MiB in a shell variable.
const FILL_MEMORY: &str =
    "x=$(head -c 67108864 /dev/zero | tr '\\0' x); read never </dev/null; sleep 1000";

/// A shell that runs the script once it is in the cgroup, so that nothing of it is outside.
fn gated(script: &str, cgroup: &Cgroup) -> Process {
    let script = format!("read go; {script}");
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    let process = Process(child);
    cgroup.join(process.pid()).unwrap();
    drop(stdin);
    process
}

fn read(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file))
        .unwrap()
        .trim()
        .to_owned()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn create_join_list_delete() {
    if skipped("create_join_list_delete") {
        return;
    }
    let made = Made::new("life", &json!({}));
    made.cgroup.apply_limits(&made.plan).unwrap();
    assert!(dirs(&made.cgroup.record()).iter().all(|dir| dir.is_dir()));
    let process = Process::sleep();
    made.cgroup.join(process.pid()).unwrap();
    assert_eq!(made.cgroup.pids().unwrap(), [process.pid()]);
    let reopened = Cgroup::open(&made.cgroup.record());
    assert_eq!(reopened.pids().unwrap(), [process.pid()]);
    drop(process);
    reopened.delete().unwrap();
    assert!(dirs(&made.cgroup.record()).iter().all(|dir| !dir.exists()));
    // Once more is no error.
    reopened.delete().unwrap();
}

#[test]
fn process_joins_v1_by_itself() {
    if skipped("process_joins_v1_by_itself") {
        return;
    }
    let made = Made::new("self", &json!({}));
    let Some(dir) = made.v1_dir("pids") else {
        return;
    };
    let is_its_file = |fd: &OwnedFd| {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        std::fs::read_link(link).unwrap() == dir.join("tasks")
    };
    let mut fds = made.cgroup.self_join().unwrap().into_iter();
    let file = File::from(fds.find(is_its_file).unwrap());
    let child = Command::new("sh")
        .args(["-c", "echo 0; exec sleep 1000"])
        .stdout(file)
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let process = Process(child);
    wait_for("the process in its cgroup", || {
        read(&dir, "cgroup.procs") == process.pid().to_string()
    });
}

#[test]
fn used_cgroup_is_refused_and_left_alone() {
    if skipped("used_cgroup_is_refused_and_left_alone") {
        return;
    }
    let made = Made::new("used", &json!({}));
    let process = Process::sleep();
    made.cgroup.join(process.pid()).unwrap();
    let error = made.plan.create().unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("container's cgroup is not empty: 1 process(es) found"),
        "{text}"
    );
    assert_eq!(made.cgroup.pids().unwrap(), [process.pid()]);
}

#[test]
fn freeze_and_thaw() {
    if skipped("freeze_and_thaw") {
        return;
    }
    let made = Made::new("freeze", &json!({}));
    let process = Process::sleep();
    made.cgroup.join(process.pid()).unwrap();
    assert!(!made.cgroup.is_frozen().unwrap());
    made.cgroup.freeze().unwrap();
    assert!(made.cgroup.is_frozen().unwrap());
    let error = made.plan.create().unwrap_err();
    assert!(
        format!("{error:#}").contains("cgroup is not empty"),
        "{error:#}"
    );
    made.cgroup.thaw().unwrap();
    assert!(!made.cgroup.is_frozen().unwrap());
    wait_for("the process to sleep again", || process.state() == 'S');
}

#[test]
fn kill_reaches_frozen_and_forking_processes() {
    if skipped("kill_reaches_frozen_and_forking_processes") {
        return;
    }
    let made = Made::new("kill", &json!({}));
    let script = "while :; do sleep 1000 & sleep 0.001; done";
    let forks = gated(script, &made.cgroup);
    wait_for("forks", || made.cgroup.pids().unwrap().len() > 5);
    made.cgroup.freeze().unwrap();
    made.cgroup.kill_all().unwrap();
    wait_for("an empty cgroup", || made.cgroup.pids().unwrap().is_empty());
    made.cgroup.delete().unwrap();
    drop(forks);
}

#[test]
fn delete_waits_for_the_dying_and_removes_those_below() {
    if skipped("delete_waits_for_the_dying_and_removes_those_below") {
        return;
    }
    let made = Made::new("dying", &json!({}));
    for dir in dirs(&made.cgroup.record()) {
        if !dir.join("cpuset.cpus").exists() {
            std::fs::create_dir_all(dir.join("below/deeper")).unwrap();
        }
    }
    // 64 MiB of memory take a while to give back.
    let process = gated("tail -c 67108864 /dev/zero | sleep 1000", &made.cgroup);
    std::thread::sleep(Duration::from_millis(20));
    made.cgroup.kill_all().unwrap();
    made.cgroup.delete().unwrap();
    assert!(dirs(&made.cgroup.record()).iter().all(|dir| !dir.exists()));
    drop(process);
}

#[test]
fn v1_limits_reach_the_kernel() {
    if skipped("v1_limits_reach_the_kernel") {
        return;
    }
    if !matches!(cgroup::detect().unwrap(), CgroupMode::V1 { .. }) {
        say_skipped("v1_limits_reach_the_kernel: not a v1 host");
        return;
    }
    let resources = json!({
        "memory": {"limit": 33_554_432, "reservation": 16_777_216, "swappiness": 10},
        "cpu": {"shares": 100, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 42},
        "devices": [{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}],
    });
    let made = Made::new("limits", &resources);
    made.cgroup.apply_limits(&made.plan).unwrap();
    let value = |controller: &str, file: &str| read(&made.v1_dir(controller).unwrap(), file);
    assert_eq!(value("memory", "memory.limit_in_bytes"), "33554432");
    assert_eq!(value("memory", "memory.soft_limit_in_bytes"), "16777216");
    assert_eq!(value("memory", "memory.swappiness"), "10");
    assert_eq!(value("cpu", "cpu.shares"), "100");
    assert_eq!(value("cpu", "cpu.cfs_quota_us"), "50000");
    assert_eq!(value("cpuset", "cpuset.cpus"), "0");
    assert_eq!(value("pids", "pids.max"), "42");
    let devices = value("devices", "devices.list");
    assert!(
        devices.lines().any(|line| line == "c 10:229 rw"),
        "{devices}"
    );
    assert!(!devices.contains("a *:* rwm"), "{devices}");
    let mut listed: Vec<_> = devices.lines().collect();
    listed.sort_unstable();
    assert_eq!(listed.len(), 12, "{listed:?}");

    // An update in both directions, memory below and above what was there.
    for limit in [16_777_216, 67_108_864] {
        let new = coracle_oci::config::parse_resources(
            json!({"memory": {"limit": limit}, "pids": {"limit": -1}})
                .to_string()
                .as_bytes(),
        )
        .unwrap();
        let record = made.cgroup.record();
        let update = cgroup::plan_update(&record, &new, PlanOptions::default(), None).unwrap();
        made.cgroup.update(&update, None).unwrap();
        assert_eq!(value("memory", "memory.limit_in_bytes"), limit.to_string());
    }
    assert_eq!(value("pids", "pids.max"), "max");

    let process = Process::sleep();
    made.cgroup.join(process.pid()).unwrap();
    let stats = Stats::read(&made.cgroup).unwrap();
    assert_eq!(stats.pids.current, 1);
    assert_eq!(stats.memory.usage.limit, 67_108_864);
    assert_eq!(stats.cpuset.cpus, [0]);
}

/// A later limit is refused: the earlier ones are what they were, also those that no config had
/// ever asked for.
#[test]
fn refused_update_changes_nothing() {
    if skipped("refused_update_changes_nothing") {
        return;
    }
    if !matches!(cgroup::detect().unwrap(), CgroupMode::V1 { .. }) {
        say_skipped("refused_update_changes_nothing: not a v1 host");
        return;
    }
    let made = Made::new("rollback", &json!({"cpu": {"shares": 100}}));
    made.cgroup.apply_limits(&made.plan).unwrap();
    let files = [
        ("memory", "memory.limit_in_bytes"),
        ("memory", "memory.memsw.limit_in_bytes"),
        ("memory", "memory.soft_limit_in_bytes"),
        ("cpu", "cpu.shares"),
        ("cpu", "cpu.cfs_quota_us"),
        ("cpu", "cpu.cfs_period_us"),
        ("cpuset", "cpuset.cpus"),
        ("pids", "pids.max"),
    ];
    let values = || {
        let value = |(controller, file): &(&str, &str)| {
            let path = made.v1_dir(controller).unwrap().join(file);
            std::fs::read_to_string(path).unwrap_or_default()
        };
        files.iter().map(value).collect::<Vec<_>>()
    };
    let before = values();
    // The last to be written are the processors, and no machine has these.
    let new = json!({
        "memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 33_554_432},
        "cpu": {"shares": 200, "quota": 5000, "period": 10_000, "cpus": "4000"},
        "pids": {"limit": 7},
    });
    let new = coracle_oci::config::parse_resources(new.to_string().as_bytes()).unwrap();
    let record = made.cgroup.record();
    let update = cgroup::plan_update(&record, &new, PlanOptions::default(), None).unwrap();
    let error = format!("{:#}", made.cgroup.update(&update, None).unwrap_err());
    assert!(error.contains("linux.resources.cpu.cpus"), "{error}");
    assert!(!error.contains("cannot set back"), "{error}");
    assert_eq!(values(), before);
}

/// youki's libcgroups reads the same files by code of its own: what both see has to agree.
#[test]
fn stats_agree_with_libcgroups() {
    use libcgroups::common::CgroupManager as _;
    if skipped("stats_agree_with_libcgroups") {
        return;
    }
    if !matches!(cgroup::detect().unwrap(), CgroupMode::V1 { .. }) {
        say_skipped("stats_agree_with_libcgroups: not a v1 host");
        return;
    }
    let resources = json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 77}});
    let made = Made::new("oracle", &resources);
    made.cgroup.apply_limits(&made.plan).unwrap();
    let busy = Command::new("sh")
        .args([
            "-c",
            "read go; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 1000",
        ])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut busy = Process(busy);
    made.cgroup.join(busy.pid()).unwrap();
    std::io::Write::write_all(busy.0.stdin.as_mut().unwrap(), b"go\n").unwrap();
    // Long enough for the loop to show up; the tolerance below does not depend on it.
    std::thread::sleep(Duration::from_millis(200));

    let pids = made.v1_dir("pids").unwrap();
    let mode = cgroup::detect().unwrap();
    let CgroupMode::V1 { hierarchies, .. } = &mode else {
        unreachable!()
    };
    let mountpoint = hierarchies
        .iter()
        .map(|hierarchy| &hierarchy.mountpoint)
        .find(|mountpoint| pids.starts_with(mountpoint))
        .unwrap();
    let path = Path::new("/").join(pids.strip_prefix(mountpoint).unwrap());
    let oracle = libcgroups::v1::manager::Manager::new(&path).unwrap();
    let before = Stats::read(&made.cgroup).unwrap();
    let theirs = oracle.stats().unwrap();
    let after = Stats::read(&made.cgroup).unwrap();

    let between = |low: u64, value: u64, high: u64, what: &str| {
        assert!(
            low <= value && value <= high,
            "{what}: {low} {value} {high}"
        );
    };
    between(
        before.cpu.usage.total,
        theirs.cpu.usage.usage_total,
        after.cpu.usage.total,
        "cpu",
    );
    assert!(theirs.cpu.usage.usage_total > 0);
    assert_eq!(before.pids.current, theirs.pids.current);
    assert_eq!(before.pids.limit, theirs.pids.limit);
    assert_eq!(theirs.pids.limit, 77);
    // Per-processor batches of charges are in flight.
    let slack = 4 << 20;
    between(
        before.memory.usage.usage.saturating_sub(slack),
        theirs.memory.memory.usage,
        after.memory.usage.usage + slack,
        "memory",
    );
    assert_eq!(before.memory.usage.limit, theirs.memory.memory.limit);
    assert_eq!(before.memory.usage.failcnt, theirs.memory.memory.fail_count);
    assert_eq!(
        before.cpu.throttling.throttled_periods,
        theirs.cpu.throttling.throttled_periods
    );
}

#[test]
fn refused_value_names_field_and_file() {
    if skipped("refused_value_names_field_and_file") {
        return;
    }
    if !matches!(cgroup::detect().unwrap(), CgroupMode::V1 { .. }) {
        say_skipped("refused_value_names_field_and_file: not a v1 host");
        return;
    }
    let made = Made::new("refused", &json!({"cpu": {"period": 1}}));
    let text = format!("{:#}", made.cgroup.apply_limits(&made.plan).unwrap_err());
    assert!(
        text.starts_with("linux.resources.cpu.period: write \"1\" to "),
        "{text}"
    );
    assert!(
        text.ends_with("cpu.cfs_period_us: invalid argument"),
        "{text}"
    );
    let low = Made::new("low", &json!({"cpu": {"shares": 1}}));
    let text = format!("{:#}", low.cgroup.apply_limits(&low.plan).unwrap_err());
    assert!(
        text.contains("the minimum allowed cpu-shares is 2"),
        "{text}"
    );
}

#[test]
fn oom_kill_is_seen() {
    if skipped("oom_kill_is_seen") {
        return;
    }
    if !has_memory_controller() {
        say_skipped("oom_kill_is_seen: no memory controller in this view");
        return;
    }
    let made = Made::new(
        "oom",
        &json!({"memory": {"limit": 8_388_608, "swap": 8_388_608}}),
    );
    made.cgroup.apply_limits(&made.plan).unwrap();
    let mut watch = OomWatch::new(&made.cgroup).unwrap();
    let process = gated(FILL_MEMORY, &made.cgroup);
    let mut kills = 0;
    let deadline = Instant::now() + Duration::from_secs(10);
    while kills == 0 && Instant::now() < deadline {
        kills = watch.wait(deadline).unwrap().oom_kills;
    }
    assert_eq!(kills, 1);
    assert_eq!(made.cgroup.oom_kills().unwrap(), 1);
    drop(process);
    made.cgroup.delete().unwrap();
    wait_for("the end", || watch.wait(Instant::now()).unwrap().ended);
}

#[test]
fn v2_device_filter_denies() {
    if skipped("v2_device_filter_denies") {
        return;
    }
    if !matches!(cgroup::detect().unwrap(), CgroupMode::V2 { .. }) {
        say_skipped("v2_device_filter_denies: runs in the v2 view");
        return;
    }
    let rules = json!({"devices": [{"allow": false, "access": "rwm"}]});
    let made = Made::new("devices", &rules);
    made.cgroup.apply_limits(&made.plan).unwrap();
    // The program of a second application takes the place of the first.
    let reopened = Cgroup::open(&made.cgroup.record());
    reopened.apply_limits(&made.plan).unwrap();
    let [dir] = &dirs(&made.cgroup.record())[..] else {
        panic!("one directory")
    };
    let programs = coracle_sys::bpf::device_programs(File::open(dir).unwrap()).unwrap();
    assert_eq!(programs.len(), 1);

    let probe = "cat /dev/null && head -c1 /dev/zero >/dev/null && \
                 ! head -c1 /dev/kmsg 2>/dev/null";
    let mut child = gated(probe, &made.cgroup);
    assert!(child.0.wait().unwrap().success());
}

#[test]
fn v2_missing_controller_names_the_field() {
    if skipped("v2_missing_controller_names_the_field") {
        return;
    }
    if std::env::var_os(V2_VIEW).is_none() || has_memory_controller() {
        return;
    }
    for (resources, want) in [
        (
            json!({"memory": {"limit": 1}}),
            "linux.resources.memory.limit: write \"1\" to ",
        ),
        (
            json!({"unified": {"memory.max": "1"}}),
            "unified resource \"memory.max\" can't be set: controller \"memory\" not available",
        ),
    ] {
        let made = Made::new("missing", &resources);
        let text = format!("{:#}", made.cgroup.apply_limits(&made.plan).unwrap_err());
        assert!(text.starts_with(want), "{text}");
    }
    let made = Made::new(
        "unified",
        &json!({"unified": {"cgroup.max.descendants": "7"}}),
    );
    made.cgroup.apply_limits(&made.plan).unwrap();
    let [dir] = &dirs(&made.cgroup.record())[..] else {
        panic!("one directory")
    };
    assert_eq!(read(dir, "cgroup.max.descendants"), "7");
}

/// Runs this file's tests again where only cgroup2 is mounted. There are no controllers, but
/// processes, freezing, killing, events and device programs are the kernel's own.
#[test]
fn all_again_in_a_private_v2_view() {
    if skipped("all_again_in_a_private_v2_view") || std::env::var_os(V2_VIEW).is_some() {
        return;
    }
    if matches!(cgroup::detect().unwrap(), CgroupMode::V2 { .. }) {
        // The tests of this very run have that view.
        return;
    }
    let script = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$0\"";
    let status = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(V2_VIEW, "1")
        .status()
        .unwrap();
    assert!(status.success());
}
