//! Containers by their status, limits and outputs, through crictl.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::world::{TOOLS, World};
use serde_json::json;

#[test]
fn exit_codes_give_their_reasons() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("codes")?;
    for (name, code, reason) in [
        ("zero", 0, "Completed"),
        ("one", 1, "Error"),
        ("other", 42, "Error"),
    ] {
        let config = container(name, TOOLS, &["probe", "exit", &code.to_string()]);
        let (status, _) = world.run_to_end(&pod, &config)?;
        ensure!(
            status["exitCode"].as_i64().unwrap_or(0) == code,
            "{name}: {status:#}"
        );
        ensure!(status["reason"] == reason, "{name}: {status:#}");
        let times =
            ["createdAt", "startedAt", "finishedAt"].map(|t| status[t].as_str().unwrap_or(""));
        ensure!(
            times[0] <= times[1] && times[1] <= times[2],
            "{name}: {times:?}"
        );
        ensure!(
            times.iter().all(|t| t.len() > 20 && !t.starts_with("1970")),
            "{name}: {times:?}"
        );
    }
    // It ignores TERM, so that the grace has to pass.
    let stubborn = world.tools(
        &pod,
        "stubborn",
        &["sh", "-c", "trap '' TERM; echo up; sleep 1000 & wait; wait"],
    )?;
    world.wait_log(&stubborn, "up")?;
    world.crictl.run(&["stop", "--timeout", "1", &stubborn])?;
    let status = world.wait_exited(&stubborn)?;
    ensure!(
        status["exitCode"] == 137 && status["reason"] == "Error",
        "{status:#}"
    );
    let polite = world.tools(&pod, "polite", &["probe", "trap", "3"])?;
    world.wait_log(&polite, "ready")?;
    world.crictl.run(&["stop", "--timeout", "10", &polite])?;
    let status = world.wait_exited(&polite)?;
    ensure!(status["exitCode"] == 3, "{status:#}");
    ensure!(
        world
            .crictl
            .run(&["logs", &polite])?
            .contains("got SIGTERM")
    );
    // Again and again is fine.
    world.crictl.run(&["stop", "--timeout", "0", &polite])?;
    world.finish()
}

#[test]
fn memory_limit_exceeded_is_oomkilled_and_below_it_is_not() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("memory")?;
    let limited = |name: &str, mib: &str| {
        container(name, TOOLS, &["probe", "eat", mib, "0"])
            .set("/linux/resources/memory_limit_in_bytes", 64 << 20)
    };
    let (status, _) = world.run_to_end(&pod, &limited("greedy", "200"))?;
    ensure!(
        status["reason"] == "OOMKilled" && status["exitCode"] == 137,
        "{status:#}"
    );
    let (status, output) = world.run_to_end(&pod, &limited("modest", "30"))?;
    ensure!(
        status["reason"] == "Completed" && output == "ate 30 MiB\n",
        "{status:#}"
    );
    world.finish()
}

#[test]
fn cpu_quota_of_half_gives_half_within_5_points() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("cpu")?;
    let script = "probe burn 2 4; awk '{print \"ticks\", $16 + $17}' /proc/$$/stat";
    let mut seen = Vec::new();
    // A machine that is busy with something else may give less: once more, but never more CPU.
    for n in 0..4 {
        let config = container(&format!("burner-{n}"), TOOLS, &["sh", "-c", script])
            .set("/linux/resources/cpu_period", 100_000)
            .set("/linux/resources/cpu_quota", 50_000);
        let (status, output) = world.run_to_end(&pod, &config)?;
        let ticks: f64 = output
            .lines()
            .find_map(|l| l.strip_prefix("ticks "))
            .context("no ticks")?
            .trim()
            .parse()?;
        // 100 ticks a second; the burner runs for 4 s of wall time.
        let percent = ticks / 4.0;
        ensure!(percent <= 55.0, "{percent} % of a CPU: {status:#}");
        seen.push(percent);
        if percent >= 45.0 {
            return world.finish();
        }
    }
    anyhow::bail!("{seen:?} % of a CPU")
}

#[test]
fn read_only_rootfs_refuses_writes_but_volumes_take_them() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("readonly")?;
    let volume = world.dir.join("volume");
    std::fs::create_dir_all(&volume)?;
    let script = "echo x > /file; echo root $?; echo x > /volume/file; echo volume $?; echo x > /etc/hosts; echo hosts $?";
    let config = container("c", TOOLS, &["sh", "-c", script])
        .set("/linux/security_context/readonly_rootfs", true)
        .push(
            "/mounts",
            json!({"container_path": "/volume", "host_path": volume}),
        );
    let (_, output) = world.run_to_end(&pod, &config)?;
    ensure!(output == "root 1\nvolume 0\nhosts 1\n", "{output}");
    ensure!(std::fs::read_to_string(volume.join("file"))? == "x\n");
    world.finish()
}

