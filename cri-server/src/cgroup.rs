//! Owns reading of cgroups: where they are mounted, which files carry the numbers of CRI's
//! statistics, which processes are in one; and the last resort of killing those. The runtime
//! makes and removes containers' cgroups; here only the parent that a pod of ours got is removed.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Where cgroups are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mounts {
    /// One mount point for each controller, and on a hybrid host the unified hierarchy beside
    /// them, under the name "unified".
    V1(BTreeMap<String, PathBuf>),
    /// The one hierarchy.
    V2(PathBuf),
}

impl Mounts {
    /// Reads the mounts of this process. A hybrid host counts as v1: that is where its
    /// controllers are.
    pub fn detect() -> io::Result<Mounts> {
        Ok(Self::parse(&std::fs::read_to_string(
            "/proc/self/mountinfo",
        )?))
    }

    fn parse(mountinfo: &str) -> Mounts {
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for line in mountinfo.lines() {
            let Some((mount, fs)) = line.split_once(" - ") else {
                continue;
            };
            let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else {
                continue;
            };
            let mut fs = fs.split(' ');
            match fs.next() {
                Some("cgroup") => {
                    for option in fs.nth(1).unwrap_or("").split(',') {
                        if option != "rw" && option != "ro" {
                            v1.entry(option.to_owned()).or_insert_with(|| point.clone());
                        }
                    }
                }
                Some("cgroup2") if v2.is_none() => v2 = Some(point),
                _ => {}
            }
        }
        if v1.is_empty() {
            return Mounts::V2(v2.unwrap_or(PathBuf::from("/sys/fs/cgroup")));
        }
        v1.extend(v2.map(|point| ("unified".to_owned(), point)));
        Mounts::V1(v1)
    }

    /// Whether this is the unified hierarchy.
    pub fn is_unified(&self) -> bool {
        matches!(self, Mounts::V2(_))
    }

    /// The directory of a cgroup for one controller.
    fn dir(&self, controller: &str, path: &str) -> Option<PathBuf> {
        let relative = path.trim_start_matches('/');
        match self {
            Mounts::V1(points) => points.get(controller).map(|point| point.join(relative)),
            Mounts::V2(point) => Some(point.join(relative)),
        }
    }

    /// Directories of a cgroup in all hierarchies.
    fn dirs(&self, path: &str) -> Vec<PathBuf> {
        let relative = path.trim_start_matches('/');
        let mut dirs: Vec<PathBuf> = match self {
            Mounts::V1(points) => points.values().map(|point| point.join(relative)).collect(),
            Mounts::V2(point) => vec![point.join(relative)],
        };
        dirs.sort();
        dirs.dedup();
        dirs
    }

    /// Whether a file exists in a controller's cgroups (the root's are left out on v2).
    pub fn has_controller(&self, controller: &str) -> bool {
        match self {
            Mounts::V1(points) => points.contains_key(controller),
            Mounts::V2(point) => read(&point.join("cgroup.controllers"))
                .is_some_and(|list| list.split_whitespace().any(|c| c == controller)),
        }
    }

    /// Whether swap can be limited.
    pub fn accounts_for_swap(&self) -> bool {
        match self {
            Mounts::V1(points) => points
                .get("memory")
                .is_some_and(|point| point.join("memory.memsw.limit_in_bytes").exists()),
            // The root cgroup has no memory.swap.max; the kernel has it whenever it has swap.
            Mounts::V2(_) => self.has_controller("memory") && Path::new("/proc/swaps").exists(),
        }
    }

