//! Owns making a tree out of tar entries: files, links, devices, whiteouts, and their metadata in
//! the order owner, xattrs, mode, times (chown clears setuid and security.capability), directory
//! times last. Resolves no path itself; `tree` does.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::api::Usage;
use crate::error::{Error, ErrorKind, Result};
use crate::unpack::tar::{Entry, Kind, TarError, TarReader, Time, show};
use crate::unpack::tree::{CleanPath, Tree, failed, refuse, set_opaque, split};
use crate::unpack::whiteout::{self, Marker};

/// More entries than any real layer; each costs an inode.
const ENTRIES_MAX: u64 = 8_000_000;

/// What unpacking a layer made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) entries: u64,
    /// Bytes allocated.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Directories that no entry names: their metadata is that of the layers below.
    pub(crate) implicit: Vec<Vec<u8>>,
    /// The layer says what its root directory looks like.
    pub(crate) has_root: bool,
    /// The layer hides everything below.
    pub(crate) opaque_root: bool,
}

/// Why applying stopped: the archive, or the file system.
pub(crate) enum Stop {
    Tar(TarError),
    Failed(Error),
}

impl From<TarError> for Stop {
    fn from(error: TarError) -> Self {
        Stop::Tar(error)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

pub(crate) struct Applier {
    tree: Tree,
    directory_times: HashMap<Vec<u8>, (Time, Time)>,
    entries: u64,
    bytes: u64,
    has_root: bool,
    opaque_root: bool,
}

impl Applier {
    /// Unpacks into the empty directory `root`.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Applier {
            tree: Tree::new(root),
            directory_times: HashMap::new(),
            entries: 0,
            bytes: 0,
            has_root: false,
            opaque_root: false,
        }
    }

