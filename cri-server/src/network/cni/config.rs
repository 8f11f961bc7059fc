//! CNI configuration files: found, parsed, checked, and read again when they change.
//!
//! The first valid file by name counts, as libcni's users have it. A bad file is skipped, told in
//! the log once per change, and named in the status when nothing else serves. Never runs plugins.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};
use tracing::{info, warn};

/// A file larger than this is not a configuration.
const MAX_FILE: u64 = 1024 * 1024;

/// A version of the CNI specification that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    const ALL: [(Version, &'static str); 7] = [
        (Version::V0_1_0, "0.1.0"),
        (Version::V0_2_0, "0.2.0"),
        (Version::V0_3_0, "0.3.0"),
        (Version::V0_3_1, "0.3.1"),
        (Version::V0_4_0, "0.4.0"),
        (Version::V1_0_0, "1.0.0"),
        (Version::V1_1_0, "1.1.0"),
    ];

    fn parse(text: &str) -> Option<Version> {
        Version::ALL
            .iter()
            .find(|(_, name)| *name == text)
            .map(|(version, _)| *version)
    }

    pub(super) fn as_str(self) -> &'static str {
        Version::ALL[self as usize].1
    }

    /// DEL has prevResult, and CHECK exists, since 0.4.0.
    pub(super) fn has_check(self) -> bool {
        self >= Version::V0_4_0
    }

    /// STATUS and GC exist since 1.1.0.
    pub(super) fn has_status_and_gc(self) -> bool {
        self >= Version::V1_1_0
    }
}

/// One network: a chain of plugins.
#[derive(Clone, Debug)]
pub(super) struct NetworkList {
    pub name: String,
    pub version: Version,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<Plugin>,
    /// As it was read: goes into the cache.
    pub source: Value,
}

#[derive(Clone, Debug)]
pub(super) struct Plugin {
    pub kind: String,
    /// The plugin's own configuration, everything in it.
    pub config: Map<String, Value>,
    /// Capabilities that it declares, true ones only.
    pub capabilities: Vec<String>,
}

impl NetworkList {
    /// A list with `plugins`, or one plugin's configuration standing alone.
    pub(super) fn parse(source: Value) -> Result<NetworkList, String> {
        let Value::Object(object) = &source else {
            return Err("not a JSON object".to_owned());
        };
        let name = text(object, "name")?.ok_or("no \"name\"")?;
        if !is_network_name(&name) {
            return Err(format!("\"name\" {name:?} is not a network name"));
        }
        let version = version(object)?;
        let plugins = match object.get("plugins") {
            Some(Value::Array(list)) if list.is_empty() => {
                return Err("\"plugins\" is empty".into());
            }
            Some(Value::Array(list)) => list
                .iter()
                .map(Plugin::parse)
                .collect::<Result<Vec<_>, _>>()?,
            Some(_) => return Err("\"plugins\" is not a list".to_owned()),
            None => vec![Plugin::parse(&source)?],
        };
        Ok(NetworkList {
            name,
            version,
            disable_check: flag(object, "disableCheck")?,
            disable_gc: flag(object, "disableGC")?,
            plugins,
            source,
        })
    }
}

impl Plugin {
    fn parse(source: &Value) -> Result<Plugin, String> {
        let Value::Object(config) = source else {
            return Err("a plugin is not a JSON object".to_owned());
        };
        let kind = text(config, "type")?.ok_or("a plugin has no \"type\"")?;
        // CVE-2021-20206: a path here ran any program of the host.
        if kind.is_empty()
            || kind.contains('/')
            || kind.contains('\0')
            || kind == "."
            || kind == ".."
        {
            return Err(format!("plugin \"type\" {kind:?} is not a bare file name"));
        }
        let capabilities = match config.get("capabilities") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(all)) => all
                .iter()
                .filter(|(_, on)| **on == Value::Bool(true))
                .map(|(n, _)| n.clone())
                .collect(),
            Some(_) => {
                return Err(format!(
                    "\"capabilities\" of plugin {kind:?} is not an object"
                ));
            }
        };
        Ok(Plugin {
            kind,
            config: config.clone(),
            capabilities,
        })
    }
}

