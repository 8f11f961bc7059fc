//! Checkpoint and restore with CRIU itself. Where it does not work (the build machines' is too old
//! for their kernel) every test is skipped; `make test-vm` runs them in the guest.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::criu::{COUNT, Subject, missing, namespace};
use coracle_integration::{need_root, skip, wait_for};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(120);

macro_rules! need_criu {
    ($feature:expr) => {
        need_root!();
        if let Some(why) = missing($feature) {
            skip!("{why}");
        }
    };
}

#[test]
fn counter_goes_on_from_where_it_was_stopped() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    for round in 0..2 {
        let images = format!("images-{round}");
        container.checkpoint(&images, &["--work-path", &container.path("work")])?;
        container.is_gone()?;
        let stopped = container.count()?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(container.count()? == stopped, "somebody still counts");
        let pid_file = container.path("pid");
        container.restore(&images, &["--pid-file", &pid_file])?;
        ensure!(container.status()? == "running");
        ensure!(std::fs::read_to_string(&pid_file)? == container.pid()?.to_string());
        container.counts_beyond(stopped)?;
        // exec finds its way into the namespaces, CRIU's time namespace among them.
        let words = ["exec", "c", "/bin/cat", "/proc/1/comm"];
        ensure!(container.runtime.run(&words)? == "sh\n");
    }
    ensure!(
        Path::new(&container.path("work"))
            .join("dump.log")
            .is_file()
    );
    container.delete()?;
    bench.finish()
}

#[test]
fn container_that_is_left_running_counts_on() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    let before = container.counts_beyond(0)?;
    let pid = container.pid()?;
    container.checkpoint("images", &["--leave-running"])?;
    ensure!(container.status()? == "running" && container.pid()? == pid);
    container.counts_beyond(before)?;
    // A paused one stays paused.
    container.runtime.run(&["pause", "c"])?;
    container.checkpoint("again", &["--leave-running"])?;
    ensure!(container.status()? == "paused", "{}", container.status()?);
    container.runtime.run(&["resume", "c"])?;
    container.counts_beyond(container.count()?)?;
    container.delete()?;
    bench.finish()
}

#[test]
fn chain_of_pre_dumps_ends_in_a_dump_that_restores() -> Result<()> {
    need_criu!(Some("mem_dirty_track"));
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    container.checkpoint("first", &["--pre-dump"])?;
    let between = container.counts_beyond(container.count()?)?;
    container.checkpoint("second", &["--pre-dump", "--parent-path", "../first"])?;
    container.counts_beyond(between)?;
    ensure!(container.status()? == "running");
    container.checkpoint("last", &["--parent-path", "../second", "--auto-dedup"])?;
    container.is_gone()?;
    for (images, parent) in [("second", "../first"), ("last", "../second")] {
        let link = Path::new(&container.path(images)).join("parent");
        ensure!(std::fs::read_link(link)? == Path::new(parent));
    }
    let stopped = container.count()?;
    container.restore("last", &["--auto-dedup"])?;
    container.counts_beyond(stopped)?;
    container.delete()?;
    bench.finish()
}

/// The network namespace of this test's thread, by a path that others can open.
fn own_network() -> String {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    format!("/proc/{}/task/{thread}/ns/net", std::process::id())
}

/// The firewall tables that are not there. CRIU bars a network with iptables, which leaves its
/// tables behind, empty, in the network that the container shares with this test.
fn absent_tables() -> Result<Vec<&'static str>> {
    let mut absent = Vec::new();
    for family in ["ip", "ip6"] {
        if !nft(&["list", "table", family, "filter"])? {
            absent.push(family);
        }
    }
    Ok(absent)
}

fn nft(args: &[&str]) -> Result<bool> {
    let mut command = Command::new("nft");
    command
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(command.status().context("nft")?.success())
}

