//! clone3(2): the one system call that makes a container's first process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What the new process shares and where it starts.
#[derive(Debug, Default)]
pub struct Request<'a> {
    /// CLONE_NEW* and CLONE_PARENT.
    pub flags: u64,
    /// Starts the process in this cgroup2 directory (CLONE_INTO_CGROUP, Linux 5.7).
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Which side of the clone this is.
#[derive(Debug)]
pub enum Side {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// Clones the calling process, like fork(2) with namespaces.
///
/// # Safety
/// The calling process must have one thread only: the child's copy of any lock that another
/// thread held would stay locked for ever.
///
/// # Errors
/// Those of clone3(2).
pub unsafe fn clone3(request: &Request<'_>) -> io::Result<Side> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is valid and means "unset".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = request.flags | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    // With CLONE_PARENT the signal is that of the caller's own exit and must stay 0.
    if request.flags & libc::CLONE_PARENT as u64 == 0 {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args lives over the call and its size is passed; no CLONE_VM and no stack is given,
    // so the child continues on its copy of this stack; the caller vouches for a single thread.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => {
            // SAFETY: the kernel has just made this fd for us alone (CLONE_PIDFD).
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Side::Parent {
                pid: pid as i32,
                pidfd,
            })
        }
    }
}

/// The same by clone(2), where a sandbox hides clone3 or the kernel is older than 5.3. It cannot
/// start the process in a cgroup.
///
/// # Safety
/// As for [`clone3`].
///
/// # Errors
/// Those of clone(2).
pub unsafe fn clone_without_cgroup(flags: u64) -> io::Result<Side> {
    let mut pidfd: RawFd = -1;
    let mut flags = flags | libc::CLONE_PIDFD as u64;
    // In the low byte; with CLONE_PARENT it is that of the caller's own exit.
    if flags & libc::CLONE_PARENT as u64 == 0 {
        flags |= libc::SIGCHLD as u64;
    }
    let none = 0usize;
    // SAFETY: the pidfd's place lives over the call; no CLONE_VM and no stack is given, so the child
    // continues on its copy of this stack; the caller vouches for a single thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, &raw mut pidfd, none, none) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => {
            // SAFETY: the kernel has just made this fd for us alone (CLONE_PIDFD).
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Side::Parent {
                pid: pid as i32,
                pidfd,
            })
        }
    }
}

/// Ends the process at once: no destructors, no atexit functions, no flushing of the stdio buffers
/// that a clone copied from its parent.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes a plain integer and does not return.
    unsafe { libc::_exit(code) }
}
