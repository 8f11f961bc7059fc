//! Owns every path resolution inside a layer being unpacked. An entry's parent is opened by the
//! kernel with openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS), so symlinks in it mean what they
//! would mean to a process chrooted there, and nothing outside can be reached; the last component
//! is then used with that descriptor and never followed.
//!
//! (containerd CVE-2021-32760, CVE-2025-47290; "zip slip".)

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::unpack::tar::show;

const DEPTH_MAX: usize = 512;
const SYMLINK_HOPS_MAX: usize = 40;
const CACHE_MAX: usize = 128;
const IMPLICIT_MAX: usize = 1 << 16;

/// An entry's path: relative, without `.`, `..` or doubled slashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CleanPath(Vec<u8>);

impl CleanPath {
    /// Cleans lexically. A path that would climb above the root is refused: no tool writes one.
    pub(crate) fn parse(path: &[u8]) -> Result<Self> {
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    if parts.pop().is_none() {
                        return Err(refuse(path, "it climbs out of the layer"));
                    }
                }
                part if part.len() > 255 => {
                    return Err(refuse(path, "a component is longer than 255 bytes"));
                }
                part => parts.push(part),
            }
        }
        if parts.len() > DEPTH_MAX {
            return Err(refuse(path, "it is too deep"));
        }
        Ok(CleanPath(parts.join(&b'/')))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Parent and last component.
    pub(crate) fn split(&self) -> (&[u8], &[u8]) {
        split(&self.0)
    }
}

pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

pub(crate) fn refuse(path: &[u8], why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, "entry", show(path)).because(why.into())
}

/// A failed system call on an entry. What a hostile layer can provoke is the layer's fault.
pub(crate) fn failed(call: &'static str, path: &[u8], errno: Errno) -> Error {
    match errno {
        Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG | Errno::NOTDIR | Errno::ISDIR => {
            Error::new(ErrorKind::Corrupt, call, show(path)).because(std::io::Error::from(errno))
        }
        _ => Error::io(call, show(path), errno),
    }
}

/// The directory a layer is unpacked into.
pub(crate) struct Tree {
    root: Arc<OwnedFd>,
    cache: HashMap<Vec<u8>, Arc<OwnedFd>>,
    /// Directories made because an entry needed them, not (yet) named by one.
    implicit: BTreeSet<Vec<u8>>,
    /// Inodes made.
    pub(crate) inodes: u64,
    /// Something was replaced, so that running sums do not hold.
    pub(crate) replaced: bool,
}

impl Tree {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Tree {
            root: Arc::new(root),
            cache: HashMap::new(),
            implicit: BTreeSet::new(),
            inodes: 1,
            replaced: false,
        }
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// An entry names this directory: it is implicit no longer.
    pub(crate) fn is_explicit(&mut self, path: &[u8]) {
        self.implicit.remove(path);
    }

    pub(crate) fn implicit(&self) -> &BTreeSet<Vec<u8>> {
        &self.implicit
    }