#[test]
fn established_connection_outlives_the_checkpoint() -> Result<()> {
    need_criu!(None);
    let absent = absent_tables()?;
    let bench = Bench::new()?;
    let namespaces = json!([
        {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "network", "path": own_network()},
    ]);
    let config = bench
        .config("c", &["echo", "4711"])
        .set("/linux/namespaces", namespaces);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    let mut peer = wait_for("the echo server", PATIENCE, || {
        Ok(TcpStream::connect("127.0.0.1:4711").ok())
    })?;
    peer.set_read_timeout(Some(PATIENCE))?;
    let mut echo = |text: &[u8; 4]| -> Result<()> {
        peer.write_all(text)?;
        let mut back = [0; 4];
        peer.read_exact(&mut back)?;
        ensure!(back == *text);
        Ok(())
    };
    echo(b"one\n")?;
    let network = namespace(container.pid()?, "net")?;
    let complaint = container.checkpoint_refused("images", &[])?;
    ensure!(complaint.contains("dump.log"), "{complaint}");
    ensure!(container.status()? == "running");
    echo(b"two\n")?;
    let flags = ["--tcp-established", "--tcp-skip-in-flight"];
    container.checkpoint("established", &flags)?;
    container.restore("established", &["--tcp-established"])?;
    echo(b"tri\n")?;
    // And it is the namespace that it was in.
    ensure!(namespace(container.pid()?, "net")? == network);
    container.delete()?;
    for family in absent {
        nft(&["delete", "table", family, "filter"])?;
    }
    bench.finish()
}

#[test]
fn joined_pid_namespace_is_joined_again() -> Result<()> {
    need_criu!(Some("external_net_ns"));
    let bench = Bench::new()?;
    // A shell, which reaps what falls to it: a zombie holds on to the ids of its session.
    let config = Subject::config(&bench, "host", "while :; do sleep 0.1; done");
    let host = Subject::new(&bench, "host", config)?;
    host.run()?;
    let namespaces = json!([
        {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "pid", "path": format!("/proc/{}/ns/pid", host.pid()?)},
    ]);
    let config = Subject::config(&bench, "c", COUNT).set("/linux/namespaces", namespaces);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    let remains = format!("/proc/{}", container.pid()?);
    container.checkpoint("images", &[])?;
    container.is_gone()?;
    ensure!(host.status()? == "running");
    // Its pid is taken until its parent, whoever that is by now, has reaped it.
    wait_for("the first life to be reaped", PATIENCE, || {
        Ok((!Path::new(&remains).exists()).then_some(()))
    })?;
    let stopped = container.count()?;
    container.restore("images", &[])?;
    container.counts_beyond(stopped)?;
    ensure!(namespace(container.pid()?, "pid")? == namespace(host.pid()?, "pid")?);
    container.delete()?;
    host.delete()?;
    bench.finish()
}

/// The file that comes with a message on a console socket.
fn terminal(listener: &UnixListener) -> Result<OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (peer, _) = listener.accept()?;
    let mut bytes = [0; 64];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        &peer,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files.collect::<Vec<_>>()),
        _ => None,
    });
    files
        .next()
        .and_then(|files| files.into_iter().next())
        .context("no terminal came")
}

#[test]
fn terminal_comes_back_over_the_console_socket() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", "while read x; do echo got $x; done")
        .set("/process/terminal", true);
    let container = Subject::new(&bench, "c", config)?;
    let socket = container.path("console");
    let listener = UnixListener::bind(&socket)?;
    let bundle = container.bundle.display().to_string();
    let say = |terminal: OwnedFd, text: &str| -> Result<OwnedFd> {
        let mut file = std::fs::File::from(terminal);
        writeln!(file, "{text}")?;
        let (mut seen, mut buffer) = (String::new(), [0; 256]);
        while !seen.contains(&format!("got {text}")) {
            let length = file.read(&mut buffer)?;
            seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        Ok(file.into())
    };
    container.quietly(&["run", "-d", "-b", &bundle, "--console-socket", &socket, "c"])?;
    let first = say(terminal(&listener)?, "before")?;
    container.checkpoint("images", &[])?;
    drop(first);
    container.restore("images", &["--console-socket", &socket])?;
    say(terminal(&listener)?, "after")?;
    container.delete()?;
    // A detached terminal needs somebody at its other end.
    let complaint = container.restore_refused("images", &[])?;
    ensure!(
        complaint.contains("without setting console socket"),
        "{complaint}"
    );
    container.is_gone()?;
    bench.finish()
}

#[test]
fn pipes_of_stdio_are_replaced_by_those_of_the_restorer() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let script = "while read x; do echo got $x; done; echo end; exit 7";
    let config = Subject::config(&bench, "c", script);
    let container = Subject::new(&bench, "c", config)?;
    let piped = |words: &[&str]| {
        let mut command = container.runtime.command(words);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn()
    };
    let bundle = container.bundle.display().to_string();
    let mut run = piped(&["run", "-d", "-b", &bundle, "c"])?;
    // Before the wait, which closes it.
    let held = run.stdin.take();
    ensure!(run.wait()?.success());
    container.checkpoint("images", &[])?;
    drop(held);
    // In the foreground: it ends with the container, and with its code.
    let images = container.path("images");
    let mut restore = piped(&["restore", "--image-path", &images, "-b", &bundle, "c"])?;
    let mut stdin = restore.stdin.take().context("no stdin")?;
    writeln!(stdin, "this")?;
    drop(stdin);
    let output = restore.wait_with_output()?;
    ensure!(
        output.stdout == b"got this\nend\n" && output.status.code() == Some(7),
        "{output:?}"
    );
    container.is_gone()?;
    bench.finish()
}

