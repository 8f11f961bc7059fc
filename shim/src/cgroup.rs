//! The cgroup that a container lives in, as the kernel tells it by /proc/<pid>/cgroup.
//!
//! Owns: nothing but paths. Reads processes and counters, and kills; never creates, limits or
//! removes a cgroup, which is the runtime's part.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Unified hierarchy, when it carries the controllers.
    pub v2: Option<PathBuf>,
    /// Controller and directory.
    pub v1: Vec<(String, PathBuf)>,
}

struct Mount {
    root: PathBuf,
    point: PathBuf,
    /// `None` for cgroup2.
    controllers: Option<Vec<String>>,
}

fn unescape(field: &str) -> PathBuf {
    PathBuf::from(
        field
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\134", "\\"),
    )
}

fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut left = left.split(' ').skip(3);
        let (Some(root), Some(point)) = (left.next(), left.next()) else {
            continue;
        };
        let mut right = right.split(' ');
        let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
        let controllers = match kind {
            "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
            "cgroup2" => None,
            _ => continue,
        };
        found.push(Mount {
            root: unescape(root),
            point: unescape(point),
            controllers,
        });
    }
    found
}

fn place(mount: &Mount, path: &str) -> Option<PathBuf> {
    let below = Path::new(path).strip_prefix(&mount.root).ok()?;
    Some(mount.point.join(below))
}

/// `membership` is /proc/<pid>/cgroup.
fn resolve(membership: &str, mountinfo: &str) -> Cgroup {
    let mounts = mounts(mountinfo);
    let mut cgroup = Cgroup::default();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers.is_empty() {
            let mount = mounts.iter().find(|m| m.controllers.is_none());
            cgroup.v2 = mount.and_then(|m| place(m, path));
            continue;
        }
        for controller in controllers.split(',').filter(|c| !c.starts_with("name=")) {
            let has = |m: &&Mount| {
                m.controllers
                    .as_ref()
                    .is_some_and(|list| list.iter().any(|c| c == controller))
            };
            if let Some(dir) = mounts.iter().find(has).and_then(|m| place(m, path)) {
                cgroup.v1.push((controller.to_owned(), dir));
            }
        }
    }
    if cgroup
        .v1
        .iter()
        .any(|(c, _)| c == "memory" || c == "pids" || c == "cpu")
    {
        cgroup.v2 = None;
    }
    cgroup
}

impl Cgroup {
    pub fn of(pid: i32) -> io::Result<Cgroup> {
        let membership = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        Ok(resolve(
            &membership,
            &fs::read_to_string("/proc/self/mountinfo")?,
        ))
    }

    /// The cgroup around it; in a root, itself.
    pub fn parent(&self) -> Cgroup {
        let up = |dir: &PathBuf| {
            let parent = dir.parent().filter(|p| p.join("cgroup.procs").exists());
            parent.unwrap_or(dir).to_owned()
        };
        Cgroup {
            v2: self.v2.as_ref().map(up),
            v1: self
                .v1
                .iter()
                .map(|(name, dir)| (name.clone(), up(dir)))
                .collect(),
        }
    }

    pub fn controller(&self, name: &str) -> Option<&Path> {
        let found = self.v1.iter().find(|(controller, _)| controller == name);
        found.map(|(_, dir)| dir.as_path())
    }

    /// The directory in which processes are listed.
    fn main(&self) -> Option<&Path> {
        if let Some(v2) = &self.v2 {
            return Some(v2);
        }
        ["pids", "memory", "freezer", "devices", "cpu"]
            .iter()
            .find_map(|c| self.controller(c))
    }

