//! /dev: nodes, the usual links, and the console.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, StatxAttributes, StatxFlags, Uid};
use rustix::io::Errno;

use super::mount::{attach, clone_handle, clone_tree};
use super::resolve::{Root, at};
use crate::error::{Error, Result};
use crate::plan::{DevPlan, NodeStep};

const LINKS: [(&CStr, &CStr); 4] = [
    (c"/proc/self/fd", c"fd"),
    (c"/proc/self/fd/0", c"stdin"),
    (c"/proc/self/fd/1", c"stdout"),
    (c"/proc/self/fd/2", c"stderr"),
];

/// Fills /dev.
pub fn fill(root: &Root, plan: &DevPlan) -> Result<()> {
    let dev = root.make_directory(c"dev", 0o755)?;
    for step in &plan.nodes {
        let made;
        let parent = if step.parent.as_c_str() == c"dev" {
            &dev
        } else {
            made = root.make_directory(&step.parent, 0o755)?;
            &made
        };
        if plan.bind {
            bind_node(parent, step)
        } else {
            make_node(parent, step)
        }
        .map_err(|error| error.context(format!("error creating device {:?}", step.host)))?;
    }
    if rustix::fs::access(c"/proc/kcore", rustix::fs::Access::EXISTS).is_ok() {
        link(&dev, c"/proc/kcore", c"core")?;
    }
    for (target, name) in LINKS {
        link(&dev, target, name)?;
    }
    ptmx(&dev)
}

fn link(dev: &OwnedFd, target: &CStr, name: &CStr) -> Result<()> {
    match rustix::fs::symlinkat(target, dev, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(at("symlinkat", name, error)),
    }
}

/// /dev/ptmx has to be the one of the container's own devpts.
fn ptmx(dev: &OwnedFd) -> Result<()> {
    match rustix::fs::symlinkat(c"pts/ptmx", dev, c"ptmx") {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        Err(error) => return Err(at("symlinkat", c"ptmx", error)),
    }
    rustix::fs::unlinkat(dev, c"ptmx", AtFlags::empty())
        .map_err(|error| at("unlinkat", c"ptmx", error))?;
    link(dev, c"pts/ptmx", c"ptmx")
}

fn make_node(parent: &OwnedFd, step: &NodeStep) -> Result<()> {
    let device = rustix::fs::makedev(step.major, step.minor);
    let file_type = FileType::from_raw_mode(step.file_type);
    let mode = Mode::from_raw_mode(step.mode);
    match rustix::fs::mknodat(parent, &step.name, file_type, mode, device) {
        Ok(()) => {}
        Err(Errno::EXIST) => return verify(parent, step).map(drop),
        // The runtime itself is in a user namespace, as under rootless engines.
        Err(Errno::PERM) if step.file_type != libc::S_IFIFO => return bind_node(parent, step),
        Err(error) => return Err(at("mknodat", &step.name, error)),
    }
    if step.uid == 0 && step.gid == 0 {
        return Ok(());
    }
    // What has the name by now may be another's file.
    let node = verify(parent, step)?;
    rustix::fs::chownat(
        &node,
        c"",
        Some(Uid::from_raw(step.uid)),
        Some(Gid::from_raw(step.gid)),
        AtFlags::EMPTY_PATH,
    )
    .map_err(|error| at("fchownat", &step.name, error))
}

/// A node that the image brought along must be the very device, not something in its place. What
/// the config has mounted there is the config's choice.
fn verify(parent: &OwnedFd, step: &NodeStep) -> Result<OwnedFd> {
    let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::openat(parent, &step.name, look, Mode::empty())
        .map_err(|error| at("openat(O_NOFOLLOW)", &step.name, error))?;
    let stat = rustix::fs::fstat(&node).map_err(|error| at("fstat", &step.name, error))?;
    let numbers = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let same = FileType::from_raw_mode(stat.st_mode) == FileType::from_raw_mode(step.file_type)
        && (step.file_type == libc::S_IFIFO || numbers == (step.major, step.minor));
    if same || is_mounted(&node, &step.name)? {
        return Ok(node);
    }
    Err(Error::invalid(format!(
        "{:?} exists in the rootfs and is not that device",
        step.host
    )))
}

