//! Starting a child program from a small supervisor: one `posix_spawn`, nothing inherited by
//! accident.
//!
//! Owns: the argument vectors for the duration of the call. Never waits for the child: the caller
//! is the reaper. glibc implements `posix_spawn` by `clone(CLONE_VM | CLONE_VFORK)`, so that the
//! cost does not depend on the size of the caller and no page of it is copied.

use std::ffi::{CString, c_char, c_int, c_short};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

/// A child to start. The signal mask of the child is empty and every disposition is the default
/// one, whatever the caller blocks or ignores.
pub struct Spawn<'a> {
    /// Absolute path: no search.
    pub program: &'a CString,
    pub args: &'a [CString],
    /// The whole environment as `KEY=value`.
    pub env: &'a [CString],
    /// What the child sees under which number. Everything else must be close-on-exec.
    pub fds: &'a [(BorrowedFd<'a>, i32)],
    pub new_session: bool,
    /// Leads a process group of its own, so that `kill_group` reaches what it starts.
    pub new_group: bool,
    pub cwd: Option<&'a CString>,
}

fn check(rc: c_int) -> io::Result<()> {
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(rc))
    }
}

struct FileActions(libc::posix_spawn_file_actions_t);

impl FileActions {
    fn new() -> io::Result<Self> {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the call initialises what it is given; it is used only when it succeeded.
        check(unsafe { libc::posix_spawn_file_actions_init(raw.as_mut_ptr()) })?;
        // SAFETY: initialised by the successful call above.
        Ok(FileActions(unsafe { raw.assume_init() }))
    }
}

impl Drop for FileActions {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, destroyed once.
        unsafe { libc::posix_spawn_file_actions_destroy(&mut self.0) };
    }
}

struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    fn new(new_session: bool, new_group: bool) -> io::Result<Self> {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: the call initialises what it is given; it is used only when it succeeded.
        check(unsafe { libc::posix_spawnattr_init(raw.as_mut_ptr()) })?;
        // SAFETY: initialised by the successful call above.
        let mut attr = Attributes(unsafe { raw.assume_init() });
        let mut flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        if new_session {
            flags |= c_int::from(libc::POSIX_SPAWN_SETSID);
        }
        if new_group {
            // The group's number in fresh attributes is 0: the child's own pid.
            flags |= libc::POSIX_SPAWN_SETPGROUP;
        }
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both calls initialise the set that they are given and cannot fail.
        unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigfillset(all.as_mut_ptr());
        }
        // SAFETY: `attr` and both sets are initialised and outlive the calls.
        unsafe {
            check(libc::posix_spawnattr_setflags(
                &mut attr.0,
                flags as c_short,
            ))?;
            check(libc::posix_spawnattr_setsigmask(&mut attr.0, none.as_ptr()))?;
            check(libc::posix_spawnattr_setsigdefault(
                &mut attr.0,
                all.as_ptr(),
            ))?;
        }
        Ok(attr)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, destroyed once.
        unsafe { libc::posix_spawnattr_destroy(&mut self.0) };
    }
}

fn pointers(strings: &[CString]) -> Vec<*mut c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr().cast_mut())
        .chain([ptr::null_mut()])
        .collect()
}

impl Spawn<'_> {
    /// Starts the child and gives its pid. The pid stays the child's until the caller reaps it.
    pub fn run(&self) -> io::Result<i32> {
        let highest = self
            .fds
            .iter()
            .map(|(_, target)| *target)
            .max()
            .unwrap_or(2);
        let mut actions = FileActions::new()?;
        // A source that lies among the targets would be overwritten by an earlier dup2 of the
        // list: such sources are first lifted above all targets.
        let mut lifted: Vec<OwnedFd> = Vec::new();
        for (source, target) in self.fds {
            let raw = if source.as_raw_fd() <= highest {
                let copy = rustix::io::fcntl_dupfd_cloexec(source, highest + 1)?;
                let raw = copy.as_raw_fd();
                lifted.push(copy);
                raw
            } else {
                source.as_raw_fd()
            };
            // SAFETY: `actions` is initialised; the numbers are only stored.
            check(unsafe { libc::posix_spawn_file_actions_adddup2(&mut actions.0, raw, *target) })?;
        }
        if let Some(cwd) = self.cwd {
            // SAFETY: `actions` is initialised; glibc copies the path.
            check(unsafe {
                libc::posix_spawn_file_actions_addchdir_np(&mut actions.0, cwd.as_ptr())
            })?;
        }
        let attributes = Attributes::new(self.new_session, self.new_group)?;
        let argv = pointers(self.args);
        let envp = pointers(self.env);
        let mut pid = 0;
        // SAFETY: every pointer is to a live, initialised object; both vectors end in null and
        // their strings are borrowed from `self` until after the call; glibc does not write to
        // them.
        check(unsafe {
            libc::posix_spawn(
                &mut pid,
                self.program.as_ptr(),
                &actions.0,
                &attributes.0,
                argv.as_ptr(),
                envp.as_ptr(),
            )
        })?;
        Ok(pid)
    }
}

