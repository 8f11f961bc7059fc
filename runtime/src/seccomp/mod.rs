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

mod abi;
mod bpf;
pub mod cache;
mod foreign;
mod profile;
mod syscalls;
mod table;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use coracle_oci::config::spec::LinuxSeccomp;

use crate::error::{Error, Result};

pub use abi::Abi;

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
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
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

/// Those of [`FLAGS`] that this kernel knows.
pub fn supported_flags() -> Vec<&'static str> {
    let bits = |name: &str| match name {
        "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // Only goes with a listener.
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {
            libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
        }
        _ => libc::SECCOMP_FILTER_FLAG_TSYNC,
    };
    let known = |name: &&str| coracle_sys::seccomp::flags_available(bits(name) as u32);
    FLAGS.iter().copied().filter(known).collect()
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

/// runc's words for each call of a profile that is in none of the tables.
pub fn unknown_calls(seccomp: &LinuxSeccomp) -> Vec<String> {
    profile::unknown(seccomp)
        .into_iter()
        .map(|name| format!("unknown seccomp syscall {name:?} ignored"))
        .collect()
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
