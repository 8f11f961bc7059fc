//! Paths inside the container's root, by file descriptor only.
//!
//! Every look-up is one openat2(2) with RESOLVE_IN_ROOT: symlinks of the image cannot leave the
//! root, and a racing rename gives EAGAIN, not an escape (CVE-2021-30465, CVE-2024-45310). Without
//! that call `walk.rs` goes the same way step by step.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::walk;
use crate::error::{Error, Result};

/// How often a look-up that raced with a rename is tried again.
const RACE_RETRIES: u32 = 128;

/// The kernel's own limit for one look-up.
const MAX_LINKS: u32 = 40;

/// What has to be at a mount target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetType {
    Directory,
    File,
}

/// The root of a container as a file descriptor.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn open_with(&self, path: &CStr, flags: OFlags, extra: ResolveFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | extra;
        let flags = flags | OFlags::CLOEXEC;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries < RACE_RETRIES => tries += 1,
                // Linux before 5.6, or a sandbox that hides the call.
                Err(Errno::NOSYS) => {
                    let links = !extra.contains(ResolveFlags::NO_SYMLINKS);
                    return walk::open(self.fd.as_fd(), path, flags, links);
                }
                result => return result,
            }
        }
    }

    /// A handle on what the path names, symlinks followed inside the root.
    pub fn find(&self, path: &CStr) -> Result<OwnedFd, Errno> {
        self.open_with(path, OFlags::PATH, ResolveFlags::empty())
    }

    /// Like [`Root::find`], but no component may be a symlink.
    pub fn find_without_symlinks(&self, path: &CStr) -> Result<OwnedFd, Errno> {
        self.open_with(path, OFlags::PATH, ResolveFlags::NO_SYMLINKS)
    }

    /// Opens a file of the container for use.
    pub fn open(&self, path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_with(path, flags, ResolveFlags::empty())
    }

    /// The directory, made with its parents where missing.
    pub fn make_directory(&self, path: &CStr, mode: u32) -> Result<OwnedFd> {
        self.make_directory_by(path, mode, 0)
    }

    fn make_directory_by(&self, path: &CStr, mode: u32, links: u32) -> Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            found => return found.map_err(|error| at("openat2", path, error)),
        }
        // The parent first, which mostly exists: two look-ups for the usual missing leaf.
        let (parent_path, name) = split(path)?;
        let parent = self.make_directory_by(&parent_path, mode, links)?;
        match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(mode)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                if let Some(target) = dangling(&parent, &parent_path, &name, links)? {
                    return self.make_directory_by(&target, mode, links + 1);
                }
            }
            Err(error) => return Err(at("mkdirat", path, error)),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, &name, flags, Mode::empty())
            .map_err(|error| at("openat(O_NOFOLLOW)", path, error))
    }

    /// A place to mount on: what is there, or what had to be made.
    pub fn mount_target(&self, path: &CStr, want: TargetType) -> Result<OwnedFd> {
        match want {
            TargetType::Directory => self.make_directory(path, 0o755),
            TargetType::File => self.make_file_by(path, 0),
        }
    }

    fn make_file_by(&self, path: &CStr, links: u32) -> Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            found => return found.map_err(|error| at("openat2", path, error)),
        }
        let (parent_path, name) = split(path)?;
        let parent = self.make_directory_by(&parent_path, 0o755, links)?;
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o644)) {
            Ok(_) => {}
            Err(Errno::EXIST) => {
                if let Some(target) = dangling(&parent, &parent_path, &name, links)? {
                    return self.make_file_by(&target, links + 1);
                }
            }
            Err(error) => return Err(at("openat(O_CREAT)", path, error)),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, &name, flags, Mode::empty())
            .map_err(|error| at("openat(O_NOFOLLOW)", path, error))
    }
}

/// The kernel's own files for this process and its namespaces, where a mount namespace that was
/// joined may have put others over them (CVE-2019-19921, CVE-2025-52881).
#[derive(Debug)]
pub struct Proc {
    fd: OwnedFd,
}

impl Proc {
    const SUPER_MAGIC: u64 = 0x9fa0;
    /// Of the root of every procfs, and of nothing else on one.
    const ROOT_INODE: u64 = 1;

    pub fn open() -> Result<Self> {
        let fail = |call: &'static str| move |error: Errno| Error::system(call, "/proc", error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(c"/proc", flags, Mode::empty()).map_err(fail("open"))?;
        let stat = rustix::fs::fstat(&fd).map_err(fail("fstat"))?;
        let fs = rustix::fs::fstatfs(&fd).map_err(fail("fstatfs"))?;
        if fs.f_type as u64 != Self::SUPER_MAGIC || stat.st_ino != Self::ROOT_INODE {
            return Err(Error::invalid("/proc is not a procfs"));
        }
        Ok(Self { fd })
    }

    /// A file of the procfs itself: through no mount on it.
    pub fn file(&self, path: &str, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        let none = Mode::empty();
        match rustix::fs::openat2(&self.fd, path, flags, none, resolve) {
            // Linux before 5.6, or a sandbox that hides the call.
            Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(&self.fd, path, flags, none)
                .and_then(|file| match rustix::fs::fstatfs(&file)?.f_type as u64 {
                    Self::SUPER_MAGIC => Ok(file),
                    _ => Err(Errno::XDEV),
                }),
            opened => opened,
        }
        .map_err(|error| Error::system("open", format!("/proc/{path}"), error))
    }
}