fn text(object: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("\"{key}\" is not a string")),
    }
}

/// Booleans of list files; the 0.4.0 text calls disableCheck a string, so both forms are seen.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(format!("\"{key}\" is not a boolean")),
    }
}

/// `cniVersion`, or the highest of `cniVersions` (1.1.0) that we know. A file without one is of
/// the time when there was only one.
fn version(object: &Map<String, Value>) -> Result<Version, String> {
    let known = || Version::ALL.map(|(_, name)| name).join(", ");
    if let Some(Value::Array(list)) = object.get("cniVersions") {
        let best = list
            .iter()
            .filter_map(Value::as_str)
            .filter_map(Version::parse)
            .max();
        if let Some(version) = best {
            return Ok(version);
        }
        if !list.is_empty() {
            return Err(format!(
                "none of \"cniVersions\" is known; known are {}",
                known()
            ));
        }
    }
    match text(object, "cniVersion")? {
        None => Ok(Version::V0_1_0),
        Some(text) if text.is_empty() => Ok(Version::V0_1_0),
        Some(text) => Version::parse(&text).ok_or_else(|| {
            format!(
                "\"cniVersion\" {text:?} is not known; known are {}",
                known()
            )
        }),
    }
}

fn is_network_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    name.bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(allowed)
}

/// What the directory holds at present.
#[derive(Clone, Debug, Default)]
pub(super) struct Loaded {
    pub list: Option<(PathBuf, Arc<NetworkList>)>,
    /// Files that were skipped, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

/// Changes when a file appears, goes, or is written, also in place.
type Fingerprint = Vec<(PathBuf, u64, i64, i64, u64)>;

pub(super) struct ConfDir {
    dir: PathBuf,
    seen: Mutex<Option<(Fingerprint, Arc<Loaded>)>>,
}

impl ConfDir {
    pub(super) fn new(dir: PathBuf) -> ConfDir {
        ConfDir {
            dir,
            seen: Mutex::new(None),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Looks at the directory; reads files only when something changed.
    pub(super) fn current(&self) -> Arc<Loaded> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = fingerprint(&self.dir);
        if let Some((before, loaded)) = &*seen
            && *before == now
        {
            return Arc::clone(loaded);
        }
        let loaded = Arc::new(load(now.iter().map(|entry| entry.0.as_path())));
        for (path, reason) in &loaded.skipped {
            warn!(file = %path.display(), reason, "skipped a bad CNI configuration");
        }
        match &loaded.list {
            Some((path, list)) => {
                let version = list.version.as_str();
                info!(file = %path.display(), network = list.name, version, "loaded the CNI configuration");
            }
            None => info!(dir = %self.dir.display(), "no CNI configuration"),
        }
        *seen = Some((now, Arc::clone(&loaded)));
        loaded
    }
}

fn fingerprint(dir: &Path) -> Fingerprint {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut all: Fingerprint = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|e| e.to_str());
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .map(|path| match fs::metadata(&path) {
            Ok(m) => (path, m.ino(), m.mtime(), m.mtime_nsec(), m.len()),
            Err(_) => (path, 0, 0, 0, 0),
        })
        .collect();
    all.sort();
    all
}

fn load<'a>(files: impl Iterator<Item = &'a Path>) -> Loaded {
    let mut loaded = Loaded::default();
    for path in files {
        match read(path) {
            Ok(list) => {
                loaded.list = Some((path.to_owned(), Arc::new(list)));
                break;
            }
            Err(reason) => loaded.skipped.push((path.to_owned(), reason)),
        }
    }
    loaded
}

