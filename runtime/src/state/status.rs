//! The status of a container, asked of the kernel each time.

use std::path::Path;

use coracle_oci::record::{ContainerRecord, ProcessRecord};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Status;
use super::store::EXEC_FIFO;
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};

/// What /proc/pid/stat says about a process.
struct Stat {
    state: u8,
    start_time: u64,
}

/// `pid (comm) state ppid ...`; comm may hold anything, the last parenthesis ends it. The start
/// time is field 22.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let comm_end = text.iter().rposition(|b| *b == b')')?;
    let mut fields = text.get(comm_end + 2..)?.split(|b| *b == b' ');
    let state = *fields.next()?.first()?;
    let start_time = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some(Stat { state, start_time })
}

/// The file is one record and comes with one read.
fn read_stat(pid: i32) -> std::result::Result<Vec<u8>, Errno> {
    let path = format!("/proc/{pid}/stat");
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = vec![0u8; 1024];
    let count = rustix::io::retry_on_intr(|| rustix::io::read(&fd, &mut text[..]))?;
    text.truncate(count);
    Ok(text)
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&read_stat(pid).ok()?)
}

/// When a process started, in clock ticks since boot: with the pid, its name for good.
///
/// # Errors
/// There is no such process.
pub fn process_start_time(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = read_stat(pid).map_err(|errno| Error::system("read", path.clone(), errno))?;
    match parse_stat(&text) {
        Some(stat) => Ok(stat.start_time),
        None => Err(Error::system(
            "parse",
            path,
            "malformed process status".to_owned(),
        )),
    }
}

/// Whether the very process of the record still runs: not one that got its pid since, and not its
/// unreaped remains.
pub fn is_alive(process: ProcessRecord) -> bool {
    process.pid > 0
        && stat(process.pid).is_some_and(|stat| {
            stat.start_time == process.start_time && !matches!(stat.state, b'Z' | b'X')
        })
}

/// The status of a created container whose state directory is `dir`.
///
/// # Errors
/// The freezer cannot be read.
pub fn status(record: &ContainerRecord, dir: &Path) -> Result<Status> {
    if !is_alive(record.init()) {
        return Ok(Status::Stopped);
    }
    if Cgroup::open(&record.cgroup).is_frozen()? {
        return Ok(Status::Paused);
    }
    let waits = rustix::fs::lstat(dir.join(EXEC_FIFO)).is_ok();
    Ok(if waits {
        Status::Created
    } else {
        Status::Running
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_table() {
        let tail = "S 1 2 3 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 123 4 18446744073709551615";
        for comm in ["sh", "a b", "x) R 1 (y", ")))"] {
            let stat = parse_stat(format!("42 ({comm}) {tail}\n").as_bytes()).unwrap();
            assert_eq!((stat.state, stat.start_time), (b'S', 777), "{comm}");
        }
        assert!(parse_stat(b"").is_none());
        assert!(parse_stat(b"42 (sh) S 1").is_none());
    }

    #[test]
    fn reused_pid_is_not_alive() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let start_time = process_start_time(pid).unwrap();
        assert!(is_alive(ProcessRecord { pid, start_time }));
        assert!(!is_alive(ProcessRecord {
            pid,
            start_time: start_time + 1
        }));
        assert!(!is_alive(ProcessRecord { pid: 0, start_time }));
    }
}
