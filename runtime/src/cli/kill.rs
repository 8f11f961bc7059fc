//! `kill`: a signal to the container's init, or to all of it when it shares a pid namespace.

use std::process::ExitCode;

use coracle_oci::signal;

use super::GlobalArgs;
use crate::error::{Error, Kind, Result};
use crate::state::{Container, Reason, Request, is_alive, open_process};

pub(super) const SIGKILL: i32 = 9;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// the signal to be sent to the init process, by name or number
    #[arg(
        value_name = "signal",
        default_value = "SIGTERM",
        allow_hyphen_values = true
    )]
    signal: String,
    /// obsolete: no error if the container has stopped
    #[arg(short, long, hide = true)]
    all: bool,
}

/// # Errors
/// There is no such container or signal, or the container does not run.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    let signal = parse_signal(&args.signal)?;
    // Without a pid namespace of its own the container outlives its init: SIGKILL is for whoever
    // is left in the cgroup, too.
    if signal == SIGKILL && !container.record.private_pid_namespace {
        kill_everything(&container, args.all)?;
        return Ok(ExitCode::SUCCESS);
    }
    if container.allows(Request::Kill { all: args.all })? {
        signal_init(&container, signal, args.all)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn kill_everything(container: &Container, all: bool) -> Result<()> {
    let cgroup = container.cgroup();
    let nobody = cgroup.is_none() || cgroup.pids().is_ok_and(|pids| pids.is_empty());
    if nobody && !is_alive(container.record.init()) {
        if all {
            return Ok(());
        }
        return Err(Reason::NotRunning
            .error(container.id())
            .context("unable to kill all processes"));
    }
    match cgroup.kill_all() {
        Ok(()) if !cgroup.is_none() => Ok(()),
        // Without a cgroup to find the others by, at least the init.
        Ok(()) => signal_init(container, SIGKILL, all),
        Err(_) if container.record.rootless_cgroups => signal_init(container, SIGKILL, all),
        Err(error) => Err(error.context("unable to kill all processes")),
    }
}

fn signal_init(container: &Container, signal: i32, all: bool) -> Result<()> {
    let Some(process) = open_process(container.record.init())? else {
        // It exited since the status was read.
        return if all {
            Ok(())
        } else {
            Err(Reason::NotRunning.error(container.id()))
        };
    };
    coracle_sys::signal::send(&process, signal)
        .map_err(|error| Error::new(Kind::System, "unable to signal init", "").source(error))?;
    if signal == SIGKILL {
        // Frozen on v1, a process does not die before it is thawed.
        let cgroup = container.cgroup();
        if cgroup.is_frozen().unwrap_or(false) {
            let _ = cgroup.thaw();
        }
    }
    Ok(())
}

fn parse_signal(text: &str) -> Result<i32> {
    // Go's callers pass an empty word for the default.
    let text = if text.is_empty() { "SIGTERM" } else { text };
    signal::parse(text).ok_or_else(|| Error::invalid(format!("unknown signal {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signal_table() {
        let cases = [
            ("9", Some(9)),
            ("sigterm", Some(15)),
            ("0", Some(0)),
            ("", Some(15)),
            ("SIG", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse_signal(text).ok(), want, "{text:?}");
        }
        assert_eq!(
            parse_signal("nope").unwrap_err().to_string(),
            "unknown signal \"nope\""
        );
        assert_eq!(signal::from_name("KILL"), Some(SIGKILL));
    }
}
