//! Every request of the task service: twice, too late, for nobody, and what it really does to a
//! container; the daemon's event service going away and coming back.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use prost::Message;
use support::proto::containerd::runc::v1::{Options, ProcessDetails};
use support::proto::containerd::task::v2 as task;
use support::proto::io::containerd::cgroups::{v1, v2};
use support::*;

mod events {
    include!("support/events.rs");
}

fn script(path: &Path, body: &str) {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn finish(mut pod: Pod, container: &str) {
    let _ = pod.kill(container, "", 9);
    pod.wait(container, "").unwrap();
    pod.delete(container, "").unwrap();
    pod.shutdown();
}

fn fifo(pod: &Pod, name: &str) -> String {
    let path = pod.dir.join(name).display().to_string();
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    path
}

/// A directory of this container's cgroup, in the hierarchy of `controller` or the unified one.
fn cgroup_of(pid: u32, controller: &str) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    for line in text.lines() {
        let fields: Vec<&str> = line.splitn(3, ':').collect();
        if fields[1].split(',').any(|c| c == controller) {
            return Path::new("/sys/fs/cgroup")
                .join(fields[1])
                .join(&fields[2][1..]);
        }
    }
    let path = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap();
    Path::new("/sys/fs/cgroup").join(path)
}

#[test]
fn requests_for_nobody_are_told_so_by_both_services() {
    let Some(mut pod) = Pod::new("nobody") else {
        return;
    };
    let id = task::StateRequest {
        id: "nobody".to_owned(),
        exec_id: String::new(),
    };
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        for method in [
            "State",
            "Start",
            "Delete",
            "Pids",
            "Pause",
            "Resume",
            "Checkpoint",
            "Kill",
            "Exec",
            "ResizePty",
            "CloseIO",
            "Update",
            "Wait",
            "Stats",
        ] {
            // In each of these requests the first field is the container's id.
            pod.client.send(service, method, &id, &[]);
            let error = pod.client.receive::<()>().unwrap_err();
            assert_eq!(error.code, 5, "{service}/{method}: {error:?}");
            assert!(error.message.contains("nobody"), "{method}: {error:?}");
        }
        // A daemon asks so whether the shim lives.
        pod.client.send(service, "Connect", &id, &[]);
        let answer: task::ConnectResponse = pod.client.receive().unwrap();
        assert_eq!(answer.task_pid, 0);
        assert!(alive(answer.shim_pid) && !answer.version.is_empty());
    }
    pod.shutdown();
}

#[test]
fn requests_that_come_again_or_too_late_change_nothing() {
    let Some(mut pod) = Pod::new("again") else {
        return;
    };
    let config = pod.config("a", "sleep 100");
    let request = pod.request("a", &config);
    let pid = pod.create(&request).unwrap();
    assert_eq!(pod.create(&request).unwrap_err().code, 6);
    pod.start("a", "").unwrap();
    assert_eq!(pod.start("a", "").unwrap_err().code, 9);
    assert_eq!(pod.delete("a", "").unwrap_err().code, 9);
    // A shim with a task stays, however often it is told to go.
    let shutdown = task::ShutdownRequest {
        id: pod.id("a"),
        now: true,
    };
    for _ in 0..2 {
        pod.client.call::<()>("Shutdown", &shutdown).unwrap();
    }
    let exec = pod.exec_request("a", "e", "exit 3");
    pod.client.call::<()>("Exec", &exec).unwrap();
    assert_eq!(pod.client.call::<()>("Exec", &exec).unwrap_err().code, 6);
    assert_eq!(pod.kill("a", "e", 9).unwrap_err().code, 9);
    pod.start("a", "e").unwrap();
    assert_eq!(pod.start("a", "e").unwrap_err().code, 9);
    for _ in 0..2 {
        assert_eq!(pod.wait("a", "e").unwrap(), 3);
        assert_eq!(pod.kill("a", "e", 9).unwrap_err().code, 5);
    }
    assert_eq!(pod.delete("a", "e").unwrap().exit_status, 3);
    assert_eq!(pod.delete("a", "e").unwrap_err().code, 5);
    assert_eq!(pod.wait("a", "e").unwrap_err().code, 5);
    let pause = task::PauseRequest { id: pod.id("a") };
    let resume = task::ResumeRequest { id: pod.id("a") };
    assert_eq!(
        pod.client.call::<()>("Resume", &resume).unwrap_err().code,
        9
    );
    pod.kill("a", "", 9).unwrap();
    for _ in 0..2 {
        assert_eq!(pod.wait("a", "").unwrap(), 137);
        assert_eq!(pod.kill("a", "", 9).unwrap_err().code, 5);
        assert_eq!(pod.client.call::<()>("Pause", &pause).unwrap_err().code, 9);
        let state = pod.state("a").unwrap();
        assert_eq!((state.pid, state.status, state.exit_status), (pid, 3, 137));
    }
    assert_eq!(pod.client.call::<()>("Exec", &exec).unwrap_err().code, 9);
    assert_eq!(pod.delete("a", "").unwrap().exit_status, 137);
    assert_eq!(pod.delete("a", "").unwrap_err().code, 5);
    assert_eq!(pod.wait("a", "").unwrap_err().code, 5);
    pod.shutdown();
}

