//! coracled, a shim or both die, at bad moments and over and over. Nothing is lost that a shim
//! could keep, nothing is told twice, and nothing is left.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::shim::stand::{alive, are_hands, hanging_runtime};
use coracle_integration::world::{Pod, TOOLS, World};
use coracle_integration::{binaries, leak, need_root, wait_for};
use nix::mount::{MsFlags, mount, umount};
use rustix::process::{Pid, Signal, kill_process};

fn kill(pid: i32) -> Result<()> {
    Ok(kill_process(
        Pid::from_raw(pid).context("pid")?,
        Signal::KILL,
    )?)
}

fn shims(world: &World) -> Vec<i32> {
    let all = leak::processes(&world.mark).into_iter();
    all.filter(|p| p.contains("containerd-shim-coracle-v2"))
        .filter_map(|p| p.split(' ').next()?.parse().ok())
        .filter(|pid| !are_hands(*pid))
        .collect()
}

fn pid_of(world: &World, id: &str) -> Result<i32> {
    let all = world.crictl.json(&["inspect", "-o", "json", id])?;
    let pid = all["info"]["pid"].as_i64().context("a pid")?;
    Ok(i32::try_from(pid)?)
}

/// A client's call in the background; what becomes of it is the daemon's death to decide.
fn begin(world: &World, args: &[&str]) -> Result<Child> {
    let mut command = world.crictl.command(args);
    Ok(command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?)
}

/// Every line of the log, from 0 on, whole and in order.
fn check_lines(world: &World, id: &str) -> Result<usize> {
    let lines = world.log_lines(id)?;
    for (n, line) in lines.iter().enumerate() {
        ensure!(line.text == format!("line {n}"), "{n} is {line:?}");
    }
    Ok(lines.len())
}

#[test]
fn daemon_killed_again_and_again_under_load_loses_no_line_and_no_exit() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let mut writers = Vec::new();
    let mut enders = Vec::new();
    for n in 0..2 {
        let pod = world.pod(&format!("load-{n}"))?;
        for w in 0..2 {
            let name = format!("writer-{w}");
            writers.push(world.tools(&pod, &name, &["probe", "lines", "0", "1"])?);
        }
        // These end one after another, some with a daemon and some without.
        for code in 1..=5 {
            let script = format!("sleep {}; exit {code}", f64::from(code) * 0.7);
            let name = format!("ender-{code}");
            enders.push((code, world.tools(&pod, &name, &["sh", "-c", &script])?));
        }
    }
    for _ in 0..3 {
        let mut execs = Vec::new();
        for id in &writers {
            execs.push(begin(&world, &["exec", "--sync", id, "sleep", "0.3"])?);
        }
        std::thread::sleep(Duration::from_millis(150));
        world.daemon.crash()?;
        std::thread::sleep(Duration::from_millis(400));
        world.daemon.start()?;
        for mut exec in execs {
            exec.wait()?;
        }
    }
    for (code, id) in &enders {
        let status = world.wait_exited(id)?;
        ensure!(status["exitCode"] == *code, "{status:#}");
        let times = ["startedAt", "finishedAt"].map(|key| {
            let text = status[key].as_str().unwrap_or_default().to_owned();
            let output = std::process::Command::new("date")
                .args(["+%s%N", "-d", &text])
                .output();
            output.map(|o| String::from_utf8_lossy(&o.stdout).trim().parse::<i64>())
        });
        let [started, finished] = times;
        let ran = (finished?? - started??) / 1_000_000;
        let meant = i64::from(*code) * 700;
        ensure!(
            (meant..meant + 500).contains(&ran),
            "code {code} ran {ran} ms"
        );
    }
    for id in &writers {
        world.crictl.run(&["stop", "--timeout", "0", id])?;
        ensure!(world.wait_exited(id)?["exitCode"] == 137);
        let lines = check_lines(&world, id)?;
        ensure!(lines > 500, "only {lines} lines");
    }
    world.finish()
}

/// A handler whose runtime hangs in the commands that files in `dir` name.
fn with_hanging_runtime() -> Result<(World, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let runtime = hanging_runtime(dir.path(), &binaries::coracle()?)?;
    let extra = format!(
        "\n[runtimes.coracle]\nruntime = \"{}\"\n",
        runtime.display()
    );
    let world = World::start_with(&extra)?;
    world.pull(TOOLS)?;
    Ok((world, dir))
}

