//! Owns one pull from request to commit, and the joining of pulls that want the same.
//!
//! ```text
//! join -> [detached] resolve -> config -> layers (slots) -> adopt -> syncfs -> rename -> record
//! ```
//! Identical pulls (same reference, same credentials) share one task; different pulls share
//! layers in the making through slots. A waiter that goes away changes nothing for the others.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OnceCell, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::api::{Auth, Image, LayerInfo, PullRequest, PullTimes};
use crate::content::{
    FORMAT, ImageRecord, LayerRecord, chain_ids, chain_key, layer_key, sync_directory, write_new,
    write_record,
};
use crate::digest::{Digest, ImageId};
use crate::error::{Error, ErrorKind, Result};
use crate::reference::Reference;
use crate::registry::document::{Config, Descriptor};
use crate::registry::{Registry, Resolved};
use crate::store::{Shared, open_directory};
use crate::unpack::adopt::adopt;
use crate::unpack::apply::Unpacked;
use crate::unpack::{self, StageTimes};

/// Pieces of a download waiting for the inflating thread.
const CHUNKS: usize = 8;

type Answer = Result<(Image, PullTimes)>;
type PullKey = (String, Option<Auth>);

/// Pulls under way.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<HashMap<PullKey, watch::Receiver<Option<Answer>>>>);

/// Layers in the making, by ChainID: what is below decides how a layer is completed.
#[derive(Default)]
pub(crate) struct LayerSlots(Mutex<HashMap<Digest, Weak<Slot>>>);

type Slot = OnceCell<Arc<StagedLayer>>;

impl LayerSlots {
    fn slot(&self, chain: &Digest) -> Arc<Slot> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(chain).and_then(Weak::upgrade) {
            return slot;
        }
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(Slot::new());
        slots.insert(chain.clone(), Arc::downgrade(&slot));
        slot
    }
}

/// Starts a pull or joins the one under way, and waits for its answer.
pub(crate) async fn join(shared: &Arc<Shared>, request: PullRequest) -> Answer {
    let reference = Reference::parse(&request.reference)?;
    let auth = request.auth.filter(|auth| *auth != Auth::default());
    let key = (reference.to_string(), auth.clone());
    let mut receiver = {
        let mut pulls = shared
            .pulls
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match pulls.get(&key) {
            Some(receiver) => receiver.clone(),
            None => {
                let (sender, receiver) = watch::channel(None);
                pulls.insert(key.clone(), receiver.clone());
                let task = Task {
                    shared: Arc::clone(shared),
                    key,
                    sender,
                };
                tokio::spawn(task.run(reference, auth));
                receiver
            }
        }
    };
    let lost = || {
        Error::new(ErrorKind::Internal, "pull image", &request.reference).because("its task ended")
    };
    let answer = receiver
        .wait_for(Option::is_some)
        .await
        .map_err(|_| lost())?;
    answer.clone().unwrap_or_else(|| Err(lost()))
}

/// The detached work. Leaves the table however it ends.
struct Task {
    shared: Arc<Shared>,
    key: PullKey,
    sender: watch::Sender<Option<Answer>>,
}

impl Task {
    async fn run(self, reference: Reference, auth: Option<Auth>) {
        let started = Instant::now();
        let answer =
            pull(&self.shared, &reference, auth.as_ref())
                .await
                .map(|(image, mut times)| {
                    times.total = started.elapsed();
                    (image, times)
                });
        match &answer {
            Ok((image, times)) => tracing::info!(
                reference = %reference, image = %image.id, total = ?times.total,
                resolve = ?times.resolve, layers = ?times.layers, network = ?times.network,
                inflate = ?times.inflate, extract = ?times.extract, commit = ?times.commit,
                fetched = times.fetched, bytes = times.bytes, "image pulled"
            ),
            Err(error) => tracing::debug!(%reference, %error, "pull failed"),
        }
        let answer = answer.map_err(|error| error.within("pull image", reference.to_string()));
        self.forget();
        // Without waiters there is nobody to tell.
        let _ = self.sender.send(Some(answer));
    }

    fn forget(&self) {
        self.shared
            .pulls
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // The runtime went away in mid-pull.
        if self.sender.borrow().is_none() {
            self.forget();
        }
    }
}

