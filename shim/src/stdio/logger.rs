//! A logging binary (`binary://`): it holds the read ends of the process's pipes itself.
//!
//! Contract: stdout on 3, stderr on 4; it closes 5 when it is ready (`binary-v2://`: it writes a
//! byte there first); CONTAINER_ID and CONTAINER_NAMESPACE are set. Of a terminal there is no
//! stderr, and the shim copies the console to the pipe behind 3. It ends by itself at the end of its input; at Delete it gets a
//! little time, then SIGTERM, then SIGKILL.
//! Owns: its pid until the reaper has seen it, and the pipe of its readiness.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::hands::{self, Program};
use crate::poll::{Endpoint, Interest, Poll, Source};

pub struct Logger {
    pid: i32,
    ready: Option<Endpoint>,
    /// `None` where closing 5 is enough.
    spoke: Option<bool>,
    alive: bool,
}

pub struct Start<'a> {
    pub program: &'a Path,
    pub args: &'a [String],
    pub speaks: bool,
    pub container: &'a str,
    pub namespace: &'a str,
    pub stdout: &'a OwnedFd,
    pub stderr: &'a OwnedFd,
    pub null: &'a OwnedFd,
}

impl Logger {
    pub fn start(poll: &Poll, io: u32, start: &Start<'_>) -> Result<Logger> {
        let failed = |e: std::io::Error| {
            Error::new(
                Kind::Invalid,
                "start logging binary",
                start.program.display().to_string(),
            )
            .source(e)
        };
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|e| failed(e.into()));
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        super::set_nonblocking(&read).map_err(failed)?;
        let program = text(start.program.as_os_str().as_bytes())?;
        let mut args = vec![program.clone()];
        for arg in start.args {
            args.push(text(arg.as_bytes())?);
        }
        let env = vec![
            text(format!("CONTAINER_ID={}", start.container).as_bytes())?,
            text(format!("CONTAINER_NAMESPACE={}", start.namespace).as_bytes())?,
        ];
        let null = start.null.as_fd();
        let fds = [
            (null, 0),
            (null, 1),
            (null, 2),
            (start.stdout.as_fd(), 3),
            (start.stderr.as_fd(), 4),
            (write.as_fd(), 5),
        ];
        let pid = hands::start(&Program {
            program: &program,
            args: &args,
            env,
            fds: &fds,
            new_group: false,
        })
        .map_err(failed)?;
        let mut ready = Endpoint::new(read, Source::Stdio(io, super::part::LOGGER_READY));
        ready.watch(poll, Interest::READ).map_err(failed)?;
        Ok(Logger {
            pid,
            ready: Some(ready),
            spoke: start.speaks.then_some(false),
            alive: true,
        })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn alive(&self) -> bool {
        self.alive
    }

    /// Its descriptor 5 also closes when it dies, a moment before the reaper can see that. The
    /// kernel sets PF_EXITING before it closes descriptors (do_exit).
    pub fn dying(&self) -> bool {
        const PF_EXITING: u64 = 4;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let flags = rest
            .split_ascii_whitespace()
            .nth(6)
            .and_then(|f| f.parse::<u64>().ok());
        flags.is_none_or(|f| f & PF_EXITING != 0)
    }

    /// Wrote to or closed its descriptor 5.
    pub fn ready(&mut self) {
        let Some(ready) = self.ready.take() else {
            return;
        };
        if let Some(spoke) = &mut self.spoke {
            *spoke = rustix::io::read(ready.fd(), &mut [0u8; 1]).is_ok_and(|n| n == 1);
        }
    }

    /// Closed 5 without the word that was agreed.
    pub fn silent(&self) -> bool {
        self.is_ready() && self.spoke == Some(false)
    }

    pub fn is_ready(&self) -> bool {
        self.ready.is_none()
    }

    pub fn exited(&mut self) {
        self.alive = false;
        self.ready = None;
    }
}
