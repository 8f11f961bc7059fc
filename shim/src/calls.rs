//! Runtime calls of a shim as they are seen from outside it, once it is dead.
//!
//! A call outlives the shim that made it: it would go on creating what nobody supervises, or hang
//! for ever. Every call carries its shim's socket in its environment, and by that it is found.
//! Owns: that mark. The processes of containers do not have it: their environment is the
//! config's.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};

const VARIABLE: &str = "CORACLE_SHIM_CALL=";
const PATIENCE: Duration = Duration::from_secs(2);

/// The environment entry of a call for the shim at `socket`.
pub fn mark(socket: &Path) -> io::Result<CString> {
    Ok(CString::new(
        [VARIABLE.as_bytes(), socket.as_os_str().as_bytes()].concat(),
    )?)
}

/// Kills every call of the shim that listened at `socket`, and what they had started. Tells
/// whether none is left.
pub fn kill_all_of(socket: &Path) -> bool {
    let Ok(mark) = mark(socket) else { return true };
    let end = Instant::now() + PATIENCE;
    // A dying process may have started one more: looked for again until there is none.
    while kill_marked(&mark) {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Whether there was one.
fn kill_marked(mark: &CString) -> bool {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let mut found = false;
    for pid in pids.filter_map(Pid::from_raw) {
        if !marked(pid, mark) {
            continue;
        }
        // The descriptor names one process for good, the number does not: looked at again.
        if let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            && marked(pid, mark)
        {
            found = true;
            let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        }
    }
    found
}

/// A dead process has no environment.
fn marked(pid: Pid, mark: &CString) -> bool {
    let path = format!("/proc/{}/environ", pid.as_raw_nonzero());
    let environment = std::fs::read(path).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|entry| entry == mark.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn calls_of_one_socket_end_and_those_of_another_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let start = |name: &str| {
            let path = dir.path().join(name);
            Command::new("sleep")
                .arg("600")
                .env("CORACLE_SHIM_CALL", &path)
                .spawn()
                .unwrap()
        };
        let (mut one, mut other) = (start("a"), start("ab"));
        // The environment is the new program's only after its execve.
        let mark = mark(&dir.path().join("a")).unwrap();
        let pid = Pid::from_child(&one);
        let begun = Instant::now();
        while !marked(pid, &mark) && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(kill_all_of(&dir.path().join("a")));
        assert_eq!(one.wait().unwrap().signal(), Some(9));
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