#[test]
fn events_wait_for_a_daemon_that_is_away_and_come_in_order() {
    let mut daemon = events::Daemon::absent();
    let Some(mut pod) = Pod::by(
        "away",
        daemon.address(),
        Command::new(shim_program()),
        |_| {},
    ) else {
        return;
    };
    // Nobody listens.
    pod.run("a", "sleep 100");
    let mut want = vec!["/tasks/create A".to_owned(), "/tasks/start A".to_owned()];
    for n in 0..20 {
        let exec = format!("e{n}");
        let request = pod.exec_request("a", &exec, &format!("exit {n}"));
        pod.client.call::<()>("Exec", &request).unwrap();
        pod.start("a", &exec).unwrap();
        assert_eq!(pod.wait("a", &exec).unwrap(), n);
        pod.delete("a", &exec).unwrap();
        want.push(format!("/tasks/exec-added A {exec}"));
        want.push(format!("/tasks/exec-started A {exec}"));
        want.push(format!("/tasks/exit A {exec} {n}"));
    }
    // It comes, goes in the midst of an event, and comes back.
    daemon.serve(10);
    daemon.gone();
    assert_eq!(daemon.lines().len(), 10);
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    want.push("/tasks/exit A A 137".to_owned());
    pod.delete("a", "").unwrap();
    want.push("/tasks/delete A".to_owned());
    daemon.serve(usize::MAX);
    wait_until("every event", || daemon.lines().len() >= want.len());
    let id = pod.id("a");
    let told: Vec<String> = daemon.lines().iter().map(|l| l.replace(&id, "A")).collect();
    assert_eq!(told, want);
    pod.shutdown();
}

#[test]
fn out_of_memory_is_told_before_the_exit() {
    let daemon = events::Daemon::start();
    let Some(mut pod) = Pod::by(
        "oomevent",
        daemon.address(),
        Command::new(shim_program()),
        |_| {},
    ) else {
        return;
    };
    // The first process survives: the kill is told while the container runs.
    let script = "sh -c 'a=x; while :; do a=$a$a; done'; echo survived; sleep 100";
    let mut config = pod.config("a", script);
    config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 16 << 20});
    let request = pod.request("a", &config);
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    wait_until("the kill to be told", || {
        daemon.topics().contains(&"/tasks/oom".to_owned())
    });
    assert_eq!(pod.state("a").unwrap().status, 2);
    assert!(pod.status("a").oom_killed);
    wait_until("the survivor", || !pod.lines("a").is_empty());
    let id = pod.id("a");
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
    let told: Vec<String> = daemon.lines().iter().map(|l| l.replace(&id, "A")).collect();
    let want = [
        "/tasks/create A",
        "/tasks/start A",
        "/tasks/oom A",
        "/tasks/exit A A 137",
        "/tasks/delete A",
    ];
    assert_eq!(told, want);
}