#[test]
fn capabilities_added_and_dropped_are_exactly_those() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("caps")?;
    let mut effective = |name: &str, add: &[&str], drop: &[&str]| -> Result<u64> {
        let config = container(name, TOOLS, &["probe"])
            .set(
                "/linux/security_context/capabilities/add_capabilities",
                json!(add),
            )
            .set(
                "/linux/security_context/capabilities/drop_capabilities",
                json!(drop),
            );
        let (_, output) = world.run_to_end(&pod, &config)?;
        let shown: serde_json::Value = serde_json::from_str(&output)?;
        let text = shown["capabilities"]["effective"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(u64::from_str_radix(&text, 16)?)
    };
    let defaults = effective("defaults", &[], &[])?;
    ensure!(defaults == 0xa804_25fb, "{defaults:x}");
    // CHOWN is bit 0, NET_ADMIN 12, NET_RAW 13.
    ensure!(effective("dropped", &[], &["CHOWN"])? == defaults & !1);
    ensure!(
        effective("added", &["NET_ADMIN"], &["CAP_NET_RAW"])? == (defaults | 1 << 12) & !(1 << 13)
    );
    ensure!(effective("none", &[], &["ALL"])? == 0);
    let config = container("chown", TOOLS, &["chown", "1", "/etc/from-image"]).set(
        "/linux/security_context/capabilities/drop_capabilities",
        json!(["CHOWN"]),
    );
    let (status, _) = world.run_to_end(&pod, &config)?;
    ensure!(status["exitCode"] == 1, "{status:#}");
    world.finish()
}

#[test]
fn default_seccomp_refuses_unshare_user() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("seccomp")?;
    for (name, profile, want) in [
        ("default", 0, "unshare user: EPERM\n"),
        ("unconfined", 1, "ok\n"),
    ] {
        let config = container(name, TOOLS, &["probe", "unshare", "user"]).set(
            "/linux/security_context/seccomp",
            json!({"profile_type": profile}),
        );
        let (_, output) = world.run_to_end(&pod, &config)?;
        ensure!(output == want, "{name}: {output}");
    }
    let profile = world.dir.join("profile.json");
    let text = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]});
    std::fs::write(&profile, text.to_string())?;
    let config = container("local", TOOLS, &["chmod", "700", "/app"]).set(
        "/linux/security_context/seccomp",
        json!({"profile_type": 2, "localhost_ref": profile}),
    );
    let (status, _) = world.run_to_end(&pod, &config)?;
    ensure!(status["exitCode"] == 1, "{status:#}");
    world.finish()
}

#[test]
fn user_by_name_and_number_has_its_groups() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    for image in [TOOLS, "docker.io/coracle/user:latest"] {
        world.pull(image)?;
    }
    let pod = world.pod("users")?;
    let mut ids = |name: &str, image: &str, set: &[(&str, serde_json::Value)]| -> Result<String> {
        let mut config = container(
            name,
            image,
            &["sh", "-c", "id -u; id -g; id -G; echo $HOME"],
        );
        for (key, value) in set {
            config = config.set(&format!("/linux/security_context/{key}"), value.clone());
        }
        let (_, output) = world.run_to_end(&pod, &config)?;
        Ok(output.lines().collect::<Vec<_>>().join(" | "))
    };
    let image = "docker.io/coracle/user:latest";
    ensure!(ids("image", image, &[])? == "1234 | 1235 | 1235 2001 2002 | /home/app");
    let name = ids("name", TOOLS, &[("run_as_username", json!("app"))])?;
    ensure!(name == "1234 | 1235 | 1235 2001 2002 | /home/app", "{name}");
    let number = ids("number", TOOLS, &[("run_as_user", json!({"value": 4242}))])?;
    ensure!(number.starts_with("4242 | 0 | 0 | "), "{number}");
    let group = ids(
        "group",
        TOOLS,
        &[
            ("run_as_user", json!({"value": 4242})),
            ("run_as_group", json!({"value": 77})),
            ("supplemental_groups", json!([88, 99])),
        ],
    )?;
    ensure!(group.starts_with("4242 | 77 | 77 88 99"), "{group}");
    world.finish()
}

