//! `restore`: a container from the images of a checkpoint.

use std::path::PathBuf;
use std::process::ExitCode;

use super::GlobalArgs;
use super::checkpoint::{CriuArgs, warn_if_rootless};
use super::run::become_subreaper;
use crate::bundle::Bundle;
use crate::criu::restore::{Extra, restore};
use crate::error::Result;
use crate::launch::foreground::Signals;
use crate::launch::{Request, notify};
use crate::plan::LaunchOptions;
use crate::state::parse_id;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    criu: CriuArgs,
    /// path to an AF_UNIX socket which will receive the master end of the console's pseudoterminal
    #[arg(long, value_name = "value")]
    console_socket: Option<PathBuf>,
    /// path to the root of the bundle directory, defaults to the current directory
    #[arg(long, short = 'b', value_name = "value")]
    bundle: Option<PathBuf>,
    /// detach from the container's process
    #[arg(long, short = 'd')]
    detach: bool,
    /// specify the file to write the process id to
    #[arg(long, value_name = "value")]
    pid_file: Option<PathBuf>,
    /// disable the use of the subreaper used to reap reparented processes
    #[arg(long)]
    no_subreaper: bool,
    /// do not use pivot root to jail process inside rootfs; of no effect, for criu does what it
    /// has saved
    #[arg(long)]
    no_pivot: bool,
    /// LSM profile to be used during restore in the form of TYPE:NAME
    #[arg(long, value_name = "value")]
    lsm_profile: Option<String>,
    /// LSM mount context to be used during restore
    #[arg(long, value_name = "value")]
    lsm_mount_context: Option<String>,
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

/// # Errors
/// CRIU fails, or the container cannot be made; nothing is left of it then.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    warn_if_rootless(global);
    let options = args.criu.options()?;
    let path = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
    let (console_socket, pid_file) = (path(&args.console_socket), path(&args.pid_file));
    let id = parse_id(&args.id)?;
    let mut bundle = Bundle::open(path(&args.bundle).as_deref())?;
    if notify::host().is_some() {
        bundle.config = notify::add_to(&bundle.config, &global.root, id.as_str())?;
    }
    let request = Request {
        id,
        bundle,
        global,
        options: LaunchOptions {
            no_pivot: args.no_pivot,
            bridged: !args.detach,
            ..LaunchOptions::default()
        },
        console_socket: console_socket.as_deref(),
        pidfd_socket: None,
        pid_file: pid_file.as_deref(),
        foreground: !args.detach,
    };
    let word = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let extra = Extra {
        lsm_profile: word(&args.lsm_profile),
        lsm_mount_context: word(&args.lsm_mount_context),
    };
    let signals = match args.detach {
        true => None,
        false => Some(Signals::block()?),
    };
    let mut restored = restore(request, &options, &extra)?;
    let Some(signals) = signals else {
        return Ok(ExitCode::SUCCESS);
    };
    if !args.no_subreaper && !restored.record.private_pid_namespace {
        become_subreaper()?;
    }
    let code = signals.follow(restored.record.init_pid, restored.master.take(), None)?;
    restored.destroy()?;
    Ok(ExitCode::from(code))
}
