//! Opens the stdio that a request asks for.
//!
//! Owns: the order of the steps. A failure leaves nothing open.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;

use super::attach::Attachments;
use super::drain::{Drain, OutputFile, Sink};
use super::feed::Feed;
use super::hold::Hold;
use super::logger::{Logger, Start};
use super::spec::Address;
use super::{Io, part, set_nonblocking};
use crate::error::{Error, Kind, Result};
use crate::log::{CriLog, Lines};
use crate::poll::{Endpoint, Poll, Source};

/// The three addresses of a request, parsed.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub stdin: Address,
    pub stdout: Address,
    pub stderr: Address,
    pub terminal: bool,
}

pub struct Owner<'a> {
    pub io: u32,
    pub container: &'a str,
    pub namespace: &'a str,
    /// Of the pipes (Options.io_uid, io_gid): for processes that open /dev/stdout anew.
    pub uid: u32,
    pub gid: u32,
}

/// What the process gets as 0, 1 and 2. Closed in the shim once the process has them.
pub struct ProcessEnds(pub [OwnedFd; 3]);

impl Wanted {
    pub fn parse(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Result<Wanted> {
        let stdin_address = super::spec::parse(stdin)?;
        let stdout_address = super::spec::parse(stdout)?;
        let mut stderr_address = super::spec::parse(stderr)?;
        match stdin_address {
            Address::Null | Address::Fifo(_) | Address::Attach { .. } | Address::Passed => {}
            _ => return Err(Error::new(Kind::Invalid, "stdin address", stdin)),
        }
        for (address, text) in [(&stdout_address, stdout), (&stderr_address, stderr)] {
            if matches!(address, Address::Attach { .. }) {
                return Err(Error::new(Kind::Invalid, "output address", text));
            }
        }
        // One logging binary, and one file when only stdout names it, serves both streams.
        if matches!(stdout_address, Address::Binary { .. } | Address::File(_))
            && (stderr.is_empty() || matches!(stdout_address, Address::Binary { .. }))
        {
            stderr_address = stdout_address.clone();
        }
        if let (Address::CriLog(a), Address::CriLog(b)) = (&stdout_address, &stderr_address)
            && a != b
        {
            return Err(Error::new(Kind::Invalid, "stderr address", stderr)
                .source("differs from the log of stdout"));
        }
        if terminal {
            stderr_address = Address::Null;
        }
        Ok(Wanted {
            stdin: stdin_address,
            stdout: stdout_address,
            stderr: stderr_address,
            terminal,
        })
    }
}

fn null() -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::io("open", "/dev/null", e))
}

fn pipe(owner: &Owner<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let failed = |e: rustix::io::Errno| Error::io("pipe2", "stdio", e);
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
    if owner.uid != 0 || owner.gid != 0 {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        for end in [&read, &write] {
            rustix::fs::fchown(end, Some(uid), Some(gid)).map_err(failed)?;
        }
    }
    Ok((read, write))
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd> {
    set_nonblocking(&fd).map_err(|e| Error::io("fcntl(F_SETFL)", "stdio", e))?;
    Ok(fd)
}

fn open_path(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        flags | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )
    .map_err(|e| Error::io("open", path.display().to_string(), e))
}

fn is_fifo(path: &Path) -> Result<bool> {
    let meta =
        std::fs::metadata(path).map_err(|e| Error::io("stat", path.display().to_string(), e))?;
    Ok(meta.file_type().is_fifo())
}

/// Takes the passed descriptors in the order stdin, stdout, stderr.
struct Passed(std::vec::IntoIter<OwnedFd>);

impl Passed {
    fn next(&mut self, name: &'static str) -> Result<OwnedFd> {
        self.0.next().ok_or_else(|| {
            Error::new(Kind::Invalid, "stdio address fd:", name)
                .source("no descriptor came with it")
        })
    }
}

struct Opening<'a> {
    poll: &'a Poll,
    owner: &'a Owner<'a>,
    terminal: bool,
    log: Option<CriLog>,
    logger: Option<Logger>,
}

pub fn open(
    poll: &Poll,
    owner: &Owner<'_>,
    wanted: &Wanted,
    fds: Vec<OwnedFd>,
) -> Result<(Io, ProcessEnds)> {
    let mut passed = Passed(fds.into_iter());
    let mut opening = Opening {
        poll,
        owner,
        terminal: wanted.terminal,
        log: None,
        logger: None,
    };
    let (feed, stdin) = opening.input(&wanted.stdin, &mut passed)?;
    let (out, err, stdout, stderr);
    if let (Address::Binary { .. }, false) = (&wanted.stdout, wanted.terminal) {
        (stdout, stderr) = opening.binary(&wanted.stdout)?;
        (out, err) = (None, None);
    } else {
        (out, stdout) = opening.output(0, &wanted.stdout, &mut passed)?;
        (err, stderr) = opening.output(1, &wanted.stderr, &mut passed)?;
    }
    let io = Io {
        id: owner.io,
        stdin: feed,
        drains: [out, err],
        log: opening.log,
        attachments: Attachments::new(owner.io),
        console: None,
        passed: wanted.terminal && wanted.stdout == Address::Passed,
        logger: opening.logger,
        stuck: 0,
        looks: 0,
        hold: Hold::default(),
    };
    Ok((io, ProcessEnds([stdin, stdout, stderr])))
}