#[test]
fn env_cwd_command_and_args_follow_the_image_unless_given() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    for image in [TOOLS, "docker.io/coracle/entrypoint:latest"] {
        world.pull(image)?;
    }
    let pod = world.pod("env")?;
    let config = container(
        "env",
        TOOLS,
        &["sh", "-c", "pwd; echo $FROM_IMAGE $OVERRIDDEN $NEW"],
    )
    .set(
        "/envs",
        json!([{"key": "OVERRIDDEN", "value": "pod"}, {"key": "NEW", "value": "new"}]),
    );
    let (_, output) = world.run_to_end(&pod, &config)?;
    ensure!(output == "/app\nimage pod new\n", "{output}");
    let config = container("cwd", TOOLS, &["pwd"]).set("/working_dir", "/made/on/demand");
    let (_, output) = world.run_to_end(&pod, &config)?;
    ensure!(output == "/made/on/demand\n", "{output}");
    let image = "docker.io/coracle/entrypoint:latest";
    let mut run = |name: &str, command: &[&str], args: &[&str]| -> Result<String> {
        let config = container(name, image, command).set("/args", json!(args));
        Ok(world.run_to_end(&pod, &config)?.1)
    };
    ensure!(run("both", &[], &[])? == "entrypoint cmd\n");
    ensure!(run("args", &[], &["mine"])? == "entrypoint mine\n");
    ensure!(run("command", &["echo", "command"], &[])? == "command\n");
    world.finish()
}

#[test]
fn stop_signal_of_the_image_is_sent() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let image = "docker.io/coracle/stopsignal:latest";
    world.pull(image)?;
    let pod = world.pod("signal")?;
    let id = world.start_container(&pod, &container("c", image, &[]))?;
    world.wait_log(&id, "ready")?;
    world.crictl.run(&["stop", "--timeout", "10", &id])?;
    let status = world.wait_exited(&id)?;
    ensure!(status["exitCode"] == 7, "{status:#}");
    ensure!(world.crictl.run(&["logs", &id])?.contains("got SIGUSR1"));
    world.finish()
}

#[test]
fn resources_updated_while_running_hold_and_are_reported() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("update")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    world
        .crictl
        .run(&["update", "--memory", "50331648", "--cpu-share", "512", &id])?;
    let status = world.container_status(&id)?;
    let linux = &status["resources"]["linux"];
    ensure!(
        linux["memoryLimitInBytes"] == "50331648" && linux["cpuShares"] == "512",
        "{linux:#}"
    );
    let file = ["memory/memory.limit_in_bytes", "memory.max"];
    let script = format!(
        "cat /sys/fs/cgroup/{} 2>/dev/null || cat /sys/fs/cgroup/{}",
        file[0], file[1]
    );
    let inside = world.exec(&id, &["sh", "-c", &script])?;
    ensure!(inside == "50331648", "{inside}");
    world.finish()
}

#[test]
fn stats_count_what_the_container_uses() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("stats")?;
    let script = "dd if=/dev/zero of=/app/file bs=1M count=5 2>/dev/null; exec probe eat 20";
    let id = world.tools(&pod, "c", &["sh", "-c", script])?;
    world.wait_log(&id, "ate 20 MiB")?;
    let stats = world.crictl.json(&["stats", "-o", "json", &id])?;
    let one = &stats["stats"][0];
    let number =
        |v: &serde_json::Value| v.as_str().and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
    let memory = number(&one["memory"]["workingSetBytes"]["value"]);
    ensure!((20 << 20..60 << 20).contains(&memory), "{one:#}");
    ensure!(
        number(&one["cpu"]["usageCoreNanoSeconds"]["value"]) > 0,
        "{one:#}"
    );
    let layer = number(&one["writableLayer"]["usedBytes"]["value"]);
    ensure!((5 << 20..8 << 20).contains(&layer), "{one:#}");
    let pods = world
        .crictl
        .json(&["statsp", "-o", "json", "--id", &pod.id])?;
    ensure!(
        pods["stats"][0]["attributes"]["id"] == json!(pod.id),
        "{pods:#}"
    );
    world.finish()
}

