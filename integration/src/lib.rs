//! What the end-to-end tests and the programs beside them stand on. Real binaries only: nothing
//! of the product is linked here.
//!
//! ```text
//! binaries   where coracle, the shim, coracled, crictl and the fixtures are
//! isolation  a network and mount namespace for one test, left again at its end
//! process    programs that are stopped, by pid, when the value goes
//! registry   docker-registry over the fixtures' storage; registries that misbehave
//! daemon     coracled: start, kill -9, start again
//! shim       the shim driven over its socket, and the event service that it sends to
//! crictl     the client, and configs for pods and containers
//! world      all of it for one test, and the check that nothing was left behind
//! leak       what a machine holds: mounts, links, rules, cgroups, processes, files
//! bundle     OCI bundles for tests of the runtime's command line
//! generated  bundles from a grammar of config features, each from its seed
//! differ     what two runtimes make of the same bundle, and where they differ
//! stage      what an engine of somebody else runs on: namespaces, registry, leak check
//! containerd containerd of several releases, one of them running
//! terminal   a program on a pseudoterminal
//! vm         a guest with cgroup v2, systemd, AppArmor and CRIU
//! sweep      a fault at every system call of a runtime's command
//! cve        what attacked container runtimes once, against any of them
//! ```
#![forbid(unsafe_code)]

pub mod binaries;
pub mod bundle;
pub mod containerd;
pub mod crictl;
pub mod criu;
pub mod cve;
pub mod daemon;
pub mod differ;
pub mod generated;
pub mod isolation;
pub mod leak;
pub mod process;
pub mod registry;
pub mod shim;
pub mod stage;
pub mod sweep;
pub mod terminal;
pub mod vm;
pub mod world;

use std::io::Write as _;
use std::time::{Duration, Instant};

/// Ends the test as skipped: says why on a line of its own, past libtest's capture, so that
/// `.ci/totals` can count it.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        $crate::say_skipped(file!(), line!(), &format!($($why)*));
        return Ok(());
    }};
}

/// Skips the test unless it runs as root.
#[macro_export]
macro_rules! need_root {
    () => {
        if !rustix::process::geteuid().is_root() {
            $crate::skip!("needs root");
        }
    };
}

pub fn say_skipped(file: &str, line: u32, why: &str) {
    let mut out = std::io::stdout().lock();
    let _ = write!(out, "\nSKIP {file}:{line}: {why}\n");
    let _ = out.flush();
}

/// Asks until the answer is there; the error says what was waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > end {
            anyhow::bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(25));
    }
}
