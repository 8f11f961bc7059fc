//! The runtime after a fault: what `delete --force` still gives back.

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::need_root;
use coracle_integration::sweep::hierarchies;

#[test]
fn delete_forced_with_a_damaged_record_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    for damage in ["", "{", "{\"id\":7}"] {
        coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
        let pid = coracle.state("c")?["pid"].as_u64().unwrap_or_default();
        std::fs::write(coracle.root.join("c/state.json"), damage)?;
        let error = coracle.refused(&["delete", "c"])?;
        ensure!(error.contains("state.json"), "{error}");
        coracle.try_run(&["list"])?;
        coracle.run(&["delete", "--force", "c"])?;
        // A zombie, until its new parent reaps it, has no command line.
        let alive = std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| !c.is_empty());
        ensure!(!alive, "process {pid} lives on after damage {damage:?}");
        ensure!(!coracle.root.join("c").exists());
    }
    bench.finish()
}

/// `create`, killed as it is about to make its first cgroup directory: the intent is on disk.
fn interrupted_create(bench: &Bench, coracle: &Runtime, bundle: &str, id: &str) -> Result<()> {
    let log = std::fs::File::create(bench.dir.join("interrupted"))?;
    let status = std::process::Command::new("strace")
        .args([
            "-DDD",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=mkdirat",
            "-e",
        ])
        .arg("inject=mkdirat:signal=KILL:when=2")
        .args(coracle.words(&["create", "-b", bundle, id]))
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    ensure!(!status.success(), "create was not killed");
    ensure!(coracle.root.join(id).join("intent.json").exists());
    Ok(())
}

#[test]
fn delete_forced_spares_the_cgroup_of_another() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    let others: Vec<_> = hierarchies()
        .iter()
        .map(|top| top.join(&bench.mark).join("c"))
        .collect();
    for cgroup in &others {
        std::fs::create_dir_all(cgroup)?;
    }
    interrupted_create(&bench, &coracle, &bundle, "c")?;
    // Its owner starts a process in it only now: it is younger than the creation.
    let mut other = std::process::Command::new("sleep").arg("60").spawn()?;
    for cgroup in others
        .iter()
        .filter(|path| !path.starts_with("/sys/fs/cgroup/cpuset"))
    {
        std::fs::write(cgroup.join("cgroup.procs"), other.id().to_string())?;
    }
    let deleted = coracle.try_run(&["delete", "-f", "c"])?;
    let alive = other.try_wait()?.is_none();
    other.kill()?;
    other.wait()?;
    ensure!(deleted.status.success(), "{deleted:?}");
    ensure!(alive, "another's process was killed");
    for cgroup in &others {
        ensure!(cgroup.is_dir(), "{} was removed", cgroup.display());
        std::fs::remove_dir(cgroup).with_context(|| cgroup.display().to_string())?;
    }
    ensure!(!coracle.root.join("c").exists());
    bench.finish()
}

/// A record with one bit changed, and one that ends early.
fn damages(record: &[u8], at: usize) -> [Vec<u8>; 2] {
    let mut flipped = record.to_vec();
    flipped[at] ^= 1 << (at % 8);
    [flipped, record[..at].to_vec()]
}

#[test]
fn records_damaged_at_any_byte_are_told() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    let log = bench.dir.join("log");
    let start = || coracle.detached(&["run", "-d", "-b", &bundle, "c"], &log);
    start()?;
    let path = coracle.root.join("c/state.json");
    let mut record = std::fs::read(&path)?;
    // A new container's record may be a few digits longer or shorter.
    for at in 0..record.len() - 8 {
        for (kind, damaged) in damages(&record, at).into_iter().enumerate() {
            // That every cut is noticed, the unit tests say for each byte.
            if kind == 1 && at % 5 != 0 {
                continue;
            }
            std::fs::write(&path, &damaged)?;
            let told = coracle.refused(&["state", "c"])?;
            ensure!(told.contains("c/state.json"), "at {at}: {told}");
            if at % 31 == 0 {
                for command in [
                    &["list"][..],
                    &["ps", "c"],
                    &["delete", "c"],
                    &["kill", "c"],
                ] {
                    let output = coracle.try_run(command)?;
                    let error = String::from_utf8_lossy(&output.stderr).into_owned();
                    ensure!(!error.contains("panicked"), "{command:?} at {at}: {error}");
                    ensure!(output.status.code().is_some(), "{command:?} at {at} died");
                }
            }
        }
        if at % 97 != 0 {
            continue;
        }
        // Not by what the damaged record says.
        let cgroups: Vec<_> = hierarchies()
            .iter()
            .map(|top| top.join(&bench.mark).join("c"))
            .collect();
        ensure!(cgroups.iter().any(|cgroup| cgroup.exists()));
        coracle.run(&["delete", "--force", "c"])?;
        ensure!(!cgroups.iter().any(|cgroup| cgroup.exists()), "at {at}");
        ensure!(!coracle.root.join("c").exists());
        start()?;
        let fresh = std::fs::read(&path)?;
        ensure!(fresh.len().abs_diff(record.len()) < 8);
        record = fresh;
    }
    std::fs::write(&path, &record)?;
    // The intent is needed no more while the record is whole.
    std::fs::write(coracle.root.join("c/intent.json"), "{")?;
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn intents_damaged_at_any_byte_are_told() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    interrupted_create(&bench, &coracle, &bundle, "c")?;
    let directory = coracle.root.join("c");
    let intent = std::fs::read(directory.join("intent.json"))?;
    for at in (0..intent.len()).step_by(3) {
        for damaged in damages(&intent, at) {
            std::fs::create_dir_all(&directory)?;
            std::fs::write(directory.join("intent.json"), &damaged)?;
            let output = coracle.try_run(&["delete", "--force", "c"])?;
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "at {at}: {told}");
            ensure!(told.contains("c/intent.json"), "at {at}: {told}");
            ensure!(!directory.exists(), "at {at}");
        }
    }
    bench.finish()
}
