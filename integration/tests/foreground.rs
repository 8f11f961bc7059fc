//! `run` and `exec` in the foreground: signals, terminals, exit codes, inherited descriptors, the
//! service manager's sockets; and what an exec takes over from its container.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root, wait_for};
use nix::sys::signal::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

/// A bundle with Debian's static busybox, which the script runs in.
fn shell(bench: &Bench, name: &str, script: &str, config: Config) -> Result<PathBuf> {
    let config = config.set("/process/args", ["/bin/sh", "-c", script]);
    let bundle = bench.bundle(name, &config)?;
    let busybox = bundle.join("rootfs/bin/busybox");
    if !busybox.exists() {
        let installed = binaries::installed("busybox").context("busybox: see .ci/deps")?;
        std::fs::copy(installed, &busybox)?;
        for name in ["sh", "sleep", "cat", "stty", "grep", "ionice"] {
            std::os::unix::fs::symlink("busybox", bundle.join("rootfs/bin").join(name))?;
        }
    }
    Ok(bundle)
}

fn words<'a>(bundle: &'a Path, args: &[&'a str]) -> Vec<&'a str> {
    let bundle = bundle.to_str().unwrap_or_default();
    let mut words = vec!["run", "-b", bundle];
    words.extend(args);
    words
}

/// Sends by number: nix has no value for a real-time signal.
fn signal(child: &Child, number: i32) -> Result<()> {
    let status = Command::new("sh")
        .args(["-c", "kill -\"$1\" \"$2\"", "sh"])
        .args([number.to_string(), child.id().to_string()])
        .status()?;
    ensure!(status.success(), "kill -{number}");
    Ok(())
}

fn wait_text(path: &Path, want: &str) -> Result<String> {
    let found = wait_for(&format!("{want:?} in {}", path.display()), LIMIT, || {
        let text = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(text.contains(want).then_some(text))
    });
    found.with_context(|| std::fs::read_to_string(path).unwrap_or_default())
}

/// All that can be caught, but CHLD, which is the shell's own.
fn signals() -> impl Iterator<Item = i32> {
    let unlike = [
        Signal::SIGKILL as i32,
        Signal::SIGSTOP as i32,
        Signal::SIGCHLD as i32,
    ];
    (1..=64).filter(move |number| !unlike.contains(number) && !(32..34).contains(number))
}

fn echoing() -> String {
    let traps: String = signals()
        .map(|number| format!("trap 'echo got {number}.' {number}; "))
        .collect();
    format!("{traps} echo ready; while :; do sleep 600 & wait $!; done")
}

fn forwards_all(child: &mut Child, output: &Path) -> Result<()> {
    wait_text(output, "ready")?;
    for number in signals() {
        signal(child, number)?;
        wait_text(output, &format!("got {number}.\n"))?;
    }
    ensure!(child.try_wait()?.is_none());
    Ok(())
}

#[test]
fn run_and_exec_forward_every_signal() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = shell(&bench, "b", &echoing(), bench.config("c", &[]))?;
    let output = bench.dir.join("run.out");
    let mut run = coracle
        .command(&words(&bundle, &["c"]))
        .stdout(std::fs::File::create(&output)?)
        .spawn()?;
    forwards_all(&mut run, &output)?;

    let output = bench.dir.join("exec.out");
    let mut exec = coracle
        .command(&["exec", "c", "/bin/sh", "-c", &echoing()])
        .stdout(std::fs::File::create(&output)?)
        .spawn()?;
    forwards_all(&mut exec, &output)?;
    coracle.run(&["kill", "c", "KILL"])?;
    ensure!(exec.wait()?.code() == Some(137));
    ensure!(run.wait()?.code() == Some(137));
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}

