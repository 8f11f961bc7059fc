//! Pods connected by CNI plugins, by the specification 0.1.0 to 1.1.0.
//!
//! ```text
//!   attach: cache(config) -> ADD p1 -> ADD p2(prevResult) -> ... -> cache(result)
//!           any failure: DEL of the whole chain, backwards
//!   detach: DEL pn ... p1 with the cached configuration and result -> cache removed
//! ```
//! DEL does not depend on the present configuration file, nor on the namespace being there.

mod cache;
mod call;
mod config;
mod exec;
mod request;
mod result;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tracing::{info, warn};

use super::config::NetworkConfig;
use super::error::{NetworkError, NetworkErrorKind, Result};
use super::pod::{Attached, POD_INTERFACE, PodNetwork};
use cache::{Cache, Entry};
use call::{Chain, Plugins, plugin_error, stdin};
use config::{ConfDir, Loaded, NetworkList};

/// How long an answer to STATUS counts.
const STATUS_AGE: Duration = Duration::from_secs(5);

pub(crate) struct Cni {
    conf: ConfDir,
    plugins: Plugins,
    cache: Cache,
    status: Arc<Mutex<Probe>>,
    /// Sandboxes detached by this process: a second detach calls no plugin again.
    detached: Mutex<HashSet<String>>,
}

/// The last answer to STATUS, for which network, and whether a newer one is being asked for.
#[derive(Default)]
struct Probe {
    network: Option<Arc<NetworkList>>,
    asked: Option<Instant>,
    answer: Option<std::result::Result<(), String>>,
}

impl Cni {
    pub(crate) fn open(config: &NetworkConfig) -> Result<Cni> {
        Ok(Cni {
            conf: ConfDir::new(config.cni_conf_dir.clone()),
            plugins: Plugins {
                bin_dirs: config.cni_bin_dirs.clone(),
                timeout: config.cni_timeout(),
            },
            cache: Cache::open(config.cni_cache_dir.clone())?,
            status: Arc::default(),
            detached: Mutex::default(),
        })
    }

    /// Whether there is a valid configuration at present.
    pub(crate) fn configured(&self) -> bool {
        self.conf.current().list.is_some()
    }

    /// Whether this sandbox was connected here and not yet disconnected.
    pub(crate) fn knows(&self, sandbox_id: &str) -> bool {
        self.cache.has(sandbox_id)
    }

    /// What is in force, for people.
    pub(crate) fn describe(&self) -> Value {
        let loaded = self.conf.current();
        let skipped: Vec<String> = loaded.skipped.iter().map(skipped_text).collect();
        let list = loaded.list.as_ref();
        json!({
            "confDir": self.conf.path(),
            "binDirs": self.plugins.bin_dirs,
            "file": list.map(|(path, _)| path),
            "network": list.map(|(_, list)| &list.name),
            "cniVersion": list.map(|(_, list)| list.version.as_str()),
            "plugins": list.map(|(_, l)| l.plugins.iter().map(|p| &p.kind).collect::<Vec<_>>()),
            "skipped": skipped,
        })
    }

    fn list(&self) -> Result<Arc<NetworkList>> {
        let loaded = self.conf.current();
        match &loaded.list {
            Some((_, list)) => Ok(Arc::clone(list)),
            None => Err(NetworkError::new(NetworkErrorKind::NotReady, "CNI", "")
                .cause(self.reason(&loaded))),
        }
    }

    fn reason(&self, loaded: &Loaded) -> String {
        let mut reason = format!(
            "no valid network configuration in {}",
            self.conf.path().display()
        );
        for file in &loaded.skipped {
            reason.push_str("; skipped ");
            reason.push_str(&skipped_text(file));
        }
        reason
    }

