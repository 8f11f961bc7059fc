//! What openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS) does, one component at a time, for kernels
//! before 5.6 and sandboxes that hide the call.
//!
//! Every directory on the way is held open: ".." goes back to the one that was come from, so neither a
//! symlink nor a directory moved meanwhile leads out of the root (CVE-2021-30465). Symlinks are read
//! and walked as text: the kernel follows none.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// The kernel's own limit for one look-up.
const MAX_LINKS: u32 = 40;

const HANDLE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens `path`, relative to the root and never above it.
pub fn open(
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: OFlags,
    follows_links: bool,
) -> Result<OwnedFd, Errno> {
    let keeps_last_link = flags.contains(OFlags::NOFOLLOW);
    let root = rustix::fs::openat(root, c".", HANDLE | OFlags::DIRECTORY, Mode::empty())?;
    // The way from the root to here; the root itself stays.
    let mut way = vec![root];
    let mut left: VecDeque<CString> = components(path.to_bytes())?;
    let mut links = 0;
    while let Some(name) = left.pop_front() {
        let here = way.last().ok_or(Errno::NOENT)?;
        if matches!(name.to_bytes(), b"." | b"..") {
            check_directory(here)?;
            if name.to_bytes() == b".." && way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let found = rustix::fs::openat(here, &name, HANDLE, Mode::empty())?;
        let stat = rustix::fs::fstat(&found)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink
            || (left.is_empty() && keeps_last_link)
        {
            way.push(found);
            continue;
        }
        links += 1;
        if !follows_links || links > MAX_LINKS || is_magic(&found)? {
            return Err(Errno::LOOP);
        }
        let target = rustix::fs::readlinkat(&found, c"", Vec::new())?;
        if target.to_bytes().first() == Some(&b'/') {
            way.truncate(1);
        }
        for name in components(target.to_bytes())?.into_iter().rev() {
            left.push_front(name);
        }
    }
    let found = way.pop().ok_or(Errno::NOENT)?;
    reopen(found, flags)
}

fn components(path: &[u8]) -> Result<VecDeque<CString>, Errno> {
    let mut all: VecDeque<CString> = path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
        .map(|name| CString::new(name).map_err(|_| Errno::INVAL))
        .collect::<Result<_, _>>()?;
    // "a/" is a directory.
    if path.ends_with(b"/") {
        all.push_back(c".".to_owned());
    }
    Ok(all)
}

fn check_directory(found: &OwnedFd) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(found)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(()),
        _ => Err(Errno::NOTDIR),
    }
}

/// Links of procfs that lead to more than their text.
fn is_magic(link: &OwnedFd) -> Result<bool, Errno> {
    let parent_is_proc = rustix::fs::fstatfs(link)?.f_type == rustix::fs::PROC_SUPER_MAGIC;
    // "self" and "thread-self" are of one kind with the others to statfs; their text is relative.
    Ok(parent_is_proc
        && rustix::fs::readlinkat(link, c"", Vec::new())?
            .to_bytes()
            .first()
            .is_none_or(|first| !first.is_ascii_digit()))
}

/// A handle for what was asked: opened for use by its entry in the runtime's own /proc.
fn reopen(found: OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    if flags.contains(OFlags::DIRECTORY) {
        check_directory(&found)?;
    }
    if flags.contains(OFlags::PATH) {
        return Ok(found);
    }
    let proc = rustix::fs::open(
        c"/proc/self/fd",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if rustix::fs::fstatfs(&proc)?.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Err(Errno::XDEV);
    }
    let name = CString::new(found.as_raw_fd().to_string()).map_err(|_| Errno::INVAL)?;
    rustix::fs::openat(
        &proc,
        &name,
        flags.difference(OFlags::NOFOLLOW) | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    /// A root with links of every kind, and what lies beside it.
    fn tree() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/secret"), "").unwrap();
        fs::write(root.join("a/file"), "").unwrap();
        for (target, link) in [
            ("/a", "absolute"),
            ("../../../outside", "up"),
            ("a/../../..", "wandering"),
            ("loop", "loop"),
            ("nowhere", "dangling"),
            ("a/file", "to-file"),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, fd)
    }

    fn inode(fd: &OwnedFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    #[test]
    fn agrees_with_openat2() {
        use rustix::fs::ResolveFlags;
        let (dir, root) = tree();
        for path in [
            c".",
            c"a",
            c"a/b",
            c"a/b/..",
            c"a/b/../..",
            c"../a",
            c"absolute/b",
            c"up",
            c"wandering",
            c"wandering/a/file",
            c"loop",
            c"dangling",
            c"to-file",
            c"to-file/",
            c"a/file/x",
            c"a//b/",
            c"absolute/../a/file",
            c"missing/..",
        ] {
            for (extra, follows) in [
                (ResolveFlags::empty(), true),
                (ResolveFlags::NO_SYMLINKS, false),
            ] {
                for flags in [
                    OFlags::PATH,
                    OFlags::PATH | OFlags::NOFOLLOW,
                    OFlags::RDONLY,
                ] {
                    let flags = flags | OFlags::CLOEXEC;
                    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | extra;
                    let want = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve);
                    let have = open(root.as_fd(), path, flags, follows);
                    assert_eq!(
                        have.as_ref().map(inode),
                        want.as_ref().map(inode),
                        "{path:?} {flags:?} {extra:?}"
                    );
                }
            }
        }
        let outside = fs::metadata(dir.path().join("outside")).unwrap().ino();
        let up = open(root.as_fd(), c"up", OFlags::PATH, true);
        assert!(up.map_or(true, |fd| inode(&fd) != outside));
    }

    #[test]
    fn magic_links_are_not_followed() {
        let proc = rustix::fs::open(c"/proc", OFlags::PATH, Mode::empty()).unwrap();
        let opened = open(proc.as_fd(), c"self/root", OFlags::PATH, true);
        assert_eq!(opened.map(|fd| inode(&fd)), Err(Errno::LOOP));
        assert!(open(proc.as_fd(), c"self/status", OFlags::RDONLY, true).is_ok());
    }
}
