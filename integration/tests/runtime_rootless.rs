//! The runtime as an unprivileged user runs it: with its own id alone, with ranges by newuidmap(1),
//! and as the root of a user namespace, as rootless engines have it.

use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root, skip, wait_for};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

/// In no passwd of any system.
const USER: u32 = 54_321;

/// A user, a bundle that is the user's, and the state beside it.
struct Rootless {
    bench: Bench,
    bundle: PathBuf,
}

fn chown_all(path: &Path) -> Result<()> {
    chown(path, Some(USER), Some(USER))?;
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            chown_all(&entry?.path())?;
        }
    }
    Ok(())
}

impl Rootless {
    /// With the config that `spec --rootless` writes for that user.
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        let bundle = bench.bundle("b", &Config(json!({})))?;
        let busybox = binaries::installed("busybox").context("busybox is not installed")?;
        std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
        for name in ["id", "sh", "cat", "ls", "sleep"] {
            symlink("busybox", bundle.join("rootfs/bin").join(name))?;
        }
        std::fs::create_dir(bundle.join("state"))?;
        std::fs::remove_file(bundle.join("config.json"))?;
        for path in ["rootfs", "state"] {
            chown_all(&bundle.join(path))?;
        }
        chown(&bundle, Some(USER), Some(USER))?;
        let this = Self { bench, bundle };
        let output = this.run(&[], &["spec", "--rootless"])?;
        ensure!(output.status.success(), "{}", text(&output));
        Ok(this)
    }

    /// The user's command, below another program where `outer` names one.
    fn run(&self, outer: &[&str], args: &[&str]) -> Result<Output> {
        let id = USER.to_string();
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"])
            .args(outer)
            .arg(binaries::coracle()?)
            .arg("--root")
            .arg(self.bundle.join("state"))
            .args(args)
            .current_dir(&self.bundle)
            .env("XDG_RUNTIME_DIR", self.bundle.join("state"));
        Ok(command.output()?)
    }

    fn config(&self) -> Result<Config> {
        let bytes = std::fs::read(self.bundle.join("config.json"))?;
        Ok(Config(serde_json::from_slice(&bytes)?).set("/process/terminal", false))
    }

    /// Runs a script as the container's program.
    fn script(&self, config: Config, script: &str) -> Result<Output> {
        self.script_below(&[], config, script)
    }

    fn script_below(&self, outer: &[&str], config: Config, script: &str) -> Result<Output> {
        config
            .set("/process/args", json!(["/bin/sh", "-c", script]))
            .write(&self.bundle.join("config.json"))?;
        self.run(outer, &["run", "r"])
    }
}

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
}