#[test]
fn pages_are_served_lazily() -> Result<()> {
    need_criu!(Some("uffd-noncoop"));
    const PORT: &str = "27277";
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    let (ready, status) = rustix::pipe::pipe()?;
    let images = container.path("images");
    std::fs::create_dir(&images)?;
    let number = status.as_raw_fd().to_string();
    let server = format!("127.0.0.1:{PORT}");
    let words = [
        &[
            "checkpoint",
            "--lazy-pages",
            "--page-server",
            &server,
            "--status-fd",
            &number,
        ][..],
        &[
            "--manage-cgroups-mode",
            "ignore",
            "--image-path",
            &images,
            "c",
        ],
    ]
    .concat();
    // rustix's pipe is inherited.
    let mut checkpoint = container.command(&words).spawn()?;
    drop(status);
    let mut byte = Vec::new();
    // Ends when the runtime has let go of it: nothing else may have kept a copy.
    std::fs::File::from(ready).read_to_end(&mut byte)?;
    ensure!(byte == [0], "{byte:?}");
    let mut pages = Command::new("criu");
    let args = [
        "lazy-pages",
        "--page-server",
        "--address",
        "127.0.0.1",
        "--port",
        PORT,
        "-D",
    ];
    let mut pages = pages.args(args).arg(&images).spawn()?;
    // Beside the first, which is there until its last page is fetched.
    let mut other = container;
    other.id = "other".to_owned();
    let cgroup = format!("/{}/other", bench.mark);
    bench
        .config("other", &["unused"])
        .set("/process/args", vec!["/bin/sh", "-c", COUNT])
        .set("/linux/cgroupsPath", cgroup)
        .write(&other.bundle.join("config.json"))?;
    let before = other.count()?;
    let flags = ["--lazy-pages", "--manage-cgroups-mode", "ignore"];
    other.restore("images", &flags)?;
    ensure!(pages.wait()?.success() && checkpoint.wait()?.success());
    other.counts_beyond(before)?;
    other.delete()?;
    other.id = "c".to_owned();
    other.is_gone()?;
    bench.finish()
}

#[test]
fn file_locks_are_held_again_and_refused_without_the_flag() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let script = format!("/bin/probe lock /tmp/lock & {COUNT}");
    let config = Subject::config(&bench, "c", &script);
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    let held = || -> Result<bool> {
        let file = std::fs::File::open(container.file("/tmp/lock"));
        Ok(file.is_ok_and(|file| file.try_lock().is_err()))
    };
    wait_for("the lock", PATIENCE, || Ok(held()?.then_some(())))?;
    // What CRIU refuses says where its reasons are, and costs the container nothing.
    let complaint = container.checkpoint_refused("refused", &[])?;
    let log = Path::new(&container.path("refused")).join("dump.log");
    ensure!(
        complaint.contains(&log.display().to_string()),
        "{complaint}"
    );
    ensure!(
        complaint.contains("Quoting") && complaint.contains("Error"),
        "{complaint}"
    );
    ensure!(container.status()? == "running");
    container.counts_beyond(container.count()?)?;
    container.checkpoint("images", &["--file-locks"])?;
    ensure!(!held()?, "locked by nobody");
    let stopped = container.count()?;
    container.restore("images", &["--file-locks"])?;
    container.counts_beyond(stopped)?;
    ensure!(held()?, "not locked again");
    container.delete()?;
    bench.finish()
}

