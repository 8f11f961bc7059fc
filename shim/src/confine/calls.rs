//! seccomp: the system calls that a serving shim makes, and no other.
//!
//! A call that is not listed fails with EPERM and is written to the kernel's audit log
//! (SECCOMP_FILTER_FLAG_LOG). It is not answered by death: a path of the shim that nobody has
//! measured would else take the supervision of every container of the pod with it, and to a
//! hijacked shim a refused call is worth as little as a deadly one.
//! Owns: the list. It was measured by tracing the test-suites, and holds besides what glibc,
//! std and older kernels use in the place of a call in it; a test counts it.

use std::collections::BTreeMap;

use coracle_sys::seccomp::{SockFilter, set_filter};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Listed by number; more than this many are too many to reason about.
#[cfg(test)]
pub const AT_MOST: usize = 60;

/// What an argument must be like.
enum Argument {
    Is(u8, u64),
    /// None of these bits.
    Lacks(u8, u64),
}

use Argument::{Is, Lacks};

/// The call, and what one of must hold of its arguments; nothing: they may be any.
type Rule = (i64, &'static [Argument]);

const ANY: &[Argument] = &[];
const NO_CODE: &[Argument] = &[Lacks(2, libc::PROT_EXEC as u64)];
const UNIX: &[Argument] = &[Is(0, libc::AF_UNIX as u64)];
const NO_SETID: u64 = (libc::S_ISUID | libc::S_ISGID) as u64;
const IOCTLS: &[Argument] = &[
    Is(1, libc::FIONREAD),
    Is(1, libc::FIONBIO),
    Is(1, libc::TIOCSWINSZ),
];

#[rustfmt::skip]
const COMMON: &[Rule] = &[
    // Memory. Nothing that was not code at the start becomes code.
    (libc::SYS_brk, ANY), (libc::SYS_mmap, NO_CODE), (libc::SYS_munmap, ANY),
    (libc::SYS_mremap, ANY), (libc::SYS_memfd_create, ANY),
    // Descriptors.
    (libc::SYS_read, ANY), (libc::SYS_write, ANY), (libc::SYS_pread64, ANY),
    (libc::SYS_close, ANY), (libc::SYS_fcntl, ANY), (libc::SYS_ioctl, IOCTLS),
    (libc::SYS_pipe2, ANY), (libc::SYS_splice, ANY), (libc::SYS_ftruncate, ANY),
    // Files.
    (libc::SYS_openat, ANY), (libc::SYS_statx, ANY), (libc::SYS_newfstatat, ANY),
    (libc::SYS_fstat, ANY), (libc::SYS_getdents64, ANY), (libc::SYS_unlinkat, ANY),
    (libc::SYS_fchown, ANY), (libc::SYS_fchmod, &[Lacks(1, NO_SETID)]), (libc::SYS_umask, ANY),
    // Sockets: nothing but local ones.
    (libc::SYS_socket, UNIX), (libc::SYS_bind, ANY), (libc::SYS_listen, ANY),
    (libc::SYS_connect, ANY), (libc::SYS_accept4, ANY), (libc::SYS_sendmsg, ANY),
    (libc::SYS_recvmsg, ANY), (libc::SYS_sendto, ANY), (libc::SYS_recvfrom, ANY),
    (libc::SYS_getsockopt, ANY),
    // What wakes it, and what it waits for. The clocks are system calls where the vDSO has none.
    (libc::SYS_epoll_ctl, ANY), (libc::SYS_epoll_pwait, ANY), (libc::SYS_inotify_init1, ANY),
    (libc::SYS_inotify_add_watch, ANY), (libc::SYS_inotify_rm_watch, ANY),
    (libc::SYS_eventfd2, ANY), (libc::SYS_wait4, ANY), (libc::SYS_clock_nanosleep, ANY),
    (libc::SYS_clock_gettime, ANY), (libc::SYS_futex, ANY),
    // Signals, itself, the end. The kernel restarts a sleep that a SIGSTOP has cut by a call.
    (libc::SYS_kill, ANY), (libc::SYS_rt_sigprocmask, ANY), (libc::SYS_getpid, ANY),
    (libc::SYS_geteuid, ANY), (libc::SYS_uname, ANY), (libc::SYS_restart_syscall, ANY),
    (libc::SYS_sigaltstack, ANY), (libc::SYS_exit_group, ANY),
];

/// What libc calls by a name: newer architectures have the *at form alone.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const NAMES: &[Rule] = &[
    (libc::SYS_open, ANY), (libc::SYS_unlink, ANY), (libc::SYS_rename, ANY),
    (libc::SYS_mkdir, ANY), (libc::SYS_rmdir, ANY), (libc::SYS_chown, ANY),
    (libc::SYS_chmod, &[Lacks(1, NO_SETID)]), (libc::SYS_access, ANY), (libc::SYS_readlink, ANY),
];

#[cfg(not(target_arch = "x86_64"))]
#[rustfmt::skip]
const NAMES: &[Rule] = &[
    (libc::SYS_renameat, ANY), (libc::SYS_renameat2, ANY), (libc::SYS_mkdirat, ANY),
    (libc::SYS_fchownat, ANY), (libc::SYS_fchmodat, &[Lacks(2, NO_SETID)]),
    (libc::SYS_faccessat, ANY), (libc::SYS_readlinkat, ANY),
];

/// Makes the kernel refuse every other call of this thread, for good.
pub fn restrict() -> Result<String, String> {
    let failed = |e: &dyn std::fmt::Display| format!("no seccomp: {e}");
    let program = program().map_err(|e| failed(&e))?;
    let program: Vec<SockFilter> = program
        .into_iter()
        .map(|i| SockFilter {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect();
    let log = libc::SECCOMP_FILTER_FLAG_LOG as u32;
    match set_filter(&program, log) {
        // Linux before 4.14 has no such flag.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => set_filter(&program, 0),
        result => result,
    }
    .map_err(|e| failed(&e))?;
    Ok(format!("seccomp with {} calls", list().count()))
}

fn list() -> impl Iterator<Item = &'static Rule> {
    COMMON.iter().chain(NAMES)
}

fn condition(argument: &Argument) -> seccompiler::Result<SeccompRule> {
    let condition = match argument {
        Is(number, value) => SeccompCondition::new(*number, Width::Dword, Op::Eq, *value),
        Lacks(number, bits) => SeccompCondition::new(*number, Width::Dword, Op::MaskedEq(*bits), 0),
    };
    Ok(SeccompRule::new(vec![condition?])?)
}

fn program() -> seccompiler::Result<BpfProgram> {
    let mut rules = BTreeMap::new();
    for (number, arguments) in list() {
        let alternatives = arguments.iter().map(condition).collect::<Result<_, _>>()?;
        rules.insert(*number, alternatives);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        arch,
    )?;
    Ok(BpfProgram::try_from(filter)?)
}

#[cfg(test)]
pub fn numbers() -> Vec<i64> {
    list().map(|(number, _)| *number).collect()
}
