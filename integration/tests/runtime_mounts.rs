//! Bind mounts of the runtime where they meet the host's: locked flags, id maps, sources that the
//! container cannot reach.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root, skip};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

const NONE: Option<&str> = None;

/// A mount of the test's own, until it goes.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A mount of a directory on itself, with these flags.
fn mount_with(path: &Path, flags: MsFlags) -> Result<Mounted> {
    std::fs::create_dir_all(path)?;
    mount(Some(path), path, NONE, MsFlags::MS_BIND, NONE).context("bind mount")?;
    let mounted = Mounted(path.to_owned());
    let change = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    mount(NONE, path, NONE, change, NONE).context("change the bind mount's flags")?;
    Ok(mounted)
}

/// A container's root may do what the tests try: all of mount(8).
fn shell_config(bench: &Bench, name: &str, script: &str, bind: Value) -> Config {
    let capabilities = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    let mut config = bench
        .config(name, &[])
        .set("/process/args", json!(["/bin/busybox", "sh", "-c", script]))
        .push("/mounts", bind);
    for set in ["bounding", "effective", "permitted"] {
        config = config.set(
            &format!("/process/capabilities/{set}"),
            capabilities.clone(),
        );
    }
    config
}

fn in_user_namespace(config: Config) -> Config {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    config
        .push("/linux/namespaces", json!({"type": "user"}))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map)
}

fn bind(source: &Path, options: &[&str]) -> Value {
    json!({"destination": "/mnt", "type": "bind", "source": source, "options": options})
}

/// Runs a config whose bundle has busybox.
fn run(bench: &Bench, name: &str, config: &Config) -> Result<Output> {
    let bundle = bench.bundle(name, config)?;
    let busybox = binaries::installed("busybox").context("busybox is not installed: make deps")?;
    std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
    std::fs::create_dir_all(bundle.join("rootfs/mnt"))?;
    let bundle = bundle.display().to_string();
    bench.coracle()?.try_run(&["run", "-b", &bundle, name])
}

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
}

/// The options of the container's /mnt, as its /proc/self/mounts has them.
const SHOW: &str = "busybox awk '$2 == \"/mnt\" {print $4}' /proc/self/mounts";

fn shown(bench: &Bench, name: &str, config: &Config) -> Result<Vec<String>> {
    let output = run(bench, name, config)?;
    ensure!(output.status.success(), "{name}: {}", text(&output));
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(line.split(',').map(str::to_owned).collect())
}

/// A directory that the container's root cannot get to, with a source in it.
fn unreachable(bench: &Bench) -> Result<PathBuf> {
    let closed = bench.dir.join("closed");
    std::fs::create_dir_all(&closed)?;
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700))?;
    Ok(closed.join("source"))
}

#[test]
fn host_flags_stay_locked_in_a_user_namespace() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let flags = MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC
        | MsFlags::MS_NOATIME;
    let open = bench.dir.join("source");
    let closed = unreachable(&bench)?;
    for (place, source) in [("open", &open), ("closed", &closed)] {
        let _source = mount_with(source, flags)?;
        for (index, options) in [
            &["bind"][..],
            &["rbind", "nosuid"],
            &["bind", "ro", "noatime"],
        ]
        .into_iter()
        .enumerate()
        {
            let name = format!("kept-{place}-{index}");
            let script = format!("busybox mount -o remount,bind,rw,dev,suid,exec /mnt; {SHOW}");
            let config = shell_config(&bench, &name, &script, bind(source, options));
            let have = shown(&bench, &name, &in_user_namespace(config))?;
            for flag in ["ro", "nosuid", "nodev", "noexec", "noatime"] {
                ensure!(have.contains(&flag.to_owned()), "{name}: {flag}: {have:?}");
            }
        }
        for option in [
            "rw",
            "dev",
            "suid",
            "exec",
            "strictatime",
            "nodiratime",
            "rrw",
            "ratime",
        ] {
            let name = format!("refused-{place}-{option}");
            let config = shell_config(&bench, &name, SHOW, bind(source, &["bind", option]));
            let output = run(&bench, &name, &in_user_namespace(config))?;
            let text = text(&output);
            ensure!(!output.status.success(), "{name}: {text}");
            ensure!(text.contains("operation not permitted"), "{name}: {text}");
        }
    }
    // Root of the host may ask for all of that.
    let again = mount_with(&open, flags)?;
    let wanted = ["bind", "rw", "dev", "suid", "exec", "relatime"];
    let config = shell_config(&bench, "cleared", SHOW, bind(&open, &wanted));
    let have = shown(&bench, "cleared", &config)?;
    ensure!(have[..2] == ["rw", "relatime"], "{have:?}");
    drop(again);
    bench.finish()
}

