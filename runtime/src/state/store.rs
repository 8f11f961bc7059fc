//! The state directories: making, reading, locking and removing them.
//!
//! Owns everything under `<root>` but the contents of exec.fifo. Never signals a process and never
//! touches a cgroup.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::{ContainerRecord, IntentRecord, ProcessRecord};
use rustix::fs::{Access, AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::seal;
use super::status::process_start_time;

use crate::error::{Error, Kind, Result};

/// `start` opens it, the container's init waits behind it.
pub const EXEC_FIFO: &str = "exec.fifo";

const LOCK: &str = "lock";
const INTENT: &str = "intent.json";
const STATE: &str = "state.json";
const CONFIG: &str = "config.json";

fn exists() -> Error {
    Error::new(Kind::Exists, "container with given ID already exists", "")
}

/// No container: the text that engines match.
pub(super) fn does_not_exist() -> Error {
    Error::new(Kind::NotFound, "container does not exist", "")
}

/// An intent as it is on disk: with the process that had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    pub creator: ProcessRecord,
    #[serde(flatten)]
    pub intent: IntentRecord,
}

impl Begun {
    fn now(intent: &IntentRecord) -> Result<Begun> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let creator = ProcessRecord {
            pid,
            start_time: process_start_time(pid)?,
        };
        Ok(Begun {
            creator,
            intent: intent.clone(),
        })
    }
}

/// The directory that holds all containers of one `--root`. Opening it makes no system call.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    pub fn open(root: &Path) -> Store {
        Store {
            root: root.to_owned(),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn dir(&self, id: &ContainerId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// Claims the id: makes its directory, takes its lock, and puts the intent on disk before the
    /// caller does anything that would have to be undone.
    ///
    /// # Errors
    /// `Exists` if the id is taken; otherwise the state root cannot be written.
    pub fn begin(&self, id: &ContainerId, intent: impl FnOnce() -> IntentRecord) -> Result<Intent> {
        let dir = self.dir(id);
        match mkdir(&dir) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                return Err(exists());
            }
            Err(Errno::NOENT) => {
                make_root(&self.root)?;
                mkdir(&dir).map_err(|errno| failed("mkdir", &dir, errno))?;
            }
            Err(errno) => return Err(failed("mkdir", &dir, errno)),
        }
        let entry = Entry::open(dir.clone()).inspect_err(|_| {
            let _ = std::fs::remove_dir(&dir);
        })?;
        let claim = || {
            let lock = entry.lock_file()?.take(&entry)?;
            // The directory that we made may be gone, and the one at its path another's, who had
            // the lock before us.
            if entry.has(INTENT) || entry.has(STATE) {
                return Err(exists());
            }
            let begun = Begun::now(&intent())?;
            entry.replace(INTENT, &begun)?;
            Ok((lock, begun.creator))
        };
        match claim() {
            Ok((lock, creator)) => Ok(Intent {
                entry,
                lock,
                creator,
            }),
            // A delete was faster. At the path there may be the claim of another by now.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Exists) => Err(error),
            Err(error) => {
                // Nothing has been done yet: the claim may go without a trace.
                let _ = entry.remove();
                Err(error)
            }
        }
    }

    /// The directory of a container, created or being created.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn entry(&self, id: &ContainerId) -> Result<Entry> {
        Entry::open(self.dir(id))
    }

    /// The record of a created container.
    ///
    /// # Errors
    /// `NotFound` if there is none, or if its creation has not finished.
    pub fn load(&self, id: &ContainerId) -> Result<ContainerRecord> {
        self.entry(id)?.record()
    }

    /// The ids of all directories, sorted. A missing root is an error of its own kind, so that
    /// the caller can tell a default root that nobody has used.
    ///
    /// # Errors
    /// `NotFound` if there is no root; otherwise it cannot be read.
    pub fn list(&self) -> Result<Vec<ContainerId>> {
        let entries = std::fs::read_dir(&self.root).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::NotFound => Kind::NotFound,
                _ => Kind::System,
            };
            Error::new(kind, "open", self.root.display().to_string()).source(error)
        })?;
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry
                .map_err(|error| Error::system("read", self.root.display().to_string(), error))?;
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let id = entry
                .file_name()
                .to_str()
                .and_then(|name| ContainerId::parse(name).ok());
            if let (true, Some(id)) = (is_dir, id) {
                ids.push(id);
            }
        }
        ids.sort();
        Ok(ids)
    }
}

