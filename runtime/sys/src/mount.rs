//! mount_setattr(2), which rustix does not wrap.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Attributes to set and clear, a propagation (MS_SHARED and so on, or 0), an id mapping.
#[derive(Debug, Default, Clone, Copy)]
pub struct Attributes<'a> {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    /// Goes with MOUNT_ATTR_IDMAP, which is set here.
    pub idmap: Option<BorrowedFd<'a>>,
}

/// Changes the mount whose root `mount` is, and with `recursive` all mounts below it.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: &Attributes<'_>,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    let mut raw = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    if let Some(userns) = attributes.idmap {
        raw.attr_set |= libc::MOUNT_ATTR_IDMAP;
        raw.userns_fd = userns.as_raw_fd() as u64;
    }
    let empty: &CStr = c"";
    // SAFETY: the path is a C string, raw lives over the call and its size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            empty.as_ptr(),
            flags,
            &raw mut raw,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
