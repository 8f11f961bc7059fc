//! The serving shim confines itself, and what needs power is done by its hands: one process more,
//! nothing less than before. What exactly is refused is tested where it is written (shim/src/
//! confine, hands); the other suites of the shim run confined, which is the default.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::shim::stand::{Stand, alive, are_hands};
use coracle_integration::shim::{RUNNING, refusal};
use coracle_integration::{need_root, wait_for};
use rustix::process::{Pid, Signal, kill_process};

/// Of /proc/<pid>/status.
fn status(pid: i32) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect())
}

fn holds(pid: i32, expected: &[(&str, &str)]) -> Result<()> {
    let status = status(pid)?;
    for (key, value) in expected {
        let got = status.get(*key).map(String::as_str);
        ensure!(got == Some(*value), "{key} of {pid}: {got:?}");
    }
    Ok(())
}

fn hands_of(shim: i32) -> Result<Option<i32>> {
    let text = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
    let pids: std::result::Result<Vec<i32>, _> =
        text.split_ascii_whitespace().map(str::parse).collect();
    Ok(pids?.into_iter().find(|pid| are_hands(*pid)))
}

fn kill(pid: i32) -> Result<()> {
    Ok(kill_process(
        Pid::from_raw(pid).context("pid")?,
        Signal::KILL,
    )?)
}

/// Whether the kernel has Landlock: then the shim must use it.
fn has_landlock() -> bool {
    let list = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    list.split(',').any(|name| name.trim() == "landlock")
}

#[test]
fn shim_is_confined_and_what_it_starts_is_not() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, pid) = stand.run("g", "a", "echo here; sleep 1000")?;
    stand.wait_line("a", "here")?;
    let own = shim.pid()?;
    holds(
        own,
        &[("Seccomp", "2"), ("NoNewPrivs", "1"), ("Threads", "1")],
    )?;
    let hands = hands_of(own)?.context("the shim has hands")?;
    let parent = own.to_string();
    holds(
        hands,
        &[
            ("Seccomp", "0"),
            ("NoNewPrivs", "0"),
            ("Threads", "1"),
            ("PPid", &parent),
        ],
    )?;
    // The container's process is the shim's own child, with what its config says.
    holds(pid, &[("Seccomp", "0"), ("PPid", &parent)])?;
    shim.exec("a", "e", &["/usr/bin/true"], "")?;
    shim.start("a", "e")?;
    ensure!(shim.wait("a", "e")?.exit_status == 0);
    shim.delete("a", "e")?;

    // Memory that this pod has and no other: a page of both processes counts once.
    let of = |pid: i32| -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|l| l.strip_prefix("Pss_Anon:"));
        let line = line.context("Pss_Anon")?.trim().trim_end_matches(" kB");
        Ok(line.parse()?)
    };
    let private = of(own)? + of(hands)?;
    ensure!(private <= 512, "{private} KiB for a pod");
    println!("{private} KiB for a pod");

    // A log may not lie among the system's files, and may lie elsewhere.
    let elsewhere = stand.dir().join("elsewhere.log");
    let allowed = format!("file://{}", elsewhere.display());
    shim.exec("a", "b", &["/usr/bin/echo", "line"], &allowed)?;
    shim.start("a", "b")?;
    shim.wait("a", "b")?;
    shim.delete("a", "b")?;
    ensure!(fs::read_to_string(&elsewhere)? == "line\n");
    let system = Path::new("/etc").join(format!("{}.log", stand.bench.mark));
    let refused = shim
        .exec(
            "a",
            "c",
            &["/usr/bin/true"],
            &format!("file://{}", system.display()),
        )
        .and_then(|()| shim.start("a", "c").map(drop));
    let made = system.exists();
    let _ = fs::remove_file(&system);
    if has_landlock() {
        let refused = refusal(refused)?;
        ensure!(refused.message.contains("Permission denied"), "{refused}");
        ensure!(!made, "{} was made", system.display());
    }

    shim.end("a")?;
    shim.shut_down()?;
    wait_for("the end of the hands", Duration::from_secs(5), || {
        Ok((!alive(hands)).then_some(()))
    })?;
    stand.finish()
}