#[test]
fn what_a_mount_covers_stays_covered_in_a_user_namespace() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let open = bench.dir.join("source");
    let closed = unreachable(&bench)?;
    for (name, source) in [("open", &open), ("closed", &closed)] {
        let below = source.join("below");
        std::fs::create_dir_all(&below)?;
        std::fs::write(below.join("secret"), "secret")?;
        mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), NONE)?;
        let _below = Mounted(below);
        let script = "busybox umount /mnt/below; busybox ls -l /mnt/below/secret; \
                      busybox mount --bind /mnt /tmp; busybox ls -l /tmp/below/secret";
        let config = shell_config(&bench, name, script, bind(source, &["rbind"]));
        let output = run(&bench, name, &in_user_namespace(config))?;
        let text = text(&output);
        ensure!(text.contains("No such file"), "{text}");
        ensure!(!text.contains("root"), "{name} was uncovered: {text}");
        // Bound without what covers it, it would be bare.
        let name = format!("bare-{name}");
        let config = shell_config(&bench, &name, "true", bind(source, &["bind"]));
        let output = run(&bench, &name, &in_user_namespace(config))?;
        ensure!(!output.status.success(), "{name} is bare");
    }
    bench.finish()
}

#[test]
fn root_filesystem_stays_locked_in_a_user_namespace() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for (name, mode) in [("open", 0o755), ("closed", 0o700)] {
        let script = "busybox mount -o remount,bind,rw / ; busybox touch /mnt/x; \
                      busybox awk '$2 == \"/\" {print $4}' /proc/self/mounts";
        let nothing = json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs",
            "options": ["ro"]});
        let config = in_user_namespace(shell_config(&bench, name, script, nothing));
        let bundle = bench.bundle(name, &config)?;
        // A directory in between that the container's root may not pass.
        let between = bundle.join("between");
        std::fs::create_dir_all(&between)?;
        std::fs::rename(bundle.join("rootfs"), between.join("rootfs"))?;
        let rootfs = between.join("rootfs");
        let busybox = binaries::installed("busybox").context("busybox is not installed")?;
        std::fs::copy(busybox, rootfs.join("bin/busybox"))?;
        std::fs::create_dir_all(rootfs.join("mnt"))?;
        let _rootfs = mount_with(&rootfs, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID)?;
        std::fs::set_permissions(&between, std::fs::Permissions::from_mode(mode))?;
        config
            .set("/root/path", "between/rootfs")
            .write(&bundle.join("config.json"))?;
        let path = bundle.display().to_string();
        let output = bench.coracle()?.try_run(&["run", "-b", &path, name])?;
        let out = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{name}: {}", text(&output));
        ensure!(out.starts_with("ro,nosuid"), "{name}: {}", text(&output));
    }
    bench.finish()
}

#[test]
fn id_mapped_sources_of_every_place() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let own = json!([{"containerID": 0, "hostID": 300_000, "size": 65536}]);
    let with_own = |mount: Value| {
        let mut mount = mount;
        mount["uidMappings"] = own.clone();
        mount["gidMappings"] = own.clone();
        mount
    };
    let open = bench.dir.join("source");
    let closed = unreachable(&bench)?;
    for (place, source) in [("open", open), ("closed", closed)] {
        std::fs::create_dir_all(&source)?;
        std::fs::write(source.join("file"), "")?;
        chown(source.join("file"), Some(7), Some(8))?;
        // On the host 7 is 300007 through a mapping of its own, and 100007 through the
        // container's; the container sees the second as 7, and the first as nobody.
        let cases = [
            (
                "own",
                with_own(bind(&source, &["bind"])),
                false,
                "300007 300008",
            ),
            (
                "own-user",
                with_own(bind(&source, &["bind"])),
                true,
                "65534 65534",
            ),
            ("containers", bind(&source, &["bind", "idmap"]), true, "7 8"),
            (
                "recursive",
                bind(&source, &["rbind", "ridmap", "ro"]),
                true,
                "7 8",
            ),
        ];
        for (case, mount, user, want) in cases {
            let name = format!("{case}-{place}");
            let script = "busybox stat -c '%u %g' /mnt/file";
            let mut config = shell_config(&bench, &name, script, mount);
            if user {
                config = in_user_namespace(config);
            }
            let output = run(&bench, &name, &config)?;
            let out = String::from_utf8_lossy(&output.stdout);
            ensure!(out.trim() == want, "{name}: {}", text(&output));
        }
    }
    // A source in the container's own root is what was mounted there before.
    let config = shell_config(
        &bench,
        "inside",
        "busybox stat -c '%u' /mnt/file",
        json!({
        "destination": "/app", "type": "bind", "source": bench.dir.join("source"),
        "options": ["bind"]}),
    );
    let inside = bench.dir.join("inside/rootfs/app");
    let config = in_user_namespace(config).push("/mounts", bind(&inside, &["bind", "idmap"]));
    let output = run(&bench, "inside", &config)?;
    let out = String::from_utf8_lossy(&output.stdout);
    ensure!(out.trim() == "7", "{}", text(&output));
    bench.finish()
}

