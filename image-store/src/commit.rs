//! Owns making an image out of unpacked layers: complete them, sync once, rename them into place,
//! write the image's record. That record is the commit point; what precedes it is unreachable and
//! collected if the record is never written.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::api::{Image, LayerInfo};
use crate::content::{FORMAT, ImageRecord, sync_directory, write_record};
use crate::digest::ImageId;
use crate::error::{Error, Result};
use crate::layer::{Layer, Pins, StagedLayer};
use crate::reference::Reference;
use crate::registry::Resolved;
use crate::registry::document::Config;
use crate::store::{Shared, open_directory};
use crate::unpack::adopt::adopt;

/// Everything a pull found, ready to become an image.
pub(crate) struct Commit {
    pub(crate) shared: Arc<Shared>,
    pub(crate) reference: Reference,
    pub(crate) id: ImageId,
    pub(crate) resolved: Resolved,
    pub(crate) config: Config,
    pub(crate) layers: Vec<Layer>,
    /// Until the record is written.
    pub(crate) _pins: Arc<Pins>,
}

impl Commit {
    pub(crate) fn run(self) -> Result<Image> {
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
