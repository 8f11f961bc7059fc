//! The journal of the bridge: which pods it has connected or begun to connect.
//!
//! ```text
//! <state_dir>/pods/<id>.pending   written before the first kernel object is made
//!                  <id>.json      renamed to when everything stands
//! ```
//! Whatever a crash leaves half done has at least its `.pending`, so `gc` finds it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::super::error::{NetworkError, Result};
use super::super::pod::{Attached, PortMapping};

const PENDING: &str = "pending";
const DONE: &str = "json";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub sandbox_id: String,
    /// Namespace and name of the pod, for the people who read rules.
    pub label: String,
    pub attached: Attached,
    pub ports: Vec<PortMapping>,
}

pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(super) fn open(dir: PathBuf) -> Result<Journal> {
        fs::create_dir_all(&dir)
            .map_err(|e| NetworkError::io("create directory", dir.display(), e))?;
        Ok(Journal { dir })
    }

    fn path(&self, id: &str, state: &str) -> PathBuf {
        self.dir.join(format!("{id}.{state}"))
    }

    pub(super) fn begin(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.sandbox_id, PENDING);
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(record)?;
            let mut options = fs::OpenOptions::new();
            let file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path);
            file?.write_all(&text)
        };
        write().map_err(|e| NetworkError::io("write record", path.display(), e))
    }

    pub(super) fn finish(&self, id: &str) -> Result<()> {
        let path = self.path(id, DONE);
        fs::rename(self.path(id, PENDING), &path)
            .map_err(|e| NetworkError::io("write record", path.display(), e))
    }

    /// The record of a pod whose connection was finished.
    pub(super) fn load(&self, id: &str) -> Option<Record> {
        let bytes = fs::read(self.path(id, DONE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    pub(super) fn remove(&self, id: &str) -> Result<()> {
        for state in [PENDING, DONE] {
            let path = self.path(id, state);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(NetworkError::io("remove record", path.display(), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn has(&self, id: &str) -> bool {
        [PENDING, DONE]
            .iter()
            .any(|state| self.path(id, state).exists())
    }

    /// Ids with a record in any state, readable or not.
    pub(super) fn ids(&self) -> HashSet<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return HashSet::new();
        };
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        names
            .filter_map(|name| {
                let (id, state) = name.rsplit_once('.')?;
                (state == PENDING || state == DONE).then(|| id.to_owned())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_finished_record_loads_but_every_one_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("pods")).unwrap();
        let record = Record {
            sandbox_id: "a".into(),
            label: "default/web".into(),
            attached: Attached::default(),
            ports: Vec::new(),
        };
        journal.begin(&record).unwrap();
        assert!(journal.load("a").is_none());
        assert_eq!(journal.ids(), HashSet::from(["a".to_owned()]));
        journal.finish("a").unwrap();
        assert_eq!(journal.load("a").unwrap().label, "default/web");
        fs::write(dir.path().join("pods/b.json"), b"{").unwrap();
        assert!(journal.load("b").is_none());
        assert_eq!(journal.ids().len(), 2);
        journal.remove("a").unwrap();
        journal.remove("a").unwrap();
        assert_eq!(journal.ids(), HashSet::from(["b".to_owned()]));
    }
}
