//! The bundle: its directory, and the bytes of its config.json. Never interprets them.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// A config.json beyond this size is no config.json.
const MAX_CONFIG: u64 = 16 << 20;

/// An opened bundle.
#[derive(Debug)]
pub struct Bundle {
    pub directory: PathBuf,
    pub config: Vec<u8>,
}

impl Bundle {
    /// Opens the bundle in `directory`, or in the current directory.
    ///
    /// # Errors
    /// There is no such directory, or it has no readable config.json.
    pub fn open(directory: Option<&Path>) -> Result<Self> {
        let given = directory.unwrap_or(Path::new("."));
        let directory = std::fs::canonicalize(given)
            .map_err(|error| Error::system("open bundle", given.display().to_string(), error))?;
        let path = directory.join("config.json");
        let config = match read_bounded(&path) {
            Ok(config) => config,
            Err(error) if error.errno() == Some(libc::ENOENT) => {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("JSON specification file {} not found", path.display()),
                    "",
                ));
            }
            Err(error) => return Err(error),
        };
        Ok(Self { directory, config })
    }
}

/// Reads a regular file of at most [`MAX_CONFIG`] bytes.
///
/// # Errors
/// It cannot be read, is no regular file, or is larger.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    use rustix::fs::{Mode, OFlags};
    let subject = || path.display().to_string();
    // O_NONBLOCK: a fifo in the file's place must not hang the runtime.
    let fd = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(|error| Error::system("open", subject(), error))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| Error::system("fstat", subject(), error))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(Error::invalid(format!(
            "{} is not a regular file",
            path.display()
        )));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(0) + 1);
    std::fs::File::from(fd)
        .take(MAX_CONFIG + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::system("read", subject(), error))?;
    if bytes.len() as u64 > MAX_CONFIG {
        return Err(Error::invalid(format!(
            "{} is larger than {MAX_CONFIG} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}
