//! What the serving shim gives up before it listens to anybody: new privileges, files that are
//! none of its business (`files`, Landlock), system calls that it never makes (`calls`, seccomp).
//!
//! What it needs power for, its hands do (see `hands`). A kernel that lacks a part is no reason
//! not to supervise: the shim goes on and says so.
//! Owns: the switch, `CORACLE_SHIM_CONFINE=0` in the environment of `start` or `Confine = false`
//! in the options' TOML, and the order of the steps.

pub mod calls;
pub mod files;
#[cfg(test)]
mod tests;

use std::path::Path;

/// Read by `serve`, and set for it by `start`.
pub const VARIABLE: &str = "CORACLE_SHIM_CONFINE";

/// Off only where somebody said so.
pub fn wanted() -> bool {
    !std::env::var(VARIABLE).is_ok_and(|value| is_no(&value))
}

fn is_no(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "0" | "false" | "no" | "off"
    )
}

/// How much of it the kernel has taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Confined {
    pub whole: bool,
    /// For the shim's log.
    pub text: String,
}

/// Confines the calling thread for good. `own` are places that must stay writable wherever they
/// lie: the bundle's, the socket's.
pub fn confine(own: &[&Path]) -> Confined {
    let mut whole = true;
    let mut part = |result: std::result::Result<String, String>| {
        result.unwrap_or_else(|e| {
            whole = false;
            e
        })
    };
    // Landlock first: its calls are not among those that the filter leaves.
    let privileges = part(
        rustix::thread::set_no_new_privs(true)
            .map(|()| "no new privileges".to_owned())
            .map_err(|e| format!("prctl(PR_SET_NO_NEW_PRIVS): {e}")),
    );
    let files = part(files::restrict(own));
    let calls = part(calls::restrict());
    Confined {
        whole,
        text: format!("confined: {privileges}; {files}; {calls}"),
    }
}
