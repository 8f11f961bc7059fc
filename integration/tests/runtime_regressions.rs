//! Faults of the runtime that were found once: each keeps its test.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::{need_root, skip};
use serde_json::json;

/// The v1 hierarchy that a test makes a cgroup of its own in.
fn pids_hierarchy() -> Option<PathBuf> {
    let path = Path::new("/sys/fs/cgroup/pids");
    path.is_dir().then(|| path.to_owned())
}

#[test]
fn refused_cgroup_stays_as_it_was() -> Result<()> {
    need_root!();
    let Some(hierarchy) = pids_hierarchy() else {
        skip!("no v1 pids hierarchy");
    };
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["show"]))?;
    let cgroup = hierarchy.join(&bench.mark).join("c");
    std::fs::create_dir_all(&cgroup)?;
    let mut other = std::process::Command::new("sleep").arg("60").spawn()?;
    std::fs::write(cgroup.join("cgroup.procs"), other.id().to_string())?;

    let error = coracle.refused(&["run", "-b", &bundle.display().to_string(), "c"])?;
    let alive = other.try_wait()?.is_none();
    let members = std::fs::read_to_string(cgroup.join("cgroup.procs"));
    other.kill()?;
    other.wait()?;
    ensure!(error.contains("cgroup is not empty"), "{error}");
    ensure!(!error.contains("undo"), "{error}");
    ensure!(alive, "the other process was killed");
    ensure!(members?.trim() == other.id().to_string());
    ensure!(!coracle.root.join("c").exists(), "the state was left");

    // Nobody is in it now: it may be used, and a start that fails leaves it to its owner.
    let missing = bench.config("c", &[]).set(
        "/mounts",
        json!([{"destination": "/x", "type": "bind", "source": "/nope", "options": ["bind"]}]),
    );
    let bundle = bench.bundle("missing", &missing)?;
    let error = coracle.refused(&["run", "-b", &bundle.display().to_string(), "c"])?;
    ensure!(error.contains("/nope"), "{error}");
    ensure!(cgroup.is_dir(), "the cgroup of another was removed");
    std::fs::remove_dir(&cgroup).context("remove the test's cgroup")?;
    bench.finish()
}

/// Runs a config to its end and gives what it printed.
fn run(bench: &Bench, name: &str, config: &coracle_integration::crictl::Config) -> Result<String> {
    let bundle = bench.bundle(name, config)?;
    bench
        .coracle()?
        .run(&["run", "-b", &bundle.display().to_string(), name])
}

#[test]
fn hooks_without_env_have_runcs() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let out = bench.dir.join("out");
    let script = format!("(pwd; env) > {}", out.display());
    let config = bench
        .config("env", &["show"])
        .set("/process/env", json!(["PATH=/bin", "A=b"]))
        .set(
            "/hooks",
            json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}),
        );
    run(&bench, "env", &config)?;
    let text = std::fs::read_to_string(&out)?;
    let rootfs = bench.dir.join("env/rootfs").display().to_string();
    let mut lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("PWD=")).collect();
    lines.sort_unstable();
    ensure!(lines == [rootfs.as_str(), "PATH=/bin"], "{text}");
    bench.finish()
}

#[test]
fn filter_may_refuse_what_the_runtime_needs() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for (name, no_new_privileges) in [("old", false), ("new", true)] {
        let config = bench
            .config(name, &["show"])
            .set("/process/noNewPrivileges", no_new_privileges)
            .set(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["close_range", "close"], "action": "SCMP_ACT_ERRNO"}]}),
            );
        // The probe itself may miss what is refused here: that it was executed is enough.
        let bundle = bench.bundle(name, &config)?.display().to_string();
        let output = bench.coracle()?.try_run(&["run", "-b", &bundle, name])?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(!error.contains("unable to start"), "{name}: {error}");
    }
    bench.finish()
}

#[test]
fn read_only_mounts_hold_others() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let config = bench.config("ro", &["show"]);
    let mut mounts = config.0["mounts"].clone();
    for mount in mounts.as_array_mut().context("mounts")? {
        if mount["destination"] == "/dev" {
            mount["options"] = json!(["nosuid", "mode=755", "ro"]);
        }
    }
    let config = config.set("/mounts", mounts);
    let seen: serde_json::Value = serde_json::from_str(&run(&bench, "ro", &config)?)?;
    let mounts = seen["mounts"].as_array().context("mounts")?;
    let dev = mounts.iter().find(|m| m["target"] == "/dev");
    let flags = dev.context("/dev")?["flags"].as_str().unwrap_or_default();
    ensure!(flags.split(',').any(|flag| flag == "ro"), "{flags}");
    bench.finish()
}

#[test]
fn proc_is_the_kernels() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let with = |name: &str, mount: serde_json::Value| {
        let config = bench.config(name, &["show"]);
        let mut mounts = config.0["mounts"].clone();
        if let Some(list) = mounts.as_array_mut() {
            list.push(mount);
        }
        config.set("/mounts", mounts)
    };
    let refused = [
        (
            json!({"destination": "/proc", "type": "tmpfs"}),
            "not of type proc",
        ),
        (
            json!({"destination": "/proc", "type": "bind", "source": "/etc", "options": ["bind"]}),
            "not of type proc",
        ),
        (
            json!({"destination": "/proc/net/dev", "type": "bind", "source": "/etc/hosts",
                "options": ["bind"]}),
            "inside /proc",
        ),
    ];
    for (mount, reason) in refused {
        let bundle = bench.bundle("p", &with("p", mount))?.display().to_string();
        let error = bench.coracle()?.refused(&["run", "-b", &bundle, "p"])?;
        ensure!(error.contains(reason), "{error}");
    }
    bench.finish()
}

