//! coracle: argv in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    coracle_sys::entry::linked();
    coracle::cli::main(std::env::args_os().collect())
}
