//! What a container uses, in the JSON of `runc events --stats`.
//!
//! The types are the document; `stats_v1` and `stats_v2` fill them. A controller that is not there
//! leaves its part at zero.

use std::collections::BTreeMap;

use rustix::io::Errno;
use serde::Serialize;

use super::step::Dir;
use super::tree::Cgroup;
use super::{stats_v1, stats_v2};
use crate::error::{Error, Result};
use crate::resctrl;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    pub cpu: Cpu,
    pub cpuset: CpuSet,
    pub memory: Memory,
    pub pids: Pids,
    pub blkio: Blkio,
    pub hugetlb: BTreeMap<String, Hugetlb>,
    /// Not the cgroup's: whoever shows it fills it in.
    pub intel_rdt: resctrl::Stats,
    /// Always null: runc counts the interfaces that it made itself, which are none.
    pub network_interfaces: Option<()>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cpu {
    #[serde(skip_serializing_if = "is_default")]
    pub usage: CpuUsage,
    #[serde(skip_serializing_if = "is_default")]
    pub throttling: Throttling,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// Nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CpuUsage {
    #[serde(skip_serializing_if = "is_default")]
    pub total: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub percpu: Vec<u64>,
    #[serde(skip_serializing_if = "is_default")]
    pub percpu_kernel: Vec<u64>,
    #[serde(skip_serializing_if = "is_default")]
    pub percpu_user: Vec<u64>,
    pub kernel: u64,
    pub user: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    #[serde(skip_serializing_if = "is_default")]
    pub periods: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub throttled_periods: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub throttled_time: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Psi {
    #[serde(skip_serializing_if = "is_default")]
    pub some: PsiData,
    #[serde(skip_serializing_if = "is_default")]
    pub full: PsiData,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PsiData {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CpuSet {
    #[serde(skip_serializing_if = "is_default")]
    pub cpus: Vec<u16>,
    pub cpu_exclusive: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub mems: Vec<u16>,
    pub mem_hardwall: u64,
    pub mem_exclusive: u64,
    pub memory_migrate: u64,
    pub memory_spread_page: u64,
    pub memory_spread_slab: u64,
    pub memory_pressure: u64,
    pub sched_load_balance: u64,
    pub sched_relax_domain_level: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    #[serde(skip_serializing_if = "is_default")]
    pub cache: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub usage: MemoryEntry,
    #[serde(skip_serializing_if = "is_default")]
    pub swap: MemoryEntry,
    #[serde(skip_serializing_if = "is_default")]
    pub kernel: MemoryEntry,
    #[serde(rename = "kernelTCP", skip_serializing_if = "is_default")]
    pub kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "is_default")]
    pub raw: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MemoryEntry {
    pub limit: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub usage: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub max: u64,
    pub failcnt: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Pids {
    #[serde(skip_serializing_if = "is_default")]
    pub current: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub limit: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Blkio {
    #[serde(skip_serializing_if = "is_default")]
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_serviced_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_queue_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_service_time_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_wait_time_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_merged_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub io_time_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "is_default")]
    pub sectors_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct BlkioEntry {
    #[serde(skip_serializing_if = "is_default")]
    pub major: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub minor: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub op: String,
    #[serde(skip_serializing_if = "is_default")]
    pub value: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Hugetlb {
    #[serde(skip_serializing_if = "is_default")]
    pub usage: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub max: u64,
    pub failcnt: u64,
}

impl Stats {
    /// Reads the usage of a container.
    ///
    /// # Errors
    /// A file of a controller that is there cannot be read or understood.
    pub fn read(cgroup: &Cgroup) -> Result<Stats> {
        match (cgroup.is_v2(), cgroup.dirs.first()) {
            (_, None) => Ok(Stats::default()),
            (true, Some(place)) => stats_v2::read(&Files::open(&place.path)?),
            (false, _) => stats_v1::read(cgroup),
        }
    }
}

/// The statistics files of one directory; a file that does not exist is `None`.
pub(super) struct Files {
    dir: Dir,
}

impl Files {
    pub fn open(path: &std::path::Path) -> Result<Files> {
        Dir::open(path).map(|dir| Files { dir })
    }

    pub fn text(&self, file: &str) -> Result<Option<String>> {
        match self.dir.read(file) {
            Ok(text) => Ok(Some(text)),
            // ENOTSUP: pressure files while PSI is off.
            Err(Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => {
                let path = self.dir.path().join(file).display().to_string();
                Err(Error::system("read", path, errno))
            }
        }
    }

    /// A file that holds one number; `max` is the largest.
    pub fn number(&self, file: &str) -> Result<Option<u64>> {
        let Some(text) = self.text(file)? else {
            return Ok(None);
        };
        match text.trim() {
            "max" => Ok(Some(u64::MAX)),
            // Signed files say -1 for "none".
            negative if negative.starts_with('-') => Ok(Some(0)),
            digits => digits
                .parse()
                .map(Some)
                .map_err(|error| self.malformed(file, &text).source(error)),
        }
    }

    /// A file of `key value` lines.
    pub fn table(&self, file: &str) -> Result<Option<BTreeMap<String, u64>>> {
        let Some(text) = self.text(file)? else {
            return Ok(None);
        };
        let mut table = BTreeMap::new();
        for line in text.lines() {
            let entry = line.split_once(' ').and_then(|(key, value)| {
                value
                    .trim()
                    .parse::<u64>()
                    .ok()
                    .map(|value| (key.to_owned(), value))
            });
            let (key, value) = entry.ok_or_else(|| self.malformed(file, line))?;
            table.insert(key, value);
        }
        Ok(Some(table))
    }

    pub fn malformed(&self, file: &str, line: &str) -> Error {
        let path = self.dir.path().join(file).display().to_string();
        Error::system("parse", path, format!("malformed line: {}", line.trim()))
    }
}

/// The page sizes that the kernel can reserve, as cgroup files spell them.
pub(super) fn hugepage_sizes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten();
    let mut sizes: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            hugepage_name(
                name.to_str()?
                    .strip_prefix("hugepages-")?
                    .strip_suffix("kB")?,
            )
        })
        .collect();
    sizes.sort();
    sizes
}

fn hugepage_name(kilobytes: &str) -> Option<String> {
    let kilobytes: u64 = kilobytes.parse().ok()?;
    Some(match kilobytes {
        0..1024 => format!("{kilobytes}KB"),
        1024..1_048_576 => format!("{}MB", kilobytes >> 10),
        _ => format!("{}GB", kilobytes >> 20),
    })
}

pub(super) fn oom_kills(cgroup: &Cgroup) -> Result<u64> {
    let Some(place) = cgroup.place_of("memory") else {
        return Ok(0);
    };
    let files = match Files::open(&place.path) {
        Ok(files) => files,
        Err(error) if super::tree::is_gone(&error) => return Ok(0),
        Err(error) => return Err(error),
    };
    let file = if cgroup.is_v2() {
        "memory.events"
    } else {
        "memory.oom_control"
    };
    let table = files.table(file)?.unwrap_or_default();
    Ok(table.get("oom_kill").copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_stats_have_runcs_shape() {
        assert_eq!(
            serde_json::to_string(&Stats::default()).unwrap(),
            concat!(
                r#"{"cpu":{},"cpuset":{"cpu_exclusive":0,"mem_hardwall":0,"mem_exclusive":0,"#,
                r#""memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"#,
                r#""memory_pressure":0,"sched_load_balance":0,"sched_relax_domain_level":0},"#,
                r#""memory":{},"pids":{},"blkio":{},"hugetlb":{},"intel_rdt":{},"#,
                r#""network_interfaces":null}"#
            )
        );
    }

    #[test]
    fn hugepage_names() {
        for (kilobytes, name) in [("64", "64KB"), ("2048", "2MB"), ("1048576", "1GB")] {
            assert_eq!(hugepage_name(kilobytes).as_deref(), Some(name));
        }
    }
}
