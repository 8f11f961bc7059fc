//! `delete`: ends and removes what a dead shim left.
//!
//! A daemon calls it for one id. When that id's shim is dead, every other member of its group is
//! ended too: nobody supervises them any more, and daemons are known to ask for one of them only.
//! `start` does the same before a group gets a new shim.
//! Owns: the order kill, runtime delete, unmount, records. Every step may have been done before,
//! or be done by another `delete` at this moment.

use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use prost::Message;
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::args::Args;
use crate::calls;
use crate::cgroup::Cgroup;
use crate::error::{Error, Kind, Result};
use crate::options::Options;
use crate::process::{Exit, now_nanos};
use crate::proto::containerd::task::v2 as wire;
use crate::records::{self, ExitRecord, TaskRecord};
use crate::runtime_cli::{Runtime, memory_file};
use crate::socket;

const PATIENCE: Duration = Duration::from_secs(5);
/// For the runtime's own part. A daemon gives the whole of `delete` little more.
const RUNTIME: Duration = Duration::from_secs(10);

/// The socket of the shim that supervised this bundle.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
    if let Some(record) = TaskRecord::read(bundle) {
        return Some(record.socket);
    }
    let text = std::fs::read_to_string(bundle.join("address")).ok()?;
    let path = text.trim().strip_prefix("unix://")?;
    Some(PathBuf::from(path))
}

pub fn delete(args: &Args) -> Result<()> {
    crate::task::create::check_id(&args.id)?;
    let bundle = match args.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(|e| Error::io("getcwd", "", e))?,
        false => args.bundle.clone(),
    };
    let dead = match socket_of(&bundle) {
        Some(socket) if socket::withdraw(&socket)? => Some(socket),
        _ => None,
    };
    if let Some(socket) = &dead {
        end_calls(socket)?;
    }
    let exit = end(&bundle, &args.id, &args.namespace);
    let failed = exit.is_err().then_some(bundle.as_path());
    if let Some(socket) = &dead
        && let Err(e) = end_members(socket, &args.namespace, failed)
    {
        report(&e);
    }
    let exit = exit?;
    let answer = wire::DeleteResponse {
        pid: exit.pid as u32,
        exit_status: exit.status,
        exited_at: Some(exit.timestamp()),
    };
    std::io::stdout()
        .write_all(&answer.encode_to_vec())
        .map_err(|e| Error::io("write", "stdout", e))
}

/// containerd shows the stderr of `delete` in its log.
fn report(error: &Error) {
    let _ = writeln!(std::io::stderr(), "containerd-shim-coracle-v2: {error}");
}

fn end_calls(socket: &Path) -> Result<()> {
    // A container that was created and not started has the mark of the call that made it, and in
    // a cgroup that somebody has frozen it would not die.
    for record in records::dead_members(socket)
        .iter()
        .filter_map(|member| TaskRecord::read(member))
    {
        if record.boot_id == records::boot_id() {
            record.cgroup.thaw();
        }
    }
    match calls::kill_all_of(socket) {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Internal,
            "kill runtime calls of",
            socket.display().to_string(),
        )
        .source("some are left")),
    }
}

/// Before a new shim serves the group: ends what the dead one before it supervised, or nobody
/// would.
pub fn end_dead_group(socket: &Path, namespace: &str) -> Result<()> {
    if records::dead_members(socket).is_empty() {
        return Ok(());
    }
    end_calls(socket)?;
    end_members(socket, namespace, None)
}

/// Ends every task of the dead shim that listened at `socket`; the first failure, when all have
/// been tried. What has failed, before too, stays on the list, for whoever comes next.
fn end_members(socket: &Path, namespace: &str, failed: Option<&Path>) -> Result<()> {
    let mut failure = Ok(());
    let mut ended = Vec::new();
    let members = records::dead_members(socket);
    if members.is_empty() {
        return Ok(());
    }
    for member in members {
        if failed == Some(member.as_path()) {
            continue;
        }
        // A task that is ended has no record any more.
        let result = match TaskRecord::read(&member) {
            Some(record) => end(&member, &record.id, namespace).map(drop),
            None => Ok(()),
        };
        match result {
            Ok(()) => ended.push(member),
            Err(e) if failure.is_ok() => failure = Err(e),
            Err(e) => report(&e),
        }
    }
    let _lock = socket::lock_of(socket)?;
    records::forget_dead(socket, &ended)
        .map_err(|e| Error::io("update members of", socket.display().to_string(), e))?;
    failure
}

