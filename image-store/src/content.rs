//! Owns what the store remembers: layer, image and snapshot records, their files, and the index of
//! them in memory. Decides nothing about the network or about unpacking.
//!
//! A record is written as temporary file, fsync, rename, fsync of the directory; a reader sees the
//! old one or the new one. `images/<id>.json` is the only commit point of an image.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::{Image, ImageConfig, LayerInfo};
use crate::digest::{Digest, ImageId};
use crate::error::{Error, ErrorKind, Result};
use crate::reference::Reference;

/// Version of every record and of the directory layout.
pub(crate) const FORMAT: u32 = 1;
/// Shorter prefixes of an id are taken for names.
const PREFIX_MIN: usize = 3;

/// `layers/<key>/layer.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) format: u32,
    pub(crate) diff_id: Digest,
    pub(crate) blob: Digest,
    pub(crate) blob_size: u64,
    pub(crate) entries: u64,
    /// Bytes allocated and inodes of `fs/`.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// The layer itself says what `/` looks like.
    pub(crate) has_root: bool,
    /// Nothing of the layers below is visible.
    pub(crate) opaque_root: bool,
}

/// A tag and when it was given; the highest number owns the tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TagRecord {
    pub(crate) name: String,
    pub(crate) sequence: u64,
}

/// `images/<id>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) format: u32,
    pub(crate) id: ImageId,
    pub(crate) tags: Vec<TagRecord>,
    pub(crate) digests: Vec<String>,
    pub(crate) size: u64,
    pub(crate) config: ImageConfig,
    pub(crate) created: Option<String>,
    pub(crate) pinned: bool,
    pub(crate) layers: Vec<LayerInfo>,
}

impl ImageRecord {
    pub(crate) fn file_name(id: &ImageId) -> String {
        format!("{}.json", id.hex())
    }

    pub(crate) fn to_image(&self) -> Image {
        Image {
            id: self.id.clone(),
            repo_tags: self.tags.iter().map(|tag| tag.name.clone()).collect(),
            repo_digests: self.digests.clone(),
            size: self.size,
            config: self.config.clone(),
            pinned: self.pinned,
            created: self.created.clone(),
            layers: self.layers.clone(),
        }
    }

    /// Adds names. A tag of this image is renewed, a digest is kept once.
    pub(crate) fn add_names(&mut self, tag: Option<&str>, digest: &str, sequence: u64) {
        if let Some(name) = tag {
            self.tags.retain(|one| one.name != name);
            self.tags.push(TagRecord {
                name: name.to_owned(),
                sequence,
            });
        }
        if !self.digests.iter().any(|one| one == digest) {
            self.digests.push(digest.to_owned());
        }
    }
}

/// `snapshots/<key>/snapshot.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub(crate) format: u32,
    pub(crate) image: ImageId,
    /// Layer keys, top first; those hidden by an opaque root left out.
    pub(crate) layers: Vec<String>,
}

