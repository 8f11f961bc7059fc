//! Signals to a process that is named by a descriptor, real-time ones included.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sends a signal; 0 only asks whether the process is there.
///
/// # Errors
/// The kernel's: ESRCH if the process has been reaped, EINVAL for a number that is no signal,
/// EPERM.
pub fn send(process: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) takes a descriptor that outlives the call, a number that the
    // kernel checks, no siginfo and no flags.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
