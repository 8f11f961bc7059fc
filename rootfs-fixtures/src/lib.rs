//! Test images without Docker: a catalogue of images, each a list of layers made from Debian
//! packages, the `probe` program and literal files, written as one OCI layout.
//!
//! ```text
//! debian   apt package -> extracted files            (cached by package file name)
//! elf      which shared libraries a program needs
//! tree     files, links and devices -> one layer blob (sorted, one fixed time: same bytes always)
//! catalogue  the images, by name
//! layout   layers + configs -> OCI layout directory
//! registry layout -> storage of docker-registry, or a push over HTTP
//! ```
//! It never needs root: owners and devices are only ever tar headers.
#![forbid(unsafe_code)]

pub mod catalogue;
pub mod debian;
pub mod elf;
pub mod layout;
pub mod registry;
pub mod tree;

use std::path::PathBuf;

/// Where downloads and built images are kept between runs.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CORACLE_CACHE").filter(|d| !d.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let home = std::env::var_os("HOME").ok_or_else(|| anyhow::anyhow!("HOME is not set"))?;
    Ok(PathBuf::from(home).join(".cache/coracle"))
}

/// A name for what was made from `key`.
pub fn short_hash(key: &str) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(key)[..8])
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