    /// Applies every entry of the archive.
    pub(crate) fn apply<R: BufRead>(
        &mut self,
        reader: &mut TarReader<R>,
    ) -> std::result::Result<(), Stop> {
        while let Some(entry) = reader.next()? {
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                return Err(Error::new(ErrorKind::Unsupported, "unpack", "")
                    .because(format!("more than {ENTRIES_MAX} entries"))
                    .into());
            }
            self.entry(&entry, reader)?;
        }
        Ok(())
    }

    fn entry<R: BufRead>(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> std::result::Result<(), Stop> {
        let path = CleanPath::parse(&entry.path)?;
        if path.is_root() {
            return Ok(self.root_entry(entry)?);
        }
        let (parent_path, name) = path.split();
        for part in parent_path.split(|byte| *byte == b'/') {
            match whiteout::parse(part) {
                Marker::None => {}
                Marker::Ignore => return Ok(()),
                _ => return Err(refuse(&entry.path, "a whiteout used as a directory").into()),
            }
        }
        match whiteout::parse(name) {
            Marker::None => {}
            Marker::Ignore => return Ok(()),
            Marker::Invalid => return Err(refuse(&entry.path, "no valid whiteout name").into()),
            Marker::Hide(hidden) => return Ok(self.whiteout(parent_path, hidden)?),
            Marker::Opaque => return Ok(self.opaque(parent_path)?),
        }
        let parent = self.tree.directory(parent_path)?;
        match entry.kind {
            Kind::Directory => self.directory(&parent, name, &path, entry)?,
            Kind::File => self.file(&parent, name, entry, reader)?,
            Kind::Hardlink => self.hardlink(&parent, name, entry)?,
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(refuse(&entry.path, "a symlink to nothing").into());
                }
                self.make(&parent, name, &entry.path, "symlink", || {
                    fs::symlinkat(&entry.link[..], &parent, name)
                })?;
                self.special_metadata(&parent, name, entry)?;
            }
            Kind::Char | Kind::Block | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = fs::makedev(entry.device.0, entry.device.1);
                self.make(&parent, name, &entry.path, "mknod", || {
                    fs::mknodat(&parent, name, kind, Mode::from_raw_mode(0o600), device)
                })?;
                self.special_metadata(&parent, name, entry)?;
            }
        }
        Ok(())
    }

    /// Runs a call that makes `name`, clearing the place if it is taken.
    fn make<T>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        path: &[u8],
        call: &'static str,
        mut create: impl FnMut() -> rustix::io::Result<T>,
    ) -> Result<T> {
        self.tree.inodes += 1;
        match create() {
            Ok(made) => return Ok(made),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(call, path, errno)),
        }
        self.tree.clear_place(parent, name, path)?;
        create().map_err(|errno| failed(call, path, errno))
    }

    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Directory {
            return Err(refuse(
                &entry.path,
                "the root of a layer must be a directory",
            ));
        }
        self.has_root = true;
        let root = self.tree.open_below(self.tree.root(), b".", b"/")?;
        self.metadata(&root, entry)?;
        self.directory_times.insert(Vec::new(), times(entry));
        Ok(())
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        path: &CleanPath,
        entry: &Entry,
    ) -> Result<()> {
        match fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => self.tree.inodes += 1,
            Err(Errno::EXIST) => {
                let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|errno| failed("stat", path.bytes(), errno))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => {}
                    FileType::CharacterDevice if stat.st_rdev == 0 => {
                        self.tree.replace_whiteout(parent, name, path.bytes())?;
                    }
                    _ => {
                        self.tree.clear_place(parent, name, path.bytes())?;
                        fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))
                            .map_err(|errno| failed("mkdir", path.bytes(), errno))?;
                    }
                }
            }
            Err(errno) => return Err(failed("mkdir", path.bytes(), errno)),
        }
        let fd = self.tree.open_below(parent, name, path.bytes())?;
        self.tree.is_explicit(path.bytes());
        self.metadata(&fd, entry)?;
        self.directory_times
            .insert(path.bytes().to_vec(), times(entry));
        Ok(())
    }

    fn file<R: BufRead>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> std::result::Result<(), Stop> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.make(parent, name, &entry.path, "create", || {
            fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))
        })?;
        let mut file = std::fs::File::from(fd);
        let write = |error| Error::io("write", show(&entry.path), error);
        match &entry.sparse {
            None => loop {
                let piece = reader.data()?;
                if piece.is_empty() {
                    break;
                }
                file.write_all(piece).map_err(write)?;
                let length = piece.len();
                reader.consume(length);
            },
            Some(segments) => {
                file.set_len(entry.size).map_err(write)?;
                for segment in segments {
                    let mut offset = segment.offset;
                    let end = segment.offset + segment.length;
                    while offset < end {
                        let piece = reader.data()?;
                        let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
                        let length = piece.len().min(left);
                        if length == 0 {
                            return Err(refuse(&entry.path, "its sparse map is too long").into());
                        }
                        file.write_all_at(&piece[..length], offset).map_err(write)?;
                        reader.consume(length);
                        offset += length as u64;
                    }
                }
            }
        }
        let fd = OwnedFd::from(file);
        self.metadata(&fd, entry)?;
        let (atime, mtime) = times(entry);
        fs::futimens(&fd, &timestamps(atime, mtime))
            .map_err(|errno| failed("utimens", &entry.path, errno))?;
        let stat = fs::fstat(&fd).map_err(|errno| failed("fstat", &entry.path, errno))?;
        self.bytes += allocated(&stat);
        Ok(())
    }

    /// Owner, xattrs and mode of what is open.
    fn metadata(&self, fd: &OwnedFd, entry: &Entry) -> Result<()> {
        let path = &entry.path;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fs::fchown(fd, Some(uid), Some(gid)).map_err(|errno| failed("chown", path, errno))?;
        for (name, value) in entry.xattrs.iter().filter(|(name, _)| keeps_xattr(name)) {
            let set = fs::fsetxattr(fd, &name[..], value, XattrFlags::empty());
            xattr_outcome(set, name, path)?;
        }
        fs::fchmod(fd, Mode::from_raw_mode(entry.mode))
            .map_err(|errno| failed("chmod", path, errno))
    }

    /// Owner, xattrs, mode and times of what cannot be opened.
    fn special_metadata(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<()> {
        let path = &entry.path;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fs::chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| failed("chown", path, errno))?;
        if entry.xattrs.iter().any(|(name, _)| keeps_xattr(name)) {
            // No call takes a directory descriptor before setxattrat(2) of Linux 6.13; through
            // procfs only the one last component is walked, and l*xattr does not follow it.
            let mut place = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
            place.extend_from_slice(name);
            for (name, value) in entry.xattrs.iter().filter(|(name, _)| keeps_xattr(name)) {
                let set = fs::lsetxattr(&place[..], &name[..], value, XattrFlags::empty());
                xattr_outcome(set, name, path)?;
            }
        }
        if entry.kind != Kind::Symlink {
            // The place was made by us just now and is no symlink.
            fs::chmodat(
                parent,
                name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )
            .map_err(|errno| failed("chmod", path, errno))?;
        }
        let (atime, mtime) = times(entry);
        fs::utimensat(
            parent,
            name,
            &timestamps(atime, mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| failed("utimens", path, errno))?;
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("stat", path, errno))?;
        self.bytes += allocated(&stat);
        Ok(())
    }

    fn hardlink(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<()> {
        let target = CleanPath::parse(&entry.link)?;
        let (target_parent_path, target_name) = target.split();
        let missing = || {
            refuse(
                &entry.path,
                format!(
                    "it is a hard link to {}, which is not in this layer",
                    show(&entry.link)
                ),
            )
        };
        if target.is_root() {
            return Err(missing());
        }
        let target_parent = self.tree.lookup(target_parent_path)?.ok_or_else(missing)?;
        let link = || fs::linkat(&*target_parent, target_name, parent, name, AtFlags::empty());
        match link() {
            Ok(()) => return Ok(()),
            Err(Errno::NOENT) => return Err(missing()),
            Err(Errno::PERM) => return Err(refuse(&entry.path, "a hard link to a directory")),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("link", &entry.path, errno)),
        }
        let stat = |directory: &OwnedFd, name: &[u8]| {
            fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        };
        let (Ok(old), Ok(new)) = (stat(&target_parent, target_name), stat(parent, name)) else {
            return Err(missing());
        };
        if (old.st_dev, old.st_ino) == (new.st_dev, new.st_ino) {
            return Ok(());
        }
        self.tree.clear_place(parent, name, &entry.path)?;
        link().map_err(|errno| match errno {
            Errno::NOENT => missing(),
            errno => failed("link", &entry.path, errno),
        })
    }

    /// `.wh.name`: a character device 0/0 where the name is not in this layer itself. A layer's
    /// whiteouts speak of the layers below only (image-spec layer.md).
    fn whiteout(&mut self, parent_path: &[u8], hidden: &[u8]) -> Result<()> {
        let parent = self.tree.directory(parent_path)?;
        let path = [parent_path, b"/", hidden].concat();
        let made = fs::mknodat(
            &*parent,
            hidden,
            FileType::CharacterDevice,
            Mode::empty(),
            fs::makedev(0, 0),
        );
        match made {
            Ok(()) => {
                self.tree.inodes += 1;
                return Ok(());
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("mknod whiteout", &path, errno)),
        }
        let stat = fs::statat(&*parent, hidden, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed("stat", &path, errno))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let directory = self.tree.open_below(&*parent, hidden, &path)?;
            set_opaque(&directory, &path)?;
        }
        Ok(())
    }

    fn opaque(&mut self, parent_path: &[u8]) -> Result<()> {
        if parent_path.is_empty() {
            // overlayfs always merges the roots: the store leaves out the layers below instead.
            self.opaque_root = true;
            return Ok(());
        }
        let parent = self.tree.directory(parent_path)?;
        let directory = self.tree.open_below(&*parent, b".", parent_path)?;
        set_opaque(&directory, parent_path)
    }

    /// Sets directory times and closes the sums.
    pub(crate) fn finish(mut self) -> Result<Unpacked> {
        // An implicit directory has no time of its own; a fixed one keeps unpacking repeatable.
        let epoch = (Time::default(), Time::default());
        let named = std::mem::take(&mut self.directory_times);
        let mut bytes = self.bytes;
        let mut implicit = Vec::new();
        for path in self.tree.implicit() {
            if let Some(allocated) = self.set_directory_times(path, epoch)? {
                bytes += allocated;
                implicit.push(path.clone());
            }
        }
        for (path, times) in named.iter().filter(|(path, _)| !path.is_empty()) {
            bytes += self.set_directory_times(path, *times)?.unwrap_or(0);
        }
        let root = self.tree.open_below(self.tree.root(), b".", b"/")?;
        let (atime, mtime) = named.get(&[][..]).copied().unwrap_or(epoch);
        fs::futimens(&root, &timestamps(atime, mtime))
            .map_err(|errno| failed("utimens", b"/", errno))?;
        bytes += fs::fstat(&root).map_or(0, |stat| allocated(&stat));
        let mut usage = Usage {
            bytes,
            inodes: self.tree.inodes,
        };
        if self.tree.replaced {
            usage = crate::gc::measure(root.as_fd())
                .map_err(|error| Error::io("measure", "the layer", error))?;
        }
        Ok(Unpacked {
            entries: self.entries,
            bytes: usage.bytes,
            inodes: usage.inodes,
            implicit,
            has_root: self.has_root,
            opaque_root: self.opaque_root,
        })
    }

    /// `None` when a later entry put something else there.
    fn set_directory_times(&self, path: &[u8], times: (Time, Time)) -> Result<Option<u64>> {
        let (parent_path, name) = split(path);
        let Some(parent) = self.tree.lookup(parent_path)? else {
            return Ok(None);
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match fs::openat(&*parent, name, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(failed("open", path, errno)),
        };
        fs::futimens(&directory, &timestamps(times.0, times.1))
            .map_err(|errno| failed("utimens", path, errno))?;
        let stat = fs::fstat(&directory).map_err(|errno| failed("fstat", path, errno))?;
        Ok(Some(allocated(&stat)))
    }
}

/// Access and modification time; the former defaults to the latter.
fn times(entry: &Entry) -> (Time, Time) {
    (entry.atime.unwrap_or(entry.mtime), entry.mtime)
}

fn timestamps(atime: Time, mtime: Time) -> Timestamps {
    let spec = |time: Time| Timespec {
        tv_sec: time.seconds,
        tv_nsec: i64::from(time.nanos),
    };
    Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    }
}

pub(crate) fn allocated(stat: &fs::Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

/// Whether an image may set this xattr. `trusted.*` steers overlayfs; other `security.*` labels
/// are those of the machine the image was built on.
fn keeps_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}

fn xattr_outcome(outcome: rustix::io::Result<()>, name: &[u8], path: &[u8]) -> Result<()> {
    match outcome {
        Ok(()) => Ok(()),
        // Symlinks and devices have no user.* (xattr(7)); file systems may have none at all.
        Err(Errno::OPNOTSUPP | Errno::PERM) if name != b"security.capability" => Ok(()),
        Err(errno) => Err(Error::io(
            "setxattr",
            format!(
                "{} on {}",
                String::from_utf8_lossy(name).escape_debug(),
                show(path)
            ),
            errno,
        )),
    }
}