fn wait_hung(dir: &Path) -> Result<()> {
    wait_for("the runtime to hang", Duration::from_secs(10), || {
        Ok(dir.join("hung").exists().then_some(()))
    })?;
    Ok(fs::remove_file(dir.join("hung"))?)
}

#[test]
fn daemon_killed_while_its_runtime_creates_leaves_nothing_and_a_retry_works() -> Result<()> {
    need_root!();
    let (mut world, dir) = with_hanging_runtime()?;
    let pod = world.pod("p")?;
    let bystander = world.tools(&pod, "bystander", &["sleep", "1000"])?;
    for (n, command) in ["create", "start"].iter().enumerate() {
        let config = container(&format!("c{n}"), TOOLS, &["sleep", "1000"]);
        let id = world.create(&pod, &config)?;
        let hang = dir.path().join(format!("hang-{command}"));
        fs::write(&hang, "")?;
        let mut start = begin(&world, &["start", &id])?;
        wait_hung(dir.path())?;
        world.daemon.crash()?;
        start.wait()?;
        fs::remove_file(&hang)?;
        world.daemon.start()?;
        let status = world.wait_exited(&id)?;
        ensure!(status["reason"] == "StartError", "{command}: {status:#}");
        let hung = |p: &String| p.contains("hanging-runtime");
        wait_for("the end of the call", Duration::from_secs(5), || {
            Ok((!leak::processes(&world.mark).iter().any(hung)).then_some(()))
        })?;
        world.crictl.run(&["rm", &id])?;
        let id = world.start_container(&pod, &config)?;
        ensure!(world.container_status(&id)?["state"] == "CONTAINER_RUNNING");
        world.crictl.run(&["rm", "-f", &id])?;
    }
    ensure!(world.exec_sync(&bystander, &["echo", "well"])? == "well");
    world.finish()
}

#[test]
fn shim_killed_while_its_runtime_creates_fails_the_start_at_once() -> Result<()> {
    need_root!();
    let (mut world, dir) = with_hanging_runtime()?;
    let pod = world.pod("p")?;
    let other = world.tools(&pod, "other", &["sleep", "1000"])?;
    let config = container("c", TOOLS, &["sleep", "1000"]);
    let id = world.create(&pod, &config)?;
    let hang = dir.path().join("hang-create");
    fs::write(&hang, "")?;
    let mut start = begin(&world, &["start", &id])?;
    wait_hung(dir.path())?;
    fs::remove_file(&hang)?;
    for shim in shims(&world) {
        kill(shim)?;
    }
    ensure!(!start.wait()?.success());
    ensure!(world.wait_exited(&id)?["reason"] == "StartError");
    ensure!(world.wait_exited(&other)?["exitCode"] == 137);
    let left = leak::processes(&world.mark);
    ensure!(
        !left.iter().any(|p| p.contains("hanging-runtime")),
        "{left:?}"
    );
    world.crictl.run(&["rm", &id])?;
    // The pod has no process of its own: it gets a new shim with its next container.
    let id = world.start_container(&pod, &config)?;
    ensure!(world.exec_sync(&id, &["echo", "well"])? == "well");
    world.finish()
}

/// Id, pid (0: it has ended) and code.
type Member = (String, i32, i64);

/// A pod with containers in the states that CRI knows.
fn pod_in_every_state(world: &mut World) -> Result<(Pod, Vec<Member>)> {
    let pod = world.pod("states")?;
    let running = world.tools(&pod, "running", &["sh", "-c", "sleep 1000 & sleep 1001"])?;
    let busy = world.tools(&pod, "busy", &["sleep", "1000"])?;
    world.exec_sync(&busy, &["sh", "-c", "sleep 1002 >/dev/null 2>&1 &"])?;
    let exited = world.tools(&pod, "exited", &["probe", "exit", "23"])?;
    world.wait_exited(&exited)?;
    let mut all = Vec::new();
    for id in [running, busy] {
        let pid = pid_of(world, &id)?;
        all.push((id, pid, 137));
    }
    all.push((exited, 0, 23));
    Ok((pod, all))
}

