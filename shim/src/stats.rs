//! Resource use of a task in the two encodings that containerd knows.
//!
//! Owns: which file feeds which field. A missing file or key is zero: controllers come and go
//! with kernels and hosts.

use std::fs;
use std::path::Path;

use prost::Message;
use prost_types::Any;

use crate::cgroup::{Cgroup, counter};
use crate::proto::io::containerd::cgroups::{v1, v2};

pub fn read(cgroup: &Cgroup) -> Any {
    match &cgroup.v2 {
        Some(dir) => Any {
            type_url: "io.containerd.cgroups.v2.Metrics".to_owned(),
            value: read_v2(dir).encode_to_vec(),
        },
        None => Any {
            type_url: "io.containerd.cgroups.v1.Metrics".to_owned(),
            value: read_v1(cgroup).encode_to_vec(),
        },
    }
}

fn text(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap_or_default()
}

/// One number; `max` and -1 are the largest.
fn number(dir: &Path, file: &str) -> u64 {
    match text(dir, file).trim() {
        "max" | "-1" => u64::MAX,
        value => value.parse().unwrap_or(0),
    }
}

/// A file of `key value` lines.
struct Table(String);

impl Table {
    fn read(dir: &Path, file: &str) -> Table {
        Table(text(dir, file))
    }

    fn get(&self, key: &str) -> u64 {
        counter(&self.0, key).unwrap_or(0)
    }
}

/// Page sizes of the files `hugetlb.<size>.<rest>`.
fn page_sizes(dir: &Path, rest: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let size = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let size = name
            .strip_prefix("hugetlb.")?
            .strip_suffix(rest)?
            .strip_suffix('.')?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<String> = entries.flatten().filter_map(size).collect();
    sizes.sort();
    sizes
}

fn device(word: &str) -> Option<(u64, u64)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn read_v2(dir: &Path) -> v2::Metrics {
    let events = Table::read(dir, "memory.events");
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: number(dir, "pids.current"),
            limit: number(dir, "pids.max"),
        }),
        cpu: Some(v2_cpu(dir)),
        memory: Some(v2_memory(dir)),
        rdma: Some(v2::RdmaStat {
            current: rdma(&text(dir, "rdma.current")).map(v2_rdma).collect(),
            limit: rdma(&text(dir, "rdma.max")).map(v2_rdma).collect(),
        }),
        io: Some(v2::IoStat {
            usage: v2_io(&text(dir, "io.stat")),
            psi: v2_psi(dir, "io"),
        }),
        hugetlb: page_sizes(dir, "current")
            .into_iter()
            .map(|pagesize| v2::HugeTlbStat {
                current: number(dir, &format!("hugetlb.{pagesize}.current")),
                max: number(dir, &format!("hugetlb.{pagesize}.max")),
                failcnt: Table::read(dir, &format!("hugetlb.{pagesize}.events")).get("max"),
                pagesize,
            })
            .collect(),
        memory_events: Some(v2::MemoryEvents {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
            oom_group_kill: events.get("oom_group_kill"),
        }),
        network: Vec::new(),
    }
}

fn v2_cpu(dir: &Path) -> v2::CpuStat {
    let stat = Table::read(dir, "cpu.stat");
    v2::CpuStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        psi: v2_psi(dir, "cpu"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
    }
}