#[test]
fn lists_filter_by_id_prefix_label_state_and_pod() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let (one, two) = (world.pod("one")?, world.pod("two")?);
    let config = container("red", TOOLS, &["sleep", "1000"])
        .set("/labels", json!({"color": "red"}))
        .set("/annotations", json!({"note": "kept"}));
    let red = world.start_container(&one, &config)?;
    let done = world.tools(&two, "done", &["true"])?;
    world.wait_exited(&done)?;
    let ids = |args: &[&str]| {
        world
            .crictl
            .ids(&[&["ps", "-q", "--no-trunc"], args].concat())
    };
    ensure!(
        ids(&[])? == std::slice::from_ref(&red),
        "running: {:?}",
        ids(&[])?
    );
    ensure!(ids(&["-a"])?.len() == 2);
    ensure!(ids(&["-a", "--label", "color=red"])? == std::slice::from_ref(&red));
    ensure!(ids(&["-a", "--pod", &two.id])? == std::slice::from_ref(&done));
    ensure!(ids(&["-a", "--state", "exited"])? == std::slice::from_ref(&done));
    ensure!(ids(&["-a", "--id", &red[..6]])? == std::slice::from_ref(&red));
    ensure!(ids(&["-a", "--id", "ffffffffffffffff"])?.is_empty());
    let status = world.container_status(&red[..12])?;
    ensure!(
        status["annotations"]["note"] == "kept" && status["labels"]["color"] == "red",
        "{status:#}"
    );
    ensure!(status["metadata"]["name"] == "red", "{status:#}");
    world.finish()
}

#[test]
fn volumes_bind_with_their_modes_and_propagation() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    for image in [TOOLS, "docker.io/coracle/volume:latest"] {
        world.pull(image)?;
    }
    let pod = world.pod("volumes")?;
    let (rw, ro) = (world.dir.join("rw"), world.dir.join("ro"));
    for dir in [&rw, &ro] {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(ro.join("file"), "host\n")?;
    let link = world.dir.join("link");
    std::os::unix::fs::symlink(&rw, &link)?;
    let missing = world.dir.join("made-by-us");
    let script =
        "echo in > /rw/file; cat /ro/file; echo x > /ro/file; echo $?; ls -d /missing; sleep 1000";
    let config = container("c", TOOLS, &["sh", "-c", script])
        .push(
            "/mounts",
            json!({"container_path": "/rw", "host_path": link}),
        )
        .push(
            "/mounts",
            json!({"container_path": "/ro", "host_path": ro, "readonly": true}),
        )
        .push(
            "/mounts",
            json!({"container_path": "/missing", "host_path": missing}),
        );
    let id = world.start_container(&pod, &config)?;
    world.wait_log(&id, "/missing")?;
    let logs = world.crictl.run(&["logs", &id])?;
    ensure!(logs.contains("host\n1\n/missing"), "{logs}");
    ensure!(std::fs::read_to_string(rw.join("file"))? == "in\n" && missing.is_dir());
    // An image's VOLUME is there, seeded with what the image has, and gone with the container.
    let image = "docker.io/coracle/volume:latest";
    let script = "cat /data/seed; stat -c %u:%g /data/seed; ls /fresh; grep -c ' /data ' /proc/self/mountinfo";
    let (_, output) = world.run_to_end(&pod, &container("v", image, &["sh", "-c", script]))?;
    ensure!(output == "seed\n1234:1235\n1\n", "{output}");
    world.finish()
}

#[test]
fn privileged_container_in_a_privileged_pod_has_devices_and_capabilities() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let config = world
        .pod_config("privileged")
        .set("/linux/security_context/privileged", true);
    let pod = world.run_pod(&config)?;
    let config = container(
        "c",
        TOOLS,
        &[
            "sh",
            "-c",
            "ls -d /dev/fuse; mount -t tmpfs x /mnt && echo mounted",
        ],
    )
    .set("/linux/security_context/privileged", true);
    let (status, output) = world.run_to_end(&pod, &config)?;
    ensure!(output.contains("mounted"), "{output} {status:#}");
    let plain = world.pod("plain")?;
    let error = world.refuse_container(&plain, &config)?;
    ensure!(error.contains("privileged"), "{error}");
    world.finish()
}

#[test]
fn removal_of_a_running_container_needs_force() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("removal")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    let started = std::time::Instant::now();
    world.crictl.run(&["rm", "-f", &id])?;
    ensure!(started.elapsed() < Duration::from_secs(12));
    ensure!(world.crictl.ids(&["ps", "-aq"])?.is_empty());
    // Its name is free again.
    let id = world.tools(&pod, "c", &["true"])?;
    world.wait_exited(&id)?;
    world.crictl.run(&["rm", &id])?;
    world.finish()
}
