//! `resume`: thaws the processes of a paused container.

use std::process::ExitCode;

use super::GlobalArgs;
use crate::error::Result;
use crate::state::{Container, Request};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

/// # Errors
/// There is no such container, or it is not paused.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    let _lock = container.entry.lock()?;
    if container.allows(Request::Resume)? {
        container.cgroup().thaw()?;
    }
    Ok(ExitCode::SUCCESS)
}