/// Without "mount" among the namespaces, and what then cannot be asked for.
fn sharing_mounts(config: Config) -> Config {
    let namespaces = json!([{"type": "pid"}, {"type": "uts"}, {"type": "ipc"}]);
    config
        .set("/linux/namespaces", namespaces)
        .set("/linux/maskedPaths", json!([]))
        .set("/linux/readonlyPaths", json!([]))
        .set(
            "/mounts",
            json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ]),
        )
}

#[test]
fn container_without_a_mount_namespace_leaves_no_mount() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let own = std::fs::read_link("/proc/thread-self/ns/mnt")?;
    let mounts = || std::fs::read_to_string("/proc/thread-self/mountinfo");
    let before = mounts()?;
    let script = "busybox ls /bin; busybox readlink /proc/self/ns/mnt";
    let nothing = bind(&bench.dir, &["bind"]);
    let config = sharing_mounts(shell_config(&bench, "ran", script, nothing.clone()));
    let output = run(&bench, "ran", &config)?;
    let out = String::from_utf8_lossy(&output.stdout);
    let want = format!("busybox\nprobe\n{}\n", own.display());
    ensure!(out == want, "{}", text(&output));
    ensure!(mounts()? == before, "run left {}", mounts()?);

    // Another's mount at the place stays, whichever way the container ends.
    let config = shell_config(&bench, "left", "busybox sleep 600", nothing);
    let config = sharing_mounts(config);
    let bundle = bench.bundle("left", &config)?;
    let rootfs = bundle.join("rootfs");
    let busybox = binaries::installed("busybox").context("busybox is not installed")?;
    std::fs::copy(busybox, rootfs.join("bin/busybox"))?;
    let theirs = mount_with(&rootfs, MsFlags::MS_NOSUID)?;
    let before = mounts()?;
    let bundle = bundle.display().to_string();
    let log = bench.dir.join("log");
    coracle.detached(&["run", "-d", "-b", &bundle, "left"], &log)?;
    ensure!(mounts()? != before, "nothing was mounted");
    let inside = coracle.run(&["exec", "left", "/bin/busybox", "ls", "/bin"])?;
    ensure!(inside == "busybox\nprobe\n", "exec is elsewhere: {inside}");
    coracle.run(&["delete", "-f", "left"])?;
    ensure!(mounts()? == before, "delete left {}", mounts()?);
    // A start that fails, too.
    let missing = config.push("/mounts", bind(Path::new("/nope"), &["bind"]));
    missing.write(&bench.dir.join("left/config.json"))?;
    coracle.refused(&["create", "-b", &bundle, "left"])?;
    ensure!(mounts()? == before, "a refused create left {}", mounts()?);
    drop(theirs);
    bench.finish()
}

#[test]
fn mounts_of_the_config_stay_where_devices_would_be() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for user in [false, true] {
        let name = if user { "user" } else { "host" };
        let script = "busybox stat -c '%t:%T' /dev/random; busybox stat -c '%u %g' /dev/mqueue";
        let random = json!({"destination": "/dev/random", "type": "bind",
            "source": "/dev/urandom", "options": ["bind"]});
        let mut config = shell_config(&bench, name, script, random);
        if user {
            config = in_user_namespace(config);
        }
        let output = run(&bench, name, &config)?;
        let out = String::from_utf8_lossy(&output.stdout);
        ensure!(out == "1:9\n0 0\n", "{name}: {}", text(&output));
    }
    bench.finish()
}

#[test]
fn nothing_is_mounted_over_the_root() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for (index, destination) in ["/", "/./", "/tmp/.."].into_iter().enumerate() {
        let name = format!("top-{index}");
        let over = json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"});
        let output = run(&bench, &name, &shell_config(&bench, &name, "true", over))?;
        let text = text(&output);
        ensure!(
            text.contains("on the top of rootfs"),
            "{destination}: {text}"
        );
    }
    bench.finish()
}

