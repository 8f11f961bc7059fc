//! The runtime where the machine, or others on it, do not play along: no space, processes that do
//! not die, cgroups that are not empty, many commands at once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::process::run_within;
use coracle_integration::sweep::hierarchies;
use coracle_integration::{need_root, skip};
use nix::mount::{MsFlags, mount, umount};

const LIMIT: Duration = Duration::from_secs(30);

fn cgroups(bench: &Bench, id: &str) -> Vec<PathBuf> {
    let paths = hierarchies();
    let paths = paths.iter().map(|top| top.join(&bench.mark).join(id));
    paths.filter(|path| path.exists()).collect()
}

/// A container that sleeps; its bundle.
fn start(bench: &Bench, coracle: &Runtime, id: &str) -> Result<String> {
    let bundle = bench.bundle("b", &bench.config(id, &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    let log = bench.dir.join("log");
    coracle.detached(&["run", "-d", "-b", &bundle, id], &log)?;
    Ok(bundle)
}

fn sound(what: &str, error: &str) -> Result<()> {
    ensure!(!error.contains("panicked"), "{what}: {error}");
    ensure!(!error.trim().is_empty(), "{what}: failed without a word");
    Ok(())
}

#[test]
fn commands_on_one_id_at_once() -> Result<()> {
    need_root!();
    const AT_ONCE: usize = 16;
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    let end = Instant::now() + Duration::from_secs(10);
    let done = Mutex::new((0, 0));
    let worker = |number: usize| -> Result<()> {
        let commands: [&[&str]; 6] = [
            &["create", "-b", &bundle, "c"],
            &["start", "c"],
            &["run", "-d", "-b", &bundle, "c"],
            &["kill", "c", "KILL"],
            &["delete", "c"],
            &["delete", "-f", "c"],
        ];
        let mut turn = number;
        while Instant::now() < end {
            // Each worker in an order of its own.
            turn += 1 + number % 5;
            let line = commands[turn % commands.len()];
            let ended = run_within(&mut coracle.command(line), LIMIT)?;
            let status = ended
                .status
                .with_context(|| format!("{line:?} does not end"))?;
            ensure!(status.code().is_some(), "{line:?}: {status}");
            if !status.success() {
                sound(&format!("{line:?}"), &ended.error)?;
            }
            if let Ok(mut done) = done.lock() {
                done.0 += 1;
                done.1 += usize::from(status.success());
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let worker = &worker;
        let workers: Vec<_> = (0..AT_ONCE)
            .map(|number| scope.spawn(move || worker(number)))
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("panic"))?)
    })?;
    coracle.run(&["delete", "-f", "c"])?;
    let (all, good) = *done.lock().map_err(|_| anyhow::anyhow!("panic"))?;
    println!("{all} commands, {good} of them succeeded");
    ensure!(good > 10, "only {good} of {all} commands succeeded");
    let left = cgroups(&bench, "c");
    let members = |path: &PathBuf| std::fs::read_to_string(path.join("cgroup.procs"));
    let members: Vec<_> = left.iter().map(members).collect();
    ensure!(left.is_empty(), "{left:?} is left, with {members:?}");
    ensure!(!coracle.root.join("c").exists());
    bench.finish()
}

/// A state root on a tmpfs of its own, gone with the value.
struct SmallRoot(PathBuf);

impl SmallRoot {
    fn new(path: &Path, limit: &str) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let none: Option<&str> = None;
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(limit),
        )
        .with_context(|| format!("mount a tmpfs with {limit}: {none:?}"))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for SmallRoot {
    fn drop(&mut self) {
        let _ = umount(&self.0);
    }
}

#[test]
fn state_root_without_space() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "600"]))?;
    let bundle = bundle.display().to_string();
    let limits = (1..12)
        .map(|inodes| format!("nr_inodes={inodes}"))
        .chain((1..8).map(|pages| format!("size={}k", pages * 4)));
    let (mut refused, mut ran) = (0, 0);
    for limit in limits {
        let small = SmallRoot::new(&bench.dir.join("small"), &limit)?;
        let coracle = bench.coracle()?.with_root(small.0.clone());
        let create = run_within(&mut coracle.command(&["create", "-b", &bundle, "c"]), LIMIT)?;
        let status = create.status.with_context(|| format!("{limit}: hangs"))?;
        if status.success() {
            ran += 1;
            coracle.run(&["start", "c"])?;
            coracle.run(&["delete", "-f", "c"])?;
        } else {
            refused += 1;
            sound(&limit, &create.error)?;
            ensure!(
                create.error.contains("no space left"),
                "{limit}: {}",
                create.error
            );
        }
        let left = cgroups(&bench, "c");
        ensure!(left.is_empty(), "{limit}: {left:?}");
        ensure!(
            !small.0.join("c").exists(),
            "{limit}: the directory is left"
        );
    }
    ensure!(refused > 3 && ran > 3, "{refused} refused, {ran} ran");
    bench.finish()
}

#[test]
fn delete_with_cgroups_made_below() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    start(&bench, &coracle, "c")?;
    let pid = coracle.state("c")?["pid"].to_string();
    let own = cgroups(&bench, "c");
    ensure!(!own.is_empty());
    for cgroup in &own {
        std::fs::create_dir_all(cgroup.join("made/by/the/container"))?;
        std::fs::create_dir(cgroup.join("made/beside"))?;
        // A cpuset takes nobody before it has processors.
        if !cgroup.starts_with("/sys/fs/cgroup/cpuset") {
            std::fs::write(cgroup.join("made/by/the/container/cgroup.procs"), &pid)?;
        }
    }
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(cgroups(&bench, "c").is_empty());
    bench.finish()
}

