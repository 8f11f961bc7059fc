//! A program that runs beside a test and ends with the value: SIGTERM, then SIGKILL, by pid.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::process::{Pid, Signal, kill_process};

pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// As `start`, out of reach of a Ctrl-C: the caller ends it when it has cleaned up.
    pub fn start_in_own_group(command: &mut Command, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        // The child would inherit what this thread blocks, and never see a SIGTERM.
        let blocked = SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = Self::start(command.process_group(0), log);
        blocked.thread_set_mask()?;
        started
    }

    /// Starts it with both outputs appended to `log`.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self {
            child,
            name,
            log: log.to_owned(),
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// None while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("pid out of range")?, signal).context("kill")
    }

    /// SIGKILL, as a crash would be.
    pub fn crash(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM; the exit status, None when it had to be killed after `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        self.signal(Signal::TERM)?;
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(None)
    }

    /// The last lines of its output, for error messages.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

/// What became of a program that was given a time limit.
#[derive(Debug)]
pub struct Ended {
    /// None when it had to be killed.
    pub status: Option<ExitStatus>,
    pub out: String,
    pub error: String,
}

/// Runs a program to its end, or until the time is over. Its outputs are files: a pipe would be
/// held open by whatever it leaves running.
pub fn run_within(command: &mut Command, limit: Duration) -> Result<Ended> {
    use std::io::{Read as _, Seek as _};
    let (mut out, mut error) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(error.try_clone()?)
        .spawn()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let read = |file: &mut File| -> Result<String> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    Ok(Ended {
        status,
        out: read(&mut out)?,
        error: read(&mut error)?,
    })
}

pub fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.signal(Signal::TERM);
            let end = Instant::now() + Duration::from_secs(3);
            while Instant::now() < end {
                if let Ok(Some(_)) = self.child.try_wait() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