#[test]
fn exit_codes_are_the_programs() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    for (script, code) in [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
        ("kill -SEGV $$", 128 + 11),
    ] {
        let output = coracle.try_run(&["exec", "c", "/bin/sh", "-c", script])?;
        ensure!(output.status.code() == Some(code), "{script}: {output:?}");
        ensure!(output.stderr.is_empty(), "{script}: {output:?}");
    }
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn program_that_cannot_be_executed_says_so_itself() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    let file = bundle.join("rootfs/run.sh");
    std::fs::write(&file, "#!/no/such/shell\n")?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    let want = "exec /run.sh: no such file or directory\n";
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    let output = coracle.try_run(&["exec", "c", "/run.sh"])?;
    ensure!(output.status.code() == Some(255), "{output:?}");
    ensure!(output.stderr == want.as_bytes(), "{output:?}");
    coracle.run(&["delete", "--force", "c"])?;

    let config = bench.config("c", &[]).set("/process/args", ["/run.sh"]);
    let bundle = bench.bundle("b", &config)?;
    let output = coracle.try_run(&words(&bundle, &["c"]))?;
    ensure!(output.status.code() == Some(255), "{output:?}");
    ensure!(output.stderr == want.as_bytes(), "{output:?}");
    ensure!(coracle.run(&["list", "-q"])?.is_empty());

    // Created and started, it has ended: with its own words where it would have written.
    let log = bench.dir.join("log");
    let bundle = bundle.display().to_string();
    coracle.detached(&["create", "-b", &bundle, "c"], &log)?;
    coracle.run(&["start", "c"])?;
    coracle.wait_status("c", "stopped")?;
    ensure!(std::fs::read_to_string(&log)? == want);
    coracle.run(&["delete", "c"])?;
    bench.finish()
}

#[test]
fn stdin_ends_in_the_container_when_it_ends_outside() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let text = "line\n".repeat(100_000);
    let give = |mut command: Command| -> Result<(Option<i32>, Vec<u8>)> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let text = text.clone();
        let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
        let output = child.wait_with_output()?;
        writer.join().ok().context("writer")??;
        Ok((output.status.code(), output.stdout))
    };
    let bundle = shell(&bench, "b", "cat; exit 5", bench.config("c", &[]))?;
    let (code, output) = give(coracle.command(&words(&bundle, &["c"])))?;
    ensure!(
        code == Some(5) && output == text.as_bytes(),
        "run: {code:?}"
    );
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    let (code, output) = give(coracle.command(&["exec", "c", "/bin/sh", "-c", "cat; exit 6"]))?;
    ensure!(
        code == Some(6) && output == text.as_bytes(),
        "exec: {code:?}"
    );
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

/// A terminal of the test's own, as a person at a shell has one.
struct Terminal {
    master: std::fs::File,
    slave: OwnedFd,
}

impl Terminal {
    fn open(rows: u16, columns: u16) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        let terminal = Self {
            master: master.into(),
            slave,
        };
        terminal.resize(rows, columns)?;
        Ok(terminal)
    }

    fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    /// In a session of its own, with this as its controlling terminal.
    fn spawn(&self, words: &[String]) -> Result<Child> {
        let slave = || -> Result<Stdio> { Ok(self.slave.try_clone()?.into()) };
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(words)
            .stdin(slave()?)
            .stdout(slave()?)
            .stderr(slave()?)
            .spawn()?;
        Ok(child)
    }

    /// What has come, up to this text.
    fn expect(&mut self, want: &str) -> Result<String> {
        let mut text = String::new();
        let end = std::time::Instant::now() + LIMIT;
        while !text.contains(want) {
            ensure!(std::time::Instant::now() < end, "no {want:?} in {text:?}");
            let mut fds = [rustix::event::PollFd::new(
                &self.master,
                rustix::event::PollFlags::IN,
            )];
            let pause = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            if rustix::event::poll(&mut fds, Some(&pause))? == 0 {
                continue;
            }
            let mut bytes = [0; 4096];
            let length = self.master.read(&mut bytes)?;
            text.push_str(&String::from_utf8_lossy(&bytes[..length]));
        }
        Ok(text)
    }
}

