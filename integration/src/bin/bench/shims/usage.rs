//! What the processes of a shim hold, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::drive::Pod;

/// KiB, and counts, over all processes that were asked for.
#[derive(Default, Clone, Copy)]
pub struct Usage {
    /// Private pages: what the end of the process gives back.
    unique: f64,
    proportional: f64,
    resident: f64,
    threads: f64,
    descriptors: f64,
}

impl Usage {
    pub fn of(pods: &[Pod]) -> Result<Self> {
        let mut all = Self::default();
        for pod in pods {
            for pid in pod.processes()? {
                all.add(pid).with_context(|| format!("process {pid}"))?;
            }
        }
        Ok(all)
    }

    fn add(&mut self, pid: i32) -> Result<()> {
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let kib = |name: &str| field(&memory, name);
        self.unique += kib("Private_Clean:") + kib("Private_Dirty:");
        self.proportional += kib("Pss:");
        self.resident += kib("Rss:");
        self.threads += field(
            &fs::read_to_string(format!("/proc/{pid}/status"))?,
            "Threads:",
        );
        self.descriptors += fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64;
        Ok(())
    }

    pub fn beyond(&self, before: &Self) -> Self {
        Self {
            unique: self.unique - before.unique,
            proportional: self.proportional - before.proportional,
            resident: self.resident - before.resident,
            threads: self.threads - before.threads,
            descriptors: self.descriptors - before.descriptors,
        }
    }

    pub fn each(&self, count: usize) -> Vec<(&'static str, f64)> {
        let count = count as f64;
        vec![
            ("USS KiB", self.unique / count),
            ("PSS KiB", self.proportional / count),
            ("RSS KiB", self.resident / count),
            ("threads", self.threads / count),
            ("descriptors", self.descriptors / count),
        ]
    }
}

fn field(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// CPU time of the pods' shims up to now, of every thread.
pub fn cpu(pods: &[Pod]) -> Result<Duration> {
    let mut nanos = 0;
    for pod in pods {
        for pid in pod.processes()? {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let text = fs::read_to_string(task?.path().join("schedstat"))?;
                let first = text.split_whitespace().next().context("schedstat")?;
                nanos += first.parse::<u64>()?;
            }
        }
    }
    Ok(Duration::from_nanos(nanos))
}
