//! Terminals: the container's pty, handing it to an engine, and bridging it to ours.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, OutputModes, Termios, Winsize};

use crate::error::{Error, Result};
use crate::init::resolve::Root;

const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

/// Of the multiplexer of every devpts.
const PTMX_INODE: u64 = 2;

/// Both ends of a new terminal.
#[derive(Debug)]
pub struct Pty {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

impl Pty {
    /// Opens a terminal of the devpts at /dev/pts of a root. What is there is checked: a multiplexer
    /// that the image brought along could be any device (CVE-2025-52565).
    ///
    /// # Errors
    /// There is no devpts, or it refuses another terminal.
    pub fn open(root: &Root) -> Result<Self> {
        let fail = |call: &'static str| {
            move |error: rustix::io::Errno| Error::system(call, "/dev/pts/ptmx", error)
        };
        let master = root
            .open(c"dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY)
            .map_err(fail("open"))?;
        let stat = rustix::fs::fstat(&master).map_err(fail("fstat"))?;
        let fs = rustix::fs::fstatfs(&master).map_err(fail("fstatfs"))?;
        let is_ptmx = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(5, 2)
            && stat.st_ino == PTMX_INODE
            && fs.f_type as u64 == DEVPTS_SUPER_MAGIC;
        if !is_ptmx {
            return Err(Error::invalid(
                "/dev/pts/ptmx of the container is not a devpts multiplexer",
            ));
        }
        rustix::pty::unlockpt(&master).map_err(fail("ioctl(TIOCSPTLCK)"))?;
        // The peer by fd: no path of the container is looked up.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave =
            rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(fail("ioctl(TIOCGPTPEER)"))?;
        Ok(Self { master, slave })
    }

    /// Newlines leave the terminal as they are: runc's rule for one that it bridges itself, since
    /// the terminal at the other end adds the carriage return. An engine sets its own.
    pub fn keep_newlines(&self) -> Result<()> {
        let mut modes = rustix::termios::tcgetattr(&self.master)
            .map_err(|error| Error::system("tcgetattr", "the console", error))?;
        modes.output_modes.remove(OutputModes::ONLCR);
        rustix::termios::tcsetattr(&self.master, OptionalActions::Now, &modes)
            .map_err(|error| Error::system("tcsetattr", "the console", error))
    }

    /// Sets the size before the program can ask for it.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        resize(self.master.as_fd(), rows, columns)
    }
}

pub fn resize(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
        .map_err(|error| Error::system("ioctl(TIOCSWINSZ)", "the console", error))
}

/// Makes the terminal stdio and the controlling terminal of this session leader.
pub fn take(slave: &OwnedFd) -> Result<()> {
    let fail = |call: &'static str| {
        move |error: rustix::io::Errno| Error::system(call, "the console", error)
    };
    rustix::process::ioctl_tiocsctty(slave).map_err(fail("ioctl(TIOCSCTTY)"))?;
    rustix::stdio::dup2_stdin(slave).map_err(fail("dup2"))?;
    rustix::stdio::dup2_stdout(slave).map_err(fail("dup2"))?;
    rustix::stdio::dup2_stderr(slave).map_err(fail("dup2"))
}

/// A connection to the engine's `--console-socket`.
#[derive(Debug)]
pub struct ConsoleSocket {
    socket: OwnedFd,
}

impl ConsoleSocket {
    /// Connects, before anything is made that would have to be undone.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let fail = |call: &'static str| {
            let path = path.display().to_string();
            move |error: rustix::io::Errno| Error::system(call, path, error)
        };
        let address = SocketAddrUnix::new(path).map_err(fail("console socket"))?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(fail("socket"))?;
        rustix::net::connect(&socket, &address).map_err(|error| {
            let operation = format!("dial unix {}: connect", path.display());
            Error::system(operation, "", error)
        })?;
        Ok(Self { socket })
    }

    /// Sends an fd, with a name as the message: what runc's peers expect.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&self, fd: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(name)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
        .map_err(|error| Error::system("sendmsg(SCM_RIGHTS)", "the console socket", error))
    }
}

/// Our own terminal in raw mode, put back when dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// None when we run at no terminal: then there is nothing to change.
    pub fn enter() -> Option<Self> {
        let terminal = own_terminal()?;
        let before = rustix::termios::tcgetattr(&terminal).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        // The console's newlines come without a carriage return (see keep_newlines): it is added
        // here, once.
        raw.output_modes.insert(OutputModes::OPOST);
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &raw).ok()?;
        Some(Self { terminal, before })
    }
}

/// The terminal that we run at: usually all three streams are it, but each may be redirected; then
/// the controlling one.
fn own_terminal() -> Option<OwnedFd> {
    let streams = [
        rustix::stdio::stderr(),
        rustix::stdio::stdout(),
        rustix::stdio::stdin(),
    ];
    match streams
        .into_iter()
        .find(|stream| rustix::termios::isatty(stream))
    {
        Some(stream) => rustix::io::fcntl_dupfd_cloexec(stream, 3).ok(),
        None => {
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            rustix::fs::open(c"/dev/tty", flags, Mode::empty()).ok()
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// Gives the console the size of our own terminal, if we have one.
pub fn follow_size(master: BorrowedFd<'_>) {
    let size = own_terminal().and_then(|own| rustix::termios::tcgetwinsize(own).ok());
    if let Some(size) = size {
        // A console that is gone needs no size.
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}
