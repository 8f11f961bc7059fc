//! `descriptors.json` beside the images: what the stdio of the container's init is. On restore its
//! pipes are replaced by the stdio of whoever restores.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use super::rpc::InheritFd;
use crate::error::{Error, Result};

const FILE: &str = "descriptors.json";

/// What CRIU calls a pipe, followed by its inode.
const PIPE: &str = "pipe:";

/// What stdin, stdout and stderr of a process are, as /proc has it; empty for one that is closed.
pub fn of_process(pid: i32) -> [String; 3] {
    std::array::from_fn(|fd| {
        std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
            .map(|link| link.to_string_lossy().into_owned())
            .unwrap_or_default()
    })
}

/// # Errors
/// The image directory cannot be written.
pub fn write(images: &OwnedFd, descriptors: &[String; 3]) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let json =
        serde_json::to_vec(descriptors).map_err(|error| Error::system("encode", FILE, error))?;
    let file = rustix::fs::openat(images, FILE, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|error| Error::system("create", FILE, error))?;
    std::io::Write::write_all(&mut std::fs::File::from(file), &json)
        .map_err(|error| Error::system("write", FILE, error))
}

/// The pipes among them, each to be replaced by our descriptor of the same number.
///
/// # Errors
/// The file is missing or is no list of names: these are no images of a container.
pub fn read(images: &OwnedFd) -> Result<Vec<InheritFd>> {
    let file = rustix::fs::openat(
        images,
        FILE,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| Error::system("open", FILE, error))?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::fs::File::from(file), &mut bytes)
        .map_err(|error| Error::system("read", FILE, error))?;
    // runc writes null where it knew nothing.
    let names: Option<Vec<String>> =
        serde_json::from_slice(&bytes).map_err(|error| Error::system("parse", FILE, error))?;
    // Only stdio was ever recorded: a file that lists more must not reach our other descriptors.
    let stdio = (0..3).zip(names.unwrap_or_default());
    Ok(stdio
        .filter(|(_, name)| name.contains(PIPE))
        .map(|(fd, key)| InheritFd { key, fd })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let images = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let names = ["/dev/null", "pipe:[7]", "pipe:[8]"].map(str::to_owned);
        write(&images, &names).unwrap();
        let found = read(&images).unwrap();
        let fds: Vec<_> = found.iter().map(|i| (i.fd, i.key.as_str())).collect();
        assert_eq!(fds, [(1, "pipe:[7]"), (2, "pipe:[8]")]);
        std::fs::write(
            dir.path().join(FILE),
            r#"["", "", "", "pipe:[1]", "pipe:[2]"]"#,
        )
        .unwrap();
        assert!(read(&images).unwrap().is_empty());
    }
}
