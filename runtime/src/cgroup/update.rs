//! Other limits for a cgroup that exists: all of them, or none.
//!
//! Before a file is written its value is noted, and when the kernel refuses a later one the noted
//! values are written back, last first. Not what config.json said: what was never asked for has a
//! value too, and others may have changed it.

use std::path::PathBuf;

use super::create::CgroupPlan;
use super::step::{Dir, Step, Write};
use super::systemd::Manager;
use super::tree::{Cgroup, Dirs};
use crate::error::{Error, Result};

/// Values that the kernel checks against each other go back in some order, which the reverse
/// one nearly always is.
const ROUNDS: usize = 3;

impl Cgroup {
    /// Applies the plan of an update: the unit and cpusets included, devices untouched.
    ///
    /// # Errors
    /// As for [`Cgroup::apply_limits`]. What was changed has its old value again then; where that
    /// fails, the error says so.
    pub fn update(&self, plan: &CgroupPlan, mut manager: Option<&mut Manager>) -> Result<()> {
        let mut before = Before::default();
        let updated = self.try_update(plan, manager.as_deref_mut(), &mut before);
        let Err(error) = updated else {
            return Ok(());
        };
        let properties = self.restore_unit(plan, manager, &before.properties);
        match before.restore().and(properties) {
            Ok(()) => Err(error),
            Err(second) => {
                Err(error.context(format!("(cannot set back the old limits: {second:#})")))
            }
        }
    }

    fn try_update(
        &self,
        plan: &CgroupPlan,
        manager: Option<&mut Manager>,
        before: &mut Before,
    ) -> Result<()> {
        let dirs = Dirs {
            places: &plan.layout.dirs,
        };
        // Written by systemd already where it keeps the unit: noted before that.
        for limit in &plan.limits {
            before.note(&dirs.open(limit.dir)?, &limit.step);
        }
        self.update_unit(plan, manager, &mut before.properties)?;
        self.apply_limits(plan)?;
        let Some(index) = plan.layout.controller("cpuset") else {
            return Ok(());
        };
        let steps: Vec<Step> = plan.cpuset().iter().cloned().map(Step::Write).collect();
        if steps.is_empty() {
            return Ok(());
        }
        let dir = dirs.open(index)?;
        steps.iter().try_for_each(|step| {
            before.note(&dir, step);
            dir.apply(step)
        })
    }
}

/// The old values of what has been written.
#[derive(Debug, Default)]
pub(super) struct Before {
    writes: Vec<(PathBuf, Write)>,
    pub properties: Vec<super::systemd::Property>,
}

impl Before {
    fn note(&mut self, dir: &Dir, step: &Step) {
        for write in step.writes() {
            // No file, nothing to write back.
            let Ok(text) = dir.read(&write.file) else {
                continue;
            };
            for line in write.value.lines().filter(|line| !line.is_empty()) {
                if let Some(value) = old_value(&write.file, line, &text) {
                    let old = Write::new(write.field.clone(), write.file.clone(), value);
                    self.writes.push((dir.path().to_owned(), old));
                }
            }
        }
    }

    fn restore(&self) -> Result<()> {
        let mut left: Vec<&(PathBuf, Write)> = self.writes.iter().rev().collect();
        let mut failure: Option<Error> = None;
        for _ in 0..ROUNDS {
            failure = None;
            left.retain(|(path, write)| {
                let restored =
                    Dir::open(path).and_then(|dir| dir.apply(&Step::Write(write.clone())));
                match restored {
                    Ok(()) => false,
                    Err(error) => {
                        failure.get_or_insert(error);
                        true
                    }
                }
            });
            if left.is_empty() {
                break;
            }
        }
        failure.map_or(Ok(()), Err)
    }
}

/// What to write so that a file says again what it said before `asked` was written to it. `None`
/// where a line of it cannot be taken back. Pure.
fn old_value(file: &str, asked: &str, text: &str) -> Option<String> {
    let Some(key) = key_of(file, asked) else {
        // Files with a line for each device have one for all others.
        let default = text.lines().find(|line| line.starts_with("default "));
        let value = default.unwrap_or(text).trim();
        // An empty list of processors is written as an empty line.
        return Some(if value.is_empty() { "\n" } else { value }.to_owned());
    };
    let line = text.lines().find(|line| {
        line.strip_prefix(key)
            .is_some_and(|rest| rest.starts_with(' '))
    });
    match line {
        Some(line) => Some(line.to_owned()),
        None => Some(format!("{key} {}", unset(file)?)),
    }
}

/// The device that a line is about.
fn key_of<'a>(file: &str, asked: &'a str) -> Option<&'a str> {
    let word = asked.split_whitespace().next()?;
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let device = word
        .split_once(':')
        .is_some_and(|(major, minor)| is_number(major) && is_number(minor));
    (device || matches!(file, "rdma.max" | "net_prio.ifpriomap")).then_some(word)
}

/// How a file is told that a device has no limit.
fn unset(file: &str) -> Option<&'static str> {
    Some(match file {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        "io.weight" | "io.bfq.weight" => "default",
        "rdma.max" => "hca_handle=max hca_object=max",
        _ if file.starts_with("blkio.") || file == "net_prio.ifpriomap" => "0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_value_table() {
        let io = "8:0 rbps=1 wbps=max riops=max wiops=max\n8:16 rbps=2 wbps=max\n";
        let none = "rbps=max wbps=max riops=max wiops=max";
        let cases: &[(&str, &str, &str, Option<&str>)] = &[
            ("memory.max", "1", "max\n", Some("max")),
            ("cpu.max", "1 2", "max 100000\n", Some("max 100000")),
            ("cpuset.cpus", "0", "\n", Some("\n")),
            ("io.max", "8:16 rbps=9", io, Some("8:16 rbps=2 wbps=max")),
            ("io.max", "8:1 rbps=9", io, Some(&format!("8:1 {none}"))),
            ("io.max", "8:1 rbps=9", "", Some(&format!("8:1 {none}"))),
            (
                "io.weight",
                "7",
                "default 100\n8:0 50\n",
                Some("default 100"),
            ),
            (
                "io.weight",
                "8:0 7",
                "default 100\n8:0 50\n",
                Some("8:0 50"),
            ),
            ("io.weight", "8:1 7", "default 100\n", Some("8:1 default")),
            ("blkio.throttle.read_bps_device", "8:0 7", "", Some("8:0 0")),
            ("blkio.bfq.weight", "7", "100\n", Some("100")),
            (
                "rdma.max",
                "mlx5_0 hca_handle=1",
                "mlx5_0 hca_handle=2 hca_object=max\n",
                Some("mlx5_0 hca_handle=2 hca_object=max"),
            ),
            (
                "rdma.max",
                "mlx5_0 hca_handle=1",
                "",
                Some("mlx5_0 hca_handle=max hca_object=max"),
            ),
            (
                "net_prio.ifpriomap",
                "eth0 5",
                "lo 0\neth0 1\n",
                Some("eth0 1"),
            ),
            ("io.latency", "8:0 target=1", "", None),
        ];
        for (file, asked, text, want) in cases {
            assert_eq!(
                old_value(file, asked, text).as_deref(),
                *want,
                "{file} {asked}"
            );
        }
    }
}
