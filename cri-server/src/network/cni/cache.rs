//! What DEL needs of an ADD, on disk from before the ADD until after the DEL.
//!
//! `<cni_cache_dir>/<sandbox id>.json`. Not synced: an entry lost with the power is made up for by
//! DEL with the present configuration, and by GC.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tracing::warn;

use super::super::error::{NetworkError, Result};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub sandbox_id: String,
    pub interface: String,
    pub netns: PathBuf,
    pub args: String,
    pub runtime_config: Map<String, Value>,
    /// The network's configuration as it was at ADD.
    pub network: Value,
    /// None until ADD has succeeded.
    pub result: Option<Value>,
}

pub(super) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(super) fn open(dir: PathBuf) -> Result<Cache> {
        fs::create_dir_all(&dir)
            .map_err(|e| NetworkError::io("create directory", dir.display(), e))?;
        Ok(Cache { dir })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    pub(super) fn save(&self, entry: &Entry) -> Result<()> {
        let path = self.path(&entry.sandbox_id);
        let temporary = self.dir.join(format!(".{}.tmp", entry.sandbox_id));
        let write = || -> io::Result<()> {
            // The directory may have been wiped under us.
            fs::create_dir_all(&self.dir)?;
            let bytes = serde_json::to_vec(entry)?;
            let mut options = fs::OpenOptions::new();
            let file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary);
            file?.write_all(&bytes)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| NetworkError::io("write CNI cache", path.display(), e))
    }

    pub(super) fn has(&self, id: &str) -> bool {
        self.path(id).exists()
    }

    /// None when there is none, or none that can be read.
    pub(super) fn load(&self, id: &str) -> Option<Entry> {
        let path = self.path(id);
        let bytes = fs::read(&path).ok()?;
        match serde_json::from_slice::<Entry>(&bytes) {
            Ok(entry) if entry.sandbox_id == id => Some(entry),
            Ok(_) => None,
            Err(error) => {
                warn!(file = %path.display(), %error, "unreadable CNI cache entry");
                None
            }
        }
    }

    pub(super) fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(NetworkError::io("remove CNI cache", path.display(), error))
            }
            _ => Ok(()),
        }
    }

    /// Ids with an entry, readable or not.
    pub(super) fn ids(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        names
            .filter(|name| !name.starts_with('.'))
            .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
            .collect()
    }
}
