//! What the shim leaves on disk for those who come after it: a restarted daemon, and `delete`
//! once the shim is dead.
//!
//! Owns: the files `init.pid`, `exit.json` and `shim.json` of a bundle, `<socket>.members` and
//! `<socket>.dead`, all written to a temporary name and renamed. They are hints: pids are checked by start time,
//! and by the boot they belong to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::process::Exit;
use crate::runtime_cli::Runtime;

#[derive(Serialize, Deserialize)]
pub struct ExitRecord {
    pub pid: i32,
    pub exit_status: u32,
    pub exited_at_unix_nano: u64,
    pub oom_killed: bool,
}

impl ExitRecord {
    pub fn new(exit: &Exit, oom_killed: bool) -> ExitRecord {
        ExitRecord {
            pid: exit.pid,
            exit_status: exit.status,
            exited_at_unix_nano: exit.at_nanos,
            oom_killed,
        }
    }

    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        write(&bundle.join("exit.json"), &serde_json::to_vec(self)?)
    }

    pub fn read(bundle: &Path) -> Option<ExitRecord> {
        serde_json::from_slice(&fs::read(bundle.join("exit.json")).ok()?).ok()
    }
}

/// Enough to end a task without its shim.
#[derive(Serialize, Deserialize)]
pub struct TaskRecord {
    pub id: String,
    pub socket: PathBuf,
    pub boot_id: String,
    pub runtime: Runtime,
    /// 0 while the runtime is creating it.
    pub init_pid: i32,
    /// Clock ticks after boot, field 22 of /proc/<pid>/stat.
    pub init_start: u64,
    pub cgroup: Cgroup,
}

impl TaskRecord {
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        write(&bundle.join("shim.json"), &serde_json::to_vec(self)?)
    }

    pub fn read(bundle: &Path) -> Option<TaskRecord> {
        serde_json::from_slice(&fs::read(bundle.join("shim.json")).ok()?).ok()
    }

    /// The pid still is the process that the record was written for.
    pub fn init_lives(&self) -> bool {
        self.init_pid > 0
            && self.boot_id == boot_id()
            && start_time(self.init_pid) == Some(self.init_start)
    }
}

fn members_path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".members");
    name.into()
}

/// The bundles of every task that the shim at `socket` supervises.
pub fn write_members<'a>(socket: &Path, bundles: impl Iterator<Item = &'a Path>) -> io::Result<()> {
    let bundles: Vec<&Path> = bundles.collect();
    write(&members_path(socket), &serde_json::to_vec(&bundles)?)
}

fn dead_path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".dead");
    name.into()
}

fn list(path: &Path) -> Vec<PathBuf> {
    let bytes = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// The shim at `socket` is dead: its members become the dead group's, together with those that a
/// clean-up before this one has not come to. The caller holds the lock of the directory.
pub fn bury_members(socket: &Path) -> io::Result<()> {
    let (from, to) = (members_path(socket), dead_path(socket));
    let members = list(&from);
    if !members.is_empty() {
        let mut dead = list(&to);
        dead.extend(members);
        dead.sort();
        dead.dedup();
        write(&to, &serde_json::to_vec(&dead)?)?;
    }
    match fs::remove_file(&from) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Bundles of tasks whose shim is dead and that have not all been ended.
pub fn dead_members(socket: &Path) -> Vec<PathBuf> {
    list(&dead_path(socket))
}

/// These have been ended. The caller holds the lock of the directory.
pub fn forget_dead(socket: &Path, ended: &[PathBuf]) -> io::Result<()> {
    let path = dead_path(socket);
    let mut left = list(&path);
    left.retain(|member| !ended.contains(member));
    if !left.is_empty() {
        return write(&path, &serde_json::to_vec(&left)?);
    }
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The members go first: whoever finds no socket may write new ones at once.
pub fn remove_socket(socket: &Path) {
    // Both may be gone: the caller wants them absent.
    let _ = fs::remove_file(members_path(socket));
    let _ = fs::remove_file(socket);
}

pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let result = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // A half-written file (full disk) must not stay.
        let _ = fs::remove_file(&temporary);
    }
    result
}

pub fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may hold spaces and parentheses: count from its last one.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_record_is_the_contracts_json() {
        let dir = tempfile::tempdir().unwrap();
        let exit = Exit {
            pid: 7,
            status: 137,
            at_nanos: 5,
        };
        ExitRecord::new(&exit, true).write(dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join("exit.json")).unwrap();
        assert_eq!(
            text,
            r#"{"pid":7,"exit_status":137,"exited_at_unix_nano":5,"oom_killed":true}"#
        );
        assert_eq!(ExitRecord::read(dir.path()).unwrap().exit_status, 137);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_truncated_record_reads_as_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("exit.json"), "{\"pid\":7,").unwrap();
        assert!(ExitRecord::read(dir.path()).is_none());
    }

    #[test]
    fn members_of_a_dead_shim_are_kept_until_each_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let [a, b, c] = ["/a", "/b", "/c"].map(Path::new);
        bury_members(&socket).unwrap();
        assert!(dead_members(&socket).is_empty());
        write_members(&socket, [a, b].into_iter()).unwrap();
        bury_members(&socket).unwrap();
        assert_eq!(dead_members(&socket), [a, b]);
        // The next shim dies before the first one's members are all ended.
        write_members(&socket, [b, c].into_iter()).unwrap();
        bury_members(&socket).unwrap();
        assert_eq!(dead_members(&socket), [a, b, c]);
        forget_dead(&socket, &[a.into(), c.into()]).unwrap();
        assert_eq!(dead_members(&socket), [b]);
        forget_dead(&socket, &[b.into()]).unwrap();
        forget_dead(&socket, &[]).unwrap();
        write_members(&socket, [a].into_iter()).unwrap();
        remove_socket(&socket);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn our_start_time_is_known() {
        assert!(start_time(std::process::id() as i32).is_some_and(|t| t > 0));
        assert_eq!(start_time(-5), None);
    }
}
