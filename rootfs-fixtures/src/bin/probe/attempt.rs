//! What the process may do and what a path is: calls whose error tells whether a filter or a
//! capability let them through. Every one is made so that it changes nothing.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{Access, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

/// No image has it, so that a call that is let through ends in ENOENT.
const NOWHERE: &str = "/nowhere/at-all";

pub fn all() -> Value {
    let mode = Mode::from_raw_mode(0o700);
    let unsigned = rustix::fs::chownat(
        CWD,
        NOWHERE,
        None,
        None,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    );
    json!({
        "chmod": outcome(rustix::fs::chmodat(CWD, NOWHERE, mode, rustix::fs::AtFlags::empty())),
        "chown": outcome(unsigned),
        "mkdir": outcome(rustix::fs::mkdir(NOWHERE, mode)),
        "link": outcome(rustix::fs::link(NOWHERE, NOWHERE)),
        "symlink": outcome(rustix::fs::symlink(NOWHERE, NOWHERE)),
        "unlink": outcome(rustix::fs::unlink(NOWHERE)),
        "sync": outcome(rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .and_then(rustix::fs::syncfs)),
        "mount": outcome(nix::mount::mount(
            Some(NOWHERE), NOWHERE, Option::<&str>::None,
            nix::mount::MsFlags::MS_BIND, Option::<&str>::None,
        ).map_err(|e| Errno::from_raw_os_error(e as i32))),
        "kill": outcome(rustix::process::test_kill_process(rustix::process::getpid())),
    })
}

fn outcome(result: rustix::io::Result<()>) -> String {
    match result {
        Ok(()) => "ok".to_owned(),
        Err(errno) => name(errno),
    }
}

fn name(errno: Errno) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno.raw_os_error()))
}

/// Kind, mode, owner, and what makes a device or link what it is.
pub fn description(path: &Path) -> String {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) => return format!("{:?}", error.kind()),
    };
    let kind = meta.file_type();
    let owner = format!("{:04o} {}:{}", meta.mode() & 0o7777, meta.uid(), meta.gid());
    let device = || {
        let number = meta.rdev();
        format!(
            "{}:{}",
            rustix::fs::major(number),
            rustix::fs::minor(number)
        )
    };
    if kind.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        return format!("link to {}", target.display());
    }
    if kind.is_char_device() {
        return format!("character device {} {owner}", device());
    }
    if kind.is_block_device() {
        return format!("block device {} {owner}", device());
    }
    let word = match () {
        () if kind.is_dir() => "directory",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () => "file",
    };
    format!("{word} {owner}")
}

/// For each path what it is, what a process here may do with it, and what it holds.
pub fn paths(paths: &[&str]) -> Value {
    paths
        .iter()
        .map(|path| {
            let access = |how| outcome(rustix::fs::access(*path, how));
            let mut seen = json!({
                "is": description(Path::new(path)),
                "read": access(Access::READ_OK),
                "write": access(Access::WRITE_OK),
                "execute": access(Access::EXEC_OK),
            });
            match fs::read_dir(path) {
                Ok(entries) => {
                    let mut names: Vec<String> = entries
                        .flatten()
                        .map(|e| e.file_name().to_string_lossy().into_owned())
                        .collect();
                    names.sort();
                    seen["entries"] = names.into();
                }
                Err(_) => seen["text"] = beginning(path).into(),
            }
            ((*path).to_owned(), seen)
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Of a plain file only: a device or a fifo may never end.
fn beginning(path: &str) -> Option<String> {
    if !fs::metadata(path).is_ok_and(|m| m.is_file()) {
        return None;
    }
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|f| f.take(200).read_to_end(&mut bytes)) {
        Ok(_) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Some(format!("{:?}", error.kind())),
    }
}
