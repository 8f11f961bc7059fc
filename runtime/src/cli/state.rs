//! `state`: the runtime spec's state document of a container, with runc's additions.

use std::io::Write as _;
use std::process::ExitCode;

use coracle_oci::state::StateReport;

use super::GlobalArgs;
use crate::error::{Error, Kind, Result};
use crate::state::Container;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

/// # Errors
/// There is no such container, or its status cannot be told.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    let report = StateReport::new(&container.record, container.status()?);
    // runc's document ends without a newline.
    let text = serde_json::to_string_pretty(&report).map_err(|error| {
        Error::new(Kind::Internal, "encode the state of", &args.id).source(error)
    })?;
    write_stdout(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// # Errors
/// Nobody takes the answer.
pub(super) fn write_stdout(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::system("write", "stdout", error))
}