#[test]
fn pause_freezes_and_resume_goes_on() {
    let daemon = events::Daemon::start();
    let Some(mut pod) = Pod::by(
        "frozen",
        daemon.address(),
        Command::new(shim_program()),
        |_| {},
    ) else {
        return;
    };
    let pid = pod.run(
        "a",
        "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done",
    );
    wait_until("output", || {
        pod.log("a").exists() && pod.lines("a").len() > 3
    });
    let pause = task::PauseRequest { id: pod.id("a") };
    let resume = task::ResumeRequest { id: pod.id("a") };
    pod.client.call::<()>("Pause", &pause).unwrap();
    assert_eq!(pod.state("a").unwrap().status, 4);
    let freezer = cgroup_of(pid, "freezer");
    let frozen = fs::read_to_string(freezer.join("freezer.state"))
        .or_else(|_| fs::read_to_string(freezer.join("cgroup.freeze")));
    assert!(matches!(frozen.unwrap().trim(), "FROZEN" | "1"));
    assert_eq!(pod.client.call::<()>("Pause", &pause).ok(), Some(()));
    let before = pod.lines("a").len();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(pod.lines("a").len(), before);
    // Looking at a frozen container does not wait for it.
    let stats: task::StatsResponse = pod
        .client
        .call("Stats", &task::StatsRequest { id: pod.id("a") })
        .unwrap();
    assert!(stats.stats.is_some());
    pod.client.call::<()>("Resume", &resume).unwrap();
    assert_eq!(pod.state("a").unwrap().status, 2);
    wait_until("output to go on", || pod.lines("a").len() > before);
    // Killed while it is frozen.
    pod.client.call::<()>("Pause", &pause).unwrap();
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    pod.delete("a", "").unwrap();
    pod.shutdown();
    let want = [
        "create", "start", "paused", "resumed", "paused", "exit", "delete",
    ];
    assert_eq!(daemon.topics(), want.map(|t| format!("/tasks/{t}")));
}

#[test]
fn processes_are_listed_with_their_execs() {
    let Some(mut pod) = Pod::new("pids") else {
        return;
    };
    let init = pod.run("a", "sleep 100 & wait");
    let request = pod.exec_request("a", "e1", "exec sleep 100");
    pod.client.call::<()>("Exec", &request).unwrap();
    let exec = pod.start("a", "e1").unwrap();
    let ask = task::PidsRequest { id: pod.id("a") };
    let mut listed = Vec::new();
    wait_until("three processes", || {
        let answer: task::PidsResponse = pod.client.call("Pids", &ask).unwrap();
        listed = answer.processes;
        listed.len() == 3
    });
    for process in listed {
        let named = process.info.map(|any| {
            assert_eq!(any.type_url, "containerd.runc.v1.ProcessDetails");
            ProcessDetails::decode(any.value.as_slice())
                .unwrap()
                .exec_id
        });
        let want = (process.pid == exec).then(|| "e1".to_owned());
        assert_eq!(named, want, "{}", process.pid);
        assert!(alive(process.pid));
        assert!(
            process.pid == init
                || process.pid == exec
                || namespace_of(process.pid) == namespace_of(init)
        );
    }
    finish(pod, "a");
}

fn namespace_of(pid: u32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap()
}

