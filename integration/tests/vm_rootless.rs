//! A user without privileges: user namespaces by newuidmap, and a cgroup only where one was
//! delegated.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::crictl::Config;
use coracle_integration::vm::image::{ROOTLESS_UID, ROOTLESS_USER};
use coracle_integration::{binaries, need_guest};
use serde_json::{Value, json};

/// A bundle that belongs to the user, and the user's own root for the runtime.
struct User {
    bench: Bench,
    root: PathBuf,
    /// Where its processes start.
    cgroup: Option<PathBuf>,
}

impl User {
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        let root = bench.dir.join("root-rootless");
        std::fs::create_dir(&root)?;
        let user = Self {
            bench,
            root,
            cgroup: None,
        };
        user.own()?;
        Ok(user)
    }

    fn own(&self) -> Result<()> {
        run(Command::new("chown")
            .args(["-R", ROOTLESS_USER])
            .arg(&self.bench.dir))
    }

    /// `spec --rootless` with this command, as the user would write it.
    fn bundle(&self, args: &[&str], change: impl FnOnce(Config) -> Config) -> Result<String> {
        let bundle = self.bench.bundle("b", &Config(json!({})))?;
        std::fs::remove_file(bundle.join("config.json"))?;
        self.own()?;
        let words = ["spec", "--rootless", "-b", &bundle.display().to_string()];
        let spec = self.coracle(&words)?;
        ensure!(spec.status.success(), "{spec:?}");
        let text = std::fs::read(bundle.join("config.json"))?;
        let config = Config(serde_json::from_slice(&text)?)
            .set("/process/args", [&["/bin/probe"], args].concat())
            .set("/process/terminal", false);
        change(config).write(&bundle.join("config.json"))?;
        Ok(bundle.display().to_string())
    }

    fn coracle(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new("sh");
        // The shell moves itself, then becomes the user, then the runtime.
        let join = self.cgroup.as_ref().map_or(String::new(), |c| {
            format!("echo 0 > {}/cgroup.procs && ", c.display())
        });
        command
            .arg("-c")
            .arg(format!(
                "{join}exec setpriv --reuid {ROOTLESS_UID} --regid {ROOTLESS_UID} --init-groups \"$@\""
            ))
            .arg("sh")
            .arg(binaries::coracle()?)
            .arg("--root")
            .arg(&self.root)
            .args(args)
            .env("HOME", format!("/home/{ROOTLESS_USER}"))
            .env("USER", ROOTLESS_USER)
            .current_dir("/")
            .stdin(std::process::Stdio::null());
        // Files: a pipe would stay open for as long as a detached container lives.
        let (out, err) = (self.bench.dir.join("stdout"), self.bench.dir.join("stderr"));
        command
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?);
        Ok(Output {
            status: command.status().context("run coracle as the user")?,
            stdout: std::fs::read(&out)?,
            stderr: std::fs::read(&err)?,
        })
    }

    fn show(&self, bundle: &str) -> Result<Value> {
        let output = self.coracle(&["run", "-b", bundle, "c"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{}: {said}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}

/// All of the user's subordinate ids behind its own, as engines map them.
fn with_subordinate_ids(config: Config) -> Config {
    let maps = json!([
        {"containerID": 0, "hostID": ROOTLESS_UID, "size": 1},
        {"containerID": 1, "hostID": 100_000, "size": 65_536},
    ]);
    config
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps)
}

#[test]
fn run_maps_the_user_to_root() -> Result<()> {
    need_guest!();
    let user = User::new()?;
    let bundle = user.bundle(&["show"], |c| c)?;
    let seen = user.show(&bundle)?;
    ensure!(seen["uids"] == json!([0, 0, 0, 0]), "{}", seen["uids"]);
    ensure!(seen["uidMap"] == json!(["0 1000 1"]), "{}", seen["uidMap"]);
    ensure!(seen["gidMap"] == json!(["0 1000 1"]), "{}", seen["gidMap"]);
    user.bench.finish()
}

#[test]
fn run_maps_subordinate_ids_by_newuidmap() -> Result<()> {
    need_guest!();
    let user = User::new()?;
    let bundle = user.bundle(&["show"], |config| {
        with_subordinate_ids(config).set(
            "/process/user",
            json!({"uid": 7, "gid": 9, "additionalGids": [11]}),
        )
    })?;
    let seen = user.show(&bundle)?;
    let maps = json!(["0 1000 1", "1 100000 65536"]);
    ensure!(seen["uidMap"] == maps, "{}", seen["uidMap"]);
    ensure!(seen["gidMap"] == maps, "{}", seen["gidMap"]);
    ensure!(seen["uids"] == json!([7, 7, 7, 7]), "{}", seen["uids"]);
    ensure!(seen["gids"] == json!([9, 9, 9, 9]), "{}", seen["gids"]);
    ensure!(seen["groups"] == json!([11]), "{}", seen["groups"]);
    user.bench.finish()
}

#[test]
fn run_ids_that_are_not_the_users_are_refused() -> Result<()> {
    need_guest!();
    let user = User::new()?;
    let bundle = user.bundle(&["true"], |config| {
        let stolen = json!([
            {"containerID": 0, "hostID": ROOTLESS_UID, "size": 1},
            {"containerID": 1, "hostID": 1, "size": 10},
        ]);
        config.set("/linux/uidMappings", stolen)
    })?;
    let output = user.coracle(&["run", "-b", &bundle, "c"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "ids of others were mapped");
    ensure!(said.contains("newuidmap"), "{said}");
    let list = user.coracle(&["list", "-q"])?;
    ensure!(list.stdout.is_empty(), "{list:?}");
    user.bench.finish()
}

#[test]
fn lifecycle_and_exec_work_for_the_user() -> Result<()> {
    need_guest!();
    let user = User::new()?;
    let bundle = user.bundle(&["sleep", "600"], with_subordinate_ids)?;
    let ok = |args: &[&str]| -> Result<String> {
        let output = user.coracle(args)?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    ok(&["run", "-d", "-b", &bundle, "c"])?;
    let state: Value = serde_json::from_str(&ok(&["state", "c"])?)?;
    ensure!(state["status"] == "running", "{state}");
    let seen: Value =
        serde_json::from_str(&ok(&["exec", "-u", "5:6", "c", "/bin/probe", "show"])?)?;
    ensure!(seen["uids"][0] == 5 && seen["gids"][0] == 6, "{seen}");
    let status = user.coracle(&["exec", "c", "/bin/probe", "exit", "42"])?;
    ensure!(status.status.code() == Some(42), "{status:?}");
    ok(&["kill", "c", "KILL"])?;
    ok(&["delete", "-f", "c"])?;
    ensure!(ok(&["list", "-q"])?.is_empty());
    user.bench.finish()
}

/// Limits need a cgroup; without one that is the user's they must not be passed over in silence.
#[test]
fn limits_without_a_delegated_cgroup_are_refused() -> Result<()> {
    need_guest!();
    let user = User::new()?;
    let mark = user.bench.mark.clone();
    let bundle = user.bundle(&["true"], |config| {
        config
            .set("/linux/resources/pids/limit", 10)
            .set("/linux/cgroupsPath", format!("/{mark}/c"))
    })?;
    let output = user.coracle(&["run", "-b", &bundle, "c"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it ran without its limit");
    ensure!(said.contains("cgroup"), "{said}");
    user.bench.finish()
}

#[test]
fn limits_hold_in_a_delegated_cgroup() -> Result<()> {
    need_guest!();
    let mut user = User::new()?;
    let mark = user.bench.mark.clone();
    let parent = Path::new("/sys/fs/cgroup").join(&mark);
    // What an administrator does, and systemd for Delegate=yes: the directory and its three files.
    std::fs::create_dir_all(parent.join("session"))?;
    std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids")?;
    std::fs::write(parent.join("cgroup.subtree_control"), "+memory +pids")?;
    for path in [parent.clone(), parent.join("session")] {
        for file in [
            "",
            "cgroup.procs",
            "cgroup.threads",
            "cgroup.subtree_control",
        ] {
            run(Command::new("chown")
                .arg(ROOTLESS_USER)
                .arg(path.join(file)))?;
        }
    }
    // The user's processes are inside: the kernel lets them move only below what is theirs.
    user.cgroup = Some(parent.join("session"));
    let bundle = user.bundle(&["sleep", "600"], |config| {
        config
            .set("/linux/resources/pids/limit", 10)
            .set("/linux/resources/memory/limit", 33_554_432)
            .set("/linux/cgroupsPath", format!("/{mark}/c"))
    })?;
    let output = user.coracle(&["run", "-d", "-b", &bundle, "c"])?;
    ensure!(output.status.success(), "{output:?}");
    let read = |file: &str| std::fs::read_to_string(parent.join("c").join(file));
    ensure!(read("pids.max")?.trim() == "10");
    ensure!(read("memory.max")?.trim() == "33554432");
    ensure!(read("cgroup.procs")?.lines().count() == 1);
    let update = user.coracle(&["update", "--pids-limit", "20", "c"])?;
    ensure!(update.status.success(), "{update:?}");
    ensure!(read("pids.max")?.trim() == "20");
    for verb in ["pause", "resume"] {
        let done = user.coracle(&[verb, "c"])?;
        ensure!(done.status.success(), "{verb}: {done:?}");
    }
    let end = user.coracle(&["delete", "-f", "c"])?;
    ensure!(end.status.success(), "{end:?}");
    ensure!(!parent.join("c").exists(), "the cgroup was left");
    user.bench.finish()
}
