//! User namespaces as things: the one that owns another namespace, and one made only for its id
//! mapping.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::clone::{Request, Side, clone_without_cgroup, clone3, exit_now};

const NS_GET_USERNS: libc::c_ulong = 0xb701;

/// The user namespace that owns the namespace `of` (ioctl_ns(2)).
///
/// # Errors
/// Those of the ioctl: EPERM when it is outside the caller's.
pub fn owner(of: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: this request takes no argument and touches no memory of ours.
    let fd = unsafe { libc::ioctl(of.as_fd().as_raw_fd(), NS_GET_USERNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this fd for us alone, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A user namespace with these maps (lines as /proc/<pid>/uid_map takes them) and no process in
/// it. The caller needs the right to map the ids.
///
/// # Errors
/// Those of clone3(2), and of the writing of the maps.
pub fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let request = Request {
        flags: libc::CLONE_NEWUSER as u64,
        cgroup: None,
    };
    // SAFETY: whatever locks other threads hold, the child only makes the system calls close, read
    // and exit: it allocates nothing and takes no lock.
    let side = match unsafe { clone3(&request) } {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
            // SAFETY: as above.
            unsafe { clone_without_cgroup(request.flags) }
        }
        side => side,
    }?;
    match side {
        Side::Child => {
            drop(write);
            // Ends with the parent's end at the latest.
            let _ = rustix::io::read(&read, &mut [0u8; 1]);
            exit_now(0)
        }
        Side::Parent { pid, pidfd: _ } => {
            let made = fs::write(format!("/proc/{pid}/uid_map"), uid_map)
                .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), gid_map))
                .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
            drop(write);
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())?;
            }
            made.map(OwnedFd::from)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_our_network_namespace_is_our_user_namespace() {
        let net = fs::File::open("/proc/self/ns/net").unwrap();
        // EPERM where the tests themselves run in a user namespace below the owner.
        if let Ok(owner) = owner(&net) {
            use std::os::unix::fs::MetadataExt;
            let ours = fs::metadata("/proc/self/ns/user").unwrap();
            assert_eq!(fs::File::from(owner).metadata().unwrap().ino(), ours.ino());
        }
    }
}