#[test]
fn other_id_and_cgroup_take_over() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT).set("/linux/resources/pids/limit", 50);
    let mut container = Subject::new(&bench, "c", config.clone())?;
    container.run()?;
    container.counts_beyond(0)?;
    let ignore = ["--manage-cgroups-mode", "ignore"];
    container.checkpoint("images", &ignore)?;
    let stopped = container.count()?;
    config
        .set("/linux/cgroupsPath", format!("/{}/moved", bench.mark))
        .write(&container.bundle.join("config.json"))?;
    container.id = "renamed".to_owned();
    container.restore("images", &ignore)?;
    container.counts_beyond(stopped)?;
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", container.pid()?))?;
    let (moved, old) = (
        format!("/{}/moved", bench.mark),
        format!("/{}/c", bench.mark),
    );
    ensure!(
        cgroups.contains(&moved) && !cgroups.contains(&old),
        "{cgroups}"
    );
    // The limits of the bundle hold for what came out of the images.
    let stats = container.runtime.run(&["events", "--stats", "renamed"])?;
    let stats: serde_json::Value = serde_json::from_str(&stats)?;
    ensure!(stats["data"]["pids"]["limit"] == 50, "{stats}");
    container.delete()?;
    bench.finish()
}

#[test]
fn bind_mounts_come_from_the_bundle_with_their_mount_points() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    for name in ["outer", "inner", "file"] {
        let path = bench.dir.join(name);
        match name {
            "file" => std::fs::write(path, "of the host\n")?,
            _ => std::fs::create_dir(path)?,
        }
    }
    let bind = |name: &str, to: &str, options: &[&str]| {
        let options = [&["bind"], options].concat();
        json!({"type": "bind", "source": bench.dir.join(name), "destination": to,
               "options": options})
    };
    let config = Subject::config(&bench, "c", COUNT)
        .push("/mounts", bind("outer", "/conf", &["rw"]))
        .push("/mounts", bind("inner", "/conf/for/nested", &["rw"]))
        .push("/mounts", bind("file", "/conf/file", &["ro"]));
    let container = Subject::new(&bench, "c", config)?;
    std::fs::create_dir_all(container.file("/real/conf"))?;
    std::os::unix::fs::symlink("/real/conf", container.file("/conf"))?;
    container.run()?;
    container.counts_beyond(0)?;
    container.checkpoint("images", &[])?;
    // The mount points that the start had made are gone on the machine that restores.
    std::fs::remove_dir_all(bench.dir.join("outer/for"))?;
    std::fs::remove_file(bench.dir.join("outer/file"))?;
    let stopped = container.count()?;
    container.restore("images", &[])?;
    container.counts_beyond(stopped)?;
    std::fs::write(bench.dir.join("inner/new"), "after\n")?;
    for (path, want) in [
        ("/conf/for/nested/new", "after\n"),
        ("/real/conf/file", "of the host\n"),
    ] {
        ensure!(
            container.runtime.run(&["exec", "c", "/bin/cat", path])? == want,
            "{path}"
        );
    }
    let write = ["exec", "c", "/bin/sh", "-c", "echo x >/conf/file"];
    container.runtime.refused(&write)?;
    container.delete()?;
    bench.finish()
}

#[test]
fn user_namespace_is_restored() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let config = Subject::config(&bench, "c", COUNT)
        .push("/linux/namespaces", json!({"type": "user"}))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    let container = Subject::new(&bench, "c", config)?;
    for path in ["", "/tmp", "/dev", "/proc", "/sys"] {
        std::os::unix::fs::chown(container.file(path), Some(100_000), Some(100_000))?;
    }
    // Whoever is no longer root has to get there.
    let open: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&bench.dir, open.clone())?;
    container.run()?;
    container.counts_beyond(0)?;
    // The namespace's root reads the images itself.
    let images = container.path("images");
    std::fs::create_dir(&images)?;
    std::fs::set_permissions(&images, open)?;
    container.checkpoint("images", &[])?;
    for entry in std::fs::read_dir(&images)? {
        let path = entry?.path();
        std::os::unix::fs::chown(&path, Some(100_000), Some(100_000))?;
    }
    let stopped = container.count()?;
    container.restore("images", &[])?;
    container.counts_beyond(stopped)?;
    let map = std::fs::read_to_string(format!("/proc/{}/uid_map", container.pid()?))?;
    ensure!(
        map.split_whitespace().collect::<Vec<_>>() == ["0", "100000", "65536"],
        "{map}"
    );
    container.delete()?;
    bench.finish()
}