fn read(path: &Path) -> Result<NetworkList, String> {
    let metadata = fs::metadata(path).map_err(|e| e.to_string())?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(format!("not a regular file of at most {MAX_FILE} bytes"));
    }
    let bytes = fs::read(path).map_err(|e: io::Error| e.to_string())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| format!("not JSON: {e}"))?;
    if path.extension().is_some_and(|e| e == "conflist") && value.get("plugins").is_none() {
        return Err("a .conflist without \"plugins\"".to_owned());
    }
    NetworkList::parse(value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_and_single_plugins_parse() {
        let list = NetworkList::parse(json!({
            "cniVersion": "1.0.0", "name": "net-1", "disableCheck": "true",
            "plugins": [{"type": "bridge"}, {"type": "portmap", "capabilities": {"portMappings": true, "x": false}}],
        }))
        .unwrap();
        assert_eq!((list.version, list.plugins.len()), (Version::V1_0_0, 2));
        assert_eq!(list.plugins[1].capabilities, ["portMappings"]);
        assert!(list.disable_check && !list.disable_gc);
        let single = NetworkList::parse(json!({"name": "x", "type": "ptp"})).unwrap();
        assert_eq!(
            (single.version, single.plugins[0].kind.as_str()),
            (Version::V0_1_0, "ptp")
        );
    }

    #[test]
    fn bad_configurations_say_what_is_bad() {
        let cases = [
            (json!([]), "not a JSON object"),
            (json!({"type": "x"}), "no \"name\""),
            (
                json!({"name": "../x", "type": "x"}),
                "\"name\" \"../x\" is not a network name",
            ),
            (json!({"name": "x"}), "a plugin has no \"type\""),
            (json!({"name": "x", "plugins": []}), "\"plugins\" is empty"),
            (
                json!({"name": "x", "plugins": {}}),
                "\"plugins\" is not a list",
            ),
            (
                json!({"name": "x", "type": "../../bin/sh"}),
                "plugin \"type\" \"../../bin/sh\" is not a bare file name",
            ),
            (
                json!({"name": "x", "type": ".."}),
                "plugin \"type\" \"..\" is not a bare file name",
            ),
            (
                json!({"name": "x", "type": "a", "disableCheck": 1}),
                "\"disableCheck\" is not a boolean",
            ),
        ];
        for (source, expected) in cases {
            assert_eq!(NetworkList::parse(source).unwrap_err(), expected);
        }
        let error = NetworkList::parse(json!({"name": "x", "type": "a", "cniVersion": "9"}));
        assert!(
            error
                .unwrap_err()
                .starts_with("\"cniVersion\" \"9\" is not known")
        );
    }

    #[test]
    fn highest_known_of_several_versions_counts() {
        let parse = |versions: Value| {
            let source =
                json!({"name": "x", "type": "a", "cniVersion": "1.0.0", "cniVersions": versions});
            NetworkList::parse(source).map(|list| list.version)
        };
        assert_eq!(
            parse(json!(["0.4.0", "1.1.0", "2.0.0"])),
            Ok(Version::V1_1_0)
        );
        assert_eq!(parse(json!([])), Ok(Version::V1_0_0));
        assert!(parse(json!(["2.0.0"])).is_err());
    }

    #[test]
    fn directory_is_read_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let conf = ConfDir::new(dir.path().join("net.d"));
        assert!(conf.current().list.is_none());
        fs::create_dir(conf.path()).unwrap();
        fs::write(conf.path().join("00-bad.conflist"), "{").unwrap();
        fs::write(conf.path().join("20-b.conf"), r#"{"name":"b","type":"x"}"#).unwrap();
        fs::write(conf.path().join("30-c.txt"), "ignored").unwrap();
        let loaded = conf.current();
        assert_eq!(loaded.list.as_ref().unwrap().1.name, "b");
        assert!(loaded.skipped[0].0.ends_with("00-bad.conflist"));
        assert!(Arc::ptr_eq(&loaded, &conf.current()));
        fs::write(conf.path().join("10-a.conf"), r#"{"name":"a","type":"x"}"#).unwrap();
        assert_eq!(conf.current().list.as_ref().unwrap().1.name, "a");
        // In place, with the directory itself unchanged.
        fs::write(conf.path().join("10-a.conf"), r#"{"name":"aa","type":"x"}"#).unwrap();
        assert_eq!(conf.current().list.as_ref().unwrap().1.name, "aa");
        fs::remove_file(conf.path().join("10-a.conf")).unwrap();
        assert_eq!(conf.current().list.as_ref().unwrap().1.name, "b");
    }
}
