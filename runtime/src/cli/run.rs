//! `run`: create and start in one, in the foreground unless told otherwise.

use std::process::ExitCode;

use coracle_oci::state::Status;

use super::GlobalArgs;
use super::create::ContainerArgs;
use crate::error::{Error, Result};
use crate::hooks;
use crate::launch::foreground::Signals;
use crate::launch::{self, Launched};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub container: ContainerArgs,
    /// detach from the container's process
    #[arg(long, short = 'd')]
    pub detach: bool,
    /// do not delete the container after it exits
    #[arg(long)]
    pub keep: bool,
    /// disable the use of the subreaper used to reap reparented processes
    #[arg(long)]
    pub no_subreaper: bool,
}

pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let mut options = args.container.prepare()?;
    options.bridged = !args.detach;
    let mut request = args.container.request(global, options)?;
    request.foreground = !args.detach;
    let signals = if args.detach {
        None
    } else {
        Some(Signals::block()?)
    };
    let mut launched = launch::launch(request)?;
    if let Err(error) = begin(&launched, global) {
        return Err(launched.give_up(error));
    }
    let Some(signals) = signals else {
        return Ok(ExitCode::SUCCESS);
    };
    if !args.no_subreaper && !launched.record.private_pid_namespace {
        become_subreaper()?;
    }
    let code = signals.follow(launched.record.init_pid, launched.master.take())?;
    if !args.keep {
        launched.destroy()?;
    }
    Ok(ExitCode::from(code))
}

fn begin(launched: &Launched, global: &GlobalArgs) -> Result<()> {
    launched.release(global)?;
    let mut state = launched.state.clone();
    state.status = Status::Running;
    let hooks = launched
        .plan
        .hooks
        .poststart()
        .as_deref()
        .unwrap_or_default();
    hooks::run("poststart", hooks, &state, Some(&launched.record.bundle))
}

/// Without a pid namespace the container's orphans come to us, and have to be reaped.
fn become_subreaper() -> Result<()> {
    let on = rustix::process::Pid::INIT;
    rustix::process::set_child_subreaper(Some(on))
        .map_err(|error| Error::system("prctl(PR_SET_CHILD_SUBREAPER)", "", error))
}
