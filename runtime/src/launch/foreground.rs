//! A foreground `run` or `exec`: signals go to the container, its terminal is bridged to ours, its
//! exit code becomes ours. One thread: signals arrive through a signalfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};

use super::notify::NotifySocket;
use super::process::{exit_code, pid_of};
use crate::console::{RawMode, follow_size};
use crate::error::{Error, Result};

/// Signals blocked from before the clone on, so that none is lost between it and the wait.
#[derive(Debug)]
pub struct Signals {
    set: SigSet,
}

impl Signals {
    /// Blocks every signal that can be blocked. The child unblocks them before its program.
    ///
    /// # Errors
    /// Those of sigprocmask(2).
    pub fn block() -> Result<Self> {
        // Faults of our own, too: the kernel ends a process whose blocked signal is its own fault,
        // and abort(3) unblocks its.
        let set = SigSet::all();
        set.thread_block()
            .map_err(|error| Error::system("sigprocmask", "", error))?;
        Ok(Self { set })
    }

    /// Stays until the process ends; gives its exit code.
    ///
    /// # Errors
    /// The wait itself failed.
    pub fn follow(
        &self,
        pid: i32,
        master: Option<OwnedFd>,
        notify: Option<&NotifySocket>,
    ) -> Result<u8> {
        match (master, notify) {
            (Some(master), notify) => self.follow_terminal(pid, &master, notify),
            (None, Some(notify)) => self.follow_notifying(pid, notify),
            (None, None) => self.follow_quietly(pid),
        }
    }

    fn open(&self) -> Result<SignalFd> {
        SignalFd::with_flags(&self.set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|error| Error::system("signalfd", "", error))
    }

    fn follow_notifying(&self, pid: i32, notify: &NotifySocket) -> Result<u8> {
        let signals = self.open()?;
        loop {
            if let Some(status) = try_reap(pid)? {
                return Ok(exit_code(status));
            }
            let mut fds = [
                PollFd::new(&signals, PollFlags::IN),
                PollFd::from_borrowed_fd(notify.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::system("poll", "", error)),
            }
            serve(notify);
            while let Ok(Some(signal)) = signals.read_signal() {
                match i32::try_from(signal.ssi_signo) {
                    Ok(libc::SIGCHLD) | Err(_) => {}
                    Ok(number) => forward(pid, number),
                }
            }
        }
    }

    /// Without a terminal the container has our stdio: there is nothing to do but to wait.
    fn follow_quietly(&self, pid: i32) -> Result<u8> {
        loop {
            // The child may have ended before anything was waited for.
            if let Some(status) = try_reap(pid)? {
                return Ok(exit_code(status));
            }
            let signal = coracle_sys::signal::wait(&self.set)
                .map_err(|error| Error::system("sigwaitinfo", "", error))?;
            if signal != libc::SIGCHLD {
                forward(pid, signal);
            }
        }
    }

    fn follow_terminal(
        &self,
        pid: i32,
        master: &OwnedFd,
        notify: Option<&NotifySocket>,
    ) -> Result<u8> {
        let signals = self.open()?;
        set_nonblocking(master.as_fd())?;
        let mut bridge = Bridge::new(master);
        // What was typed before means what it did then: in raw mode a ^D would be a zero byte.
        bridge.read_typed_ahead();
        let _raw = RawMode::enter();
        follow_size(master.as_fd());
        loop {
            if let Some(status) = try_reap(pid)? {
                bridge.drain();
                return Ok(exit_code(status));
            }
            bridge.turn(&signals, notify)?;
            notify.map(serve);
            while let Ok(Some(signal)) = signals.read_signal() {
                match i32::try_from(signal.ssi_signo) {
                    Ok(libc::SIGCHLD) | Err(_) => {}
                    Ok(libc::SIGWINCH) => follow_size(master.as_fd()),
                    Ok(number) => forward(pid, number),
                }
            }
        }
    }
}

/// A service manager that is gone is no reason to end the container.
fn serve(notify: &NotifySocket) {
    let _ = notify.serve();
}

