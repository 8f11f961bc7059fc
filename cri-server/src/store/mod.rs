//! Owns the tables of sandboxes and containers in memory: look-up by id or unique prefix, lists
//! in the order of creation. What is in an entry belongs to `sandbox` and `container`.

pub mod jobs;
pub mod records;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};

use crate::container::Container;
use crate::error::{Error, Kind, Result};
use crate::sandbox::Sandbox;

/// Entries by id.
pub struct Index<T> {
    what: &'static str,
    entries: RwLock<BTreeMap<String, Arc<T>>>,
}

impl<T> Index<T> {
    fn new(what: &'static str) -> Self {
        Index {
            what,
            entries: RwLock::default(),
        }
    }

    /// Adds an entry.
    pub fn insert(&self, id: &str, entry: Arc<T>) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(id.to_owned(), entry);
    }

    /// Takes an entry away.
    pub fn remove(&self, id: &str) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(id);
    }

    /// The entry with this id, or with the only id that starts with it. A prefix that fits two is
    /// an error, not a guess.
    pub fn find(&self, id: &str) -> Result<Arc<T>> {
        if id.is_empty() {
            return Err(Error::invalid(format!("{} id", self.what), "is empty"));
        }
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(id) {
            return Ok(entry.clone());
        }
        let from = (Bound::Included(id), Bound::Unbounded);
        let mut fitting = entries
            .range::<str, _>(from)
            .take_while(|(known, _)| known.starts_with(id));
        match (fitting.next(), fitting.next()) {
            (Some((_, entry)), None) => Ok(entry.clone()),
            (Some(_), Some(_)) => {
                let text = format!("{} id prefix {id:?}", self.what);
                Err(Error::new(
                    Kind::InvalidArgument,
                    text,
                    "fits more than one",
                ))
            }
            (None, _) => Err(Error::not_found(self.what, id)),
        }
    }

    /// The same for requests that succeed when there is nothing: `None` for an unknown id.
    pub fn find_optional(&self, id: &str) -> Result<Option<Arc<T>>> {
        match self.find(id) {
            Ok(entry) => Ok(Some(entry)),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All entries.
    pub fn all(&self) -> Vec<Arc<T>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.values().cloned().collect()
    }

    /// Entries that a filter's id selects: all of them for an empty one.
    pub fn select(&self, id: &str) -> Vec<Arc<T>> {
        match id {
            "" => self.all(),
            _ => self.find(id).into_iter().collect(),
        }
    }
}

/// Both tables.
pub struct Registry {
    /// Sandboxes.
    pub sandboxes: Index<Sandbox>,
    /// Containers.
    pub containers: Index<Container>,
}

impl Default for Registry {
    fn default() -> Self {
        Registry {
            sandboxes: Index::new("sandbox"),
            containers: Index::new("container"),
        }
    }
}

impl Registry {
    /// The containers of a sandbox.
    pub fn containers_of(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        let mut containers = self.containers.all();
        containers.retain(|c| c.fixed.sandbox_id.as_str() == sandbox_id);
        containers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_takes_unique_prefixes_only() {
        let index = Index::new("thing");
        for id in ["abc", "abd", "b"] {
            index.insert(id, Arc::new(id));
        }
        assert_eq!(*index.find("abc").unwrap(), "abc");
        assert_eq!(*index.find("abd").unwrap(), "abd");
        assert_eq!(index.find("ab").unwrap_err().kind(), Kind::InvalidArgument);
        assert_eq!(index.find("c").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(
            index.find("c").unwrap_err().to_string(),
            "thing \"c\": not found"
        );
        assert_eq!(index.find("").unwrap_err().kind(), Kind::InvalidArgument);
        assert!(index.find_optional("c").unwrap().is_none());
        assert_eq!(index.select("").len(), 3);
        assert_eq!(index.select("b").len(), 1);
        assert!(index.select("zz").is_empty());
    }
}