fn v2_memory(dir: &Path) -> v2::MemoryStat {
    let s = Table::read(dir, "memory.stat");
    v2::MemoryStat {
        anon: s.get("anon"),
        file: s.get("file"),
        kernel_stack: s.get("kernel_stack"),
        slab: s.get("slab"),
        sock: s.get("sock"),
        shmem: s.get("shmem"),
        file_mapped: s.get("file_mapped"),
        file_dirty: s.get("file_dirty"),
        file_writeback: s.get("file_writeback"),
        anon_thp: s.get("anon_thp"),
        inactive_anon: s.get("inactive_anon"),
        active_anon: s.get("active_anon"),
        inactive_file: s.get("inactive_file"),
        active_file: s.get("active_file"),
        unevictable: s.get("unevictable"),
        slab_reclaimable: s.get("slab_reclaimable"),
        slab_unreclaimable: s.get("slab_unreclaimable"),
        pgfault: s.get("pgfault"),
        pgmajfault: s.get("pgmajfault"),
        workingset_refault: s.get("workingset_refault_anon") + s.get("workingset_refault_file"),
        workingset_activate: s.get("workingset_activate_anon") + s.get("workingset_activate_file"),
        workingset_nodereclaim: s.get("workingset_nodereclaim"),
        pgrefill: s.get("pgrefill"),
        pgscan: s.get("pgscan"),
        pgsteal: s.get("pgsteal"),
        pgactivate: s.get("pgactivate"),
        pgdeactivate: s.get("pgdeactivate"),
        pglazyfree: s.get("pglazyfree"),
        pglazyfreed: s.get("pglazyfreed"),
        thp_fault_alloc: s.get("thp_fault_alloc"),
        thp_collapse_alloc: s.get("thp_collapse_alloc"),
        usage: number(dir, "memory.current"),
        usage_limit: number(dir, "memory.max"),
        swap_usage: number(dir, "memory.swap.current"),
        swap_limit: number(dir, "memory.swap.max"),
        max_usage: number(dir, "memory.peak"),
        swap_max_usage: number(dir, "memory.swap.peak"),
        psi: v2_psi(dir, "memory"),
    }
}

/// Pressure is off on some kernels, and reading it then fails.
fn v2_psi(dir: &Path, kind: &str) -> Option<v2::PsiStats> {
    let text = fs::read_to_string(dir.join(format!("{kind}.pressure"))).ok()?;
    let line = |name: &str| {
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '))?;
        let value = |key: &str| {
            line.split(' ')
                .find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
        };
        let decimal = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
        Some(v2::PsiData {
            avg10: decimal("avg10"),
            avg60: decimal("avg60"),
            avg300: decimal("avg300"),
            total: value("total").and_then(|v| v.parse().ok()).unwrap_or(0),
        })
    };
    Some(v2::PsiStats {
        some: line("some"),
        full: line("full"),
    })
}

fn v2_io(text: &str) -> Vec<v2::IoEntry> {
    let entry = |line: &str| {
        let mut words = line.split(' ');
        let (major, minor) = device(words.next()?)?;
        let mut entry = v2::IoEntry {
            major,
            minor,
            ..Default::default()
        };
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// `mlx4_0 hca_handle=2 hca_object=max`
fn rdma(text: &str) -> impl Iterator<Item = (String, u32, u32)> + '_ {
    text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?.to_owned();
        let (mut handles, mut objects) = (0, 0);
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            let value = if value == "max" {
                u32::MAX
            } else {
                value.parse().unwrap_or(0)
            };
            match key {
                "hca_handle" => handles = value,
                "hca_object" => objects = value,
                _ => {}
            }
        }
        Some((name, handles, objects))
    })
}

fn v2_rdma((device, hca_handles, hca_objects): (String, u32, u32)) -> v2::RdmaEntry {
    v2::RdmaEntry {
        device,
        hca_handles,
        hca_objects,
    }
}

fn v1_rdma((device, hca_handles, hca_objects): (String, u32, u32)) -> v1::RdmaEntry {
    v1::RdmaEntry {
        device,
        hca_handles,
        hca_objects,
    }
}

fn read_v1(cgroup: &Cgroup) -> v1::Metrics {
    let dir = |name: &str| cgroup.controller(name);
    v1::Metrics {
        hugetlb: dir("hugetlb").map(v1_hugetlb).unwrap_or_default(),
        pids: dir("pids").map(|d| v1::PidsStat {
            current: number(d, "pids.current"),
            // containerd's own shim reports no limit as zero here.
            limit: Some(number(d, "pids.max"))
                .filter(|n| *n != u64::MAX)
                .unwrap_or(0),
        }),
        cpu: v1_cpu(dir("cpuacct"), dir("cpu")),
        memory: dir("memory").map(v1_memory),
        blkio: dir("blkio").map(v1_blkio),
        rdma: dir("rdma").map(|d| v1::RdmaStat {
            current: rdma(&text(d, "rdma.current")).map(v1_rdma).collect(),
            limit: rdma(&text(d, "rdma.max")).map(v1_rdma).collect(),
        }),
        network: Vec::new(),
        cgroup_stats: None,
        memory_oom_control: dir("memory").map(|d| {
            let control = Table::read(d, "memory.oom_control");
            v1::MemoryOomControl {
                oom_kill_disable: control.get("oom_kill_disable"),
                under_oom: control.get("under_oom"),
                oom_kill: control.get("oom_kill"),
            }
        }),
    }
}

