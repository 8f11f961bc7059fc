//! Tasks from Create to Delete, wrong requests, execs, events and the death of the shim.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use support::proto::containerd::task::v2 as task;
use support::*;

#[test]
fn task_runs_and_leaves_nothing() {
    let Some(mut pod) = Pod::new("life") else {
        return;
    };
    let request = pod.request("a", &pod.config("a", "echo out; echo err >&2; exit 7"));
    let pid = pod.create(&request).unwrap();
    assert!(pid > 0 && alive(pid));
    assert_eq!(
        fs::read_to_string(pod.bundle("a").join("init.pid")).unwrap(),
        pid.to_string()
    );
    assert_eq!(pod.state("a").unwrap().status, 1);
    assert_eq!(pod.start("a", "").unwrap(), pid);
    assert_eq!(pod.wait("a", "").unwrap(), 7);
    // After the exit: Wait again, State, no Kill.
    assert_eq!(pod.wait("a", "").unwrap(), 7);
    let state = pod.state("a").unwrap();
    assert_eq!((state.status, state.exit_status, state.pid), (3, 7, pid));
    assert_eq!(pod.kill("a", "", 9).unwrap_err().code, 5);
    let exit: serde_json::Value =
        serde_json::from_slice(&fs::read(pod.bundle("a").join("exit.json")).unwrap()).unwrap();
    assert_eq!(
        (exit["pid"].as_u64(), exit["exit_status"].as_u64()),
        (Some(pid.into()), Some(7))
    );
    assert_eq!(exit["oom_killed"], false);
    assert_eq!(pod.lines("a"), ["stdout F out", "stderr F err"]);
    let status = pod.status("a");
    assert!(status.started_at.is_some() && status.exited_at.is_some());
    let deleted = pod.delete("a", "").unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 7));
    assert_eq!(pod.delete("a", "").unwrap_err().code, 5);
    assert_eq!(pod.state("a").unwrap_err().code, 5);
    pod.shutdown();
}

