//! The shim's own unix socket: its name, how it is bound, and whether somebody serves it.
//!
//! Owns: the rule that one name has one server. Binding happens under a lock of the directory,
//! so that of two starts of one group exactly one serves and the other finds it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::proto::ttrpc;
use crate::ttrpc::frame;

/// How long a shim that lives may take to say so. One that is silent for longer is let alone.
const PROBE: Duration = Duration::from_secs(1);

pub const DEFAULT_DIR: &str = "/run/containerd/s";
/// sockaddr_un.sun_path with its final zero.
const MAX_PATH: usize = 107;

/// Runs `create` under umask 0177: a socket's mode is its creator's umask.
pub fn private<T>(create: impl FnOnce() -> T) -> T {
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let made = create();
    rustix::process::umask(before);
    made
}

/// containerd's name: the hash of the joined containerd address, namespace and group.
pub fn path(dir: &Path, address: &str, namespace: &str, group: &str) -> Result<PathBuf> {
    let parts = [address, namespace, group];
    let joined: Vec<&str> = parts.into_iter().filter(|p| !p.is_empty()).collect();
    let digest = Sha256::digest(joined.join("/").as_bytes());
    let mut name: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    // A long directory shortens the name; 128 bits of it must stay.
    let room = MAX_PATH.saturating_sub(dir.as_os_str().len() + 1);
    if room < 32 {
        return Err(
            Error::new(Kind::Invalid, "socket directory", dir.display().to_string())
                .source("path too long for a unix socket"),
        );
    }
    name.truncate(room);
    Ok(dir.join(name))
}

pub fn stream() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

pub fn connect(socket: impl AsFd, path: &Path) -> io::Result<()> {
    Ok(rustix::net::connect(
        socket,
        &SocketAddrUnix::new(path.as_os_str().as_bytes())?,
    )?)
}

/// Somebody accepts there. A full queue (EAGAIN) is somebody who is slow.
pub fn served(path: &Path) -> bool {
    match stream().and_then(|s| connect(s, path)) {
        Ok(()) => true,
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
    }
}

/// Somebody answers there, or keeps us waiting without going away. A killed process closes its
/// connections before its listener: whoever is told of its death by the one can still connect to
/// the other for a moment, and learns the truth by the end of that connection.
fn answers(path: &Path) -> bool {
    let socket = match stream().and_then(|s| connect(&s, path).map(|()| s)) {
        Ok(socket) => socket,
        Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
    };
    // Connect with any id is the probe of daemons.
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: "Connect".to_owned(),
        ..Default::default()
    };
    let mut bytes = Vec::new();
    frame::append(&mut bytes, 1, frame::REQUEST, &request);
    if rustix::net::send(&socket, &bytes, SendFlags::NOSIGNAL).is_err() {
        return false;
    }
    let mut polled = [PollFd::new(&socket, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: PROBE.as_secs() as i64,
        tv_nsec: 0,
    };
    if rustix::event::poll(&mut polled, Some(&limit)) == Ok(0) {
        return true;
    }
    let mut byte = [0; 1];
    !matches!(
        rustix::net::recv(&socket, &mut byte, RecvFlags::empty()),
        Ok((0, _)) | Err(Errno::CONNRESET | Errno::PIPE)
    )
}

pub enum Bound {
    Listening(OwnedFd),
    /// The group's shim is there already.
    Served,
}

/// Who binds, or clears up after a dead shim, does it alone in its directory. Held for as long as
/// the descriptor.
pub fn lock_of(path: &Path) -> Result<OwnedFd> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let failed =
        |operation, e: rustix::io::Errno| Error::io(operation, path.display().to_string(), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let lock =
        rustix::fs::open(dir, flags, Mode::empty()).map_err(|e| failed("open directory of", e))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|e| failed("lock directory of", e))?;
    Ok(lock)
}

/// Takes the socket of a dead shim away and puts its members on the list of those to be ended.
/// Tells whether it is dead: one that is served is left alone.
pub fn withdraw(path: &Path) -> Result<bool> {
    let failed = |operation, e: io::Error| Error::io(operation, path.display().to_string(), e);
    if path.parent().is_none_or(|dir| !dir.exists()) {
        // As after a boot: nothing is left of it here.
        return Ok(true);
    }
    if answers(path) {
        return Ok(false);
    }
    let _lock = lock_of(path)?;
    // A successor may have come in between.
    if served(path) {
        return Ok(false);
    }
    crate::records::bury_members(path).map_err(|e| failed("bury members of", e))?;
    crate::records::remove_socket(path);
    crate::console::sweep(path.parent().unwrap_or(Path::new("/")));
    Ok(true)
}

pub fn bind(path: &Path) -> Result<Bound> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let failed = |operation, e: io::Error| Error::io(operation, path.display().to_string(), e);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| failed("create directory of", e))?;
    // Whatever umask the daemon gave us.
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(dir).map_or(0o700, |m| m.permissions().mode() & 0o777);
    if mode & 0o700 != 0o700 || mode & 0o066 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .map_err(|e| failed("chmod directory of", e))?;
    }
    let _lock = lock_of(path)?;
    let address = SocketAddrUnix::new(path.as_os_str().as_bytes())
        .map_err(|e| failed("address", e.into()))?;
    let socket = stream().map_err(|e| failed("socket", e))?;
    let mut bound = private(|| rustix::net::bind(&socket, &address));
    if bound == Err(rustix::io::Errno::ADDRINUSE) {
        if served(path) {
            return Ok(Bound::Served);
        }
        std::fs::remove_file(path).map_err(|e| failed("unlink", e))?;
        crate::console::sweep(dir);
        bound = private(|| rustix::net::bind(&socket, &address));
    }
    bound.map_err(|e| failed("bind", e.into()))?;
    // Members without a server are a dead shim's, whoever has taken its socket away.
    if let Err(e) = crate::records::bury_members(path) {
        crate::records::remove_socket(path);
        return Err(failed("bury members of", e));
    }
    rustix::net::listen(&socket, 128).map_err(|e| failed("listen", e.into()))?;
    Ok(Bound::Listening(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn name_is_the_hash_of_the_joined_path() {
        let got = path(
            Path::new("/run/containerd/s"),
            "/run/containerd/containerd.sock",
            "default",
            "x",
        )
        .unwrap();
        let digest = Sha256::digest(b"/run/containerd/containerd.sock/default/x");
        let name: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(got, Path::new("/run/containerd/s").join(name));
    }

    #[test]
    fn long_directories_shorten_the_name_or_fail() {
        let dir = format!("/{}", "d".repeat(60));
        assert_eq!(
            path(Path::new(&dir), "", "n", "g")
                .unwrap()
                .as_os_str()
                .len(),
            MAX_PATH
        );
        let dir = format!("/{}", "d".repeat(90));
        assert!(path(Path::new(&dir), "", "n", "g").is_err());
    }

    #[test]
    fn second_bind_finds_the_first_and_a_stale_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/x");
        let Bound::Listening(first) = bind(&path).unwrap() else {
            panic!()
        };
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path).unwrap(), Bound::Served));
        // Dying: it can be connected to, and is gone before it has answered.
        let (asked, probed) = std::sync::mpsc::channel();
        let probe = path.clone();
        let thread = std::thread::spawn(move || asked.send(answers(&probe)));
        std::thread::sleep(Duration::from_millis(100));
        drop(first);
        assert!(!probed.recv().unwrap());
        thread.join().unwrap().unwrap();
        assert!(!served(&path) && !answers(&path));
        assert!(matches!(bind(&path).unwrap(), Bound::Listening(_)));
    }
}
