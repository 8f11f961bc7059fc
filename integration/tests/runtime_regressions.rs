//! Faults of the runtime that were found once: each keeps its test.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::{need_root, skip};
use serde_json::json;

/// The v1 hierarchy that a test makes a cgroup of its own in.
fn pids_hierarchy() -> Option<PathBuf> {
    let path = Path::new("/sys/fs/cgroup/pids");
    path.is_dir().then(|| path.to_owned())
}

#[test]
fn refused_cgroup_stays_as_it_was() -> Result<()> {
    need_root!();
    let Some(hierarchy) = pids_hierarchy() else {
        skip!("no v1 pids hierarchy");
    };
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["show"]))?;
    let cgroup = hierarchy.join(&bench.mark).join("c");
    std::fs::create_dir_all(&cgroup)?;
    let mut other = std::process::Command::new("sleep").arg("60").spawn()?;
    std::fs::write(cgroup.join("cgroup.procs"), other.id().to_string())?;

    let error = coracle.refused(&["run", "-b", &bundle.display().to_string(), "c"])?;
    let alive = other.try_wait()?.is_none();
    let members = std::fs::read_to_string(cgroup.join("cgroup.procs"));
    other.kill()?;
    other.wait()?;
    ensure!(error.contains("cgroup is not empty"), "{error}");
    ensure!(!error.contains("undo"), "{error}");
    ensure!(alive, "the other process was killed");
    ensure!(members?.trim() == other.id().to_string());
    ensure!(!coracle.root.join("c").exists(), "the state was left");

    // Nobody is in it now: it may be used, and a start that fails leaves it to its owner.
    let missing = bench
        .config("c", &[])
        .set("/process/args", json!(["/nope"]));
    let bundle = bench.bundle("missing", &missing)?;
    let error = coracle.refused(&["run", "-b", &bundle.display().to_string(), "c"])?;
    ensure!(error.contains("/nope"), "{error}");
    ensure!(cgroup.is_dir(), "the cgroup of another was removed");
    std::fs::remove_dir(&cgroup).context("remove the test's cgroup")?;
    bench.finish()
}
