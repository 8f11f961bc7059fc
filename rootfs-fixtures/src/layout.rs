//! Writes images as an OCI image layout: `blobs/sha256`, `index.json` with one manifest per name.
//! A layout is complete when `fixtures.key` is there: that file is written last.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::tree::{Compression, Layer, Tree};

const KEY_FILE: &str = "fixtures.key";

/// How the manifest names its parts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Oci,
    /// Docker image manifest version 2, schema 2.
    Docker,
}

pub struct Config {
    pub entrypoint: Vec<&'static str>,
    pub cmd: Vec<&'static str>,
    pub env: Vec<&'static str>,
    pub user: &'static str,
    pub working_dir: &'static str,
    pub volumes: Vec<&'static str>,
    pub labels: Vec<(&'static str, &'static str)>,
    pub stop_signal: &'static str,
    pub exposed_ports: Vec<&'static str>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            entrypoint: Vec::new(),
            cmd: Vec::new(),
            env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            user: "",
            working_dir: "",
            volumes: Vec::new(),
            labels: Vec::new(),
            stop_signal: "",
            exposed_ports: Vec::new(),
        }
    }
}

/// A manifest or index that is in the layout.
#[derive(Clone)]
pub struct Stored {
    pub media_type: String,
    pub digest: String,
    pub size: u64,
}

pub struct Layout {
    root: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    pub fn create(root: &Path) -> Result<Self> {
        fs::create_dir_all(root.join("blobs/sha256"))?;
        fs::write(
            root.join("oci-layout"),
            "{\"imageLayoutVersion\":\"1.0.0\"}\n",
        )?;
        Ok(Self {
            root: root.to_owned(),
            manifests: Vec::new(),
        })
    }

    /// True when `root` holds a whole layout made from `key`.
    pub fn is_current(root: &Path, key: &str) -> bool {
        fs::read_to_string(root.join(KEY_FILE)).is_ok_and(|k| k == key)
    }

    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub fn layer(&self, tree: &Tree, compression: Compression) -> Result<Layer> {
        tree.write(compression, &self.blobs())
            .context("write layer")
    }

    pub fn blob(&self, bytes: &[u8], media_type: &str) -> Result<Stored> {
        let digest = crate::hex(&Sha256::digest(bytes));
        fs::write(self.blobs().join(&digest), bytes)?;
        Ok(Stored {
            media_type: media_type.to_owned(),
            digest,
            size: bytes.len() as u64,
        })
    }

    /// Config and manifest over layers that are stored already.
    pub fn image(
        &self,
        layers: &[Layer],
        config: &Config,
        format: Format,
        architecture: &str,
    ) -> Result<Stored> {
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|l| format!("sha256:{}", l.diff_id))
            .collect();
        let document = config.document(&diff_ids, architecture);
        self.manifest(layers, &serde_json::to_vec(&document)?, format)
    }

    /// As `image`, with the config's bytes given: for images that must be refused.
    pub fn manifest(&self, layers: &[Layer], config: &[u8], format: Format) -> Result<Stored> {
        let (manifest_type, config_type) = match format {
            Format::Oci => (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
            ),
            Format::Docker => (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
            ),
        };
        let config = self.blob(config, config_type)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config.descriptor(),
            "layers": layers.iter().map(|l| json!({
                "mediaType": layer_type(format, l.compression),
                "digest": format!("sha256:{}", l.digest),
                "size": l.size,
            })).collect::<Vec<_>>(),
        });
        self.blob(&serde_json::to_vec(&manifest)?, manifest_type)
    }

    /// An index over manifests, each with its architecture.
    pub fn index(&self, manifests: &[(Stored, &str)]) -> Result<Stored> {
        let media_type = "application/vnd.oci.image.index.v1+json";
        let document = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "manifests": manifests.iter().map(|(stored, architecture)| {
                let mut descriptor = stored.descriptor();
                descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
                descriptor
            }).collect::<Vec<_>>(),
        });
        self.blob(&serde_json::to_vec(&document)?, media_type)
    }

    /// Gives a stored manifest or index a full image name.
    pub fn name(&mut self, stored: &Stored, name: &str) {
        let mut descriptor = stored.descriptor();
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        self.manifests.push(descriptor);
    }

    pub fn finish(self, key: &str) -> Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        fs::write(self.root.join("index.json"), format!("{index:#}\n"))?;
        fs::write(self.root.join(KEY_FILE), key)?;
        Ok(())
    }
}

