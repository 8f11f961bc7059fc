//! Owns the daemon's configuration: the embedded defaults, the TOML file over them, the flags
//! over that. Never touches what it describes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::network::NetworkConfig;

/// What `coracled config default` prints, and where every default comes from.
pub const DEFAULT_TOML: &str = include_str!("../data/config.toml");

/// Everything that can be configured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Persistent files.
    pub root: PathBuf,
    /// Files of this boot.
    pub state: PathBuf,
    /// The gRPC socket.
    pub socket: PathBuf,
    /// Handler of pods that name none.
    pub default_runtime: String,
    /// Logs.
    pub log: LogConfig,
    /// Image store.
    pub image: ImageConfig,
    /// Runtime handlers by name.
    pub runtimes: BTreeMap<String, RuntimeConfig>,
    /// Streaming server.
    pub streaming: StreamingConfig,
    /// Pod networks.
    pub network: NetworkConfig,
}

/// `[log]`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogConfig {
    /// Least severe level that is printed.
    pub level: String,
    /// `text` or `json`.
    pub format: String,
}

/// `[image]`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageConfig {
    /// hosts.toml directories.
    pub registry_config_dirs: Vec<PathBuf>,
    /// Layers in flight per pull.
    pub max_parallel_layers: usize,
    /// Silence after which a pull fails.
    pub pull_progress_timeout_seconds: u64,
}

/// `[runtimes.<name>]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RuntimeConfig {
    /// Shim binary; empty: found beside coracled or in PATH.
    #[serde(default)]
    pub shim: PathBuf,
    /// Runtime binary; empty: found beside coracled or in PATH.
    #[serde(default)]
    pub runtime: PathBuf,
    /// Options of the runtime.
    #[serde(default)]
    pub options: RuntimeOptions,
}

/// `[runtimes.<name>.options]`, spelled as containerd's users know it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// Use the systemd cgroup driver.
    #[serde(rename = "SystemdCgroup", default)]
    pub systemd_cgroup: bool,
}

/// `[streaming]`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamingConfig {
    /// Address of the server.
    pub listen: SocketAddr,
}

/// Values given on the command line; they win over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--socket`
    pub socket: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<String>,
}

/// A configuration and the keys in it that mean nothing to us.
#[derive(Debug)]
pub struct Loaded {
    /// The merged configuration.
    pub config: Config,
    /// Dotted names of unknown keys.
    pub unknown: Vec<String>,
}

/// Merges defaults, the file (if one is named) and the flags.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Loaded> {
    let text = match file {
        Some(path) => {
            Some(std::fs::read_to_string(path).map_err(|e| Error::io("read", path.display(), e))?)
        }
        None => None,
    };
    let name = file.map_or("embedded defaults".to_owned(), |p| p.display().to_string());
    let loaded = parse(text.as_deref(), &name, overrides)?;
    check(&loaded.config)?;
    Ok(loaded)
}

fn parse(text: Option<&str>, name: &str, overrides: &Overrides) -> Result<Loaded> {
    let bad = |e: toml::de::Error| Error::new(Kind::InvalidArgument, "config", name).because(e);
    let mut given: toml::Table = match text {
        Some(text) => toml::from_str(text).map_err(bad)?,
        None => toml::Table::new(),
    };
    for (key, path) in [
        ("root", &overrides.root),
        ("state", &overrides.state),
        ("socket", &overrides.socket),
    ] {
        if let Some(path) = path {
            given.insert(key.to_owned(), text_of(path));
        }
    }
    let mut table: toml::Table = toml::from_str(DEFAULT_TOML).map_err(bad)?;
    let moved = given.contains_key("state") && !given.contains_key("socket");
    merge(&mut table, given);
    follow_directories(&mut table, moved);
    let mut unknown = Vec::new();
    let mut config: Config = serde_ignored::deserialize(toml::Value::Table(table), |path| {
        unknown.push(path.to_string());
    })
    .map_err(bad)?;
    config.log.level = overrides.log_level.clone().unwrap_or(config.log.level);
    Ok(Loaded { config, unknown })
}

fn text_of(path: &Path) -> toml::Value {
    toml::Value::String(path.display().to_string())
}

