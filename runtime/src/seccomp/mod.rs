//! Seccomp profiles compiled to BPF.
//!
//! ```text
//! LinuxSeccomp --profile--> Filter: per ABI, call number -> rules --bpf--> Vec<SockFilter>
//!                                                                  (cache: on disk, by hash)
//! ```
//!
//! The meaning is libseccomp's as runc drives it: several rules for a call are alternatives, an
//! unconditional rule wins over conditional ones, calls newer than the newest one the profile
//! names fail with ENOSYS. Where two conditional rules of a call overlap, the stricter action
//! wins. Pure but for `cache`; the filter is installed by `coracle_sys::seccomp`.

mod bpf;
pub mod cache;
mod profile;
mod syscalls;
mod table;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use coracle_oci::config::spec::LinuxSeccomp;

use crate::error::{Error, Result};

pub type SockFilter = libc::sock_filter;

/// BPF_MAXINSNS: the kernel refuses longer programs.
pub const MAX_PROGRAM: usize = 4096;

/// What `features` tells; `profile` takes exactly these.
pub const ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
pub const OPERATORS: &[&str] = &[
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];
pub const ARCHITECTURES: &[&str] = &[
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
];
pub const FLAGS: &[&str] = &[
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

/// A system call interface that a program can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Abi {
    X86_64,
    I386,
    X32,
    Aarch64,
    Arm,
}

impl Abi {
    pub const fn native() -> Self {
        if cfg!(target_arch = "aarch64") {
            Self::Aarch64
        } else {
            Self::X86_64
        }
    }

    /// The column of the syscall table.
    fn column(self) -> usize {
        match self {
            Self::X86_64 => 0,
            Self::I386 => 1,
            Self::X32 => 2,
            Self::Aarch64 => 3,
            Self::Arm => 4,
        }
    }

    /// AUDIT_ARCH_* of linux/audit.h: what `seccomp_data.arch` holds.
    fn audit_arch(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::I386 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments are compared as 32 bits, as libseccomp does for these.
    fn is_32_bit(self) -> bool {
        matches!(self, Self::I386 | Self::X32 | Self::Arm)
    }

    /// Whether a kernel of architecture `native` can run this ABI at all.
    fn runs_on(self, native: Self) -> bool {
        let x86 = |abi| matches!(abi, Self::X86_64 | Self::I386 | Self::X32);
        x86(self) == x86(native)
    }
}

/// A program ready for `seccomp(2)`, with what has to go with it.
#[derive(Debug, Clone)]
pub struct Compiled {
    pub program: Vec<SockFilter>,
    /// SECCOMP_FILTER_FLAG_*, with NEW_LISTENER when `notify`.
    pub flags: u32,
    /// Whether some call is answered by the agent behind `listener_path`.
    pub notify: bool,
    pub listener_path: Option<PathBuf>,
    pub listener_metadata: Option<String>,
}

/// Compiles a profile for a kernel of architecture `native`.
pub fn compile(seccomp: &LinuxSeccomp, native: Abi) -> Result<Compiled> {
    let terms = profile::terms(seccomp)?;
    let program = bpf::program(&profile::filter(seccomp, native)?);
    if program.len() > MAX_PROGRAM {
        return Err(Error::invalid(format!(
            "linux.seccomp compiles to {} instructions, the kernel takes {MAX_PROGRAM}",
            program.len()
        )));
    }
    Ok(terms.with(program))
}
