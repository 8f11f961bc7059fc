//! The gate between `create` and `start`: a fifo in the state directory.
//!
//! The parent opens it for both directions before the clone, so the child holds it open without a
//! path and reads one byte. `start` opens it for writing only, which fails when no reader is left:
//! that is a dead init. The file's presence is what tells created from running.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::state::{EXEC_FIFO, Entry};

/// Makes the gate.
///
/// # Errors
/// The state directory cannot be written.
pub fn create(entry: &Entry) -> Result<OwnedFd> {
    let fail = |call: &'static str| {
        move |error: Errno| Error::system(call, entry.fifo_path().display().to_string(), error)
    };
    rustix::fs::mknodat(
        entry,
        EXEC_FIFO,
        rustix::fs::FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .map_err(fail("mkfifo"))?;
    rustix::fs::openat(
        entry,
        EXEC_FIFO,
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(fail("open"))
}

/// Child: waits for `start`.
///
/// # Errors
/// The fifo is broken; not being started is no error and takes as long as it takes.
pub fn wait(gate: &OwnedFd) -> Result<()> {
    let mut byte = [0u8; 1];
    match rustix::io::retry_on_intr(|| rustix::io::read(gate, &mut byte)) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::system("read", EXEC_FIFO, error)),
    }
}

/// `start`: lets the program begin and takes the gate away.
///
/// # Errors
/// The container's init is gone.
pub fn open(entry: &Entry, init_is_alive: bool) -> Result<()> {
    let fail = |call: &'static str| {
        move |error: Errno| Error::system(call, entry.fifo_path().display().to_string(), error)
    };
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(entry, EXEC_FIFO, flags, Mode::empty()) {
        Ok(fifo) => {
            rustix::io::write(&fifo, b"0").map_err(fail("write"))?;
        }
        // A `start` that was killed between the byte and the unlink below: the program runs.
        Err(Errno::NXIO) if init_is_alive => {}
        Err(Errno::NXIO) => {
            return Err(Error::new(
                Kind::State,
                "cannot start a container that has stopped",
                "",
            ));
        }
        Err(error) => return Err(fail("open")(error)),
    }
    match rustix::fs::unlinkat(entry, EXEC_FIFO, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(fail("unlink")(error)),
    }
}