    /// Kills every process of a cgroup and of those below it.
    pub fn kill(&self, path: &str) {
        if let Mounts::V2(point) = self {
            let file = point.join(path.trim_start_matches('/')).join("cgroup.kill");
            if std::fs::write(file, "1").is_ok() {
                return;
            }
        }
        for pid in self.processes(path) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Pids in a cgroup and in those below it.
    pub fn processes(&self, path: &str) -> Vec<i32> {
        let controller = ["pids", "freezer", "memory", "name=systemd"]
            .into_iter()
            .find_map(|c| self.dir(c, path).filter(|dir| dir.is_dir()));
        let mut pids = Vec::new();
        if let Some(dir) = controller {
            collect_pids(&dir, &mut pids);
        }
        pids
    }

    /// Removes a cgroup that has become empty; anything else stays.
    pub fn remove_empty(&self, path: &str) {
        if path.trim_matches('/').is_empty() {
            return;
        }
        for dir in self.dirs(path) {
            // rmdir(2) refuses a cgroup with children or processes, which is what is wanted.
            let _ = std::fs::remove_dir(dir);
        }
    }

    /// Reads the numbers of a cgroup; none of them when it does not exist.
    pub fn sample(&self, path: &str) -> Option<Sample> {
        match self {
            Mounts::V1(_) => self.sample_v1(path),
            Mounts::V2(_) => self.sample_v2(path),
        }
    }

    fn sample_v1(&self, path: &str) -> Option<Sample> {
        let cpu = self.dir("cpuacct", path)?;
        let memory = self.dir("memory", path)?;
        let stat = read_pairs(&memory.join("memory.stat"));
        let value = |name: &str| stat.get(name).copied();
        let usage = read_number(&memory.join("memory.usage_in_bytes"))?;
        let swap = read_number(&memory.join("memory.memsw.usage_in_bytes"))
            .map(|both| both.saturating_sub(usage));
        Some(Sample {
            cpu_ns: read_number(&cpu.join("cpuacct.usage"))?,
            memory: MemorySample {
                usage,
                working_set: usage.saturating_sub(value("total_inactive_file").unwrap_or(0)),
                limit: read_number(&memory.join("memory.limit_in_bytes"))
                    .filter(|limit| *limit < UNLIMITED_V1),
                rss: value("total_rss"),
                page_faults: value("total_pgfault"),
                major_page_faults: value("total_pgmajfault"),
                swap_usage: swap,
                swap_limit: read_number(&memory.join("memory.memsw.limit_in_bytes"))
                    .filter(|limit| *limit < UNLIMITED_V1),
                psi: None,
            },
            processes: self
                .dir("pids", path)
                .and_then(|dir| read_number(&dir.join("pids.current"))),
            cpu_psi: None,
            io_psi: None,
        })
    }

    fn sample_v2(&self, path: &str) -> Option<Sample> {
        let dir = self.dir("", path)?;
        let cpu = read_pairs(&dir.join("cpu.stat"));
        let stat = read_pairs(&dir.join("memory.stat"));
        let value = |name: &str| stat.get(name).copied();
        let usage = read_number(&dir.join("memory.current"));
        Some(Sample {
            cpu_ns: cpu.get("usage_usec")?.saturating_mul(1000),
            memory: MemorySample {
                usage: usage.unwrap_or(0),
                working_set: usage
                    .unwrap_or(0)
                    .saturating_sub(value("inactive_file").unwrap_or(0)),
                limit: read_number(&dir.join("memory.max")),
                rss: value("anon"),
                page_faults: value("pgfault"),
                major_page_faults: value("pgmajfault"),
                swap_usage: read_number(&dir.join("memory.swap.current")),
                swap_limit: read_number(&dir.join("memory.swap.max")),
                psi: Psi::read(&dir.join("memory.pressure")),
            },
            processes: read_number(&dir.join("pids.current")),
            cpu_psi: Psi::read(&dir.join("cpu.pressure")),
            io_psi: Psi::read(&dir.join("io.pressure")),
        })
    }
}

/// v1 writes "no limit" as the largest page-aligned number.
const UNLIMITED_V1: u64 = 1 << 62;

/// Numbers of one cgroup at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Time on all cpus since the start.
    pub cpu_ns: u64,
    /// Memory.
    pub memory: MemorySample,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Pressure on the cpu.
    pub cpu_psi: Option<Psi>,
    /// Pressure on block devices.
    pub io_psi: Option<Psi>,
}

