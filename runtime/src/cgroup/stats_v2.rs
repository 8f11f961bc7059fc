//! Usage from cgroup v2 files, in the shape that v1 gave it.

use super::stats::{
    Blkio, BlkioEntry, Cpu, CpuUsage, Files, Hugetlb, Memory, MemoryEntry, Pids, Psi, PsiData,
    Stats, Throttling, hugepage_sizes,
};
use super::stats_v1;
use crate::error::Result;

pub(super) fn read(files: &Files) -> Result<Stats> {
    let mut stats = Stats {
        cpu: cpu(files)?,
        memory: memory(files)?,
        pids: pids(files)?,
        blkio: blkio(files)?,
        ..Stats::default()
    };
    for size in hugepage_sizes() {
        if let Some(entry) = hugetlb(files, &size)? {
            stats.hugetlb.insert(size, entry);
        }
    }
    Ok(stats)
}

/// Without the controller, the processes are counted.
fn pids(files: &Files) -> Result<Pids> {
    if files.number("pids.current")?.is_some() {
        return stats_v1::pids(files);
    }
    let procs = files.text("cgroup.procs")?;
    let members = match procs {
        Some(members) => members,
        None => files.text("cgroup.threads")?.unwrap_or_default(),
    };
    Ok(Pids {
        current: members.lines().count() as u64,
        limit: 0,
    })
}

