//! Finds the programs under test and the tools around them. A program that is missing is an
//! error that says how to get it, never a skip.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Directory of coracle, the shim, coracled, fixtures and probe: `CORACLE_BIN_DIR`, else where
/// `make build` puts them.
fn directory() -> PathBuf {
    match std::env::var_os("CORACLE_BIN_DIR").filter(|d| !d.is_empty()) {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"),
    }
}

fn ours(name: &str) -> Result<PathBuf> {
    let path = directory().join(name);
    path.canonicalize().with_context(|| {
        format!(
            "{} is missing: run make build tools, or set CORACLE_BIN_DIR",
            path.display()
        )
    })
}

pub fn coracle() -> Result<PathBuf> {
    ours("coracle")
}

pub fn shim() -> Result<PathBuf> {
    ours("containerd-shim-coracle-v2")
}

pub fn coracled() -> Result<PathBuf> {
    ours("coracled")
}

/// The fixtures program is a tool: it may lie apart from the programs under test.
pub fn fixtures() -> Result<PathBuf> {
    tool("CORACLE_TOOLS_DIR", "fixtures")
}

pub fn probe() -> Result<PathBuf> {
    tool("CORACLE_TOOLS_DIR", "probe")
}

/// Runs a program with system calls missing.
pub fn without() -> Result<PathBuf> {
    tool("CORACLE_TOOLS_DIR", "without")
}

fn tool(variable: &str, name: &str) -> Result<PathBuf> {
    match std::env::var_os(variable).filter(|d| !d.is_empty()) {
        Some(dir) => Ok(Path::new(&dir).join(name).canonicalize()?),
        None => ours(name),
    }
}

pub fn cache() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CORACLE_CACHE").filter(|d| !d.is_empty()) {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    Ok(Path::new(&home).join(".cache/coracle"))
}

pub fn crictl() -> Result<PathBuf> {
    let path = cache()?.join("bin/crictl");
    if !path.exists() {
        bail!("{} is missing: run make deps", path.display());
    }
    Ok(path)
}

/// A program of a Debian package, None when it is not installed.
pub fn installed(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
}
