//! The daemon dies or is replaced; containers do not notice, and it catches up.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::shim::stand::are_hands;
use coracle_integration::world::{TOOLS, World, http_get_soon};
use coracle_integration::{leak, wait_for};

/// Numbers of the lines in a log, in order; every line must be whole.
fn numbers(world: &World, id: &str) -> Result<Vec<u64>> {
    world
        .log_lines(id)?
        .iter()
        .map(|l| {
            l.text
                .strip_prefix("line ")
                .context("another line")?
                .parse()
                .context("a number")
        })
        .collect()
}

#[test]
fn daemon_killed_under_a_writer_loses_no_line_and_goes_on() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("writer")?;
    let ip = world.pod_ip(&pod)?;
    let id = world.tools(&pod, "writer", &["probe", "lines", "0", "2000"])?;
    let server = world.tools(&pod, "server", &["probe", "serve", "80", "up"])?;
    http_get_soon(&format!("{ip}:80"), "/")?;
    let log = world.log_path(&id)?;
    let pid = world.exec(&id, &["sh", "-c", "awk '{print $22}' /proc/1/stat"])?;

    world.daemon.crash()?;
    let size = std::fs::metadata(&log)?.len();
    wait_for(
        "lines while the daemon is down",
        Duration::from_secs(5),
        || Ok((std::fs::metadata(&log)?.len() > size + 1000).then_some(())),
    )?;
    ensure!(http_get_soon(&format!("{ip}:80"), "/")? == "up\n");
    world.daemon.start()?;

    let status = world.container_status(&id)?;
    ensure!(status["state"] == "CONTAINER_RUNNING", "{status:#}");
    ensure!(world.pod_status(&pod)?["state"] == "SANDBOX_READY");
    ensure!(world.pod_ip(&pod)? == ip);
    // The same process as before.
    ensure!(world.exec(&id, &["sh", "-c", "awk '{print $22}' /proc/1/stat"])? == pid);
    ensure!(world.exec_sync(&server, &["echo", "exec works"])? == "exec works");
    let before = numbers(&world, &id)?.len();
    wait_for("lines after the restart", Duration::from_secs(5), || {
        Ok((numbers(&world, &id)?.len() > before + 10).then_some(()))
    })?;
    // Rotation goes through the daemon, which has to know the shim again.
    let old = log.with_extension("log.1");
    std::fs::rename(&log, &old)?;
    world.crictl.run(&["logs", "--reopen", &id])?;
    wait_for("lines in the new file", Duration::from_secs(5), || {
        Ok(std::fs::metadata(&log)
            .is_ok_and(|m| m.len() > 0)
            .then_some(()))
    })?;
    world.crictl.run(&["stop", "--timeout", "0", &id])?;
    let status = world.wait_exited(&id)?;
    ensure!(status["exitCode"] == 137, "{status:#}");

    let text = std::fs::read_to_string(&old)?;
    let mut all = coracle_integration::crictl::parse_log(&text)?;
    all.extend(world.log_lines(&id)?);
    for (n, line) in all.iter().enumerate() {
        ensure!(line.text == format!("line {n}"), "line {n} is {line:?}");
    }
    world.finish()
}

#[test]
fn container_that_exits_while_the_daemon_is_down_shows_its_true_code_and_time() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("down")?;
    let flag = world.dir.join("volume");
    std::fs::create_dir_all(&flag)?;
    let script = "while [ ! -e /volume/go ]; do sleep 0.05; done; date +%s > /volume/time; exit 23";
    let config = container("c", TOOLS, &["sh", "-c", script]).push(
        "/mounts",
        serde_json::json!({"container_path": "/volume", "host_path": flag}),
    );
    let id = world.start_container(&pod, &config)?;
    world.daemon.crash()?;
    std::fs::write(flag.join("go"), "")?;
    wait_for("the exit", Duration::from_secs(10), || {
        Ok(flag.join("time").exists().then_some(()))
    })?;
    // Far enough from the restart to tell the two apart.
    std::thread::sleep(Duration::from_secs(3));
    world.daemon.start()?;
    let status = world.wait_exited(&id)?;
    ensure!(
        status["exitCode"] == 23 && status["reason"] == "Error",
        "{status:#}"
    );
    let said: i64 = std::fs::read_to_string(flag.join("time"))?.trim().parse()?;
    let finished = status["finishedAt"].as_str().context("finishedAt")?;
    let output = std::process::Command::new("date")
        .args(["+%s", "-d", finished])
        .output()?;
    let shown: i64 = String::from_utf8(output.stdout)?.trim().parse()?;
    ensure!(
        (shown - said).abs() <= 1,
        "it ended at {said}, the status says {shown}"
    );
    world.finish()
}

