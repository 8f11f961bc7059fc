//! `pod-init`: process 1 of a pod that shares its pid namespace. Reaps what is left to it, ends on
//! SIGTERM or SIGINT, and with it the kernel ends the pod's processes.

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use rustix::io::Errno;
use rustix::process::WaitOptions;

use super::GlobalArgs;
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args, _global: &GlobalArgs) -> Result<ExitCode> {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        wanted.add(signal);
    }
    // Blocked, they stay pending: none is lost between two waits.
    wanted
        .thread_block()
        .map_err(|error| Error::system("sigprocmask", "", error))?;
    loop {
        reap_all()?;
        match wanted.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return Ok(ExitCode::SUCCESS),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Error::system("sigwait", "", error)),
        }
    }
}

fn reap_all() -> Result<()> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(Errno::CHILD) => return Ok(()),
            Err(error) => return Err(Error::system("waitpid", "", error)),
        }
    }
}
