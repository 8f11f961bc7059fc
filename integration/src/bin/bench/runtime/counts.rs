//! What does not depend on the clock: peak memory, CPU time, system calls, instructions of `run`.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bundle::{Bench, Bundle, our, silent, which};
use crate::series::Comparison;

const ROUNDS: usize = 5;

/// Compares one `run` of /bin/true.
///
/// # Errors
/// A run that fails, or a tool that is not there.
pub fn compare(bench: &Bench) -> Result<Vec<Comparison>> {
    let names = bench.names();
    let what = "wait4's rusage of the runtime's command and of the children that it waited for.";
    let rounds = (names.as_slice(), ROUNDS);
    let memory = Comparison::measure("peak RSS of run", what, "KiB", rounds, |program, round| {
        peak(bench, program, round).map(|(kib, _)| kib)
    })?
    .goal("crun", 1.0);
    let processor = Comparison::measure("CPU of run", what, "ms", rounds, |program, round| {
        peak(bench, program, round).map(|(_, micros)| micros / 1e3)
    })?;
    let calls = Comparison::measure(
        "system calls of run",
        "Counted by strace -f, until the container's program has ended.",
        "calls",
        (&names, 1),
        |program, round| calls(bench, program, round),
    )?;
    let mut all = vec![memory, processor, calls];
    if counts_instructions() {
        all.push(Comparison::measure(
            "instructions of run, user space",
            "Counted by perf stat, the container's own among them.",
            "instructions",
            (&names, ROUNDS),
            |program, round| instructions(bench, program, round),
        )?);
    } else {
        eprintln!("left out: instructions: perf stat has no hardware counters here");
    }
    Ok(all)
}

/// `tool` before the run's own words.
fn under(tool: &str, args: &[&str], run: &Command) -> Command {
    let mut command = Command::new(tool);
    command.args(args).arg(run.get_program());
    command.args(run.get_args());
    command
}

fn id(what: &str, program: usize, round: usize) -> String {
    format!("bench-{}-{what}-{program}-{round}", std::process::id())
}

/// KiB and microseconds.
fn peak(bench: &Bench, program: usize, round: usize) -> Result<(f64, f64)> {
    let run = bench.run(program, Bundle::True, &id("peak", program, round));
    let tool = our("peak")?;
    let mut command = under(&tool.to_string_lossy(), &[], &run);
    let output = command.output().context("peak")?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.split_whitespace().map(str::parse::<f64>);
    let mut next = || numbers.next().context("two numbers")?.context("a number");
    Ok((next()?, next()?))
}

fn calls(bench: &Bench, program: usize, round: usize) -> Result<f64> {
    let run = bench.run(program, Bundle::True, &id("calls", program, round));
    let log = tempfile::NamedTempFile::new()?;
    let path = log.path().to_string_lossy().into_owned();
    let mut command = under("strace", &["-f", "-qq", "-o", &path], &run);
    silent(&mut command);
    let status = command.status().context("strace: make deps")?;
    ensure!(status.success(), "{command:?}: {status}");
    let text = String::from_utf8_lossy(&std::fs::read(log.path())?).into_owned();
    // "PID call(...", once; what was interrupted is resumed on another line.
    let started = text
        .lines()
        .filter(|line| !line.contains("<... ") && line.contains('('))
        .count();
    Ok(started as f64)
}

fn counts_instructions() -> bool {
    which("perf").is_some() && counted("true", &mut Command::new("true")).is_ok()
}

fn instructions(bench: &Bench, program: usize, round: usize) -> Result<f64> {
    let mut run = bench.run(program, Bundle::True, &id("perf", program, round));
    counted("run", &mut run)
}

fn counted(what: &str, command: &mut Command) -> Result<f64> {
    let log = tempfile::NamedTempFile::new()?;
    let path = log.path().to_string_lossy().into_owned();
    let perf = ["stat", "-x", ",", "-e", "instructions:u", "-o", &path];
    let mut command = under("perf", &perf, command);
    silent(&mut command);
    let status = command.status().context("perf")?;
    ensure!(status.success(), "{command:?}: {status}");
    let text = std::fs::read_to_string(log.path())?;
    let line = text.lines().find(|line| line.contains("instructions"));
    let number = line.and_then(|line| line.split(',').next()?.parse().ok());
    number.with_context(|| format!("perf stat of {what} has counted nothing"))
}