#[test]
fn daemon_stopped_and_started_keeps_pods_and_serves_the_same_lists() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("kept")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    let done = world.tools(&pod, "done", &["probe", "exit", "5"])?;
    world.wait_exited(&done)?;
    let lists = |world: &World| -> Result<Vec<String>> {
        let mut all = Vec::new();
        for args in [
            &["pods", "-o", "json"][..],
            &["ps", "-a", "-o", "json"],
            &["images", "-o", "json"],
        ] {
            all.push(world.crictl.run(args)?);
        }
        Ok(all)
    };
    let before = lists(&world)?;
    for _ in 0..3 {
        world.daemon.stop()?;
        ensure!(
            !leak::processes(&world.mark).is_empty(),
            "the containers went with the daemon"
        );
        world.daemon.start()?;
        ensure!(lists(&world)? == before, "the lists differ");
    }
    let status = world.container_status(&done)?;
    ensure!(status["exitCode"] == 5, "{status:#}");
    ensure!(world.exec(&id, &["echo", "still"])? == "still");
    world.finish()
}

#[test]
fn daemon_killed_during_pod_starts_leaves_nothing_after_removal() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    for round in 0..4u64 {
        let mut children = Vec::new();
        for n in 0..4 {
            let path = world.dir.join(format!("crash-{round}-{n}.json"));
            world
                .pod_config(&format!("crash-{round}-{n}"))
                .write(&path)?;
            let mut command = world.crictl.command(&["runp", &path.display().to_string()]);
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            children.push(command.spawn()?);
        }
        std::thread::sleep(Duration::from_millis(20 + 25 * round));
        world.daemon.crash()?;
        for mut child in children {
            child.wait()?;
        }
        world.daemon.start()?;
    }
    for id in world.crictl.ids(&["pods", "-q"])? {
        world.crictl.run(&["stopp", &id])?;
        world.crictl.run(&["rmp", &id])?;
    }
    world.nothing_left()?;
    let pod = world.pod("after")?;
    let id = world.tools(&pod, "c", &["true"])?;
    world.wait_exited(&id)?;
    world.finish()
}

#[test]
fn shim_killed_shows_its_containers_ended_and_the_pod_can_go() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("shim")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    let shims: Vec<i32> = leak::processes(&world.mark)
        .iter()
        .filter(|p| p.contains("containerd-shim-coracle-v2"))
        .filter_map(|p| p.split(' ').next()?.parse().ok())
        .filter(|pid| !are_hands(*pid))
        .collect();
    ensure!(shims.len() == 1, "{shims:?}");
    let pid = rustix::process::Pid::from_raw(shims[0]).context("pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let status = world.wait_exited(&id)?;
    ensure!(status["exitCode"] == 137, "{status:#}");
    world.remove_pod(&pod)?;
    world.finish()
}

#[test]
fn daemon_with_a_stale_socket_replaces_it_and_refuses_a_second() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.daemon.crash()?;
    ensure!(world.daemon.socket().exists());
    world.daemon.start()?;
    world.crictl.run(&["version"])?;
    let output = std::process::Command::new(coracle_integration::binaries::coracled()?)
        .arg("--config")
        .arg(world.dir.join("config.toml"))
        .output()?;
    ensure!(
        !output.status.success(),
        "a second daemon took over: {output:?}"
    );
    world.crictl.run(&["version"])?;
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(world.daemon.socket())?
        .permissions()
        .mode()
        & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    world.finish()
}

#[test]
fn config_default_and_dump_are_toml_and_unknown_keys_warn() -> Result<()> {
    need_root!();
    let coracled = coracle_integration::binaries::coracled()?;
    let run = |args: &[&str]| std::process::Command::new(&coracled).args(args).output();
    let text = String::from_utf8(run(&["config", "default"])?.stdout)?;
    ensure!(text.contains("SystemdCgroup = false"), "{text}");
    let _: toml::Table = text.parse()?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("config.toml");
    std::fs::write(&path, "nonsense = 1\n")?;
    let path = path.display().to_string();
    let output = run(&["--config", &path, "config", "dump"])?;
    let _: toml::Table = String::from_utf8(output.stdout)?.parse()?;
    let warned = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(warned.contains("nonsense"), "{warned}");
    std::fs::write(dir.path().join("config.toml"), "root = 1\n")?;
    let output = run(&["--config", &path, "config", "dump"])?;
    ensure!(!output.status.success());
    ensure!(
        String::from_utf8_lossy(&output.stderr).contains("root"),
        "{output:?}"
    );
    Ok(())
}
