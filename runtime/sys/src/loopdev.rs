//! Loop devices: a regular file as a block device, given back by the kernel with its last user.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

/// How the file is used.
#[derive(Debug, Default, Clone, Copy)]
pub struct Options {
    pub read_only: bool,
    pub direct_io: bool,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The number of a device that is free now. Another process may take it first.
///
/// # Errors
/// Those of the ioctl on /dev/loop-control.
pub fn free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: this request takes no argument and touches no memory of ours.
    let number =
        check(unsafe { libc::ioctl(control.as_fd().as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
    Ok(number as u32)
}

/// Puts the file behind the device until the last user of the device (the caller's descriptor,
/// or a mount) is gone.
///
/// # Errors
/// EBUSY: another process has taken the device. Others of the ioctls.
pub fn attach(device: impl AsFd, file: impl AsFd, name: &[u8], options: Options) -> io::Result<()> {
    let device = device.as_fd().as_raw_fd();
    let file = file.as_fd().as_raw_fd();
    // SAFETY: integers and byte arrays, for which zero is valid.
    let mut config: Config = unsafe { std::mem::zeroed() };
    config.fd = file as u32;
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    if options.read_only {
        config.info.flags |= LO_FLAGS_READ_ONLY;
    }
    if options.direct_io {
        config.info.flags |= LO_FLAGS_DIRECT_IO;
    }
    // Only shown to people, with its final zero.
    let shown = name.len().min(63);
    config.info.file_name[..shown].copy_from_slice(&name[..shown]);
    // SAFETY: the kernel reads a loop_config, whose layout this is, that outlives the call.
    check(unsafe { libc::ioctl(device, LOOP_CONFIGURE as _, &raw const config) }).map(drop)
}