fn at_terminal(bench: &Bench, coracle: &Runtime, exec: bool) -> Result<()> {
    // A signal ends a read.
    let script = "trap 'stty size' WINCH; trap 'echo interrupted' INT; stty size; \
                  while :; do read line || continue; [ \"$line\" = end ] && break; \
                  echo \"<$line>\"; done; echo over; exit 9";
    let mut terminal = Terminal::open(31, 77)?;
    let child = if exec {
        let bundle = shell(bench, "b", "exec sleep 600", bench.config("c", &[]))?;
        coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
        terminal.spawn(&coracle.words(&["exec", "-t", "c", "/bin/sh", "-c", script]))?
    } else {
        let config = bench.config("c", &[]).set("/process/terminal", true);
        let bundle = shell(bench, "b", script, config)?;
        terminal.spawn(&coracle.words(&words(&bundle, &["c"])))?
    };
    let mut child = child;
    // The outer terminal is raw: one carriage return a line, the inner one's echo alone.
    let text = terminal.expect("\r\n")?;
    ensure!(text == "31 77\r\n", "{text:?}");
    terminal.resize(50, 132)?;
    let text = terminal.expect("\r\n")?;
    ensure!(text == "50 132\r\n", "{text:?}");
    terminal.master.write_all(b"hello\n")?;
    let text = terminal.expect(">\r\n")?;
    ensure!(text == "hello\r\n<hello>\r\n", "{text:?}");
    // ^C is the container's to make a signal of.
    terminal.master.write_all(b"\x03")?;
    let text = terminal.expect("interrupted\r\n")?;
    ensure!(text == "^Cinterrupted\r\n", "{text:?}");
    terminal.master.write_all(b"end\n")?;
    let text = terminal.expect("over\r\n")?;
    ensure!(text == "end\r\nover\r\n", "{text:?}");
    ensure!(child.wait()?.code() == Some(9));
    // As it was before: the echo and the signals are the outer terminal's again.
    let modes = rustix::termios::tcgetattr(&terminal.slave)?;
    ensure!(
        modes
            .local_modes
            .contains(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ISIG)
    );
    coracle.run(&["delete", "--force", "c"])?;
    Ok(())
}

#[test]
fn run_bridges_a_terminal() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    at_terminal(&bench, &bench.coracle()?, false)?;
    bench.finish()
}

#[test]
fn exec_bridges_a_terminal() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    at_terminal(&bench, &bench.coracle()?, true)?;
    bench.finish()
}

#[test]
fn no_byte_of_a_terminal_is_lost() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bytes = (24 << 20).to_string();
    let mut hashes = Vec::new();
    for terminal in [false, true] {
        let config = bench.config("c", &["source", &bytes]);
        let bundle = bench.bundle("b", &config.set("/process/terminal", terminal))?;
        let mut run = coracle
            .command(&words(&bundle, &["c"]))
            .stdout(Stdio::piped())
            .spawn()?;
        let sink = Command::new(binaries::probe()?)
            .arg("sink")
            .stdin(run.stdout.take().context("stdout")?)
            .output()?;
        ensure!(run.wait()?.success());
        hashes.push(String::from_utf8(sink.stdout)?);
    }
    ensure!(hashes[0].starts_with(&format!("{bytes} ")), "{hashes:?}");
    ensure!(hashes[0] == hashes[1], "pipe and terminal: {hashes:?}");
    bench.finish()
}

#[test]
fn container_outlives_a_killed_client() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    let mut run = coracle.command(&words(&bundle, &["c"])).spawn()?;
    wait_for("the container", LIMIT, || {
        Ok(coracle.state("c").ok().filter(|c| c["status"] == "running"))
    })?;
    run.kill()?;
    run.wait()?;
    ensure!(coracle.state("c")?["status"] == "running");
    ensure!(
        coracle
            .try_run(&["exec", "c", "/bin/sh", "-c", "exit 3"])?
            .status
            .code()
            == Some(3)
    );
    coracle.run(&["kill", "c", "KILL"])?;
    coracle.wait_status("c", "stopped")?;
    coracle.run(&["delete", "c"])?;
    bench.finish()
}

#[test]
fn keep_leaves_the_stopped_container() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["exit", "4"]))?;
    let output = coracle.try_run(&words(&bundle, &["--keep", "c"]))?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let state = coracle.state("c")?;
    ensure!(state["status"] == "stopped" && state["pid"] == 0, "{state}");
    coracle.run(&["delete", "c"])?;
    bench.finish()
}

#[test]
fn subreaper_takes_what_the_container_orphans_unless_told_not_to() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let script = "sh -c 'sleep 600 & echo $! > /pid'; sleep 0.3; \
                  grep PPid /proc/$(cat /pid)/status; kill -9 $(cat /pid)";
    let mut config = bench.config("c", &[]);
    let namespaces = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    config = config.set("/linux/namespaces", namespaces).set(
        "/mounts",
        json!([
            {"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]},
        ]),
    );
    let bundle = shell(&bench, "b", script, config)?;
    for (flag, ours) in [("--no-subreaper", false), ("--no-subreaper=false", true)] {
        let run = coracle
            .command(&words(&bundle, &[flag, "c"]))
            .stdout(Stdio::piped())
            .spawn()?;
        let parent = format!("PPid:\t{}\n", run.id());
        let output = run.wait_with_output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(text.starts_with("PPid:\t"), "{text:?}");
        ensure!((text == parent) == ours, "{flag}: {text:?} {parent:?}");
    }
    bench.finish()
}

