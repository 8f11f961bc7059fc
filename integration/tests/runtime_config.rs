//! What `linux` and `process` of a config.json do in a container, seen from inside it, and what of
//! them is refused. Runs `coracle` alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root, skip, wait_for};
use serde_json::{Value, json};

/// A bundle with busybox for a shell.
fn bundle(bench: &Bench, config: &Config) -> Result<String> {
    let bundle = bench.bundle("b", config)?;
    let busybox = binaries::installed("busybox").context("busybox is not installed: make deps")?;
    std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
    Ok(bundle.display().to_string())
}

fn shell(bench: &Bench, script: &str) -> Config {
    bench
        .config("c", &[])
        .set("/process/args", ["/bin/busybox", "sh", "-c", script])
}

fn run(bench: &Bench, coracle: &Runtime, config: &Config) -> Result<String> {
    let bundle = bundle(bench, config)?;
    coracle.run(&["run", "-b", &bundle, "c"])
}

/// What is said on a refusal, without the quoting of the log.
fn refused(coracle: &Runtime, bundle: &str) -> Result<String> {
    let error = coracle.refused(&["run", "-b", bundle, "c"])?;
    Ok(error.replace('\\', ""))
}

fn ip(words: &str) -> Result<String> {
    let output = Command::new("ip").args(words.split(' ')).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The kernel takes a namespace's devices apart some time after its last process.
fn wait_gone(device: &str) -> Result<()> {
    wait_for(&format!("{device} to go"), Duration::from_secs(10), || {
        Ok(ip(&format!("link show dev {device}"))
            .is_err()
            .then_some(()))
    })
}

#[test]
fn memory_policy_is_that_of_the_program_and_of_execs() -> Result<()> {
    need_root!();
    if !Path::new("/proc/self/numa_maps").exists() {
        skip!("this kernel has no NUMA");
    }
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let show = "head -n 1 /proc/self/numa_maps";
    let cases = [
        (
            json!({"mode": "MPOL_INTERLEAVE", "nodes": "0"}),
            "interleave:0",
        ),
        (
            json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}),
            "bind=static:0",
        ),
        (json!({"mode": "MPOL_DEFAULT"}), "default"),
    ];
    for (policy, want) in cases {
        let config = shell(&bench, show).set("/linux/memoryPolicy", policy);
        let shown = run(&bench, &coracle, &config)?;
        ensure!(shown.split(' ').nth(1) == Some(want), "{want}: {shown}");
    }
    let policy =
        json!({"mode": "MPOL_PREFERRED", "nodes": "0", "flags": ["MPOL_F_RELATIVE_NODES"]});
    let config = shell(&bench, "sleep 60").set("/linux/memoryPolicy", policy);
    let bundle = bundle(&bench, &config)?;
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let shown = coracle.run(&["exec", "c", "/bin/busybox", "sh", "-c", show])?;
    ensure!(shown.contains("prefer=relative:0"), "{shown}");
    coracle.run(&["delete", "-f", "c"])?;
    bench.finish()
}

#[test]
fn network_device_moves_with_its_addresses() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    ip("link add dev0 type veth peer name dev1")?;
    ip("link set dev0 mtu 1337 address 02:00:00:00:be:ef up")?;
    ip("link set dev1 up")?;
    ip("address add 169.254.77.1/24 dev dev0")?;
    ip("address add 127.0.0.33/32 scope host dev dev0")?;
    ip("-6 address add fd00:77::1/64 dev dev0 nodad")?;
    let config = shell(&bench, "/bin/busybox ip address show dev inner")
        .set("/linux/netDevices", json!({"dev0": {"name": "inner"}}));
    let shown = run(&bench, &coracle, &config)?;
    for want in [
        "169.254.77.1/24",
        "fd00:77::1/64",
        "02:00:00:00:be:ef",
        "mtu 1337",
        "UP",
    ] {
        ensure!(shown.contains(want), "no {want} in {shown}");
    }
    ensure!(!shown.contains("127.0.0.33"), "{shown}");
    // The namespace took it along when it ended, and the pair with it.
    wait_gone("dev1")?;
    bench.finish()
}