#[test]
fn shim_without_hands_supervises_on_and_starts_nothing() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, pid) = stand.run("g", "a", "echo here; sleep 1000")?;
    stand.wait_line("a", "here")?;
    let hands = hands_of(shim.pid()?)?.context("the shim has hands")?;
    kill(hands)?;
    // No call hangs, and every one that needs them says what is missing.
    shim.exec("a", "e", &["/usr/bin/true"], "")?;
    let refused = refusal(shim.start("a", "e"))?;
    ensure!(refused.message.contains("hands are dead"), "{refused}");
    stand.write("g", "b", "true")?;
    let refused = refusal(shim.create(&stand.task("b")))?;
    ensure!(refused.message.contains("hands are dead"), "{refused}");
    wait_for("the shim's log", Duration::from_secs(5), || {
        let log = fs::read_to_string(stand.bundle("a").join("shim.log")).unwrap_or_default();
        Ok(log.contains("shim's hands died").then_some(()))
    })?;
    // What runs is supervised: its state, its log, its exit.
    ensure!(shim.state("a", "")?.status == RUNNING);
    kill(pid)?;
    ensure!(shim.wait("a", "")?.exit_status == 137);
    // The daemon's way out of a shim that can do no more.
    shim.crash()?;
    let answer = stand.launcher.delete(&stand.bundle("a"), "a")?;
    ensure!(answer.exit_status == 137, "{answer:?}");
    stand.finish()
}

#[test]
fn hands_that_do_not_answer_do_not_hold_up_the_shim() -> Result<()> {
    need_root!();
    let mut stand = Stand::new()?;
    stand.launcher = stand.launcher.env("CORACLE_SHIM_CALL_SECONDS", "2");
    let (shim, pid) = stand.run("g", "a", "sleep 1000")?;
    let hands = hands_of(shim.pid()?)?.context("the shim has hands")?;
    kill_process(Pid::from_raw(hands).context("pid")?, Signal::STOP)?;
    shim.exec("a", "e", &["/usr/bin/true"], "")?;
    let begun = Instant::now();
    let refused = refusal(shim.start("a", "e"))?;
    ensure!(
        refused.message.contains("did not answer in time"),
        "{refused}"
    );
    ensure!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    ensure!(shim.state("a", "")?.status == RUNNING);
    ensure!(!alive(hands));
    kill(pid)?;
    ensure!(shim.wait("a", "")?.exit_status == 137);
    shim.crash()?;
    stand.launcher.delete(&stand.bundle("a"), "a")?;
    stand.finish()
}

#[test]
fn hands_die_with_a_shim_that_is_killed() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, _) = stand.run("g", "a", "sleep 1000")?;
    let hands = hands_of(shim.pid()?)?.context("the shim has hands")?;
    shim.crash()?;
    wait_for("the end of the hands", Duration::from_secs(5), || {
        Ok((!alive(hands)).then_some(()))
    })?;
    stand.launcher.delete(&stand.bundle("a"), "a")?;
    stand.finish()
}

#[test]
fn programs_that_cannot_be_started_are_named() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let bundle = stand.write("g", "a", "true")?;
    let shim = stand.launcher.start(&bundle, "a")?;
    let task = stand.task("a").stdout("binary:///nonexistent/logger");
    let refused = refusal(shim.create(&task))?;
    ensure!(refused.message.contains("/nonexistent/logger"), "{refused}");
    ensure!(refused.message.contains("No such file"), "{refused}");
    // The hands have survived it.
    shim.create(&stand.task("a"))?;
    shim.start("a", "")?;
    ensure!(shim.wait("a", "")?.exit_status == 0);
    shim.delete("a", "")?;
    shim.shut_down()?;
    stand.finish()
}

#[test]
fn switch_turns_it_off() -> Result<()> {
    need_root!();
    let mut stand = Stand::new()?;
    stand.launcher = stand.launcher.env("CORACLE_SHIM_CONFINE", "0");
    let (shim, pid) = stand.run("g", "a", "echo here; sleep 1000")?;
    stand.wait_line("a", "here")?;
    let own = shim.pid()?;
    holds(
        own,
        &[("Seccomp", "0"), ("NoNewPrivs", "0"), ("Threads", "1")],
    )?;
    ensure!(hands_of(own)?.is_none());
    holds(pid, &[("PPid", &own.to_string())])?;
    shim.exec("a", "e", &["/usr/bin/true"], "")?;
    shim.start("a", "e")?;
    ensure!(shim.wait("a", "e")?.exit_status == 0);
    shim.delete("a", "e")?;
    shim.end("a")?;
    shim.shut_down()?;
    stand.finish()
}
