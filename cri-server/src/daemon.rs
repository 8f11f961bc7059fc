//! Owns what all parts of the daemon share: configuration, tables, the image store, the network.
//! Does nothing by itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coracle_image_store::{ImageStore, StoreConfig};

use crate::config::{Config, RuntimeConfig};
use crate::container::config::ContainerName;
use crate::error::{Error, Kind, Result};
use crate::events::Events;
use crate::host::HostFacts;
use crate::id::{ContainerId, SandboxId};
use crate::network::{Network, NetworkError, NetworkErrorKind};
use crate::sandbox::config::SandboxName;
use crate::shim_client::Shim;
use crate::spec_builder::image_root::AccountCache;
use crate::store::Registry;
use crate::store::jobs::Jobs;
use crate::store::records::{Records, make_private_dir};
use crate::streaming::StreamingServer;

/// Names of our own binaries.
const RUNTIME: &str = "coracle";
const SHIM: &str = "containerd-shim-coracle-v2";

/// A runtime handler, ready to use.
#[derive(Debug, Clone)]
pub struct Handler {
    /// How to start its shims.
    pub shim: Shim,
    /// The runtime binary that the shim runs.
    pub runtime: PathBuf,
    /// The runtime's `--root`.
    pub runtime_root: PathBuf,
}

/// Everything shared. Always used through an `Arc`.
pub struct Daemon {
    /// Configuration.
    pub config: Config,
    /// Facts about the host.
    pub host: HostFacts,
    /// Images.
    pub images: ImageStore,
    /// Pod networks.
    pub network: Network,
    /// Sandboxes and containers.
    pub registry: Registry,
    /// Their records.
    pub records: Records,
    /// Names of sandboxes.
    pub sandbox_names: Jobs<SandboxName, SandboxId>,
    /// Names of containers, by sandbox.
    pub container_names: Jobs<(SandboxId, ContainerName), ContainerId>,
    /// Accounts of images.
    pub accounts: AccountCache,
    /// Runtime handlers; the default one also under the empty name.
    pub handlers: BTreeMap<String, Handler>,
    /// The binary that is PID 1 of pid namespaces that a pod's containers share: our own runtime,
    /// whatever runtime the pod's handler has.
    pub init_binary: PathBuf,
    /// What happened to containers.
    pub events: Events,
    /// Becomes true when the connections of earlier lives are sorted out.
    pub network_swept: tokio::sync::watch::Sender<bool>,
    /// Becomes true when the daemon is to end; endless answers end then.
    pub stopping: tokio::sync::watch::Sender<bool>,
    /// The streaming server, once it listens.
    pub streaming: OnceLock<StreamingServer>,
    /// Features of the runtimes by handler, once they have been asked.
    pub rro_mounts: OnceLock<BTreeMap<String, bool>>,
}

impl Daemon {
    /// Opens the stores. Nothing is recovered and nothing is served yet.
    pub fn open(config: Config) -> Result<Arc<Daemon>> {
        for dir in [&config.root, &config.state] {
            make_private_dir(dir)?;
        }
        for name in ["sandboxes", "containers", "runtime", "s"] {
            make_private_dir(&config.state.join(name))?;
        }
        let images = ImageStore::open(StoreConfig {
            root: config.root.join("images"),
            registry_config_dirs: config.image.registry_config_dirs.clone(),
            max_parallel_layers: config.image.max_parallel_layers,
            pull_progress_timeout: Duration::from_secs(config.image.pull_progress_timeout_seconds),
        })?;
        let network = Network::open(config.network.clone())?;
        Ok(Arc::new(Daemon {
            host: HostFacts::probe()?,
            images,
            network,
            registry: Registry::default(),
            records: Records::open(&config.root)?,
            sandbox_names: Jobs::default(),
            container_names: Jobs::default(),
            accounts: AccountCache::default(),
            handlers: handlers(&config)?,
            init_binary: find_binary(Path::new(""), RUNTIME, "pod init")?,
            events: Events::default(),
            network_swept: tokio::sync::watch::Sender::new(false),
            stopping: tokio::sync::watch::Sender::new(false),
            streaming: OnceLock::new(),
            rro_mounts: OnceLock::new(),
            config,
        }))
    }

    /// The handler of a pod.
    pub fn handler(&self, name: &str) -> Result<&Handler> {
        self.handlers.get(name).ok_or_else(|| {
            let text = format!("no runtime handler {name:?} is configured");
            Error::invalid("runtime_handler", text)
        })
    }

    /// Directory of a sandbox's files of this boot.
    pub fn sandbox_dir(&self, id: &SandboxId) -> PathBuf {
        self.config.state.join("sandboxes").join(id.as_str())
    }

    /// Bundle of a container.
    pub fn bundle(&self, id: &ContainerId) -> PathBuf {
        self.config.state.join("containers").join(id.as_str())
    }

    /// Directory of a container's image volumes.
    pub fn volumes_dir(&self, id: &ContainerId) -> PathBuf {
        self.config.root.join("volumes").join(id.as_str())
    }
}

fn handlers(config: &Config) -> Result<BTreeMap<String, Handler>> {
    let mut handlers = BTreeMap::new();
    for (name, runtime) in &config.runtimes {
        handlers.insert(name.clone(), handler(config, name, runtime)?);
    }
    if let Some(default) = handlers.get(&config.default_runtime).cloned() {
        handlers.insert(String::new(), default);
    }
    Ok(handlers)
}

fn handler(config: &Config, name: &str, runtime: &RuntimeConfig) -> Result<Handler> {
    let at = |key: &str| format!("config: runtimes.{name}.{key}");
    let shim = find_binary(&runtime.shim, SHIM, &at("shim"))?;
    Ok(Handler {
        shim: Shim {
            binary: shim,
            socket_dir: config.state.join("s"),
        },
        runtime: find_binary(&runtime.runtime, RUNTIME, &at("runtime"))?,
        runtime_root: config.state.join("runtime"),
    })
}

/// The configured path, else the binary beside our own, else the one in PATH.
fn find_binary(configured: &Path, name: &str, key: &str) -> Result<PathBuf> {
    if !configured.as_os_str().is_empty() {
        if configured.is_file() {
            return Ok(configured.to_path_buf());
        }
        let text = format!("{} is not a file", configured.display());
        return Err(Error::invalid(key, text));
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|dir| dir.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join(name));
    beside
        .into_iter()
        .chain(in_path)
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            let text = format!("{name} is neither beside coracled nor in PATH");
            Error::invalid(key, text)
        })
}

/// Nanoseconds since the epoch, now.
pub fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Runs work that blocks (files, mounts) off the async threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(e) => Err(Error::new(Kind::Internal, "a worker thread failed", "").because(e)),
    }
}

/// Runs work outside the request that asked for it: a client that hangs up does not leave it half
/// done.
pub async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(answer) => answer,
        Err(e) => Err(Error::new(Kind::Internal, "a task failed", "").because(e)),
    }
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let kind = match error.kind() {
            NetworkErrorKind::Invalid => Kind::InvalidArgument,
            NetworkErrorKind::Conflict => Kind::FailedPrecondition,
            NetworkErrorKind::Exhausted => Kind::ResourceExhausted,
            NetworkErrorKind::NotReady => Kind::Unavailable,
            NetworkErrorKind::Timeout => Kind::DeadlineExceeded,
            NetworkErrorKind::Plugin | NetworkErrorKind::Kernel | NetworkErrorKind::Io => {
                Kind::Internal
            }
        };
        Error::new(kind, error.to_string(), "")
    }
}
