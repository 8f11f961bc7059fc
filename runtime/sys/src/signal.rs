//! Signals to a process that is named by a descriptor, and waited for by this one: real-time ones
//! included, for which nix has no value.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::signal::SigSet;

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

/// Waits for one of the set's signals, which are blocked, and takes it.
///
/// # Errors
/// Those of sigwaitinfo(2), but not EINTR.
pub fn wait(set: &SigSet) -> io::Result<i32> {
    loop {
        // SAFETY: the set outlives the call; nothing is asked about the sender.
        let signal = unsafe { libc::sigwaitinfo(set.as_ref(), std::ptr::null_mut()) };
        if signal > 0 {
            return Ok(signal);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_time_signals_are_waited_for() {
        let mut set = SigSet::empty();
        set.add(nix::sys::signal::Signal::SIGUSR2);
        // SAFETY: the set is initialised and ours.
        let added = unsafe {
            let mut raw = *set.as_ref();
            let result = libc::sigaddset(&mut raw, libc::SIGRTMIN() + 3);
            (result, SigSet::from_sigset_t_unchecked(raw))
        };
        assert_eq!(added.0, 0);
        let set = added.1;
        set.thread_block().unwrap();
        for signal in [libc::SIGRTMIN() + 3, libc::SIGUSR2] {
            // SAFETY: a signal to this very thread, which blocks it.
            let sent = unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
            assert_eq!(sent, 0);
            assert_eq!(wait(&set).unwrap(), signal);
        }
    }
}