/// A layer unpacked and verified, not yet part of the store.
struct StagedLayer {
    shared: Arc<Shared>,
    /// `staging/<n>`; holds `fs/` and `layer.json`.
    path: PathBuf,
    /// `fs/`, wherever it is renamed to.
    directory: OwnedFd,
    key: String,
    record: LayerRecord,
    implicit: Vec<Vec<u8>>,
    adopted: Mutex<bool>,
    committed: AtomicBool,
    cost: Cost,
}

#[derive(Clone, Copy, Default)]
struct Cost {
    network: Duration,
    stages: StageTimes,
}

impl Drop for StagedLayer {
    fn drop(&mut self) {
        if !self.committed.load(Ordering::Acquire)
            && let Err(error) = self.shared.collector.discard(&self.path)
        {
            tracing::warn!(%error, "cannot discard a staged layer");
        }
    }
}

/// A layer as a pull found it.
enum Layer {
    /// In the store, pinned.
    Present { key: String, directory: OwnedFd },
    /// In staging, pinned. The slot is kept so that other pulls find the layer until the commit.
    Staged {
        staged: Arc<StagedLayer>,
        _slot: Arc<Slot>,
    },
}

impl Layer {
    fn directory(&self) -> BorrowedFd<'_> {
        match self {
            Layer::Present { directory, .. } => directory.as_fd(),
            Layer::Staged { staged, .. } => staged.directory.as_fd(),
        }
    }

    fn key(&self) -> &str {
        match self {
            Layer::Present { key, .. } => key,
            Layer::Staged { staged, .. } => &staged.key,
        }
    }
}

/// Keeps layers of the store from being collected while a pull relies on them.
struct Pins {
    shared: Arc<Shared>,
    keys: Mutex<Vec<String>>,
}

impl Pins {
    /// Pins whichever form of the layer the store has.
    fn find(&self, diff_id: &Digest, chain: &Digest) -> Result<Option<Layer>> {
        let key = {
            let mut state = self.shared.state();
            let keys = [layer_key(diff_id), chain_key(chain)];
            let Some(key) = keys.into_iter().find(|key| state.layers.contains_key(key)) else {
                return Ok(None);
            };
            state.pin(&key);
            key
        };
        self.keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(key.clone());
        let directory = open_directory(&self.shared.layer_path(&key))?;
        Ok(Some(Layer::Present { key, directory }))
    }

    fn add(&self, key: &str) {
        self.shared.state().pin(key);
        self.keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(key.to_owned());
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let keys = std::mem::take(&mut *self.keys.lock().unwrap_or_else(PoisonError::into_inner));
        {
            let mut state = self.shared.state();
            keys.iter().for_each(|key| state.unpin(key));
        }
        self.shared.collect();
    }
}

async fn pull(
    shared: &Arc<Shared>,
    reference: &Reference,
    auth: Option<&Auth>,
) -> Result<(Image, PullTimes)> {
    let started = Instant::now();
    let mut times = PullTimes::default();
    let config = &shared.config;
    let registry = Registry::open(
        &config.registry_config_dirs,
        reference,
        auth,
        config.pull_progress_timeout,
    )?;
    let resolved = registry.resolve().await?;
    let config_digest = resolved.manifest.config.digest.clone();
    let id = ImageId::from_config_digest(config_digest)?;
    let body = registry
        .config(&resolved.manifest.config, resolved.endpoint)
        .await?;
    let image_config = registry.parse_config(&body, &resolved)?;
    times.resolve = started.elapsed();

    let pins = Pins {
        shared: Arc::clone(shared),
        keys: Mutex::new(Vec::new()),
    };
    let layers_started = Instant::now();
    let registry = Arc::new(registry);
    let pins = Arc::new(pins);
    let layers = fetch_layers(&pins, &registry, &resolved, &image_config).await?;
    times.layers = layers_started.elapsed();
    for layer in &layers {
        if let Layer::Staged { staged, .. } = layer {
            times.network += staged.cost.network;
            times.inflate += staged.cost.stages.inflate;
            times.extract += staged.cost.stages.extract;
            times.fetched += 1;
            times.bytes += staged.record.blob_size;
        }
    }

    let commit_started = Instant::now();
    let commit = Commit {
        shared: Arc::clone(shared),
        reference: reference.clone(),
        id,
        resolved,
        config: image_config,
        layers,
        _pins: pins,
    };
    let image = tokio::task::spawn_blocking(move || commit.run())
        .await
        .map_err(|error| {
            Error::new(ErrorKind::Internal, "commit image", reference.to_string()).because(error)
        })??;
    times.commit = commit_started.elapsed();
    Ok((image, times))
}

