//! Owns directories that a layer uses but does not name. In a merged view the topmost layer's
//! directory counts, so such a directory takes owner, mode, times and xattrs from the layers
//! below; where a layer below has a symlink instead, the content goes to where that leads, as if
//! the layer had been unpacked on top of the others.
//!
//! Nothing below is followed by path: every component is opened by descriptor with O_NOFOLLOW.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::unpack::tar::show;
use crate::unpack::tree::{Tree, failed, resolve_link, split};

const HOPS_MAX: usize = 40;

/// What the layers below have at a path.
enum Below {
    Nothing,
    Directory(OwnedFd),
    /// A symlink at the path itself, and where it leads.
    Symlink(Vec<u8>),
    /// Something that is no directory: hidden by this layer's directory.
    Other,
}

/// Completes the implicit directories of the layer in `layer`. `below` are the roots of the layers
/// below, top first.
pub(crate) fn adopt(
    layer: BorrowedFd<'_>,
    implicit: &[Vec<u8>],
    below: &[BorrowedFd<'_>],
) -> Result<()> {
    let root = reopen(layer, b"/")?;
    let mut tree = Tree::new(root);
    // Parents sort before children, and a moved directory adds its target.
    let mut work: BTreeSet<Vec<u8>> = implicit.iter().cloned().collect();
    let mut hops = 0;
    while let Some(path) = work.pop_first() {
        match look(below, &path)? {
            Below::Nothing | Below::Other => {}
            Below::Directory(original) => {
                if let Some(directory) = tree.lookup(&path)? {
                    copy_metadata(&original, &reopen(directory.as_fd(), &path)?, &path)?;
                }
            }
            Below::Symlink(target) => {
                hops += 1;
                if hops > HOPS_MAX {
                    return Err(Error::new(ErrorKind::Corrupt, "unpack", show(&path))
                        .because("too many symlinks in the layers below"));
                }
                relocate(&mut tree, &path, &target)?;
                work.retain(|one| !is_below(one, &path));
                // What was implicit below the old place may be so at the new one.
                work.extend(ancestors(&target));
                work.extend(
                    implicit
                        .iter()
                        .filter(|one| is_below(one, &path) && **one != path)
                        .map(|one| [&target[..], &one[path.len()..]].concat()),
                );
            }
        }
    }
    Ok(())
}

fn is_below(path: &[u8], parent: &[u8]) -> bool {
    path == parent || (path.starts_with(parent) && path.get(parent.len()) == Some(&b'/'))
}

/// `a`, `a/b`, `a/b/c` of `a/b/c`.
fn ancestors(path: &[u8]) -> Vec<Vec<u8>> {
    let mut found: Vec<Vec<u8>> = path
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| path[..at].to_vec())
        .collect();
    found.push(path.to_vec());
    found
}

/// Looks a path up in the merged view of the layers below.
fn look(below: &[BorrowedFd<'_>], path: &[u8]) -> Result<Below> {
    'layers: for root in below {
        let mut current = reopen(*root, b"/")?;
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        let mut hides_rest = false;
        for (at, part) in parts.iter().enumerate() {
            let is_last = at + 1 == parts.len();
            let stat = match fs::statat(&current, *part, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) if hides_rest => return Ok(Below::Nothing),
                Err(Errno::NOENT) => continue 'layers,
                Err(errno) => return Err(failed("stat", path, errno)),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {}
                FileType::Symlink if is_last => {
                    let link = fs::readlinkat(&current, *part, Vec::new())
                        .map_err(|errno| failed("readlink", path, errno))?;
                    return Ok(Below::Symlink(resolve_link(split(path).0, link.as_bytes())));
                }
                _ if is_last => return Ok(Below::Other),
                _ => return Ok(Below::Nothing),
            }
            current = fs::openat(
                &current,
                *part,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(|errno| failed("open", path, errno))?;
            hides_rest |= is_opaque(&current);
        }
        return Ok(Below::Directory(current));
    }
    Ok(Below::Nothing)
}

fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0u8; 1];
    fs::fgetxattr(directory, c"trusted.overlay.opaque", &mut value).is_ok_and(|_| value == *b"y")
}

/// Moves what is in the directory `from` to `to`, merging directories, and removes `from`.
fn relocate(tree: &mut Tree, from: &[u8], to: &[u8]) -> Result<()> {
    if is_below(to, from) {
        return Err(Error::new(ErrorKind::Corrupt, "unpack", show(from))
            .because("a layer below has a symlink there that leads into itself"));
    }
    let (parent_path, name) = split(from);
    let Some(parent) = tree.lookup(parent_path)? else {
        return Ok(());
    };
    let source = tree.open_below(&*parent, name, from)?;
    let target = tree.directory(to)?;
    merge(source.as_fd(), target.as_fd(), from)?;
    fs::unlinkat(&*parent, name, AtFlags::REMOVEDIR).map_err(|errno| failed("rmdir", from, errno))
}

fn merge(source: BorrowedFd<'_>, target: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
    let entries = Dir::read_from(source).map_err(|errno| failed("list", path, errno))?;
    for entry in entries {
        let entry = entry.map_err(|errno| failed("list", path, errno))?;
        let name = entry.file_name();
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        match fs::renameat_with(source, name, target, name, RenameFlags::NOREPLACE) {
            Ok(()) => continue,
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("rename", path, errno)),
        }
        let open = |directory: BorrowedFd<'_>| {
            fs::openat(
                directory,
                name,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        match (open(source), open(target)) {
            (Ok(one), Ok(other)) => {
                merge(one.as_fd(), other.as_fd(), path)?;
                fs::unlinkat(source, name, AtFlags::REMOVEDIR)
            }
            // The same name twice in one layer by two paths: the one written last stays; order is
            // lost here, and the entry named by its real path is kept.
            (Err(_), _) => fs::unlinkat(source, name, AtFlags::empty()),
            (Ok(_), Err(_)) => {
                return Err(Error::new(ErrorKind::Corrupt, "unpack", show(path))
                    .because("it is a directory and a file at once"));
            }
        }
        .map_err(|errno| failed("remove", path, errno))?;
    }
    Ok(())
}

