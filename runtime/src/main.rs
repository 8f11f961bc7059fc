//! coracle: argv in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    coracle::sealed::ensure_early(std::env::args_os());
    coracle::cli::main(std::env::args_os().collect())
}