    /// A container that shares the shim's own cgroup, or sits in a root, owns no cgroup that
    /// could be killed as a whole.
    fn own(&self) -> Option<&Path> {
        let main = self.main()?;
        let ours = Cgroup::of(std::process::id() as i32).ok()?;
        let foreign = ours.main().is_some_and(|o| !o.starts_with(main));
        (foreign && main.join("cgroup.procs").exists()).then_some(main)
    }

    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let Some(main) = self.main() else {
            return Ok(Vec::new());
        };
        let mut pids = BTreeSet::new();
        collect(main, &mut pids)?;
        Ok(pids.into_iter().collect())
    }

    /// Kills every process of the cgroup, below it too, until none is left or `patience` ends.
    /// Tells whether the cgroup is empty.
    pub fn kill_all(&self, patience: Duration) -> bool {
        let Some(main) = self.own() else { return true };
        let end = Instant::now() + patience;
        loop {
            if self.v2.is_none() || fs::write(main.join("cgroup.kill"), "1").is_err() {
                for pid in self.pids().unwrap_or_default() {
                    // May be gone meanwhile.
                    let _ = coracle_sys::spawn::kill(pid, 9);
                }
            }
            self.thaw();
            if self.pids().is_ok_and(|p| p.is_empty()) || !main.exists() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A frozen v1 process does not die. On v2 SIGKILL thaws.
    pub fn thaw(&self) {
        if let Some(dir) = self.controller("freezer") {
            // Missing when the cgroup is gone.
            let _ = fs::write(dir.join("freezer.state"), "THAWED");
        }
    }

    /// How often the kernel's OOM killer has struck in this cgroup.
    pub fn oom_kills(&self) -> Option<u64> {
        let file = self.oom_file()?;
        counter(&fs::read_to_string(file).ok()?, "oom_kill")
    }

    pub fn oom_file(&self) -> Option<PathBuf> {
        match (&self.v2, self.controller("memory")) {
            (Some(dir), _) => Some(dir.join("memory.events")),
            (None, Some(dir)) => Some(dir.join("memory.oom_control")),
            (None, None) => None,
        }
    }
}

fn collect(dir: &Path, pids: &mut BTreeSet<i32>) -> io::Result<()> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        // ENODEV: removed under us. EOPNOTSUPP: a threaded cgroup, listed by its domain.
        Err(e) if matches!(e.raw_os_error(), Some(19 | 95)) => {}
        Err(e) => return Err(e),
    }
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// The value of `key` in a file of `key value` lines.
pub fn counter(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 20 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
26 25 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
27 25 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:25 /docker/abc /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
29 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
";

    #[test]
    fn v1_membership_resolves_through_each_hierarchys_mount() {
        let text =
            "9:memory:/a/b\n8:pids:/docker/abc/x\n7:cpu,cpuacct:/a\n1:name=systemd:/s\n0::/u\n";
        let got = resolve(text, HYBRID);
        assert_eq!(got.v2, None);
        let dir = |c: &str| got.controller(c).map(|p| p.display().to_string());
        assert_eq!(dir("memory").as_deref(), Some("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(dir("pids").as_deref(), Some("/sys/fs/cgroup/pids/x"));
        assert_eq!(
            dir("cpuacct").as_deref(),
            Some("/sys/fs/cgroup/cpu,cpuacct/a")
        );
        assert_eq!(dir("freezer"), None);
    }

    #[test]
    fn v2_membership_resolves() {
        let got = resolve(
            "0::/kubepods/x\n",
            "30 25 0:27 / /sys/fs/cgroup rw - cgroup2 none rw\n",
        );
        assert_eq!(
            got.v2.as_deref(),
            Some(Path::new("/sys/fs/cgroup/kubepods/x"))
        );
        assert!(got.v1.is_empty());
    }

    #[test]
    fn counters_match_whole_keys() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(counter(text, "oom_kill"), Some(2));
        assert_eq!(counter(text, "oom"), Some(3));
        assert_eq!(counter(text, "max"), None);
    }

    #[test]
    fn our_own_cgroup_is_never_killed_as_a_whole() {
        let ours = Cgroup::of(std::process::id() as i32).unwrap();
        assert_eq!(ours.own(), None);
    }
}
