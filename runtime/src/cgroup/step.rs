//! One write to one cgroup file, and the few ways in which writes depend on each other.
//!
//! Plans are lists of steps: what to write is decided without I/O (`limits_v1`, `limits_v2`), and
//! only `apply` here talks to the kernel.

use std::borrow::Cow;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};

/// A value for a file, and the field of config.json that asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub file: Cow<'static, str>,
    pub value: String,
    pub field: Cow<'static, str>,
}

impl Write {
    pub fn new(
        field: impl Into<Cow<'static, str>>,
        file: impl Into<Cow<'static, str>>,
        value: impl fmt::Display,
    ) -> Write {
        Write {
            file: file.into(),
            value: value.to_string(),
            field: field.into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Write(Write),
    /// A file that older kernels, or kernels without a feature, lack without harm.
    IfPresent(Write),
    /// The first of these files that exists.
    FirstPresent(Vec<Write>),
    /// Each line is a write of its own.
    Lines(Write),
    /// Two limits that the kernel checks against each other: whichever order it accepts.
    EitherOrder(Write, Write),
    /// Values that are only valid together with `last`: those that the kernel refuses at first
    /// are written again after it.
    Around {
        first: Vec<Write>,
        last: Write,
    },
    /// A v1 weight that the kernel clamps instead of refusing: read back and compared.
    Checked(Write),
    /// Refuse a memory limit below what is used already (`checkBeforeUpdate`).
    MemoryUnder {
        limit: i64,
        swap: i64,
    },
}

impl Step {
    /// Every write that the step may make.
    pub fn writes(&self) -> Vec<&Write> {
        match self {
            Step::Write(write)
            | Step::IfPresent(write)
            | Step::Lines(write)
            | Step::Checked(write) => vec![write],
            Step::FirstPresent(writes) => writes.iter().collect(),
            Step::EitherOrder(one, other) => vec![one, other],
            Step::Around { first, last } => first.iter().chain([last]).collect(),
            Step::MemoryUnder { .. } => Vec::new(),
        }
    }
}

/// An open cgroup directory and its path for errors.
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    pub fn open(path: &Path) -> Result<Dir> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| Error::system("open cgroup", path.display().to_string(), errno))?;
        Ok(Dir {
            fd,
            path: path.to_owned(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open_file(&self, file: &str, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        rustix::fs::openat(&self.fd, file, flags | OFlags::CLOEXEC, Mode::empty())
    }

    pub fn read(&self, file: &str) -> std::result::Result<String, Errno> {
        read_fd(self.open_file(file, OFlags::RDONLY)?.as_fd())
    }

    /// Cgroup files take a value in one write; partial writes do not happen.
    pub fn write(&self, file: &str, value: &str) -> std::result::Result<(), Errno> {
        let fd = self.open_file(file, OFlags::WRONLY)?;
        rustix::io::retry_on_intr(|| rustix::io::write(&fd, value.as_bytes())).map(|_| ())
    }

    fn try_write(&self, write: &Write) -> std::result::Result<(), Errno> {
        self.write(&write.file, &write.value)
    }

    /// Writes that follow each other to one file share a descriptor: each is a request of its own
    /// to the kernel.
    pub fn write_all(&self, writes: &[Write]) -> Result<()> {
        for group in writes.chunk_by(|one, next| one.file == next.file) {
            let [first, ..] = group else { continue };
            let fd = self
                .open_file(&first.file, OFlags::WRONLY)
                .map_err(|errno| self.failed(first, errno))?;
            for write in group {
                rustix::io::retry_on_intr(|| rustix::io::write(&fd, write.value.as_bytes()))
                    .map_err(|errno| self.failed(write, errno))?;
            }
        }
        Ok(())
    }

    fn failed(&self, write: &Write, errno: Errno) -> Error {
        // A cgroup file system refuses to create files with EPERM or EACCES.
        let kind = if errno == Errno::NOENT {
            Kind::Unsupported
        } else {
            Kind::System
        };
        let path = self.path.join(&*write.file);
        Error::new(
            kind,
            format!("{}: write {:?} to", write.field, write.value),
            path.display().to_string(),
        )
        .source(errno)
    }

    fn must_write(&self, write: &Write) -> Result<()> {
        self.try_write(write)
            .map_err(|errno| self.failed(write, errno))
    }

    pub fn apply(&self, step: &Step) -> Result<()> {
        match step {
            Step::Write(write) => match self.try_write(write) {
                Ok(()) => Ok(()),
                Err(errno) => Err(self.explained(write, errno)),
            },
            Step::IfPresent(write) => match self.try_write(write) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err(self.failed(write, errno)),
            },
            Step::FirstPresent(writes) => self.first_present(writes),
            Step::Lines(write) => {
                for line in write.value.lines().filter(|line| !line.is_empty()) {
                    self.write(&write.file, line)
                        .map_err(|errno| self.failed(write, errno))?;
                }
                Ok(())
            }
            Step::EitherOrder(one, other) => match self.try_write(one) {
                Ok(()) => self.must_write(other),
                Err(Errno::INVAL) => {
                    self.must_write(other)?;
                    self.try_write(one)
                        .map_err(|errno| self.explained(one, errno))
                }
                Err(errno) => Err(self.explained(one, errno)),
            },
            Step::Around { first, last } => self.around(first, last),
            Step::Checked(write) => self.checked(write),
            Step::MemoryUnder { limit, swap } => self.memory_under(*limit, *swap),
        }
    }

    fn first_present(&self, writes: &[Write]) -> Result<()> {
        let mut missing = None;
        for write in writes {
            match self.try_write(write) {
                Ok(()) => return Ok(()),
                Err(Errno::NOENT) => missing = missing.or(Some(write)),
                Err(errno) => return Err(self.failed(write, errno)),
            }
        }
        missing.map_or(Ok(()), |write| Err(self.failed(write, Errno::NOENT)))
    }

    fn around(&self, first: &[Write], last: &Write) -> Result<()> {
        let mut again = Vec::new();
        for write in first {
            match self.try_write(write) {
                Ok(()) => {}
                Err(Errno::INVAL) => again.push(write),
                Err(errno) => return Err(self.failed(write, errno)),
            }
        }
        self.must_write(last)?;
        again
            .into_iter()
            .try_for_each(|write| self.must_write(write))
    }

    fn checked(&self, write: &Write) -> Result<()> {
        self.must_write(write)?;
        let read = self
            .read(&write.file)
            .map_err(|errno| self.failed(write, errno))?;
        let asked = write.value.parse::<u64>().unwrap_or_default();
        let found = read.trim().parse::<u64>().unwrap_or(asked);
        let bound = match asked.cmp(&found) {
            std::cmp::Ordering::Greater => "maximum",
            std::cmp::Ordering::Less => "minimum",
            std::cmp::Ordering::Equal => return Ok(()),
        };
        Err(Error::invalid(format!(
            "{}: {asked}: the {bound} allowed {} is {found}",
            write.field,
            write.file.replace('.', "-")
        )))
    }

    /// EBUSY on a v1 memory limit: more is in use than may be.
    fn explained(&self, write: &Write, errno: Errno) -> Error {
        if errno != Errno::BUSY || write.file != "memory.limit_in_bytes" {
            return self.failed(write, errno);
        }
        let number = |file| {
            self.read(file)
                .map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
        };
        Error::invalid(format!(
            "{}: unable to set memory limit to {} (current usage: {}, peak usage: {})",
            write.field,
            write.value,
            number("memory.usage_in_bytes"),
            number("memory.max_usage_in_bytes"),
        ))
    }

    /// The cgroup may not exist yet, or have no memory controller: then nothing is in use.
    fn memory_under(&self, limit: i64, swap: i64) -> Result<()> {
        let current = self.read("memory.current").ok();
        let Some(usage) = current.and_then(|text| text.trim().parse::<i64>().ok()) else {
            return Ok(());
        };
        let refuse = |what: &str, limit: i64| {
            Err(Error::invalid(format!(
                "rejecting {what} limit {limit} <= usage {usage}"
            )))
        };
        if swap > 0 && swap <= usage {
            return refuse("memory+swap", swap);
        }
        if limit > 0 && limit <= usage {
            return refuse("memory", limit);
        }
        Ok(())
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads a file that the kernel makes up, of unknown size.
///
/// Such a file hands out whole records until its page is full: much less than a page was all of
/// it, and a read that only says so is spared.
pub(super) fn read_fd(fd: BorrowedFd<'_>) -> std::result::Result<String, Errno> {
    let mut text = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut buffer))?;
        text.extend_from_slice(&buffer[..count]);
        if count < 1024 {
            return Ok(String::from_utf8_lossy(&text).into_owned());
        }
    }
}
