//! Owns the open store: its directories, recovery, and the public operations. Pulling is in
//! `pull`, snapshots in `snapshot`.
//!
//! Locks: `state` is held for look-ups and renames, never across a sync or the network; `commit`
//! orders whatever changes `images/`. `commit` is taken first.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};

use crate::api::{FsInfo, Image, PullRequest, PullTimes, Snapshot, StoreConfig, Usage};
use crate::content::{
    FORMAT, ImageRecord, LayerRecord, SnapshotRecord, State, read_record, sync_directory,
    write_record,
};
use crate::digest::ImageId;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Collector;
use crate::layer::LayerSlots;
use crate::lock::Lock;
use crate::pull::{self, Pulls};
use crate::snapshot;

/// The store. Cheap to clone; all clones share one state.
#[derive(Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) paths: Paths,
    pub(crate) collector: Collector,
    pub(crate) pulls: Pulls,
    pub(crate) slots: LayerSlots,
    state: Mutex<State>,
    commit: Mutex<()>,
    prefix: String,
    number: AtomicU64,
    _lock: Lock,
}

/// The store's directories.
pub(crate) struct Paths {
    pub(crate) root: PathBuf,
    pub(crate) staging: PathBuf,
    pub(crate) layers: PathBuf,
    pub(crate) images: PathBuf,
    pub(crate) snapshots: PathBuf,
    /// The lower directory of images without layers.
    pub(crate) empty: PathBuf,
    gc: PathBuf,
}

impl Paths {
    fn make(root: &Path) -> Result<Self> {
        let absolute = std::path::absolute(root)
            .map_err(|error| Error::io("resolve", root.display().to_string(), error))?;
        let text = absolute.as_os_str().as_encoded_bytes();
        if text
            .iter()
            .any(|byte| matches!(byte, b':' | b',' | b'\\' | b'\n'))
        {
            // overlayfs splits its options at these.
            return Err(Error::new(
                ErrorKind::Unsupported,
                "use as the image store's root",
                absolute.display().to_string(),
            )
            .because("overlayfs cannot take a path with ':', ',' or '\\'"));
        }
        let paths = Paths {
            staging: absolute.join("staging"),
            layers: absolute.join("layers"),
            images: absolute.join("images"),
            snapshots: absolute.join("snapshots"),
            empty: absolute.join("empty"),
            gc: absolute.join("gc"),
            root: absolute,
        };
        for path in [
            &paths.root,
            &paths.staging,
            &paths.layers,
            &paths.images,
            &paths.snapshots,
            &paths.empty,
            &paths.gc,
        ] {
            make_directory(path)?;
        }
        Ok(paths)
    }
}

fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::io("mkdir", path.display().to_string(), error))
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn commit_lock(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new empty directory below `staging/`.
    pub(crate) fn make_staging(&self) -> Result<PathBuf> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let path = self.paths.staging.join(format!("{}{number}", self.prefix));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| Error::io("mkdir", path.display().to_string(), error))?;
        Ok(path)
    }

    pub(crate) fn layer_path(&self, key: &str) -> PathBuf {
        self.paths.layers.join(key).join("fs")
    }

    /// Moves layers that nothing needs to the collector.
    pub(crate) fn collect(&self) {
        let mut state = self.state();
        for key in state.unreferenced() {
            // Under the lock: a pull that misses the layer in the index must not find it on disk.
            match self.collector.discard(&self.paths.layers.join(&key)) {
                Ok(()) => state.remove_layer(&key),
                Err(error) => tracing::warn!(layer = key, %error, "cannot collect layer"),
            }
        }
    }
}

pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| Error::io("open", path.display().to_string(), errno))
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore")
            .field("root", &self.shared.paths.root)
            .finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Opens the store, recovering what a crash left: staging is removed, unreachable layers are
    /// collected in the background.
    ///
    /// Installs ring as the process's default rustls provider unless there is one.
    pub fn open(config: StoreConfig) -> Result<ImageStore> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        make_directory(&config.root)?;
        let lock = Lock::take(&config.root)?;
        check_version(&config.root)?;
        let paths = Paths::make(&config.root)?;
        let nanos = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_nanos());
        let prefix = format!("{nanos}-");
        let collector = Collector::start(&paths.gc, &prefix)?;
        let state = recover(&paths, &collector)?;
        let shared = Shared {
            config,
            paths,
            collector,
            pulls: Pulls::default(),
            slots: LayerSlots::default(),
            state: Mutex::new(state),
            commit: Mutex::new(()),
            prefix,
            number: AtomicU64::new(0),
            _lock: lock,
        };
        shared.collect();
        Ok(ImageStore {
            shared: Arc::new(shared),
        })
    }

    /// Pulls an image. The work is detached from this future: dropping it does not stop the pull,
    /// and identical pulls are joined. Needs a tokio runtime with time and I/O.
    pub async fn pull(&self, req: PullRequest) -> Result<Image> {
        self.pull_timed(req).await.map(|(image, _)| image)
    }

    /// [`ImageStore::pull`], and where its time went.
    pub async fn pull_timed(&self, req: PullRequest) -> Result<(Image, PullTimes)> {
        pull::join(&self.shared, req).await
    }

    /// All images, ordered by id.
    pub fn list(&self) -> Vec<Image> {
        self.shared
            .state()
            .images
            .values()
            .map(ImageRecord::to_image)
            .collect()
    }

    /// Finds an image by tag, digest reference, id, bare hex or unique prefix of it.
    pub fn resolve(&self, name_or_id: &str) -> Option<Image> {
        self.shared
            .state()
            .find(name_or_id)
            .map(ImageRecord::to_image)
    }

    /// Removes an image with all its names. `false`: it was not there. Layers that snapshots use
    /// stay until those go.
    pub fn remove(&self, name_or_id: &str) -> Result<bool> {
        let shared = &self.shared;
        {
            let _commit = shared.commit_lock();
            let Some(id) = shared
                .state()
                .find(name_or_id)
                .map(|image| image.id.clone())
            else {
                return Ok(false);
            };
            let path = shared.paths.images.join(ImageRecord::file_name(&id));
            std::fs::remove_file(&path)
                .map_err(|error| Error::io("unlink", path.display().to_string(), error))?;
            shared.state().images.remove(&id);
            // Before its layers go: a record without layers must not come back after a power cut.
            sync_directory(&shared.paths.images)?;
            tracing::info!(image = %id, "image removed");
        }
        shared.collect();
        Ok(true)
    }

    /// Space used by layers. O(1).
    pub fn fs_info(&self) -> FsInfo {
        let state = self.shared.state();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        FsInfo {
            mountpoint: self.shared.paths.root.clone(),
            bytes: state.bytes,
            inodes: state.inodes,
            timestamp_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        }
    }

    /// Makes (or finds) the snapshot `key` on top of an image.
    pub fn create_snapshot(&self, key: &str, image_id: &ImageId) -> Result<Snapshot> {
        snapshot::create(&self.shared, key, image_id)
    }

    /// The snapshot `key`, if it exists.
    pub fn snapshot(&self, key: &str) -> Option<Snapshot> {
        snapshot::find(&self.shared, key)
    }

    /// Keys of all snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        self.shared.state().snapshots.keys().cloned().collect()
    }

    /// Removes a snapshot; succeeds when it is absent. It must not be mounted any more.
    pub fn remove_snapshot(&self, key: &str) -> Result<()> {
        snapshot::remove(&self.shared, key)
    }

    /// Space used by the upper directory.
    pub fn snapshot_usage(&self, key: &str) -> Result<Usage> {
        snapshot::usage(&self.shared, key)
    }

    /// The layer directories of an image, top first, for reading only.
    pub fn layer_dirs(&self, image_id: &ImageId) -> Result<Vec<PathBuf>> {
        let state = self.shared.state();
        let image = state
            .images
            .get(image_id)
            .ok_or_else(|| missing_image(image_id))?;
        Ok(image
            .layers
            .iter()
            .rev()
            .map(|layer| self.shared.layer_path(&layer.key))
            .collect())
    }

    /// Waits until what was removed so far is deleted. For tests and for an orderly shutdown.
    pub fn settle(&self) {
        self.shared.collector.settle();
    }
}

