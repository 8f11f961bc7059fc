//! The shim dies, in every state of its containers: what its daemon does then leaves nothing, and
//! nothing that it supervised runs on beside its successor.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::shim::stand::{Stand, alive, are_hands, hanging_runtime};
use coracle_integration::shim::{self, PAUSED, RUNNING, Shim, refusal, wire};
use coracle_integration::{leak, need_root, wait_for};
use prost::Message as _;

/// `delete` for all of them at the same moment, as a daemon that has lost the group's shim does.
fn delete_at_once(stand: &Stand, ids: &[&str]) -> Result<Vec<wire::Deleted>> {
    let mut running = Vec::new();
    for id in ids {
        let mut command = stand.launcher.command(&stand.bundle(id), id, "delete")?;
        running.push((id, command.spawn()?));
    }
    let mut answers = Vec::new();
    for (id, child) in running {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success() && output.stderr.is_empty(),
            "delete {id}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        answers.push(wire::Deleted::decode(output.stdout.as_slice())?);
    }
    Ok(answers)
}

fn nanos(time: &Option<prost_types::Timestamp>) -> Result<i128> {
    let time = time.as_ref().context("a time")?;
    Ok(i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos))
}

/// Id, pid of the init, and the code that it ended with or will when it is killed.
type Member = (&'static str, i32, u32);

/// A group in every state that outlives a request.
fn group_in_every_state(stand: &Stand) -> Result<(Shim, Vec<Member>)> {
    let (shim, created) = stand.create("g", "created", "sleep 1000")?;
    let (_, running) = stand.run("g", "running", "sleep 1000 & sleep 1001")?;
    let (_, paused) = stand.run("g", "paused", "sleep 1000 & sleep 1001")?;
    shim.ask("Pause", "paused")?;
    ensure!(shim.state("paused", "")?.status == PAUSED);
    let (_, busy) = stand.run("g", "busy", "sleep 1000")?;
    for exec in ["e1", "e2"] {
        shim.exec("busy", exec, &["/usr/bin/sleep", "1002"], "")?;
        shim.start("busy", exec)?;
    }
    shim.exec("busy", "e3", &["/usr/bin/true"], "")?;
    let (_, exited) = stand.run("g", "exited", "exit 23")?;
    ensure!(shim.wait("exited", "")?.exit_status == 23);
    Ok((
        shim,
        vec![
            ("created", created, 137),
            ("running", running, 137),
            ("paused", paused, 137),
            ("busy", busy, 137),
            ("exited", exited, 23),
        ],
    ))
}

fn shim_killed_in_every_state(stand: Stand) -> Result<()> {
    let (shim, group) = group_in_every_state(&stand)?;
    let ended = nanos(&shim.wait("exited", "")?.exited_at)?;
    shim.crash()?;
    let ids: Vec<&str> = group.iter().map(|(id, ..)| *id).collect();
    let first = delete_at_once(&stand, &ids)?;
    // Nothing is left when the first round ends, whatever order it took.
    let left = stand.left_of_tasks()?;
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    ensure!(
        stand.launcher.left().is_empty(),
        "{:?}",
        stand.launcher.left()
    );
    for ((id, pid, code), answer) in group.iter().zip(&first) {
        ensure!(!alive(*pid), "{id} lives on");
        ensure!(answer.exit_status == *code, "{id}: {answer:?}");
        ensure!(answer.pid == *pid as u32, "{id} was {pid}: {answer:?}");
    }
    ensure!(nanos(&first[4].exited_at)? == ended, "{:?}", first[4]);
    // An end has one code and one time, however often it is asked for.
    ensure!(delete_at_once(&stand, &ids)? == first);
    stand.finish()
}

#[test]
fn shim_killed_in_every_state_leaves_nothing_of_its_group() -> Result<()> {
    need_root!();
    shim_killed_in_every_state(Stand::new()?)
}

#[test]
fn shim_killed_in_every_state_leaves_nothing_in_the_unified_hierarchy() -> Result<()> {
    need_root!();
    shim_killed_in_every_state(Stand::unified()?)
}

#[test]
fn shim_that_replaces_a_dead_one_finds_nothing_running() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (first, group) = group_in_every_state(&stand)?;
    first.crash()?;
    // The daemon did not notice: it wants one more container in the group.
    let (second, new) = stand.run("g", "new", "sleep 1000")?;
    ensure!(first.socket == second.socket);
    for (id, pid, _) in &group {
        ensure!(!alive(*pid), "{id} lives on beside the new shim");
    }
    // Now it does. What it says of the dead does not harm the living.
    let ids: Vec<&str> = group.iter().map(|(id, ..)| *id).collect();
    for ((id, _, code), answer) in group.iter().zip(delete_at_once(&stand, &ids)?) {
        ensure!(answer.exit_status == *code, "{id}: {answer:?}");
    }
    ensure!(alive(new) && second.state("new", "")?.status == RUNNING);
    ensure!(second.end("new")?.exit_status == 137);
    second.shut_down()?;
    stand.finish()
}

