//! The shim beside containerd's own: how soon it answers, what it holds, what output costs.
//!
//! Both are driven by this program over their sockets, as a daemon would, in a mount namespace whose
//! /run/containerd is a tmpfs; no daemon takes part. Ours runs `coracle`, theirs runs `runc`, and once
//! `coracle`, which leaves the shims alone as the difference.

mod drive;
mod output;
mod usage;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::series::{Comparison, Series};
use drive::{Handler, Pod, Stand};
use usage::Usage;

/// Pods that stand at once when memory is looked at.
const PODS: [usize; 3] = [1, 10, 50];
/// Containers that are put beside the first of a pod.
const EXTRA: usize = 9;
/// A heading, and the numbers below it with their units.
type State = (String, Vec<(&'static str, f64)>);

const IDLE: Duration = Duration::from_secs(10);

/// Runs the comparison in a mount namespace of its own and reads its result.
pub fn compare(rounds: usize) -> Result<Vec<Comparison>> {
    let script = "mkdir -p /run/containerd && mount -t tmpfs none /run/containerd && exec \"$@\"";
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(std::env::current_exe()?)
        .args(["inner-shims", &rounds.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .context("unshare")?;
    ensure!(
        output.status.success(),
        "the shims' namespace: {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the comparison of shims")
}

/// The part that runs inside: prints its comparisons as JSON.
pub fn inner(rounds: usize) -> Result<()> {
    let stand = Stand::new()?;
    let handlers = stand.handlers()?;
    let mut comparisons = vec![start(&stand, &handlers, rounds)?];
    comparisons.push(task(&stand, &handlers, rounds)?);
    // One runtime's processes do not show in what a shim holds.
    let own = drive::with_own_runtimes(&handlers);
    comparisons.extend(held(&stand, &own)?);
    comparisons.extend(output::compare(&stand, &own)?);
    println!("{}", serde_json::to_string(&comparisons)?);
    Ok(())
}

fn names<'a>(handlers: &[&'a Handler]) -> Vec<&'a str> {
    handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect()
}

fn start(stand: &Stand, handlers: &[Handler], rounds: usize) -> Result<Comparison> {
    let own = drive::with_own_runtimes(handlers);
    let clock = "Clock: from fork of `shim start` to its exit, when a daemon may connect.";
    Comparison::take(
        "shim start",
        clock,
        &names(&own),
        rounds,
        |program, round| {
            let started = Instant::now();
            let pod = Pod::open(stand, own[program], &format!("start-{program}-{round}"))?;
            let took = started.elapsed() - pod.prepared;
            pod.shut_down()?;
            Ok(took)
        },
    )
}

fn task(stand: &Stand, handlers: &[Handler], rounds: usize) -> Result<Comparison> {
    let all: Vec<&Handler> = handlers.iter().collect();
    let clock = "Clock: the calls Create and Start of a container that sleeps, then Kill, Wait and \
        Delete, over one shim's socket. The shim stands before and after.";
    let what = "task create + start + kill + wait + delete";
    let mut pods = Vec::new();
    for (index, handler) in all.iter().enumerate() {
        pods.push(Pod::open(stand, handler, &format!("task-{index}"))?);
    }
    let taken = Comparison::take(what, clock, &names(&all), rounds, |program, round| {
        let pod = &pods[program];
        let id = format!("task-{program}-{round}");
        let bundle = stand.bundle(&pod.group, &id, drive::SLEEPS)?;
        let started = Instant::now();
        pod.create(&id, &bundle, "")?;
        pod.start(&id)?;
        pod.end(&id)?;
        Ok(started.elapsed())
    })?;
    for pod in pods {
        pod.shut_down()?;
    }
    Ok(taken.goal(&all[1].name, 1.0))
}

/// What pods hold while they stand, and what their shims do meanwhile.
fn held(stand: &Stand, handlers: &[&Handler]) -> Result<Vec<Comparison>> {
    let mut samples: Vec<Vec<State>> = Vec::new();
    for (index, handler) in handlers.iter().enumerate() {
        let mut found = Vec::new();
        let mut pods: Vec<Pod> = Vec::new();
        for count in PODS {
            while pods.len() < count {
                let name = format!("held-{index}-{}", pods.len());
                let pod = Pod::open(stand, handler, &name)?;
                pod.run(&name, &stand.bundle(&pod.group, &name, drive::SLEEPS)?, "")?;
                pods.push(pod);
            }
            let all = Usage::of(&pods)?;
            found.push((format!("with {count} pods"), all.each(count)));
        }
        let before = usage::cpu(&pods)?;
        std::thread::sleep(IDLE);
        let idle = (usage::cpu(&pods)? - before).as_secs_f64() * 1e3;
        found.push(("50 idle pods".to_owned(), vec![("CPU ms in 10 s", idle)]));
        let first = &pods[..1];
        let alone = Usage::of(first)?;
        let more: Vec<String> = (0..EXTRA).map(|n| format!("more-{index}-{n}")).collect();
        for id in &more {
            first[0].run(id, &stand.bundle(&first[0].group, id, drive::SLEEPS)?, "")?;
        }
        let extra = Usage::of(first)?.beyond(&alone).each(EXTRA);
        found.push(("a further container".to_owned(), extra));
        for id in &more {
            first[0].end(id)?;
        }
        for (number, pod) in pods.into_iter().enumerate() {
            pod.end(&format!("held-{index}-{number}"))?;
            pod.shut_down()?;
        }
        samples.push(found);
    }
    Ok(by_unit(handlers, &samples))
}

/// One comparison for every unit of every state.
fn by_unit(handlers: &[&Handler], samples: &[Vec<State>]) -> Vec<Comparison> {
    let clock = "A pod is a shim with one container that sleeps, and whatever processes the shim keeps for \
        itself; /proc/<pid>/smaps_rollup, for each pod.";
    let mut comparisons = Vec::new();
    for (state, (what, units)) in samples[0].iter().enumerate() {
        for (column, (unit, _)) in units.iter().enumerate() {
            let series = handlers.iter().zip(samples).map(|(handler, found)| Series {
                program: handler.name.clone(),
                samples: vec![found[state].1[column].1],
            });
            comparisons.push(Comparison {
                what: format!("shim, {what}: {unit}"),
                clock: clock.to_owned(),
                unit: (*unit).to_owned(),
                series: series.collect(),
                goals: Vec::new(),
            });
        }
    }
    comparisons
}