#[test]
fn task_goes_on_from_the_images_of_a_checkpoint() {
    let check = std::process::Command::new("criu").arg("check").output();
    if !check.is_ok_and(|output| output.status.success()) {
        return support::say_skipped("needs a criu that works on this kernel");
    }
    let Some(mut pod) = Pod::new("goes-on") else {
        return;
    };
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
    let count = |pod: &Pod| -> u64 {
        let line = pod.lines("a").pop().unwrap_or_default();
        line.rsplit(' ')
            .next()
            .unwrap_or_default()
            .parse()
            .unwrap_or(0)
    };
    let counts_beyond = |pod: &Pod, before: u64| {
        let end = Instant::now() + Duration::from_secs(20);
        while count(pod) <= before {
            assert!(Instant::now() < end, "{:?}", pod.lines("a"));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let first = pod.run("a", script);
    counts_beyond(&pod, 0);
    let images = pod.dir.join("images");
    pod.checkpoint("a", &images).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    assert_eq!(pod.delete("a", "").unwrap().pid, first);
    assert!(!pod.bundle("a").join("criu-work").exists());
    let stopped = count(&pod);

    let mut request = pod.request("a", &pod.config("a", script));
    request.checkpoint = images.display().to_string();
    assert_eq!(pod.create(&request).unwrap(), 0);
    let second = pod.start("a", "").unwrap();
    assert!(alive(second) && pod.state("a").unwrap().pid == second);
    // It writes to the pipes of its new life, and begins nothing anew.
    counts_beyond(&pod, stopped);
    assert!(
        !pod.lines("a")
            .iter()
            .skip(1)
            .any(|line| line == "stdout F 1")
    );
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    assert_eq!(pod.delete("a", "").unwrap().pid, second);
    pod.shutdown();
}

#[test]
fn task_from_images_that_cannot_be_restored_can_be_deleted() {
    let Some(mut pod) = Pod::new("images") else {
        return;
    };
    let mut request = pod.request("a", &pod.config("a", "sleep 100"));
    request.checkpoint = pod.dir.join("images").display().to_string();
    // Nothing runs before the start.
    assert_eq!(pod.create(&request).unwrap(), 0);
    assert_eq!(pod.state("a").unwrap().pid, 0);
    for text in ["OCI runtime restore failed: ", "restore has failed before"] {
        let error = pod.start("a", "").unwrap_err();
        assert!(error.message.contains(text), "{error:?}");
    }
    let deleted = pod.delete("a", "").unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (0, 0));
    assert_eq!(pod.state("a").unwrap_err().code, 5);
    pod.shutdown();
}

#[test]
fn wrong_requests_are_refused_by_name_and_leave_nothing() {
    let Some(mut pod) = Pod::new("wrong") else {
        return;
    };
    let good = pod.request("a", &pod.config("a", "sleep 100"));
    let fds = open_fds(pod.shim_pid());
    type Change<'a> = &'a dyn Fn(&mut task::CreateTaskRequest);
    let refused = |pod: &mut Pod, change: Change<'_>| {
        let mut request = good.clone();
        change(&mut request);
        pod.create(&request).unwrap_err()
    };
    let cases: [(i32, &str, Change<'_>); 9] = [
        (3, "../x", &|r| r.id = "../x".into()),
        (3, "not absolute", &|r| r.bundle = "rel".into()),
        (3, "/nonexistent/config.json", &|r| {
            r.bundle = "/nonexistent".into()
        }),
        (3, "foo.Bar", &|r| {
            r.options.as_mut().unwrap().type_url = "foo.Bar".into()
        }),
        (3, "some/images", &|r| r.checkpoint = "some/images".into()),
        (3, "ftp://x", &|r| r.stdout = "ftp://x".into()),
        (3, "no descriptor", &|r| r.stdout = "fd:".into()),
        (13, "/nonexistent/log", &|r| {
            r.stdout = "cri-log:///nonexistent/log".into();
            r.stderr = r.stdout.clone();
        }),
        (12, "loop", &|r| r.rootfs[0].options.push("loop".into())),
    ];
    for (code, text, change) in cases {
        let error = refused(&mut pod, change);
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.message.contains(text), "{error:?}");
    }
    // A runtime that refuses: its words, and everything undone.
    let mut bad = pod.config("a", "true");
    bad["process"]["args"] = serde_json::json!(["/nonexistent"]);
    let request = pod.request("a", &bad);
    let error = pod.create(&request).unwrap_err();
    assert!(
        error.message.starts_with("OCI runtime create failed: "),
        "{error:?}"
    );
    assert!(error.message.contains("/nonexistent"), "{error:?}");
    assert_eq!(pod.state("a").unwrap_err().code, 5);
    // Unknown calls.
    let state = task::StateRequest::default();
    pod.client
        .send("containerd.task.v3.Task", "State", &state, &[]);
    assert_eq!(
        pod.client
            .receive::<task::StateResponse>()
            .unwrap_err()
            .code,
        5
    );
    pod.client
        .send("containerd.task.v9.Task", "State", &state, &[]);
    assert_eq!(
        pod.client
            .receive::<task::StateResponse>()
            .unwrap_err()
            .code,
        12
    );
    assert_eq!(open_fds(pod.shim_pid()), fds);
    pod.shutdown();
}

#[test]
fn states_decide_what_is_allowed() {
    let Some(mut pod) = Pod::new("states") else {
        return;
    };
    let request = pod.request("a", &pod.config("a", "sleep 100"));
    pod.create(&request).unwrap();
    assert_eq!(pod.create(&request).unwrap_err().code, 6);
    let id = pod.id("a");
    let pause = task::PauseRequest { id: id.clone() };
    assert_eq!(pod.client.call::<()>("Pause", &pause).unwrap_err().code, 9);
    pod.start("a", "").unwrap();
    assert_eq!(pod.start("a", "").unwrap_err().code, 9);
    assert_eq!(pod.delete("a", "").unwrap_err().code, 9);
    pod.client.call::<()>("Pause", &pause).unwrap();
    assert_eq!(pod.state("a").unwrap().status, 4);
    pod.client
        .call::<()>("Resume", &task::ResumeRequest { id: id.clone() })
        .unwrap();
    assert_eq!(pod.state("a").unwrap().status, 2);
    assert_eq!(pod.kill("a", "", 200).unwrap_err().code, 3);
    // A task is there: Shutdown does nothing.
    let shutdown = task::ShutdownRequest {
        id: id.clone(),
        now: true,
    };
    pod.client.call::<()>("Shutdown", &shutdown).unwrap();
    let pids: task::PidsResponse = pod
        .client
        .call("Pids", &task::PidsRequest { id: id.clone() })
        .unwrap();
    assert!(!pids.processes.is_empty());
    let stats: task::StatsResponse = pod
        .client
        .call("Stats", &task::StatsRequest { id })
        .unwrap();
    assert!(
        stats
            .stats
            .unwrap()
            .type_url
            .starts_with("io.containerd.cgroups.v")
    );
    // SIGKILL reaches a paused task.
    pod.client.call::<()>("Pause", &pause).unwrap();
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    pod.delete("a", "").unwrap();
    // Created and never started: Delete kills.
    let request = pod.request("b", &pod.config("b", "sleep 100"));
    let pid = pod.create(&request).unwrap();
    assert_eq!(pod.delete("b", "").unwrap().exit_status, 137);
    assert!(!alive(pid));
    pod.shutdown();
}

