//! Container ids: the one rule for what may become a directory name under the state root.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

/// A validated container id: `[0-9A-Za-z_+.-]+`, and neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ContainerId(String);

/// Why a string is no container id. The texts are runc's, which engines match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidId {
    Empty,
    Format,
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InvalidId::Empty => "container id cannot be empty",
            InvalidId::Format => "invalid container ID format",
        })
    }
}

impl std::error::Error for InvalidId {}

impl ContainerId {
    /// Parses an id with runc's rule.
    ///
    /// # Errors
    /// The string is empty, holds another character than the allowed ones, or is `.` or `..`.
    pub fn parse(id: &str) -> Result<ContainerId, InvalidId> {
        if id.is_empty() {
            return Err(InvalidId::Empty);
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
        if !id.bytes().all(allowed) || id == "." || id == ".." {
            return Err(InvalidId::Format);
        }
        Ok(ContainerId(id.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for ContainerId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl AsRef<Path> for ContainerId {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl std::str::FromStr for ContainerId {
    type Err = InvalidId;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        ContainerId::parse(id)
    }
}

impl<'de> Deserialize<'de> for ContainerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = String::deserialize(deserializer)?;
        ContainerId::parse(&id).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_table() {
        let cases: &[(&str, Option<InvalidId>)] = &[
            ("a", None),
            ("test_busybox", None),
            ("A-b+c.d_9", None),
            ("...", None),
            (".hidden", None),
            ("", Some(InvalidId::Empty)),
            (".", Some(InvalidId::Format)),
            ("..", Some(InvalidId::Format)),
            ("a/b", Some(InvalidId::Format)),
            ("../a", Some(InvalidId::Format)),
            ("a b", Some(InvalidId::Format)),
            ("a\0", Some(InvalidId::Format)),
            ("ä", Some(InvalidId::Format)),
            ("a:b", Some(InvalidId::Format)),
        ];
        for (text, want) in cases {
            assert_eq!(ContainerId::parse(text).err(), *want, "{text:?}");
        }
    }

    #[test]
    fn id_from_json_is_checked() {
        assert!(serde_json::from_str::<ContainerId>("\"ok\"").is_ok());
        assert!(serde_json::from_str::<ContainerId>("\"../x\"").is_err());
    }
}
