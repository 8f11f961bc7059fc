//! Exec, attach, port-forward and logs: what flows, and that none of it is lost.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::registry::free_port;
use coracle_integration::world::{Pod, TOOLS, World, feed, sha256};

fn sleeper() -> Result<(World, Pod, String)> {
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("streams")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    Ok((world, pod, id))
}

#[test]
fn exec_exit_code_and_both_outputs_come_back() -> Result<()> {
    need_root!();
    let (world, _, id) = sleeper()?;
    for sync in [&["exec"][..], &["exec", "--sync"]] {
        let script = "echo out; echo err >&2; exit 7";
        let args = [sync, &[&id, "sh", "-c", script]].concat();
        let output = world.crictl.try_run(&args)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        // crictl drops the output of a failed exec --sync.
        ensure!(stdout == "out\n" || sync.len() == 2, "{sync:?}: {output:?}");
        ensure!(stderr.contains("err"), "{sync:?}: {output:?}");
        ensure!(!output.status.success(), "{sync:?}: {output:?}");
        ensure!(
            stderr.contains('7') || output.status.code() == Some(7),
            "{sync:?}: {output:?}"
        );
    }
    world.finish()
}

#[test]
fn exec_100_mib_through_stdin_arrive_whole() -> Result<()> {
    need_root!();
    let (world, _, id) = sleeper()?;
    let file = world.dir.join("big");
    let mut bytes = vec![0u8; 100 << 20];
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    std::fs::write(&file, &bytes)?;
    let started = Instant::now();
    let output = feed(
        &mut world.crictl.command(&["exec", "-i", &id, "probe", "sink"]),
        &bytes,
    )?;
    ensure!(output.status.success(), "{output:?}");
    let want = format!("{} {}\n", bytes.len(), sha256(&file)?);
    let got = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(got == want, "sent {want}, arrived {got}");
    ensure!(started.elapsed() < Duration::from_secs(60));
    // And out again.
    let output = world.try_exec(&id, &["probe", "source", "104857600"])?;
    ensure!(
        output.stdout.len() == 100 << 20,
        "{} bytes came",
        output.stdout.len()
    );
    world.finish()
}

#[test]
fn exec_sync_timeout_kills_the_process_tree() -> Result<()> {
    need_root!();
    let (world, _, id) = sleeper()?;
    let started = Instant::now();
    let script = "sleep 987 & sleep 988";
    let args = ["exec", "--sync", "--timeout", "1", &id, "sh", "-c", script];
    let error = world.crictl.refused(&args)?;
    ensure!(
        started.elapsed() < Duration::from_secs(8),
        "{:?}",
        started.elapsed()
    );
    ensure!(
        error.contains("DeadlineExceeded") || error.contains("timed out"),
        "{error}"
    );
    coracle_integration::wait_for("the tree's end", Duration::from_secs(5), || {
        let processes = world.exec(&id, &["ps", "-o", "args"])?;
        Ok((!processes.contains("sleep 98")).then_some(()))
    })?;
    world.finish()
}

#[test]
fn exec_sync_child_that_keeps_stdout_does_not_hold_it() -> Result<()> {
    need_root!();
    let (world, _, id) = sleeper()?;
    let started = Instant::now();
    let output = world.exec_sync(&id, &["sh", "-c", "sleep 30 & echo done"])?;
    ensure!(output == "done", "{output}");
    ensure!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    world.finish()
}

#[test]
fn exec_with_a_terminal_has_one() -> Result<()> {
    need_root!();
    let (world, _, id) = sleeper()?;
    // script gives crictl a terminal of its own.
    let command = format!(
        "{} --config {} exec -it {id} sh -c 'tty; exit 3'",
        coracle_integration::binaries::crictl()?.display(),
        world.dir.join("crictl.yaml").display()
    );
    let output = std::process::Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("/dev/pts/"), "{text}");
    world.finish()
}