#[test]
fn files_and_directories_do_not_mix() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let file = bench.dir.join("file");
    std::fs::write(&file, "")?;
    let onto = |source: &Path, destination: &str| {
        json!({"destination": destination,
        "type": "bind", "source": source, "options": ["bind"]})
    };
    for (name, mount) in [
        ("onto-directory", onto(&file, "/mnt")),
        ("onto-file", onto(&bench.dir, "/bin/busybox")),
    ] {
        let output = run(&bench, name, &shell_config(&bench, name, "true", mount))?;
        let text = text(&output);
        ensure!(text.contains("not a directory"), "{name}: {text}");
    }
    bench.finish()
}

#[test]
fn read_only_file_systems_are_filled_first() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for option in ["ro", "rro"] {
        let below = json!({"destination": "/mnt/below", "type": "tmpfs", "source": "tmpfs"});
        let mount = json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs",
            "options": [option]});
        let config = shell_config(&bench, option, SHOW, mount).push("/mounts", below);
        let have = shown(&bench, option, &config)?;
        ensure!(have[0] == "ro", "{have:?}");
    }
    bench.finish()
}

#[test]
fn cgroup2_beside_v1_is_mounted_by_its_name() -> Result<()> {
    need_root!();
    if !Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() {
        skip!("not a hybrid host");
    }
    let bench = Bench::new()?;
    for namespaced in [false, true] {
        let name = format!("unified-{namespaced}");
        // Its own cgroup is the root of what it sees, or the host's root is.
        let script = "busybox stat -f -c %t /mnt; busybox cat /mnt/cgroup.events";
        let mount = json!({"destination": "/mnt", "type": "cgroup2", "source": "cgroup",
            "options": ["ro", "nosuid"]});
        let mut config = shell_config(&bench, &name, script, mount);
        if namespaced {
            config = config.push("/linux/namespaces", json!({"type": "cgroup"}));
        }
        let text = text(&run(&bench, &name, &config)?);
        ensure!(text.starts_with("63677270\n"), "{text}");
        ensure!(text.contains("populated 1") == namespaced, "{text}");
    }
    bench.finish()
}

#[test]
fn no_pivot_takes_nothing_from_the_host() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let place = bench.dir.join("a place");
    std::fs::create_dir(&place)?;
    mount(Some("proc"), &place, Some("proc"), MsFlags::empty(), NONE)?;
    let mounted = Mounted(place.clone());
    // The container's mounts are peers of the host's then.
    let change = |flag| mount(NONE, "/", NONE, MsFlags::MS_REC | flag, NONE);
    change(MsFlags::MS_SHARED)?;
    for propagation in ["rshared", "shared", "rslave"] {
        let name = format!("no-pivot-{propagation}");
        let nothing = json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"});
        let script = "busybox awk '{print $5}' /proc/self/mountinfo";
        let config = shell_config(&bench, &name, script, nothing)
            .set("/linux/rootfsPropagation", propagation);
        let bundle = bench.bundle(&name, &config)?;
        let busybox = binaries::installed("busybox").context("busybox is not installed")?;
        std::fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
        let path = bundle.display().to_string();
        let line = ["run", "--no-pivot", "-b", &path, &name];
        let output = bench.coracle()?.try_run(&line)?;
        ensure!(output.status.success(), "{name}: {}", text(&output));
        for kept in ["/proc/self", "/sys/kernel"] {
            ensure!(Path::new(kept).exists(), "{name} took {kept} away");
        }
        ensure!(
            place.join("self").exists(),
            "{name} took {} away",
            place.display()
        );
    }
    change(MsFlags::MS_PRIVATE)?;
    drop(mounted);
    bench.finish()
}

#[test]
fn copied_up_content_leaves_the_options_alone() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    for (name, options, want) in [
        ("plain", json!(["tmpcopyup"]), "1750 0 0"),
        (
            "named",
            json!(["tmpcopyup", "mode=700", "uid=9"]),
            "700 9 0",
        ),
    ] {
        let mount = json!({"destination": "/app", "type": "tmpfs", "source": "tmpfs",
            "options": options});
        let script = "busybox stat -c '%a %u %g' /app /app/file; busybox readlink /app/link";
        let config = shell_config(&bench, name, script, mount);
        let app = bench.bundle(name, &config)?.join("rootfs/app");
        std::fs::set_permissions(&app, std::fs::Permissions::from_mode(0o1750))?;
        chown(&app, Some(5), Some(6))?;
        std::fs::write(app.join("file"), "x")?;
        chown(app.join("file"), Some(7), Some(8))?;
        std::fs::set_permissions(app.join("file"), std::fs::Permissions::from_mode(0o4711))?;
        std::os::unix::fs::symlink("file", app.join("link"))?;
        let output = run(&bench, name, &config)?;
        let out = String::from_utf8_lossy(&output.stdout);
        ensure!(
            out == format!("{want}\n4711 7 8\nfile\n"),
            "{}",
            text(&output)
        );
    }
    bench.finish()
}