/// Gets every layer, bottom first, fetching what is missing in parallel.
async fn fetch_layers(
    pins: &Arc<Pins>,
    registry: &Arc<Registry>,
    resolved: &Resolved,
    config: &Config,
) -> Result<Vec<Layer>> {
    let chains = chain_ids(&config.diff_ids);
    let permits = Arc::new(Semaphore::new(
        pins.shared.config.max_parallel_layers.max(1),
    ));
    let (cancel, cancelled) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for (at, (blob, diff_id)) in resolved
        .manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .enumerate()
    {
        let fetch = Fetch {
            pins: Arc::clone(pins),
            registry: Arc::clone(registry),
            endpoint: resolved.endpoint,
            blob: blob.clone(),
            diff_id: diff_id.clone(),
            chain: chains[at].clone(),
            permits: Arc::clone(&permits),
            cancelled: cancelled.clone(),
        };
        tasks.spawn(async move { (at, fetch.run().await) });
    }
    let mut layers: Vec<Option<Layer>> = (0..chains.len()).map(|_| None).collect();
    let mut failure: Option<Error> = None;
    // Every task is waited for even after a failure: its threads write into the store until then.
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok((at, Ok(layer))) => layers[at] = Some(layer),
            Ok((_, Err(error))) => {
                let _ = cancel.send(true);
                failure.get_or_insert(error);
            }
            Err(error) => {
                let _ = cancel.send(true);
                failure.get_or_insert(
                    Error::new(ErrorKind::Internal, "fetch layers", "").because(error),
                );
            }
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(layers.into_iter().flatten().collect()),
    }
}

/// One layer's way into staging.
struct Fetch {
    pins: Arc<Pins>,
    registry: Arc<Registry>,
    endpoint: usize,
    blob: Descriptor,
    diff_id: Digest,
    chain: Digest,
    permits: Arc<Semaphore>,
    cancelled: watch::Receiver<bool>,
}

impl Fetch {
    async fn run(self) -> Result<Layer> {
        if let Some(layer) = self.pins.find(&self.diff_id, &self.chain)? {
            return Ok(layer);
        }
        // Whoever comes first fetches; if that fails, the next one tries by itself.
        let slot = self.pins.shared.slots.slot(&self.chain);
        let staged = Arc::clone(slot.get_or_try_init(|| self.fetch()).await?);
        // From here on a collection will not take it from under this pull.
        self.pins.add(&staged.key);
        Ok(Layer::Staged {
            staged,
            _slot: slot,
        })
    }

    async fn fetch(&self) -> Result<Arc<StagedLayer>> {
        let permits = Arc::clone(&self.permits);
        let _permit = permits.acquire().await.map_err(|error| {
            Error::new(
                ErrorKind::Internal,
                "fetch layer",
                self.blob.digest.to_string(),
            )
            .because(error)
        })?;
        let failed = match self.fetch_from(self.endpoint).await {
            Ok(staged) => return Ok(Arc::new(staged)),
            Err(error) => error,
        };
        let authoritative = self.registry.authoritative();
        let retry = failed.kind() == ErrorKind::Corrupt
            && self.registry.has_mirrors()
            && authoritative != self.endpoint
            && !*self.cancelled.borrow();
        if !retry {
            return Err(failed);
        }
        tracing::warn!(
            error = %failed, host = self.registry.endpoint_name(authoritative),
            "a mirror served a bad layer, asking the registry itself"
        );
        self.fetch_from(authoritative).await.map(Arc::new)
    }

    fn cancellation(&self) -> Error {
        Error::new(
            ErrorKind::Internal,
            "fetch layer",
            self.blob.digest.to_string(),
        )
        .because("cancelled, another layer failed")
    }

