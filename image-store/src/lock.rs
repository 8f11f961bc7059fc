//! Owns the lock that keeps two daemons out of one store.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

/// Held as long as the store is open; the kernel drops it with the process.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let failed = |call| {
            let path = &path;
            move |error| Error::io(call, path.display().to_string(), error)
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut holder);
                return Err(Error::new(
                    ErrorKind::Io,
                    "open image store",
                    root.display().to_string(),
                )
                .because(format!("it is in use by process {}", holder.trim())));
            }
            Err(errno) => return Err(failed("flock")(errno.into())),
        }
        // Only for the message above: a full disk must not keep the store from opening.
        let _ = file.set_len(0);
        let _ = writeln!(file, "{}", std::process::id());
        Ok(Lock { _file: file })
    }
}
