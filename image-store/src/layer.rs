//! Owns the way of layers from a registry into `staging/`: which are here already, which another
//! pull is making just now, and fetching the rest in parallel. Makes nothing part of the store.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OnceCell, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::api::PullTimes;
use crate::content::{FORMAT, LayerRecord, chain_ids, chain_key, layer_key, write_new};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::registry::document::{Config, Descriptor};
use crate::registry::{Registry, Resolved};
use crate::store::{Shared, open_directory};
use crate::unpack::apply::Unpacked;
use crate::unpack::{self, StageTimes};

/// Pieces of a download waiting for the inflating thread.
const CHUNKS: usize = 8;

/// Layers in the making, by ChainID: what is below decides how a layer is completed.
#[derive(Default)]
pub(crate) struct LayerSlots(Mutex<HashMap<Digest, Weak<Slot>>>);

pub(crate) type Slot = OnceCell<Arc<StagedLayer>>;

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

/// A layer unpacked and verified, not yet part of the store.
pub(crate) struct StagedLayer {
    shared: Arc<Shared>,
    /// `staging/<n>`; holds `fs/` and `layer.json`.
    pub(crate) path: PathBuf,
    /// `fs/`, wherever it is renamed to.
    pub(crate) directory: OwnedFd,
    pub(crate) key: String,
    pub(crate) record: LayerRecord,
    pub(crate) implicit: Vec<Vec<u8>>,
    pub(crate) adopted: Mutex<bool>,
    pub(crate) committed: AtomicBool,
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
pub(crate) enum Layer {
    /// In the store, pinned.
    Present { key: String, directory: OwnedFd },
    /// In staging, pinned. The slot is kept so that other pulls find the layer until the commit.
    Staged {
        staged: Arc<StagedLayer>,
        _slot: Arc<Slot>,
    },
}

impl Layer {
    /// Adds what fetching this layer cost.
    pub(crate) fn account(&self, times: &mut PullTimes) {
        if let Layer::Staged { staged, .. } = self {
            times.network += staged.cost.network;
            times.inflate += staged.cost.stages.inflate;
            times.extract += staged.cost.stages.extract;
            times.fetched += 1;
            times.bytes += staged.record.blob_size;
        }
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        match self {
            Layer::Present { directory, .. } => directory.as_fd(),
            Layer::Staged { staged, .. } => staged.directory.as_fd(),
        }
    }

    pub(crate) fn key(&self) -> &str {
        match self {
            Layer::Present { key, .. } => key,
            Layer::Staged { staged, .. } => &staged.key,
        }
    }
}

/// Keeps layers of the store from being collected while a pull relies on them.
pub(crate) struct Pins {
    shared: Arc<Shared>,
    keys: Mutex<Vec<String>>,
}

impl Pins {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Pins {
            shared: Arc::clone(shared),
            keys: Mutex::new(Vec::new()),
        }
    }

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

/// Gets every layer, bottom first, fetching what is missing in parallel.
pub(crate) async fn fetch_layers(
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
