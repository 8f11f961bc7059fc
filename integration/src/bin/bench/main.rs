//! `make bench`: us and the peers in turn, in one run, on one machine.
//!
//! Every comparison is interleaved (A B C A B C ...), so that a slow minute of the machine hits
//! all alike; what is reported are medians and their ratio. `report.rs` writes
//! JSON, Markdown and SVG into the folder given by `--out`.

mod cri;
mod pods;
mod report;
mod runtime;
mod series;
mod shims;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use series::Comparison;

/// What was asked for on the command line.
struct Asked {
    out: PathBuf,
    /// Timed rounds of each comparison of runtimes.
    runs: usize,
    /// Timed rounds of each comparison of pod starts.
    pods: usize,
    /// Timed rounds of each comparison of shims.
    shims: usize,
    only: Option<String>,
}

fn main() -> Result<()> {
    // Parts run this program again inside namespaces of their own and read its answer.
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["inner", rounds] => return runtime::inner(rounds.parse()?),
        ["inner-shims", rounds] => return shims::inner(rounds.parse()?),
        ["inner-pods", rounds, storage] => return pods::inner(rounds.parse()?, storage),
        _ => {}
    }
    let asked = parse(args.into_iter())?;
    let mut comparisons: Vec<Comparison> = Vec::new();
    if asked.wants("runtime") {
        for view in runtime::views() {
            comparisons.extend(runtime::compare(&view, asked.runs)?);
        }
    }
    if asked.wants("shims") {
        comparisons.extend(shims::compare(asked.shims)?);
    }
    if asked.wants("pods") {
        comparisons.extend(pods::compare(asked.pods)?);
    }
    report::write(&asked.out, &comparisons)
}

impl Asked {
    fn wants(&self, part: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == part)
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Asked> {
    let mut asked = Asked {
        out: "target/bench".into(),
        runs: 60,
        pods: 15,
        shims: 30,
        only: None,
    };
    while let Some(flag) = args.next() {
        let value = args
            .next()
            .with_context(|| format!("{flag}: a value is missing"))?;
        match flag.as_str() {
            "--out" => asked.out = value.into(),
            "--runs" => asked.runs = value.parse().context("--runs")?,
            "--pods" => asked.pods = value.parse().context("--pods")?,
            "--shims" => asked.shims = value.parse().context("--shims")?,
            "--only" if ["runtime", "shims", "pods"].contains(&value.as_str()) => {
                asked.only = Some(value)
            }
            "--only" => bail!("--only {value}: there are 'runtime', 'shims' and 'pods'"),
            _ => bail!("{flag}: there are --out, --runs, --pods, --shims and --only"),
        }
    }
    Ok(asked)
}
