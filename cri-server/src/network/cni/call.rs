//! One call of one plugin: where it is, what it is told, what its failure is called.
//!
//! Owns the derivation of a plugin's input from the network, the pod and the previous result.
//! Knows nothing of the order of calls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::super::error::{NetworkError, NetworkErrorKind, Result};
use super::cache::Entry;
use super::config::{NetworkList, Plugin};
use super::exec::{self, Failure};

/// Where plugins are, and how long each may take.
pub(super) struct Plugins {
    pub bin_dirs: Vec<PathBuf>,
    pub timeout: Duration,
}

/// One chain of calls for one sandbox.
pub(super) struct Chain<'a> {
    pub list: &'a NetworkList,
    pub entry: &'a Entry,
}

impl Plugins {
    pub(super) async fn step(
        &self,
        chain: &Chain<'_>,
        plugin: &Plugin,
        command: &'static str,
        previous: Option<&Value>,
    ) -> Result<Vec<u8>> {
        let env = self.env(command, Some(chain.entry));
        let stdin = stdin(
            chain.list,
            plugin,
            previous,
            &chain.entry.runtime_config,
            None,
        );
        self.call(plugin, env, stdin).await.map_err(|failure| {
            let kind = match failure {
                CallError::Failed(Failure::TimedOut(_)) => NetworkErrorKind::Timeout,
                _ => NetworkErrorKind::Plugin,
            };
            let text = plugin_error(command, plugin, &chain.list.name, failure).to_string();
            NetworkError::new(kind, "sandbox", &chain.entry.sandbox_id).cause(text)
        })
    }

    pub(super) async fn call(
        &self,
        plugin: &Plugin,
        env: Vec<(&'static str, String)>,
        stdin: Vec<u8>,
    ) -> std::result::Result<Vec<u8>, CallError> {
        let path = exec::find(&plugin.kind, &self.bin_dirs)
            .ok_or_else(|| CallError::Missing(self.missing_text(plugin)))?;
        let run = exec::Run {
            plugin: &path,
            env,
            stdin,
            timeout: self.timeout,
        };
        exec::run(run).await.map_err(CallError::Failed)
    }

    /// What is said of the first plugin of the network that is not installed.
    pub(super) fn first_missing(&self, list: &NetworkList) -> Option<String> {
        let mut all = list.plugins.iter();
        let missing = all.find(|p| exec::find(&p.kind, &self.bin_dirs).is_none())?;
        Some(self.missing_text(missing))
    }

    fn missing_text(&self, plugin: &Plugin) -> String {
        let dirs: Vec<String> = self
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        format!(
            "failed to find plugin {:?} in path [{}]",
            plugin.kind,
            dirs.join(" ")
        )
    }

    pub(super) fn env(&self, command: &str, entry: Option<&Entry>) -> Vec<(&'static str, String)> {
        let path: Vec<String> = self
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        let mut env = vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_PATH", path.join(":")),
        ];
        if let Some(entry) = entry {
            // A namespace that is gone is told as none.
            let netns = if command == "DEL" && !is_namespace(&entry.netns) {
                String::new()
            } else {
                entry.netns.display().to_string()
            };
            env.extend([
                ("CNI_CONTAINERID", entry.sandbox_id.clone()),
                ("CNI_NETNS", netns),
                ("CNI_IFNAME", entry.interface.clone()),
                ("CNI_ARGS", entry.args.clone()),
            ]);
        }
        env
    }
}

pub(super) enum CallError {
    Missing(String),
    Failed(Failure),
}

pub(super) fn plugin_error(
    command: &str,
    plugin: &Plugin,
    network: &str,
    error: CallError,
) -> NetworkError {
    let subject = format!(
        "type={:?} name={network:?} failed ({})",
        plugin.kind,
        command.to_ascii_lowercase()
    );
    let why = error.to_string();
    NetworkError::new(NetworkErrorKind::Plugin, "plugin", subject).cause(why)
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CallError::Missing(text) => f.write_str(text),
            CallError::Failed(failure) => failure.fmt(f),
        }
    }
}

/// An empty file where a namespace was is left by a reboot.
fn is_namespace(path: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as u64 == NSFS_MAGIC)
}

/// The plugin's configuration as the specification derives it.
pub(super) fn stdin(
    list: &NetworkList,
    plugin: &Plugin,
    previous: Option<&Value>,
    offered: &Map<String, Value>,
    valid_attachments: Option<&Value>,
) -> Vec<u8> {
    let mut config = plugin.config.clone();
    config.insert("name".to_owned(), Value::String(list.name.clone()));
    config.insert(
        "cniVersion".to_owned(),
        Value::String(list.version.as_str().to_owned()),
    );
    let wanted: Map<String, Value> = plugin
        .capabilities
        .iter()
        .filter_map(|name| offered.get(name).map(|value| (name.clone(), value.clone())))
        .collect();
    if !wanted.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    if let Some(valid) = valid_attachments {
        config.insert("cni.dev/valid-attachments".to_owned(), valid.clone());
    }
    Value::Object(config).to_string().into_bytes()
}