fn mkdir(path: &Path) -> std::result::Result<(), Errno> {
    rustix::fs::mkdir(path, Mode::RWXU)
}

fn make_root(root: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(|error| Error::system("mkdir", root.display().to_string(), error))
}

fn failed(call: &'static str, path: &Path, errno: Errno) -> Error {
    Error::system(call, path.display().to_string(), errno)
}

/// An open state directory.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    fd: OwnedFd,
}

impl Entry {
    fn open(path: PathBuf) -> Result<Entry> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Entry { path, fd }),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(does_not_exist()),
            Err(errno) => Err(failed("open", &path, errno)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn fifo_path(&self) -> PathBuf {
        self.path.join(EXEC_FIFO)
    }

    /// The record, as it is on disk now.
    ///
    /// # Errors
    /// `NotFound` while there is none; otherwise it is damaged.
    pub fn record(&self) -> Result<ContainerRecord> {
        self.read_json(STATE)?.ok_or_else(does_not_exist)
    }

    /// What the creation had set out to do. It stays for as long as the container does.
    ///
    /// # Errors
    /// It is damaged.
    pub fn intent(&self) -> Result<Option<Begun>> {
        self.read_json(INTENT)
    }

    /// The container's config.json as it was at create.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn config(&self) -> Result<Vec<u8>> {
        match self.read(CONFIG)? {
            Some(config) => Ok(config),
            None => Err(failed("read", &self.path.join(CONFIG), Errno::NOENT)),
        }
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// The state root cannot be written.
    pub fn save(&self, record: &ContainerRecord) -> Result<()> {
        self.replace(STATE, record)
    }

    /// Replaces the copy of config.json, after an update of its resources.
    ///
    /// # Errors
    /// The state root cannot be written.
    pub fn save_config(&self, config: &[u8]) -> Result<()> {
        self.replace_bytes(CONFIG, config)
    }

    /// Takes the container's lock, waiting for whoever holds it.
    ///
    /// # Errors
    /// `NotFound` if the container was deleted meanwhile.
    pub fn lock(&self) -> Result<Lock> {
        self.lock_file()?.take(self)
    }

    /// Takes the lock if it is free.
    ///
    /// # Errors
    /// As for [`Entry::lock`].
    pub fn try_lock(&self) -> Result<Option<Lock>> {
        self.lock_file()?.try_take(self)
    }

    fn lock_file(&self) -> Result<Unlocked> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, LOCK, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(Unlocked { fd }),
            Err(Errno::NOENT) => Err(does_not_exist()),
            Err(errno) => Err(failed("open", &self.path.join(LOCK), errno)),
        }
    }

    /// Removes the directory and everything in it. The lock file goes last: who waits for it finds
    /// the container gone.
    ///
    /// # Errors
    /// Something in it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for name in [STATE, INTENT, CONFIG, EXEC_FIFO, LOCK] {
            match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(failed("unlink", &self.path.join(name), errno));
                }
            }
        }
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            // Another was faster, and the id has a new owner.
            Err(Errno::NOTEMPTY | Errno::EXIST) if !self.is_at_its_path() => Ok(()),
            // Files of other owners: the notify socket, interrupted writes.
            Err(Errno::NOTEMPTY | Errno::EXIST) => std::fs::remove_dir_all(&self.path)
                .map_err(|error| Error::system("rmdir", self.path.display().to_string(), error)),
            Err(errno) => Err(failed("rmdir", &self.path, errno)),
        }
    }

    fn has(&self, name: &str) -> bool {
        rustix::fs::accessat(&self.fd, name, Access::EXISTS, AtFlags::empty()).is_ok()
    }

    fn is_at_its_path(&self) -> bool {
        let (mine, there) = (rustix::fs::fstat(&self.fd), rustix::fs::lstat(&self.path));
        matches!((mine, there), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("open", &self.path.join(name), errno)),
        };
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut File::from(fd), &mut bytes).map_err(|error| {
            Error::system("read", self.path.join(name).display().to_string(), error)
        })?;
        Ok(Some(bytes))
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        let subject = || self.path.join(name).display().to_string();
        seal::check(&bytes)
            .map_err(|reason| Error::system("verify", subject(), reason.to_owned()))?;
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::system("parse", subject(), error))
    }

    fn replace<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let bytes = serde_json::to_vec(value)
            .map_err(|error| Error::new(Kind::Internal, "encode", name).source(error))?;
        self.replace_bytes(name, &seal::seal(&bytes))
    }

    /// Written beside, then renamed over: a reader sees the old file or the new one, also after
    /// the writer was killed. Not synced: see docs/decisions/0004-unsynced-runtime-state.md.
    fn replace_bytes(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let temporary = format!(".{name}.new");
        let path = || self.path.join(name).display().to_string();
        self.write(&temporary, name, bytes)?;
        rustix::fs::renameat(&self.fd, &*temporary, &self.fd, name)
            .map_err(|errno| Error::system("rename", path(), errno))
    }

    /// Writes a file; `subject` is its name in errors.
    fn write(&self, name: &str, subject: &str, bytes: &[u8]) -> Result<()> {
        let path = || self.path.join(subject).display().to_string();
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::system("create", path(), errno))?;
        let mut file = File::from(fd);
        file.write_all(bytes)
            .map_err(|error| Error::system("write", path(), error))
    }
}