pub(crate) fn missing_image(id: &ImageId) -> Error {
    Error::new(ErrorKind::NotFound, "find image", id.to_string()).because("no such image")
}

fn check_version(root: &Path) -> Result<()> {
    let path = root.join("VERSION");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim() == FORMAT.to_string() => Ok(()),
        // Written at the very first open; empty after a power cut just then.
        Ok(text) if text.trim().is_empty() => write_version(root),
        Ok(text) => Err(Error::new(
            ErrorKind::Unsupported,
            "open image store",
            root.display().to_string(),
        )
        .because(format!(
            "its format is {}, this program reads {FORMAT}",
            text.trim().escape_debug()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => write_version(root),
        Err(error) => Err(Error::io("read", path.display().to_string(), error)),
    }
}

fn write_version(root: &Path) -> Result<()> {
    write_record(root, "VERSION", &FORMAT)
}

/// Reads every record and sends what no record reaches to the collector.
fn recover(paths: &Paths, collector: &Collector) -> Result<State> {
    for entry in list(&paths.staging)? {
        discard(collector, &paths.staging.join(entry));
    }
    let mut state = State::default();
    for key in list(&paths.layers)? {
        let path = paths.layers.join(&key);
        match read_record::<LayerRecord>(&path.join("layer.json")) {
            Ok(record) if record.format == FORMAT && path.join("fs").is_dir() => {
                state.add_layer(key, record);
            }
            Ok(_) => quarantine(collector, &path, "not a complete layer of this format"),
            Err(error) => quarantine(collector, &path, &error.to_string()),
        }
    }
    for name in list(&paths.images)? {
        let path = paths.images.join(&name);
        match read_record::<ImageRecord>(&path) {
            Ok(record) => match usable(&record, &name, &state) {
                Ok(()) => drop(state.images.insert(record.id.clone(), record)),
                Err(why) => quarantine(collector, &path, &why),
            },
            Err(error) => quarantine(collector, &path, &error.to_string()),
        }
    }
    settle_tags(&mut state);
    for key in list(&paths.snapshots)? {
        let path = paths.snapshots.join(&key);
        match read_record::<SnapshotRecord>(&path.join("snapshot.json")) {
            Ok(record)
                if record
                    .layers
                    .iter()
                    .all(|layer| state.layers.contains_key(layer)) =>
            {
                state.snapshots.insert(key, record);
            }
            Ok(_) => quarantine(collector, &path, "its layers are gone"),
            Err(error) => quarantine(collector, &path, &error.to_string()),
        }
    }
    Ok(state)
}

fn usable(record: &ImageRecord, name: &str, state: &State) -> std::result::Result<(), String> {
    if record.format != FORMAT || ImageRecord::file_name(&record.id) != name {
        return Err("not an image record of this format and name".to_owned());
    }
    match record
        .layers
        .iter()
        .find(|layer| !state.layers.contains_key(&layer.key))
    {
        Some(layer) => Err(format!("layer {} is gone", layer.diff_id)),
        None => Ok(()),
    }
}

/// A crash between the two writes of a moved tag leaves it in both records: the later one has it.
fn settle_tags(state: &mut State) {
    let mut owners: HashMap<String, u64> = HashMap::new();
    for tag in state.images.values().flat_map(|image| &image.tags) {
        let highest = owners.entry(tag.name.clone()).or_insert(0);
        *highest = (*highest).max(tag.sequence);
        state.sequence = state.sequence.max(tag.sequence);
    }
    for image in state.images.values_mut() {
        image
            .tags
            .retain(|tag| owners.get(&tag.name) == Some(&tag.sequence));
    }
}

fn quarantine(collector: &Collector, path: &Path, why: &str) {
    tracing::warn!(path = %path.display(), why, "dropping what cannot be used");
    discard(collector, path);
}

fn discard(collector: &Collector, path: &Path) {
    if let Err(error) = collector.discard(path) {
        tracing::warn!(path = %path.display(), %error, "cannot discard");
    }
}

fn list(path: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io("list", path.display().to_string(), error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