fn v1_hugetlb(dir: &Path) -> Vec<v1::HugetlbStat> {
    let stat = |pagesize: String| v1::HugetlbStat {
        usage: number(dir, &format!("hugetlb.{pagesize}.usage_in_bytes")),
        max: number(dir, &format!("hugetlb.{pagesize}.max_usage_in_bytes")),
        failcnt: number(dir, &format!("hugetlb.{pagesize}.failcnt")),
        pagesize,
    };
    page_sizes(dir, "usage_in_bytes")
        .into_iter()
        .map(stat)
        .collect()
}

fn v1_cpu(account: Option<&Path>, cpu: Option<&Path>) -> Option<v1::CpuStat> {
    let usage = account.map(|d| v1::CpuUsage {
        total: number(d, "cpuacct.usage"),
        kernel: number(d, "cpuacct.usage_sys"),
        user: number(d, "cpuacct.usage_user"),
        per_cpu: text(d, "cpuacct.usage_percpu")
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect(),
    });
    let throttling = cpu.map(|d| {
        let stat = Table::read(d, "cpu.stat");
        v1::Throttle {
            periods: stat.get("nr_periods"),
            throttled_periods: stat.get("nr_throttled"),
            throttled_time: stat.get("throttled_time"),
        }
    });
    (usage.is_some() || throttling.is_some()).then_some(v1::CpuStat { usage, throttling })
}

