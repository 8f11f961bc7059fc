//! overlayfs: more layers than mount(2) has room for.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountFlags, MoveMountFlags};

use super::{attributes, plain};
use crate::proto::containerd::types::Mount;

/// mount(2) takes one page of options, its final zero included.
const MAX_DATA: usize = 4095;

pub fn mount(
    mount: &Mount,
    target: &Path,
    flags: MountFlags,
    options: &[String],
) -> Result<(), Errno> {
    let data = options.join(",");
    if data.len() <= MAX_DATA {
        return plain(&mount.source, "overlay", target, flags, &data);
    }
    match long_overlay(options, target, flags) {
        Err(Errno::INVAL | Errno::NOSYS) => relative_overlay(mount, options, target, flags),
        result => result,
    }
}

/// `lowerdir=a:b`, where `\:` is a colon of a name.
pub fn lower_dirs(value: &str) -> Vec<String> {
    let mut dirs = vec![String::new()];
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, dirs.last_mut()) {
            ('\\', Some(dir)) => dir.extend(chars.next()),
            (':', _) => dirs.push(String::new()),
            (c, Some(dir)) => dir.push(c),
            (_, None) => {}
        }
    }
    dirs
}

/// The mount API of Linux 5.2 has no page limit; `lowerdir+` is from Linux 6.8.
fn long_overlay(data: &[String], target: &Path, flags: MountFlags) -> Result<(), Errno> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => {
                for dir in lower_dirs(dirs) {
                    rustix::mount::fsconfig_set_string(&fs, "lowerdir+", dir)?;
                }
            }
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str())?,
        }
    }
    rustix::mount::fsconfig_create(&fs)?;
    let mounted = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))?;
    let here = rustix::fs::CWD;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mounted, "", here, target, flags)
}

/// For older kernels: the layers by paths relative to their common directory. The process has
/// one thread, so nobody else sees the working directory change.
fn relative_overlay(
    mount: &Mount,
    options: &[String],
    target: &Path,
    flags: MountFlags,
) -> Result<(), Errno> {
    let lower = options.iter().find_map(|o| o.strip_prefix("lowerdir="));
    let dirs = lower_dirs(lower.ok_or(Errno::INVAL)?);
    let common = common_directory(&dirs).ok_or(Errno::INVAL)?;
    let short = |dir: &String| {
        let below = Path::new(dir)
            .strip_prefix(&common)
            .map_err(|_| Errno::INVAL)?;
        let text = String::from_utf8_lossy(below.as_os_str().as_bytes());
        Ok::<_, Errno>(escaped(&text))
    };
    let lower = dirs
        .iter()
        .map(short)
        .collect::<Result<Vec<String>, Errno>>()?;
    let mut data = vec![format!("lowerdir={}", lower.join(":"))];
    data.extend(
        options
            .iter()
            .filter(|o| !o.starts_with("lowerdir="))
            .cloned(),
    );
    let data = data.join(",");
    if data.len() > MAX_DATA {
        return Err(Errno::TOOBIG);
    }
    let before = rustix::fs::open(
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::process::chdir(&common)?;
    let result = plain(&mount.source, "overlay", target, flags, &data);
    rustix::process::fchdir(before)?;
    result
}

fn common_directory(dirs: &[String]) -> Option<PathBuf> {
    let mut common = Path::new(dirs.first()?).parent()?.to_owned();
    for dir in dirs {
        while !Path::new(dir).starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    Some(common)
}

/// A name in `lowerdir=`.
pub fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\").replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_dirs_keep_escaped_colons() {
        assert_eq!(lower_dirs("/a:/b\\:c:/d\\\\e"), ["/a", "/b:c", "/d\\e"]);
    }

    #[test]
    fn common_directory_of_layers() {
        let dirs = ["/v/s/1/fs", "/v/s/12/fs"].map(String::from);
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/v/s"));
        let dirs = ["/v/s/1/fs", "/w"].map(String::from);
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/"));
    }
}