#[test]
fn shim_killed_is_told_once_for_each_container_of_its_pod() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let (pod, all) = pod_in_every_state(&mut world)?;
    let created = world.create(&pod, &container("created", TOOLS, &["sleep", "1000"]))?;
    let told = world.dir.join("events");
    let mut events = world
        .crictl
        .command(&["events", "-o", "json"])
        .stdout(fs::File::create(&told)?)
        .stderr(Stdio::null())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(500));
    for shim in shims(&world) {
        kill(shim)?;
    }
    let mut wrong = Vec::new();
    for (id, pid, code) in &all {
        let status = world.wait_exited(id)?;
        ensure!(status["exitCode"] == *code, "{status:#}");
        wait_for("the end of its processes", Duration::from_secs(5), || {
            Ok((!alive(*pid)).then_some(()))
        })?;
    }
    // What comes late would be one too many.
    std::thread::sleep(Duration::from_millis(500));
    events.kill()?;
    events.wait()?;
    let text = fs::read_to_string(&told)?;
    for (id, pid, _) in &all {
        let want = usize::from(*pid != 0);
        let got = stopped_events(&text, id);
        if got != want {
            wrong.push(format!("{id}: {got} events of its end, not {want}"));
        }
    }
    ensure!(wrong.is_empty(), "{}\n{text}", wrong.join("\n"));
    ensure!(world.container_status(&created)?["state"] == "CONTAINER_CREATED");
    // And what was only created starts in a new shim.
    world.crictl.run(&["start", &created])?;
    ensure!(world.exec_sync(&created, &["echo", "well"])? == "well");
    world.remove_pod(&pod)?;
    world.finish()
}

/// Events of the end of a container in crictl's JSON, one document after another.
fn stopped_events(text: &str, id: &str) -> usize {
    let documents = serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>();
    documents
        .flatten()
        .filter(|event| {
            event["containerId"] == id && event["containerEventType"] == "CONTAINER_STOPPED_EVENT"
        })
        .count()
}

#[test]
fn shim_and_daemon_killed_together_leave_ended_containers() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let (pod, all) = pod_in_every_state(&mut world)?;
    // One that ends without a daemon, and whose shim is killed after that.
    let late = world.tools(&pod, "late", &["sh", "-c", "sleep 0.5; exit 24"])?;
    world.daemon.crash()?;
    std::thread::sleep(Duration::from_millis(900));
    for shim in shims(&world) {
        kill(shim)?;
    }
    world.daemon.start()?;
    for (id, pid, code) in all.iter().chain([&(late, 0, 24)]) {
        let status = world.wait_exited(id)?;
        ensure!(status["exitCode"] == *code, "{status:#}");
        ensure!(!alive(*pid), "{id} lives on");
    }
    ensure!(shims(&world).is_empty());
    world.remove_pod(&pod)?;
    world.finish()
}

#[test]
fn pods_of_a_former_boot_are_shown_as_ended_and_can_go() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let (pod, all) = pod_in_every_state(&mut world)?;
    world.daemon.crash()?;
    for pid in shims(&world) {
        kill(pid)?;
    }
    for (_, pid, _) in all.iter().filter(|(_, pid, _)| *pid != 0) {
        kill(*pid)?;
    }
    let boot = world.dir.join("boot_id");
    fs::write(&boot, "11111111-2222-3333-4444-555555555555\n")?;
    let none: Option<&str> = None;
    let kernel = "/proc/sys/kernel/random/boot_id";
    mount(Some(&boot), kernel, none, MsFlags::MS_BIND, none)?;
    world.daemon.start()?;
    for (id, _, code) in &all {
        let status = world.wait_exited(id)?;
        ensure!(status["exitCode"] == *code, "{status:#}");
        if *code == 137 {
            let message = status["message"].as_str().unwrap_or_default();
            ensure!(message.contains("reboot"), "{status:#}");
        }
    }
    ensure!(world.pod_status(&pod)?["state"] == "SANDBOX_NOTREADY");
    let new = world.pod("new")?;
    let id = world.tools(&new, "c", &["sleep", "1000"])?;
    ensure!(world.exec_sync(&id, &["echo", "well"])? == "well");
    world.remove_pod(&pod)?;
    ensure!(world.exec_sync(&id, &["echo", "well"])? == "well");
    umount(kernel)?;
    world.finish()
}