#[test]
fn descriptors_are_passed_by_number() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    for (name, text) in [("three", "3"), ("four", "4"), ("five", "5")] {
        std::fs::write(bench.dir.join(name), text)?;
    }
    let open = "exec 3<three 4<four 5<five; ";
    let show = "for n in 3 4 5; do cat <&$n 2>/dev/null || printf -; done; \
                echo \" $LISTEN_FDS $LISTEN_PID $LISTEN_FDNAMES\"";
    let at_shell = |script: &str, words: Vec<String>| -> Result<String> {
        let output = Command::new("sh")
            .args(["-c", &format!("{open} {script} exec \"$@\""), "sh"])
            .args(words)
            .current_dir(&bench.dir)
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let bundle = shell(&bench, "b", show, bench.config("c", &[]))?;
    let run = |args: &[&str]| coracle.words(&words(&bundle, &[args, &["c"]].concat()));
    let listen = "export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:b;";
    for (script, args, want) in [
        ("", vec![], "---   \n"),
        ("", vec!["--preserve-fds", "2"], "34-   \n"),
        (listen, vec![], "34- 2 1 \n"),
        (listen, vec!["--preserve-fds", "1"], "345 2 1 \n"),
        // Meant for another process.
        ("export LISTEN_PID=1 LISTEN_FDS=2;", vec![], "---   \n"),
    ] {
        let text = at_shell(script, run(&args))?;
        ensure!(
            text == want,
            "run {script} {args:?}: {text:?}, not {want:?}"
        );
    }
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    for (args, want) in [
        (vec!["exec"], "---   \n"),
        (vec!["exec", "--preserve-fds", "3"], "345   \n"),
    ] {
        let words = coracle.words(&[&args[..], &["c", "/bin/sh", "-c", show]].concat());
        let text = at_shell("", words)?;
        ensure!(text == want, "{args:?}: {text:?}");
    }
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

/// The first descriptor that comes with a message.
fn receive(listener: &UnixListener) -> Result<OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept()?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 64];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    recvmsg(&stream, &mut parts, &mut control, RecvFlags::empty())?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            return fds.next().context("a message without descriptors");
        }
    }
    bail!("no descriptor")
}

#[test]
fn pidfd_socket_gets_the_process() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let socket = bench.dir.join("pidfd.sock");
    let listener = UnixListener::bind(&socket)?;
    let socket = socket.display().to_string();
    let pid_of = |pidfd: &OwnedFd| -> Result<i64> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        Ok(pid.context("no pidfd")?.trim().parse()?)
    };
    let bundle = shell(&bench, "b", "exec sleep 600", bench.config("c", &[]))?;
    let log = bench.dir.join("log");
    coracle.detached(
        &words(&bundle, &["-d", "--pidfd-socket", &socket, "c"]),
        &log,
    )?;
    let pidfd = receive(&listener)?;
    ensure!(coracle.state("c")?["pid"] == pid_of(&pidfd)?);
    let pid_file = bench.dir.join("pid");
    let pid_path = pid_file.display().to_string();
    let exec = [
        "exec",
        "-d",
        "--pidfd-socket",
        &socket,
        "--pid-file",
        &pid_path,
    ];
    coracle.detached(&[&exec[..], &["c", "/bin/sleep", "600"]].concat(), &log)?;
    let pidfd = receive(&listener)?;
    let pid: i64 = std::fs::read_to_string(&pid_file)?.parse()?;
    ensure!(pid == pid_of(&pidfd)?);
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"))?;
    ensure!(comm == "sleep\n", "{comm:?}");
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

/// What a service in the container does; this program is static, and runs there.
#[test]
#[ignore = "runs inside a container of the test below"]
fn tells_that_it_is_ready() -> Result<()> {
    let path = std::env::var("NOTIFY_SOCKET")?;
    let socket = UnixDatagram::unbound()?;
    socket.send_to(b"STATUS=starting\n", &path)?;
    socket.send_to(b"READY=1\nSTATUS=up\n", &path)?;
    Ok(())
}

