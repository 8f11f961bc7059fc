//! execve(2) and what has to be true of a process right before it.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// A NULL-terminated array of C strings, made before the clone so that exec needs no allocation.
#[derive(Debug)]
pub struct CStringArray {
    strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl CStringArray {
    pub fn new(strings: Vec<CString>) -> Self {
        let mut pointers = Vec::with_capacity(strings.len() + 1);
        pointers.extend(strings.iter().map(|string| string.as_ptr()));
        pointers.push(std::ptr::null());
        Self { strings, pointers }
    }

    pub fn strings(&self) -> &[CString] {
        &self.strings
    }

    /// Adds one string; the array may move, the strings' bytes do not.
    pub fn push(&mut self, string: CString) {
        if let Some(last) = self.pointers.last_mut() {
            *last = string.as_ptr();
        }
        self.pointers.push(std::ptr::null());
        self.strings.push(string);
    }
}

/// Replaces the program of this process. Returns only on failure.
pub fn execve(program: &CStr, args: &CStringArray, env: &CStringArray) -> io::Error {
    // SAFETY: all three are C strings or NULL-terminated arrays of C strings that outlive the
    // call: CStringArray owns what its pointers point to.
    unsafe {
        libc::execve(
            program.as_ptr(),
            args.pointers.as_ptr(),
            env.pointers.as_ptr(),
        )
    };
    io::Error::last_os_error()
}

/// Like [`execve`], of the file that the fd refers to.
pub fn execve_fd(program: BorrowedFd<'_>, args: &CStringArray, env: &CStringArray) -> io::Error {
    // SAFETY: as for execve; the empty path makes the kernel take the fd itself.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            args.pointers.as_ptr(),
            env.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Marks every fd from `first` on as closed by exec. Owners of those fds keep them.
///
/// # Errors
/// Those of close_range(2).
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: plain integers; with CLOEXEC nothing is closed now, so no owner loses its fd.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as u32,
            u32::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if result != -1 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Linux before 5.11 has no CLOEXEC, before 5.9 no such call.
    if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) {
        return Err(error);
    }
    for fd in first..=highest_fd() {
        // SAFETY: changes a flag of an fd and closes none; EBADF for a number without one.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Closes every fd from `first` on but the `kept` ones, which are in ascending order.
///
/// For a process that is about to execute another program and touches none of its other fds again,
/// whoever in it thinks to own them.
///
/// # Errors
/// Those of close_range(2).
pub fn close_all_but(first: RawFd, kept: &[RawFd]) -> io::Result<()> {
    let mut from = i64::from(first);
    let ends = kept.iter().map(|fd| i64::from(*fd) - 1);
    for end in ends.chain([i64::from(u32::MAX)]) {
        if end >= from {
            // SAFETY: plain integers; by contract no owner of these fds uses them again.
            let result =
                unsafe { libc::syscall(libc::SYS_close_range, from as u32, end as u32, 0) };
            if result == -1 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::ENOSYS) {
                    return Err(error);
                }
                for fd in from..=end.min(i64::from(highest_fd())) {
                    // SAFETY: by contract no owner of this fd uses it again.
                    unsafe { libc::close(fd as RawFd) };
                }
            }
        }
        from = from.max(end + 2);
    }
    Ok(())
}

/// The highest number that an fd may have, without close_range(2): the hard limit, or the kernel's
/// default of fs.nr_open where that is more, for the limit may have been lowered since. Not from
/// /proc/self/fd: at this point it may be an image's.
fn highest_fd() -> RawFd {
    const NR_OPEN: RawFd = 1 << 20;
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct lives over the call.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    match RawFd::try_from(limit.rlim_max) {
        Ok(hard) if result == 0 => hard.max(NR_OPEN),
        _ => NR_OPEN,
    }
}

/// Clears the close-on-exec flag of an fd that the caller of the program passed down by number.
///
/// # Errors
/// EBADF when there is no such fd.
pub fn keep_over_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl with integers changes one flag of one fd and cannot invalidate it.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, flags & !libc::FD_CLOEXEC) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Puts the signal dispositions and the mask back to what a program expects at its start: Rust
/// ignores SIGPIPE, a foreground `run` blocks what it forwards, and both outlive exec.
///
/// # Errors
/// None that a correct kernel gives.
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        // glibc keeps 32 and 33 for itself and refuses them; nothing here changes those.
        if matches!(signal, libc::SIGKILL | libc::SIGSTOP | 32 | 33) {
            continue;
        }
        // SAFETY: a zeroed sigaction is SIG_DFL with no flags; the old one is not asked for.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a live sigaction; NULL for the old one is allowed.
        if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } == -1 {
            return Err(io::Error::last_os_error());
        }
        if action.sa_sigaction != libc::SIG_DFL {
            action.sa_sigaction = libc::SIG_DFL;
            action.sa_flags = 0;
            // SAFETY: as above.
            if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    // SAFETY: a zeroed sigset_t is the empty set on Linux.
    let empty: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live; NULL for the old one is allowed.
    if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()) } == -1
    {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the signals that ask a process to end do so even for the init of a pid namespace, whom the
/// kernel shields from those that it does not handle. Until exec, which resets handlers.
///
/// # Errors
/// Those of sigaction(2).
pub fn end_on_signals() -> io::Result<()> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: _exit(2) is async-signal-safe.
        unsafe { libc::_exit(128 + signal) }
    }
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: a zeroed sigaction is SIG_DFL with no flags and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = end as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the pointer is to a live sigaction, and its handler calls _exit alone.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