/// Sends any signal by number, real-time ones included, to one process. Group and broadcast
/// addresses (pid 0 and below) are refused.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: takes two integers and touches no memory of ours.
    let rc = unsafe { libc::kill(pid, signal) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends a signal to every process of the group that `leader` was started to lead. The caller has
/// not reaped the leader, so the number is its own.
pub fn kill_group(leader: i32, signal: i32) -> io::Result<()> {
    if leader <= 1 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: takes two integers and touches no memory of ours.
    let rc = unsafe { libc::kill(-leader, signal) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes the descriptor with this number, inherited from the program that started us, once.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    use std::sync::atomic::{AtomicU64, Ordering};
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    if !(0..64).contains(&number)
        || TAKEN.fetch_or(1 << number, Ordering::SeqCst) >> number & 1 == 1
    {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: fcntl on a number is harmless; it only tells whether the descriptor is open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, as just checked, and handed out once (TAKEN). It was open before this program
    // started by the caller's contract, so no other owner exists in it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes glibc give memory back early: allocations of 64 KiB and more are their own mappings,
/// and the top of the heap is trimmed at 64 KiB. For a process that is one of hundreds and idle.
pub fn keep_heap_small() {
    // SAFETY: mallopt takes two integers; with one thread there is no concurrent allocation.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 16 * 1024);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn child_sees_exactly_the_descriptors_given_and_an_empty_signal_mask() {
        crate::exec::close_on_exec_from(3).unwrap();
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let program = CString::new("/bin/sh").unwrap();
        let script = "ls /proc/self/fd | tr '\\n' ' '; grep SigBlk /proc/self/status; pwd";
        let args = ["sh", "-c", script].map(|s| CString::new(s).unwrap());
        let env = [CString::new("PATH=/usr/bin:/bin").unwrap()];
        let cwd = CString::new("/proc").unwrap();
        let pid = Spawn {
            program: &program,
            args: &args,
            env: &env,
            fds: &[(null.as_fd(), 0), (write.as_fd(), 1), (null.as_fd(), 2)],
            new_session: true,
            new_group: false,
            cwd: Some(&cwd),
        }
        .run()
        .unwrap();
        drop(write);
        let mut out = String::new();
        std::fs::File::from(read).read_to_string(&mut out).unwrap();
        let pid = rustix::process::Pid::from_raw(pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        // `ls` itself holds 3 while it reads the directory.
        assert_eq!(out, "0 1 2 3 SigBlk:\t0000000000000000\n/proc\n");
    }

    #[test]
    fn a_group_of_its_own_is_killed_with_what_it_started() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let program = CString::new("/bin/sh").unwrap();
        let args = ["sh", "-c", "sleep 600 & sleep 600"].map(|s| CString::new(s).unwrap());
        let env = [CString::new("PATH=/usr/bin:/bin").unwrap()];
        let null = std::fs::File::open("/dev/null").unwrap();
        let pid = Spawn {
            program: &program,
            args: &args,
            env: &env,
            fds: &[(null.as_fd(), 0), (write.as_fd(), 1), (null.as_fd(), 2)],
            new_session: false,
            new_group: true,
            cwd: None,
        }
        .run()
        .unwrap();
        drop(write);
        kill_group(pid, 9).unwrap();
        // The pipe ends with the last process that holds it.
        let mut out = String::new();
        std::fs::File::from(read).read_to_string(&mut out).unwrap();
        let pid = rustix::process::Pid::from_raw(pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        assert!(kill_group(1, 0).is_err() && kill_group(-7, 0).is_err());
    }

    #[test]
    fn kill_refuses_group_addresses() {
        assert!(kill(0, 0).is_err());
        assert!(kill(-1, 0).is_err());
        assert!(kill(std::process::id() as i32, 0).is_ok());
    }

    #[test]
    fn inherited_gives_a_number_once() {
        assert!(inherited(63).is_err());
        assert!(inherited(-1).is_err());
    }
}