impl Stored {
    fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type,
            "digest": format!("sha256:{}", self.digest),
            "size": self.size,
        })
    }
}

impl Config {
    fn document(&self, diff_ids: &[String], architecture: &str) -> Value {
        let mut config = serde_json::Map::new();
        let mut put = |key: &str, value: Value, empty: bool| {
            if !empty {
                config.insert(key.to_owned(), value);
            }
        };
        let set = |names: &[&str]| -> Value {
            names
                .iter()
                .map(|n| ((*n).to_owned(), json!({})))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        put("User", json!(self.user), self.user.is_empty());
        put("Env", json!(self.env), self.env.is_empty());
        put(
            "Entrypoint",
            json!(self.entrypoint),
            self.entrypoint.is_empty(),
        );
        put("Cmd", json!(self.cmd), self.cmd.is_empty());
        put(
            "WorkingDir",
            json!(self.working_dir),
            self.working_dir.is_empty(),
        );
        put("Volumes", set(&self.volumes), self.volumes.is_empty());
        put(
            "ExposedPorts",
            set(&self.exposed_ports),
            self.exposed_ports.is_empty(),
        );
        put(
            "StopSignal",
            json!(self.stop_signal),
            self.stop_signal.is_empty(),
        );
        let labels: serde_json::Map<_, _> = self
            .labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), json!(v)))
            .collect();
        put("Labels", Value::Object(labels), self.labels.is_empty());
        json!({
            "created": "2024-01-01T00:00:00Z",
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({
                "created": "2024-01-01T00:00:00Z",
                "created_by": "fixtures",
            })).collect::<Vec<_>>(),
        })
    }
}

fn layer_type(format: Format, compression: Compression) -> &'static str {
    match (format, compression) {
        (Format::Oci, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
        (Format::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
        (_, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        (Format::Docker, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
        (Format::Docker, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
    }
}

/// A name of the layout's index with what it points to.
pub struct Named {
    pub name: String,
    pub media_type: String,
    pub digest: String,
}

pub fn read_index(root: &Path) -> Result<Vec<Named>> {
    let path = root.join("index.json");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let index: Value = serde_json::from_slice(&text)?;
    let mut names = Vec::new();
    for manifest in index["manifests"].as_array().into_iter().flatten() {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        names.push(Named {
            name: text(&manifest["annotations"]["org.opencontainers.image.ref.name"]),
            media_type: text(&manifest["mediaType"]),
            digest: text(&manifest["digest"])
                .trim_start_matches("sha256:")
                .to_owned(),
        });
    }
    Ok(names)
}

/// Digests that a manifest or index refers to: (manifests, blobs), hex.
pub fn references(document: &[u8]) -> Result<(Vec<String>, Vec<String>)> {
    let document: Value = serde_json::from_slice(document)?;
    let digest = |v: &Value| -> Option<String> {
        Some(
            v["digest"]
                .as_str()?
                .trim_start_matches("sha256:")
                .to_owned(),
        )
    };
    let list = |v: &Value| -> Vec<String> {
        v.as_array()
            .into_iter()
            .flatten()
            .filter_map(digest)
            .collect()
    };
    let mut blobs: Vec<String> = digest(&document["config"]).into_iter().collect();
    blobs.extend(list(&document["layers"]));
    Ok((list(&document["manifests"]), blobs))
}