#[test]
fn start_is_one_shim_for_a_group_whoever_races_for_it() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let ids: Vec<String> = (0..8).map(|n| format!("c{n}")).collect();
    for id in &ids {
        stand.write("g", id, "exit 7")?;
    }
    let shims = || {
        let all = leak::processes(&stand.bench.mark).into_iter();
        let pid = |p: &str| p.split(' ').next().and_then(|pid| pid.parse().ok());
        all.filter(|p| p.contains("-socket") && !pid(p).is_some_and(are_hands))
            .collect::<Vec<_>>()
    };
    // Twice: with no socket, and over that of a shim that was killed.
    for round in 0..2 {
        let mut starts = Vec::new();
        for id in &ids {
            let mut command = stand.launcher.command(&stand.bundle(id), id, "start")?;
            starts.push(command.stdout(Stdio::piped()).spawn()?);
        }
        let mut sockets = Vec::new();
        for start in starts {
            let output = start.wait_with_output()?;
            ensure!(output.status.success(), "{output:?}");
            sockets.push(Shim::at(&String::from_utf8_lossy(&output.stdout))?.socket);
        }
        sockets.dedup();
        ensure!(sockets.len() == 1, "{sockets:?}");
        // Its hands have their name a moment later.
        let found = wait_for("one shim", Duration::from_secs(5), || {
            Ok((shims().len() == 1).then_some(()))
        });
        ensure!(found.is_ok(), "{:?}", shims());
        let shim = Shim {
            socket: sockets.remove(0),
        };
        // One that is there already is found, whichever member asks.
        ensure!(stand.launcher.start(&stand.bundle("c3"), "c3")?.socket == shim.socket);
        if round == 0 {
            shim.crash()?;
            ensure!(shim.socket.exists(), "nothing stale to replace");
        } else {
            for id in &ids {
                shim.create(&stand.task(id))?;
                shim.start(id, "")?;
                ensure!(shim.wait(id, "")?.exit_status == 7);
                shim.delete(id, "")?;
            }
            shim.shut_down()?;
        }
    }
    stand.finish()
}

#[test]
fn every_call_may_be_repeated() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let (shim, pid) = stand.run("g", "c", "sleep 1000")?;
    // With a task it stays, however often it is asked to go.
    for _ in 0..2 {
        shim.ask("Shutdown", "c")?;
        ensure!(stand.launcher.start(&stand.bundle("c"), "c")?.socket == shim.socket);
        shim.ask("CloseIO", "c")?;
        shim.ask("Stats", "c")?;
        ensure!(shim.state("c", "")?.pid == pid as u32);
        ensure!(refusal(shim.create(&stand.task("c")))?.code == 6);
        ensure!(refusal(shim.start("c", ""))?.code == 9);
    }
    for _ in 0..2 {
        shim.ask("Pause", "c")?;
    }
    shim.ask("Resume", "c")?;
    shim.exec("c", "e", &["/usr/bin/sh", "-c", "exit 4"], "")?;
    ensure!(refusal(shim.exec("c", "e", &["/usr/bin/true"], ""))?.code == 6);
    shim.start("c", "e")?;
    for _ in 0..2 {
        ensure!(shim.wait("c", "e")?.exit_status == 4);
    }
    ensure!(shim.delete("c", "e")?.exit_status == 4);
    ensure!(refusal(shim.delete("c", "e"))?.code == shim::NOT_FOUND);
    shim.kill("c", "", 9, false)?;
    let first = shim.wait("c", "")?;
    ensure!(first.exit_status == 137 && shim.wait("c", "")? == first);
    for _ in 0..2 {
        ensure!(refusal(shim.kill("c", "", 9, false))?.code == shim::NOT_FOUND);
    }
    let deleted = shim.delete("c", "")?;
    ensure!(deleted.exited_at == first.exited_at, "{deleted:?}");
    // What is gone is not found by whatever asks for it.
    for _ in 0..2 {
        ensure!(refusal(shim.delete("c", ""))?.code == shim::NOT_FOUND);
        ensure!(refusal(shim.state("c", ""))?.code == shim::NOT_FOUND);
        ensure!(refusal(shim.wait("c", ""))?.code == shim::NOT_FOUND);
        ensure!(refusal(shim.kill("c", "", 9, false))?.code == shim::NOT_FOUND);
    }
    // The command over a bundle whose task has been deleted repeats its end.
    for _ in 0..2 {
        let again = stand.launcher.delete(&stand.bundle("c"), "c")?;
        ensure!(again.exit_status == 137 && again.exited_at == first.exited_at);
    }
    ensure!(shim.is_served(), "delete of a deleted task ended its shim");
    shim.shut_down()?;
    stand.finish()
}

