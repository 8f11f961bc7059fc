//! What the resctrl filesystem tells of a container's group, as `events` shows it: runc's JSON.

use std::path::Path;

use coracle_oci::record::ResctrlRecord;
use serde::Serialize;

use crate::error::{Error, Result};

/// `intel_rdt` of the statistics; empty for a container without a group.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    #[serde(skip_serializing_if = "Option::is_none")]
    l3_cache_info: Option<CacheInfo>,
    #[serde(skip_serializing_if = "String::is_empty")]
    l3_cache_schema_root: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    l3_cache_schema: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mem_bw_info: Option<BandwidthInfo>,
    #[serde(skip_serializing_if = "String::is_empty")]
    mem_bw_schema_root: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    mem_bw_schema: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    schemata: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mbm_stats: Option<Vec<Bandwidth>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmt_stats: Option<Vec<Occupancy>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct CacheInfo {
    cbm_mask: String,
    min_cbm_bits: u64,
    num_closids: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct BandwidthInfo {
    bandwidth_gran: u64,
    delay_linear: u64,
    min_bandwidth: u64,
    num_closids: u64,
}

/// Bytes moved, of one cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Bandwidth {
    mbm_total_bytes: u64,
    mbm_local_bytes: u64,
}

/// Bytes held, in one cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Occupancy {
    llc_occupancy: u64,
}

impl Stats {
    /// Reads those of a container.
    ///
    /// # Errors
    /// The group is gone, or resctrl is not mounted any more.
    pub fn read(record: Option<&ResctrlRecord>) -> Result<Self> {
        let Some(record) = record else {
            return Ok(Self::default());
        };
        let root = super::mountpoint().ok_or_else(|| Error::unsupported(super::NOT_ENABLED))?;
        Self::read_in(&root, record)
    }

    fn read_in(root: &Path, record: &ResctrlRecord) -> Result<Self> {
        let schemata = text(&record.group.join("schemata"))?;
        let in_root = text(&root.join("schemata"))?;
        let line = |all: &str, resource: &str| {
            let mut lines = all.lines().map(str::trim);
            let found = lines.find(|line| line.starts_with(resource));
            found.unwrap_or_default().to_owned()
        };
        let mut stats = Self {
            schemata: schemata.lines().map(str::to_owned).collect(),
            ..Self::default()
        };
        let l3 = root.join("info/L3");
        if l3.exists() {
            stats.l3_cache_info = Some(CacheInfo {
                cbm_mask: text(&l3.join("cbm_mask"))?,
                min_cbm_bits: number(&l3, "min_cbm_bits")?,
                num_closids: number(&l3, "num_closids")?,
            });
            stats.l3_cache_schema_root = line(&in_root, "L3");
            stats.l3_cache_schema = line(&schemata, "L3");
        }
        let bandwidth = root.join("info/MB");
        if bandwidth.exists() {
            stats.mem_bw_info = Some(BandwidthInfo {
                bandwidth_gran: number(&bandwidth, "bandwidth_gran")?,
                delay_linear: number(&bandwidth, "delay_linear")?,
                min_bandwidth: number(&bandwidth, "min_bandwidth")?,
                num_closids: number(&bandwidth, "num_closids")?,
            });
            stats.mem_bw_schema_root = line(&in_root, "MB");
            stats.mem_bw_schema = line(&schemata, "MB");
        }
        stats.monitored(root, record)?;
        Ok(stats)
    }

    /// Without a monitoring group of the container's own, the counts are those of its whole group.
    fn monitored(&mut self, root: &Path, record: &ResctrlRecord) -> Result<()> {
        let Ok(features) = std::fs::read_to_string(root.join("info/L3_MON/mon_features")) else {
            return Ok(());
        };
        let has = |name: &str| features.lines().any(|line| line == name);
        let (total, local) = (has("mbm_total_bytes"), has("mbm_local_bytes"));
        let occupancy = has("llc_occupancy");
        if !total && !local && !occupancy {
            return Ok(());
        }
        let data = record
            .monitor
            .as_ref()
            .unwrap_or(&record.group)
            .join("mon_data");
        let (mut moved, mut held) = (Vec::new(), Vec::new());
        for cache in directories(&data)? {
            let count =
                |wanted: bool, name: &str| if wanted { number(&cache, name) } else { Ok(0) };
            moved.push(Bandwidth {
                mbm_total_bytes: count(total, "mbm_total_bytes")?,
                mbm_local_bytes: count(local, "mbm_local_bytes")?,
            });
            held.push(Occupancy {
                llc_occupancy: count(occupancy, "llc_occupancy")?,
            });
        }
        self.mbm_stats = (total || local).then_some(moved);
        self.cmt_stats = occupancy.then_some(held);
        Ok(())
    }
}

fn directories(path: &Path) -> Result<Vec<std::path::PathBuf>> {
    let fail = |error| Error::system("read", path.display().to_string(), error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_type().map_err(fail)?.is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|error| Error::system("read", path.display().to_string(), error))
}

fn number(directory: &Path, file: &str) -> Result<u64> {
    let path = directory.join(file);
    let text = text(&path)?;
    text.parse().map_err(|_| {
        Error::invalid(format!(
            "unable to parse {text:?} as a uint from file {:?}",
            path.display().to_string()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_runcs_members() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let files = [
            ("schemata", "    L3:0=fff;1=fff\n    MB:0=100;1=100\n"),
            ("c1/schemata", "    L3:0=00f;1=fff\n    MB:0=20;1=100\n"),
            ("info/L3/cbm_mask", "fff\n"),
            ("info/L3/min_cbm_bits", "1\n"),
            ("info/L3/num_closids", "16\n"),
            ("info/MB/bandwidth_gran", "10\n"),
            ("info/MB/delay_linear", "1\n"),
            ("info/MB/min_bandwidth", "10\n"),
            ("info/MB/num_closids", "8\n"),
            (
                "info/L3_MON/mon_features",
                "llc_occupancy\nmbm_total_bytes\n",
            ),
            ("c1/mon_data/mon_L3_00/llc_occupancy", "4096\n"),
            ("c1/mon_data/mon_L3_00/mbm_total_bytes", "7\n"),
        ];
        for (path, content) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let record = ResctrlRecord {
            group: root.join("c1"),
            monitor: None,
            owned: true,
        };
        let stats = Stats::read_in(root, &record).unwrap();
        assert_eq!(
            serde_json::to_value(&stats).unwrap(),
            serde_json::json!({
                "l3_cache_info": {"cbm_mask": "fff", "min_cbm_bits": 1, "num_closids": 16},
                "l3_cache_schema_root": "L3:0=fff;1=fff",
                "l3_cache_schema": "L3:0=00f;1=fff",
                "mem_bw_info": {"bandwidth_gran": 10, "delay_linear": 1, "min_bandwidth": 10,
                    "num_closids": 8},
                "mem_bw_schema_root": "MB:0=100;1=100",
                "mem_bw_schema": "MB:0=20;1=100",
                "schemata": ["L3:0=00f;1=fff", "    MB:0=20;1=100"],
                "mbm_stats": [{"mbm_total_bytes": 7, "mbm_local_bytes": 0}],
                "cmt_stats": [{"llc_occupancy": 4096}]
            })
        );
        assert_eq!(serde_json::to_string(&Stats::default()).unwrap(), "{}");
    }
}
