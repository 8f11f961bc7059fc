//! The process of a sandbox: holds the pod's namespaces, and in a shared pid namespace buries
//! the orphans. Nothing else of this program runs in it.

use nix::sys::signal::{SigSet, Signal};
use rustix::process::WaitOptions;

use crate::error::{Error, Result};

/// Until SIGTERM or SIGINT. A blocked signal reaches even the first process of a pid namespace,
/// which a default action never does.
pub fn pause() -> Result<()> {
    let failed = |e: nix::Error| Error::io("wait for a signal", "", std::io::Error::from(e));
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        set.add(signal);
    }
    set.thread_block().map_err(failed)?;
    loop {
        match set.wait() {
            Ok(Signal::SIGCHLD) => {
                while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            }
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(failed(e)),
        }
    }
}
