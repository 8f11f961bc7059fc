//! Owns the crate's public types. Never touches the disk or the network itself.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, ImageId};

/// Where the store lives and how it pulls.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The store's directory; created 0700 when absent.
    pub root: PathBuf,
    /// Directories in the layout of containerd's `certs.d`, first match wins; read at each pull.
    pub registry_config_dirs: Vec<PathBuf>,
    /// Layers of one pull that are downloaded and unpacked at the same time.
    pub max_parallel_layers: usize,
    /// A pull fails when a registry sends nothing for this long.
    pub pull_progress_timeout: Duration,
}

impl StoreConfig {
    /// The defaults of the daemon for the store in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        StoreConfig {
            root: root.into(),
            registry_config_dirs: Vec::new(),
            max_parallel_layers: 3,
            pull_progress_timeout: Duration::from_secs(60),
        }
    }
}

/// Credentials of one pull, as CRI's `AuthConfig` carries them. Used for that pull only.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    /// User name.
    pub username: String,
    /// Password; an identity token when `username` is `<token>`.
    pub password: String,
    /// base64 of `user:password`, used when `username` is empty.
    pub auth: String,
    /// The registry these credentials are for; any registry of the pull when empty.
    pub server_address: String,
    /// A refresh token, exchanged by POST for a registry token.
    pub identity_token: String,
    /// A bearer token sent to the registry as it is.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// What to pull.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// A reference in any form docker accepts.
    pub reference: String,
    /// Credentials, if any.
    pub auth: Option<Auth>,
}

/// The parts of an image's config that a container inherits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Entrypoint.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty means root.
    pub user: String,
    /// Paths declared by VOLUME. Data, not policy: nothing is mounted because of it.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The signal that stops a container, as written in the image.
    pub stop_signal: Option<String>,
    /// Declared ports, as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// GOOS name.
    pub os: String,
    /// GOARCH name.
    pub architecture: String,
    /// Variant of the architecture, such as `v8`; empty when there is none.
    pub variant: String,
}

/// One layer of an image, bottom first in [`Image::layers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Digest of the blob as the registry serves it.
    pub blob: Digest,
    /// Size of the blob.
    pub size: u64,
    /// Media type of the blob, as the manifest names it.
    pub media_type: String,
    /// Name of the directory below `layers/`.
    pub(crate) key: String,
}

/// An image of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the config.
    pub id: ImageId,
    /// Full tags, `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Full digest references, `docker.io/library/busybox@sha256:...`.
    pub repo_digests: Vec<String>,
    /// Bytes of manifest, config and layer blobs, as the registry serves them.
    pub size: u64,
    /// What a container inherits.
    pub config: ImageConfig,
    /// Never removed by a garbage collector.
    pub pinned: bool,
    /// Creation time as written in the config (RFC 3339).
    pub created: Option<String>,
    /// Layers, bottom first.
    pub layers: Vec<LayerInfo>,
}

/// Space used by all layers of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// The store's root.
    pub mountpoint: PathBuf,
    /// Bytes allocated.
    pub bytes: u64,
    /// Inodes used.
    pub inodes: u64,
    /// When the figures were taken, nanoseconds since the epoch.
    pub timestamp_ns: i64,
}

/// Space used by one snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated.
    pub bytes: u64,
    /// Inodes used.
    pub inodes: u64,
}

/// The directories of a container's file system; nothing is mounted by this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The caller's key, a container id.
    pub key: String,
    /// Read-only directories, top first; never empty.
    pub lower: Vec<PathBuf>,
    /// The writable directory.
    pub upper: PathBuf,
    /// Overlayfs work directory, on the same file system as `upper`.
    pub work: PathBuf,
}

impl Snapshot {
    /// Options of a mount of type `overlay` with source `overlay`.
    ///
    /// mount(2) takes one page of options: with many layers use fsconfig `lowerdir+` (Linux 6.5)
    /// once for each of [`Snapshot::lower`].
    pub fn overlay_options(&self) -> Vec<String> {
        let lower: Vec<String> = self.lower.iter().map(|p| p.display().to_string()).collect();
        vec![
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={}", self.upper.display()),
            format!("workdir={}", self.work.display()),
            // An index would tie the upper directory to one lower set and refuse a second mount.
            "index=off".to_owned(),
        ]
    }
}

/// Where the time of a pull went. Layers overlap, so stage times add up to more than `total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullTimes {
    /// Manifest and config.
    pub resolve: Duration,
    /// From the first layer's request to the last layer's verified end.
    pub layers: Duration,
    /// Waiting for bytes of layers, summed.
    pub network: Duration,
    /// Hashing and decompressing, summed.
    pub inflate: Duration,
    /// Hashing and extracting, summed.
    pub extract: Duration,
    /// Syncing, renaming and recording.
    pub commit: Duration,
    /// The whole pull.
    pub total: Duration,
    /// Layers that were fetched; the others were here.
    pub fetched: usize,
    /// Bytes of the layers fetched.
    pub bytes: u64,
}
