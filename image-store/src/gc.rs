//! Owns deleting: a directory that is no longer wanted is renamed into `gc/` (one rename, works on
//! a full disk) and deleted by a thread of its own. Trees may hold anything a container could
//! make, so no symlink is followed, no recursion is used, and depth costs no descriptors.

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::api::Usage;
use crate::error::{Error, Result};

/// Directories deeper than this are first moved up; descriptors held are bounded by it.
const DEPTH_MAX: usize = 64;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Deletes `name` in `parent`, whatever it is. Absent is fine. `trash` is a directory on the same
/// file system in which deep subtrees may be put meanwhile.
pub(crate) fn delete_at(
    parent: BorrowedFd<'_>,
    name: &[u8],
    trash: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut moved: Vec<CString> = Vec::new();
    delete_tree(parent, &CString::new(name)?, trash, &mut moved)?;
    while let Some(name) = moved.pop() {
        delete_tree(trash, &name, trash, &mut moved)?;
    }
    Ok(())
}

struct Level {
    fd: OwnedFd,
    entries: Dir,
    name: CString,
}

fn open_level(parent: BorrowedFd<'_>, name: CString) -> io::Result<Option<Level>> {
    let opened = fs::openat(parent, &name, DIRECTORY, Mode::empty());
    let fd = match opened {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let entries = Dir::read_from(&fd)?;
    Ok(Some(Level { fd, entries, name }))
}

fn delete_tree(
    parent: BorrowedFd<'_>,
    name: &CString,
    trash: BorrowedFd<'_>,
    moved: &mut Vec<CString>,
) -> io::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let Some(top) = open_level(parent, name.clone())? else {
        return Ok(());
    };
    let mut levels = vec![top];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.entries.read() else {
            let done = levels.pop().map(|level| level.name).unwrap_or_default();
            let above = levels.last().map_or(parent, |level| level.fd.as_fd());
            match fs::unlinkat(above, &done, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno.into()),
            }
        };
        let name = entry?.file_name().to_owned();
        if name.as_bytes() == b"." || name.as_bytes() == b".." {
            continue;
        }
        match fs::unlinkat(&level.fd, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if levels.len() < DEPTH_MAX {
            let above = levels.last().map_or(parent, |level| level.fd.as_fd());
            if let Some(level) = open_level(above, name)? {
                levels.push(level);
            }
        } else if let Some(level) = levels.last() {
            moved.push(move_up(&level.fd, &name, trash)?);
        }
    }
    Ok(())
}