#[test]
fn group_shares_one_shim_and_a_stale_socket_is_replaced() {
    let Some(mut pod) = Pod::new("group") else {
        return;
    };
    let pid = pod.shim_pid();
    let again = start_shim(&pod.dir.join("sandbox"), &pod.dir.join("s"), "group", "");
    assert_eq!(again, pod.socket);
    pod.run("a", "sleep 100");
    pod.run("b", "exit 3");
    assert_eq!(pod.wait("b", "").unwrap(), 3);
    pod.delete("b", "").unwrap();
    assert_eq!(pod.state("a").unwrap().status, 2);
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    kill(pid, 9);
    wait_until("the shim to die", || !alive(pid));
    assert!(pod.socket.exists());
    let again = start_shim(&pod.dir.join("sandbox"), &pod.dir.join("s"), "group", "");
    assert_eq!(again, pod.socket);
    pod.client = pod.connect();
    assert_ne!(pod.shim_pid(), pid);
    pod.shutdown();
}

#[test]
fn dead_shims_members_are_all_ended_by_delete_of_one() {
    let Some(mut pod) = Pod::new("dead") else {
        return;
    };
    let a = pod.run("a", "sleep 100 & sleep 100");
    let b = pod.run("b", "sleep 100");
    pod.run("c", "exit 5");
    pod.wait("c", "").unwrap();
    let shim = pod.shim_pid();
    kill(shim, 9);
    wait_until("the shim to die", || !alive(shim));
    assert!(alive(a) && alive(b));
    let answer = shim_delete(&pod.bundle("a"), &pod.id("a"));
    assert_eq!((answer.pid, answer.exit_status), (a, 137));
    assert!(answer.exited_at.is_some());
    assert!(!alive(a) && !alive(b));
    // The others' true exits are on record, and their delete repeats them.
    assert_eq!(shim_delete(&pod.bundle("b"), &pod.id("b")).exit_status, 137);
    assert_eq!(shim_delete(&pod.bundle("c"), &pod.id("c")).exit_status, 5);
    assert!(!pod.socket.exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(pod.dir.to_str().unwrap()));
    let left = fs::read_dir(pod.dir.join("runtime/test"))
        .unwrap()
        .flatten()
        .count();
    assert_eq!(left, 0);
}

