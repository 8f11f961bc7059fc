//! The runtime's command line: lifecycle, exit codes, and the texts that engines look for in
//! errors. Runs `coracle` alone, without shim or daemon.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::need_root;
use serde_json::json;

#[test]
fn run_exit_code_is_the_process_exit_code() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    for code in ["0", "1", "42", "255"] {
        let bundle = bench.bundle("b", &bench.config("c", &["exit", code]))?;
        let output = coracle.try_run(&["run", "-b", &bundle.display().to_string(), "c"])?;
        ensure!(
            output.status.code() == code.parse().ok(),
            "exit {code}: {output:?}"
        );
        ensure!(output.stderr.is_empty(), "stderr: {output:?}");
    }
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}

#[test]
fn run_killed_process_gives_128_plus_signal() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let mut child = coracle
        .command(&["run", "-b", &bundle.display().to_string(), "c"])
        .spawn()?;
    coracle_integration::wait_for("the container", Duration::from_secs(10), || {
        Ok(coracle.state("c").ok().filter(|s| s["status"] == "running"))
    })?;
    coracle.run(&["kill", "c", "KILL"])?;
    ensure!(child.wait()?.code() == Some(137));
    bench.finish()
}

#[test]
fn lifecycle_create_start_kill_delete_shows_each_status() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    let pid_file = bench.dir.join("pid");
    let pid_file_text = pid_file.display().to_string();
    let log = bench.dir.join("log");
    coracle.detached(
        &["create", "-b", &bundle, "--pid-file", &pid_file_text, "c"],
        &log,
    )?;
    let created = coracle.state("c")?;
    ensure!(created["status"] == "created", "{created:#}");
    ensure!(
        created["id"] == "c" && created["bundle"] == json!(bundle),
        "{created:#}"
    );
    let pid = std::fs::read_to_string(&pid_file)?;
    ensure!(
        created["pid"] == json!(pid.trim().parse::<u32>()?),
        "{created:#}, file {pid}"
    );
    ensure!(created["ociVersion"].is_string());

    coracle.run(&["start", "c"])?;
    ensure!(coracle.state("c")?["status"] == "running");
    let error = coracle.refused(&["start", "c"])?;
    ensure!(
        error.contains("cannot start an already running container"),
        "{error}"
    );
    let error = coracle.refused(&["delete", "c"])?;
    ensure!(error.contains("that is not stopped"), "{error}");

    let listed: serde_json::Value = serde_json::from_str(&coracle.run(&["list", "-f", "json"])?)?;
    ensure!(
        listed[0]["id"] == "c" && listed[0]["status"] == "running",
        "{listed:#}"
    );
    let ps: Vec<u32> = serde_json::from_str(&coracle.run(&["ps", "-f", "json", "c"])?)?;
    ensure!(ps == [pid.trim().parse::<u32>()?], "{ps:?}");

    coracle.run(&["kill", "c", "9"])?;
    coracle.wait_status("c", "stopped")?;
    let error = coracle.refused(&["kill", "c", "9"])?;
    ensure!(error.contains("container not running"), "{error}");
    coracle.run(&["delete", "c"])?;
    let error = coracle.refused(&["state", "c"])?;
    ensure!(error.contains("container does not exist"), "{error}");
    bench.finish()
}

#[test]
fn create_existing_id_is_refused_and_leaves_the_first() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench
        .bundle("b", &bench.config("c", &["sleep", "60"]))?
        .display()
        .to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let error = coracle.refused(&["create", "-b", &bundle, "c"])?;
    ensure!(
        error.contains("container with given ID already exists"),
        "{error}"
    );
    ensure!(coracle.state("c")?["status"] == "running");
    coracle.run(&["delete", "-f", "c"])?;
    bench.finish()
}

#[test]
fn commands_unknown_container_say_it_does_not_exist() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    for args in [
        &["state", "nosuch"][..],
        &["start", "nosuch"],
        &["kill", "nosuch", "9"],
        &["exec", "nosuch", "true"],
        &["pause", "nosuch"],
        &["resume", "nosuch"],
        &["ps", "nosuch"],
        &["delete", "nosuch"],
    ] {
        let error = coracle.refused(args)?;
        ensure!(
            error.contains("container does not exist"),
            "{args:?}: {error}"
        );
    }
    // The shim's clean-up of something that was never there must not fail.
    coracle.run(&["delete", "--force", "nosuch"])?;
    bench.finish()
}

