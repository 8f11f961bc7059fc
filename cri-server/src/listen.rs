//! Owns the daemon's socket: one daemon for one socket (a lock file beside it), mode 0600 from
//! its first moment, a stale one replaced.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode};
use tokio::net::UnixListener;

use crate::error::{Error, Kind, Result};
use crate::store::records::make_private_dir;

/// A listening socket and the lock that keeps others from taking it over.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub listener: UnixListener,
    /// Held for as long as the socket is served.
    pub lock: File,
}

/// Takes the lock and binds. Must run before other threads make files: it sets the umask.
pub fn bind(socket: &Path) -> Result<Listening> {
    if let Some(dir) = socket.parent()
        && !dir.is_dir()
    {
        make_private_dir(dir)?;
    }
    let lock = lock(socket)?;
    remove_stale(socket)?;
    let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(socket);
    rustix::process::umask(umask);
    let listener = bound.map_err(|e| Error::io("bind", socket.display(), e))?;
    Ok(Listening { listener, lock })
}

fn lock(socket: &Path) -> Result<File> {
    let mut name = socket.as_os_str().to_owned();
    name.push(".lock");
    let path = Path::new(&name);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options
        .open(path)
        .map_err(|e| Error::io("open", path.display(), e))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let text = "another coracled serves it";
            Err(Error::new(
                Kind::FailedPrecondition,
                socket.display().to_string(),
                text,
            ))
        }
        Err(e) => Err(Error::io("flock", path.display(), e)),
    }
}

/// Only with the lock held: nobody of ours can be using it.
fn remove_stale(socket: &Path) -> Result<()> {
    let Ok(meta) = std::fs::symlink_metadata(socket) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        let text = "exists and is no socket";
        return Err(Error::new(
            Kind::FailedPrecondition,
            socket.display().to_string(),
            text,
        ));
    }
    std::fs::remove_file(socket).map_err(|e| Error::io("remove", socket.display(), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn socket_is_private_exclusive_and_replaced_when_stale() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/s");
        let first = bind(&socket).unwrap();
        assert_eq!(
            socket.metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = bind(&socket).unwrap_err().to_string();
        assert!(error.contains("another coracled"), "{error}");
        drop(first);
        assert!(socket.exists());
        bind(&socket).unwrap();
    }

    #[tokio::test]
    async fn file_in_the_sockets_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
