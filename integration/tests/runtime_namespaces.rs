//! Namespaces that are made, joined by path, or the runtime's own, in any mix.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root, wait_for};
use serde_json::json;

/// Name in the config, and of the file under /proc/pid/ns.
const KINDS: [(&str, &str); 8] = [
    ("user", "user"),
    ("mount", "mnt"),
    ("pid", "pid"),
    ("network", "net"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
    ("time", "time"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Host,
    Made,
    Joined,
}

/// A process that holds namespaces, ended with the test.
struct Holder(Child);

impl Holder {
    fn start(args: &[&str]) -> Result<Self> {
        let child = Command::new("unshare")
            .args(args)
            .args(["sleep", "600"])
            .stdin(Stdio::null())
            .spawn()
            .context("unshare")?;
        Ok(Self(child))
    }

    fn path(&self, file: &str) -> PathBuf {
        // With --fork, unshare itself stays outside of two of them.
        let file = match file {
            "pid" => "pid_for_children",
            "time" => "time_for_children",
            other => other,
        };
        PathBuf::from(format!("/proc/{}/ns/{file}", self.0.id()))
    }

    fn wait_for(&self, files: &[&str]) -> Result<()> {
        for file in files {
            wait_for("the holder's namespaces", Duration::from_secs(10), || {
                // A pid namespace without a first process cannot be read yet.
                let held = std::fs::read_link(self.path(file)).ok();
                Ok(held.filter(|held| Some(held) != own(file).ok().as_ref()))
            })?;
        }
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn own(file: &str) -> Result<PathBuf> {
    let path = format!("/proc/thread-self/ns/{file}");
    std::fs::read_link(&path).with_context(|| path)
}

struct Holders {
    rest: Holder,
    user: Holder,
}

impl Holders {
    fn start() -> Result<Self> {
        let rest = Holder::start(&[
            "-m",
            "-u",
            "-i",
            "-n",
            "-C",
            "-T",
            "-p",
            "--fork",
            "--kill-child",
        ])?;
        rest.wait_for(&["mnt", "uts", "ipc", "net", "cgroup", "time", "pid"])?;
        let user = Holder::start(&["-U"])?;
        user.wait_for(&["user"])?;
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{}/{map}", user.0.id()), "0 100000 65536\n")?;
        }
        Ok(Self { rest, user })
    }

    fn path(&self, file: &str) -> PathBuf {
        match file {
            "user" => self.user.path(file),
            file => self.rest.path(file),
        }
    }
}

/// What the container's program sees of its namespaces.
fn seen(runtime: &Runtime, bundle: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let text = runtime.run(&["run", "-b", &bundle.display().to_string(), "n"])?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(file, link)| (file.to_owned(), PathBuf::from(link)))
        .collect())
}

fn config(bench: &Bench, mix: &[Origin; 8], holders: &Holders) -> Config {
    let script = "cd /proc/self/ns; for f in user mnt pid net ipc uts cgroup time; do \
                  echo $f $(busybox readlink $f); done";
    let mut list = Vec::new();
    for ((kind, file), from) in KINDS.iter().zip(mix) {
        match from {
            Origin::Host => {}
            Origin::Made => list.push(json!({"type": kind})),
            Origin::Joined => list.push(json!({"type": kind, "path": holders.path(file)})),
        }
    }
    let mut config = bench
        .config("n", &[])
        .set("/process/args", json!(["/bin/busybox", "sh", "-c", script]))
        .set("/hostname", "")
        .set("/linux/maskedPaths", json!([]))
        .set("/linux/readonlyPaths", json!([]))
        .set("/linux/namespaces", list)
        .set(
            "/mounts",
            json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "mode=755"]},
            ]),
        );
    if mix[0] == Origin::Made {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        config = config
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map);
    }
    config
}

/// All of one sort, each one alone against the rest, and a fixed sample of the other mixes.
fn mixes() -> Vec<[Origin; 8]> {
    use Origin::{Host, Joined, Made};
    let mut all = vec![[Host; 8], [Made; 8], [Joined; 8]];
    for at in 0..8 {
        for (rest, one) in [
            (Host, Made),
            (Host, Joined),
            (Made, Host),
            (Made, Joined),
            (Joined, Host),
            (Joined, Made),
        ] {
            let mut mix = [rest; 8];
            mix[at] = one;
            all.push(mix);
        }
    }
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    while all.len() < 240 {
        let mut mix = [Host; 8];
        for from in &mut mix {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *from = [Host, Made, Joined][(random >> 32) as usize % 3];
        }
        all.push(mix);
    }
    for mix in &mut all {
        // A joined mount namespace would have its root changed under all who are in it, and in a
        // user namespace nothing can be mounted in one that belongs to the host.
        if mix[1] == Joined || mix[0] != Host {
            mix[1] = Made;
        }
    }
    all.sort_by_key(|mix| mix.map(|from| from as u8));
    all.dedup();
    all
}

