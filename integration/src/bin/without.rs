//! `without CALL[,CALL...] PROGRAM [ARGS...]`: runs a program that finds some system calls missing.
//!
//! A seccomp filter answers them with ENOSYS, as an older kernel would, for the program and all that
//! it starts.

use std::collections::BTreeMap;
use std::convert::TryInto as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [calls, program, rest @ ..] = args.as_slice() else {
        bail!("usage: without CALL[,CALL...] PROGRAM [ARGS...]");
    };
    let mut rules = BTreeMap::new();
    for name in calls.split(',') {
        rules.insert(number(name)?, Vec::new());
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program_of_filter: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program_of_filter)?;
    Err(Command::new(program).args(rest).exec()).with_context(|| program.clone())
}

fn number(name: &str) -> Result<i64> {
    Ok(match name {
        "clone3" => libc::SYS_clone3,
        "close_range" => libc::SYS_close_range,
        "fsopen" => libc::SYS_fsopen,
        "mount_setattr" => libc::SYS_mount_setattr,
        "move_mount" => libc::SYS_move_mount,
        "open_tree" => libc::SYS_open_tree,
        "openat2" => libc::SYS_openat2,
        "pidfd_open" => libc::SYS_pidfd_open,
        _ => bail!("{name}: not one of the calls that the runtime may find missing"),
    })
}
