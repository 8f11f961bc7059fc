//! What a machine holds that a test may leave behind. A snapshot before and one after are
//! compared; what is shared with other work on the machine (cgroups, processes) is attributed by
//! a mark that is part of every path of the test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};

/// Everything is a line of text that says what it is.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub things: BTreeSet<String>,
}

impl Snapshot {
    /// `mark` is in the path of every cgroup and file of the test.
    pub fn take(mark: &str) -> Result<Self> {
        let mut things = BTreeSet::new();
        things.extend(mounts()?.into_iter().map(|m| format!("mount {m}")));
        things.extend(links()?.into_iter().map(|l| format!("link {l}")));
        things.extend(rules()?.into_iter().map(|r| format!("nft {r}")));
        things.extend(
            names("/run/netns")
                .into_iter()
                .map(|n| format!("netns {n}")),
        );
        things.extend(
            cgroups(mark)
                .iter()
                .map(|c| format!("cgroup {}", c.display())),
        );
        things.extend(processes(mark).iter().map(|p| format!("process {p}")));
        Ok(Self { things })
    }

    /// Only what belongs to this run, by its mark, its ids or the bridge: for a machine where other
    /// work goes on beside it.
    pub fn take_own(mark: &str, ids: &[String], bridge: &str) -> Result<Self> {
        let mut all = Self::take(mark)?;
        let ports = ports_of(bridge);
        all.things.retain(|thing| match thing.split_once(' ') {
            Some(("mount" | "netns", name)) => {
                name.contains(mark) || ids.iter().any(|id| name.contains(&id[..16.min(id.len())]))
            }
            Some(("link", name)) => ports.iter().any(|p| name.starts_with(p.as_str())),
            Some(("nft", line)) => line.contains(bridge) && line.contains("elements"),
            _ => true,
        });
        Ok(all)
    }

    /// What is there now and was not there before.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.things.difference(&before.things).cloned().collect()
    }
}

fn mounts() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo")?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let target = left.split(' ').nth(4)?;
            Some(format!("{target} ({right})"))
        })
        .collect())
}

fn links() -> Result<Vec<String>> {
    let output = Command::new("ip").args(["-o", "link"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|l| l.split(": ").nth(1))
        .map(str::to_owned)
        .collect())
}

fn rules() -> Result<Vec<String>> {
    let output = Command::new("nft").args(["list", "ruleset"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .map(str::trim)
        .filter(|l| l.len() > 1)
        .map(str::to_owned)
        .collect())
}

/// Names of the links that are plugged into a bridge.
fn ports_of(bridge: &str) -> Vec<String> {
    names(&format!("/sys/class/net/{bridge}/brif"))
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Cgroups whose path holds the mark, in every hierarchy, parents before children.
pub fn cgroups(mark: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut queue = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                let path = entry.path();
                if path.to_string_lossy().contains(mark) {
                    found.push(path.clone());
                }
                queue.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Processes whose command line, working directory or cgroup holds the mark.
pub fn processes(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let dir = entry.path();
        let command = fs::read(dir.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let cwd = fs::read_link(dir.join("cwd")).unwrap_or_default();
        let cgroup = fs::read_to_string(dir.join("cgroup")).unwrap_or_default();
        let zombie = fs::read_to_string(dir.join("stat")).is_ok_and(|s| s.contains(") Z "));
        let ours =
            command.contains(mark) || cwd.to_string_lossy().contains(mark) || cgroup.contains(mark);
        if ours && !zombie {
            found.push(format!("{pid} {}", command.trim()));
        }
    }
    found
}

/// Files and directories below `dir` whose name holds one of `ids`.
pub fn files_named(dir: &Path, ids: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut queue = vec![dir.to_owned()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if ids.iter().any(|id| name.contains(id.as_str())) {
                found.push(entry.path());
            } else if entry.file_type().is_ok_and(|t| t.is_dir()) {
                queue.push(entry.path());
            }
        }
    }
    found
}

/// Kills and removes what carries the mark, after a test that failed: the next one must find a
/// clean machine. Never touches anything else.
pub fn sweep(mark: &str, dir: &Path) {
    for cgroup in cgroups(mark) {
        // A frozen process of cgroup v1 does not die. Not every hierarchy has the file.
        if cgroup.join("freezer.state").exists() {
            let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
        }
    }
    for _ in 0..20 {
        let left = processes(mark);
        if left.is_empty() {
            break;
        }
        left.iter().for_each(|process| kill(process));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let mut targets: Vec<String> = mounts()
        .unwrap_or_default()
        .iter()
        .filter_map(|m| m.split(" (").next())
        .filter(|t| Path::new(t).starts_with(dir))
        .map(str::to_owned)
        .collect();
    targets.sort();
    for target in targets.iter().rev() {
        let _ = nix::mount::umount2(target.as_str(), nix::mount::MntFlags::MNT_DETACH);
    }
    remove_cgroups(mark);
}

/// SIGKILL for one of `processes`.
pub fn kill(process: &str) {
    let pid = process.split(' ').next().and_then(|p| p.parse().ok());
    if let Some(pid) = pid.and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Removes the test's empty cgroups, children first.
pub fn remove_cgroups(mark: &str) {
    for cgroup in cgroups(mark).iter().rev() {
        let _ = fs::remove_dir(cgroup);
    }
}