impl Opening<'_> {
    fn endpoint(&self, fd: OwnedFd, part: u16) -> Endpoint {
        Endpoint::new(fd, Source::Stdio(self.owner.io, part))
    }

    fn input(&self, address: &Address, passed: &mut Passed) -> Result<(Option<Feed>, OwnedFd)> {
        let mut feed = match address {
            Address::Fifo(path) => {
                // Never waits for a writer, and holds one so that the input does not end with
                // the first client.
                let read = open_path(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
                let write = match is_fifo(path)? {
                    true => Some(open_path(path, OFlags::WRONLY | OFlags::NONBLOCK)?),
                    false => None,
                };
                let read = self.endpoint(read, part::STDIN_SOURCE);
                Feed::new(Some(read), write, self.terminal)
            }
            Address::Attach { once } => {
                let mut feed = Feed::new(None, None, self.terminal);
                feed.attachable = true;
                feed.once = *once;
                feed
            }
            Address::Passed if self.terminal => {
                let fd = nonblocking(passed.next("stdin")?)?;
                Feed::new(Some(self.endpoint(fd, part::STDIN_SOURCE)), None, true)
            }
            Address::Passed => return Ok((None, passed.next("stdin")?)),
            _ => return Ok((None, null()?)),
        };
        if self.terminal {
            return Ok((Some(feed), null()?));
        }
        let (read, write) = pipe(self.owner)?;
        feed.set_sink(self.endpoint(nonblocking(write)?, part::STDIN_SINK));
        Ok((Some(feed), read))
    }

    fn output(
        &mut self,
        stream: u16,
        address: &Address,
        passed: &mut Passed,
    ) -> Result<(Option<Drain>, OwnedFd)> {
        let name = ["stdout", "stderr"][usize::from(stream)];
        let peer = part::OUT_SINK + stream;
        let (sink, splice) = match address {
            // A console must be read even when nobody wants the output, or it fills up.
            Address::Null if self.terminal && stream == 0 => (Sink::Discard, false),
            Address::Null => return Ok((None, null()?)),
            Address::Fifo(path) if is_fifo(path)? => {
                // Both ends: a reader that restarts does not kill the process by SIGPIPE.
                let fd = open_path(path, OFlags::RDWR | OFlags::NONBLOCK)?;
                (Sink::Peer(self.endpoint(fd, peer)), !self.terminal)
            }
            Address::Fifo(path) => {
                let fd = open_path(path, OFlags::WRONLY | OFlags::APPEND)?;
                (Sink::File(OutputFile::new(path.clone(), fd.into())), false)
            }
            Address::File(path) => {
                let file = self.append_to(path)?.into();
                (Sink::File(OutputFile::new(path.clone(), file)), false)
            }
            Address::CriLog(path) => {
                if self.log.is_none() {
                    let log = CriLog::open(path)
                        .map_err(|e| Error::io("open log", path.display().to_string(), e))?;
                    self.log = Some(log);
                }
                let lines = if stream == 0 {
                    Lines::stdout()
                } else {
                    Lines::stderr()
                };
                (Sink::Log(lines), false)
            }
            Address::Passed if self.terminal => {
                let fd = nonblocking(passed.next(name)?)?;
                (Sink::Peer(self.endpoint(fd, peer)), false)
            }
            Address::Passed => return Ok((None, passed.next(name)?)),
            Address::Binary { .. } if self.terminal => {
                let (write, _) = self.binary(address)?;
                (Sink::Peer(self.endpoint(nonblocking(write)?, peer)), false)
            }
            Address::Binary { .. } => {
                return Err(Error::new(Kind::Invalid, "binary:// logging", name)
                    .source("one logging binary serves both streams: stdout names it"));
            }
            Address::Attach { .. } => return Err(Error::new(Kind::Invalid, "address of", name)),
        };
        let fifo = matches!((address, &sink), (Address::Fifo(_), Sink::Peer(_)));
        if self.terminal {
            return Ok((Some(Drain::new(None, sink, false).with_fifo(fifo)), null()?));
        }
        let (read, write) = pipe(self.owner)?;
        let source = self.endpoint(nonblocking(read)?, part::OUT_SOURCE + stream);
        Ok((
            Some(Drain::new(Some(source), sink, splice).with_fifo(fifo)),
            write,
        ))
    }

    fn append_to(&self, path: &Path) -> Result<OwnedFd> {
        let failed = |e| Error::io("open", path.display().to_string(), e);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o644)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)
            .map_err(failed)?;
        if file.metadata().map_err(failed)?.mode() & 0o170_000 == 0o010_000 {
            return Err(
                Error::new(Kind::Invalid, "file:// address", path.display().to_string())
                    .source("is a fifo"),
            );
        }
        Ok(file.into())
    }

    /// The write ends of its stdout and stderr.
    fn binary(&mut self, address: &Address) -> Result<(OwnedFd, OwnedFd)> {
        let Address::Binary {
            program,
            args,
            speaks,
        } = address
        else {
            return Err(Error::new(Kind::Internal, "logging binary", ""));
        };
        let (out_read, out_write) = pipe(self.owner)?;
        let (err_read, err_write) = pipe(self.owner)?;
        let start = Start {
            program,
            args,
            speaks: *speaks,
            container: self.owner.container,
            namespace: self.owner.namespace,
            stdout: &out_read,
            stderr: &err_read,
            null: &null()?,
        };
        self.logger = Some(Logger::start(self.poll, self.owner.io, &start)?);
        Ok((out_write, err_write))
    }
}
