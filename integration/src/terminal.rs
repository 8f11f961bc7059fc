//! A program on a pseudoterminal of the test: what it wrote there, and how it ended.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result};
use nix::pty::{Winsize, openpty};

/// Runs it to its end; what it wrote is in `stdout`, with the terminal's line ends.
pub fn run(command: Command, rows: u16, columns: u16) -> Result<Output> {
    talk(command, rows, columns, "")
}

/// As `run`, with `input` typed at its start.
pub fn talk(mut command: Command, rows: u16, columns: u16, input: &str) -> Result<Output> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(Some(&size), None).context("openpty")?;
    let (mut master, slave) = (File::from(pty.master), File::from(pty.slave));
    command
        .stdin(Stdio::from(slave.try_clone()?))
        .stdout(Stdio::from(slave.try_clone()?))
        .stderr(Stdio::from(slave))
        .process_group(0);
    let mut child = command.spawn().context("spawn on a terminal")?;
    // The command holds the slave's descriptors: without them the end is seen.
    drop(command);
    master.write_all(input.as_bytes())?;
    let mut stdout = Vec::new();
    let mut buffer = [0; 4096];
    // EIO is how a terminal says that nobody has it open any more.
    while let Ok(n) = master.read(&mut buffer) {
        if n == 0 {
            break;
        }
        stdout.extend_from_slice(&buffer[..n]);
    }
    Ok(Output {
        status: child.wait()?,
        stdout,
        stderr: Vec::new(),
    })
}