    async fn fetch_from(&self, endpoint: usize) -> Result<StagedLayer> {
        let shared = &self.pins.shared;
        let stage = Staging {
            shared: Arc::clone(shared),
            path: shared.make_staging()?,
            keep: false,
        };
        let directory_path = stage.path.join("fs");
        std::fs::DirBuilder::new()
            .create(&directory_path)
            .map_err(|error| Error::io("mkdir", directory_path.display().to_string(), error))?;
        let directory = open_directory(&directory_path)?;
        // Whatever the umask is.
        rustix::fs::fchmod(&directory, rustix::fs::Mode::from_raw_mode(0o755))
            .map_err(|errno| Error::io("chmod", directory_path.display().to_string(), errno))?;
        let job = unpack::Job {
            directory: directory
                .try_clone()
                .map_err(|error| Error::io("dup", directory_path.display().to_string(), error))?,
            blob: self.blob.clone(),
            diff_id: self.diff_id.clone(),
        };
        let (sender, receiver) = mpsc::channel(CHUNKS);
        let outcome = unpack::start(job, receiver)?;
        let mut network = Duration::ZERO;
        let blob = &self.blob;
        let mut cancelled = self.cancelled.clone();
        let streamed = tokio::select! {
            streamed = self.registry.stream(blob, endpoint, &sender) => streamed,
            // The sender lives as long as the pull, so this never fails.
            _ = cancelled.wait_for(|cancelled| *cancelled) => Err(self.cancellation()),
        };
        match streamed {
            Ok(transfer) => network = transfer.waited_for_network,
            // If the threads are gone they have an answer of their own.
            Err(error) => drop(sender.send(Err(error)).await),
        }
        drop(sender);
        let (unpacked, stages) = outcome.await.map_err(|_| {
            Error::new(
                ErrorKind::Internal,
                "unpack layer",
                self.blob.digest.to_string(),
            )
            .because("its thread panicked")
        })??;
        stage.finish(StagedParts {
            directory,
            unpacked,
            cost: Cost { network, stages },
            blob: self.blob.clone(),
            diff_id: self.diff_id.clone(),
            chain: self.chain.clone(),
        })
    }
}

/// A directory of `staging/` that is discarded unless it is finished.
struct Staging {
    shared: Arc<Shared>,
    path: PathBuf,
    keep: bool,
}

struct StagedParts {
    directory: OwnedFd,
    unpacked: Unpacked,
    cost: Cost,
    blob: Descriptor,
    diff_id: Digest,
    chain: Digest,
}

