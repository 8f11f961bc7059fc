//! Namespaces kept alive by a file instead of a process.
//!
//! A pod has no pause process. A thread of our own enters fresh namespaces, sets what belongs to
//! them (hostname, sysctls, loopback), binds them to files and ends; the namespaces live on as
//! long as the bind mounts do.
//!
//! ```text
//! create: thread -> unshare -> hostname, sysctls, lo up -> bind /proc/thread-self/ns/X on a file
//! remove: umount (all layers) -> unlink;  any part that is already gone is fine
//! ```
//!
//! Never changes the caller's own namespaces: a thread that has entered another never does
//! anything else afterwards.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use crate::network::netlink::{Connection, route};
use crate::network::{NetworkError, NetworkErrorKind, Result};

/// The directory that `ip netns` looks into.
const IP_NETNS_DIR: &str = "/run/netns";

/// What to pin, and what to set inside. A namespace without a path is not made.
pub struct PinRequest<'a> {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    /// Needs `uts`.
    pub hostname: Option<String>,
    /// `net.*` needs `net`; `kernel.{shm*,msg*,sem}` and `fs.mqueue.*` need `ipc`.
    pub sysctls: &'a BTreeMap<String, String>,
}

/// The files that now hold the namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PinnedNamespaces {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
}

/// Counters of one interface, as the kernel counts them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// Makes the namespaces and pins them. On failure nothing is left behind.
pub fn create(request: &PinRequest<'_>) -> Result<PinnedNamespaces> {
    let sysctls = check(request)?;
    let paths: Vec<(&str, CloneFlags, &Path)> = [
        ("net", CloneFlags::CLONE_NEWNET, &request.net),
        ("ipc", CloneFlags::CLONE_NEWIPC, &request.ipc),
        ("uts", CloneFlags::CLONE_NEWUTS, &request.uts),
    ]
    .into_iter()
    .filter_map(|(kind, flag, path)| path.as_deref().map(|path| (kind, flag, path)))
    .collect();
    for (_, _, path) in &paths {
        prepare_directory(path)?;
    }
    on_own_thread(|| {
        let flags = paths
            .iter()
            .fold(CloneFlags::empty(), |all, (_, flag, _)| all | *flag);
        unshare(flags).map_err(|e| NetworkError::kernel("unshare", format!("{flags:?}"), e))?;
        set_inside(request, &sysctls)?;
        let mut pinned: Vec<&Path> = Vec::new();
        for (kind, _, path) in &paths {
            if let Err(error) = pin(kind, path) {
                for done in pinned {
                    let _ = remove(done);
                }
                return Err(error);
            }
            pinned.push(path);
        }
        Ok(())
    })??;
    Ok(PinnedNamespaces {
        net: request.net.clone(),
        ipc: request.ipc.clone(),
        uts: request.uts.clone(),
    })
}

/// Unmounts every layer and removes the file. Whatever is already gone is fine.
pub fn remove(path: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: not a mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Counters of every interface of the namespace, loopback included.
pub fn netns_stats(path: &Path) -> Result<Vec<InterfaceStats>> {
    let links = run_in(path, || {
        let mut conn =
            Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
        route::links(&mut conn)
            .map_err(|e| NetworkError::kernel("list links of", path.display(), e))
    })??;
    Ok(links
        .into_iter()
        .map(|link| {
            let stats = link.stats.unwrap_or_default();
            InterfaceStats {
                name: link.name,
                rx_bytes: stats.rx_bytes,
                rx_packets: stats.rx_packets,
                rx_errors: stats.rx_errors,
                rx_dropped: stats.rx_dropped,
                tx_bytes: stats.tx_bytes,
                tx_packets: stats.tx_packets,
                tx_errors: stats.tx_errors,
                tx_dropped: stats.tx_dropped,
            }
        })
        .collect())
}

/// Runs `work` on a thread of its own inside the network namespace. Sockets that it opens stay
/// there and may be handed out.
pub fn run_in<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(netns)
        .map_err(|e| NetworkError::io("open network namespace", netns.display(), e))?;
    run_in_fd(file.as_fd(), work)
        .map_err(|e| NetworkError::kernel("enter network namespace", netns.display(), e))
}

/// As [`run_in`], for a namespace that is already open.
pub(crate) fn run_in_fd<T: Send>(
    netns: std::os::fd::BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T> {
    on_own_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)
            .map_err(|e| NetworkError::kernel("setns(CLONE_NEWNET)", "", e))?;
        Ok(work())
    })?
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(256 * 1024)
            .spawn_scoped(scope, work)
            .map_err(|e| NetworkError::io("start a thread for", "a namespace", e))?;
        thread.join().map_err(|_| {
            NetworkError::new(
                NetworkErrorKind::Kernel,
                "thread inside the namespace",
                "panicked",
            )
        })
    })
}

/// Wants of the request what cannot work refused before anything is made.
fn check(request: &PinRequest<'_>) -> Result<Vec<(PathBuf, String)>> {
    if request.hostname.is_some() && request.uts.is_none() {
        return Err(NetworkError::invalid(
            "set hostname",
            request.hostname.clone().unwrap_or_default(),
            "the pod shares the host's UTS namespace",
        ));
    }
    let owned = Owned {
        net: request.net.is_some(),
        ipc: request.ipc.is_some(),
    };
    request
        .sysctls
        .iter()
        .map(|(name, value)| sysctl_path(name, value, owned))
        .collect()
}

