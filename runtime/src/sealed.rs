//! The runtime's own binary, out of the container's reach (CVE-2019-5736).
//!
//! /proc/self/exe of a process in a container is this binary until exec, and an entrypoint of
//! "#!/proc/self/exe" executes it inside. Opened for writing later, that link would overwrite the
//! host's file. So the commands that enter a container first execute themselves again through a
//! detached read-only mount of the binary: the link then leads through that mount, and writing
//! fails with EROFS. Where mounting is not allowed, a sealed memory copy serves.

use std::ffi::CString;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use coracle_sys::exec::{CStringArray, execve_fd};
use coracle_sys::mount::{Attributes, set_attributes};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::error::{Error, Result};

const EXE: &std::ffi::CStr = c"/proc/self/exe";

/// Makes sure that this process runs from a binary that cannot be written; may execute itself
/// again, so it comes before anything else. Where `coracle_sys::entry` could do it, it is done.
///
/// # Errors
/// Neither way is open.
pub fn ensure() -> Result<()> {
    let exe = rustix::fs::open(EXE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::system("open", "/proc/self/exe", error))?;
    if is_sealed(&exe)? {
        // Nor does a process of the container look into this one while it is inside. Without
        // root's rights that has to wait: the id maps of a child that cannot be dumped are out of
        // its own parent's reach.
        return if rustix::process::geteuid().is_root() {
            crate::init::hide()
        } else {
            Ok(())
        };
    }
    let safe = match read_only_mount() {
        Ok(mount) => mount,
        Err(_) => memory_copy(exe)?,
    };
    let strings = |words: Vec<Vec<u8>>| {
        words
            .into_iter()
            .filter_map(|word| CString::new(word).ok())
            .collect::<Vec<_>>()
    };
    let args = strings(std::env::args_os().map(OsStringExt::into_vec).collect());
    let env = strings(
        std::env::vars_os()
            .map(|(name, value)| [name.into_vec(), b"=".to_vec(), value.into_vec()].concat())
            .collect(),
    );
    let error = execve_fd(
        safe.as_fd(),
        &CStringArray::new(args),
        &CStringArray::new(env),
    );
    Err(Error::system("execveat", "/proc/self/exe", error))
}

/// A file on a read-only mount, or a memory file that is sealed against writing.
fn is_sealed(exe: &OwnedFd) -> Result<bool> {
    let stat = rustix::fs::fstatvfs(exe)
        .map_err(|error| Error::system("fstatvfs", "/proc/self/exe", error))?;
    if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Ok(true);
    }
    Ok(rustix::fs::fcntl_get_seals(exe).is_ok_and(|seals| seals.contains(SealFlags::WRITE)))
}

/// What this process runs from, for `--debug`; `ensure` has been called.
pub fn way() -> &'static str {
    let flags = rustix::fs::statvfs(EXE).map(|stat| stat.f_flag);
    match flags.is_ok_and(|flags| flags.contains(rustix::fs::StatVfsMountFlags::RDONLY)) {
        true => "a read-only mount of /proc/self/exe",
        false => "a sealed memory copy of /proc/self/exe",
    }
}

fn read_only_mount() -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, EXE, flags)?;
    let attributes = Attributes {
        set: libc::MOUNT_ATTR_RDONLY,
        propagation: libc::MS_PRIVATE,
        ..Attributes::default()
    };
    set_attributes(mount.as_fd(), &attributes, false)?;
    Ok(mount)
}

fn memory_copy(exe: OwnedFd) -> Result<OwnedFd> {
    let fail = |error| Error::system("copy the runtime's binary", "", error);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create(c"coracle", flags)
        .map_err(|error| Error::system("memfd_create", "", error))?;
    let mut file = std::fs::File::from(memory);
    std::io::copy(&mut std::fs::File::from(exe).by_ref(), &mut file).map_err(fail)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)
        .map_err(|error| Error::system("fcntl(F_ADD_SEALS)", "", error))?;
    Ok(OwnedFd::from(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process of a container finds behind /proc/<pid>/exe: a file on a mount that is in no
    /// mount namespace since its descriptor was closed by execve(2). With all capabilities of the
    /// host it is still not to be made writable: the kernel changes, clones and binds only mounts
    /// of the caller's namespace (`check_mnt`), so that this needs no filesystem of its own.
    #[test]
    fn detached_mount_cannot_be_made_writable() {
        if !rustix::process::geteuid().is_root() {
            use std::io::Write as _;
            let test = "detached_mount_cannot_be_made_writable";
            let _ = write!(std::io::stdout(), "\nSKIP {test}: needs root\n");
            return;
        }
        let mount = read_only_mount().unwrap();
        let exe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&mount));
        let held = rustix::fs::open(&exe, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        drop(mount);
        let exe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held));

        let writable = Attributes {
            clear: libc::MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        };
        let refused = Some(libc::EINVAL);
        let cleared = set_attributes(held.as_fd(), &writable, false).unwrap_err();
        assert_eq!(cleared.raw_os_error(), refused);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let cloned = open_tree(CWD, &exe, flags).unwrap_err();
        assert_eq!(Some(cloned.raw_os_error()), refused);
        let flags = rustix::mount::MountFlags::empty();
        let remounted = rustix::mount::mount_remount(&exe, flags, "").unwrap_err();
        assert_eq!(Some(remounted.raw_os_error()), refused);
        let access = rustix::fs::Access::WRITE_OK;
        let opened = rustix::fs::accessat(CWD, &exe, access, rustix::fs::AtFlags::empty());
        assert_eq!(opened, Err(rustix::io::Errno::ROFS));
    }
}