/// Words of each line: the kernel pads its tables.
fn words(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

fn map(container: u32, host: u32, size: u32) -> Value {
    json!({"containerID": container, "hostID": host, "size": size})
}

const SHOW: &str = "id -u; cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups";

#[test]
fn own_id_alone() -> Result<()> {
    need_root!();
    let rootless = Rootless::new()?;
    let config = rootless.config()?;
    // /sys is the host's: its network namespace is.
    let show = format!("{SHOW}; ls -d /sys/class");
    let output = rootless.script(config.clone(), &show)?;
    let line = format!("0 {USER} 1");
    let want = ["0", &line, &line, "deny", "/sys/class"];
    ensure!(words(&output) == want, "{}", text(&output));

    let groups = config
        .clone()
        .set("/process/user/additionalGids", json!([1]));
    let output = rootless.script(groups, SHOW)?;
    let refusal = "cannot set any additional groups in a rootless container";
    ensure!(!output.status.success(), "{}", text(&output));
    ensure!(text(&output).contains(refusal), "{}", text(&output));

    let other = config.clone().set("/process/user/uid", 1);
    let output = rootless.script(other, SHOW)?;
    ensure!(!output.status.success(), "{}", text(&output));
    ensure!(text(&output).contains("unmapped"), "{}", text(&output));

    let mapped = config.push(
        "/mounts",
        json!({"destination": "/tmp", "type": "bind", "source": "/tmp",
            "options": ["bind", "idmap"]}),
    );
    let output = rootless.script(mapped, SHOW)?;
    let refusal = "not supported for rootless containers";
    ensure!(text(&output).contains(refusal), "{}", text(&output));
    rootless.bench.finish()
}

#[test]
fn life_of_a_container() -> Result<()> {
    need_root!();
    let rootless = Rootless::new()?;
    rootless
        .config()?
        .set("/process/args", json!(["/bin/sleep", "600"]))
        .write(&rootless.bundle.join("config.json"))?;
    let ok = |args: &[&str]| -> Result<String> {
        let output = rootless.run(&[], args)?;
        ensure!(output.status.success(), "{args:?}: {}", text(&output));
        Ok(text(&output))
    };
    let log = rootless.bundle.join("state/log").display().to_string();
    // Detached, it keeps no pipe of ours.
    let outer = [
        "/bin/sh",
        "-c",
        "exec \"$0\" \"$@\" >/dev/null 2>&1 </dev/null",
    ];
    let output = rootless.run(&outer, &["--log", &log, "create", "r"])?;
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    ensure!(output.status.success(), "create: {said}");
    ensure!(ok(&["state", "r"])?.contains("\"created\""));
    ok(&["start", "r"])?;
    let seen = ok(&["exec", "r", "/bin/cat", "/proc/self/uid_map"])?;
    let seen: Vec<&str> = seen.split_whitespace().collect();
    ensure!(seen == ["0", "54321", "1"], "{seen:?}");
    let listed = ok(&["list"])?;
    ensure!(listed.contains("running"), "{listed}");
    ok(&["delete", "-f", "r"])?;
    rootless.bench.finish()
}

/// An /etc of the test's own, in its mount namespace.
struct Etc;

impl Etc {
    fn new(bench: &Bench) -> Result<Self> {
        let (upper, work) = (bench.dir.join("upper"), bench.dir.join("work"));
        std::fs::create_dir(&upper)?;
        std::fs::create_dir(&work)?;
        let layers = format!(
            "lowerdir=/etc,upperdir={},workdir={}",
            upper.display(),
            work.display()
        );
        let overlay = Some("overlay");
        mount(
            overlay,
            "/etc",
            overlay,
            MsFlags::empty(),
            Some(layers.as_str()),
        )
        .context("mount an overlay on /etc")?;
        Ok(Self)
    }
}

impl Drop for Etc {
    fn drop(&mut self) {
        let _ = umount2("/etc", MntFlags::MNT_DETACH);
    }
}

#[test]
fn ranges_by_the_mapping_tools() -> Result<()> {
    need_root!();
    if binaries::installed("newuidmap").is_none() {
        skip!("uidmap is not installed");
    }
    let rootless = Rootless::new()?;
    let etc = Etc::new(&rootless.bench)?;
    let passwd = std::fs::read_to_string("/etc/passwd")?;
    let line = format!("coracle-test:x:{USER}:{USER}::/:/bin/sh\n");
    std::fs::write("/etc/passwd", passwd + &line)?;
    std::fs::write("/etc/subuid", "coracle-test:200000:65536\n")?;
    std::fs::write("/etc/subgid", "coracle-test:200000:65536\n")?;
    let both = json!([map(0, USER, 1), map(1, 200_000, 65_536)]);
    let config = rootless
        .config()?
        .set("/linux/uidMappings", both.clone())
        .set("/process/user", json!({"uid": 5, "gid": 0}))
        .set("/process/capabilities", json!({}));
    let (first, second) = (format!("0 {USER} 1"), "1 200000 65536");
    let output = rootless.script(config.clone(), SHOW)?;
    let want = ["5", &first, second, &first, "deny"];
    ensure!(words(&output) == want, "own gid: {}", text(&output));

    let config = config
        .set("/linux/gidMappings", both)
        .set("/process/user/additionalGids", json!([7, 8]));
    let output = rootless.script(config.clone(), &format!("{SHOW}; id -G"))?;
    let want = ["5", &first, second, &first, second, "allow", "0 7 8"];
    ensure!(words(&output) == want, "ranges: {}", text(&output));

    // Not the user's own: refused in the tool's words.
    let foreign = config
        .clone()
        .set("/linux/uidMappings", json!([map(0, 1000, 1000)]));
    let output = rootless.script(foreign, SHOW)?;
    let said = text(&output);
    ensure!(said.contains("failed to use newuidmap"), "{said}");
    ensure!(said.contains("not allowed"), "{said}");

    let output = rootless.script_below(&["env", "PATH=/nowhere"], config, SHOW)?;
    let said = text(&output);
    ensure!(said.contains("newuidmap is not in $PATH"), "{said}");
    drop(etc);
    rootless.bench.finish()
}

#[test]
fn root_of_a_user_namespace() -> Result<()> {
    need_root!();
    let rootless = Rootless::new()?;
    let mut config = rootless.config()?;
    // The engine is in the user namespace already; it has given up setgroups(2).
    let list = config.0["linux"]["namespaces"]
        .as_array_mut()
        .context("namespaces")?;
    list.retain(|namespace| namespace["type"] != "user");
    let config = config
        .set("/linux/uidMappings", json!([]))
        .set("/linux/gidMappings", json!([]));
    let outer = ["unshare", "-r", "-m"];
    let show =
        "id -u; cat /proc/self/setgroups; [ -c /dev/null ] && echo null > /dev/null; echo $?";
    let output = rootless.script_below(&outer, config, show)?;
    ensure!(words(&output) == ["0", "deny", "0"], "{}", text(&output));
    rootless.bench.finish()
}

#[test]
fn own_namespaces_are_joined() -> Result<()> {
    need_root!();
    let rootless = Rootless::new()?;
    let id = USER.to_string();
    // Each program executes the next: one process, with the namespaces in the end.
    let mut holder = Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"])
        .args(["unshare", "-r", "-n", "-i", "sleep", "600"])
        .spawn()?;
    let path = |file: &str| format!("/proc/{}/ns/{file}", holder.id());
    let own = std::fs::read_link("/proc/thread-self/ns/ipc")?;
    wait_for("the holder's namespaces", Duration::from_secs(10), || {
        let map = std::fs::read_to_string(format!("/proc/{}/uid_map", holder.id()))?;
        let there = std::fs::read_link(path("ipc"))? != own && map.contains(&id);
        Ok(there.then_some(()))
    })?;
    let files = ["user", "net", "ipc"];
    let held: Vec<String> = files
        .iter()
        .map(|file| Ok(std::fs::read_link(path(file))?.display().to_string()))
        .collect::<Result<_>>()?;
    let config = rootless.config()?.set(
        "/linux/namespaces",
        json!([
            {"type": "user", "path": path("user")},
            {"type": "network", "path": path("net")},
            {"type": "ipc", "path": path("ipc")},
            {"type": "mount"}, {"type": "pid"}, {"type": "uts"},
        ]),
    );
    let config = config
        .set("/linux/uidMappings", json!([]))
        .set("/linux/gidMappings", json!([]));
    let script = "cd /proc/self/ns; for f in user net ipc; do busybox readlink $f; done; id -u";
    let output = rootless.script(config, script);
    holder.kill()?;
    holder.wait()?;
    let output = output?;
    let mut want = held;
    want.push("0".to_owned());
    ensure!(words(&output) == want, "{}", text(&output));
    rootless.bench.finish()
}