fn cpu(files: &Files) -> Result<Cpu> {
    let table = files.table("cpu.stat")?.unwrap_or_default();
    let value = |key: &str| table.get(key).copied().unwrap_or_default();
    let nanoseconds = |key: &str| value(key) * 1000;
    Ok(Cpu {
        usage: CpuUsage {
            total: nanoseconds("usage_usec"),
            kernel: nanoseconds("system_usec"),
            user: nanoseconds("user_usec"),
            ..CpuUsage::default()
        },
        throttling: Throttling {
            periods: value("nr_periods"),
            throttled_periods: value("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
        },
        psi: psi(files, "cpu.pressure")?,
    })
}

fn memory(files: &Files) -> Result<Memory> {
    let Some(raw) = files.table("memory.stat")? else {
        return Ok(Memory {
            psi: psi(files, "memory.pressure")?,
            ..Memory::default()
        });
    };
    let number = |file: &str| files.number(file).map(Option::unwrap_or_default);
    let usage = MemoryEntry {
        limit: number("memory.max")?,
        usage: number("memory.current")?,
        max: number("memory.peak")?,
        failcnt: 0,
    };
    // v1 counted memory and swap together. The sum of two peaks is no peak.
    let swap = match files.number("memory.swap.current")? {
        None => MemoryEntry {
            usage: usage.usage,
            limit: usage.limit,
            ..MemoryEntry::default()
        },
        Some(swap) => MemoryEntry {
            usage: usage.usage.saturating_add(swap),
            limit: match number("memory.swap.max")? {
                u64::MAX => u64::MAX,
                limit => usage.limit.saturating_add(limit),
            },
            ..MemoryEntry::default()
        },
    };
    Ok(Memory {
        cache: raw.get("file").copied().unwrap_or_default(),
        usage,
        swap,
        raw,
        psi: psi(files, "memory.pressure")?,
        ..Memory::default()
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`
fn psi(files: &Files, file: &str) -> Result<Option<Psi>> {
    let Some(text) = files.text(file)? else {
        return Ok(None);
    };
    let mut psi = Psi::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let data = match fields.next() {
            Some("some") => &mut psi.some,
            Some("full") => &mut psi.full,
            _ => continue,
        };
        *data = parse_psi(fields).ok_or_else(|| files.malformed(file, line))?;
    }
    Ok(Some(psi))
}

fn parse_psi<'a>(fields: impl Iterator<Item = &'a str>) -> Option<PsiData> {
    let mut data = PsiData::default();
    for field in fields {
        let (key, value) = field.split_once('=')?;
        match key {
            "avg10" => data.avg10 = value.parse().ok()?,
            "avg60" => data.avg60 = value.parse().ok()?,
            "avg300" => data.avg300 = value.parse().ok()?,
            "total" => data.total = value.parse().ok()?,
            _ => {}
        }
    }
    Some(data)
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4`
fn blkio(files: &Files) -> Result<Blkio> {
    let mut blkio = Blkio {
        psi: psi(files, "io.pressure")?,
        ..Blkio::default()
    };
    let text = files.text("io.stat")?.unwrap_or_default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let Some((major, minor)) = fields.next().and_then(|device| device.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            return Err(files.malformed("io.stat", line));
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let (op, table) = match key {
                "rbytes" => ("Read", &mut blkio.io_service_bytes_recursive),
                "wbytes" => ("Write", &mut blkio.io_service_bytes_recursive),
                "rios" => ("Read", &mut blkio.io_serviced_recursive),
                "wios" => ("Write", &mut blkio.io_serviced_recursive),
                _ => continue,
            };
            let Ok(value) = value.parse() else {
                return Err(files.malformed("io.stat", line));
            };
            table.push(BlkioEntry {
                major,
                minor,
                op: op.to_owned(),
                value,
            });
        }
    }
    Ok(blkio)
}

fn hugetlb(files: &Files, size: &str) -> Result<Option<Hugetlb>> {
    let usage = match files.number(&format!("hugetlb.{size}.rsvd.current"))? {
        Some(usage) => Some(usage),
        None => files.number(&format!("hugetlb.{size}.current"))?,
    };
    let Some(usage) = usage else { return Ok(None) };
    let events = files
        .table(&format!("hugetlb.{size}.events"))?
        .unwrap_or_default();
    let failcnt = events.get("max").copied().unwrap_or_default();
    Ok(Some(Hugetlb {
        usage,
        max: 0,
        failcnt,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(files: &[(&str, &str)]) -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let opened = Files::open(dir.path()).unwrap();
        (dir, opened)
    }

    #[test]
    fn v2_memory_and_swap_are_added() {
        let (_dir, files) = fake(&[
            ("memory.stat", "anon 790425600\nfile 6502666240\n"),
            ("memory.current", "100\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "7\n"),
            ("memory.swap.max", "50\n"),
        ]);
        let memory = memory(&files).unwrap();
        assert_eq!(memory.cache, 6_502_666_240);
        assert_eq!(memory.usage.limit, u64::MAX);
        assert_eq!(memory.swap.usage, 107);
        assert_eq!(memory.swap.limit, u64::MAX);
    }

    #[test]
    fn v2_io_lines() {
        let (_dir, files) = fake(&[(
            "io.stat",
            "254:1 rbytes=6901432320 wbytes=14245535744 rios=263278 wios=248603 dbytes=0 dios=0\n254:0\n",
        )]);
        let blkio = blkio(&files).unwrap();
        assert_eq!(blkio.io_service_bytes_recursive.len(), 2);
        assert_eq!(blkio.io_serviced_recursive[1].op, "Write");
        assert_eq!(blkio.io_serviced_recursive[1].value, 248_603);
    }

    #[test]
    fn v2_pressure() {
        let (_dir, files) = fake(&[(
            "cpu.pressure",
            "some avg10=1.71 avg60=2.36 avg300=2.57 total=230548833\nfull avg10=1.00 avg60=1.01 avg300=1.00 total=157622356\n",
        )]);
        let psi = psi(&files, "cpu.pressure").unwrap().unwrap();
        assert_eq!(psi.some.total, 230_548_833);
        assert!((psi.full.avg60 - 1.01).abs() < 1e-9);
    }

    #[test]
    fn v2_pids_without_the_controller() {
        let (_dir, files) = fake(&[("cgroup.procs", "1\n2\n3\n")]);
        assert_eq!(
            pids(&files).unwrap(),
            Pids {
                current: 3,
                limit: 0
            }
        );
    }
}