#[test]
fn update_takes_the_specs_resources_as_json() {
    let Some(mut pod) = Pod::new("updates") else {
        return;
    };
    let pid = pod.run("a", "sleep 100");
    let limit = |pid: u32| {
        let dir = cgroup_of(pid, "memory");
        let text = fs::read_to_string(dir.join("memory.limit_in_bytes"))
            .or_else(|_| fs::read_to_string(dir.join("memory.max")));
        text.map(|t| t.trim().to_owned())
    };
    let before = limit(pid);
    if before.is_err() {
        say_skipped("needs the memory controller");
        return finish(pod, "a");
    }
    let json = r#"{"memory":{"limit":33554432},"cpu":{"shares":512,"quota":50000,"period":100000},"pids":{"limit":77}}"#;
    pod.resources("a", json).unwrap();
    assert_eq!(limit(pid).unwrap(), "33554432");
    let pids = cgroup_of(pid, "pids").join("pids.max");
    assert_eq!(fs::read_to_string(pids).unwrap(), "77\n");
    let error = pod.resources("a", "{").unwrap_err();
    assert_eq!(
        (error.code, error.message.contains("not JSON")),
        (3, true),
        "{error:?}"
    );
    // The runtime's own words, and nothing changed. (cgroup v2 would take a memory limit of 1, and kill.)
    let refused = r#"{"cpu":{"quota":1,"period":100000}}"#;
    let error = pod.resources("a", refused).unwrap_err();
    assert!(error.message.contains("update failed"), "{error:?}");
    assert_eq!(limit(pid).unwrap(), "33554432");
    finish(pod, "a");
}

#[test]
fn stats_are_those_of_the_container() {
    let Some(mut pod) = Pod::new("stats") else {
        return;
    };
    let script = "sleep 100 & i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; wait";
    let mut config = pod.config("a", script);
    let resources = &mut config["linux"]["resources"];
    resources["memory"] = serde_json::json!({"limit": 64 << 20});
    resources["pids"] = serde_json::json!({"limit": 44});
    let request = pod.request("a", &config);
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    wait_until("work", || {
        pod.log("a").exists() && !pod.lines("a").is_empty()
    });
    let ask = task::StatsRequest { id: pod.id("a") };
    let answer: task::StatsResponse = pod.client.call("Stats", &ask).unwrap();
    let any = answer.stats.unwrap();
    if any.type_url == "io.containerd.cgroups.v1.Metrics" {
        let m = v1::Metrics::decode(any.value.as_slice()).unwrap();
        let pids = m.pids.unwrap();
        assert_eq!((pids.current, pids.limit), (2, 44));
        let usage = m.cpu.unwrap().usage.unwrap();
        assert!(
            usage.total > 1_000_000 && !usage.per_cpu.is_empty(),
            "{usage:?}"
        );
        let memory = m.memory.unwrap();
        let entry = memory.usage.unwrap();
        assert_eq!(entry.limit, 64 << 20);
        assert!(entry.usage > 0 && entry.max >= entry.usage, "{entry:?}");
        assert_eq!(memory.hierarchical_memory_limit, 64 << 20);
    } else {
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let m = v2::Metrics::decode(any.value.as_slice()).unwrap();
        assert_eq!(m.pids.map(|p| (p.current, p.limit)), Some((2, 44)));
        assert!(m.cpu.unwrap().usage_usec > 1000);
        assert_eq!(m.memory.unwrap().usage_limit, 64 << 20);
    }
    finish(pod, "a");
}

/// A shim that sees the unified hierarchy alone, as on a newer system.
fn unified() -> Command {
    let mut command = Command::new("unshare");
    let view = "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";
    command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        view,
        "sh",
    ]);
    command.arg(shim_program());
    command
}

/// Where the unified hierarchy is on this machine.
fn unified_point() -> Option<PathBuf> {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(PathBuf::from)
        .into_iter()
        .find(|p| p.join("cgroup.controllers").exists())
}