fn is_mounted(file: &OwnedFd, name: &CStr) -> Result<bool> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .map(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        .map_err(|error| at("statx", name, error))
}

fn bind_node(parent: &OwnedFd, step: &NodeStep) -> Result<()> {
    if step.file_type == libc::S_IFIFO {
        return make_node(parent, step);
    }
    let target = empty_file(parent, &step.name)?;
    if is_mounted(&target, &step.name)? {
        return Ok(());
    }
    let tree = clone_tree(&step.host, false)?;
    let stat = rustix::fs::fstat(&tree).map_err(|error| at("fstat", &step.name, error))?;
    let numbers = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    if FileType::from_raw_mode(stat.st_mode) != FileType::from_raw_mode(step.file_type)
        || numbers != (step.major, step.minor)
    {
        return Err(Error::invalid(format!(
            "the host's {:?} is not the device {}:{}, and a user namespace cannot make one",
            step.host, step.major, step.minor
        )));
    }
    attach(tree.as_fd(), target.as_fd()).map_err(|error| at("move_mount", &step.name, error))
}

/// A regular file to mount on; made if missing, never followed.
fn empty_file(parent: &OwnedFd, name: &CStr) -> Result<OwnedFd> {
    let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, make, Mode::from_raw_mode(0o666)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(at("openat(O_CREAT)", name, error)),
    }
    let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, name, look, Mode::empty())
        .map_err(|error| at("openat(O_NOFOLLOW)", name, error))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| at("fstat", name, error))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink | FileType::Directory => Err(Error::invalid(format!(
            "/dev/{} exists in the rootfs and cannot be mounted on",
            name.to_string_lossy()
        ))),
        _ => Ok(file),
    }
}

/// Puts the container's terminal at /dev/console.
pub fn mount_console(root: &Root, slave: &OwnedFd) -> Result<()> {
    let dev = root.make_directory(c"dev", 0o755)?;
    let target = empty_file(&dev, c"console")?;
    let tree = clone_handle(slave.as_fd(), false)
        .map_err(|error| Error::system("open_tree", "the console", error))?;
    attach(tree.as_fd(), target.as_fd()).map_err(|error| at("move_mount", c"dev/console", error))
}

/// Where stdio is the null device, makes it the container's own: the host's node is on a file
/// system that the container does not have, which is in the way of a checkpoint, and of access
/// rules that go by labels.
pub fn own_null(root: &Root) -> Result<()> {
    let is_null = |stat: &rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3)
    };
    let mut own = None;
    for number in 0..3 {
        let stdio = match number {
            0 => rustix::stdio::stdin(),
            1 => rustix::stdio::stdout(),
            _ => rustix::stdio::stderr(),
        };
        // A closed one stays closed.
        if !rustix::fs::fstat(stdio).is_ok_and(|stat| is_null(&stat)) {
            continue;
        }
        let null = match &own {
            Some(null) => null,
            None => {
                let null = root
                    .open(c"dev/null", OFlags::RDWR)
                    .map_err(|error| at("openat2", c"dev/null", error))?;
                let stat =
                    rustix::fs::fstat(&null).map_err(|error| at("fstat", c"dev/null", error))?;
                if !is_null(&stat) {
                    return Err(Error::invalid(
                        "the container's /dev/null is not the null device",
                    ));
                }
                own.insert(null)
            }
        };
        match number {
            0 => rustix::stdio::dup2_stdin(null),
            1 => rustix::stdio::dup2_stdout(null),
            _ => rustix::stdio::dup2_stderr(null),
        }
        .map_err(|error| at("dup2", c"dev/null", error))?;
    }
    Ok(())
}

/// The host's /dev/null as a detached mount, for masking files. It is checked: a /dev that some
/// one has tampered with must not become what covers a secret (CVE-2025-31133).
pub fn null_mount() -> Result<OwnedFd> {
    let tree = clone_tree(c"/dev/null", false)?;
    let stat =
        rustix::fs::fstat(&tree).map_err(|error| Error::system("fstat", "/dev/null", error))?;
    let numbers = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || numbers != (1, 3) {
        return Err(Error::invalid(
            "the host's /dev/null is not the null device",
        ));
    }
    Ok(tree)
}
