//! Usage from cgroup v1 files.

use super::stats::{
    Blkio, BlkioEntry, CpuSet, CpuUsage, Files, Hugetlb, Memory, MemoryEntry, Pids, Stats,
    Throttling, hugepage_sizes,
};
use super::tree::{Cgroup, is_gone};
use crate::error::Result;

/// Nanoseconds of a clock tick: USER_HZ, part of the ABI, is 100 on every architecture of ours.
const TICK: u64 = 10_000_000;

pub(super) fn read(cgroup: &Cgroup) -> Result<Stats> {
    let mut stats = Stats::default();
    let open = |controller: &str| -> Result<Option<Files>> {
        let Some(place) = cgroup.place_of(controller) else {
            return Ok(None);
        };
        match Files::open(&place.path) {
            Ok(files) => Ok(Some(files)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    };
    if let Some(files) = open("cpu")? {
        stats.cpu.throttling = throttling(&files)?;
    }
    if let Some(files) = open("cpuacct")? {
        stats.cpu.usage = cpu_usage(&files)?;
    }
    if let Some(files) = open("cpuset")? {
        stats.cpuset = cpuset(&files)?;
    }
    if let Some(files) = open("memory")? {
        stats.memory = memory(&files)?;
    }
    if let Some(files) = open("pids")? {
        stats.pids = pids(&files)?;
    }
    if let Some(files) = open("blkio")? {
        stats.blkio = blkio(&files)?;
    }
    if let Some(files) = open("hugetlb")? {
        for size in hugepage_sizes() {
            let entry = hugetlb(&files, &size)?;
            stats.hugetlb.insert(size, entry);
        }
    }
    Ok(stats)
}

pub(super) fn pids(files: &Files) -> Result<Pids> {
    let limit = files.number("pids.max")?.unwrap_or_default();
    Ok(Pids {
        current: files.number("pids.current")?.unwrap_or_default(),
        // No limit has always been reported as zero.
        limit: if limit == u64::MAX { 0 } else { limit },
    })
}

fn throttling(files: &Files) -> Result<Throttling> {
    let table = files.table("cpu.stat")?.unwrap_or_default();
    let value = |key: &str| table.get(key).copied().unwrap_or_default();
    Ok(Throttling {
        periods: value("nr_periods"),
        throttled_periods: value("nr_throttled"),
        throttled_time: value("throttled_time"),
    })
}

fn cpu_usage(files: &Files) -> Result<CpuUsage> {
    let table = files.table("cpuacct.stat")?.unwrap_or_default();
    let time = |key: &str| table.get(key).copied().unwrap_or_default() * TICK;
    let percpu = files.text("cpuacct.usage_percpu")?.unwrap_or_default();
    let mut usage = CpuUsage {
        total: files.number("cpuacct.usage")?.unwrap_or_default(),
        percpu: percpu
            .split_whitespace()
            .filter_map(|value| value.parse().ok())
            .collect(),
        kernel: time("system"),
        user: time("user"),
        ..CpuUsage::default()
    };
    let all = files.text("cpuacct.usage_all")?.unwrap_or_default();
    // "cpu user system" heads the lines.
    for line in all.lines().skip(1) {
        let mut fields = line
            .split_whitespace()
            .skip(1)
            .filter_map(|field| field.parse().ok());
        if let (Some(user), Some(kernel)) = (fields.next(), fields.next()) {
            usage.percpu_user.push(user);
            usage.percpu_kernel.push(kernel);
        }
    }
    Ok(usage)
}

fn cpuset(files: &Files) -> Result<CpuSet> {
    let list = |file: &str| -> Result<Vec<u16>> {
        let text = files.text(file)?.unwrap_or_default();
        parse_list(text.trim()).ok_or_else(|| files.malformed(file, &text))
    };
    let number = |file: &str| files.number(file).map(Option::unwrap_or_default);
    let level = files
        .text("cpuset.sched_relax_domain_level")?
        .unwrap_or_default();
    Ok(CpuSet {
        cpus: list("cpuset.cpus")?,
        cpu_exclusive: number("cpuset.cpu_exclusive")?,
        mems: list("cpuset.mems")?,
        mem_hardwall: number("cpuset.mem_hardwall")?,
        mem_exclusive: number("cpuset.mem_exclusive")?,
        memory_migrate: number("cpuset.memory_migrate")?,
        memory_spread_page: number("cpuset.memory_spread_page")?,
        memory_spread_slab: number("cpuset.memory_spread_slab")?,
        memory_pressure: number("cpuset.memory_pressure")?,
        sched_load_balance: number("cpuset.sched_load_balance")?,
        sched_relax_domain_level: level.trim().parse().unwrap_or_default(),
    })
}

/// `0-3,7`
fn parse_list(text: &str) -> Option<Vec<u16>> {
    let mut numbers = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(from.parse::<u16>().ok()?..=to.parse::<u16>().ok()?);
    }
    Some(numbers)
}

fn memory(files: &Files) -> Result<Memory> {
    let raw = files.table("memory.stat")?.unwrap_or_default();
    let entry = |name: &str| -> Result<MemoryEntry> {
        let number = |suffix: &str| {
            files
                .number(&format!("memory{name}.{suffix}"))
                .map(Option::unwrap_or_default)
        };
        Ok(MemoryEntry {
            limit: number("limit_in_bytes")?,
            usage: number("usage_in_bytes")?,
            max: number("max_usage_in_bytes")?,
            failcnt: number("failcnt")?,
        })
    };
    Ok(Memory {
        cache: raw.get("cache").copied().unwrap_or_default(),
        usage: entry("")?,
        swap: entry(".memsw")?,
        kernel: entry(".kmem")?,
        kernel_tcp: entry(".kmem.tcp")?,
        raw,
        psi: None,
    })
}

fn hugetlb(files: &Files, size: &str) -> Result<Hugetlb> {
    // The reservation counters, where there are any, are the limits that apply.
    let reserved = format!("hugetlb.{size}.rsvd");
    let prefix = match files.number(&format!("{reserved}.usage_in_bytes"))? {
        Some(_) => reserved,
        None => format!("hugetlb.{size}"),
    };
    let number = |suffix: &str| {
        files
            .number(&format!("{prefix}.{suffix}"))
            .map(Option::unwrap_or_default)
    };
    Ok(Hugetlb {
        usage: number("usage_in_bytes")?,
        max: number("max_usage_in_bytes")?,
        failcnt: number("failcnt")?,
    })
}

/// Which files there are depends on the scheduler: BFQ, CFQ (before 5.0), or only the throttle.
fn blkio(files: &Files) -> Result<Blkio> {
    for prefix in ["blkio.bfq.", "blkio."] {
        let mut blkio = Blkio::default();
        let mut found = false;
        let tables: [(&str, &mut Vec<BlkioEntry>); 8] = [
            ("sectors_recursive", &mut blkio.sectors_recursive),
            (
                "io_service_time_recursive",
                &mut blkio.io_service_time_recursive,
            ),
            ("io_wait_time_recursive", &mut blkio.io_wait_time_recursive),
            ("io_merged_recursive", &mut blkio.io_merged_recursive),
            ("io_queued_recursive", &mut blkio.io_queue_recursive),
            ("time_recursive", &mut blkio.io_time_recursive),
            ("io_serviced_recursive", &mut blkio.io_serviced_recursive),
            (
                "io_service_bytes_recursive",
                &mut blkio.io_service_bytes_recursive,
            ),
        ];
        for (name, table) in tables {
            if let Some(entries) = entries(files, &format!("{prefix}{name}"))? {
                *table = entries;
                found = true;
            }
        }
        if found {
            return Ok(blkio);
        }
    }
    for suffix in ["_recursive", ""] {
        let serviced = entries(files, &format!("blkio.throttle.io_serviced{suffix}"))?;
        let bytes = entries(files, &format!("blkio.throttle.io_service_bytes{suffix}"))?;
        if serviced.is_some() || bytes.is_some() {
            return Ok(Blkio {
                io_serviced_recursive: serviced.unwrap_or_default(),
                io_service_bytes_recursive: bytes.unwrap_or_default(),
                ..Blkio::default()
            });
        }
    }
    Ok(Blkio::default())
}

/// `8:0 Read 1282048`, `8:0 6792`, and a last line with the total.
fn entries(files: &Files, file: &str) -> Result<Option<Vec<BlkioEntry>>> {
    let Some(text) = files.text(file)? else {
        return Ok(None);
    };
    let parse = |line: &str| -> Option<BlkioEntry> {
        let mut fields = line.split([' ', ':']).filter(|field| !field.is_empty());
        let major = fields.next()?.parse().ok()?;
        let minor = fields.next()?.parse().ok()?;
        let third = fields.next()?;
        let (op, value) = match fields.next() {
            Some(value) => (third.to_owned(), value),
            None => (String::new(), third),
        };
        Some(BlkioEntry {
            major,
            minor,
            op,
            value: value.parse().ok()?,
        })
    };
    let lines = text.lines().filter(|line| !line.starts_with("Total "));
    lines
        .map(|line| parse(line).ok_or_else(|| files.malformed(file, line)))
        .collect::<Result<Vec<_>>>()
        .map(Some)
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
    fn cpu_list_table() {
        let cases: &[(&str, Option<&[u16]>)] = &[
            ("", Some(&[])),
            ("0", Some(&[0])),
            ("0-2,5", Some(&[0, 1, 2, 5])),
            ("x", None),
            ("1-", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse_list(text).as_deref(), *want, "{text:?}");
        }
    }

    #[test]
    fn memory_of_a_kernel_without_kmem_limits() {
        let (_dir, files) = fake(&[
            ("memory.stat", "cache 512\nrss 1024\n"),
            ("memory.usage_in_bytes", "2048\n"),
            ("memory.max_usage_in_bytes", "4096\n"),
            ("memory.limit_in_bytes", "8192\n"),
            ("memory.failcnt", "100\n"),
        ]);
        let memory = memory(&files).unwrap();
        assert_eq!(memory.cache, 512);
        assert_eq!(
            memory.usage,
            MemoryEntry {
                limit: 8192,
                usage: 2048,
                max: 4096,
                failcnt: 100
            }
        );
        assert_eq!(memory.kernel, MemoryEntry::default());
    }

    #[test]
    fn blkio_falls_back_to_the_throttle() {
        let (_dir, files) = fake(&[(
            "blkio.throttle.io_service_bytes",
            "8:0 Read 1282048\n8:0 Write 5\nTotal 1282053\n",
        )]);
        let blkio = blkio(&files).unwrap();
        let want = [("Read", 1_282_048), ("Write", 5)].map(|(op, value)| BlkioEntry {
            major: 8,
            minor: 0,
            op: op.to_owned(),
            value,
        });
        assert_eq!(blkio.io_service_bytes_recursive, want);
    }

    #[test]
    fn cpu_usage_reads_each_processor() {
        let (_dir, files) = fake(&[
            ("cpuacct.stat", "user 100\nsystem 50\n"),
            ("cpuacct.usage", "12262454190222160\n"),
            ("cpuacct.usage_percpu", "1 2 \n"),
            ("cpuacct.usage_all", "cpu user system\n0 3 4\n1 5 6\n"),
        ]);
        let usage = cpu_usage(&files).unwrap();
        assert_eq!(usage.total, 12_262_454_190_222_160);
        assert_eq!((usage.percpu, usage.percpu_user), (vec![1, 2], vec![3, 5]));
        assert_eq!(usage.percpu_kernel, [4, 6]);
        assert_eq!(usage.user, 1_000_000_000);
    }
}
