//! User namespaces from outside: writing a child's id maps, and making a namespace only to have
//! its mapping on a mount.

use std::os::fd::OwnedFd;
use std::process::Command;

use coracle_sys::clone::{Side, exit_now};
use rustix::fs::{Mode, OFlags};

use super::channel::Channel;
use super::clone::clone;
use super::process::reap;
use crate::error::{Error, Result};
use crate::host::HostFacts;

/// The maps of a user namespace, as the kernel reads them.
#[derive(Debug, Clone, Copy)]
pub struct Maps<'a> {
    pub uid: &'a str,
    pub gid: &'a str,
    /// False: setgroups(2) is given up first, which an unprivileged writer has to.
    pub setgroups: bool,
}

/// Writes the maps of the process's user namespace.
///
/// # Errors
/// The kernel, or newuidmap(1), refuses the mapping.
pub fn write(pid: i32, maps: Maps<'_>, host: &HostFacts) -> Result<()> {
    if !maps.setgroups {
        write_file(pid, "setgroups", "deny")?;
    }
    for (file, text, program) in [
        ("uid_map", maps.uid, "newuidmap"),
        ("gid_map", maps.gid, "newgidmap"),
    ] {
        match write_file(pid, file, text) {
            Err(error) if error.errno() == Some(libc::EPERM) && !host.is_root() => {
                helper(program, pid, text)?;
            }
            written => written?,
        }
    }
    Ok(())
}

fn write_file(pid: i32, name: &str, text: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    std::fs::write(&path, text).map_err(|error| {
        Error::system(
            format!("failed to write {:?} to", text.trim_end()),
            path,
            error,
        )
    })
}

/// The set-uid programs that know which ids a user may map (/etc/subuid).
fn helper(program: &str, pid: i32, map: &str) -> Result<()> {
    let output = Command::new(program)
        .arg(pid.to_string())
        .args(map.split_whitespace())
        .output()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::unsupported(format!(
                "mapping tool not present: {program} is not in $PATH, and other ids than one's \
                 own are mapped by it only"
            )),
            _ => Error::system("run", program, error),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    // Its own name starts its messages.
    Err(Error::unsupported(format!(
        "failed to use {program} on {pid}: {text}"
    )))
}

/// A user namespace with these maps and no process in it.
///
/// # Errors
/// As for [`write`], and those of clone3(2).
pub fn namespace(uid_map: &str, gid_map: &str, host: &HostFacts) -> Result<OwnedFd> {
    let (mine, theirs) = Channel::pair()?;
    match clone(libc::CLONE_NEWUSER as u64, None)? {
        Side::Child => {
            drop(mine);
            // Ends with the channel at the latest.
            let _ = theirs.wait();
            exit_now(0)
        }
        Side::Parent { pid, pidfd: _ } => {
            drop(theirs);
            let made = write(
                pid,
                Maps {
                    uid: uid_map,
                    gid: gid_map,
                    setgroups: true,
                },
                host,
            )
            .and_then(|()| {
                let path = format!("/proc/{pid}/ns/user");
                rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| Error::system("open", path, error))
            });
            drop(mine);
            reap(pid)?;
            made
        }
    }
}
