//! The socket over which a runtime hands over the master of a process's terminal.
//!
//! Owns: the socket's file, removed on drop. The runtime has sent the master before it exits
//! successfully, so one look after its exit is enough and nothing waits.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::error::{Error, Kind, Result};

pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    pub fn bind(dir: &Path, number: u32) -> Result<ConsoleSocket> {
        let path = dir.join(format!("c{}.{number}", std::process::id()));
        let failed = |e| Error::io("bind console socket", path.display().to_string(), e);
        let listener = crate::socket::private(|| UnixListener::bind(&path)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(ConsoleSocket { listener, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn accept(&self) -> Result<OwnedFd> {
        let subject = || self.path.display().to_string();
        let failed = |e: std::io::Error| Error::io("receive console", subject(), e);
        let (stream, _) = self.listener.accept().map_err(failed)?;
        let mut name = [0u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut name)],
            &mut control,
            flags,
        )
        .map_err(|e| failed(e.into()))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message
                && let Some(fd) = fds.next()
            {
                return Ok(fd);
            }
        }
        Err(Error::new(Kind::Internal, "receive console", subject()).source("no descriptor in it"))
    }
}

/// Removes console sockets of shims that are dead.
pub fn sweep(dir: &Path) {
    let owner = |name: &str| {
        let (pid, number) = name.strip_prefix('c')?.split_once('.')?;
        number.parse::<u32>().ok()?;
        pid.parse::<u32>().ok()
    };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(owner);
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another sweep may have been faster.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Gone already when the directory was cleaned.
        let _ = std::fs::remove_file(&self.path);
    }
}