#[test]
fn stats_and_freezer_of_the_unified_hierarchy() {
    let Some(point) = unified_point() else {
        return say_skipped("no unified hierarchy");
    };
    let Some(mut pod) = Pod::by("unified", "", unified(), |o| {
        o.shim_cgroup = "/coracle-shim-v2/own".into()
    }) else {
        return;
    };
    let shim = pod.shim_pid();
    let text = fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
    assert!(
        text.lines().any(|l| l == "0::/coracle-shim-v2/own"),
        "{text}"
    );
    let mut config = pod.config(
        "a",
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 100",
    );
    // The controllers are in use elsewhere.
    config["linux"]["resources"] =
        serde_json::json!({"devices": [{"allow": false, "access": "rwm"}]});
    let request = pod.request("a", &config);
    let pid = pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    wait_until("work", || {
        pod.log("a").exists() && !pod.lines("a").is_empty()
    });
    let ask = task::StatsRequest { id: pod.id("a") };
    let answer: task::StatsResponse = pod.client.call("Stats", &ask).unwrap();
    let any = answer.stats.unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    let m = v2::Metrics::decode(any.value.as_slice()).unwrap();
    assert!(m.cpu.unwrap().usage_usec > 1000);
    let ask = task::PidsRequest { id: pod.id("a") };
    let pids: task::PidsResponse = pod.client.call("Pids", &ask).unwrap();
    assert!(pids.processes.iter().any(|p| p.pid == pid));
    let pause = task::PauseRequest { id: pod.id("a") };
    pod.client.call::<()>("Pause", &pause).unwrap();
    let own = point.join(format!("coracle-shim-{}", pod.id("a")));
    let events = fs::read_to_string(own.join("cgroup.events")).unwrap();
    assert!(events.contains("frozen 1"), "{events}");
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    pod.delete("a", "").unwrap();
    assert!(!own.exists());
    pod.shutdown();
    for dir in ["coracle-shim-v2/own", "coracle-shim-v2"] {
        wait_until("the shim's cgroup to empty", || {
            fs::remove_dir(point.join(dir)).is_ok()
        });
    }
}

#[test]
fn shim_lives_in_the_cgroup_that_is_asked_for() {
    let name = format!("/coracle-shim-own-{}", std::process::id());
    let path = format!("{name}/below");
    let Some(mut pod) = Pod::by("shimcgroup", "", Command::new(shim_program()), |o| {
        o.shim_cgroup = path.clone()
    }) else {
        return;
    };
    let shim = pod.shim_pid();
    let text = fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
    let places: Vec<&str> = text
        .lines()
        .filter_map(|l| l.splitn(3, ':').nth(2))
        .collect();
    assert!(places.contains(&path.as_str()), "{text}");
    // Not so the containers.
    let pid = pod.run("a", "sleep 100");
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(!text.contains(&name), "{text}");
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
    let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
    hierarchies.extend(
        fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .flatten()
            .map(|e| e.path()),
    );
    for hierarchy in hierarchies {
        for dir in [&path, &name] {
            let dir = hierarchy.join(&dir[1..]);
            wait_until("the shim's cgroup to empty", || {
                !dir.exists() || fs::remove_dir(&dir).is_ok()
            });
        }
    }
}

