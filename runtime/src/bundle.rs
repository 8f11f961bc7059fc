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
            .map_err(|error| Error::system("chdir", given.display().to_string(), error))?;
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
fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    use rustix::fs::{FileType, Mode, OFlags};
    let subject = || path.display().to_string();
    // O_NONBLOCK: a fifo in the file's place must not hang the runtime.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| Error::system("open", subject(), error))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| Error::system("fstat", subject(), error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid(format!(
            "{} is not a regular file",
            path.display()
        )));
    }
    read_all(
        std::fs::File::from(fd),
        usize::try_from(stat.st_size).unwrap_or(0),
        path,
    )
}

/// Reads a document that a caller names: a file, or a pipe.
///
/// # Errors
/// It cannot be read, or is larger than any such document.
pub fn read_document(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path)
        .map_err(|error| Error::system("open", path.display().to_string(), error))?;
    read_all(file, 0, path)
}

fn read_all(file: std::fs::File, size: usize, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(size + 1);
    file.take(MAX_CONFIG + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::system("read", path.display().to_string(), error))?;
    if bytes.len() as u64 > MAX_CONFIG {
        return Err(Error::invalid(format!(
            "{} is larger than {MAX_CONFIG} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}
