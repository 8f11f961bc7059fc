//! The clone itself: the one place of this crate that vouches for what clone3 demands.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use coracle_sys::clone::{Request, Side, clone3};

use crate::error::{Error, Result};

/// Clones this process. The child must end in exec or `exit_now`.
///
/// # Errors
/// Those of clone3(2).
pub fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let request = Request { flags, cgroup };
    // SAFETY: nothing in this crate starts a thread (see lib.rs), so the caller is the only one.
    unsafe { clone3(&request) }.map_err(|error| {
        let into = if cgroup.is_some() {
            "|CLONE_INTO_CGROUP"
        } else {
            ""
        };
        Error::system(format!("clone3({flags:#x}{into})"), "", error)
    })
}
