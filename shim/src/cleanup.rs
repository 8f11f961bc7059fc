//! `delete`: ends and removes what a dead shim left.
//!
//! A daemon calls it for one id. When that id's shim is dead, every other member of its group is
//! ended too: nobody supervises them any more, and daemons are known to ask for one of them only.
//! Owns: the order kill, runtime delete, unmount, records. Every step may have been done before.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use prost::Message;

use crate::args::Args;
use crate::cgroup::Cgroup;
use crate::error::{Error, Kind, Result};
use crate::options::Options;
use crate::process::{Exit, now_nanos};
use crate::proto::containerd::task::v2 as wire;
use crate::records::{self, ExitRecord, TaskRecord};
use crate::runtime_cli::Runtime;
use crate::socket;

const PATIENCE: Duration = Duration::from_secs(5);

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
    let socket = socket_of(&bundle);
    let exit = end(&bundle, &args.id, &args.namespace);
    if let Some(socket) = socket.filter(|s| !socket::served(s)) {
        for member in records::members(&socket) {
            // The id is only for a runtime whose record is gone; a member has one.
            if member != bundle
                && let Some(record) = TaskRecord::read(&member)
                && let Err(e) = end(&member, &record.id, &args.namespace)
            {
                report(&e);
            }
        }
        records::remove_socket(&socket);
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

/// Ends one task. Its recorded exit, or 137 now.
fn end(bundle: &Path, id: &str, namespace: &str) -> Result<Exit> {
    let record = TaskRecord::read(bundle);
    let pid = crate::task::create::read_pid(&bundle.join("init.pid"));
    let mut exit = Exit {
        pid: pid.unwrap_or(0),
        status: 137,
        at_nanos: now_nanos(),
    };
    let runtime = match &record {
        Some(record) => {
            exit.pid = record.init_pid;
            kill(record)?;
            Some(record.runtime.clone())
        }
        None => Runtime::new(&Options::default(), namespace).ok(),
    };
    if let Some(runtime) = runtime {
        remove_from(&runtime, id)?;
    }
    crate::mounts::unmount_all(&bundle.join("rootfs"))?;
    if let Some(known) = ExitRecord::read(bundle) {
        exit.status = known.exit_status;
        exit.at_nanos = known.exited_at_unix_nano;
    } else if record.is_some() {
        let written = ExitRecord::new(&exit, false).write(bundle);
        written.map_err(|e| Error::io("write exit.json", bundle.display().to_string(), e))?;
    }
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
    let output = command
        .args(["delete", "--force", id])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::io("run", runtime.binary.display().to_string(), e))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() || crate::task::call::is_absent(&text) {
        return Ok(());
    }
    Err(Error::new(Kind::Internal, "runtime delete", id).source(text.trim()))
}