#[test]
fn id_malformed_is_refused() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench
        .bundle("b", &bench.config("c", &["true"]))?
        .display()
        .to_string();
    for id in ["..", ".", "a/b", "a b", ""] {
        let error = coracle.refused(&["run", "-b", &bundle, id])?;
        ensure!(!error.is_empty(), "{id:?}: {error}");
    }
    bench.finish()
}

#[test]
fn run_missing_program_says_so_and_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    for (program, text) in [
        ("nosuch", "executable file not found in $PATH"),
        ("/bin/nosuch", "no such file or directory"),
        ("/etc", "is a directory"),
    ] {
        let config = bench
            .config("c", &[])
            .set("/process/args", json!([program]));
        let bundle = bench.bundle("b", &config)?.display().to_string();
        let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
        ensure!(
            error.contains("unable to start container process"),
            "{program}: {error}"
        );
        ensure!(error.contains(text), "{program}: {error}");
        ensure!(
            coracle.run(&["list", "-q"])?.is_empty(),
            "{program}: a container is left"
        );
    }
    bench.finish()
}

#[test]
fn run_bad_config_names_the_field_and_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let none: [&str; 0] = [];
    for (pointer, value, named) in [
        ("/process/args", json!(none), "args"),
        ("/process/cwd", json!("relative"), "Cwd"),
        ("/root/path", json!("nosuch"), "nosuch"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_BOGUS", "hard": 1, "soft": 1}]),
            "RLIMIT_BOGUS",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "pid"}, {"type": "mount"}]),
            "pid",
        ),
        (
            "/linux/sysctl",
            json!({"kernel.domainname": "x", "vm.swappiness": "1"}),
            "vm.swappiness",
        ),
        (
            "/process/user",
            json!({"uid": 4_294_967_295u32, "gid": 0}),
            "process.user",
        ),
    ] {
        let config = bench.config("c", &["true"]).set(pointer, value);
        let bundle = bench.bundle("b", &config)?.display().to_string();
        let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
        ensure!(error.contains(named), "{pointer}: {error}");
        ensure!(
            coracle.run(&["list", "-q"])?.is_empty(),
            "{pointer}: a container is left"
        );
    }
    std::fs::write(bench.dir.join("b/config.json"), "{ nonsense")?;
    let bundle = bench.dir.join("b").display().to_string();
    let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
    ensure!(
        error.contains("config.json") || error.contains("line 1"),
        "{error}"
    );
    let error = coracle.refused(&["run", "-b", "/nonexistent", "c"])?;
    ensure!(error.contains("/nonexistent"), "{error}");
    bench.finish()
}

#[test]
fn errors_with_log_option_are_json_records() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let log = bench.dir.join("log.json");
    let log_text = log.display().to_string();
    coracle.refused(&[
        "--log",
        &log_text,
        "--log-format",
        "json",
        "state",
        "nosuch",
    ])?;
    let text = std::fs::read_to_string(&log)?;
    let record: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    ensure!(
        record["level"] == "error" && record["time"].is_string(),
        "{record:#}"
    );
    let message = record["msg"].as_str().unwrap_or_default();
    ensure!(message.contains("container does not exist"), "{record:#}");
    bench.finish()
}