impl Staging {
    fn finish(mut self, parts: StagedParts) -> Result<StagedLayer> {
        let StagedParts {
            directory,
            unpacked,
            cost,
            blob,
            diff_id,
            chain,
        } = parts;
        let record = LayerRecord {
            format: FORMAT,
            diff_id,
            blob: blob.digest,
            blob_size: blob.size,
            entries: unpacked.entries,
            bytes: unpacked.bytes,
            inodes: unpacked.inodes,
            has_root: unpacked.has_root,
            opaque_root: unpacked.opaque_root,
        };
        // Synced with everything else by the one syncfs of the commit.
        write_new(&self.path.join("layer.json"), &record, false)?;
        let key = if unpacked.implicit.is_empty() {
            layer_key(&record.diff_id)
        } else {
            chain_key(&chain)
        };
        self.keep = true;
        Ok(StagedLayer {
            shared: Arc::clone(&self.shared),
            path: self.path.clone(),
            directory,
            key,
            record,
            adopted: Mutex::new(unpacked.implicit.is_empty()),
            implicit: unpacked.implicit,
            committed: AtomicBool::new(false),
            cost,
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // Synchronous: when the caller hears of the failure nothing of it is left.
        if let Err(error) = crate::gc::delete_path(&self.path) {
            tracing::warn!(%error, "cannot remove a failed layer");
        }
    }
}

/// Everything a pull found, ready to become an image.
struct Commit {
    shared: Arc<Shared>,
    reference: Reference,
    id: ImageId,
    resolved: Resolved,
    config: Config,
    layers: Vec<Layer>,
    /// Until the record is written.
    _pins: Arc<Pins>,
}

impl Commit {
    fn run(self) -> Result<Image> {
        self.adopt_implicit()?;
        let staged: Vec<&Arc<StagedLayer>> = self
            .layers
            .iter()
            .filter_map(|layer| match layer {
                Layer::Staged { staged, .. } => Some(staged),
                Layer::Present { .. } => None,
            })
            .collect();
        let paths = &self.shared.paths;
        if !staged.is_empty() {
            // One sync for all layers; an error of write-back since the open is reported here.
            rustix::fs::syncfs(open_directory(&paths.root)?)
                .map_err(|errno| Error::io("syncfs", paths.root.display().to_string(), errno))?;
            for layer in &staged {
                self.place(layer)?;
            }
            sync_directory(&paths.layers)?;
        }
        self.record()
    }

    fn adopt_implicit(&self) -> Result<()> {
        for (at, layer) in self.layers.iter().enumerate() {
            let Layer::Staged { staged, .. } = layer else {
                continue;
            };
            let mut adopted = staged
                .adopted
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if *adopted {
                continue;
            }
            let below: Vec<BorrowedFd<'_>> = self.layers[..at]
                .iter()
                .rev()
                .map(Layer::directory)
                .collect();
            adopt(staged.directory.as_fd(), &staged.implicit, &below)?;
            *adopted = true;
        }
        Ok(())
    }

    /// Renames a synced layer into the store, unless it is there.
    fn place(&self, staged: &StagedLayer) -> Result<()> {
        let mut state = self.shared.state();
        if state.layers.contains_key(&staged.key) {
            return Ok(());
        }
        let path = self.shared.paths.layers.join(&staged.key);
        if path.exists() {
            // Not in the index, so nothing uses it.
            self.shared.collector.discard(&path)?;
        }
        std::fs::rename(&staged.path, &path)
            .map_err(|error| Error::io("rename to", path.display().to_string(), error))?;
        staged.committed.store(true, Ordering::Release);
        state.add_layer(staged.key.clone(), staged.record.clone());
        Ok(())
    }

    /// Writes the image's record, the commit point, then takes the tag from its former owner.
    fn record(&self) -> Result<Image> {
        let _commit = self.shared.commit_lock();
        let paths = &self.shared.paths;
        let tag = self.reference.tag_name();
        let digest = self.reference.digest_name(&self.resolved.digest);
        let (record, sequence) = {
            let mut state = self.shared.state();
            state.sequence += 1;
            let sequence = state.sequence;
            let mut record = state
                .images
                .get(&self.id)
                .cloned()
                .unwrap_or_else(|| self.new_record());
            record.layers = self.layer_infos();
            record.add_names(tag.as_deref(), &digest, sequence);
            (record, sequence)
        };
        write_record(&paths.images, &ImageRecord::file_name(&self.id), &record)?;
        let former = {
            let mut state = self.shared.state();
            state.images.insert(self.id.clone(), record.clone());
            let mut former = Vec::new();
            for image in state
                .images
                .values_mut()
                .filter(|image| image.id != self.id)
            {
                let count = image.tags.len();
                image
                    .tags
                    .retain(|one| Some(&one.name) != tag.as_ref() || one.sequence > sequence);
                if image.tags.len() != count {
                    former.push(image.clone());
                }
            }
            former
        };
        for image in former {
            // The sequence decides at the next open if this does not reach the disk.
            if let Err(error) =
                write_record(&paths.images, &ImageRecord::file_name(&image.id), &image)
            {
                tracing::warn!(image = %image.id, %error, "cannot record a moved tag");
            }
        }
        Ok(record.to_image())
    }

    fn new_record(&self) -> ImageRecord {
        let manifest = &self.resolved.manifest;
        let layers: u64 = manifest.layers.iter().map(|layer| layer.size).sum();
        ImageRecord {
            format: FORMAT,
            id: self.id.clone(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: layers + manifest.config.size + self.resolved.size,
            config: self.config.config.clone(),
            created: self.config.created.clone(),
            pinned: false,
            layers: Vec::new(),
        }
    }

    fn layer_infos(&self) -> Vec<LayerInfo> {
        let blobs = self
            .resolved
            .manifest
            .layers
            .iter()
            .zip(&self.config.diff_ids);
        blobs
            .zip(&self.layers)
            .map(|((blob, diff_id), layer)| LayerInfo {
                diff_id: diff_id.clone(),
                blob: blob.digest.clone(),
                size: blob.size,
                media_type: blob.media_type.clone(),
                key: layer.key().to_owned(),
            })
            .collect()
    }
}