#[test]
fn delete_spares_a_stranger_in_the_cgroup_and_says_so() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    start(&bench, &coracle, "c")?;
    let mut stranger = Command::new("sleep").arg("600").spawn()?;
    for cgroup in cgroups(&bench, "c") {
        if !cgroup.starts_with("/sys/fs/cgroup/cpuset") {
            std::fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string())?;
        }
    }
    let deleted = run_within(&mut coracle.command(&["delete", "-f", "c"]), LIMIT)?;
    let alive = stranger.try_wait()?.is_none();
    stranger.kill()?;
    stranger.wait()?;
    let status = deleted.status.context("delete -f hangs")?;
    ensure!(
        alive,
        "a process from outside the container's pid namespace was killed"
    );
    ensure!(!status.success(), "the cgroup is still there");
    ensure!(
        deleted
            .error
            .contains("unable to remove container's cgroup"),
        "{}",
        deleted.error
    );
    ensure!(deleted.error.contains(&bench.mark), "{}", deleted.error);
    // Now that it is gone, the record that stayed leads to the rest.
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(cgroups(&bench, "c").is_empty());
    bench.finish()
}

#[test]
fn delete_of_what_others_have_frozen() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let freezer = Path::new("/sys/fs/cgroup/freezer").join(&bench.mark);
    let coracle = bench.coracle()?;
    start(&bench, &coracle, "c")?;
    if !freezer.join("c").exists() {
        coracle.run(&["delete", "-f", "c"])?;
        skip!("no v1 freezer");
    }
    // The container's own cgroup, behind the runtime's back.
    std::fs::write(freezer.join("c/freezer.state"), "FROZEN")?;
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(cgroups(&bench, "c").is_empty());

    // The parent's, which is not the runtime's to thaw: nothing in it can die.
    start(&bench, &coracle, "c")?;
    std::fs::write(freezer.join("freezer.state"), "FROZEN")?;
    let started = Instant::now();
    let deleted = run_within(&mut coracle.command(&["delete", "-f", "c"]), LIMIT)?;
    let seconds = started.elapsed().as_secs();
    let state = std::fs::read_to_string(freezer.join("freezer.state"))?;
    std::fs::write(freezer.join("freezer.state"), "THAWED")?;
    let status = deleted.status.context("delete -f hangs")?;
    ensure!(!status.success(), "deleted what cannot die");
    ensure!(seconds < 20, "{seconds} s");
    ensure!(
        deleted.error.contains("container init still running"),
        "{}",
        deleted.error
    );
    ensure!(state.trim() == "FROZEN", "the parent was thawed");
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(cgroups(&bench, "c").is_empty());
    bench.finish()
}

/// A filesystem on a loop device, thawed and gone with the value.
struct Disk {
    device: String,
    point: PathBuf,
}

fn output(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}", error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Disk {
    fn new(dir: &Path) -> Result<Self> {
        let image = dir.join("image");
        std::fs::File::create(&image)?.set_len(16 << 20)?;
        let image = image.display().to_string();
        output("mkfs.ext4", &["-q", &image])?;
        let device = output("losetup", &["--find", "--show", &image])?;
        let point = dir.join("disk");
        std::fs::create_dir(&point)?;
        let disk = Self { device, point };
        output("mount", &[&disk.device, &disk.point.display().to_string()])?;
        Ok(disk)
    }

    fn freeze(&self, on: bool) -> Result<()> {
        let flag = if on { "-f" } else { "-u" };
        output("fsfreeze", &[flag, &self.point.display().to_string()]).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.freeze(false);
        let _ = umount(&self.point);
        let _ = output("losetup", &["--detach", &self.device]);
    }
}

#[test]
fn delete_of_an_init_that_cannot_die() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let disk = match Disk::new(&bench.dir) {
        Ok(disk) => disk,
        Err(error) => skip!("no loop device: {error:#}"),
    };
    let coracle = bench.coracle()?;
    let source = disk.point.display().to_string();
    let config = bench.config("c", &["write", "/app/file", "text"]).push(
        "/mounts",
        serde_json::json!({"destination": "/app", "type": "bind", "source": source,
            "options": ["bind", "rw"]}),
    );
    let bundle = bench.bundle("b", &config)?.display().to_string();
    coracle.detached(&["create", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let pid = coracle.state("c")?["pid"].to_string();
    // A write to a frozen filesystem sleeps where no signal wakes it.
    disk.freeze(true)?;
    coracle.run(&["start", "c"])?;
    let stat = format!("/proc/{pid}/stat");
    let stuck = coracle_integration::wait_for("state D", Duration::from_secs(5), || {
        let text = std::fs::read_to_string(&stat)?;
        Ok(text.contains(") D ").then_some(()))
    });
    let started = Instant::now();
    let deleted = run_within(&mut coracle.command(&["delete", "-f", "c"]), LIMIT)?;
    let seconds = started.elapsed().as_secs();
    disk.freeze(false)?;
    stuck?;
    let status = deleted.status.context("delete -f hangs")?;
    ensure!(!status.success(), "deleted what cannot die");
    ensure!(seconds < 20, "{seconds} s");
    ensure!(
        deleted.error.contains("container init still running"),
        "{}",
        deleted.error
    );
    coracle.run(&["delete", "-f", "c"])?;
    ensure!(cgroups(&bench, "c").is_empty());
    drop(disk);
    bench.finish()
}
