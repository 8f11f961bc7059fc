//! Owns careful reading of files that somebody else may have put there: regular files only,
//! never more than a bound, without blocking on a FIFO or a device.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

/// Reads a regular file of at most `max` bytes.
pub fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    read_fd(rustix::fs::openat(CWD, path, flags, Mode::empty())?, max)
}

/// The same below a directory that stands for `/`: symbolic links, `..` and absolute links stay
/// within it (openat2, RESOLVE_IN_ROOT).
pub fn read_in_root(root: impl AsFd, path: &str, max: u64) -> io::Result<Vec<u8>> {
    // Opened as a path first, so that a device or a FIFO is recognised before it is opened.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    regular(&found)?;
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    read_fd(rustix::fs::openat(CWD, name, flags, Mode::empty())?, max)
}

fn regular(fd: &OwnedFd) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    if kind == FileType::RegularFile {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "not a regular file",
    ))
}

fn read_fd(fd: OwnedFd, max: u64) -> io::Result<Vec<u8>> {
    regular(&fd)?;
    let mut bytes = Vec::new();
    File::from(fd).take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        let text = format!("larger than {max} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_in_root_stays_inside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/real"), "inside").unwrap();
        std::os::unix::fs::symlink("/etc/real", dir.path().join("etc/absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../etc/real", dir.path().join("etc/up")).unwrap();
        let root = File::open(dir.path()).unwrap();
        for name in ["etc/absolute", "etc/up", "/etc/real"] {
            assert_eq!(read_in_root(&root, name, 100).unwrap(), b"inside", "{name}");
        }
        assert!(read_in_root(&root, "etc/passwd", 100).is_err());
    }

    #[test]
    fn large_files_devices_and_fifos_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big"), vec![0; 101]).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(CWD, dir.path().join("fifo"), FileType::Fifo, mode, 0).unwrap();
        let root = File::open(dir.path()).unwrap();
        for name in ["big", "fifo", "."] {
            assert!(read_in_root(&root, name, 100).is_err(), "{name}");
        }
        assert!(read_bounded(Path::new("/dev/zero"), 100).is_err());
    }
}