/// Takes READY, MAINPID and the barrier, and lets the barrier go.
fn manager(socket: &UnixDatagram) -> Result<(String, String)> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut texts = Vec::new();
    loop {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 256];
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let length = recvmsg(socket, &mut parts, &mut control, RecvFlags::empty())?.bytes;
        let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
        let fds = control
            .drain()
            .filter(|message| matches!(message, RecvAncillaryMessage::ScmRights(_)))
            .count();
        if text == "BARRIER=1" {
            ensure!(fds == 1, "a barrier without its pipe");
            let [ready, main_pid] = texts.as_slice() else {
                bail!("before the barrier: {texts:?}");
            };
            return Ok((String::clone(ready), String::clone(main_pid)));
        }
        texts.push(text);
    }
}

#[test]
fn service_manager_is_told_what_the_container_says() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench.config("c", &[]).set("/root/readonly", false);
    let script = "/bin/self --exact tells_that_it_is_ready --ignored >/told 2>&1; exec sleep 600";
    let bundle = shell(&bench, "b", script, config)?;
    std::fs::copy(std::env::current_exe()?, bundle.join("rootfs/bin/self"))?;
    let path = bench.dir.join("manager.sock");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(LIMIT))?;

    let told = || std::fs::read_to_string(bundle.join("rootfs/told")).unwrap_or_default();
    // Detached, the main process is the container's; the command ends once the manager has seen it.
    let mut run = coracle
        .command(&words(&bundle, &["-d", "c"]))
        .env("NOTIFY_SOCKET", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let (ready, main_pid) = manager(&socket).with_context(told)?;
    ensure!(run.wait()?.success());
    ensure!(ready == "READY=1\n", "{ready:?}");
    let pid = coracle.state("c")?["pid"].clone();
    ensure!(main_pid == format!("MAINPID={pid}\n"), "{main_pid:?}");
    coracle.run(&["delete", "--force", "c"])?;

    // In the foreground it is the runtime.
    let mut run = coracle
        .command(&words(&bundle, &["c"]))
        .env("NOTIFY_SOCKET", &path)
        .spawn()?;
    let (_, main_pid) = manager(&socket).with_context(told)?;
    ensure!(
        main_pid == format!("MAINPID={}\n", run.id()),
        "{main_pid:?}"
    );
    coracle.run(&["kill", "c", "KILL"])?;
    ensure!(run.wait()?.code() == Some(137));

    // Created first, `start` passes it on.
    let bundle_text = bundle.display().to_string();
    let create = coracle
        .command(&["create", "-b", &bundle_text, "c"])
        .env("NOTIFY_SOCKET", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(create.success());
    let pid = coracle.state("c")?["pid"].clone();
    let mut start = coracle
        .command(&["start", "c"])
        .env("NOTIFY_SOCKET", &path)
        .spawn()?;
    let (_, main_pid) = manager(&socket).with_context(told)?;
    ensure!(start.wait()?.success());
    ensure!(main_pid == format!("MAINPID={pid}\n"), "{main_pid:?}");
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn exec_takes_over_what_the_container_has() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench
        .config("c", &[])
        .set(
            "/process/user",
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27}),
        )
        .set("/process/cwd", "/tmp")
        .set("/process/oomScoreAdj", 321)
        .set(
            "/process/rlimits",
            json!([
                {"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256},
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
            ]),
        )
        .set(
            "/process/capabilities",
            json!({
                "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"],
                "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
            }),
        )
        .set(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
        )
        .set(
            "/process/scheduler",
            json!({"policy": "SCHED_BATCH", "nice": 7}),
        )
        .set(
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["getcwd"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["swapon"], "action": "SCMP_ACT_ERRNO"},
            ]}),
        );
    let script = "/bin/probe show > /tmp/show; exec sleep 600";
    let bundle = shell(&bench, "b", script, config)?;
    let tmp = bundle.join("rootfs/tmp");
    std::fs::set_permissions(&tmp, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    wait_text(&tmp.join("show"), "\"umask\"")?;
    let own: Value = wait_for("the container's own view", LIMIT, || {
        Ok(serde_json::from_str(&std::fs::read_to_string(tmp.join("show"))?).ok())
    })?;
    let exec = coracle.run(&["exec", "c", "/bin/probe", "show"])?;
    let exec: Value = serde_json::from_str(&exec)?;
    for key in [
        "uids",
        "gids",
        "groups",
        "capabilities",
        "seccomp",
        "seccompFilters",
        "noNewPrivs",
        "umask",
        "cwd",
        "env",
        "hostname",
        "oomScoreAdj",
        "cgroup",
        "mounts",
        "namespaces",
        "rlimits",
        "apparmor",
        "personality",
        "signals",
        "cpusAllowed",
    ] {
        let mut want = own[key].clone();
        // The shell's own.
        if key == "env" {
            want.as_object_mut()
                .map(|env| ["SHLVL", "PWD", "OLDPWD"].map(|name| env.remove(name)));
        }
        ensure!(exec[key] == want, "{key}: {} is not {want}", exec[key]);
    }
    ensure!(
        exec["oomScoreAdj"] == "321" && exec["umask"] == "0027",
        "{exec}"
    );
    let script = "cat /proc/self/stat; ionice -p $$";
    let stat = coracle.run(&["exec", "c", "/bin/sh", "-c", script])?;
    let after = stat.split_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after.split_whitespace().collect();
    // From the state on: nice is the 17th, the policy the 39th.
    ensure!(fields[16] == "7" && fields[38] == "3", "{stat}");
    ensure!(stat.contains("best-effort: prio 6"), "{stat}");
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn exec_flags_say_otherwise() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let config = bench
        .config("c", &[])
        .set("/process/noNewPrivileges", false);
    let bundle = shell(&bench, "b", "exec sleep 600", config)?;
    coracle.detached(&words(&bundle, &["-d", "c"]), &bench.dir.join("log"))?;
    let show = |flags: &[&str]| -> Result<Value> {
        let words = [&["exec"], flags, &["c", "/bin/probe", "show"]].concat();
        Ok(serde_json::from_str(&coracle.run(&words)?)?)
    };
    let plain = show(&[])?;
    ensure!(plain["noNewPrivs"] == "0" && plain["cwd"] == "/", "{plain}");
    let other = show(&[
        "--user",
        "7:8",
        "-g",
        "9",
        "--additional-gids",
        "10",
        "--cwd",
        "/tmp",
        "--no-new-privs",
        "-e",
        "A=1",
        "--env",
        "B=x,y",
        "-e",
        "TERM=dumb",
        "--cap",
        "CAP_CHOWN",
    ])?;
    ensure!(other["uids"] == json!([7, 7, 7, 7]) && other["gids"] == json!([8, 8, 8, 8]));
    ensure!(other["groups"] == json!([9, 10]), "{}", other["groups"]);
    ensure!(other["cwd"] == "/tmp" && other["noNewPrivs"] == "1");
    ensure!(other["env"]["A"] == "1" && other["env"]["B"] == "x,y");
    ensure!(other["env"]["TERM"] == "dumb", "{}", other["env"]);
    let bounding = |value: &Value| -> Result<u64> {
        let text = value["capabilities"]["bounding"]
            .as_str()
            .context("bounding")?;
        Ok(u64::from_str_radix(text, 16)?)
    };
    ensure!(bounding(&other)? == bounding(&plain)? | 1);
    // Without inheritable ones there are no ambient ones.
    ensure!(other["capabilities"]["ambient"] == plain["capabilities"]["ambient"]);

    // A document from a pipe, and what it leaves out.
    let document = json!({"cwd": "/tmp", "user": {"uid": 3, "gid": 4},
        "args": ["/bin/probe", "show"], "env": ["ONLY=this"]});
    let mut child = coracle
        .command(&["exec", "--process", "/dev/stdin", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    stdin.write_all(document.to_string().as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let told: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        told["uids"] == json!([3, 3, 3, 3]) && told["cwd"] == "/tmp",
        "{told}"
    );
    ensure!(told["env"]["ONLY"] == "this" && told["env"]["TERM"].is_null());
    ensure!(told["capabilities"]["bounding"] == plain["capabilities"]["bounding"]);
    ensure!(told["rlimits"] == plain["rlimits"]);

    coracle.run(&["pause", "c"])?;
    let refused = coracle.refused(&["exec", "c", "/bin/probe", "true"])?;
    ensure!(
        refused.contains("cannot exec in a paused container"),
        "{refused}"
    );
    let mut child = coracle
        .command(&["exec", "--ignore-paused", "c", "/bin/probe", "exit", "3"])
        .spawn()?;
    std::thread::sleep(Duration::from_millis(200));
    coracle.run(&["resume", "c"])?;
    ensure!(child.wait()?.code() == Some(3));
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}
