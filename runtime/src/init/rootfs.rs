//! The container's root: attached, filled, covered where the config says, and entered.
//!
//! ```text
//! propagation of the copied tree -> attach root -> mounts -> /dev -> masks   (old root still "/")
//!                                              -> pivot_root -> old root detached -> read-only
//! ```

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount,
};

use super::bind::Parent;
use super::device::null_mount;
use super::mount::{attach, clone_handle, clone_tree, detached, set_attributes, set_propagation};
use super::resolve::{Root, at};
use crate::error::{Error, Result};
use crate::plan::options::Attributes;
use crate::plan::{Plan, RootfsPlan};

const READ_ONLY: Attributes = Attributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
};

/// Attaches the root in the new mount namespace.
pub fn attach_root(plan: &RootfsPlan, parent: Parent<'_>) -> Result<Root> {
    let change = MountPropagationFlags::from_bits_retain(plan.initial_propagation as u32);
    mount_change(c"/", change).map_err(|error| {
        Error::system(
            format!("mount(propagation {:#x})", plan.initial_propagation),
            "/",
            error,
        )
    })?;
    if plan.initial_propagation & libc::MS_SHARED != 0 {
        privatise_parent(&plan.c_path)?;
    }
    let tree = match clone_tree(&plan.c_path, true) {
        Err(error) if error.errno() == Some(libc::EACCES) && parent.opens => {
            parent.channel.report_unreachable(None)?;
            let (tree, place) = (parent.channel.tree()?, parent.channel.tree()?);
            attach(tree.as_fd(), place.as_fd()).map(|()| tree)
        }
        tree => {
            let tree = tree?;
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
            move_mount(tree.as_fd(), c"", CWD, &plan.c_path, flags).map(|()| tree)
        }
    };
    tree.map(Root::new)
        .map_err(|error| Error::system("move_mount", plan.path.display().to_string(), error))
}

/// The root that the parent has attached.
pub fn attached_root(tree: &OwnedFd) -> Result<Root> {
    rustix::io::fcntl_dupfd_cloexec(tree, 3)
        .map(Root::new)
        .map_err(|error| Error::system("fcntl(F_DUPFD_CLOEXEC)", "the root", error))
}

/// pivot_root(2) refuses a shared parent mount, and the root must not show up on the host: walks
/// up to the mount that holds the path and makes it private.
fn privatise_parent(path: &CStr) -> Result<()> {
    let fail = |call: &'static str, error| Error::system(call, path.to_string_lossy(), error);
    let look = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory =
        rustix::fs::open(path, look, Mode::empty()).map_err(|error| fail("open", error))?;
    loop {
        let stat = rustix::fs::statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
            .map_err(|error| fail("statx", error))?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return set_propagation(directory.as_fd(), libc::MS_PRIVATE);
        }
        directory = rustix::fs::openat(&directory, c"..", look, Mode::empty())
            .map_err(|error| fail("openat(..)", error))?;
    }
}

/// Covers `linux.maskedPaths`: files by the null device, directories by an empty read-only tmpfs.
/// What is not there needs no cover; anything else that fails, fails the container.
pub fn mask(root: &Root, plan: &Plan) -> Result<()> {
    let (mut null, mut empty) = (Cover::default(), Cover::default());
    for path in &plan.masked_paths {
        let target = match root.find(path) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(error) => return Err(at("openat2", path, error).context("mask path")),
        };
        let stat = rustix::fs::fstat(&target).map_err(|error| at("fstat", path, error))?;
        let cover = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => empty.next(|| empty_tmpfs(plan.mount_label.as_ref()))?,
            _ => null.next(null_mount)?,
        };
        attach(cover.as_fd(), target.as_fd())
            .map_err(|error| at("move_mount", path, error).context("mask path"))?;
    }
    Ok(())
}

/// One mount for the first path, clones of it for the others. None is ever left unattached: to
/// drop a detached mount costs an expedited RCU grace period, about 100 us.
#[derive(Default)]
struct Cover {
    attached: Option<Rc<OwnedFd>>,
}

impl Cover {
    fn next(&mut self, make: impl FnOnce() -> Result<OwnedFd>) -> Result<Rc<OwnedFd>> {
        let Some(first) = &self.attached else {
            return Ok(self.attached.insert(Rc::new(make()?)).clone());
        };
        clone_handle(first.as_fd(), false)
            .map(Rc::new)
            .map_err(|error| Error::system("open_tree", "the cover of a masked path", error))
    }
}

fn empty_tmpfs(label: Option<&CString>) -> Result<OwnedFd> {
    let mut options = vec![
        (c"nr_blocks".to_owned(), Some(c"1".to_owned())),
        (c"nr_inodes".to_owned(), Some(c"1".to_owned())),
    ];
    options.extend(label.map(|label| (c"context".to_owned(), Some(label.clone()))));
    detached(c"tmpfs", c"tmpfs", &options, READ_ONLY)
}

/// Makes `linux.readonlyPaths` read-only mounts of themselves.
pub fn make_read_only(root: &Root, plan: &Plan) -> Result<()> {
    for path in &plan.readonly_paths {
        let target = match root.find(path) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(error) => return Err(at("openat2", path, error).context("readonly path")),
        };
        let tree = clone_handle(target.as_fd(), true)
            .map_err(|error| at("open_tree", path, error).context("readonly path"))?;
        set_attributes(tree.as_fd(), READ_ONLY, false)?;
        attach(tree.as_fd(), target.as_fd())
            .map_err(|error| at("move_mount", path, error).context("readonly path"))?;
    }
    Ok(())
}