#[test]
fn hooks_run_around_a_restore_and_after_a_checkpoint() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let seen = bench.dir.join("seen");
    let hook = |point: &str| {
        let script = format!(
            "grep -o '\"pid\":[1-9][0-9]*' >/dev/null && p=pid; echo {point} $p >>{}",
            seen.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let mut config = Subject::config(&bench, "c", COUNT);
    for point in ["prestart", "createRuntime", "poststart", "poststop"] {
        config = config.set(&format!("/hooks/{point}"), hook(point));
    }
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    let taken = || -> Result<String> {
        let text = std::fs::read_to_string(&seen)?;
        std::fs::remove_file(&seen)?;
        Ok(text)
    };
    ensure!(taken()? == "prestart pid\ncreateRuntime pid\npoststart pid\n");
    container.checkpoint("images", &[])?;
    ensure!(taken()? == "poststop\n");
    container.restore("images", &[])?;
    ensure!(taken()? == "prestart pid\ncreateRuntime pid\n");
    container.delete()?;
    ensure!(taken()? == "poststop\n");
    bench.finish()
}

#[test]
fn restore_that_fails_leaves_nothing() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let config = Subject::config(&bench, "c", COUNT);
    let container = Subject::new(&bench, "c", config.clone())?;
    let complaint = container.restore_refused("nowhere", &[])?;
    ensure!(
        complaint.contains("nowhere: no such file or directory"),
        "{complaint}"
    );
    container.is_gone()?;
    container.run()?;
    container.counts_beyond(0)?;
    container.checkpoint("images", &[])?;
    let images = Path::new(&container.path("images")).to_owned();

    // A hook that fails, when the processes are half there.
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]);
    let failing = config.clone().set("/hooks/createRuntime", hook);
    failing.write(&container.bundle.join("config.json"))?;
    let complaint = container.restore_refused("images", &[])?;
    ensure!(
        complaint.contains("createRuntime hook #0: exit status 3"),
        "{complaint}"
    );
    container.is_gone()?;

    // The runtime is killed there: what it leaves, delete --force takes away, and the root of
    // the container stays whole.
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID"]}]);
    let killed = config.clone().set("/hooks/createRuntime", hook);
    killed.write(&container.bundle.join("config.json"))?;
    let options = cgroup_options()?;
    container.restore_refused("images", &[])?;
    container.delete()?;
    container.is_gone()?;
    ensure!(container.file("/bin/busybox").is_file());
    // What CRIU resets for the whole host, a runtime that is killed cannot put back.
    if cgroup_options()? != options {
        let remount = format!("remount,{options}");
        let mounted = Command::new("mount")
            .args(["-o", &remount, "/sys/fs/cgroup"])
            .status()?;
        ensure!(mounted.success(), "mount -o {remount}: {mounted}");
    }

    // Images that are damaged.
    config.write(&container.bundle.join("config.json"))?;
    let inventory = images.join("inventory.img");
    let good = std::fs::read(&inventory)?;
    std::fs::write(&inventory, &good[..good.len() / 2])?;
    let complaint = container.restore_refused("images", &[])?;
    let log = images.join("restore.log").display().to_string();
    ensure!(complaint.contains(&log), "{complaint}");
    container.is_gone()?;
    std::fs::remove_file(images.join("descriptors.json"))?;
    let complaint = container.restore_refused("images", &[])?;
    ensure!(complaint.contains("descriptors.json"), "{complaint}");
    container.is_gone()?;
    ensure!(leftovers()?.is_empty(), "{:?}", leftovers()?);
    bench.finish()
}

/// The options of the filesystem at /sys/fs/cgroup, as mountinfo has them.
fn cgroup_options() -> Result<String> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")?;
    let line = mountinfo
        .lines()
        .find(|line| line.split(' ').nth(4) == Some("/sys/fs/cgroup"))
        .context("nothing is mounted at /sys/fs/cgroup")?;
    Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
}

/// What CRIU makes in /tmp for itself.
fn leftovers() -> Result<Vec<String>> {
    let names = std::fs::read_dir("/tmp")?
        .flatten()
        .map(|entry| entry.file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    Ok(names.filter(|name| name.starts_with(".criu.")).collect())
}

#[test]
fn annotation_names_a_configuration_file() -> Result<()> {
    need_criu!(None);
    let bench = Bench::new()?;
    let settings = bench.dir.join("criu.conf");
    std::fs::write(&settings, "log-file=elsewhere.log\n")?;
    let config = Subject::config(&bench, "c", COUNT)
        .set("/annotations", json!({"org.criu.config": settings}));
    let container = Subject::new(&bench, "c", config)?;
    container.run()?;
    container.counts_beyond(0)?;
    container.checkpoint("images", &[])?;
    let images = Path::new(&container.path("images")).to_owned();
    ensure!(images.join("elsewhere.log").is_file() && !images.join("dump.log").exists());
    container.restore("images", &[])?;
    ensure!(!images.join("restore.log").exists());
    container.delete()?;
    bench.finish()
}