#[test]
fn network_device_stays_in_a_joined_namespace() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let namespace = bench.mark.clone();
    ip(&format!("netns add {namespace}"))?;
    ip("link add dev0 type veth peer name dev1")?;
    let path = format!("/run/netns/{namespace}");
    let config = shell(&bench, "/bin/busybox ip -o link show dev dev0")
        .set("/linux/netDevices", json!({"dev0": {}}))
        .set(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "uts"},
                {"type": "network", "path": path}]),
        );
    let shown = run(&bench, &coracle, &config);
    let found = ip(&format!("-n {namespace} -o link show dev dev0"));
    ip(&format!("netns delete {namespace}"))?;
    ensure!(shown?.contains("dev0"));
    found?;
    wait_gone("dev1")?;
    bench.finish()
}

#[test]
fn network_device_that_is_not_there_or_taken_is_refused() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    ip("link add dev0 type veth peer name dev1")?;
    for (devices, want) in [
        (json!({"dev9": {}}), "link not found for interface dev9"),
        (
            json!({"dev0": {"name": "lo"}}),
            "fail to move network device",
        ),
    ] {
        let config = shell(&bench, "true").set("/linux/netDevices", devices);
        let bundle = bundle(&bench, &config)?;
        let error = refused(&coracle, &bundle)?;
        ensure!(
            error.contains("move netDevice dev") && error.contains(want),
            "{error}"
        );
        ensure!(coracle.run(&["list", "-q"])?.is_empty());
    }
    // The kernel had moved it by the time it saw the name, and it ended with its new namespace.
    wait_gone("dev1")?;
    bench.finish()
}

/// A member of the config, its value, and a part of what is said.
type Case = (&'static str, Value, &'static str);

#[test]
fn what_the_host_or_the_spec_rules_out_is_refused_in_runcs_words() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let mut cases: Vec<Case> = vec![
        (
            "/linux/memoryPolicy",
            json!({}),
            "invalid memory policy mode \"\"",
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_DEFAULT", "nodes": "0-7"}),
            "memory policy mode requires 0 nodes but got 8",
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["x"]}),
            "invalid memory policy flag \"x\"",
        ),
        (
            "/linux/personality",
            json!({"domain": "BSD"}),
            "invalid personality domain BSD",
        ),
        (
            "/linux/netDevices",
            json!({"a/b": {}}),
            "invalid network device name \"a/b\"",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "nice": 20}),
            "invalid scheduler.nice: 20 when scheduler.policy is SCHED_OTHER",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_BATCH", "priority": 3}),
            "scheduler.priority can only be specified for SchedFIFO or SchedRR policy",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "deadline": 3}),
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            "invalid ioPriority.Priority: 8",
        ),
        (
            "/process/execCPUAffinity",
            json!({"initial": "3-1"}),
            "bad CPUAffinity.Initial: invalid range: 3-1",
        ),
        (
            "/root/path",
            json!("link"),
            "not an absolute path, or a symlink",
        ),
        (
            "/linux/sysctl",
            json!({"kernel.shm_rmid_forced=1+kernel.core_pattern": "x"}),
            "invalid name or value",
        ),
    ];
    if !Path::new("/sys/fs/resctrl/info").exists() {
        let want = "intelRdt is specified in config, but Intel RDT is not enabled";
        cases.push(("/linux/intelRdt", json!({"closID": "c"}), want));
    }
    for (member, value, want) in cases {
        let config = shell(&bench, "true").set(member, value.clone());
        let bundle = bundle(&bench, &config)?;
        let link = PathBuf::from(&bundle).join("link");
        if !link.exists() {
            std::os::unix::fs::symlink("rootfs", link)?;
        }
        let error = refused(&coracle, &bundle)?;
        ensure!(error.contains(want), "{member} {value}: {error}");
    }
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}

