//! containerd-shim-coracle-v2: supervises the containers of one pod for containerd or coracled.
//!
//! ```text
//! daemon --exec--> start --exec--> serve <--ttrpc-- daemon
//!                                    +--exec--> runtime --> container
//! ```
//! `args` reads the command line, `bootstrap` is `start`, `cleanup` is `delete`, `supervisor` is
//! the running shim with its parts: `ttrpc` and `service` (the wire), `task` (what a request
//! does), `sandbox` (pods), `stdio` and `log` (what processes write), `reaper`, `cgroup_events`,
//! `events`.
#![forbid(unsafe_code)]

mod args;
mod bootstrap;
mod calls;
mod cgroup;
mod cgroup_events;
mod cleanup;
mod confine;
mod console;
mod error;
mod events;
mod hands;
mod journal;
mod log;
mod mounts;
mod options;
mod poll;
mod process;
mod reaper;
mod records;
mod runtime_cli;
mod sandbox;
mod service;
mod socket;
mod stats;
mod stdio;
mod supervisor;
mod task;
mod ttrpc;

/// Messages compiled from `shim/proto`.
#[allow(dead_code, clippy::all)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}

use std::process::ExitCode;

use args::{Action, Args};
use error::{Error, Result};

fn main() -> ExitCode {
    let result = args::parse(std::env::args_os().skip(1)).and_then(|args| run(&args));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-coracle-v2: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    match args.action {
        Action::Start => bootstrap::start(args),
        Action::Delete => cleanup::delete(args),
        Action::Info => bootstrap::info(),
        Action::Version => {
            println!(
                "containerd-shim-coracle-v2:\n  Version:  {}",
                env!("CARGO_PKG_VERSION")
            );
            Ok(())
        }
        Action::Pause => sandbox::pause::pause(),
        Action::Serve => serve(args),
    }
}

fn serve(args: &Args) -> Result<()> {
    coracle_sys::spawn::keep_heap_small();
    let listener = coracle_sys::spawn::inherited(bootstrap::LISTENER)
        .map_err(|e| Error::io("inherited socket", "3; was this called by start?", e))?;
    let signals = reaper::block_signals()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| Error::io("prctl(PR_SET_CHILD_SUBREAPER)", "", e))?;
    let confines = confine::wanted();
    if confines {
        hands::grow(task::deadline::limit())
            .map_err(|e| Error::io("fork", "the shim's hands", e))?;
    }
    let bundle = std::env::current_dir().map_err(|e| Error::io("getcwd", "", e))?;
    let config = supervisor::Config {
        id: args.id.clone(),
        namespace: args.namespace.clone(),
        bundle,
        socket: args.socket.clone(),
        events: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
        debug: args.debug,
        boot_id: records::boot_id(),
        call_limit: task::deadline::limit(),
    };
    let mut supervisor = supervisor::Supervisor::new(config, listener, signals)?;
    if confines {
        supervisor.confine();
    }
    let result = supervisor.run();
    if let Err(e) = &result {
        supervisor.journal.warn(&format!("ended: {e}"));
    }
    result
}