/// Paths that nobody gave lie below `root` and `state`, wherever those are: two daemons that
/// differ only in these two must not meet anywhere.
fn follow_directories(table: &mut toml::Table, move_socket: bool) {
    let dir = |table: &toml::Table, key: &str| {
        PathBuf::from(
            table
                .get(key)
                .and_then(toml::Value::as_str)
                .unwrap_or_default(),
        )
    };
    let (root, state) = (dir(table, "root"), dir(table, "state"));
    if move_socket {
        table.insert("socket".to_owned(), text_of(&state.join("coracle.sock")));
    }
    if let Some(network) = table.get_mut("network").and_then(toml::Value::as_table_mut) {
        for (key, path) in [
            ("state_dir", state.join("network")),
            ("cni_cache_dir", root.join("cni")),
        ] {
            network.entry(key).or_insert(text_of(&path));
        }
    }
}

/// Lays `over` on `base`: tables merge key by key, everything else is replaced.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn check(config: &Config) -> Result<()> {
    for (key, path) in [
        ("root", &config.root),
        ("state", &config.state),
        ("socket", &config.socket),
    ] {
        if !path.is_absolute() {
            let text = format!("{} is not an absolute path", path.display());
            return Err(Error::invalid(format!("config: {key}"), text));
        }
    }
    if !config.runtimes.contains_key(&config.default_runtime) {
        let text = format!("no [runtimes.{}]", config.default_runtime);
        return Err(Error::invalid("config: default_runtime", text));
    }
    for (name, runtime) in &config.runtimes {
        if runtime.options.systemd_cgroup {
            return Err(Error::unsupported(
                format!("config: runtimes.{name}.options.SystemdCgroup"),
                "the systemd cgroup driver is not supported yet",
            ));
        }
    }
    if !["text", "json"].contains(&config.log.format.as_str()) {
        let text = format!("{:?} is neither text nor json", config.log.format);
        return Err(Error::invalid("config: log.format", text));
    }
    Ok(())
}

/// What `coracled config dump` prints.
pub fn dump(config: &Config) -> Result<String> {
    toml::to_string(config)
        .map_err(|e| Error::new(Kind::Internal, "config", "serialise").because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Result<Loaded> {
        parse(Some(text), "t", &Overrides::default())
    }

    #[test]
    fn paths_follow_root_and_state() {
        let overrides = Overrides {
            state: Some("/s".into()),
            ..Overrides::default()
        };
        let loaded = parse(Some("root = \"/r\""), "t", &overrides).unwrap();
        assert_eq!(loaded.config.socket, Path::new("/s/coracle.sock"));
        assert_eq!(loaded.config.network.state_dir, Path::new("/s/network"));
        assert_eq!(loaded.config.network.cni_cache_dir, Path::new("/r/cni"));
        let loaded =
            given("socket = \"/x\"\nstate = \"/s\"\n[network]\nstate_dir = \"/n\"").unwrap();
        assert_eq!(loaded.config.socket, Path::new("/x"));
        assert_eq!(loaded.config.network.state_dir, Path::new("/n"));
    }

    #[test]
    fn defaults_parse_without_unknown_keys() {
        let loaded = load(None, &Overrides::default()).unwrap();
        assert_eq!(loaded.unknown, Vec::<String>::new());
        assert_eq!(loaded.config.socket, Path::new("/run/coracle/coracle.sock"));
        assert!(DEFAULT_TOML.contains("SystemdCgroup = false"));
    }

    #[test]
    fn unknown_key_is_named() {
        let loaded = given("[image]\nregistries = 1\nmax_parallel_layers = 9").unwrap();
        assert_eq!(loaded.unknown, ["image.registries"]);
        assert_eq!(loaded.config.image.max_parallel_layers, 9);
        assert_eq!(loaded.config.image.pull_progress_timeout_seconds, 60);
    }

    #[test]
    fn systemd_cgroup_is_refused_and_named() {
        let text = DEFAULT_TOML.replace("SystemdCgroup = false", "SystemdCgroup = true");
        let error = check(&given(&text).unwrap().config).unwrap_err();
        assert!(error.to_string().contains("SystemdCgroup"), "{error}");
    }

    #[test]
    fn dump_reads_back() {
        let loaded = load(None, &Overrides::default()).unwrap();
        let again = given(&dump(&loaded.config).unwrap()).unwrap();
        assert_eq!(again.unknown, Vec::<String>::new());
    }
}
