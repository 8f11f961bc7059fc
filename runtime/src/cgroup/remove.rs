//! Emptying and removing a container's cgroup, and finding the processes in it.
//!
//! ```text
//! kill_all: v2 cgroup.kill | v1 freeze, SIGKILL each, thaw; again until empty
//! delete:   rmdir -- EBUSY --> rmdir below, wait until unpopulated, rmdir
//! ```
//! Never removes a parent of the container's own directory.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Dir as Entries, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::freeze::{self, Events};
use super::path::Place;
use super::step::Dir;
use super::tree::{Cgroup, is_gone};
use crate::error::{Error, Result};

/// A killed process may take long to die (its memory is freed, its disk writes end).
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// Rounds of freeze and kill on v1 against something that forks as fast as it can.
const KILL_ROUNDS: u32 = 100;

fn failed(call: &'static str, path: &Path, errno: Errno) -> Error {
    Error::system(call, path.display().to_string(), errno)
}

/// Calls `visit` for every cgroup below `path`, children before parents, `path` last.
fn walk(path: &Path, visit: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed("open cgroup", path, errno)),
    };
    // Two links stand for the directory itself: no more, no children, no need to list.
    let links = rustix::fs::fstat(&fd).map_err(|errno| failed("stat cgroup", path, errno))?;
    if links.st_nlink > 2 {
        let entries = Entries::new(fd).map_err(|errno| failed("list cgroup", path, errno))?;
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(Errno::NOENT | Errno::NODEV) => break,
                Err(errno) => return Err(failed("list cgroup", path, errno)),
            };
            let name = entry.file_name().to_bytes();
            if entry.file_type() == FileType::Directory && name != b"." && name != b".." {
                use std::os::unix::ffi::OsStrExt as _;
                walk(&path.join(std::ffi::OsStr::from_bytes(name)), visit)?;
            }
        }
    }
    visit(path)
}

/// Every process in a cgroup and below it.
pub(super) fn processes_below(path: &Path) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    walk(path, &mut |path| {
        match read_pids(path) {
            Ok(found) => pids.extend(found),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(pids)
}

fn read_pids(path: &Path) -> Result<Vec<i32>> {
    let dir = Dir::open(path)?;
    let text = match dir.read("cgroup.procs") {
        // A threaded cgroup lists threads only.
        Err(Errno::OPNOTSUPP) => dir.read("cgroup.threads"),
        text => text,
    };
    let text = text.map_err(|errno| failed("read cgroup.procs of", path, errno))?;
    // 0 stands for a process outside our pid namespace: nothing that we could name.
    Ok(text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect())
}

pub(super) fn kill_all(cgroup: &Cgroup) -> Result<()> {
    let Some(place) = cgroup.member_place() else {
        return Ok(());
    };
    if place.controllers.is_empty() {
        let killed = Dir::open(&place.path).and_then(|dir| {
            dir.write("cgroup.kill", "1")
                .map_err(|errno| failed("write cgroup.kill of", &place.path, errno))
        });
        match killed {
            Ok(()) if cgroup.is_v2() => return Ok(()),
            Ok(()) => return kill_v1_rest(cgroup),
            Err(error) if is_gone(&error) && !place.path.exists() => return Ok(()),
            // Before Linux 5.14 there is no cgroup.kill.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    kill_each(cgroup)
}

/// On a hybrid host: whoever is in the v1 hierarchies only; and a thaw, since a process that v1
/// froze does not die before.
fn kill_v1_rest(cgroup: &Cgroup) -> Result<()> {
    for pid in cgroup.pids()?.into_iter().filter_map(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    if cgroup.is_frozen()? {
        return cgroup.thaw();
    }
    Ok(())
}

fn kill_each(cgroup: &Cgroup) -> Result<()> {
    let freezer = cgroup
        .place_of("freezer")
        .and_then(|place| Dir::open(&place.path).ok());
    for _ in 0..KILL_ROUNDS {
        // Frozen, nothing forks between the listing and the kill. Without it, more rounds.
        if let Some(dir) = &freezer {
            let _ = freeze::freeze(cgroup.version, dir);
        }
        let pids = cgroup.pids();
        for pid in pids.as_deref().unwrap_or_default() {
            if let Some(pid) = Pid::from_raw(*pid) {
                // Gone is as good as killed.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        if let Some(dir) = &freezer {
            let _ = freeze::thaw(cgroup.version, dir);
        }
        if pids?.is_empty() {
            return Ok(());
        }
        std::thread::yield_now();
    }
    Err(Error::system(
        "kill all processes of",
        describe(cgroup),
        Errno::BUSY,
    ))
}

fn describe(cgroup: &Cgroup) -> String {
    cgroup
        .dirs
        .first()
        .map(|place| place.path.display().to_string())
        .unwrap_or_default()
}

pub(super) fn delete(cgroup: &Cgroup) -> Result<()> {
    let mut first_error = None;
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    for place in &cgroup.dirs {
        if let Err(error) = delete_one(cgroup, place, deadline) {
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn delete_one(cgroup: &Cgroup, place: &Place, deadline: Instant) -> Result<()> {
    // Nearly always the cgroup is empty, and this the only call.
    match rustix::fs::rmdir(&place.path) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(_) if !place.path.exists() => return Ok(()),
        Err(_) => {}
    }
    loop {
        let removed = walk(&place.path, &mut |path| match rustix::fs::rmdir(path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed("rmdir", path, errno)),
        });
        match removed {
            Ok(()) => return Ok(()),
            Err(error) if error.errno() == Some(Errno::BUSY.raw_os_error()) => {
                if Instant::now() >= deadline {
                    return Err(error);
                }
                wait_unpopulated(cgroup, place, deadline)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits until the dying processes have left: by the event of the cgroup2 hierarchy where there
/// is one, else by the pidfd of each process.
fn wait_unpopulated(cgroup: &Cgroup, place: &Place, deadline: Instant) -> Result<()> {
    let unified = cgroup
        .dirs
        .iter()
        .find(|place| place.controllers.is_empty());
    if let Some(unified) = unified
        && let Ok(dir) = Dir::open(&unified.path)
        && let Ok(events) = Events::open(&dir)
        && events.wait("populated 0", deadline)?
        && unified.path == place.path
    {
        return Ok(());
    }
    let pids = processes_below(&place.path)?;
    for pid in pids.into_iter().filter_map(Pid::from_raw) {
        let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let timeout = Timespec::try_from(left).ok();
        if matches!(rustix::event::poll(&mut fds, timeout.as_ref()), Ok(0)) {
            return Ok(());
        }
    }
    // The last reference to an exited process goes after its exit is visible, and nothing tells
    // when: this is the one wait without an event, as short as a scheduler tick.
    std::thread::sleep(Duration::from_millis(1));
    Ok(())
}