impl AsFd for Entry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A creation under way, and its claim on the id.
///
/// Dropping it leaves the directory and the intent behind, for `delete -f` to undo what was done.
#[derive(Debug)]
pub struct Intent {
    entry: Entry,
    lock: Lock,
    creator: ProcessRecord,
}

impl Intent {
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Adds what has become known, such as the pid of the init.
    ///
    /// # Errors
    /// The state root cannot be written.
    pub fn update(&self, intent: &IntentRecord) -> Result<()> {
        self.entry.replace(
            INTENT,
            &Begun {
                creator: self.creator,
                intent: intent.clone(),
            },
        )
    }

    /// Puts the container on record. From here on it exists for every command, while the lock is
    /// held until [`Intent::finish`]. The intent stays beside it: should the record be damaged,
    /// `delete --force` still knows what there is to give back.
    ///
    /// # Errors
    /// The state root cannot be written.
    pub fn commit(&self, record: &ContainerRecord, config: &[u8]) -> Result<()> {
        // In place of a rename: nobody looks at it before the record is there.
        self.entry.write(CONFIG, CONFIG, config)?;
        self.entry.save(record)
    }

    /// Ends the creation and hands out the directory, unlocked.
    pub fn finish(self) -> Entry {
        drop(self.lock);
        self.entry
    }

    /// Gives the id back, after everything else was undone.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub fn abandon(self) -> Result<()> {
        self.entry.remove()
    }
}

/// The lock file, open but not locked.
struct Unlocked {
    fd: OwnedFd,
}

impl Unlocked {
    fn take(self, entry: &Entry) -> Result<Lock> {
        rustix::io::retry_on_intr(|| {
            rustix::fs::fcntl_lock(&self.fd, FlockOperation::LockExclusive)
        })
        .map_err(|errno| failed("lock", &entry.path.join(LOCK), errno))?;
        self.locked(entry)
    }

    fn try_take(self, entry: &Entry) -> Result<Option<Lock>> {
        match rustix::fs::fcntl_lock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => self.locked(entry).map(Some),
            Err(Errno::ACCESS | Errno::AGAIN) => Ok(None),
            Err(errno) => Err(failed("lock", &entry.path.join(LOCK), errno)),
        }
    }

    fn locked(self, entry: &Entry) -> Result<Lock> {
        let stat = rustix::fs::fstat(&self.fd)
            .map_err(|errno| failed("stat", &entry.path.join(LOCK), errno))?;
        if stat.st_nlink == 0 {
            return Err(does_not_exist());
        }
        Ok(Lock { _fd: self.fd })
    }
}