#[test]
fn exec_with_passed_descriptors() {
    let Some(mut pod) = Pod::new("exec") else {
        return;
    };
    pod.run("a", "sleep 100");
    let fds = open_fds(pod.shim_pid());
    let mut request = pod.exec_request("a", "e1", "read x; echo got $x; echo err >&2; exit 5");
    for name in [&mut request.stdin, &mut request.stdout, &mut request.stderr] {
        *name = "fd:".to_owned();
    }
    let (stdin_read, stdin_write) = pipe();
    let ((out, out_write), (err, err_write)) = (pipe(), pipe());
    pod.client.send(
        TASK,
        "Exec",
        &request,
        &[stdin_read.as_fd(), out_write.as_fd(), err_write.as_fd()],
    );
    pod.client.receive::<()>().unwrap();
    drop((stdin_read, out_write, err_write));
    assert_eq!(pod.kill("a", "e1", 9).unwrap_err().code, 9);
    pod.start("a", "e1").unwrap();
    rustix::io::write(&stdin_write, b"hello\n").unwrap();
    assert_eq!(pod.wait("a", "e1").unwrap(), 5);
    assert_eq!(
        (text(out).as_str(), text(err).as_str()),
        ("got hello\n", "err\n")
    );
    assert_eq!(pod.delete("a", "e1").unwrap().exit_status, 5);
    // The same id again; a command that is not there; a missing exec.
    let request = pod.exec_request("a", "e1", "exit 6");
    pod.client.call::<()>("Exec", &request).unwrap();
    assert_eq!(pod.client.call::<()>("Exec", &request).unwrap_err().code, 6);
    pod.start("a", "e1").unwrap();
    assert_eq!(pod.wait("a", "e1").unwrap(), 6);
    pod.delete("a", "e1").unwrap();
    let mut request = pod.exec_request("a", "e2", "");
    request.spec.as_mut().unwrap().value =
        br#"{"args":["/nonexistent"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    pod.client.call::<()>("Exec", &request).unwrap();
    let error = pod.start("a", "e2").unwrap_err();
    assert!(
        error.message.starts_with("OCI runtime exec failed: "),
        "{error:?}"
    );
    pod.delete("a", "e2").unwrap();
    assert_eq!(pod.start("a", "e3").unwrap_err().code, 5);
    assert_eq!(open_fds(pod.shim_pid()), fds);
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn exec_storm_loses_no_exit_and_leaves_no_zombie() {
    let Some(mut pod) = Pod::new("storm") else {
        return;
    };
    pod.run("a", "sleep 1000");
    let shim = pod.shim_pid();
    let fds = open_fds(shim);
    let before = children(shim).len();
    let mut waits = Vec::new();
    for i in 0..60 {
        let exec = format!("e{i}");
        let request = pod.exec_request("a", &exec, &format!("exit {i}"));
        pod.client.call::<()>("Exec", &request).unwrap();
        // All at once: each start on a connection of its own.
        let mut client = pod.connect();
        let id = pod.id("a");
        waits.push(std::thread::spawn(move || {
            let start = task::StartRequest {
                id: id.clone(),
                exec_id: exec.clone(),
            };
            client.call::<task::StartResponse>("Start", &start).unwrap();
            let wait = task::WaitRequest {
                id: id.clone(),
                exec_id: exec.clone(),
            };
            let answer: task::WaitResponse = client.call("Wait", &wait).unwrap();
            client
                .call::<task::DeleteResponse>("Delete", &task::DeleteRequest { id, exec_id: exec })
                .unwrap();
            answer.exit_status
        }));
    }
    for (i, wait) in waits.into_iter().enumerate() {
        assert_eq!(wait.join().unwrap(), i as u32);
    }
    wait_until("zombies to be reaped", || children(shim).len() == before);
    wait_until("descriptors to be closed", || open_fds(shim) == fds);
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn init_exit_is_told_after_its_execs() {
    let Some(dir) = tempfile::tempdir().ok() else {
        return;
    };
    let socket = dir.path().join("events");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let events = events::serve(listener);
    let Some(mut pod) = Pod::with_events("events", socket.to_str().unwrap()) else {
        return;
    };
    pod.run("a", "sleep 100");
    let request = pod.exec_request("a", "e1", "sleep 100");
    pod.client.call::<()>("Exec", &request).unwrap();
    pod.start("a", "e1").unwrap();
    pod.kill("a", "", 9).unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    assert_eq!(pod.wait("a", "e1").unwrap(), 137);
    pod.delete("a", "e1").unwrap();
    pod.delete("a", "").unwrap();
    let id = pod.id("a");
    pod.shutdown();
    let want = [
        "/tasks/create".to_owned(),
        "/tasks/start".to_owned(),
        "/tasks/exec-added".to_owned(),
        "/tasks/exec-started".to_owned(),
        "/tasks/exit e1 137".to_owned(),
        format!("/tasks/exit {id} 137"),
        "/tasks/delete".to_owned(),
    ];
    wait_until("all events", || events.lock().unwrap().len() == want.len());
    assert_eq!(*events.lock().unwrap(), want);
}

mod events {
    use super::support::proto::containerd::events::TaskExit;
    use super::support::proto::containerd::services::events::ttrpc::v1::ForwardRequest;
    use super::support::proto::ttrpc;
    use prost::Message;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Mutex};

    pub fn serve(listener: UnixListener) -> Arc<Mutex<Vec<String>>> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&seen);
        std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else {
                return;
            };
            let mut head = [0u8; 10];
            while stream.read_exact(&mut head).is_ok() {
                let length = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let request = ttrpc::Request::decode(body.as_slice()).unwrap();
                let forward = ForwardRequest::decode(request.payload.as_slice()).unwrap();
                let envelope = forward.envelope.unwrap();
                assert_eq!(envelope.namespace, "test");
                let event = envelope.event.unwrap();
                let mut line = envelope.topic.clone();
                if line == "/tasks/exit" {
                    assert_eq!(event.type_url, "containerd.events.TaskExit");
                    let exit = TaskExit::decode(event.value.as_slice()).unwrap();
                    line = format!("{line} {} {}", exit.id, exit.exit_status);
                }
                shared.lock().unwrap().push(line);
                let mut frame = vec![0, 0, 0, 0];
                frame.extend(&head[4..8]);
                frame.extend([2, 0]);
                stream.write_all(&frame).unwrap();
            }
        });
        seen
    }
}