    /// Opens a directory of the tree, `None` if there is none.
    pub(crate) fn lookup(&self, path: &[u8]) -> Result<Option<Arc<OwnedFd>>> {
        if path.is_empty() {
            return Ok(Some(Arc::clone(&self.root)));
        }
        if let Some(found) = self.cache.get(path) {
            return Ok(Some(Arc::clone(found)));
        }
        match self.open(path) {
            Ok(fd) => Ok(Some(Arc::new(fd))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(failed("openat2", path, errno)),
        }
    }

    fn open(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        loop {
            let opened = fs::openat2(
                &*self.root,
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            // A rename or mount anywhere on the system may interrupt the walk (openat2(2)).
            if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
                return opened;
            }
        }
    }

    /// Opens the directory `path`, making what is missing.
    pub(crate) fn directory(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>> {
        self.directory_after(path, 0)
    }

    fn directory_after(&mut self, path: &[u8], hops: usize) -> Result<Arc<OwnedFd>> {
        if path.is_empty() {
            return Ok(Arc::clone(&self.root));
        }
        if let Some(found) = self.cache.get(path) {
            return Ok(Arc::clone(found));
        }
        let fd = match self.open(path) {
            Ok(fd) => Arc::new(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_directory(path, hops)?,
            Err(errno) => return Err(failed("openat2", path, errno)),
        };
        if self.cache.len() >= CACHE_MAX {
            self.cache.clear();
        }
        self.cache.insert(path.to_vec(), Arc::clone(&fd));
        Ok(fd)
    }

    fn make_directory(&mut self, path: &[u8], hops: usize) -> Result<Arc<OwnedFd>> {
        let (parent_path, name) = split(path);
        let parent = self.directory_after(parent_path, hops)?;
        match fs::mkdirat(&*parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                self.note_implicit(path)?;
                return self.open_below(&parent, name, path).map(Arc::new);
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("mkdir", path, errno)),
        }
        let stat = fs::statat(&*parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("stat", path, errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink if hops < SYMLINK_HOPS_MAX => {
                // Dangling here; the target may well exist in a layer below.
                let target = fs::readlinkat(&*parent, name, Vec::new())
                    .map_err(|errno| failed("readlink", path, errno))?;
                let resolved = resolve_link(parent_path, target.as_bytes());
                self.directory_after(&resolved, hops + 1)
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                self.replace_whiteout(&parent, name, path)?;
                self.note_implicit(path)?;
                self.open_below(&parent, name, path).map(Arc::new)
            }
            _ => Err(refuse(path, "it is used as a directory and is none")),
        }
    }

    fn note_implicit(&mut self, path: &[u8]) -> Result<()> {
        self.inodes += 1;
        if self.implicit.len() >= IMPLICIT_MAX {
            return Err(Error::new(ErrorKind::Unsupported, "unpack", show(path))
                .because("too many directories that no entry names"));
        }
        self.implicit.insert(path.to_vec());
        Ok(())
    }

    /// A whiteout followed by a directory of the same name: the directory hides what is below.
    pub(crate) fn replace_whiteout(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        path: &[u8],
    ) -> Result<()> {
        fs::unlinkat(parent, name, AtFlags::empty())
            .map_err(|errno| failed("unlink", path, errno))?;
        self.replaced = true;
        fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
            .map_err(|errno| failed("mkdir", path, errno))?;
        let fd = self.open_below(parent, name, path)?;
        set_opaque(&fd, path)
    }

    /// Opens an existing directory by its parent, for reading.
    pub(crate) fn open_below(
        &self,
        parent: impl AsFd,
        name: &[u8],
        path: &[u8],
    ) -> Result<OwnedFd> {
        fs::openat(
            parent,
            name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| failed("open", path, errno))
    }

    /// Removes what stands where an entry is to be made.
    pub(crate) fn clear_place(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        self.replaced = true;
        // A cached descriptor may be of something below it, or reached through it.
        self.cache.clear();
        match fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(failed("unlink", path, errno)),
        }
        let below = [path, b"/"].concat();
        self.implicit
            .retain(|one| one != path && !one.starts_with(&below));
        crate::gc::delete_at(parent.as_fd(), name, parent.as_fd())
            .map_err(|error| Error::io("remove", show(path), error))
    }
}

/// Where a link found in `parent` leads, as a path below the root; `..` stops at the root.
pub(crate) fn resolve_link(parent: &[u8], target: &[u8]) -> Vec<u8> {
    let start: &[u8] = if target.starts_with(b"/") {
        b""
    } else {
        parent
    };
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in start
        .split(|b| *b == b'/')
        .chain(target.split(|b| *b == b'/'))
    {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// Marks a directory so that overlayfs shows nothing of it from the layers below.
pub(crate) fn set_opaque(directory: &OwnedFd, path: &[u8]) -> Result<()> {
    fs::fsetxattr(
        directory,
        c"trusted.overlay.opaque",
        b"y",
        fs::XattrFlags::empty(),
    )
    .map_err(|errno| failed("setxattr trusted.overlay.opaque", path, errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_path_table() {
        for (path, wanted) in [
            (&b"a/b"[..], Some(&b"a/b"[..])),
            (b"./a//b/", Some(b"a/b")),
            (b"/a", Some(b"a")),
            (b"a/../b", Some(b"b")),
            (b"./", Some(b"")),
            (b"/", Some(b"")),
            (b"a/b/../..", Some(b"")),
            (b"..", None),
            (b"../a", None),
            (b"/../a", None),
            (b"a/../../b", None),
        ] {
            let found = CleanPath::parse(path);
            assert_eq!(
                found.as_ref().ok().map(CleanPath::bytes),
                wanted,
                "{}",
                show(path)
            );
        }
        assert!(CleanPath::parse(&[b'x'; 256]).is_err());
        assert!(CleanPath::parse(&b"d/".repeat(600)).is_err());
    }

    #[test]
    fn resolve_link_stays_in_root() {
        for (parent, target, wanted) in [
            (&b""[..], &b"usr/lib"[..], &b"usr/lib"[..]),
            (b"a/b", b"../c", b"a/c"),
            (b"a", b"/x/./y", b"x/y"),
            (b"a", b"../../../../etc", b"etc"),
            (b"a", b"", b"a"),
        ] {
            assert_eq!(resolve_link(parent, target), wanted);
        }
    }
}
