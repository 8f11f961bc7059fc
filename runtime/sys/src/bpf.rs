//! bpf(2), as far as a cgroup's device filter needs it: load, query, attach and detach programs of
//! type CGROUP_DEVICE.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const PROG_QUERY: libc::c_long = 16;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 1 << 1;
const F_REPLACE: u32 = 1 << 2;

/// No helper of the kernel is called, so that any licence will do.
const LICENSE: &[u8] = b"Apache\0";

/// More programs than any manager attaches to one cgroup.
const QUERY_LIMIT: usize = 64;

#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

#[repr(C)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    // The kernel reads whole eight-byte units: no bytes are left to chance.
    padding: u32,
}

#[repr(C)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// # Safety
/// `T` is the repr(C) layout that the kernel expects for `command`, and every pointer in it is
/// valid for the access that the command makes.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: attr is valid for reads and writes of the size passed; the rest is the caller's
    // promise above.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            std::mem::size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

/// The caller keeps the descriptor open until its call is over: hence the reference.
fn raw(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

/// Loads a CGROUP_DEVICE program; each element is a `struct bpf_insn` in memory order.
///
/// # Errors
/// The kernel's: EPERM without CAP_BPF or CAP_SYS_ADMIN, EINVAL from the verifier.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = Load {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: Load is the head of the PROG_LOAD layout (later members count as zero); both
    // pointers are to live slices, the license is NUL-terminated.
    let fd = unsafe { bpf(PROG_LOAD, &mut attr)? };
    // SAFETY: a successful PROG_LOAD returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The ids of the device programs attached to a cgroup itself, without its ancestors'.
///
/// # Errors
/// The kernel's: EBADF if `cgroup` is no cgroup2 directory, ENOSPC for more than 64 programs.
pub fn device_programs(cgroup: impl AsFd) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; QUERY_LIMIT];
    let mut attr = Query {
        target_fd: raw(&cgroup),
        attach_type: CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: QUERY_LIMIT as u32,
        padding: 0,
    };
    // SAFETY: Query is the head of the PROG_QUERY layout; prog_ids has room for prog_cnt ids.
    unsafe { bpf(PROG_QUERY, &mut attr)? };
    let count = (attr.prog_cnt as usize).min(QUERY_LIMIT);
    Ok(ids[..count].to_vec())
}

/// Opens a loaded program by id.
///
/// # Errors
/// The kernel's: ENOENT if the program is gone.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = ById {
        id,
        next_id: 0,
        open_flags: 0,
    };
    // SAFETY: ById is the PROG_GET_FD_BY_ID layout and holds no pointers.
    let fd = unsafe { bpf(PROG_GET_FD_BY_ID, &mut attr)? };
    // SAFETY: a successful PROG_GET_FD_BY_ID returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program beside those there are, or in place of `replace`.
///
/// # Errors
/// The kernel's: EPERM if an ancestor or another program forbids more, ENOENT if `replace` is not
/// attached.
pub fn attach_device_program(
    cgroup: impl AsFd,
    program: impl AsFd,
    replace: Option<&OwnedFd>,
) -> io::Result<()> {
    let mut attr = Attach {
        target_fd: raw(&cgroup),
        attach_bpf_fd: raw(&program),
        attach_type: CGROUP_DEVICE,
        attach_flags: F_ALLOW_MULTI | if replace.is_some() { F_REPLACE } else { 0 },
        replace_bpf_fd: replace.map_or(0, raw),
    };
    // SAFETY: Attach is the PROG_ATTACH layout and holds no pointers.
    unsafe { bpf(PROG_ATTACH, &mut attr) }.map(|_| ())
}

/// Detaches a device program.
///
/// # Errors
/// The kernel's: ENOENT if it is not attached.
pub fn detach_device_program(cgroup: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr = Attach {
        target_fd: raw(&cgroup),
        attach_bpf_fd: raw(&program),
        attach_type: CGROUP_DEVICE,
        attach_flags: 0,
        replace_bpf_fd: 0,
    };
    // SAFETY: Attach is the PROG_DETACH layout and holds no pointers.
    unsafe { bpf(PROG_DETACH, &mut attr) }.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_program_is_refused_by_the_kernel() {
        // No exit instruction. EPERM without privilege, EINVAL with.
        assert!(load_device_program(&[0]).is_err());
    }
}