#[test]
fn exec_runs_inside_with_its_own_exit_code() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench
        .bundle("b", &bench.config("c", &["sleep", "60"]))?
        .display()
        .to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let shown = coracle.run(&["exec", "--cwd", "/app", "-e", "A=b", "c", "/bin/probe"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    ensure!(
        shown["cwd"] == "/app" && shown["env"]["A"] == "b",
        "{shown:#}"
    );
    ensure!(shown["hostname"] == "runtime-test", "{shown:#}");
    ensure!(shown["noNewPrivs"] == "1", "{shown:#}");
    let output = coracle.try_run(&["exec", "c", "/bin/probe", "exit", "7"])?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    let output = coracle.try_run(&["exec", "c", "/bin/nosuch"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(error.contains("no such file or directory"), "{error}");
    ensure!(
        output.status.code() == Some(127) || output.status.code() == Some(255),
        "{output:?}"
    );
    coracle.run(&["kill", "c", "KILL"])?;
    coracle.wait_status("c", "stopped")?;
    let error = coracle.refused(&["exec", "c", "/bin/probe"])?;
    ensure!(
        error.contains("cannot exec in a stopped container"),
        "{error}"
    );
    coracle.run(&["delete", "c"])?;
    bench.finish()
}

#[test]
fn pause_stops_the_clock_and_resume_goes_on() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench.config("c", &["lines", "0", "10000"]);
    let bundle = bench.bundle("b", &config)?.display().to_string();
    let log = bench.dir.join("log");
    let size = || std::fs::metadata(&log).map(|m| m.len()).unwrap_or(0);
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &log)?;
    coracle_integration::wait_for("output", Duration::from_secs(5), || {
        Ok((size() > 0).then_some(()))
    })?;
    coracle.run(&["pause", "c"])?;
    ensure!(coracle.state("c")?["status"] == "paused");
    let before = size();
    std::thread::sleep(Duration::from_millis(300));
    ensure!(size() == before, "it ran on while paused");
    let error = coracle.refused(&["exec", "c", "/bin/probe", "true"])?;
    ensure!(error.contains("paused"), "{error}");
    coracle.run(&["resume", "c"])?;
    ensure!(coracle.state("c")?["status"] == "running");
    coracle_integration::wait_for("more output", Duration::from_secs(5), || {
        Ok((size() > before).then_some(()))
    })?;
    // A paused container can be removed too.
    coracle.run(&["pause", "c"])?;
    let started = Instant::now();
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(started.elapsed() < Duration::from_secs(5));
    bench.finish()
}

#[test]
fn spec_writes_a_config_that_runs() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["true"]))?;
    std::fs::remove_file(bundle.join("config.json"))?;
    coracle.run(&["spec", "-b", &bundle.display().to_string()])?;
    let written = std::fs::read(bundle.join("config.json"))?;
    let written = coracle_integration::crictl::Config(serde_json::from_slice(&written)?);
    ensure!(
        written.0["process"]["args"] == json!(["sh"]),
        "{:#}",
        written.0
    );
    written
        .set("/process/args", json!(["/bin/probe", "euid"]))
        .set("/process/terminal", false)
        .set("/linux/cgroupsPath", format!("/{}/c", bench.mark))
        .write(&bundle.join("config.json"))?;
    let output = coracle.run(&["run", "-b", &bundle.display().to_string(), "c"])?;
    ensure!(output == "Effective uid: 0\n", "{output}");
    let error = coracle.refused(&["spec", "-b", &bundle.display().to_string()])?;
    ensure!(
        error.contains("config.json") && error.contains("exists"),
        "{error}"
    );
    bench.finish()
}

#[test]
fn features_and_version_are_what_engines_parse() -> Result<()> {
    let bench = match rustix::process::geteuid().is_root() {
        true => Bench::new()?,
        false => coracle_integration::skip!("needs root"),
    };
    let coracle = bench.coracle()?;
    let features: serde_json::Value = serde_json::from_str(&coracle.run(&["features"])?)?;
    ensure!(features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string());
    let namespaces = features["linux"]["namespaces"].to_string();
    for kind in ["pid", "mount", "network", "ipc", "uts", "user", "cgroup"] {
        ensure!(namespaces.contains(kind), "{namespaces}");
    }
    let version = coracle.run(&["--version"])?;
    ensure!(
        version.starts_with("coracle version ") && version.contains("spec: "),
        "{version}"
    );
    bench.finish()
}