#[test]
fn sysctl_of_the_callers_network_joined_by_path_is_refused() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = shell(&bench, "true")
        .set(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "uts"},
                {"type": "network", "path": "/proc/self/ns/net"}]),
        )
        .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    let bundle = bundle(&bench, &config)?;
    let error = refused(&coracle, &bundle)?;
    ensure!(
        error.contains("\"net.ipv4.ip_forward\" not allowed in host network namespace"),
        "{error}"
    );
    bench.finish()
}

#[test]
fn poststart_hook_that_fails_ends_the_container() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let hooks = json!([{"path": "/bin/true"}, {"path": "/bin/false"}]);
    let config = shell(&bench, "sleep 60").set("/hooks/poststart", hooks);
    let bundle = bundle(&bench, &config)?;
    coracle.detached(&["create", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let error = coracle.refused(&["start", "c"])?;
    ensure!(error.contains("error running poststart hook #1"), "{error}");
    coracle.wait_status("c", "stopped")?;
    coracle.run(&["delete", "c"])?;
    bench.finish()
}

#[test]
fn poststop_hook_that_fails_does_not_change_the_programs_code() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let hooks = json!([{"path": "/bin/false"}]);
    let config = shell(&bench, "exit 7").set("/hooks/poststop", hooks);
    let bundle = bundle(&bench, &config)?;
    let output = coracle.try_run(&["run", "-b", &bundle, "c"])?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(error.contains("error running poststop hook #0"), "{error}");
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}

#[test]
fn mappings_given_with_a_joined_user_namespace_must_be_its_own() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    // Nothing else is joined from it; it maps root alone.
    let mut holder = Command::new("unshare")
        .args(["--user", "--map-root-user", "sleep", "60"])
        .spawn()?;
    let path = format!("/proc/{}/ns/user", holder.id());
    let mapped = wait_for("the maps", Duration::from_secs(10), || {
        let map = std::fs::read_to_string(format!("/proc/{}/gid_map", holder.id()))?;
        Ok((!map.is_empty()).then_some(()))
    });
    let run = |host: u32| -> Result<std::process::Output> {
        let map = json!([{"containerID": 0, "hostID": host, "size": 1}]);
        let config = shell(&bench, "true")
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map)
            .set("/mounts", json!([]))
            .set("/linux/maskedPaths", json!([]))
            .set("/linux/readonlyPaths", json!([]))
            .set(
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "uts"}, {"type": "pid"},
                    {"type": "user", "path": path}]),
            );
        coracle.try_run(&["run", "-b", &bundle(&bench, &config)?, "c"])
    };
    let outcome = mapped.and_then(|()| Ok((run(0)?, run(1000)?)));
    holder.kill()?;
    holder.wait()?;
    let (same, other) = outcome?;
    ensure!(same.status.success(), "{same:?}");
    let warned = String::from_utf8_lossy(&same.stderr);
    ensure!(warned.contains("both a userns path to join"), "{warned}");
    let error = String::from_utf8_lossy(&other.stderr);
    ensure!(
        !other.status.success() && error.contains("non-matching mapping"),
        "{error}"
    );
    bench.finish()
}

/// Other platforms' members and unknown ones say nothing to Linux; what is deprecated is told.
#[test]
fn what_is_not_for_this_platform_is_passed_over() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = shell(&bench, "echo here")
        .set("/vm", json!({"kernel": {}}))
        .set("/windows", json!({"ignoreFlushesDuringBoot": true}))
        .set("/solaris", json!({"milestone": "x"}))
        .set("/process/commandLine", json!("cmd.exe"))
        .set("/process/future", json!([1]))
        .set("/linux/future", json!({"x": 1}))
        .set(
            "/linux/devices",
            json!([{"type": "c", "major": 1, "minor": 3}]),
        )
        .set("/ociVersion", json!("99.0.0"))
        .set("/linux/seccomp", json!({}))
        .set(
            "/linux/personality",
            json!({"domain": "LINUX", "flags": ["X"]}),
        );
    let bundle = bundle(&bench, &config)?;
    let output = coracle.try_run(&["run", "-b", &bundle, "c"])?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && output.stdout == b"here\n",
        "{error}"
    );
    ensure!(
        error.contains("ignoring unsupported personality flags: [X]"),
        "{error}"
    );
    bench.finish()
}
