//! coracle: argv in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    coracle::cli::main(std::env::args_os().collect())
}
