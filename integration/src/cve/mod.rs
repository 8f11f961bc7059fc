//! The CVE replay: what attacked container runtimes once, tried against any program with runc's
//! command line.
//!
//! ```text
//! stage       a bundle, the runtime, and a canary outside of the bundle
//! case        sets up something hostile, runs the runtime, judges by what became of the canary
//! replay      all cases, one row each: CVE, what was tried, SAFE, VULNERABLE or UNSUPPORTED
//! ```
//! A runtime is free to refuse or to run: what counts is that nothing outside the container was
//! touched, and that a container that does run is as closed as its config says. Facts about the
//! CVEs are from their advisories; every case is written here from scratch.

mod files;
mod identity;
mod kernel;
mod links;
mod procfs;
mod races;
mod secrets;
mod sockets;
mod stage;

use std::fmt;
use std::time::Instant;

use anyhow::Result;

pub use stage::{Options, Stage};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Safe(String),
    Vulnerable(String),
    /// This machine, or the runtime, has not what the case needs.
    Unsupported(String),
}

impl Verdict {
    fn rank(&self) -> u8 {
        match self {
            Verdict::Safe(_) => 0,
            Verdict::Unsupported(_) => 1,
            Verdict::Vulnerable(_) => 2,
        }
    }

    /// Of several attempts the worst counts, and tells how many there were.
    fn worst(verdicts: Vec<Verdict>) -> Verdict {
        let count = verdicts.len();
        match verdicts.into_iter().max_by_key(Verdict::rank) {
            Some(Verdict::Safe(what)) => Verdict::Safe(format!("{count} tries; the last: {what}")),
            Some(worst) => worst,
            None => Verdict::Unsupported("nothing was tried".to_owned()),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Safe(what) => write!(f, "SAFE | {what}"),
            Verdict::Vulnerable(what) => write!(f, "VULNERABLE | {what}"),
            Verdict::Unsupported(what) => write!(f, "UNSUPPORTED | {what}"),
        }
    }
}

/// One attack.
pub struct Case {
    pub cve: &'static str,
    pub tried: &'static str,
    pub run: fn(&Stage<'_>) -> Result<Verdict>,
}

/// All of them, in the order of the invariants of the design.
pub fn cases() -> Vec<Case> {
    [
        links::cases(),
        procfs::cases(),
        races::cases(),
        files::cases(),
        identity::cases(),
        kernel::cases(),
        sockets::cases(),
        secrets::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A row of the table.
pub struct Row {
    pub cve: &'static str,
    pub tried: &'static str,
    pub verdict: Verdict,
}

/// Runs all cases whose row holds `filter`. A case that cannot even be set up ends the replay: it
/// would say nothing.
pub fn replay(
    stage: &Stage<'_>,
    filter: &str,
    told: &mut dyn FnMut(&Row, f64),
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for case in cases() {
        if !format!("{} {}", case.cve, case.tried).contains(filter) {
            continue;
        }
        let started = Instant::now();
        let verdict = match stage.unusable() {
            Some(why) => Verdict::Unsupported(why),
            None => (case.run)(stage)?,
        };
        let row = Row {
            cve: case.cve,
            tried: case.tried,
            verdict,
        };
        told(&row, started.elapsed().as_secs_f64());
        rows.push(row);
    }
    Ok(rows)
}
