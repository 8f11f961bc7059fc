//! What a case has left behind, told by its id.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where to look.
#[derive(Debug)]
pub struct Places {
    /// Directories of cgroups, one a hierarchy, in which the case's is a child.
    pub cgroups: Vec<PathBuf>,
    /// The runtime's state root.
    pub root: PathBuf,
    /// What is mounted below here is a leak.
    pub dir: PathBuf,
    pub bundle: PathBuf,
}

/// How long a process that was killed may stay visible.
const DYING: Duration = Duration::from_secs(3);

impl Places {
    /// Everything that is left of the case, after a moment for what is dying.
    pub fn left(&self, id: &str) -> Vec<String> {
        let end = Instant::now() + DYING;
        loop {
            let found = self.look(id);
            if found.is_empty() || Instant::now() > end {
                return found;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn look(&self, id: &str) -> Vec<String> {
        let mut found = Vec::new();
        for parent in &self.cgroups {
            let cgroup = parent.join(id);
            if cgroup.exists() {
                found.push(format!("cgroup {}", cgroup.display()));
            }
        }
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(id) {
                found.push(format!("state {}", entry.path().display()));
            }
        }
        for entry in fs::read_dir(&self.bundle).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name != "rootfs" && name != "config.json" {
                found.push(format!("file {}", entry.path().display()));
            }
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let below = self.dir.display().to_string();
        found.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&below) || line.contains(id))
                .map(|line| format!("mount {line}")),
        );
        found.extend(processes(id).into_iter().map(|p| format!("process {p}")));
        found
    }

    /// Takes it away, so that the next case finds a clean place. Kills only what carries the id.
    pub fn sweep(&self, id: &str) {
        for process in processes(id) {
            let pid = process.split(' ').next().and_then(|p| p.parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let thaw = self.cgroups.iter().map(|parent| parent.join(id));
        for cgroup in thaw {
            let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
            let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
            let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            for pid in members.lines().filter_map(|line| line.parse().ok()) {
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            for _ in 0..100 {
                if !cgroup.exists() || fs::remove_dir(&cgroup).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = fs::remove_dir_all(self.root.join(id));
        for entry in fs::read_dir(&self.bundle).into_iter().flatten().flatten() {
            if entry.file_name() != "rootfs" && entry.file_name() != "config.json" {
                let _ = fs::remove_file(entry.path());
            }
        }
        self.unmount();
    }

    fn unmount(&self) {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        for line in mounts.lines().rev() {
            let target = line.split(' ').nth(4).unwrap_or_default();
            if Path::new(target).starts_with(&self.dir) {
                let _ = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
            }
        }
    }
}

/// Processes whose command line or environment holds the id: the runtime before it executes the
/// container's program, and that program. A zombie has neither.
fn processes(id: &str) -> Vec<String> {
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        if pid == own {
            continue;
        }
        let read = |file: &str| {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let command = read("cmdline");
        if command.contains(id) || read("environ").contains(id) {
            let mut command = command.trim().to_owned();
            command.truncate(command.floor_char_boundary(160));
            found.push(format!("{pid} {command}"));
        }
    }
    found
}
