//! The clone itself: the one place of this crate that vouches for what clone3 demands.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use coracle_sys::clone::{Request, Side, clone_without_cgroup, clone3, exit_now};
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};

/// Clones this process. The child must end in exec or `exit_now`.
///
/// # Errors
/// Those of clone3(2).
pub fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let request = Request { flags, cgroup };
    // SAFETY: nothing in this crate starts a thread (see lib.rs), so the caller is the only one.
    match unsafe { clone3(&request) } {
        // Sandboxes hide the call, whose flags a seccomp filter cannot see.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => by_clone(flags, cgroup),
        cloned => cloned.map_err(|error| {
            let into = if cgroup.is_some() {
                "|CLONE_INTO_CGROUP"
            } else {
                ""
            };
            Error::system(format!("clone3({flags:#x}{into})"), "", error)
        }),
    }
}

/// The child enters the cgroup itself, by a file that is opened here: in its namespaces it may have
/// lost the right to.
fn by_clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let members = cgroup.map(members).transpose()?;
    // SAFETY: nothing in this crate starts a thread (see lib.rs), so the caller is the only one.
    let side = unsafe { clone_without_cgroup(flags) }
        .map_err(|error| Error::system(format!("clone({flags:#x})"), "", error))?;
    if let (Side::Child, Some(members)) = (&side, &members)
        && let Err(error) = rustix::io::write(members, b"0")
    {
        // Not returned: this is the child, and its caller would go on as the parent.
        let text = format!("coracle: write cgroup.procs: {error}\n");
        let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
        exit_now(1)
    }
    Ok(side)
}

fn members(cgroup: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(cgroup, c"cgroup.procs", flags, Mode::empty())
        .map_err(|error| Error::system("open", "cgroup.procs", error))
}
