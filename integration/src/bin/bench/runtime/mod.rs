//! The runtimes on one and the same bundle, in the host's own cgroups and in a private view with
//! cgroup v2 alone.

mod bundle;
mod counts;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::series::Comparison;
use bundle::{Bench, Bundle, silent, timed};

pub use bundle::{our, which};

const CLOCK: &str = "Clock: from fork of the runtime's command to its exit. Same bundle (static \
    busybox), same config made by `runc spec`, without resources on cgroup v2; state roots on a \
    tmpfs. Left out: unpacking of an image, the shim, the daemon.";

const PARALLEL: usize = 50;

/// What /sys/fs/cgroup shows while runtimes are compared.
pub struct View {
    pub name: &'static str,
    /// Makes the view in a mount namespace of its own.
    script: &'static str,
    /// The share of crun's time that `run` is to stay under.
    goal: f64,
}

/// crun 1.8 refuses a hybrid host whose cgroup2 mount has a controller, so that mount is hidden.
const V1: View = View {
    name: "cgroup v1",
    script: "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi",
    goal: 0.85,
};

/// The controllers stay with the host's v1 hierarchies.
const V2: View = View {
    name: "private cgroup v2 view without controllers",
    script: "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup",
    goal: 0.6,
};

/// Every view that this host can show.
pub fn views() -> Vec<View> {
    if on_v2() {
        println!("left out: {}: the host has cgroup v2 alone", V1.name);
        return vec![V2];
    }
    vec![V1, V2]
}

fn on_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.procs").exists()
}

/// Compares in a mount namespace of its own that shows the view.
pub fn compare(view: &View, runs: usize) -> Result<Vec<Comparison>> {
    let script = format!("{} && exec \"$@\"", view.script);
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg("sh")
        .arg(std::env::current_exe()?)
        .args(["inner", &runs.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .context("unshare")?;
    ensure!(
        output.status.success(),
        "the view of {}: {}",
        view.name,
        output.status
    );
    let comparisons: Vec<Comparison> =
        serde_json::from_slice(&output.stdout).with_context(|| view.name.to_owned())?;
    let named = comparisons.into_iter().map(|mut comparison| {
        if comparison.what == "run" {
            comparison = comparison.goal("crun", view.goal);
        }
        comparison.what = format!("{}, {}", comparison.what, view.name);
        comparison
    });
    Ok(named.collect())
}

/// The part that runs inside the view: prints its comparisons as JSON.
pub fn inner(runs: usize) -> Result<()> {
    let bench = Bench::new()?;
    let mut all = vec![
        run(&bench, runs)?,
        confined(&bench, runs)?,
        lifecycle(&bench, runs)?,
        parallel(&bench, (runs / 8).max(1))?,
    ];
    bench.start_sleepers()?;
    all.push(exec(&bench, runs)?);
    all.extend(counts::compare(&bench)?);
    println!("{}", serde_json::to_string(&all)?);
    Ok(())
}

fn id(what: &str, program: usize, round: usize) -> String {
    format!("bench-{}-{what}-{program}-{round}", std::process::id())
}

/// The runtimes, and the floor: a C program that clones, mounts, pivots and execs, and no more.
fn run(bench: &Bench, runs: usize) -> Result<Comparison> {
    let floor = our("floor")?;
    let mut names = bench.names();
    names.push("floor");
    let taken = Comparison::take("run", CLOCK, &names, runs, |program, round| {
        if program < bench.runtimes.len() {
            let id = id("run", program, round);
            return timed(&mut bench.run(program, Bundle::True, &id));
        }
        let mut command = Command::new(&floor);
        silent(&mut command);
        command.arg(bench.folder(Bundle::True).join("rootfs"));
        timed(command.arg("/bin/true"))
    })?;
    Ok(taken.goal("floor", 1.9))
}

fn confined(bench: &Bench, runs: usize) -> Result<Comparison> {
    let what = "run with the default seccomp profile";
    Comparison::take(what, CLOCK, &bench.names(), runs, |program, round| {
        let id = id("confined", program, round);
        timed(&mut bench.run(program, Bundle::Confined, &id))
    })
}

fn lifecycle(bench: &Bench, runs: usize) -> Result<Comparison> {
    let clock = "create, start and delete --force of a container that sleeps: the sum of the \
        three commands' times.";
    let what = "create + start + delete";
    let taken = Comparison::take(what, clock, &bench.names(), runs, |program, round| {
        let id = id("life", program, round);
        let mut create = bench.command(program);
        create.args(["create", "--bundle"]);
        create.arg(bench.folder(Bundle::Sleep)).arg(&id);
        let mut took = timed(&mut create)?;
        took += timed(bench.command(program).args(["start", &id]))?;
        took += timed(bench.command(program).args(["delete", "--force", &id]))?;
        Ok(took)
    })?;
    Ok(taken.goal("crun", 0.6))
}

fn parallel(bench: &Bench, rounds: usize) -> Result<Comparison> {
    let clock = "From the fork of the first to the exit of the last.";
    let what = format!("{PARALLEL} runs in parallel");
    Comparison::take(&what, clock, &bench.names(), rounds, |program, round| {
        at_once(bench, program, round)
    })
}

fn at_once(bench: &Bench, program: usize, round: usize) -> Result<Duration> {
    let started = Instant::now();
    let mut children = Vec::with_capacity(PARALLEL);
    for number in 0..PARALLEL {
        let id = format!("{}-{number}", id("parallel", program, round));
        children.push(bench.run(program, Bundle::True, &id).spawn()?);
    }
    // All are waited for, also behind one that failed.
    let ends: Vec<_> = children.iter_mut().map(std::process::Child::wait).collect();
    let took = started.elapsed();
    for end in ends {
        let end = end?;
        ensure!(end.success(), "{}: {end}", bench.runtimes[program].name);
    }
    Ok(took)
}

fn exec(bench: &Bench, runs: usize) -> Result<Comparison> {
    let taken = Comparison::take("exec", CLOCK, &bench.names(), runs, |program, _| {
        let mut command = bench.command(program);
        timed(command.args(["exec", &bench.sleeper(program), "/bin/true"]))
    })?;
    Ok(taken.goal("crun", 0.6))
}