#[test]
fn attach_sees_output_and_feeds_stdin() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("attach")?;
    let config = container(
        "cat",
        TOOLS,
        &["sh", "-c", "while read l; do echo got $l; done"],
    )
    .set("/stdin", true);
    let id = world.start_container(&pod, &config)?;
    let mut child = world
        .crictl
        .command(&["attach", "-i", &id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    stdin.write_all(b"one\ntwo\n")?;
    world.wait_log(&id, "got two")?;
    let mut output = vec![0; 16];
    let mut stdout = child.stdout.take().context("stdout")?;
    stdout.read_exact(&mut output)?;
    ensure!(
        output == b"got one\ngot two\n",
        "{}",
        String::from_utf8_lossy(&output)
    );
    child.kill()?;
    child.wait()?;
    drop(stdin);
    // stdin_once was not asked for: the container still reads.
    ensure!(world.container_status(&id)?["state"] == "CONTAINER_RUNNING");
    world.finish()
}

#[test]
fn port_forward_carries_bytes_both_ways() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("forward")?;
    let id = world.tools(&pod, "echo", &["probe", "echo", "7000"])?;
    world.wait_log(&id, "echo on")?;
    let port = free_port()?;
    let mut child = world
        .crictl
        .command(&["port-forward", &pod.id, &format!("{port}:7000")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stream = coracle_integration::wait_for("the port", Duration::from_secs(10), || {
        Ok(TcpStream::connect(("127.0.0.1", port)).ok())
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let sent: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut writer = stream.try_clone()?;
    let copy = sent.clone();
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        writer.write_all(&copy)?;
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got)?;
    thread.join().ok().context("writer")??;
    ensure!(
        got == sent,
        "{} of {} bytes came back",
        got.len(),
        sent.len()
    );
    child.kill()?;
    child.wait()?;
    world.finish()
}

#[test]
fn log_rotation_loses_no_line() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("rotation")?;
    let total = 20_000;
    let id = world.tools(
        &pod,
        "writer",
        &["probe", "lines", &total.to_string(), "100"],
    )?;
    let path = world.log_path(&id)?;
    let mut rotated = Vec::new();
    for n in 0..5 {
        std::thread::sleep(Duration::from_millis(250));
        let old = path.with_extension(format!("log.{n}"));
        std::fs::rename(&path, &old)?;
        world.crictl.run(&["logs", "--reopen", &id])?;
        rotated.push(old);
    }
    world.wait_exited(&id)?;
    let mut next = 0;
    for file in rotated.iter().chain([&path]) {
        let text = std::fs::read_to_string(file)?;
        for line in coracle_integration::crictl::parse_log(&text)? {
            ensure!(
                line.text == format!("line {next}"),
                "{}: {line:?}, want {next}",
                file.display()
            );
            next += 1;
        }
    }
    ensure!(next == total, "{next} of {total} lines");
    world.finish()
}

#[test]
fn log_lines_long_and_unfinished_are_marked_partial() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("partial")?;
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo err >&2; printf tail";
    let id = world.tools(&pod, "c", &["sh", "-c", script])?;
    world.wait_exited(&id)?;
    let lines = world.log_lines(&id)?;
    let out: Vec<_> = lines.iter().filter(|l| l.stream == "stdout").collect();
    let whole: String = out
        .iter()
        .take_while(|l| l.text != "tail")
        .map(|l| l.text.as_str())
        .collect();
    ensure!(whole.len() == 40000, "{} bytes", whole.len());
    ensure!(
        out[0].partial && out[0].text.len() == 16384,
        "{} bytes first",
        out[0].text.len()
    );
    let last = out.last().context("no line")?;
    ensure!(last.text == "tail" && last.partial, "{last:?}");
    ensure!(
        lines
            .iter()
            .any(|l| l.stream == "stderr" && l.text == "err" && !l.partial)
    );
    world.finish()
}

#[test]
fn log_flood_is_whole_and_in_order() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("flood")?;
    let id = world.tools(&pod, "c", &["probe", "flood", "200000", "100"])?;
    world.wait_exited(&id)?;
    let lines = world.log_lines(&id)?;
    ensure!(lines.len() == 200_000, "{} lines", lines.len());
    for (n, line) in lines.iter().enumerate() {
        ensure!(
            line.text.starts_with(&format!("line {n} ")) && line.text.len() == 99,
            "{n}: {line:?}"
        );
    }
    world.finish()
}