#[test]
fn shim_killed_in_a_create_leaves_neither_call_nor_container() -> Result<()> {
    need_root!();
    let mut stand = Stand::new()?;
    let real = stand.runtime.clone();
    stand.runtime = hanging_runtime(stand.dir(), &real)?;
    let (shim, other) = stand.run("g", "other", "sleep 1000")?;
    let hang = stand.dir().join("hang-create");
    let hung = stand.dir().join("hung");
    std::fs::write(&hang, "")?;
    let bundle = stand.write("g", "c", "sleep 1000")?;
    let (caller, task) = (shim.clone(), stand.task("c"));
    let creating = std::thread::spawn(move || caller.create(&task));
    wait_for("the hanging call", Duration::from_secs(5), || {
        Ok(hung.exists().then_some(()))
    })?;
    let sleeping = || {
        let all = leak::processes(&stand.bench.mark).into_iter();
        all.filter(|p| p.contains("hanging-runtime")).count()
    };
    ensure!(sleeping() > 0);
    shim.crash()?;
    ensure!(creating.join().is_ok_and(|answer| answer.is_err()));
    ensure!(sleeping() > 0, "nothing to be found");
    std::fs::remove_file(&hang)?;
    // The daemon asks for the one that it knows.
    ensure!(
        stand
            .launcher
            .delete(&stand.bundle("other"), "other")?
            .exit_status
            == 137
    );
    ensure!(!alive(other));
    let left = stand.left_of_tasks()?;
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    ensure!(stand.launcher.delete(&bundle, "c")?.exit_status == 137);
    // And tries again.
    let (shim, pid) = stand.run("g", "c", "sleep 1000")?;
    ensure!(alive(pid) && shim.end("c")?.exit_status == 137);
    shim.shut_down()?;
    stand.finish()
}

/// Kills the shim while the real runtime creates, at many moments.
#[test]
fn shim_killed_at_any_moment_of_a_create_leaves_nothing() -> Result<()> {
    need_root!();
    let stand = Stand::new()?;
    let begun = Instant::now();
    stand.write("whole", "whole", "sleep 1000")?;
    let shim = stand.launcher.start(&stand.bundle("whole"), "whole")?;
    let whole = Instant::now();
    shim.create(&stand.task("whole"))?;
    let whole = whole.elapsed();
    shim.end("whole")?;
    shim.shut_down()?;
    let (mut before, mut after) = (0, 0);
    for step in 0..24u32 {
        let id = format!("c{step}");
        let bundle = stand.write(&id, &id, "sleep 1000")?;
        let shim = stand.launcher.start(&bundle, &id)?;
        let pid = rustix::process::Pid::from_raw(shim.pid()?).context("pid")?;
        let (caller, task) = (shim.clone(), stand.task(&id));
        let creating = std::thread::spawn(move || caller.create(&task));
        // From the first moment to past the end of a create; the last ones are past it on any machine.
        std::thread::sleep(whole * step / 16);
        while step >= 22 && !creating.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        match creating.join() {
            Ok(Ok(_)) => after += 1,
            Ok(Err(_)) => before += 1,
            Err(_) => anyhow::bail!("the caller panicked"),
        }
        shim.gone()?;
        let exit = stand.launcher.delete(&bundle, &id)?;
        ensure!(exit.exit_status == 137, "{id}: {exit:?}");
        let left = stand.left_of_tasks()?;
        ensure!(left.is_empty(), "{id} left:\n  {}", left.join("\n  "));
    }
    println!(
        "{before} in the create, {after} after it, {:?}",
        begun.elapsed()
    );
    ensure!(before > 2 && after > 0, "{before} before, {after} after");
    stand.finish()
}