    /// Never waits: a network of version 1.1.0 is asked by STATUS in the background.
    pub(crate) fn status(self: &Arc<Self>) -> std::result::Result<(), String> {
        let loaded = self.conf.current();
        let Some((_, list)) = &loaded.list else {
            return Err(self.reason(&loaded));
        };
        if let Some(missing) = self.plugins.first_missing(list) {
            return Err(missing);
        }
        if !list.version.has_status_and_gc() {
            return Ok(());
        }
        let mut probe = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if !probe.network.as_ref().is_some_and(|n| Arc::ptr_eq(n, list)) {
            *probe = Probe {
                network: Some(Arc::clone(list)),
                ..Probe::default()
            };
        }
        if probe.asked.is_none_or(|at| at.elapsed() > STATUS_AGE)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            probe.asked = Some(Instant::now());
            let (cni, list) = (Arc::clone(self), Arc::clone(list));
            runtime.spawn(async move { cni.ask_status(&list).await });
        }
        probe.answer.clone().unwrap_or_else(|| {
            Err(format!(
                "CNI network {} has not answered STATUS yet",
                list.name
            ))
        })
    }

    async fn ask_status(&self, list: &Arc<NetworkList>) {
        let mut answer = Ok(());
        for plugin in &list.plugins {
            let stdin = stdin(list, plugin, None, &Map::new(), None);
            let env = self.plugins.env("STATUS", None);
            if let Err(error) = self.plugins.call(plugin, env, stdin).await {
                answer = Err(format!("CNI plugin {:?}: {error}", plugin.kind));
                break;
            }
        }
        let mut probe = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if probe.network.as_ref().is_some_and(|n| Arc::ptr_eq(n, list)) {
            probe.asked = Some(Instant::now());
            probe.answer = Some(answer);
        }
    }

    pub(crate) async fn attach(&self, pod: &PodNetwork) -> Result<Attached> {
        match self.cache.load(&pod.sandbox_id) {
            Some(Entry {
                result: Some(result),
                netns,
                ..
            }) if netns == pod.netns => {
                return parse(&result, &pod.sandbox_id);
            }
            // Begun and not finished, or of another namespace: ADD must not meet its remains.
            Some(entry) => self.detach_cached(&entry).await?,
            None => {}
        }
        let list = self.list()?;
        let mut entry = Entry {
            sandbox_id: pod.sandbox_id.clone(),
            interface: POD_INTERFACE.to_owned(),
            netns: pod.netns.clone(),
            args: request::args(pod)?,
            runtime_config: request::runtime_config(pod)?,
            network: list.source.clone(),
            result: None,
        };
        // A chain that cannot be undone is not begun.
        if let Some(missing) = self.plugins.first_missing(&list) {
            return Err(
                NetworkError::new(NetworkErrorKind::NotReady, "sandbox", &pod.sandbox_id)
                    .cause(missing),
            );
        }
        self.detached().remove(&pod.sandbox_id);
        self.cache.save(&entry)?;
        let mut partial = None;
        let outcome = self
            .add(
                &Chain {
                    list: &list,
                    entry: &entry,
                },
                &mut partial,
            )
            .await;
        let outcome = outcome.and_then(|result| {
            let attached = parse(&result, &pod.sandbox_id)?;
            entry.result = Some(result);
            self.cache.save(&entry)?;
            Ok(attached)
        });
        if outcome.is_err() {
            entry.result = partial;
            self.clean_up(&list, &entry).await;
        }
        outcome
    }

    /// The specification wants DEL after a failed ADD. Its own failure is told in the log, and
    /// the cache entry stays for the next attempt.
    async fn clean_up(&self, list: &NetworkList, entry: &Entry) {
        match self.del(&Chain { list, entry }).await {
            Ok(()) => {
                if let Err(error) = self.cache.remove(&entry.sandbox_id) {
                    warn!(sandbox_id = entry.sandbox_id, %error, "left over of a failed ADD");
                }
            }
            Err(error) => {
                warn!(sandbox_id = entry.sandbox_id, %error, "DEL after a failed ADD failed")
            }
        }
    }

    pub(crate) async fn detach(&self, pod: &PodNetwork) -> Result<()> {
        match self.cache.load(&pod.sandbox_id) {
            Some(entry) => self.detach_cached(&entry).await?,
            None if self.detached().contains(&pod.sandbox_id) => {}
            // The cache was wiped: the present configuration is the best that is left.
            None => {
                if let Ok(list) = self.list() {
                    let entry = Entry {
                        sandbox_id: pod.sandbox_id.clone(),
                        interface: POD_INTERFACE.to_owned(),
                        netns: pod.netns.clone(),
                        args: request::args(pod)?,
                        runtime_config: request::runtime_config(pod)?,
                        network: list.source.clone(),
                        result: None,
                    };
                    self.del(&Chain {
                        list: &list,
                        entry: &entry,
                    })
                    .await?;
                }
                self.cache.remove(&pod.sandbox_id)?;
            }
        }
        self.detached().insert(pod.sandbox_id.clone());
        Ok(())
    }

    async fn detach_cached(&self, entry: &Entry) -> Result<()> {
        let list = NetworkList::parse(entry.network.clone()).map_err(|why| {
            NetworkError::invalid("cached CNI network of sandbox", &entry.sandbox_id, why)
        })?;
        self.del(&Chain { list: &list, entry }).await?;
        self.cache.remove(&entry.sandbox_id)
    }

    /// Asks the plugins whether the pod's network is as they made it; nothing to ask is fine.
    pub(crate) async fn check(&self, sandbox_id: &str) -> Result<()> {
        let Some(entry) = self.cache.load(sandbox_id) else {
            return Ok(());
        };
        let list = NetworkList::parse(entry.network.clone()).map_err(|why| {
            NetworkError::invalid("cached CNI network of sandbox", sandbox_id, why)
        })?;
        if !list.version.has_check() || list.disable_check {
            return Ok(());
        }
        let chain = Chain {
            list: &list,
            entry: &entry,
        };
        for plugin in &list.plugins {
            self.plugins
                .step(&chain, plugin, "CHECK", entry.result.as_ref())
                .await?;
        }
        Ok(())
    }

    /// DEL for every cached sandbox that `keep` refuses; then GC, where the network has it.
    pub(crate) async fn gc(&self, keep: impl Fn(&str) -> bool) -> Result<()> {
        let mut outcome = Ok(());
        let mut valid = Vec::new();
        for id in self.cache.ids() {
            if keep(&id) {
                valid.push(json!({"containerID": id, "ifname": POD_INTERFACE}));
                continue;
            }
            let result = match self.cache.load(&id) {
                Some(entry) => self.detach_cached(&entry).await,
                None => self.cache.remove(&id),
            };
            match result {
                Ok(()) => info!(
                    sandbox_id = id,
                    "removed the CNI network of a pod that is no more"
                ),
                Err(error) => outcome = Err(error),
            }
        }
        self.detached().retain(|id| keep(id));
        if let Ok(list) = self.list()
            && list.version.has_status_and_gc()
            && !list.disable_gc
        {
            let valid = Value::Array(valid);
            for plugin in &list.plugins {
                let stdin = stdin(&list, plugin, None, &Map::new(), Some(&valid));
                let env = self.plugins.env("GC", None);
                if let Err(error) = self.plugins.call(plugin, env, stdin).await {
                    outcome = Err(plugin_error("gc", plugin, &list.name, error));
                }
            }
        }
        outcome
    }

    fn detached(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.detached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn add(&self, chain: &Chain<'_>, partial: &mut Option<Value>) -> Result<Value> {
        for plugin in &chain.list.plugins {
            let output = self
                .plugins
                .step(chain, plugin, "ADD", partial.as_ref())
                .await?;
            let result: Value = serde_json::from_slice(&output).map_err(|error| {
                let text = String::from_utf8_lossy(&output[..output.len().min(512)]).into_owned();
                let why = format!("the result is not JSON: {error}: {text:?}");
                NetworkError::new(NetworkErrorKind::Plugin, "sandbox", &chain.entry.sandbox_id)
                    .cause(format!("plugin type={:?} failed (add): {why}", plugin.kind))
            })?;
            *partial = Some(result);
        }
        Ok(partial.clone().unwrap_or(Value::Null))
    }

    /// Backwards through the chain; stops at a failure, so that a retry meets the same state.
    async fn del(&self, chain: &Chain<'_>) -> Result<()> {
        let previous = chain
            .entry
            .result
            .as_ref()
            .filter(|_| chain.list.version.has_check());
        for plugin in chain.list.plugins.iter().rev() {
            self.plugins.step(chain, plugin, "DEL", previous).await?;
        }
        Ok(())
    }
}

fn skipped_text((path, reason): &(PathBuf, String)) -> String {
    format!("{}: {reason}", path.display())
}

fn parse(result: &Value, sandbox_id: &str) -> Result<Attached> {
    result::attached(result).map_err(|why| {
        NetworkError::new(
            NetworkErrorKind::Plugin,
            "CNI result of sandbox",
            sandbox_id,
        )
        .cause(why)
    })
}
