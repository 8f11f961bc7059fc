//! "tmpcopyup": what a directory of the image holds is copied into the tmpfs that will cover it.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};

use super::resolve::at;
use crate::error::{Error, Result};

/// Trees deeper than this are refused: the recursion holds two fds for each level.
const MAX_DEPTH: u32 = 64;

/// Copies the content of `from` into the root of the mount `to`, which keeps the owner and mode that
/// its options give it, as in runc. `from` may be an O_PATH handle.
pub fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    let open = |fd: &OwnedFd| {
        rustix::fs::openat(
            fd,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| Error::system("openat", "tmpcopyup", error))
    };
    let (from, to) = (open(from)?, open(to)?);
    directory(&from, &to, 0)
}

fn own(file: BorrowedFd<'_>, stat: &Stat) -> Result<()> {
    let fail = |error| Error::system("fchown", "tmpcopyup", error);
    rustix::fs::fchown(
        file,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
    .map_err(fail)?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(fail)
}

fn directory(from: &OwnedFd, to: &OwnedFd, depth: u32) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::invalid("tmpcopyup: directory tree is too deep"));
    }
    let list = Dir::read_from(from).map_err(|e| Error::system("getdents", "tmpcopyup", e))?;
    for entry in list {
        let entry = entry.map_err(|e| Error::system("getdents", "tmpcopyup", e))?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name, depth)?;
        }
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: u32) -> Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| at("fstatat", name, error))?;
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))
                .map_err(|error| at("mkdirat", name, error))?;
            let open = |base: &OwnedFd| {
                rustix::fs::openat(base, name, read | OFlags::DIRECTORY, Mode::empty())
                    .map_err(|error| at("openat", name, error))
            };
            let (from, to) = (open(from)?, open(to)?);
            own(to.as_fd(), &stat)?;
            directory(&from, &to, depth + 1)
        }
        FileType::RegularFile => {
            let source = rustix::fs::openat(from, name, read, Mode::empty())
                .map_err(|error| at("openat", name, error))?;
            let target = rustix::fs::openat(
                to,
                name,
                OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::from_raw_mode(0o600),
            )
            .map_err(|error| at("openat(O_CREAT)", name, error))?;
            let mut source = std::fs::File::from(source);
            let mut target = std::fs::File::from(target);
            std::io::copy(&mut source, &mut target)
                .map_err(|e| Error::system("copy", name.to_string_lossy(), e))?;
            own(target.as_fd(), &stat)
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new())
                .map_err(|error| at("readlinkat", name, error))?;
            rustix::fs::symlinkat(&link, to, name).map_err(|error| at("symlinkat", name, error))?;
            rustix::fs::chownat(
                to,
                name,
                Some(Uid::from_raw(stat.st_uid)),
                Some(Gid::from_raw(stat.st_gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(|error| at("fchownat", name, error))
        }
        // Sockets, fifos and devices of an image are nothing that a copy could keep alive.
        _ => Ok(()),
    }
}