fn v1_memory(dir: &Path) -> v1::MemoryStat {
    let s = Table::read(dir, "memory.stat");
    let entry = |name: &str| {
        let file = |rest: &str| number(dir, &format!("{name}.{rest}"));
        Some(v1::MemoryEntry {
            limit: file("limit_in_bytes"),
            usage: file("usage_in_bytes"),
            max: file("max_usage_in_bytes"),
            failcnt: file("failcnt"),
        })
    };
    v1::MemoryStat {
        cache: s.get("cache"),
        rss: s.get("rss"),
        rss_huge: s.get("rss_huge"),
        mapped_file: s.get("mapped_file"),
        dirty: s.get("dirty"),
        writeback: s.get("writeback"),
        pg_pg_in: s.get("pgpgin"),
        pg_pg_out: s.get("pgpgout"),
        pg_fault: s.get("pgfault"),
        pg_maj_fault: s.get("pgmajfault"),
        inactive_anon: s.get("inactive_anon"),
        active_anon: s.get("active_anon"),
        inactive_file: s.get("inactive_file"),
        active_file: s.get("active_file"),
        unevictable: s.get("unevictable"),
        hierarchical_memory_limit: s.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: s.get("hierarchical_memsw_limit"),
        total_cache: s.get("total_cache"),
        total_rss: s.get("total_rss"),
        total_rss_huge: s.get("total_rss_huge"),
        total_mapped_file: s.get("total_mapped_file"),
        total_dirty: s.get("total_dirty"),
        total_writeback: s.get("total_writeback"),
        total_pg_pg_in: s.get("total_pgpgin"),
        total_pg_pg_out: s.get("total_pgpgout"),
        total_pg_fault: s.get("total_pgfault"),
        total_pg_maj_fault: s.get("total_pgmajfault"),
        total_inactive_anon: s.get("total_inactive_anon"),
        total_active_anon: s.get("total_active_anon"),
        total_inactive_file: s.get("total_inactive_file"),
        total_active_file: s.get("total_active_file"),
        total_unevictable: s.get("total_unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
    }
}

fn v1_blkio(dir: &Path) -> v1::BlkIoStat {
    // The CFQ files left with Linux 5.0; the throttling ones stay.
    let entries = |names: &[&str]| {
        let found = names
            .iter()
            .map(|n| text(dir, n))
            .find(|t| t.lines().count() > 1);
        v1_blkio_entries(&found.unwrap_or_default())
    };
    v1::BlkIoStat {
        io_service_bytes_recursive: entries(&[
            "blkio.io_service_bytes_recursive",
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes",
        ]),
        io_serviced_recursive: entries(&[
            "blkio.io_serviced_recursive",
            "blkio.bfq.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
            "blkio.throttle.io_serviced",
        ]),
        io_queued_recursive: entries(&["blkio.io_queued_recursive"]),
        io_service_time_recursive: entries(&["blkio.io_service_time_recursive"]),
        io_wait_time_recursive: entries(&["blkio.io_wait_time_recursive"]),
        io_merged_recursive: entries(&["blkio.io_merged_recursive"]),
        io_time_recursive: entries(&["blkio.time_recursive"]),
        sectors_recursive: entries(&["blkio.sectors_recursive"]),
    }
}

/// `8:0 Read 4096`, `8:0 4096`, and a total that is not a device's.
fn v1_blkio_entries(text: &str) -> Vec<v1::BlkIoEntry> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (first, op, value) = match words[..] {
            [first, op, value] => (first, op, value),
            [first, value] => (first, "", value),
            _ => return None,
        };
        let (major, minor) = device(first)?;
        let value = value.parse().ok()?;
        Some(v1::BlkIoEntry {
            op: op.to_owned(),
            device: String::new(),
            major,
            minor,
            value,
        })
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v2_files_become_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("pids.current", "3\n");
        put("pids.max", "max\n");
        put("cpu.stat", "usage_usec 100\nuser_usec 60\nsystem_usec 40\n");
        put("memory.current", "4096\n");
        put(
            "memory.stat",
            "anon 10\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
        );
        put("memory.events", "low 0\noom 2\noom_kill 1\n");
        put(
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n\nbad\n",
        );
        put(
            "cpu.pressure",
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\n",
        );
        put("hugetlb.2MB.current", "5\n");
        put("hugetlb.2MB.rsvd.current", "9\n");
        let any = read(&Cgroup {
            v2: Some(dir.path().into()),
            v1: vec![],
        });
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let got = v2::Metrics::decode(any.value.as_slice()).unwrap();
        let pids = got.pids.unwrap();
        assert_eq!((pids.current, pids.limit), (3, u64::MAX));
        let cpu = got.cpu.unwrap();
        assert_eq!(
            (cpu.usage_usec, cpu.psi.unwrap().some.unwrap().total),
            (100, 7)
        );
        let memory = got.memory.unwrap();
        assert_eq!(
            (memory.usage, memory.anon, memory.workingset_refault),
            (4096, 10, 3)
        );
        assert_eq!(got.memory_events.unwrap().oom_kill, 1);
        let io = got.io.unwrap().usage;
        assert_eq!((io.len(), io[0].major, io[0].wios), (1, 8, 4));
        assert_eq!(got.hugetlb.len(), 1);
        assert_eq!(got.hugetlb[0].pagesize, "2MB");
    }

    #[test]
    fn v1_files_become_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("memory.usage_in_bytes", "4096\n");
        put("memory.limit_in_bytes", "8192\n");
        put(
            "memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        );
        put("memory.stat", "cache 1\ntotal_cache 2\n");
        put("cpuacct.usage", "7\n");
        put("cpuacct.usage_percpu", "3 4 \n");
        put(
            "blkio.throttle.io_service_bytes",
            "8:0 Read 5\n8:0 Total 5\nTotal 5\n",
        );
        let v1 = ["memory", "cpuacct", "blkio"].map(|c| (c.to_owned(), dir.path().into()));
        let any = read(&Cgroup {
            v2: None,
            v1: v1.to_vec(),
        });
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let got = v1::Metrics::decode(any.value.as_slice()).unwrap();
        let memory = got.memory.unwrap();
        assert_eq!((memory.total_cache, memory.usage.unwrap().limit), (2, 8192));
        assert_eq!(got.memory_oom_control.unwrap().oom_kill, 2);
        assert_eq!(got.cpu.unwrap().usage.unwrap().per_cpu, [3, 4]);
        let bytes = got.blkio.unwrap().io_service_bytes_recursive;
        assert_eq!(
            (bytes.len(), bytes[0].op.as_str(), bytes[0].value),
            (2, "Read", 5)
        );
        assert!(got.pids.is_none());
    }
}