/// The index in memory.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) images: BTreeMap<ImageId, ImageRecord>,
    pub(crate) layers: HashMap<String, LayerRecord>,
    pub(crate) snapshots: BTreeMap<String, SnapshotRecord>,
    /// Layers that live pulls rely on, and how many do.
    pub(crate) pins: HashMap<String, usize>,
    /// Highest tag sequence given out.
    pub(crate) sequence: u64,
    /// Sums over `layers`.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl State {
    pub(crate) fn add_layer(&mut self, key: String, record: LayerRecord) {
        self.bytes += record.bytes;
        self.inodes += record.inodes;
        if let Some(old) = self.layers.insert(key, record) {
            self.bytes -= old.bytes;
            self.inodes -= old.inodes;
        }
    }

    pub(crate) fn remove_layer(&mut self, key: &str) {
        if let Some(old) = self.layers.remove(key) {
            self.bytes -= old.bytes;
            self.inodes -= old.inodes;
        }
    }

    pub(crate) fn pin(&mut self, key: &str) {
        *self.pins.entry(key.to_owned()).or_insert(0) += 1;
    }

    pub(crate) fn unpin(&mut self, key: &str) {
        if let Some(count) = self.pins.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(key);
            }
        }
    }

    /// Layers that no image, snapshot or live pull needs.
    pub(crate) fn unreferenced(&self) -> Vec<String> {
        let mut needed: HashSet<&str> = self.pins.keys().map(String::as_str).collect();
        for image in self.images.values() {
            needed.extend(image.layers.iter().map(|layer| layer.key.as_str()));
        }
        for snapshot in self.snapshots.values() {
            needed.extend(snapshot.layers.iter().map(String::as_str));
        }
        self.layers
            .keys()
            .filter(|key| !needed.contains(key.as_str()))
            .cloned()
            .collect()
    }

    /// Finds an image by id, name or unique prefix of an id.
    pub(crate) fn find(&self, text: &str) -> Option<&ImageRecord> {
        let text = text.trim();
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let is_hex = !hex.is_empty()
            && hex.len() <= 64
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if is_hex
            && hex.len() == 64
            && let Some(found) = ImageId::parse(&format!("sha256:{hex}"))
                .ok()
                .and_then(|id| self.images.get(&id))
        {
            return Some(found);
        }
        if let Ok(reference) = Reference::parse(text)
            && let Some(found) = self.find_name(&reference)
        {
            return Some(found);
        }
        if !is_hex || hex.len() < PREFIX_MIN {
            return None;
        }
        let mut matching = self
            .images
            .values()
            .filter(|image| image.id.hex().starts_with(hex));
        match (matching.next(), matching.next()) {
            (Some(one), None) => Some(one),
            _ => None,
        }
    }

    fn find_name(&self, reference: &Reference) -> Option<&ImageRecord> {
        if let Some(tag) = reference.tag_name() {
            return self
                .images
                .values()
                .find(|i| i.tags.iter().any(|t| t.name == tag));
        }
        let name = reference.digest_name(reference.digest()?);
        self.images
            .values()
            .find(|image| image.digests.contains(&name))
    }
}

/// The name of a layer's directory: its content when that is all there is to it, else also what
/// lies below.
pub(crate) fn layer_key(diff_id: &Digest) -> String {
    diff_id.hex().to_owned()
}

pub(crate) fn chain_key(chain_id: &Digest) -> String {
    format!("chain-{}", chain_id.hex())
}

/// ChainIDs, bottom first (image-spec config.md, "Layer ChainID").
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => Digest::sha256(format!("{below} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

/// Reads a record. A damaged one is `Corrupt`.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path)
        .map_err(|error| Error::io("read", path.display().to_string(), error))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::new(ErrorKind::Corrupt, "read", path.display().to_string()).because(error)
    })
}

/// Writes a record durably.
pub(crate) fn write_record<T: Serialize>(directory: &Path, name: &str, record: &T) -> Result<()> {
    let temporary = directory.join(format!(".{name}.tmp"));
    let written = write_new(&temporary, record, true).and_then(|()| {
        let path = directory.join(name);
        std::fs::rename(&temporary, &path)
            .map_err(|error| Error::io("rename to", path.display().to_string(), error))
    });
    if written.is_err() {
        // The record itself is untouched; what is left would be removed at the next open.
        let _ = std::fs::remove_file(&temporary);
        return written;
    }
    sync_directory(directory)
}

/// Writes a file that is not yet reachable.
pub(crate) fn write_new<T: Serialize>(path: &Path, record: &T, sync: bool) -> Result<()> {
    let failed = |call| move |error| Error::io(call, path.display().to_string(), error);
    let mut bytes = serde_json::to_vec(record).map_err(|error| {
        Error::new(ErrorKind::Internal, "encode", path.display().to_string()).because(error)
    })?;
    bytes.push(b'\n');
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create"))?;
    file.write_all(&bytes).map_err(failed("write"))?;
    if sync {
        file.sync_all().map_err(failed("fsync"))?;
    }
    Ok(())
}

pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io("fsync", path.display().to_string(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(seed: u8, tags: &[&str], digests: &[String], layers: &[&str]) -> ImageRecord {
        ImageRecord {
            format: FORMAT,
            id: ImageId::from_config_digest(Digest::sha256(&[seed])).expect("sha256"),
            tags: tags
                .iter()
                .map(|name| TagRecord {
                    name: (*name).to_owned(),
                    sequence: 1,
                })
                .collect(),
            digests: digests.to_vec(),
            size: 1,
            config: ImageConfig::default(),
            created: None,
            pinned: false,
            layers: layers
                .iter()
                .map(|key| LayerInfo {
                    diff_id: Digest::sha256(key.as_bytes()),
                    blob: Digest::sha256(key.as_bytes()),
                    size: 1,
                    media_type: String::new(),
                    key: (*key).to_owned(),
                })
                .collect(),
        }
    }

    fn layer(bytes: u64) -> LayerRecord {
        LayerRecord {
            format: FORMAT,
            diff_id: Digest::sha256(b"d"),
            blob: Digest::sha256(b"b"),
            blob_size: 1,
            entries: 1,
            bytes,
            inodes: 2,
            has_root: false,
            opaque_root: false,
        }
    }

    #[test]
    fn find_by_every_name() {
        let manifest = Digest::sha256(b"m");
        let digest_name = format!("localhost:5000/a@{manifest}");
        let mut state = State::default();
        let one = image(1, &["docker.io/library/busybox:latest"], &[], &[]);
        let two = image(
            2,
            &["localhost:5000/a:t"],
            std::slice::from_ref(&digest_name),
            &[],
        );
        state.images.insert(one.id.clone(), one.clone());
        state.images.insert(two.id.clone(), two.clone());
        let hex = one.id.hex();
        for (text, wanted) in [
            ("busybox", Some(&one)),
            ("busybox:latest", Some(&one)),
            ("docker.io/library/busybox", Some(&one)),
            ("busybox:other", None),
            (&format!("sha256:{hex}"), Some(&one)),
            (hex, Some(&one)),
            (&hex[..12], Some(&one)),
            (&format!("sha256:{}", &hex[..12]), Some(&one)),
            (&hex[..2], None),
            ("localhost:5000/a:t", Some(&two)),
            (&digest_name, Some(&two)),
            (&format!("localhost:5000/a:whatever@{manifest}"), Some(&two)),
            (&format!("localhost:5000/b@{manifest}"), None),
            ("", None),
            ("ffffffffffff", None),
            ("../../etc", None),
        ] {
            assert_eq!(
                state.find(text).map(|i| &i.id),
                wanted.map(|i| &i.id),
                "{text}"
            );
        }
        // An ambiguous prefix finds nothing.
        let mut ambiguous = State::default();
        for seed in 0..=255 {
            let image = image(seed, &[], &[], &[]);
            ambiguous.images.insert(image.id.clone(), image);
        }
        let first = ambiguous.images.keys().next().expect("one").hex()[..3].to_owned();
        let count = ambiguous
            .images
            .keys()
            .filter(|id| id.hex().starts_with(&first))
            .count();
        assert_eq!(ambiguous.find(&first).is_some(), count == 1);
    }

    #[test]
    fn unreferenced_respects_images_snapshots_and_pins() {
        let mut state = State::default();
        for key in ["a", "b", "c", "d"] {
            state.add_layer(key.to_owned(), layer(10));
        }
        let image = image(1, &[], &[], &["a"]);
        state.images.insert(image.id.clone(), image.clone());
        state.snapshots.insert(
            "s".into(),
            SnapshotRecord {
                format: FORMAT,
                image: image.id,
                layers: vec!["b".into()],
            },
        );
        state.pin("c");
        state.pin("c");
        assert_eq!(state.unreferenced(), ["d"]);
        state.unpin("c");
        assert_eq!(state.unreferenced(), ["d"]);
        state.unpin("c");
        assert_eq!(state.unreferenced().len(), 2);
        assert_eq!((state.bytes, state.inodes), (40, 8));
        state.remove_layer("d");
        state.remove_layer("d");
        state.add_layer("a".into(), layer(1));
        assert_eq!((state.bytes, state.inodes), (21, 6));
    }

    #[test]
    fn chain_ids_follow_the_image_spec() {
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        let chain = chain_ids(&[a.clone(), b.clone()]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::sha256(format!("{a} {b}").as_bytes()));
    }

    #[test]
    fn records_survive_the_round_trip_and_damage_is_told() {
        let dir = tempfile::tempdir().expect("temp dir");
        let record = image(1, &["a:b"], &[], &["k"]);
        write_record(dir.path(), "x.json", &record).expect("write");
        let read: ImageRecord = read_record(&dir.path().join("x.json")).expect("read");
        assert_eq!(read, record);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
        std::fs::write(dir.path().join("y.json"), "{\"format\":1").expect("write");
        let error = read_record::<ImageRecord>(&dir.path().join("y.json")).expect_err("damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}
