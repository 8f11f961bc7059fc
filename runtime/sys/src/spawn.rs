//! Starting a child program from a small supervisor: one `posix_spawn`, nothing inherited by
//! accident.
//!
//! Owns: the argument vectors for the duration of the call. Never waits for the child: the caller
//! is the reaper. glibc implements `posix_spawn` by `clone(CLONE_VM | CLONE_VFORK)`, so that the
//! cost does not depend on the size of the caller and no page of it is copied.

use std::ffi::{CString, c_char, c_int, c_short, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
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

/// Descriptors as a child is to get them: no source is the target of another.
struct Lifted {
    pairs: Vec<(RawFd, RawFd)>,
    _copies: Vec<OwnedFd>,
}

impl Spawn<'_> {
    /// A source that lies among the targets would be overwritten by an earlier dup2 of the list:
    /// such sources are first lifted above all targets.
    fn lift(&self) -> io::Result<Lifted> {
        let targets = self.fds.iter().map(|(_, target)| *target);
        let highest = targets.max().unwrap_or(2);
        let mut copies = Vec::new();
        let mut pairs = Vec::with_capacity(self.fds.len());
        for (source, target) in self.fds {
            let raw = if source.as_raw_fd() <= highest {
                let copy = rustix::io::fcntl_dupfd_cloexec(source, highest + 1)?;
                let raw = copy.as_raw_fd();
                copies.push(copy);
                raw
            } else {
                source.as_raw_fd()
            };
            pairs.push((raw, *target));
        }
        Ok(Lifted {
            pairs,
            _copies: copies,
        })
    }

    /// Starts the child and gives its pid. The pid stays the child's until the caller reaps it.
    pub fn run(&self) -> io::Result<i32> {
        let mut actions = FileActions::new()?;
        let lifted = self.lift()?;
        for (source, target) in &lifted.pairs {
            // SAFETY: `actions` is initialised; the numbers are only stored.
            check(unsafe {
                libc::posix_spawn_file_actions_adddup2(&mut actions.0, *source, *target)
            })?;
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

    /// Like `run`, but the new process is a child of the caller's parent (CLONE_PARENT), who reaps
    /// it and gets the caller's own exit signal for it.
    pub fn run_for_parent(&self) -> io::Result<i32> {
        let lifted = self.lift()?;
        let argv = pointers(self.args);
        let envp = pointers(self.env);
        let mut child = Child {
            program: self.program.as_ptr(),
            argv: argv.as_ptr().cast(),
            envp: envp.as_ptr().cast(),
            pairs: &lifted.pairs,
            cwd: self.cwd.map_or(ptr::null(), |cwd| cwd.as_ptr()),
            new_session: self.new_session,
            new_group: self.new_group,
            error: 0,
        };
        // Its own mapping, of which only the pages in use cost anything.
        let mut stack = vec![0u128; STACK / size_of::<u128>()];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT;
        // SAFETY: the stack is aligned, its end is what a downward growing stack begins with, and
        // CLONE_VFORK suspends us until the child has executed a program or ended: `child`, the
        // stack and all that they point to outlive its use of them. It runs `become_program`
        // alone, which takes no lock and allocates nothing.
        let pid = unsafe {
            libc::clone(
                become_program,
                stack.as_mut_ptr().add(stack.len()).cast(),
                flags,
                (&raw mut child).cast(),
            )
        };
        match (pid, child.error) {
            (-1, _) => Err(io::Error::last_os_error()),
            (pid, 0) => Ok(pid),
            (_, error) => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

const STACK: usize = 64 * 1024;

/// What the child of `run_for_parent` needs, all of it made before the clone.
struct Child<'a> {
    program: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    pairs: &'a [(RawFd, RawFd)],
    cwd: *const c_char,
    new_session: bool,
    new_group: bool,
    /// Left for the parent, whose memory this is.
    error: i32,
}

extern "C" fn become_program(child: *mut c_void) -> c_int {
    // SAFETY: the one caller passes its `Child`, and is suspended until we have exec'd or ended.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    child.error = child.prepare_and_execute();
    crate::clone::exit_now(127)
}

impl Child<'_> {
    /// Returns only on failure, with errno.
    fn prepare_and_execute(&self) -> i32 {
        let errno = || {
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)
        };
        // SAFETY: setsid takes nothing and touches no memory.
        if self.new_session && unsafe { libc::setsid() } == -1 {
            return errno();
        }
        // SAFETY: plain integers: ourselves, and a group of our own number.
        if self.new_group && unsafe { libc::setpgid(0, 0) } == -1 {
            return errno();
        }
        for (source, target) in self.pairs {
            // SAFETY: plain integers; the descriptor table is the child's own copy.
            if unsafe { libc::dup2(*source, *target) } == -1 {
                return errno();
            }
        }
        // SAFETY: null, or a C string that outlives the call.
        if !self.cwd.is_null() && unsafe { libc::chdir(self.cwd) } == -1 {
            return errno();
        }
        if let Err(e) = crate::exec::reset_signals() {
            return e.raw_os_error().unwrap_or(libc::EIO);
        }
        // SAFETY: a C string and two arrays of them that end in null; the parent keeps them.
        unsafe { libc::execve(self.program, self.argv, self.envp) };
        errno()
    }
}

/// Forks a process that runs `work` and ends with its code; gives its pid. It gets SIGKILL when
/// the caller dies, keeps the standard streams and the descriptors `kept` (ascending), and no
/// other.
///
/// # Errors
/// Those of clone(2); and refused where the caller has more than one thread, for the copy of a
/// lock that another one holds would stay locked for ever.
pub fn fork_companion(kept: &[BorrowedFd<'_>], work: impl FnOnce() -> i32) -> io::Result<i32> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    if !status.lines().any(|line| line == "Threads:\t1") {
        return Err(io::Error::other("the process has more than one thread"));
    }
    let parent = rustix::process::getpid();
    // SAFETY: no CLONE_VM and no stack: the child goes on on its copy of this one. There is no
    // other thread, as just read, and nobody but this thread could have made one since.
    let pid = unsafe { libc::fork() };
    if pid == -1 {
        return Err(io::Error::last_os_error());
    }
    if pid > 0 {
        return Ok(pid);
    }
    // SAFETY: two plain integers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // It may have died before the line above.
    if rustix::process::getppid() != Some(parent) {
        crate::clone::exit_now(1);
    }
    let kept: Vec<RawFd> = kept.iter().map(|fd| fd.as_raw_fd()).collect();
    if crate::exec::close_all_but(3, &kept).is_err() {
        crate::clone::exit_now(1);
    }
    let code = work();
    crate::clone::exit_now(code)
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
