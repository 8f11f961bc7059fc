//! Checkpoint and restore where CRIU does not get to do anything: it is missing, too old, fails
//! at once, or was asked for nonsense. The rest is in vm_checkpoint.rs.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::need_root;

/// A criu that gives one answer each time it is called, in one write as it is one message, and
/// then waits until the runtime hangs up. Out of answers it ends.
fn fake(bench: &Bench, answers: &[&str]) -> Result<PathBuf> {
    let dir = bench.dir.join("fake");
    std::fs::create_dir_all(&dir)?;
    let mut script = String::from("#!/bin/bash\nn=$(cat \"$0.n\" 2>/dev/null || echo 0)\n");
    script.push_str("echo $((n+1)) >\"$0.n\"\nread -r -N1 -u \"$2\"\ncase $n in\n");
    for (number, bytes) in answers.iter().enumerate() {
        script.push_str(&format!("{number}) printf '{bytes}' >\"$0.m\"\n"));
        script.push_str("cat \"$0.m\" >&\"$2\"\nread -r -N1 -u \"$2\";;\n");
    }
    script.push_str("esac\nexit 0\n");
    let program = dir.join("criu");
    std::fs::write(&program, script)?;
    let _ = std::fs::remove_file(dir.join("criu.n"));
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// type VERSION, success, version {major, minor}
const OLD: &str = r"\x08\x0a\x10\x01\x52\x04\x08\x02\x10\x0c";
const NEW: &str = r"\x08\x0a\x10\x01\x52\x04\x08\x04\x10\x01";
/// type DUMP, no success, errno 7
const FAILED_DUMP: &str = r"\x08\x01\x10\x00\x38\x07";
/// type RESTORE, no success, errno 2
const FAILED_RESTORE: &str = r"\x08\x02\x10\x00\x38\x02";

fn refused(runtime: &Runtime, path: &str, words: &[&str]) -> Result<String> {
    let output = runtime.command(words).env("PATH", path).output()?;
    ensure!(!output.status.success(), "{words:?} succeeded");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn criu_that_is_missing_or_too_old_is_named_and_the_container_runs_on() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let images = bench.dir.join("images").display().to_string();
    std::fs::create_dir(&images)?;
    let old = format!("{}:/usr/bin:/bin", fake(&bench, &[OLD, OLD])?.display());
    for (path, want) in [
        (
            "/nonexistent",
            "CRIU version check failed: exec: \\\"criu\\\": executable file not found in $PATH",
        ),
        (old.as_str(), "CRIU version 21200 must be 30000 or higher"),
    ] {
        let complaint = refused(
            &coracle,
            path,
            &["checkpoint", "--image-path", &images, "c"],
        )?;
        ensure!(complaint.contains(want), "{complaint}");
        ensure!(coracle.state("c")?["status"] == "running");
        let words = ["restore", "-d", "--image-path", &images, "-b", &bundle, "d"];
        let complaint = refused(&coracle, path, &words)?;
        ensure!(complaint.contains(want), "{complaint}");
        ensure!(!coracle.root.join("d").exists(), "left behind");
    }
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn criu_that_fails_leaves_a_checkpointed_container_running_and_nothing_of_a_restored_one()
-> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let images = bench.dir.join("images").display().to_string();
    let path = |answers| -> Result<String> {
        Ok(format!(
            "{}:/usr/bin:/bin",
            fake(&bench, answers)?.display()
        ))
    };

    std::fs::create_dir(&images)?;
    let log = format!("{images}/dump.log");
    std::fs::write(&log, "fine\nError (criu/x.c:1): no luck\n")?;
    let words = ["checkpoint", "--image-path", &images, "c"];
    let complaint = refused(&coracle, &path(&[NEW, FAILED_DUMP])?, &words)?;
    for want in [
        "criu failed: type DUMP errno 7",
        &log,
        "2:Error (criu/x.c:1): no luck",
    ] {
        ensure!(complaint.contains(want), "{want:?} in {complaint}");
    }
    ensure!(coracle.state("c")?["status"] == "running");
    // What stdio was, for a restore, is there already.
    ensure!(
        std::path::Path::new(&images)
            .join("descriptors.json")
            .is_file()
    );

    let config = bench.config("d", &["sleep", "600"]);
    let other = bench.bundle("d", &config)?.display().to_string();
    let words = ["restore", "-d", "--image-path", &images, "-b", &other, "d"];
    let complaint = refused(&coracle, &path(&[NEW, FAILED_RESTORE])?, &words)?;
    ensure!(
        complaint.contains("criu failed: type RESTORE errno 2"),
        "{complaint}"
    );
    ensure!(!coracle.root.join("d").exists(), "left behind");
    let complaint = refused(&coracle, &path(&[NEW])?, &words)?;
    ensure!(
        complaint.contains("criu ended without an answer"),
        "{complaint}"
    );
    ensure!(!coracle.root.join("d").exists(), "left behind");

    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn requests_that_cannot_be_meant_are_refused_before_criu_is_asked() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    let images = bench.dir.join("images").display().to_string();
    let log = bench.dir.join("log");
    coracle.detached(&["create", "-b", &bundle, "c"], &log)?;
    let checkpoint = |flags: &[&str]| {
        let words = [&["checkpoint", "--image-path", &images], flags, &["c"]].concat();
        refused(&coracle, "/nonexistent", &words)
    };
    let complaint = checkpoint(&[])?;
    ensure!(
        complaint.contains("container cannot be checkpointed in created state"),
        "{complaint}"
    );
    coracle.run(&["start", "c"])?;
    for (flags, want) in [
        (
            &["--parent-path", "/p"][..],
            "--parent-path must be relative",
        ),
        (&["--parent-path", "../p"], "invalid --parent-path"),
        (&["--page-server", "here"], "ADDRESS:PORT"),
        (&["--page-server", "here:x"], "invalid port number"),
        (
            &["--manage-cgroups-mode", "hard"],
            "invalid manage-cgroups-mode value",
        ),
        (
            &["--empty-ns", "ipc"],
            "namespace \\\"ipc\\\" is not supported",
        ),
        (
            &["--lazy-pages", "--status-fd", "77"],
            "invalid --status-fd argument 77",
        ),
    ] {
        let complaint = checkpoint(flags)?;
        ensure!(complaint.contains(want), "{flags:?}: {complaint}");
    }
    ensure!(coracle.state("c")?["status"] == "running");
    let complaint = coracle.refused(&["checkpoint", "nobody"])?;
    ensure!(
        complaint.contains("container does not exist"),
        "{complaint}"
    );
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}