/// The last touches: what was filled and the root become read-only, by the handles that made them.
pub fn seal(root: &Root, filled: Vec<OwnedFd>, plan: &RootfsPlan) -> Result<()> {
    for mount in filled {
        set_attributes(mount.as_fd(), READ_ONLY, false)?;
    }
    if plan.readonly {
        set_attributes(root.as_fd(), READ_ONLY, false)?;
    }
    Ok(())
}

/// Makes the container's root the process's root and lets go of the host's.
pub fn enter(root: &Root, plan: &RootfsPlan) -> Result<()> {
    rustix::process::fchdir(root.as_fd())
        .map_err(|error| Error::system("fchdir", plan.path.display().to_string(), error))?;
    if plan.shares_mounts {
        rustix::process::chroot(c".").map_err(|error| Error::system("chroot", ".", error))?;
    } else if plan.no_pivot {
        move_root(root, plan)?;
    } else {
        // Detaching a shared tree would detach it on the host, so it is made a slave first. That
        // takes a descriptor of it: umount2(2) climbs to the mount stacked on ".", mount(2) does
        // not, and would cut the new root's shared binds off from the host.
        let old = match plan.initial_propagation & (libc::MS_SLAVE | libc::MS_PRIVATE) {
            0 => Some(open_old_root()?),
            _ => None,
        };
        // With "." for both, the old root ends up stacked on the new one, where the same "."
        // then finds it (pivot_root(2), "pivot_root(".", ".")").
        rustix::process::pivot_root(c".", c".")
            .map_err(|error| Error::system("pivot_root", plan.path.display().to_string(), error))?;
        if let Some(old) = old {
            rustix::process::fchdir(&old)
                .map_err(|error| Error::system("fchdir", "the old root", error))?;
            mount_change(
                c".",
                MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
            )
            .map_err(|error| Error::system("mount(MS_SLAVE|MS_REC)", "the old root", error))?;
        }
        unmount(c".", UnmountFlags::DETACH)
            .map_err(|error| Error::system("umount2(MNT_DETACH)", "the old root", error))?;
    }
    rustix::process::chdir(c"/").map_err(|error| Error::system("chdir", "/", error))?;
    match plan.propagation {
        Some(propagation) => set_propagation(root.as_fd(), propagation),
        None => Ok(()),
    }
}

fn open_old_root() -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(c"/", flags, Mode::empty())
        .map_err(|error| Error::system("open", "the old root", error))
}

/// `--no-pivot`: for a host whose root is a ramfs, which pivot_root(2) refuses.
fn move_root(root: &Root, plan: &RootfsPlan) -> Result<()> {
    cover_host_filesystems(plan)?;
    move_mount(
        root.as_fd(),
        c"",
        CWD,
        c"/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|error| Error::system("move_mount", "/", error))?;
    rustix::process::chroot(c".").map_err(|error| Error::system("chroot", ".", error))
}

/// Where a line of mountinfo has a procfs or sysfs. Spaces and the like are escaped: `\\040`.
fn host_filesystem(line: &[u8]) -> Option<PathBuf> {
    let mut fields = line.split(|byte| *byte == b' ');
    let escaped = fields.nth(4)?;
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    if kind != b"proc" && kind != b"sysfs" {
        return None;
    }
    let mut point = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let byte = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        point.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    Some(std::ffi::OsString::from_vec(point).into())
}

/// The host's procfs and sysfs stay below a moved root: they must not be there to be found, since
/// a container could mount its own from them where only a fully visible one allows that.
fn cover_host_filesystems(plan: &RootfsPlan) -> Result<()> {
    let table = std::fs::read("/proc/self/mountinfo")
        .map_err(|error| Error::system("read", "/proc/self/mountinfo", error))?;
    let rootfs = std::fs::canonicalize(&plan.path)
        .map_err(|error| Error::system("realpath", plan.path.display().to_string(), error))?;
    let mut points: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(host_filesystem)
        .filter(|point| !point.starts_with(&rootfs))
        .collect();
    // Those deeper down first.
    points.sort_by_key(|point| std::cmp::Reverse(point.as_os_str().len()));
    for point in &points {
        let fail =
            |call: &'static str, error| Error::system(call, point.display().to_string(), error);
        // Shared, it would go from the host as well.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        match mount_change(point, slave) {
            // Below another that is gone by now.
            Err(Errno::NOENT) => continue,
            changed => changed.map_err(|error| fail("mount(MS_SLAVE|MS_REC)", error))?,
        }
        match unmount(point, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::PERM) => {
                let cover = empty_tmpfs(None)?;
                move_mount(
                    cover.as_fd(),
                    c"",
                    CWD,
                    point,
                    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
                )
                .map_err(|error| fail("move_mount", error))?;
            }
            Err(error) => return Err(fail("umount2", error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_filesystems_by_mountinfo() {
        for (line, want) in [
            (
                "22 1 0:5 / /proc rw,nosuid shared:1 - proc proc rw",
                Some("/proc"),
            ),
            (
                "22 1 0:5 / /a\\040b/\\134x rw - sysfs sysfs rw",
                Some("/a b/\\x"),
            ),
            (
                "22 1 0:5 / /t\\04 rw master:2 shared:3 - proc x rw",
                Some("/t\\04"),
            ),
            ("22 1 0:5 / /proc rw - tmpfs proc rw", None),
            ("", None),
        ] {
            assert_eq!(
                host_filesystem(line.as_bytes()),
                want.map(PathBuf::from),
                "{line}"
            );
        }
    }
}
