//! The CVE replay over `coracle`: nothing is vulnerable, and nothing is left untried.
//! `make cve-replay RUNTIME=path` runs the same against any other runtime.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::crictl::container;
use coracle_integration::cve::{Options, Stage, Verdict, replay};
use coracle_integration::need_root;
use coracle_integration::world::{TOOLS, World};
use serde_json::{Value, json};

/// Of each race; `CORACLE_RACE_SECONDS` makes it longer.
const SECONDS: u64 = 10;

fn options() -> Options {
    let asked = std::env::var("CORACLE_RACE_SECONDS").ok();
    Options {
        seconds: asked.and_then(|text| text.parse().ok()).unwrap_or(SECONDS),
        seccomp: None,
    }
}

#[test]
fn coracle_is_safe_from_what_attacked_others() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let stage = Stage::new(&bench, bench.coracle()?, options())?;
    let rows = replay(&stage, "", &mut |row, seconds| {
        println!(
            "{seconds:5.1} s | {} | {} | {}",
            row.cve, row.tried, row.verdict
        );
    })?;
    for row in &rows {
        ensure!(
            matches!(row.verdict, Verdict::Safe(_)),
            "{} ({}): {}",
            row.cve,
            row.tried,
            row.verdict
        );
    }
    ensure!(rows.len() > 20, "only {} cases", rows.len());
    bench.finish()
}

/// The profile in the config.json that the daemon has written for a container.
fn profile_of(dir: &Path, id: &str) -> Result<Option<Value>> {
    for entry in std::fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Ok(Some(found)) = profile_of(&path, id) {
                return Ok(Some(found));
            }
        } else if path.ends_with("config.json") && path.display().to_string().contains(id) {
            let config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
            if config["linux"]["seccomp"].is_object() {
                return Ok(Some(config["linux"]["seccomp"].clone()));
            }
        }
    }
    Ok(None)
}

#[test]
fn families_are_refused_by_the_daemons_default_profile() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("families")?;
    let config = container("c", TOOLS, &["probe", "sleep", "60"]).set(
        "/linux/security_context/seccomp",
        json!({"profile_type": 0}),
    );
    let id = world.start_container(&pod, &config)?;
    let profile = profile_of(&world.dir, &id)?.context("no config.json with a profile")?;
    world.finish()?;

    let bench = Bench::new()?;
    let mut options = options();
    options.seccomp = Some(profile);
    let stage = Stage::new(&bench, bench.coracle()?, options)?;
    let rows = replay(&stage, "AF_ALG", &mut |row, _| println!("{}", row.verdict))?;
    ensure!(rows.len() == 1);
    let Verdict::Safe(how) = &rows[0].verdict else {
        anyhow::bail!("{}", rows[0].verdict);
    };
    for abi in ["Native", "I386", "I386Call"] {
        ensure!(how.contains(abi), "{abi} was not tried: {how}");
    }
    bench.finish()
}
