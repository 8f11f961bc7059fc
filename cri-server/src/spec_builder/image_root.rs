//! Owns a look into an image before any container of it exists: its layers as one read-only
//! tree that is mounted nowhere (a detached overlay mount, reachable only by descriptor), and
//! what is read from it: accounts, and the contents of declared volumes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::host_files::read_in_root;
use super::user::Accounts;
use crate::error::{Error, Result};

/// /etc/passwd and /etc/group above this size are refused.
const MAX_ACCOUNTS: u64 = 4 << 20;
/// Images whose accounts are remembered.
const REMEMBERED: usize = 256;

/// Opens the root of an image for reading; `layers` are top first.
pub fn open(layers: &[PathBuf]) -> io::Result<OwnedFd> {
    match layers {
        [] => Err(io::ErrorKind::NotFound.into()),
        // An overlay needs two directories; one layer is its own root. Its whiteouts hide
        // nothing, as there is nothing below.
        [only] => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(rustix::fs::openat(CWD, only, flags, Mode::empty())?)
        }
        _ => detached_overlay(layers),
    }
}

fn detached_overlay(layers: &[PathBuf]) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", "overlay")?;
    for layer in layers {
        // lowerdir+ adds one directory (Linux 6.7), so the list is not bound to 256 bytes.
        rustix::mount::fsconfig_set_string(context.as_fd(), "lowerdir+", layer.as_path())?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        flags,
    )?)
}

/// Reads the accounts of images, remembering those of the last ones: layers never change.
#[derive(Debug, Default)]
pub struct AccountCache(Mutex<HashMap<String, Arc<Accounts>>>);

impl AccountCache {
    /// The accounts of an image.
    pub fn read(&self, image_id: &str, layers: &[PathBuf]) -> Result<Arc<Accounts>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(accounts) = known.get(image_id) {
            return Ok(accounts.clone());
        }
        drop(known);
        let accounts = Arc::new(
            read_accounts(layers).map_err(|e| Error::io("read accounts of image", image_id, e))?,
        );
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(image_id.to_owned(), accounts.clone());
        Ok(accounts)
    }
}

fn read_accounts(layers: &[PathBuf]) -> io::Result<Accounts> {
    let root = match open(layers) {
        Ok(root) => root,
        // Kernels before 6.7: look for each file in the layers from the top. Exact as long as
        // /etc itself is no symbolic link that changes between layers.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => return from_layers(layers),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Accounts::default()),
        Err(e) => return Err(e),
    };
    Ok(Accounts {
        passwd: optional(read_in_root(&root, "etc/passwd", MAX_ACCOUNTS))?,
        group: optional(read_in_root(&root, "etc/group", MAX_ACCOUNTS))?,
    })
}

fn from_layers(layers: &[PathBuf]) -> io::Result<Accounts> {
    let first = |name: &str| -> io::Result<Vec<u8>> {
        for layer in layers {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::openat(CWD, layer, flags, Mode::empty())?;
            match read_in_root(&root, name, MAX_ACCOUNTS) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                answer => return answer,
            }
        }
        Ok(Vec::new())
    };
    Ok(Accounts {
        passwd: first("etc/passwd")?,
        group: first("etc/group")?,
    })
}

fn optional(read: io::Result<Vec<u8>>) -> io::Result<Vec<u8>> {
    match read {
        Err(e)
            if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENOTDIR) =>
        {
            Ok(Vec::new())
        }
        answer => answer,
    }
}

/// Fills a volume's directory with what the image has at `path`; nothing there: an empty volume.
pub fn seed_volume(root: &OwnedFd, path: &str, to: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let from = match from {
        Ok(from) => from,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
        Err(e) => return Err(Error::io("open volume of image", path, e)),
    };
    let target = File::open(to).map_err(|e| Error::io("open", to.display(), e))?;
    copy_tree(&from, &target.into(), 0).map_err(|e| Error::io("seed volume", path, e))
}

/// Deeper trees are refused rather than allowed to use up the stack.
const MAX_DEPTH: usize = 256;

fn copy_tree(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    use rustix::fs::{AtFlags, FileType};
    if depth > MAX_DEPTH {
        return Err(io::Error::other("more than 256 levels of directories"));
    }
    copy_attributes(from, to)?;
    let entries = rustix::fs::Dir::read_from(from)?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = open | OFlags::RDONLY | OFlags::DIRECTORY;
                let below = rustix::fs::openat(from, name, flags, Mode::empty())?;
                rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let target = rustix::fs::openat(to, name, flags, Mode::empty())?;
                copy_tree(&below, &target, depth + 1)?;
            }
            FileType::RegularFile => {
                let source = rustix::fs::openat(from, name, open | OFlags::RDONLY, Mode::empty())?;
                let flags = open | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let target = rustix::fs::openat(to, name, flags, Mode::from_raw_mode(0o600))?;
                let (mut source, mut target) = (File::from(source), File::from(target));
                io::copy(&mut source, &mut target)?;
                copy_attributes(&source.into(), &target.into())?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(link, to, name)?;
                owner_at(to, name, &stat)?;
            }
            // Devices, sockets and FIFOs of an image have no place in a volume.
            _ => {}
        }
    }
    Ok(())
}

fn owner_at(dir: &OwnedFd, name: &std::ffi::CStr, stat: &rustix::fs::Stat) -> io::Result<()> {
    let uid = Some(rustix::fs::Uid::from_raw(stat.st_uid));
    let gid = Some(rustix::fs::Gid::from_raw(stat.st_gid));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chownat(dir, name, uid, gid, flags)?)
}

fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    let uid = Some(rustix::fs::Uid::from_raw(stat.st_uid));
    let gid = Some(rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(to, uid, gid)?;
    // After chown, which clears set-user-id bits.
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_layer_hides_the_accounts_of_the_lower() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |name: &str, passwd: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.join("etc")).unwrap();
            std::fs::write(path.join("etc/passwd"), passwd).unwrap();
            path
        };
        let layers = [layer("top", "top"), layer("bottom", "bottom")];
        assert_eq!(read_accounts(&layers[1..]).unwrap().passwd, b"bottom");
        if rustix::process::geteuid().is_root() {
            let accounts = read_accounts(&layers).unwrap();
            assert_eq!(accounts.passwd, b"top");
            assert_eq!(accounts.group, b"");
        }
    }

    #[test]
    fn volume_is_seeded_with_modes_and_links() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::create_dir_all(image.join("data/sub")).unwrap();
        std::fs::write(image.join("data/sub/file"), "x").unwrap();
        std::fs::set_permissions(
            image.join("data/sub/file"),
            std::fs::Permissions::from_mode(0o640),
        )
        .unwrap();
        std::os::unix::fs::symlink("/etc/passwd", image.join("data/link")).unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        seed_volume(&open(&[image]).unwrap(), "/data", &volume).unwrap();
        let mode = volume
            .join("sub/file")
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640);
        let link = std::fs::read_link(volume.join("link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
    }
}
