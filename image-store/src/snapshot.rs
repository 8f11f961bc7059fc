//! Owns container file systems: a lower list from an image, an upper and a work directory per key.
//! Mounts nothing.
//!
//! A snapshot is prepared in `staging/` and appears by one rename. It is not synced: it belongs to
//! a container, and no container outlives a power cut.

use std::fs::DirBuilder;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{Mode, fchmod, fchown, fstat, futimens};

use crate::api::{Snapshot, Usage};
use crate::content::{FORMAT, ImageRecord, LayerRecord, SnapshotRecord, State, write_new};
use crate::digest::ImageId;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Shared, missing_image, open_directory};

pub(crate) fn create(shared: &Shared, key: &str, image_id: &ImageId) -> Result<Snapshot> {
    check_key(key)?;
    let record = {
        let mut state = shared.state();
        if let Some(existing) = state.snapshots.get(key) {
            if existing.image != *image_id {
                return Err(
                    Error::new(ErrorKind::InvalidReference, "create snapshot", key)
                        .because(format!("it exists, for image {}", existing.image)),
                );
            }
            return Ok(describe(shared, key, existing));
        }
        let image = state
            .images
            .get(image_id)
            .ok_or_else(|| missing_image(image_id))?;
        let record = SnapshotRecord {
            format: FORMAT,
            image: image_id.clone(),
            layers: visible_layers(image, &state),
        };
        // Removing the image from now on leaves these layers.
        record.layers.iter().for_each(|layer| state.pin(layer));
        record
    };
    let made = make(shared, key, &record);
    let mut state = shared.state();
    record.layers.iter().for_each(|layer| state.unpin(layer));
    let kept = made.map(|()| {
        state
            .snapshots
            .entry(key.to_owned())
            .or_insert(record)
            .clone()
    });
    drop(state);
    match kept {
        Ok(record) => Ok(describe(shared, key, &record)),
        Err(error) => {
            shared.collect();
            Err(error.within("create snapshot", key))
        }
    }
}

fn make(shared: &Shared, key: &str, record: &SnapshotRecord) -> Result<()> {
    let staging = shared.make_staging()?;
    let made = fill(shared, &staging, record).and_then(|()| {
        let path = shared.paths.snapshots.join(key);
        match std::fs::rename(&staging, &path) {
            // Someone else made it just now.
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                shared.collector.discard(&staging)
            }
            Err(error) => Err(Error::io("rename to", path.display().to_string(), error)),
            Ok(()) => Ok(()),
        }
    });
    if made.is_err()
        && let Err(error) = shared.collector.discard(&staging)
    {
        tracing::warn!(%error, "cannot discard a half-made snapshot");
    }
    made
}

fn fill(shared: &Shared, staging: &Path, record: &SnapshotRecord) -> Result<()> {
    for name in ["upper", "work"] {
        let path = staging.join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| Error::io("mkdir", path.display().to_string(), error))?;
    }
    dress_upper(shared, &staging.join("upper"), record)?;
    write_new(&staging.join("snapshot.json"), record, false)
}

/// The merged root is the upper directory: it must look like the root of the topmost layer that
/// says what that is.
fn dress_upper(shared: &Shared, upper: &Path, record: &SnapshotRecord) -> Result<()> {
    let with_root = {
        let state = shared.state();
        let has_root = |key: &&String| state.layers.get(*key).is_some_and(|layer| layer.has_root);
        record.layers.iter().find(has_root).cloned()
    };
    let failed = |call: &'static str| {
        let subject = upper.display().to_string();
        move |errno: rustix::io::Errno| Error::io(call, subject, errno)
    };
    let upper_fd = open_directory(upper)?;
    let Some(key) = with_root else {
        return fchmod(&upper_fd, Mode::from_raw_mode(0o755)).map_err(failed("chmod"));
    };
    let stat = fstat(open_directory(&shared.layer_path(&key))?).map_err(failed("fstat"))?;
    let owner = (
        rustix::fs::Uid::from_raw(stat.st_uid),
        rustix::fs::Gid::from_raw(stat.st_gid),
    );
    fchown(&upper_fd, Some(owner.0), Some(owner.1)).map_err(failed("chown"))?;
    fchmod(&upper_fd, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed("chmod"))?;
    let mtime = rustix::fs::Timespec {
        tv_sec: stat.st_mtime,
        tv_nsec: i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
    };
    let times = rustix::fs::Timestamps {
        last_access: mtime,
        last_modification: mtime,
    };
    futimens(&upper_fd, &times).map_err(failed("utimens"))
}

/// Layer keys, top first, without those that an opaque root hides.
fn visible_layers(image: &ImageRecord, state: &State) -> Vec<String> {
    let mut keys = Vec::new();
    for layer in image.layers.iter().rev() {
        // The same layer twice means nothing to a merged view, and overlayfs refuses it.
        if !keys.contains(&layer.key) {
            keys.push(layer.key.clone());
        }
        let record: Option<&LayerRecord> = state.layers.get(&layer.key);
        if record.is_some_and(|record| record.opaque_root) {
            break;
        }
    }
    keys
}

pub(crate) fn find(shared: &Shared, key: &str) -> Option<Snapshot> {
    let state = shared.state();
    state
        .snapshots
        .get(key)
        .map(|record| describe(shared, key, record))
}

fn describe(shared: &Shared, key: &str, record: &SnapshotRecord) -> Snapshot {
    let path = shared.paths.snapshots.join(key);
    let mut lower: Vec<_> = record
        .layers
        .iter()
        .map(|layer| shared.layer_path(layer))
        .collect();
    if lower.is_empty() {
        lower.push(shared.paths.empty.clone());
    }
    Snapshot {
        key: key.to_owned(),
        lower,
        upper: path.join("upper"),
        work: path.join("work"),
    }
}

pub(crate) fn remove(shared: &Shared, key: &str) -> Result<()> {
    check_key(key)?;
    shared
        .collector
        .discard(&shared.paths.snapshots.join(key))?;
    let was_there = shared.state().snapshots.remove(key).is_some();
    if was_there {
        shared.collect();
    }
    Ok(())
}

pub(crate) fn usage(shared: &Shared, key: &str) -> Result<Usage> {
    check_key(key)?;
    if !shared.state().snapshots.contains_key(key) {
        return Err(
            Error::new(ErrorKind::NotFound, "find snapshot", key).because("no such snapshot")
        );
    }
    let upper = shared.paths.snapshots.join(key).join("upper");
    let directory = open_directory(&upper)?;
    crate::gc::measure(directory.as_fd())
        .map_err(|error| Error::io("measure", upper.display().to_string(), error))
}

/// A key becomes a directory name and part of a mount option.
fn check_key(key: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if !key.is_empty() && key.len() <= 200 && key.bytes().all(allowed) && !key.starts_with('.') {
        return Ok(());
    }
    let shown: String = key.chars().take(200).flat_map(char::escape_debug).collect();
    Err(Error::new(
        ErrorKind::InvalidReference,
        "use as a snapshot key",
        format!("\"{shown}\""),
    )
    .because("only letters, digits, '_', '-' and '.' are allowed"))
}
