//! File systems that a program of their own mounts (`fuse.<name>`, `fuse3.<name>`): mount.fuse
//! and mount.fuse3 start the program, and return when its mount is there.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::proto::containerd::types::Mount;

/// Everything else of the shim waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);

/// The helper, and the name that it knows the file system by.
pub fn of(kind: &str) -> Option<(&'static str, &str)> {
    let fuse = kind.strip_prefix("fuse.").map(|name| ("mount.fuse", name));
    fuse.or_else(|| Some(("mount.fuse3", kind.strip_prefix("fuse3.")?)))
}

pub fn mount(mount: &Mount, program: &str, name: &str, target: &Path) -> Result<()> {
    let subject = || format!("{} on {}", mount.source, target.display());
    let failed = |e: std::io::Error| Error::io("mount by helper", subject(), e);
    let words = crate::runtime_cli::memory_file("mount-helper", b"")?;
    let mut command = Command::new(program);
    command.arg(&mount.source).arg(target);
    for option in &mount.options {
        command.args(["-o", option]);
    }
    command.args(["-t", name]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(words.try_clone().map_err(failed)?)
        .spawn()
        .map_err(|e| Error::io("start mount helper", program, e))?;
    let end = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(std::io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    if status.success() {
        return Ok(());
    }
    let said = said(&words);
    Err(failed(std::io::Error::other(format!(
        "{program}: {status}: {said}"
    ))))
}

fn said(words: &File) -> String {
    let mut bytes = [0; 1024];
    let length = words.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_says_which_helper() {
        assert_eq!(
            of("fuse3.fuse-overlayfs"),
            Some(("mount.fuse3", "fuse-overlayfs"))
        );
        assert_eq!(of("fuse.sshfs"), Some(("mount.fuse", "sshfs")));
        assert_eq!(of("fuseblk"), None);
        assert_eq!(of("overlay"), None);
    }
}
