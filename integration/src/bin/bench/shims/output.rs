//! Output of containers through FIFOs, which is how containerd gets it.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::stat::Mode;

use super::drive::{Handler, Pod, Stand};
use super::{names, usage};
use crate::series::{Comparison, MILLISECONDS, Series};

const MIB: usize = 256;
const ROUNDS: usize = 3;

/// Wall and CPU time for the same bytes, from one container and from twenty of one pod.
pub fn compare(stand: &Stand, handlers: &[&Handler]) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    for containers in [1, 20] {
        let mut cpu: Vec<Vec<f64>> = vec![Vec::new(); handlers.len()];
        let what = format!("{MIB} MiB of output into FIFOs, containers: {containers}");
        let clock = "Clock: from Start of the first container (dd, blocks of 64 KiB) to the last byte read \
            from the FIFOs.";
        let wall = Comparison::take(&what, clock, &names(handlers), ROUNDS, |program, round| {
            let group = format!("out-{containers}-{program}-{round}");
            let (took, used) = once(stand, handlers[program], &group, containers)?;
            if round > 0 {
                cpu[program].push(used.as_secs_f64() * 1e3);
            }
            Ok(took)
        })?;
        let series = wall.series.iter().zip(cpu).map(|(series, samples)| Series {
            program: series.program.clone(),
            samples,
        });
        let used = Comparison {
            what: format!("{what}: CPU of the shim"),
            clock: "schedstat of the shim's threads, over the above.".to_owned(),
            unit: MILLISECONDS.to_owned(),
            series: series.collect(),
            goals: Vec::new(),
        };
        let peer = &handlers[1].name;
        comparisons.extend([wall.goal(peer, 0.5), used.goal(peer, 0.5)]);
    }
    Ok(comparisons)
}

fn once(
    stand: &Stand,
    handler: &Handler,
    group: &str,
    count: usize,
) -> Result<(Duration, Duration)> {
    let pod = Pod::open(stand, handler, group)?;
    let each = MIB / count;
    let mut ids = Vec::new();
    for number in 0..count {
        let id = format!("{group}-{number}");
        let script = format!("dd if=/dev/zero bs=65536 count={} 2>/dev/null", each * 16);
        let bundle = stand.bundle(group, &id, &["/bin/sh", "-c", &script])?;
        let fifo = bundle.join("stdout");
        nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600))?;
        let reader = read(&fifo, each << 20)?;
        pod.create(&id, &bundle, &fifo.display().to_string())?;
        ids.push((id, reader));
    }
    let before = usage::cpu(std::slice::from_ref(&pod))?;
    let started = Instant::now();
    for (id, _) in &ids {
        pod.start(id)?;
    }
    let mut last = started;
    let mut left = Vec::new();
    for (id, reader) in ids {
        let end = reader.join().map_err(|_| anyhow!("the reader of {id}"))?;
        last = last.max(end.with_context(|| id.clone())?);
        left.push(id);
    }
    let used = usage::cpu(std::slice::from_ref(&pod))? - before;
    for id in left {
        pod.gone(&id)?;
    }
    pod.shut_down()?;
    Ok((last - started, used))
}

/// Reads so many bytes and returns when; a FIFO that has a writer of its own never ends.
fn read(fifo: &Path, bytes: usize) -> Result<JoinHandle<Result<Instant>>> {
    let mut file = OpenOptions::new().read(true).write(true).open(fifo)?;
    Ok(std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let mut left = bytes;
        while left > 0 {
            let most = left.min(buffer.len());
            let got = file.read(&mut buffer[..most])?;
            ensure!(got > 0, "the FIFO ended");
            left -= got;
        }
        Ok(Instant::now())
    }))
}