#[test]
fn namespaces_in_every_mix() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let holders = Holders::start()?;
    let runtime = bench.coracle()?;
    let busybox = binaries::installed("busybox").context("busybox is not installed: make deps")?;
    let mixes = mixes();
    ensure!(mixes.len() > 150, "{} mixes", mixes.len());
    for mix in mixes {
        let bundle = bench.bundle("n", &config(&bench, &mix, &holders))?;
        let program = bundle.join("rootfs/bin/busybox");
        if !program.exists() {
            std::fs::copy(&busybox, program)?;
        }
        let seen = seen(&runtime, &bundle).with_context(|| format!("{mix:?}"))?;
        for ((_, file), from) in KINDS.iter().zip(&mix) {
            let have = seen
                .get(*file)
                .with_context(|| format!("{mix:?}: {file}"))?;
            let held = std::fs::read_link(holders.path(file))?;
            let own = own(file)?;
            let right = match from {
                Origin::Host => *have == own,
                Origin::Joined => *have == held,
                Origin::Made => *have != own && *have != held,
            };
            ensure!(
                right,
                "{mix:?}: {file} is {have:?}; own {own:?}, held {held:?}"
            );
        }
    }
    drop(holders);
    bench.finish()
}

#[test]
fn joined_mount_namespace_is_entered() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let holders = Holders::start()?;
    let mut mix = [Origin::Made; 8];
    mix[0] = Origin::Host;
    let mut config = config(&bench, &mix, &holders);
    let list = config.0["linux"]["namespaces"]
        .as_array_mut()
        .context("list")?;
    list.retain(|namespace| namespace["type"] != "mount");
    list.push(json!({"type": "mount", "path": holders.path("mnt")}));
    let bundle = bench.bundle("n", &config)?;
    let busybox = binaries::installed("busybox").context("busybox is not installed: make deps")?;
    std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
    let held = std::fs::read_link(holders.path("mnt"))?;
    let seen = seen(&bench.coracle()?, &bundle)?;
    ensure!(seen["mnt"] == held, "{seen:?} {held:?}");
    drop(holders);
    bench.finish()
}

#[test]
fn joined_mount_namespace_cannot_fake_the_kernels_files() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let script = "mount -t tmpfs none /proc/sys/kernel && : > /proc/sys/kernel/msgmax && \
                  exec \"$0\" \"$@\"";
    let holder = Holder::start(&["-m", "sh", "-c", script])?;
    let table = format!("/proc/{}/mountinfo", holder.0.id());
    wait_for("the fake", Duration::from_secs(10), || {
        let mounts = std::fs::read_to_string(&table)?;
        let fake = format!("/proc/{}/root/proc/sys/kernel/msgmax", holder.0.id());
        let there = mounts.contains(" /proc/sys/kernel ") && Path::new(&fake).exists();
        Ok(there.then_some(()))
    })?;
    let config = bench
        .config("n", &["show"])
        .set("/hostname", "")
        .set("/linux/sysctl", json!({"kernel.msgmax": "4096"}))
        .set(
            "/linux/namespaces",
            json!([{"type": "ipc"}, {"type": "mount", "path": holder.path("mnt")}]),
        );
    let bundle = bench.bundle("n", &config)?.display().to_string();
    let error = bench.coracle()?.refused(&["run", "-b", &bundle, "n"])?;
    ensure!(error.contains("/proc/sys/kernel/msgmax"), "{error}");
    ensure!(error.contains("cross-device"), "{error}");
    drop(holder);
    bench.finish()
}

/// What joins a user namespace is cloned by a stage: the first word must be the stage's, and the
/// root that only the parent reaches is asked for at once.
#[test]
fn container_of_a_stage_is_heard_after_it() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let holders = Holders::start()?;
    let mut mix = [Origin::Made; 8];
    mix[0] = Origin::Joined;
    let bundle = bench.bundle("n", &config(&bench, &mix, &holders))?;
    let busybox = binaries::installed("busybox").context("busybox is not installed: make deps")?;
    std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
    let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&bundle, closed)?;
    let held = std::fs::read_link(holders.path("user"))?;
    for _ in 0..20 {
        let seen = seen(&bench.coracle()?, &bundle)?;
        ensure!(seen["user"] == held, "{seen:?} {held:?}");
    }
    drop(holders);
    bench.finish()
}
