//! Owns records on disk: one JSON file for each sandbox and each container, replaced atomically.
//!
//! ```text
//! <root>/records/sandboxes/<id>.json
//! <root>/records/containers/<id>.json
//! <root>/records/quarantine/...        records that could not be read
//! ```
//! They live under the persistent root, so that after a reboot old sandboxes are still known (as
//! NOTREADY) and can be removed. There is no fsync: what a power loss can take is the record of a
//! pod that the power loss has ended, and a torn record is put aside, never fatal.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// The directories of records.
#[derive(Debug)]
pub struct Records {
    root: PathBuf,
    serial: AtomicU64,
}

/// Which kind of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Sandboxes.
    Sandboxes,
    /// Containers.
    Containers,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Table::Sandboxes => "sandboxes",
            Table::Containers => "containers",
        }
    }
}

/// All records of a table that could be read, and the files that could not.
pub struct LoadedTable<T> {
    /// Good records.
    pub records: Vec<T>,
    /// Files put aside, each with the reason.
    pub quarantined: Vec<(PathBuf, String)>,
}

impl Records {
    /// Opens the directories, making them when absent.
    pub fn open(root: &Path) -> Result<Records> {
        let root = root.join("records");
        for name in ["sandboxes", "containers", "quarantine"] {
            make_private_dir(&root.join(name))?;
        }
        Ok(Records {
            root,
            serial: AtomicU64::new(0),
        })
    }

    fn file(&self, table: Table, id: &str) -> PathBuf {
        self.root.join(table.name()).join(format!("{id}.json"))
    }

    /// Replaces a record.
    pub fn save<T: Serialize>(&self, table: Table, id: &str, record: &T) -> Result<()> {
        let path = self.file(table, id);
        let failed = |e: std::io::Error| Error::io("write record", path.display(), e);
        let json = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("tmp{serial}"));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options
            .open(&temporary)
            .and_then(|mut file| file.write_all(&json))
            .and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|e| {
            let _ = fs::remove_file(&temporary);
            failed(e)
        })
    }

    /// Removes a record; absent is fine.
    pub fn remove(&self, table: Table, id: &str) -> Result<()> {
        let path = self.file(table, id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove record", path.display(), e))
            }
            _ => Ok(()),
        }
    }

    /// Reads a whole table. A file that cannot be read is put aside.
    pub fn load<T: DeserializeOwned>(&self, table: Table) -> Result<LoadedTable<T>> {
        let dir = self.root.join(table.name());
        let failed = |e| Error::io("read directory", dir.display(), e);
        let mut loaded = LoadedTable {
            records: Vec::new(),
            quarantined: Vec::new(),
        };
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                // Half of a replacement that a crash interrupted.
                let _ = fs::remove_file(&path);
                continue;
            }
            let read = fs::read(&path)
                .map_err(|e| e.to_string())
                .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| e.to_string()));
            match read {
                Ok(record) => loaded.records.push(record),
                Err(why) => {
                    self.put_aside(&path);
                    loaded.quarantined.push((path, why));
                }
            }
        }
        Ok(loaded)
    }

    fn put_aside(&self, path: &Path) {
        if let Some(name) = path.file_name() {
            let _ = fs::rename(path, self.root.join("quarantine").join(name));
        }
    }
}

/// Makes a directory (and those above it) that only root may enter.
pub fn make_private_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io("mkdir", path.display(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_torn_ones_are_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        for (id, value) in [("a", 1), ("b", 2)] {
            records.save(Table::Containers, id, &value).unwrap();
        }
        let file = |name: &str| dir.path().join("records/containers").join(name);
        fs::write(file("torn.json"), "").unwrap();
        fs::write(file("x.tmp3"), "half").unwrap();
        let mut loaded: LoadedTable<i32> = records.load(Table::Containers).unwrap();
        loaded.records.sort_unstable();
        assert_eq!(loaded.records, [1, 2]);
        assert_eq!(loaded.quarantined.len(), 1);
        assert!(!file("x.tmp3").exists());
        assert!(dir.path().join("records/quarantine/torn.json").exists());
        records.remove(Table::Containers, "a").unwrap();
        records.remove(Table::Containers, "a").unwrap();
        let loaded: LoadedTable<i32> = records.load(Table::Containers).unwrap();
        assert_eq!(loaded.records, [2]);
    }
}