/// One `delete` at a time works on a bundle. One that is gone needs no lock.
fn lock(bundle: &Path) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(bundle, flags, Mode::empty()) {
        Ok(dir) => {
            rustix::fs::flock(&dir, FlockOperation::LockExclusive)
                .map_err(|e| Error::io("flock", bundle.display().to_string(), e))?;
            Ok(Some(dir))
        }
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::io("open", bundle.display().to_string(), e)),
    }
}

/// Ends one task. Its recorded exit, or 137 now.
fn end(bundle: &Path, id: &str, namespace: &str) -> Result<Exit> {
    let _lock = lock(bundle)?;
    let record = TaskRecord::read(bundle);
    let known = ExitRecord::read(bundle);
    let pid = crate::task::create::read_pid(&bundle.join("init.pid"));
    let mut exit = Exit {
        pid: pid.unwrap_or(0),
        status: 137,
        at_nanos: now_nanos(),
    };
    let runtime = match &record {
        Some(record) => {
            if record.init_pid > 0 {
                exit.pid = record.init_pid;
            }
            kill(record)?;
            Some(record.runtime.clone())
        }
        // Removed before, by its shim or by a `delete`: both take the record away last.
        None if known.is_some() => None,
        None => Runtime::new(&Options::default(), namespace).ok(),
    };
    let removed = runtime.map_or(Ok(()), |runtime| remove_from(&runtime, id));
    crate::mounts::unmount_rootfs(&bundle.join("rootfs"))?;
    crate::sandbox::files::remove(bundle)?;
    if let Some(known) = known {
        exit.status = known.exit_status;
        exit.at_nanos = known.exited_at_unix_nano;
    } else if record.is_some() {
        let written = ExitRecord::new(&exit, false).write(bundle);
        written.map_err(|e| Error::io("write exit.json", bundle.display().to_string(), e))?;
    }
    removed?;
    let _ = std::fs::remove_file(bundle.join("shim.json"));
    Ok(exit)
}

fn kill(record: &TaskRecord) -> Result<()> {
    let cgroup_is_ours = record.boot_id == records::boot_id() && record.cgroup != Cgroup::default();
    if record.init_lives() {
        // Between the check and the signal the pid could only pass to another process if init
        // died and was reaped in that instant.
        let _ = coracle_sys::spawn::kill(record.init_pid, 9);
    }
    if cgroup_is_ours && !record.cgroup.kill_all(PATIENCE) {
        return Err(Error::new(Kind::Internal, "kill", &record.id)
            .source("processes are left in its cgroup after 5 s"));
    }
    Ok(())
}

fn remove_from(runtime: &Runtime, id: &str) -> Result<()> {
    let mut command = Command::new(&runtime.binary);
    command.arg("--root").arg(&runtime.root);
    if runtime.systemd_cgroup {
        command.arg("--systemd-cgroup");
    }
    command.args(["delete", "--force", id]);
    let failed = |e| Error::io("run", runtime.binary.display().to_string(), e);
    let limit = crate::task::deadline::limit().min(RUNTIME);
    let (status, text) = run_within(&mut command, limit).map_err(failed)?;
    let failed = || Error::new(Kind::Internal, "runtime delete", id);
    match status {
        Some(status) if status.success() || crate::task::call::is_absent(&text) => Ok(()),
        Some(_) => Err(failed().source(text.trim())),
        None => {
            let text = format!("it did not end within {} s and was killed", limit.as_secs());
            Err(failed().source(text))
        }
    }
}

/// Its status and what it said; no status when it had to be killed.
fn run_within(
    command: &mut Command,
    limit: Duration,
) -> std::io::Result<(Option<ExitStatus>, String)> {
    let other = |e: Error| std::io::Error::other(e.to_string());
    let mut said = memory_file("stderr", b"").map_err(other)?;
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone()?)
        .spawn()?;
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= end {
            // Not reaped: the group is its own.
            let _ = coracle_sys::spawn::kill_group(child.id() as i32, 9);
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let mut bytes = Vec::new();
    said.rewind()?;
    said.read_to_end(&mut bytes)?;
    Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hanging_program_is_killed_with_what_it_started() {
        let begun = Instant::now();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo said >&2; sleep 600 & sleep 600"]);
        let (status, text) = run_within(&mut command, Duration::from_millis(200)).unwrap();
        assert!(status.is_none() && text == "said\n", "{status:?} {text}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit 3"]);
        let (status, _) = run_within(&mut command, Duration::from_secs(10)).unwrap();
        assert_eq!(status.unwrap().code(), Some(3));
    }
}