#[test]
fn options_reach_the_runtime() {
    let Some(mut pod) = Pod::new("options") else {
        return;
    };
    // Notes its calls, and is the real one for all but the flag that needs systemd.
    let (wrapper, calls) = (pod.dir.join("recorder"), pod.dir.join("calls"));
    let real = pod.runtime_path();
    script(
        &wrapper,
        &format!(
            "echo \"$*\" >> {}\nfor a; do shift; case $a in --systemd-cgroup) ;; *) set -- \"$@\" \"$a\";; esac; done\nexec {} \"$@\"",
            calls.display(),
            real.display()
        ),
    );
    let options = Options {
        binary_name: wrapper.display().to_string(),
        root: pod.dir.join("runtime").display().to_string(),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        ..Default::default()
    };
    let mut request = pod.request("a", &pod.config("a", "sleep 100"));
    request.options = Some(options_any(&options));
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let exec = pod.exec_request("a", "e", "true");
    pod.client.call::<()>("Exec", &exec).unwrap();
    pod.start("a", "e").unwrap();
    pod.wait("a", "e").unwrap();
    pod.resources("a", r#"{"pids":{"limit":99}}"#).unwrap();
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    let text = fs::read_to_string(&calls).unwrap();
    let root = format!("--root {}/test ", pod.dir.join("runtime").display());
    for verb in [" create ", " start ", " exec ", " update ", " delete "] {
        let line = text.lines().find(|l| format!("{l} ").contains(verb));
        let line = line.unwrap_or_else(|| panic!("no {verb} in {text}"));
        assert!(
            line.contains("--systemd-cgroup ") && line.contains(&root),
            "{line}"
        );
    }
    let create = text.lines().find(|l| l.contains(" create ")).unwrap();
    assert!(
        create.contains(" --no-pivot ") && create.contains(" --no-new-keyring "),
        "{create}"
    );
    // Also for whoever cleans up after a dead shim.
    pod.create(&request).unwrap();
    fs::write(&calls, "").unwrap();
    let shim = pod.shim_pid();
    kill(shim, 9);
    wait_until("the shim to die", || !alive(shim));
    shim_delete(&pod.bundle("a"), &pod.id("a"));
    let text = fs::read_to_string(&calls).unwrap();
    assert!(
        text.contains("--systemd-cgroup") && text.contains(&root),
        "{text}"
    );
    pod.restart_shim();
    pod.shutdown();
}

#[test]
fn input_ends_with_close_io_and_the_last_writer() {
    let Some(mut pod) = Pod::new("closeio") else {
        return;
    };
    let mut request = pod.request("a", &pod.config("a", "cat; echo end"));
    request.stdin = fifo(&pod, "in");
    request.stdout = fifo(&pod, "out");
    request.stderr = String::new();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let mut out = fs::File::open(&request.stdout).unwrap();
    let mut writer = fs::File::create(&request.stdin).unwrap();
    writer.write_all(b"one ").unwrap();
    let close = task::CloseIoRequest {
        id: pod.id("a"),
        exec_id: String::new(),
        stdin: true,
    };
    // Twice, and what a writer still has is delivered.
    pod.client.call::<()>("CloseIO", &close).unwrap();
    pod.client.call::<()>("CloseIO", &close).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(pod.state("a").unwrap().status, 2);
    writer.write_all(b"two ").unwrap();
    drop(writer);
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    let mut text = String::new();
    pod.delete("a", "").unwrap();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one two end\n");
    // After the end it is no error either, nor for a process without input.
    pod.run("b", "sleep 100");
    let close = task::CloseIoRequest {
        id: pod.id("b"),
        ..close
    };
    pod.client.call::<()>("CloseIO", &close).unwrap();
    finish(pod, "b");
}

#[test]
fn terminal_exec_over_fifos_is_resized() {
    let Some(mut pod) = Pod::new("fifotty") else {
        return;
    };
    pod.run("a", "sleep 100");
    let mut request = pod.exec_request("a", "e", "read x; busybox stty size; exit 6");
    request.terminal = true;
    request.stdin = fifo(&pod, "in");
    request.stdout = fifo(&pod, "out");
    pod.client.call::<()>("Exec", &request).unwrap();
    // A client may ask before the process is there.
    let mut resize = task::ResizePtyRequest {
        id: pod.id("a"),
        exec_id: "e".to_owned(),
        width: 1,
        height: 1,
    };
    pod.client.call::<()>("ResizePty", &resize).unwrap();
    pod.start("a", "e").unwrap();
    for (width, height) in [(10, 20), (111, 44)] {
        (resize.width, resize.height) = (width, height);
        pod.client.call::<()>("ResizePty", &resize).unwrap();
    }
    let mut out = fs::File::open(&request.stdout).unwrap();
    let mut writer = fs::File::create(&request.stdin).unwrap();
    writer.write_all(b"go\n").unwrap();
    assert_eq!(pod.wait("a", "e").unwrap(), 6);
    assert_eq!(
        pod.client
            .call::<()>("ResizePty", &resize)
            .unwrap_err()
            .code,
        5
    );
    pod.delete("a", "e").unwrap();
    drop(writer);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "go\r\n44 111\r\n");
    finish(pod, "a");
}

