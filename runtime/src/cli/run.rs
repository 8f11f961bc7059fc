//! `run`: create and start in one, in the foreground unless told otherwise.

use std::os::fd::AsFd as _;
use std::process::ExitCode;

use coracle_oci::state::Status;

use super::GlobalArgs;
use super::create::ContainerArgs;
use crate::error::{Error, Result};
use crate::hooks;
use crate::launch::foreground::Signals;
use crate::launch::notify::{self, NotifySocket};
use crate::launch::{self, Launched};
use crate::log;

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
    let notify = match begin(&launched, global, signals.is_none()) {
        Ok(notify) => notify,
        Err(error) => return Err(launched.give_up(error)),
    };
    let Some(signals) = signals else {
        // As with runc: whoever listens no more is no reason to end the container.
        let _ = notify.map(|notify| notify.wait(launched.pidfd.as_fd()));
        return Ok(ExitCode::SUCCESS);
    };
    if !args.no_subreaper && !launched.record.private_pid_namespace {
        become_subreaper()?;
    }
    let master = launched.master.take();
    let code = match signals.follow(launched.record.init_pid, master, notify.as_ref()) {
        Ok(code) => code,
        // Nobody would wait for it any more.
        Err(error) => return Err(launched.give_up(error)),
    };
    // The program has had its say: what fails after it is told, and does not change the code.
    if !args.keep
        && let Err(error) = launched.destroy()
    {
        log::warning(global, &format!("{error:#}"));
    }
    Ok(ExitCode::from(code))
}

fn begin(launched: &Launched, global: &GlobalArgs, detached: bool) -> Result<Option<NotifySocket>> {
    let main_pid = match detached {
        true => launched.record.init_pid,
        false => rustix::process::getpid().as_raw_nonzero().get(),
    };
    let notify = match notify::host() {
        Some(host) => NotifySocket::bind(&launched.entry, host, main_pid)?,
        None => None,
    };
    launched.release(global)?;
    let mut state = launched.state.clone();
    state.status = Status::Running;
    let hooks = launched
        .plan
        .hooks
        .poststart()
        .as_deref()
        .unwrap_or_default();
    hooks::run("poststart", hooks, &state, Some(&launched.record.bundle))?;
    Ok(notify)
}

/// Without a pid namespace the container's orphans come to us, and have to be reaped.
pub(super) fn become_subreaper() -> Result<()> {
    let on = rustix::process::Pid::INIT;
    rustix::process::set_child_subreaper(Some(on))
        .map_err(|error| Error::system("prctl(PR_SET_CHILD_SUBREAPER)", "", error))
}
