//! AppArmor: a container runs under the profile of its config, or it does not start.

use std::process::Command;

use anyhow::{Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::need_guest;
use serde_json::Value;

/// Loaded under a name of its own for each test, unloaded at its end.
struct Profile {
    name: String,
    file: std::path::PathBuf,
}

impl Profile {
    /// Everything is allowed but to touch one file.
    fn load(bench: &Bench, name: &str, denied: &str) -> Result<Self> {
        let name = format!("{}-{name}", bench.mark);
        let file = bench.dir.join(&name);
        let text = format!(
            "profile {name} flags=(attach_disconnected,mediate_deleted) {{\n\
             file,\n capability,\n network,\n signal,\n ptrace,\n unix,\n mount,\n umount,\n\
             deny {denied} rwklx,\n}}\n"
        );
        std::fs::write(&file, text)?;
        let profile = Self { name, file };
        profile.parser("--replace")?;
        Ok(profile)
    }

    fn parser(&self, verb: &str) -> Result<()> {
        let output = Command::new("apparmor_parser")
            .args([verb, "--skip-cache"])
            .arg(&self.file)
            .output()?;
        ensure!(output.status.success(), "apparmor_parser: {output:?}");
        Ok(())
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if let Err(error) = self.parser("--remove") {
            eprintln!("{error:#}");
        }
    }
}

fn label(show: &str) -> Result<Value> {
    Ok(serde_json::from_str::<Value>(show)?["apparmor"].clone())
}

#[test]
fn run_confines_the_process_to_the_profile() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let profile = Profile::load(&bench, "run", "/app/secret")?;
    let run = |args: &[&str]| {
        let config = bench
            .config("c", args)
            .set("/process/apparmorProfile", profile.name.as_str());
        let bundle = bench.bundle("b", &config)?.display().to_string();
        coracle.try_run(&["run", "-b", &bundle, "c"])
    };
    let seen = label(&String::from_utf8(run(&["show"])?.stdout)?)?;
    ensure!(seen == format!("{} (enforce)", profile.name), "{seen}");

    let allowed = run(&["write", "/app/open", "x"])?;
    ensure!(allowed.status.success(), "{allowed:?}");
    let denied = run(&["write", "/app/secret", "x"])?;
    let said = String::from_utf8_lossy(&denied.stderr).into_owned();
    ensure!(
        !denied.status.success() && said.contains("os error 13"),
        "{said}"
    );
    drop(profile);
    bench.finish()
}

#[test]
fn run_without_a_profile_is_unconfined() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["show"]))?;
    let seen = label(&coracle.run(&["run", "-b", &bundle.display().to_string(), "c"])?)?;
    ensure!(seen == "unconfined", "{seen}");
    bench.finish()
}

/// The containers of engines keep their profile when an exec gains privileges or sheds them.
#[test]
fn run_confines_with_and_without_no_new_privileges() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let profile = Profile::load(&bench, "nnp", "/app/secret")?;
    for (no_new_privileges, uid) in [(true, 0), (false, 0), (true, 1234), (false, 1234)] {
        let config = bench
            .config("c", &["show"])
            .set("/process/apparmorProfile", profile.name.as_str())
            .set("/process/noNewPrivileges", no_new_privileges)
            .set("/process/user/uid", uid);
        let bundle = bench.bundle("b", &config)?.display().to_string();
        let seen = label(&coracle.run(&["run", "-b", &bundle, "c"])?)?;
        ensure!(
            seen == format!("{} (enforce)", profile.name),
            "nnp {no_new_privileges}, uid {uid}: {seen}"
        );
    }
    drop(profile);
    bench.finish()
}

#[test]
fn exec_has_the_containers_profile_or_the_one_it_asks_for() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let own = Profile::load(&bench, "own", "/app/secret")?;
    let other = Profile::load(&bench, "other", "/app/open")?;
    let config = bench
        .config("c", &["sleep", "600"])
        .set("/process/apparmorProfile", own.name.as_str());
    let bundle = bench.bundle("b", &config)?.display().to_string();
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;

    let inherited = label(&coracle.run(&["exec", "c", "/bin/probe", "show"])?)?;
    ensure!(
        inherited == format!("{} (enforce)", own.name),
        "{inherited}"
    );
    let args = ["exec", "--apparmor", &other.name, "c", "/bin/probe", "show"];
    let asked = label(&coracle.run(&args)?)?;
    ensure!(asked == format!("{} (enforce)", other.name), "{asked}");
    let args = [
        "exec",
        "--apparmor",
        "no-such-profile",
        "c",
        "/bin/probe",
        "true",
    ];
    let error = coracle.refused(&args)?;
    ensure!(error.contains("apparmor"), "{error}");

    coracle.run(&["delete", "-f", "c"])?;
    drop((own, other));
    bench.finish()
}

#[test]
fn run_unknown_profile_is_refused_and_leaves_nothing() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench
        .config("c", &["true"])
        .set("/process/apparmorProfile", "no-such-profile");
    let bundle = bench.bundle("b", &config)?.display().to_string();
    let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
    ensure!(error.contains("apparmor"), "{error}");
    ensure!(error.contains("no such file or directory"), "{error}");
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}

#[test]
fn features_say_that_apparmor_is_there() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let features: Value = serde_json::from_str(&bench.coracle()?.run(&["features"])?)?;
    ensure!(
        features["linux"]["apparmor"]["enabled"] == true,
        "{features}"
    );
    bench.finish()
}
