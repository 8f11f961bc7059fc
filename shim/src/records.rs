//! What the shim leaves on disk for those who come after it: a restarted daemon, and `delete`
//! once the shim is dead.
//!
//! Owns: the files `init.pid`, `exit.json` and `shim.json` of a bundle and `<socket>.members`,
//! all written to a temporary name and renamed. They are hints: pids are checked by start time,
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
        self.boot_id == boot_id() && start_time(self.init_pid) == Some(self.init_start)
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

pub fn members(socket: &Path) -> Vec<PathBuf> {
    let bytes = fs::read(members_path(socket)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

pub fn remove_socket(socket: &Path) {
    // Both may be gone: the caller wants them absent.
    let _ = fs::remove_file(socket);
    let _ = fs::remove_file(members_path(socket));
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
    fn members_round_trip_and_absence_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        assert!(members(&socket).is_empty());
        write_members(&socket, [Path::new("/a"), Path::new("/b")].into_iter()).unwrap();
        assert_eq!(members(&socket), [Path::new("/a"), Path::new("/b")]);
        remove_socket(&socket);
        assert!(members(&socket).is_empty());
    }

    #[test]
    fn our_start_time_is_known() {
        assert!(start_time(std::process::id() as i32).is_some_and(|t| t > 0));
        assert_eq!(start_time(-5), None);
    }
}
