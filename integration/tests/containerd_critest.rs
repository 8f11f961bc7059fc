//! The CRI conformance suite through containerd's own CRI plugin: with our shim and coracle it
//! passes what the same containerd passes with its own shim and runc, in the same run.
//! `CORACLE_CRITEST` may hold a ginkgo focus expression, or 0 to leave it out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::containerd::{Containerd, Handler, Release, Setup};
use coracle_integration::process::Process;
use coracle_integration::{binaries, need_root, skip, wait_for};
use serde_json::Value;

/// A run takes a minute and a half on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(900);

/// Not about a runtime, or not to be had offline, and slow to fail.
const SKIPPED: &[&str] = &["image with digest", "Image Manager"];

fn handler(runtime_type: &str) -> Handler {
    Handler {
        name: "tested",
        runtime_type: runtime_type.to_owned(),
        runtime_path: None,
        sandboxer: None,
        options: Vec::new(),
    }
}

/// The state of each spec that was not left out, by its name.
fn specs(containerd: &Containerd, name: &str, focus: &str) -> Result<BTreeMap<String, String>> {
    let critest = binaries::cache()?.join("bin/critest");
    ensure!(
        critest.exists(),
        "{} is missing: run make deps",
        critest.display()
    );
    let endpoint = format!("unix://{}", containerd.socket().display());
    let report = containerd.dir().join(format!("critest-{name}.json"));
    let log = binaries::cache()?.join(format!("critest-containerd-{name}.log"));
    File::create(&log)?;
    let mut command = Command::new(critest);
    command
        .args(["-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
        .args(["-ginkgo.no-color", "-ginkgo.skip", &SKIPPED.join("|")])
        .arg(format!("-ginkgo.json-report={}", report.display()));
    if !focus.is_empty() {
        command.args(["-ginkgo.focus", focus]);
    }
    let mut process = Process::start(&mut command, &log)?;
    // Its exit code says that a spec failed, which may be so with runc too.
    wait_for("critest", PATIENCE, || process.ended())?;
    let text = std::fs::read_to_string(&report).with_context(|| process.log_tail())?;
    let suites: Value = serde_json::from_str(&text)?;
    let all = suites[0]["SpecReports"].as_array().context("no specs")?;
    let states = all.iter().filter_map(|spec| {
        let mut words: Vec<&str> = Vec::new();
        let texts = spec["ContainerHierarchyTexts"].as_array();
        words.extend(texts.into_iter().flatten().filter_map(Value::as_str));
        words.push(spec["LeafNodeText"].as_str().filter(|t| !t.is_empty())?);
        let state = spec["State"].as_str()?;
        (state != "skipped" && spec["LeafNodeType"] == "It")
            .then(|| (words.join(" "), state.to_owned()))
    });
    Ok(states.collect())
}

fn passed(specs: &BTreeMap<String, String>) -> BTreeSet<&str> {
    let passed = specs.iter().filter(|(_, state)| *state == "passed");
    passed.map(|(name, _)| name.as_str()).collect()
}

#[test]
fn critest_passes_through_containerd_what_runc_passes() -> Result<()> {
    need_root!();
    let focus = std::env::var("CORACLE_CRITEST").unwrap_or_default();
    if focus == "0" {
        skip!("CORACLE_CRITEST=0");
    }
    if binaries::installed("runc").is_none() {
        skip!("runc is not installed");
    }
    let release = match Release::find("2.4") {
        Ok(release) => release,
        Err(why) => skip!("no containerd 2.4: {why:#}"),
    };
    let mut with_runc = Setup::plain();
    with_runc.shim = None;
    with_runc.handlers = vec![handler("io.containerd.runc.v2")];
    let mut with_ours = Setup::plain();
    with_ours.handlers = vec![handler("io.containerd.coracle.v2")];
    let mut containerd = Containerd::set(release, with_runc)?;
    let theirs = specs(&containerd, "runc", &focus)?;
    containerd.sweep();
    containerd.become_with(&with_ours)?;
    let ours = specs(&containerd, "coracle", &focus)?;
    let (theirs, ours_passed) = (passed(&theirs), passed(&ours));
    println!(
        "critest through containerd {}: {} specs pass with runc, {} with coracle",
        containerd.release.version,
        theirs.len(),
        ours_passed.len()
    );
    for name in ours_passed.difference(&theirs) {
        println!("with coracle alone: {name}");
    }
    ensure!(theirs.len() > 50 || !focus.is_empty(), "{theirs:#?}");
    let missing: Vec<String> = theirs
        .difference(&ours_passed)
        .map(|name| {
            format!(
                "{name}: {}",
                ours.get(*name).map_or("not run", String::as_str)
            )
        })
        .collect();
    ensure!(
        missing.is_empty(),
        "pass with runc, not with coracle (see critest-containerd-coracle.log in the cache):\n  {}",
        missing.join("\n  ")
    );
    containerd.sweep();
    containerd.finish()
}