#[derive(Clone, Copy)]
struct Owned {
    net: bool,
    ipc: bool,
}

/// The file of a sysctl that belongs to a namespace of the pod's own; everything else is refused
/// (CVE-2022-0811: a value smuggled past such a check set kernel.core_pattern).
///
/// Both spellings of sysctl.d(5): the first separator decides whether `.` or `/` separates, the
/// other one then stands for itself (`net.ipv4.conf.eth0/100.forwarding`).
fn sysctl_path(name: &str, value: &str, owned: Owned) -> Result<(PathBuf, String)> {
    let refuse = |why: &str| Err(NetworkError::invalid("sysctl", format!("{name:?}"), why));
    let swap = name
        .find(['.', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b'.');
    let relative: String = name
        .chars()
        .map(|c| match c {
            '.' if swap => '/',
            '/' if swap => '.',
            c => c,
        })
        .collect();
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b))
    {
        return refuse("the name has a character that no sysctl has");
    }
    if relative
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
    {
        return refuse("the name has an empty or dot component");
    }
    if value.bytes().any(|b| b == b'\n' || b == b'\r' || b == 0) {
        return refuse("the value has a line break or zero byte");
    }
    let parts: Vec<&str> = relative.split('/').collect();
    match parts.as_slice() {
        ["net", _, ..] if owned.net => {}
        ["net", _, ..] => return refuse("the pod shares the host's network namespace"),
        ["kernel", leaf] if is_ipc_leaf(leaf) && owned.ipc => {}
        ["fs", "mqueue", _] if owned.ipc => {}
        ["kernel", leaf] if is_ipc_leaf(leaf) => {
            return refuse("the pod shares the host's IPC namespace");
        }
        ["fs", "mqueue", _] => return refuse("the pod shares the host's IPC namespace"),
        _ => {
            return refuse(
                "not a sysctl of a namespace; only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* are",
            );
        }
    }
    Ok((Path::new("/proc/sys").join(relative), value.to_owned()))
}

fn is_ipc_leaf(leaf: &str) -> bool {
    leaf.starts_with("shm") || leaf.starts_with("msg") || leaf == "sem"
}

/// Runs on the thread that is inside.
fn set_inside(request: &PinRequest<'_>, sysctls: &[(PathBuf, String)]) -> Result<()> {
    if let Some(hostname) = &request.hostname {
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(|e| NetworkError::kernel("sethostname", hostname, e))?;
    }
    if request.net.is_some() {
        let mut conn =
            Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
        // Loopback is always the first link of a network namespace (loopback_net_init).
        conn.apply(&[route::set_up(1)])
            .map_err(|(_, e)| NetworkError::kernel("set link up", "lo", e))?;
        // CVE-2020-13401: a pod takes no routes from whoever shouts on its link. Interfaces that
        // come later take their setting from `default`.
        match write_sysctl(Path::new("/proc/sys/net/ipv6/conf/default/accept_ra"), "0") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(NetworkError::io(
                    "set sysctl",
                    "net.ipv6.conf.default.accept_ra",
                    error,
                ));
            }
            _ => {}
        }
    }
    for (path, value) in sysctls {
        write_sysctl(path, value).map_err(|error| {
            NetworkError::io(
                "set sysctl",
                format!("{} to {value:?}", path.display()),
                error,
            )
        })?;
    }
    Ok(())
}

/// Resolved in the namespaces of the calling thread.
pub(crate) fn write_sysctl(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn pin(kind: &str, path: &Path) -> Result<()> {
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path);
    open.map_err(|e| NetworkError::io("create namespace file", path.display(), e))?;
    let source = format!("/proc/thread-self/ns/{kind}");
    rustix::mount::mount_bind(source.as_str(), path).map_err(|e| {
        let _ = fs::remove_file(path);
        NetworkError::kernel("bind-mount", format!("{source} on {}", path.display()), e)
    })
}

fn prepare_directory(path: &Path) -> Result<()> {
    let Some(dir) = path.parent().filter(|_| path.is_absolute()) else {
        return Err(NetworkError::invalid(
            "pin namespace",
            path.display().to_string(),
            "not an absolute path of a file",
        ));
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(|e| NetworkError::io("create directory", dir.display(), e))?;
    if dir == Path::new(IP_NETNS_DIR) {
        share(dir).map_err(|e| NetworkError::kernel("make a shared mount of", dir.display(), e))?;
    }
    Ok(())
}

/// As `ip netns add` does, so that namespaces named by either are seen, and removed, in every
/// mount namespace: EINVAL says that the directory is not a mount point yet. What is mounted in a
/// shared directory is shared from birth, so only the first time needs to go through all of it.
fn share(dir: &Path) -> rustix::io::Result<()> {
    match rustix::mount::mount_change(dir, MountPropagationFlags::SHARED) {
        Err(Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(dir, dir)?;
            let all = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
            rustix::mount::mount_change(dir, all)
        }
        other => other,
    }
}

#[cfg(test)]
#[path = "network/tests/netns.rs"]
mod tests;