fn move_up(from: &OwnedFd, name: &CString, trash: BorrowedFd<'_>) -> io::Result<CString> {
    loop {
        let away = CString::new(format!(".deep-{}-{}", std::process::id(), next_number()))?;
        match fs::renameat_with(from, name, trash, &away, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(away),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// Bytes allocated and inodes of a tree, hard links counted once. What vanishes meanwhile is not
/// counted; what is deeper than a few hundred levels neither.
pub(crate) fn measure(root: BorrowedFd<'_>) -> io::Result<Usage> {
    const MEASURE_DEPTH_MAX: usize = 400;
    let mut seen = HashSet::new();
    let stat = fs::fstat(root)?;
    let mut usage = Usage {
        bytes: crate::unpack::apply::allocated(&stat),
        inodes: 1,
    };
    let mut levels = vec![Dir::read_from(root)?];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.read() else {
            levels.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        let stat = match fs::statat(level.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_directory && stat.st_nlink > 1 && !seen.insert((stat.st_dev, stat.st_ino)) {
            continue;
        }
        usage.bytes += crate::unpack::apply::allocated(&stat);
        usage.inodes += 1;
        if is_directory && levels.len() < MEASURE_DEPTH_MAX {
            let above = levels.last().map(Dir::fd).transpose()?;
            let opened = above.map(|fd| fs::openat(fd, name, DIRECTORY, Mode::empty()));
            match opened {
                Some(Ok(fd)) => levels.push(Dir::read_from(&fd)?),
                Some(Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) | None => {}
                Some(Err(errno)) => return Err(errno.into()),
            }
        }
    }
    Ok(usage)
}

/// The background deleter of one store.
pub(crate) struct Collector {
    gc: PathBuf,
    prefix: String,
    work: mpsc::Sender<CString>,
    pending: Arc<(Mutex<usize>, Condvar)>,
}

impl Collector {
    /// Starts deleting whatever `gc` holds already.
    pub(crate) fn start(gc: &Path, prefix: &str) -> Result<Self> {
        let io_error =
            |call| move |error: io::Error| Error::io(call, gc.display().to_string(), error);
        let fd = fs::open(gc, DIRECTORY, Mode::empty())
            .map_err(|errno| io_error("open")(errno.into()))?;
        let (work, queue) = mpsc::channel::<CString>();
        let pending = Arc::new((Mutex::new(0), Condvar::new()));
        let collector = Collector {
            gc: gc.to_owned(),
            prefix: prefix.to_owned(),
            work,
            pending: Arc::clone(&pending),
        };
        let entries = Dir::read_from(&fd).map_err(|errno| io_error("list")(errno.into()))?;
        for entry in entries {
            let entry = entry.map_err(|errno| io_error("list")(errno.into()))?;
            let name = entry.file_name().to_owned();
            if name.as_bytes() != b"." && name.as_bytes() != b".." {
                collector.enqueue(name);
            }
        }
        std::thread::Builder::new()
            .name("image-gc".to_owned())
            .spawn(move || {
                for name in queue {
                    if let Err(error) = delete_at(fd.as_fd(), name.as_bytes(), fd.as_fd()) {
                        // Found again when the store is opened next.
                        tracing::warn!(name = %name.to_string_lossy(), %error, "cannot delete");
                    }
                    let (count, changed) = &*pending;
                    *count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                    changed.notify_all();
                }
            })
            .map_err(io_error("spawn thread for"))?;
        Ok(collector)
    }

    fn enqueue(&self, name: CString) {
        let (count, _) = &*self.pending;
        *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        // The thread lives as long as this sender.
        let _ = self.work.send(name);
    }

    /// Renames a directory away. When that fails it is deleted in place.
    pub(crate) fn discard(&self, path: &Path) -> Result<()> {
        let name = format!("{}{}", self.prefix, next_number());
        match std::fs::rename(path, self.gc.join(&name)) {
            Ok(()) => {
                // Digits and dashes only.
                self.enqueue(CString::new(name).unwrap_or_default());
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(_) => delete_path(path),
        }
    }

    /// Waits until everything discarded so far is gone.
    pub(crate) fn settle(&self) {
        let (count, changed) = &*self.pending;
        let mut left = count.lock().unwrap_or_else(PoisonError::into_inner);
        while *left > 0 {
            left = changed.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Deletes a path now. Absent is fine.
pub(crate) fn delete_path(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let failed = |error: io::Error| Error::io("delete", path.display().to_string(), error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    let parent =
        fs::open(parent, DIRECTORY, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    delete_at(parent.as_fd(), name.as_bytes(), parent.as_fd()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delete_path_removes_deep_trees_and_follows_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        let keep = dir.path().join("keep");
        std::fs::create_dir(&keep).expect("mkdir");
        std::fs::write(keep.join("file"), "x").expect("write");
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).expect("mkdir");
        let mut fd = fs::open(&tree, DIRECTORY, Mode::empty()).expect("open");
        // Longer than PATH_MAX as a path.
        for _ in 0..3000 {
            fs::mkdirat(&fd, "d", Mode::from_raw_mode(0o700)).expect("mkdir");
            fs::symlinkat(&keep, &fd, "link").expect("symlink");
            fd = fs::openat(&fd, "d", DIRECTORY, Mode::empty()).expect("open");
        }
        drop(fd);
        delete_path(&tree).expect("delete");
        assert!(!tree.exists());
        assert!(keep.join("file").exists());
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("list").collect();
        assert_eq!(left.len(), 1);
        delete_path(&tree).expect("absent is fine");
    }

    #[test]
    fn measure_counts_hard_links_once() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("a"), vec![1; 8192]).expect("write");
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).expect("link");
        std::fs::create_dir(dir.path().join("d")).expect("mkdir");
        let fd = fs::open(dir.path(), DIRECTORY, Mode::empty()).expect("open");
        let usage = measure(fd.as_fd()).expect("measure");
        assert_eq!(usage.inodes, 3);
        assert!(usage.bytes >= 8192);
    }

    #[test]
    fn collector_empties_what_it_finds_and_what_it_is_given() {
        let dir = tempfile::tempdir().expect("temp dir");
        let gc = dir.path().join("gc");
        std::fs::create_dir_all(gc.join("old/x")).expect("mkdir");
        let collector = Collector::start(&gc, "t-").expect("start");
        let unwanted = dir.path().join("unwanted");
        std::fs::create_dir_all(unwanted.join("y")).expect("mkdir");
        collector.discard(&unwanted).expect("discard");
        collector.discard(&unwanted).expect("absent is fine");
        collector.settle();
        assert_eq!(std::fs::read_dir(&gc).expect("list").count(), 0);
        assert!(!unwanted.exists());
    }
}