#[test]
fn created_container_ends_on_sigterm() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("t", &bench.config("t", &["show"]))?;
    let bundle = bundle.display().to_string();
    coracle.detached(&["create", "-b", &bundle, "t"], &bench.dir.join("log"))?;
    coracle.run(&["kill", "t", "TERM"])?;
    coracle.wait_status("t", "stopped")?;
    coracle.run(&["delete", "t"])?;
    bench.finish()
}

#[test]
fn caller_affinity_is_not_inherited() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let own = rustix::thread::sched_getaffinity(None)?;
    if own.count() < 2 {
        skip!("one processor");
    }
    let mut one = rustix::thread::CpuSet::new();
    one.set(0);
    rustix::thread::sched_setaffinity(None, &one)?;
    let log = bench.dir.join("log");
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("a", &bench.config("a", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "a"], &log)?;
    let pid = coracle.state("a")?["pid"].as_i64().unwrap_or_default();
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let theirs = rustix::thread::sched_getaffinity(pid)?;
    rustix::thread::sched_setaffinity(None, &own)?;
    coracle.run(&["delete", "-f", "a"])?;
    ensure!(theirs.count() > 1, "the program is kept to one processor");
    bench.finish()
}

#[test]
fn debug_tells_the_steps() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let bundle = bench.bundle("d", &bench.config("d", &["show"]))?;
    let bundle = bundle.display().to_string();
    let coracle = bench.coracle()?;
    for (flags, told) in [(vec!["--debug"], true), (vec![], false)] {
        let line = [flags, vec!["run", "-b", &bundle, "d"]].concat();
        let output = coracle.try_run(&line)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{text}");
        ensure!(text.contains("level=debug") == told, "{text}");
        let sealed = "coracle exeseal: using a read-only mount of /proc/self/exe";
        ensure!(text.contains(sealed) == told, "{text}");
    }
    bench.finish()
}

/// The profile is compiled once and then comes from the cache; what it ignores is told each time.
#[test]
fn debug_names_calls_that_no_table_knows() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let mut config = bench.config("unknown", &["show"]);
    config.0["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["reboot", "no_such_call"], "action": "SCMP_ACT_ERRNO"}]
    });
    let bundle = bench.bundle("unknown", &config)?.display().to_string();
    let log = bench.dir.join("log").display().to_string();
    let coracle = bench.coracle()?;
    let told = |flags: &[&str], command: &[&str]| -> Result<bool> {
        let flags = [flags, &["--log", &log, "--log-format", "json"]].concat();
        coracle.run(&[&flags, command].concat())?;
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        std::fs::write(&log, "")?;
        Ok(text.contains(r#""msg":"unknown seccomp syscall \"no_such_call\" ignored""#))
    };
    let debug = &["--debug"];
    for time in ["first", "second"] {
        let run = ["run", "-b", &bundle, time];
        ensure!(told(debug, &run)?, "{time} time");
    }
    let output = bench.dir.join("output");
    coracle.detached(&["create", "-b", &bundle, "open"], &output)?;
    ensure!(told(debug, &["exec", "open", "probe", "show"])?, "exec");
    coracle.run(&["delete", "-f", "open"])?;
    ensure!(
        !told(&[], &["run", "-b", &bundle, "silent"])?,
        "not asked to"
    );
    bench.finish()
}

/// Called as runc, coracle fails in runc's words; programs and runc's own suite look for them.
#[test]
fn failures_name_the_program_as_it_was_called() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let missing = bench.config("c", &["show"]).set("/root/path", "nowhere");
    let bundle = bench.bundle("c", &missing)?.display().to_string();
    let coracle = bench.coracle()?;
    let runc = bench.dir.join("runc");
    std::os::unix::fs::symlink(&coracle.words(&[])[0], &runc)?;
    let runc = Runtime::at("runc", runc, bench.dir.join("runc-root"));
    for (runtime, name) in [(&coracle, "coracle"), (&runc, "runc")] {
        for command in ["create", "run"] {
            let error = runtime.refused(&[command, "-b", &bundle, "c"])?;
            let words = format!("{name} {command} failed: ");
            ensure!(error.contains(&words), "not {words:?}: {error}");
        }
    }
    bench.finish()
}

/// A real-time signal has no name in most libraries.
#[test]
fn foreground_run_passes_real_time_signals_on() -> Result<()> {
    need_root!();
    const SIGRTMIN: i32 = 34;
    let bench = Bench::new()?;
    let mut config = bench.config("rt", &["sleep", "60"]);
    // Without a pid namespace of its own the program is no init, which would ignore the signal.
    if let Some(list) = config.0["linux"]["namespaces"].as_array_mut() {
        list.retain(|namespace| namespace["type"] != "pid");
    }
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("rt", &config)?.display().to_string();
    let log = std::fs::File::create(bench.dir.join("log"))?;
    let mut command = coracle.command(&["run", "-b", &bundle, "rt"]);
    let mut child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
    coracle_integration::wait_for("the program", std::time::Duration::from_secs(10), || {
        let state = coracle.try_run(&["state", "rt"])?;
        let text = String::from_utf8_lossy(&state.stdout).into_owned();
        let pid = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|state| state["pid"].as_u64());
        let program = pid.and_then(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).ok());
        Ok(program.filter(|path| path.ends_with("bin/probe")))
    })?;
    let status = std::process::Command::new("kill")
        .args([format!("-{SIGRTMIN}"), child.id().to_string()])
        .status()?;
    ensure!(status.success());
    let status = child.wait()?;
    ensure!(
        status.code() == Some(128 + SIGRTMIN),
        "{status}: {}",
        std::fs::read_to_string(bench.dir.join("log"))?
    );
    bench.finish()
}