fn try_reap(pid: i32) -> Result<Option<WaitStatus>> {
    let wanted = pid_of(pid)?;
    let mut found = None;
    // Adopted orphans too: this process may be their subreaper.
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((ended, status))) if ended == wanted => found = Some(status),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return Ok(found),
            Err(Errno::CHILD) if found.is_some() => return Ok(found),
            Err(error) => return Err(Error::system("waitpid", pid.to_string(), error)),
        }
    }
}

/// A container that has just ended needs no signal.
fn forward(pid: i32, signal: i32) {
    let _ = coracle_sys::spawn::kill(pid, signal);
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<()> {
    let fail = |error| Error::system("fcntl(O_NONBLOCK)", "the console", error);
    let flags = rustix::fs::fcntl_getfl(fd).map_err(fail)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(fail)
}

/// Copies between our stdio and the terminal, holding back what the other side does not take.
struct Bridge<'a> {
    master: &'a OwnedFd,
    input: Vec<u8>,
    input_ended: bool,
    master_ended: bool,
}

impl<'a> Bridge<'a> {
    fn new(master: &'a OwnedFd) -> Self {
        Self {
            master,
            input: Vec::new(),
            input_ended: false,
            master_ended: false,
        }
    }

    /// Waits for anything to do and does it once.
    fn turn(&mut self, signals: &SignalFd, notify: Option<&NotifySocket>) -> Result<()> {
        let stdin = rustix::stdio::stdin();
        let mut master_wants = PollFlags::empty();
        if !self.master_ended {
            master_wants |= PollFlags::IN;
            if !self.input.is_empty() {
                master_wants |= PollFlags::OUT;
            }
        }
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        if let Some(notify) = notify {
            fds.push(PollFd::from_borrowed_fd(notify.as_fd(), PollFlags::IN));
        }
        let (mut master_at, mut stdin_at) = (None, None);
        if !master_wants.is_empty() {
            master_at = Some(fds.len());
            fds.push(PollFd::new(self.master, master_wants));
        }
        if !self.input_ended && !self.master_ended && self.input.is_empty() {
            stdin_at = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::system("poll", "", error)),
        }
        let events = |at: Option<usize>| at.map_or(PollFlags::empty(), |at| fds[at].revents());
        let (master, stdin_ready) = (events(master_at), !events(stdin_at).is_empty());
        if stdin_ready {
            self.read_input();
        }
        if master.intersects(PollFlags::OUT) {
            self.write_input();
        }
        if master.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.copy_output();
        }
        Ok(())
    }

    fn read_typed_ahead(&mut self) {
        let stdin = rustix::stdio::stdin();
        let mut fds = [PollFd::from_borrowed_fd(stdin, PollFlags::IN)];
        let now = rustix::event::Timespec::default();
        if poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
            self.read_input();
        }
    }

    fn read_input(&mut self) {
        let mut buffer = [0u8; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(0) => self.input_ended = true,
            Ok(length) => {
                self.input.extend_from_slice(&buffer[..length]);
                self.write_input();
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.input_ended = true,
        }
    }

    fn write_input(&mut self) {
        match rustix::io::write(self.master, &self.input) {
            Ok(length) => drop(self.input.drain(..length)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.input.clear(),
        }
    }

    /// EIO says that no process has the slave open any more.
    fn copy_output(&mut self) {
        let mut buffer = [0u8; 16384];
        match rustix::io::read(self.master, &mut buffer) {
            Ok(0) => self.master_ended = true,
            Ok(length) => write_all(&buffer[..length]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.master_ended = true,
        }
    }

    /// What the program has printed last.
    fn drain(&mut self) {
        let mut buffer = [0u8; 16384];
        while let Ok(length @ 1..) = rustix::io::read(self.master, &mut buffer) {
            write_all(&buffer[..length]);
        }
    }
}

/// To stdout, whatever it is; a reader that went away has lost interest.
fn write_all(mut bytes: &[u8]) {
    let stdout = rustix::stdio::stdout();
    while !bytes.is_empty() {
        match rustix::io::write(stdout, bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::from_borrowed_fd(stdout, PollFlags::OUT)];
                if poll(&mut fds, None).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}