#[test]
fn hooks_see_the_state_in_their_order() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let out = bench.dir.join("hooks");
    std::fs::create_dir_all(&out)?;
    // Hooks that run in the container's root cannot see a host directory: those are left out.
    let hook = |name: &str| {
        let script = format!(
            "cat > {0}/{name}; date +%s%N > {0}/{name}.time",
            out.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let mut config = bench.config("c", &["true"]);
    let kinds = ["prestart", "createRuntime", "poststart", "poststop"];
    for kind in kinds {
        config = config.set(&format!("/hooks/{kind}"), hook(kind));
    }
    let bundle = bench.bundle("b", &config)?.display().to_string();
    coracle.run(&["run", "-b", &bundle, "c"])?;
    let mut last = 0u128;
    for kind in kinds {
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join(kind))?)?;
        ensure!(
            state["id"] == "c" && state["bundle"] == json!(bundle),
            "{kind}: {state:#}"
        );
        let time = std::fs::read_to_string(out.join(format!("{kind}.time")))?
            .trim()
            .parse()?;
        ensure!(time >= last, "{kind} ran before the hook that precedes it");
        last = time;
    }
    bench.finish()
}

#[test]
fn hook_failing_stops_the_start_and_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench.config("c", &["true"]).set(
        "/hooks/createRuntime",
        json!([{"path": "/bin/false", "args": ["false"]}]),
    );
    let bundle = bench.bundle("b", &config)?.display().to_string();
    let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
    ensure!(error.contains("hook"), "{error}");
    ensure!(
        coracle.run(&["list", "-q"])?.is_empty(),
        "a container is left"
    );
    bench.finish()
}

#[test]
fn run_under_a_caller_that_blocks_and_ignores_signals_container_does_not() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench
        .bundle("b", &bench.config("c", &["show"]))?
        .display()
        .to_string();
    let output = std::process::Command::new("env")
        .args([
            "--ignore-signal=TERM",
            "--ignore-signal=USR1",
            "--block-signal=HUP",
        ])
        .args(coracle.words(&["run", "-b", &bundle, "c"]))
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let bits = |key: &str| {
        let text = shown["signals"][key]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        u64::from_str_radix(&text, 16)
    };
    ensure!(bits("blocked")? == 0, "{:#}", shown["signals"]);
    // TERM is 15, USR1 is 10.
    ensure!(
        bits("ignored")? & (1 << 14 | 1 << 9) == 0,
        "{:#}",
        shown["signals"]
    );
    bench.finish()
}

#[test]
fn bind_mount_shared_carries_mounts_out_and_slave_does_not() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let none: Option<&str> = None;
    for (runtime, propagation, seen) in [
        (bench.peer("runc")?, "rshared", true),
        (bench.peer("runc")?, "rslave", false),
        (Some(bench.coracle()?), "rshared", true),
        (Some(bench.coracle()?), "rslave", false),
        (Some(bench.coracle()?), "rprivate", false),
    ] {
        let Some(runtime) = runtime else { continue };
        let shared = bench.dir.join("shared");
        std::fs::create_dir_all(shared.join("sub"))?;
        nix::mount::mount(
            Some(&shared),
            &shared,
            none,
            nix::mount::MsFlags::MS_BIND,
            none,
        )?;
        nix::mount::mount(none, &shared, none, nix::mount::MsFlags::MS_SHARED, none)?;
        let all = json!(["CAP_SYS_ADMIN"]);
        let config = bench
            .config("c", &["bind", "/bin", "/app/sub"])
            .set("/linux/rootfsPropagation", propagation)
            .set(
                "/process/capabilities",
                json!({"bounding": all, "effective": all, "permitted": all}),
            )
            .push(
                "/mounts",
                json!({"destination": "/app", "type": "bind", "source": shared,
                       "options": ["rbind", propagation]}),
            );
        let bundle = bench.bundle("b", &config)?.display().to_string();
        let log = bench.dir.join("log");
        runtime.detached(&["run", "-d", "-b", &bundle, "c"], &log)?;
        coracle_integration::wait_for("the mount", Duration::from_secs(5), || {
            Ok(std::fs::read_to_string(&log)?
                .contains("bound")
                .then_some(()))
        })?;
        let found = shared.join("sub/probe").exists();
        runtime.run(&["delete", "-f", "c"])?;
        if found {
            nix::mount::umount(&shared.join("sub"))?;
        }
        nix::mount::umount(&shared)?;
        ensure!(
            found == seen,
            "{} {propagation}: seen outside: {found}",
            runtime.name
        );
    }
    bench.finish()
}