/// The container's lock; dropping it unlocks.
///
/// A POSIX record lock: it belongs to the process, not to the descriptor, so that the container's
/// init does not go on holding it when its creator is killed. The price is that closing any other
/// descriptor of the lock file in this process gives it up: nobody else opens it.
#[derive(Debug)]
pub struct Lock {
    _fd: OwnedFd,
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_oci::record::CgroupRecord;

    fn intent(id: &str) -> IntentRecord {
        IntentRecord {
            id: ContainerId::parse(id).unwrap(),
            bundle: "/b".into(),
            cgroup: CgroupRecord::V2 {
                path: "/sys/fs/cgroup/x".into(),
                unit: None,
            },
            existing: vec!["/sys/fs/cgroup/x".into()],
            pids: Vec::new(),
            mounts: Vec::new(),
            resctrl: None,
        }
    }

    fn record(id: &str) -> ContainerRecord {
        ContainerRecord {
            oci_version: "1.2.0".into(),
            id: ContainerId::parse(id).unwrap(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            init_pid: 42,
            init_start_time: 7,
            created: "2026-11-20T09:15:32Z".into(),
            owner: "root".into(),
            annotations: Default::default(),
            cgroup: CgroupRecord::None,
            namespaces: Vec::new(),
            private_pid_namespace: true,
            rootless_cgroups: false,
            no_new_keyring: false,
            mounts: Vec::new(),
            resctrl: None,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("root"));
        (dir, store)
    }

    #[test]
    fn life_of_a_container() {
        let (_dir, store) = store();
        let id = ContainerId::parse("a").unwrap();
        assert_eq!(store.list().unwrap_err().kind(), Kind::NotFound);
        let begun = store.begin(&intent("a").id, || intent("a")).unwrap();
        assert_eq!(
            store.load(&id).unwrap_err().to_string(),
            "container does not exist"
        );
        let found = store.entry(&id).unwrap().intent().unwrap().unwrap();
        assert_eq!(found.intent, intent("a"));
        begun.commit(&record("a"), b"{}").unwrap();
        let entry = begun.finish();
        assert_eq!(entry.intent().unwrap().unwrap().intent, intent("a"));
        assert_eq!(store.load(&id).unwrap(), record("a"));
        assert_eq!(entry.config().unwrap(), b"{}");
        assert_eq!(store.list().unwrap(), std::slice::from_ref(&id));
        entry.remove().unwrap();
        assert_eq!(store.entry(&id).unwrap_err().kind(), Kind::NotFound);
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn taken_id_is_refused() {
        let (_dir, store) = store();
        let _held = store.begin(&intent("a").id, || intent("a")).unwrap();
        let error = store.begin(&intent("a").id, || intent("a")).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
        assert_eq!(error.to_string(), "container with given ID already exists");
    }

    #[test]
    fn directories_are_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_dir, store) = store();
        let begun = store.begin(&intent("a").id, || intent("a")).unwrap();
        for path in [store.root(), begun.entry().path()] {
            assert_eq!(
                std::fs::metadata(path).unwrap().permissions().mode() & 0o777,
                0o700
            );
        }
    }

    #[test]
    fn abandoned_creation_leaves_nothing() {
        let (_dir, store) = store();
        let begun = store.begin(&intent("a").id, || intent("a")).unwrap();
        std::fs::write(begun.entry().path().join("other"), "x").unwrap();
        begun.abandon().unwrap();
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn damaged_record_names_the_file() {
        let (_dir, store) = store();
        let begun = store.begin(&intent("a").id, || intent("a")).unwrap();
        std::fs::write(begun.entry().path().join(STATE), "{").unwrap();
        let error = begun.entry().record().unwrap_err();
        assert!(error.to_string().ends_with("a/state.json"), "{error}");
    }

    #[test]
    fn foreign_names_are_not_listed() {
        let (_dir, store) = store();
        let begun = store.begin(&intent("a").id, || intent("a")).unwrap();
        std::fs::create_dir(store.root().join("no id")).unwrap();
        std::fs::write(store.root().join("file"), "").unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        drop(begun);
    }
}
