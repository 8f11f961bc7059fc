//! Mounts that show other owners than the disk has (uidmap=, gidmap=), as a container with a user
//! namespace sees its image. Needs Linux 5.12, and 5.19 below an overlay.
//!
//! Owns: `<bundle>/idmap`, the mapped copies of an overlay's layers while it is being mounted.
//! The overlay keeps its own hold on them.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::overlay::{escaped, lower_dirs};
use crate::error::{Error, Kind, Result};

const MS_PRIVATE: u64 = 1 << 18;

/// `container:host:size[,...]` as lines of /proc/<pid>/uid_map.
pub fn lines(text: &str) -> Option<String> {
    let mut lines = String::new();
    for entry in text.split(',') {
        let mut numbers = [0u32; 3];
        let mut fields = entry.split(':');
        for number in &mut numbers {
            *number = fields.next()?.parse().ok()?;
        }
        if fields.next().is_some() || numbers[2] == 0 {
            return None;
        }
        let [container, host, size] = numbers;
        lines.push_str(&format!("{container} {host} {size}\n"));
    }
    Some(lines)
}

pub fn bad(option: &str) -> Error {
    Error::new(Kind::Invalid, "rootfs mount option", option)
        .source("not container:host:size[,...] for both users and groups")
}

pub fn namespace(uids: &str, gids: &str) -> Result<OwnedFd> {
    coracle_sys::namespace::user_namespace(uids, gids).map_err(|e| {
        let maps = format!("{} and {}", uids.trim_end(), gids.trim_end());
        Error::io("make user namespace with", maps, e)
    })
}

/// A copy of the mount at `source`, mapped, that is nowhere yet.
fn copy(
    source: &Path,
    recursive: bool,
    flags: MountAttrFlags,
    userns: &OwnedFd,
) -> std::result::Result<OwnedFd, Errno> {
    let mut how = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    how.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = rustix::mount::open_tree(CWD, source, how)?;
    let attributes = coracle_sys::mount::Attributes {
        set: u64::from(flags.bits()),
        clear: 0,
        propagation: MS_PRIVATE,
        idmap: Some(userns.as_fd()),
    };
    coracle_sys::mount::set_attributes(tree.as_fd(), &attributes, recursive)
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    Ok(tree)
}

fn place(tree: &OwnedFd, target: &Path) -> std::result::Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, target, flags)
}

pub fn bind(
    source: &Path,
    target: &Path,
    recursive: bool,
    flags: MountAttrFlags,
    userns: &OwnedFd,
) -> std::result::Result<(), Errno> {
    place(&copy(source, recursive, flags, userns)?, target)
}

/// The mount at `target` gives way to its mapped copy.
pub fn replace(target: &Path, userns: &OwnedFd) -> std::result::Result<(), Errno> {
    let tree = copy(target, false, MountAttrFlags::empty(), userns)?;
    rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?;
    place(&tree, target)
}

fn directory(rootfs: &Path) -> PathBuf {
    rootfs.with_file_name("idmap")
}

/// The layers of an overlay, mapped, in directories of the bundle; removed on drop.
pub struct Staged<'a> {
    rootfs: &'a Path,
    /// The overlay's options with the layers of this stage.
    pub data: Vec<String>,
}

impl Staged<'_> {
    pub fn new<'a>(rootfs: &'a Path, options: &[String], userns: &OwnedFd) -> Result<Staged<'a>> {
        let mut stage = Staged {
            rootfs,
            data: Vec::new(),
        };
        for option in options {
            let mapped = match option.strip_prefix("lowerdir=") {
                Some(dirs) => format!("lowerdir={}", stage.map(&lower_dirs(dirs), userns)?),
                None => option.clone(),
            };
            stage.data.push(mapped);
        }
        Ok(stage)
    }

    fn map(&self, layers: &[String], userns: &OwnedFd) -> Result<String> {
        let mut names = Vec::with_capacity(layers.len());
        for (number, layer) in layers.iter().enumerate() {
            let place_of = directory(self.rootfs).join(number.to_string());
            let failed = |e: std::io::Error| {
                let text = format!("{layer} on {}", place_of.display());
                Error::io("mount with its ids mapped", text, e)
            };
            fs::create_dir_all(&place_of).map_err(failed)?;
            copy(
                Path::new(layer),
                false,
                MountAttrFlags::MOUNT_ATTR_RDONLY,
                userns,
            )
            .and_then(|tree| place(&tree, &place_of))
            .map_err(|e| failed(e.into()))?;
            names.push(escaped(&place_of.to_string_lossy()));
        }
        Ok(names.join(":"))
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // What stays is removed with the bundle's other mounts.
        let _ = clean(self.rootfs);
    }
}

pub fn clean(rootfs: &Path) -> Result<()> {
    let dir = directory(rootfs);
    let Ok(entries) = fs::read_dir(&dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        super::unmount_all(&entry.path())?;
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(&dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_the_kernels_lines() {
        assert_eq!(lines("0:100000:65536").as_deref(), Some("0 100000 65536\n"));
        assert_eq!(lines("0:9:1,5:7:2").as_deref(), Some("0 9 1\n5 7 2\n"));
        for bad in [
            "", "0", "0:1", "0:1:2:3", "a:1:2", "0:1:0", "0:1:2,", "-1:1:1",
        ] {
            assert_eq!(lines(bad), None, "{bad}");
        }
    }
}
