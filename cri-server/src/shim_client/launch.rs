//! Owns the two commands of the shim binary that a daemon runs: `start`, which leaves a shim
//! behind and prints its address, and `delete`, which clears up after a dead one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::error::{Error, Kind, Result};

/// How to run the shim binary for one pod.
#[derive(Debug, Clone)]
pub struct Shim {
    /// The binary.
    pub binary: PathBuf,
    /// Directory of the shims' sockets.
    pub socket_dir: PathBuf,
}

/// Starts the shim of a pod (or finds the one that runs) and returns its socket.
///
/// `bundle` becomes the shim's working directory; it must exist.
pub async fn start(shim: &Shim, sandbox_id: &str, bundle: &Path) -> Result<PathBuf> {
    let output = run(shim, sandbox_id, bundle, "start", Duration::from_secs(15)).await?;
    let text = String::from_utf8_lossy(&output);
    let Some(path) = text.trim().strip_prefix("unix://") else {
        let text = format!("printed {:?} instead of an address", text.trim());
        return Err(Error::new(Kind::Internal, "start shim", sandbox_id).because(text));
    };
    Ok(PathBuf::from(path))
}

/// Kills and removes what a dead shim left of one container.
pub async fn delete_leftovers(shim: &Shim, container_id: &str, bundle: &Path) -> Result<()> {
    if !bundle.is_dir() {
        return Ok(());
    }
    run(
        shim,
        container_id,
        bundle,
        "delete",
        Duration::from_secs(20),
    )
    .await
    .map(|_| ())
}

async fn run(
    shim: &Shim,
    id: &str,
    bundle: &Path,
    command: &'static str,
    limit: Duration,
) -> Result<Vec<u8>> {
    let operation = || format!("{} {command}", shim.binary.display());
    let mut child = Command::new(&shim.binary);
    child
        .args(["-namespace", super::NAMESPACE, "-address", "", "-id", id])
        .arg("-bundle")
        .arg(bundle)
        .arg(command)
        .current_dir(bundle)
        .env("CORACLE_SHIM_SOCKET_DIR", &shim.socket_dir)
        .env_remove("TTRPC_ADDRESS")
        .env_remove("GRPC_ADDRESS")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let ran = tokio::time::timeout(limit, child.output()).await;
    let output = match ran {
        Ok(Ok(output)) => output,
        Ok(Err(e)) => return Err(Error::io(operation(), id, e)),
        Err(_) => {
            let text = format!("did not end within {} s", limit.as_secs());
            return Err(Error::new(Kind::DeadlineExceeded, operation(), id).because(text));
        }
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let text = format!("{}: {}", output.status, stderr.trim());
    Err(Error::new(Kind::Internal, operation(), id).because(text))
}