#[test]
fn out_of_memory_is_on_record_before_the_exit() {
    let Some(mut pod) = Pod::new("oom") else {
        return;
    };
    let mut config = pod.config("a", "a=x; while :; do a=$a$a; done");
    config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 16 << 20});
    let request = pod.request("a", &config);
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 137);
    assert!(pod.status("a").oom_killed);
    let exit = fs::read_to_string(pod.bundle("a").join("exit.json")).unwrap();
    assert!(exit.contains("\"oom_killed\":true"), "{exit}");
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn processes_of_a_shared_pid_namespace_do_not_outlive_init() {
    let Some(mut pod) = Pod::new("shared") else {
        return;
    };
    let mut config = pod.config("a", "sleep 1234 & echo started; sleep 0.3; exit 4");
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|n| n["type"] != "pid");
    let request = pod.request("a", &config);
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let begin = Instant::now();
    assert_eq!(pod.wait("a", "").unwrap(), 4);
    // Killed with its container, the child does not hold the pipe for the bounded drain.
    assert!(
        begin.elapsed() < Duration::from_millis(1800),
        "{:?}",
        begin.elapsed()
    );
    pod.delete("a", "").unwrap();
    let shim = pod.shim_pid();
    wait_until("the child to be reaped", || children(shim).is_empty());
    pod.shutdown();
}

#[test]
fn update_changes_the_limit() {
    let Some(mut pod) = Pod::new("update") else {
        return;
    };
    pod.run("a", "sleep 100");
    let resources = prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
        value: br#"{"pids":{"limit":55}}"#.to_vec(),
    };
    let request = task::UpdateTaskRequest {
        id: pod.id("a"),
        resources: Some(resources),
        annotations: Default::default(),
    };
    pod.client.call::<()>("Update", &request).unwrap();
    let stats = task::StatsRequest { id: pod.id("a") };
    let stats: task::StatsResponse = pod.client.call("Stats", &stats).unwrap();
    let any = stats.stats.unwrap();
    use prost::Message;
    let limit = if any.type_url.contains("v1") {
        let m = support::proto::io::containerd::cgroups::v1::Metrics::decode(any.value.as_slice());
        m.unwrap().pids.unwrap().limit
    } else {
        let m = support::proto::io::containerd::cgroups::v2::Metrics::decode(any.value.as_slice());
        m.unwrap().pids.unwrap().limit
    };
    assert_eq!(limit, 55);
    let empty = task::UpdateTaskRequest {
        id: pod.id("a"),
        ..Default::default()
    };
    assert_eq!(pod.client.call::<()>("Update", &empty).unwrap_err().code, 3);
    pod.kill("a", "", 9).unwrap();
    pod.wait("a", "").unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn runtime_killed_in_its_create_leaves_nothing() {
    let Some(mut pod) = Pod::new("killed") else {
        return;
    };
    // Does its work and is killed before it could tell the pid.
    let mut request = pod.request("a", &pod.config("a", "sleep 100"));
    let real = pod.runtime_path();
    let wrapper = pod.dir.join("wrapper");
    let body = format!(
        "#!/bin/sh\ncase \"$*\" in *' create '*) {0} \"$@\"; rm -f {1}/init.pid; kill -9 $$;; *) exec {0} \"$@\";; esac\n",
        real.display(),
        pod.bundle("a").display()
    );
    fs::write(&wrapper, body).unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let good = request.options.clone();
    request.options = Some(pod.options(&wrapper));
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("137"), "{error:?}");
    let shim = pod.shim_pid();
    wait_until("the container to die", || children(shim).is_empty());
    // The id is free at once.
    request.options = good;
    pod.create(&request).unwrap();
    pod.delete("a", "").unwrap();
    pod.shutdown();
}