/// Where a symlink points that leads nowhere yet, as a path from the root; None for anything else.
///
/// Images have them: an /etc/resolv.conf that points into an empty /run. What is missing is made
/// inside the root, wherever the link claims to go, for each look-up starts there again.
fn dangling(
    parent: &OwnedFd,
    parent_path: &CStr,
    name: &CStr,
    links: u32,
) -> Result<Option<CString>> {
    let link = match rustix::fs::readlinkat(parent, name, Vec::new()) {
        Ok(link) => link,
        Err(Errno::INVAL | Errno::NOENT) => return Ok(None),
        Err(error) => return Err(at("readlinkat", name, error)),
    };
    if links >= MAX_LINKS {
        return Err(at("readlinkat", name, Errno::LOOP));
    }
    let path = match link.as_bytes() {
        [b'/', ..] => crate::plan::relative("symlink", link.as_bytes())?,
        relative => CString::new([parent_path.to_bytes(), b"/", relative].concat())
            .map_err(|_| Error::invalid("path contains a NUL byte"))?,
    };
    Ok(Some(path))
}

/// The parent and the last component; "." is the parent of a bare name.
fn split(path: &CStr) -> Result<(CString, CString)> {
    let bytes = path.to_bytes();
    let end = bytes
        .iter()
        .rposition(|byte| *byte != b'/')
        .map_or(0, |last| last + 1);
    let slash = bytes[..end].iter().rposition(|byte| *byte == b'/');
    let (parent, name) = match slash {
        Some(slash) => (&bytes[..slash], &bytes[slash + 1..end]),
        None => (&b"."[..], &bytes[..end]),
    };
    // ".." is nothing that can be made: the look-up of its parent has failed already.
    if name.is_empty() || name == b"." || name == b".." {
        return Err(at("mkdirat", path, Errno::NOENT));
    }
    let own =
        |part: &[u8]| CString::new(part).map_err(|_| Error::invalid("path contains a NUL byte"));
    Ok((
        own(if parent.is_empty() { b"." } else { parent })?,
        own(name)?,
    ))
}

/// An error about a path of the container.
pub fn at(call: &'static str, path: &CStr, error: Errno) -> Error {
    Error::system(call, format!("/{}", path.to_string_lossy()), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root(directory: &std::path::Path) -> Root {
        Root::new(
            rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap(),
        )
    }

    #[test]
    fn symlinks_never_leave_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        symlink(outside.path(), inside.path().join("absolute")).unwrap();
        symlink("../../../../../../..", inside.path().join("relative")).unwrap();
        symlink("/made/by/link", inside.path().join("dangling")).unwrap();
        symlink("../../run/conf", inside.path().join("conf")).unwrap();
        symlink("loop", inside.path().join("loop")).unwrap();
        let root = root(inside.path());
        root.make_directory(c"absolute/x", 0o755).unwrap();
        root.make_directory(c"relative/up", 0o755).unwrap();
        root.make_directory(c"dangling", 0o755).unwrap();
        root.mount_target(c"conf", TargetType::File).unwrap();
        for made in ["up", "made/by/link", "run"] {
            assert!(inside.path().join(made).is_dir(), "{made}");
        }
        assert!(inside.path().join("run/conf").is_file());
        assert!(root.mount_target(c"loop", TargetType::File).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(!std::path::Path::new("/made").exists());
    }

    #[test]
    fn files_of_proc() {
        let proc = Proc::open().unwrap();
        proc.file("thread-self/attr/exec", OFlags::RDONLY).unwrap();
        proc.file("sys/kernel/hostname", OFlags::RDONLY).unwrap();
        assert!(proc.file("self/exe", OFlags::PATH).is_err());
        assert!(proc.file("self/root/etc/passwd", OFlags::PATH).is_err());
        assert!(proc.file("../etc/passwd", OFlags::PATH).is_err());
    }

    #[test]
    fn split_table() {
        for (path, parent, name) in [
            (c"a", c".", c"a"),
            (c"a/b/c", c"a/b", c"c"),
            (c"a//b/", c"a/", c"b"),
        ] {
            assert_eq!(split(path).unwrap(), (parent.to_owned(), name.to_owned()));
        }
        assert!(split(c"a/..").is_err() && split(c".").is_err() && split(c"/").is_err());
    }

    #[test]
    fn targets_are_made_with_their_parents() {
        let directory = tempfile::tempdir().unwrap();
        let root = root(directory.path());
        root.mount_target(c"a/b/file", TargetType::File).unwrap();
        root.mount_target(c"a/c", TargetType::Directory).unwrap();
        root.mount_target(c"a/b/file", TargetType::File).unwrap();
        assert!(directory.path().join("a/b/file").is_file());
        assert!(directory.path().join("a/c").is_dir());
    }

    #[test]
    fn strict_look_up_refuses_symlinks() {
        let directory = tempfile::tempdir().unwrap();
        symlink(".", directory.path().join("proc")).unwrap();
        let root = root(directory.path());
        assert_eq!(
            root.find_without_symlinks(c"proc").unwrap_err(),
            Errno::LOOP
        );
    }
}