/// Memory of one cgroup, in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemorySample {
    /// All of it, page cache included.
    pub usage: u64,
    /// Usage without the inactive part of the page cache.
    pub working_set: u64,
    /// Limit; none: unlimited.
    pub limit: Option<u64>,
    /// Anonymous memory.
    pub rss: Option<u64>,
    /// Page faults.
    pub page_faults: Option<u64>,
    /// Page faults that had to read.
    pub major_page_faults: Option<u64>,
    /// Swap in use.
    pub swap_usage: Option<u64>,
    /// Limit of swap (v2), of memory and swap (v1).
    pub swap_limit: Option<u64>,
    /// Pressure.
    pub psi: Option<Psi>,
}

/// One pressure file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Psi {
    /// Some tasks stall.
    pub some: PsiLine,
    /// All tasks stall.
    pub full: PsiLine,
}

/// One line of a pressure file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PsiLine {
    /// Microseconds since the start.
    pub total: u64,
    /// Percentages of the last 10, 60 and 300 seconds.
    pub averages: [f64; 3],
}

impl Psi {
    fn read(path: &Path) -> Option<Psi> {
        read(path).map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Psi {
        let mut psi = Psi::default();
        for line in text.lines() {
            let mut fields = line.split(' ');
            let target = match fields.next() {
                Some("some") => &mut psi.some,
                Some("full") => &mut psi.full,
                _ => continue,
            };
            for (name, value) in fields.filter_map(|f| f.split_once('=')) {
                match name {
                    "avg10" => target.averages[0] = value.parse().unwrap_or(0.0),
                    "avg60" => target.averages[1] = value.parse().unwrap_or(0.0),
                    "avg300" => target.averages[2] = value.parse().unwrap_or(0.0),
                    "total" => target.total = value.parse().unwrap_or(0),
                    _ => {}
                }
            }
        }
        psi
    }
}

fn collect_pids(dir: &Path, pids: &mut Vec<i32>) {
    let procs = read(&dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_pids(&entry.path(), pids);
        }
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn read_number(path: &Path) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

fn read_pairs(path: &Path) -> BTreeMap<String, u64> {
    let text = read(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_counts_as_v1() {
        let mounts = Mounts::parse(HYBRID);
        assert!(!mounts.is_unified());
        let dir = mounts.dir("cpuacct", "/a/b").unwrap();
        assert_eq!(dir, Path::new("/sys/fs/cgroup/cpu,cpuacct/a/b"));
        assert_eq!(mounts.dir("hugetlb", "/a"), None);
        assert_eq!(mounts.dirs("/a").len(), 4);
    }

    #[test]
    fn one_hierarchy_is_v2() {
        let line = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(Mounts::parse(line), Mounts::V2("/sys/fs/cgroup".into()));
    }

    #[test]
    fn pressure_is_parsed() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0 total=3\n";
        let psi = Psi::parse(text);
        assert_eq!(psi.some.total, 77);
        assert_eq!(psi.some.averages, [1.5, 0.0, 0.25]);
        assert_eq!(psi.full.total, 3);
    }

    #[test]
    fn sample_of_v2_files() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("a");
        std::fs::create_dir(&cgroup).unwrap();
        for (name, text) in [
            ("cpu.stat", "usage_usec 5\nuser_usec 3\n"),
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 300\ninactive_file 400\n"),
        ] {
            std::fs::write(cgroup.join(name), text).unwrap();
        }
        let sample = Mounts::V2(dir.path().into()).sample("/a").unwrap();
        assert_eq!(sample.cpu_ns, 5000);
        assert_eq!(
            (sample.memory.usage, sample.memory.working_set),
            (1000, 600)
        );
        assert_eq!(sample.memory.limit, None);
        assert_eq!(Mounts::V2(dir.path().into()).sample("/b"), None);
    }
}