fn copy_metadata(from: &OwnedFd, to: &OwnedFd, path: &[u8]) -> Result<()> {
    let stat = fs::fstat(from).map_err(|errno| failed("fstat", path, errno))?;
    let (uid, gid) = (
        fs::Uid::from_raw(stat.st_uid),
        fs::Gid::from_raw(stat.st_gid),
    );
    fs::fchown(to, Some(uid), Some(gid)).map_err(|errno| failed("chown", path, errno))?;
    copy_xattrs(from, to, path)?;
    fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))
        .map_err(|errno| failed("chmod", path, errno))?;
    let nanos = |value| i64::try_from(value).unwrap_or(0);
    let times = fs::Timestamps {
        last_access: fs::Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: nanos(stat.st_atime_nsec),
        },
        last_modification: fs::Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: nanos(stat.st_mtime_nsec),
        },
    };
    fs::futimens(to, &times).map_err(|errno| failed("utimens", path, errno))
}

fn copy_xattrs(from: &OwnedFd, to: &OwnedFd, path: &[u8]) -> Result<()> {
    let mut names = vec![0u8; 64 << 10];
    let length = match fs::flistxattr(from, &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(failed("listxattr", path, errno)),
    };
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        if name.starts_with(b"trusted.") || name.starts_with(b"security.") {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        let length = fs::fgetxattr(from, name, &mut value)
            .map_err(|errno| failed("getxattr", path, errno))?;
        fs::fsetxattr(to, name, &value[..length], XattrFlags::empty())
            .map_err(|errno| failed("setxattr", path, errno))?;
    }
    Ok(())
}

/// A readable descriptor of a directory held by another one.
fn reopen(directory: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    fs::openat(
        directory,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| {
        tracing::debug!(fd = directory.as_raw_fd(), "cannot reopen");
        failed("open", path, errno)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;

    fn open(path: &Path) -> OwnedFd {
        fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("open")
    }

    fn run(layer: &Path, implicit: &[&str], below: &[&Path]) -> Result<()> {
        let implicit: Vec<Vec<u8>> = implicit.iter().map(|p| p.as_bytes().to_vec()).collect();
        let below: Vec<OwnedFd> = below.iter().map(|p| open(p)).collect();
        let below: Vec<BorrowedFd<'_>> = below.iter().map(AsFd::as_fd).collect();
        adopt(open(layer).as_fd(), &implicit, &below)
    }

    #[test]
    fn implicit_directory_takes_metadata_of_the_topmost_layer_below() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (layer, low, lower) = (
            dir.path().join("l"),
            dir.path().join("m"),
            dir.path().join("n"),
        );
        for (root, mode) in [(&layer, 0o755), (&low, 0o1777), (&lower, 0o700)] {
            let tmp = root.join("tmp");
            std::fs::create_dir_all(tmp.join("x")).expect("mkdir");
            std::fs::set_permissions(&tmp, PermissionsExt::from_mode(mode)).expect("chmod");
        }
        run(&layer, &["tmp", "tmp/x", "absent"], &[&low, &lower]).expect("adopt");
        let mode = std::fs::metadata(layer.join("tmp")).expect("stat").mode() & 0o7777;
        assert_eq!(mode, 0o1777);
    }

    #[test]
    fn implicit_directory_moves_to_where_a_symlink_below_leads() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (layer, low) = (dir.path().join("l"), dir.path().join("m"));
        std::fs::create_dir_all(layer.join("lib/sub")).expect("mkdir");
        std::fs::write(layer.join("lib/sub/file"), "x").expect("write");
        std::fs::create_dir_all(low.join("usr/lib/sub")).expect("mkdir");
        std::fs::set_permissions(low.join("usr/lib"), PermissionsExt::from_mode(0o711))
            .expect("chmod");
        symlink("usr/lib", low.join("lib")).expect("symlink");
        run(&layer, &["lib", "lib/sub"], &[&low]).expect("adopt");
        assert!(!layer.join("lib").exists());
        assert_eq!(
            std::fs::read(layer.join("usr/lib/sub/file")).expect("read"),
            b"x"
        );
        let mode = std::fs::metadata(layer.join("usr/lib"))
            .expect("stat")
            .mode()
            & 0o7777;
        assert_eq!(mode, 0o711);
    }

    #[test]
    fn symlink_below_that_leads_outside_stays_inside() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (layer, low) = (dir.path().join("l"), dir.path().join("m"));
        std::fs::create_dir_all(layer.join("a")).expect("mkdir");
        std::fs::write(layer.join("a/file"), "x").expect("write");
        std::fs::create_dir_all(&low).expect("mkdir");
        symlink("../../../etc", low.join("a")).expect("symlink");
        run(&layer, &["a"], &[&low]).expect("adopt");
        assert!(layer.join("etc/file").exists());
        std::fs::create_dir_all(layer.join("b/c")).expect("mkdir");
        symlink("b/c", low.join("b")).expect("symlink");
        assert!(run(&layer, &["b"], &[&low]).is_err());
    }
}
