//! Owns the ids of sandboxes and containers: 64 lower-case hex digits, random. Never looks
//! anything up.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A fresh random id.
            pub fn random() -> Result<Self> {
                random_hex().map($name)
            }

            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> std::result::Result<Self, String> {
                let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if text.len() == 64 && text.bytes().all(hex) {
                    Ok($name(text))
                } else {
                    Err(format!("{text:?} is not an id of 64 hex digits"))
                }
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

id_type!(
    /// The id of a pod sandbox.
    SandboxId
);
id_type!(
    /// The id of a container.
    ContainerId
);

fn random_hex() -> Result<String> {
    let mut bytes = [0_u8; 32];
    fill_random(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Fills a buffer from the kernel's random number generator.
pub fn fill_random(bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut bytes[done..], flags) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("getrandom", "", e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_random_is_64_hex_and_unique() {
        let a = SandboxId::random().unwrap();
        let b = SandboxId::random().unwrap();
        assert_ne!(a, b);
        assert_eq!(SandboxId::try_from(a.as_str().to_owned()), Ok(a));
    }

    #[test]
    fn id_with_path_characters_is_refused() {
        assert!(ContainerId::try_from("../".repeat(21) + "x").is_err());
        assert!(ContainerId::try_from(String::new()).is_err());
    }
}
