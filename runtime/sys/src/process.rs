//! Per-process attributes that neither rustix nor nix wraps: scheduling class, processors, memory
//! policy, I/O priority, personality, session keyring, adopting an inherited fd.

use std::ffi::CStr;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// sched_setattr(2)'s argument, in the layout of the kernel's second version (56 bytes): kernels
/// before 5.3 take it too, as long as the utilization clamps are zero.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub util_min: u32,
    pub util_max: u32,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sets the calling thread's scheduling policy.
///
/// # Errors
/// Those of sched_setattr(2).
pub fn set_scheduler(attributes: &SchedulerAttributes) -> io::Result<()> {
    let mut attributes = *attributes;
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: the struct is live, in the kernel's layout, and carries its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attributes, 0) }).map(drop)
}

/// Lets the calling thread run on the processors whose bits are set. Bits beyond what the kernel was
/// built for are ignored, and a host may have more than the 1024 of libc's `cpu_set_t`.
///
/// # Errors
/// Those of sched_setaffinity(2).
pub fn set_affinity(cpus: &[libc::c_ulong]) -> io::Result<()> {
    // SAFETY: the mask is live for the call, and its length in bytes goes with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(cpus),
            cpus.as_ptr(),
        )
    };
    check(result).map(drop)
}

/// Sets the calling thread's NUMA memory policy: a mode with its flags, and the nodes' bits.
///
/// # Errors
/// Those of set_mempolicy(2).
pub fn set_memory_policy(mode: i32, nodes: &[libc::c_ulong]) -> io::Result<()> {
    let (mask, max_node) = if nodes.is_empty() {
        (std::ptr::null(), 0)
    } else {
        // The kernel looks at one bit less than it is told of (mm/mempolicy.c: get_nodes).
        (nodes.as_ptr(), size_of_val(nodes) * 8 + 1)
    };
    // SAFETY: the mask is null with a length of none, or live with at least as many bits as told.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, max_node) }).map(drop)
}

/// Sets the calling thread's I/O class and priority.
///
/// # Errors
/// Those of ioprio_set(2).
pub fn set_io_priority(class: u32, priority: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let value = (class << IOPRIO_CLASS_SHIFT) | priority;
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// Sets the execution domain.
///
/// # Errors
/// Those of personality(2).
pub fn set_personality(persona: u32) -> io::Result<()> {
    // SAFETY: a plain integer.
    let result = unsafe { libc::personality(libc::c_ulong::from(persona)) };
    check(libc::c_long::from(result)).map(drop)
}

/// A keyring's serial number.
#[derive(Debug, Clone, Copy)]
pub struct Keyring(i32);

/// Joins a new session keyring of that name, so that the container does not see the caller's keys.
///
/// # Errors
/// ENOSYS where the kernel has no keyrings, and those of keyctl(2).
pub fn join_session_keyring(name: &CStr) -> io::Result<Keyring> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: the name is a C string.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    check(result).map(|serial| Keyring(serial as i32))
}

/// Sets who may do what with a keyring: four bytes of KEY_*_VIEW and so on.
///
/// # Errors
/// Those of keyctl(2).
pub fn set_keyring_permissions(keyring: Keyring, permissions: u32) -> io::Result<()> {
    const KEYCTL_SETPERM: i32 = 5;
    // SAFETY: plain integers.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring.0, permissions) };
    check(result).map(drop)
}

/// Takes a copy of an fd that this process inherited by number, close-on-exec set.
///
/// # Errors
/// EBADF when there is no such fd.
pub fn duplicate_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with integers; it makes a new fd and leaves the given one alone.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this fd for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes `fd` the inherited number `target`, as dup3(2) without close-on-exec.
///
/// # Errors
/// Those of dup2(2).
pub fn place_fd(fd: &OwnedFd, target: RawFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: plain integers; callers only pass stdio numbers, which no OwnedFd here owns.
    let result = unsafe { libc::dup2(fd.as_raw_fd(), target) };
    check(libc::c_long::from(result)).map(drop)
}

/// Leaves namespaces for new ones.
///
/// # Errors
/// Those of unshare(2), and EINVAL for anything but CLONE_NEW* flags: unsharing the fd table or
/// the address space would break what owners of fds rely on.
pub fn unshare(namespaces: u32) -> io::Result<()> {
    const NEW_TIME: u32 = 0x80;
    const NAMESPACES: u32 = NEW_TIME
        | (libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET) as u32;
    if namespaces & !NAMESPACES != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: a plain integer; only namespaces change, none of which memory safety rests on.
    check(unsafe { libc::syscall(libc::SYS_unshare, namespaces) }).map(drop)
}