/// Runs a container with a terminal whose output goes to this address.
fn on_terminal(pod: &mut Pod, address: &str) -> Result<u32, Refused> {
    let script = "busybox tty > /dev/null && echo on a terminal; echo e >&2";
    let mut config = pod.config("a", script);
    config["process"]["terminal"] = true.into();
    let mut request = pod.request("a", &config);
    request.terminal = true;
    request.stdout = address.to_owned();
    request.stderr = String::new();
    pod.create(&request)?;
    pod.start("a", "")?;
    let status = pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    Ok(status)
}

#[test]
fn terminals_are_logged_to_binaries_and_files() {
    let Some(mut pod) = Pod::new("ttylog") else {
        return;
    };
    let fds = open_fds(pod.shim_pid());
    let (logger, out) = (pod.dir.join("logger"), pod.dir.join("logged"));
    let body = |ready: &str| {
        let out = out.display();
        format!(
            "{ready}\necho \"$CONTAINER_ID\" > {out}; cat <&3 >> {out}; cat <&4 >> {out}; echo end >> {out}"
        )
    };
    let want = format!("{}\non a terminal\r\ne\r\nend\n", pod.id("a"));
    for (scheme, ready) in [
        ("binary", "exec 5>&-"),
        ("binary-v2", "printf x >&5; exec 5>&-"),
    ] {
        script(&logger, &body(ready));
        let address = format!("{scheme}://{}", logger.display());
        assert_eq!(on_terminal(&mut pod, &address).unwrap(), 0);
        wait_until("the logger", || {
            fs::read_to_string(&out).is_ok_and(|t| t == want)
        });
        fs::remove_file(&out).unwrap();
    }
    // Silence is no word.
    script(&logger, &body("exec 5>&-"));
    let error = on_terminal(&mut pod, &format!("binary-v2://{}", logger.display())).unwrap_err();
    assert!(
        error.message.contains("did not say that it is ready"),
        "{error:?}"
    );
    // A file, in a directory that is not there yet.
    let file = pod.dir.join("new/dir/log");
    let address = format!("file://{}", file.display());
    for _ in 0..2 {
        assert_eq!(on_terminal(&mut pod, &address).unwrap(), 0);
    }
    wait_until("the file", || {
        let text = fs::read_to_string(&file).unwrap();
        text == "on a terminal\r\ne\r\n".repeat(2)
    });
    wait_until("descriptors to be closed", || {
        open_fds(pod.shim_pid()) == fds
    });
    pod.shutdown();
}

#[test]
fn one_file_takes_both_streams_and_says_how_they_come() {
    let Some(mut pod) = Pod::new("filelog") else {
        return;
    };
    let file = pod.dir.join("log");
    fs::write(&file, "before\n").unwrap();
    let mut request = pod.request("a", &pod.config("a", "echo o; sleep 0.2; echo e >&2"));
    request.stdout = format!("file://{}", file.display());
    for stderr in [String::new(), request.stdout.clone()] {
        request.stderr = stderr;
        pod.create(&request).unwrap();
        pod.start("a", "").unwrap();
        assert_eq!(pod.wait("a", "").unwrap(), 0);
        pod.delete("a", "").unwrap();
    }
    wait_until("the file", || {
        fs::read_to_string(&file).unwrap() == "before\no\ne\no\ne\n"
    });
    pod.shutdown();
}
