//! What processes read and write: CRI logs, attachments, FIFOs, files, logging binaries and
//! terminals.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::proto::containerd::task::v2 as task;
use support::proto::coracle::shim::v1 as private;
use support::*;

fn finish(mut pod: Pod, container: &str) {
    // Both may have happened in the test itself.
    let _ = pod.kill(container, "", 9);
    pod.wait(container, "").unwrap();
    pod.delete(container, "").unwrap();
    pod.shutdown();
}

fn attach(pod: &mut Pod, stdin: Option<BorrowedFd<'_>>, stdout: Option<BorrowedFd<'_>>) {
    let request = private::AttachRequest {
        id: pod.id("a"),
        stdin: stdin.is_some(),
        stdout: stdout.is_some(),
        stderr: false,
    };
    let fds: Vec<BorrowedFd<'_>> = stdin.into_iter().chain(stdout).collect();
    pod.client
        .private::<private::AttachResponse>("Attach", &request, &fds)
        .unwrap();
}

fn read_some(file: &mut File) -> String {
    let mut bytes = [0u8; 4096];
    let n = file.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

#[test]
fn clients_attach_detach_and_attach_again() {
    let Some(mut pod) = Pod::new("attach") else {
        return;
    };
    let script = "while read l; do echo got $l; done; echo end";
    let mut request = pod.request("a", &pod.config("a", script));
    request.stdin = "attach:".to_owned();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    for round in ["one", "two"] {
        let (stdin, stdin_write) = pipe();
        let (mut out, out_write) = pipe();
        attach(&mut pod, Some(stdin.as_fd()), Some(out_write.as_fd()));
        drop((stdin, out_write));
        rustix::io::write(&stdin_write, format!("{round}\n").as_bytes()).unwrap();
        assert_eq!(read_some(&mut out), format!("got {round}\n"));
    }
    // Both are gone and the process lives.
    assert_eq!(pod.state("a").unwrap().status, 2);
    let (out, out_write) = pipe();
    attach(&mut pod, None, Some(out_write.as_fd()));
    drop(out_write);
    pod.client
        .call::<()>(
            "CloseIO",
            &task::CloseIoRequest {
                id: pod.id("a"),
                exec_id: String::new(),
                stdin: true,
            },
        )
        .unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(text(out), "end\n");
    assert_eq!(
        pod.lines("a"),
        ["stdout F got one", "stdout F got two", "stdout F end"]
    );
    finish(pod, "a");
}

#[test]
fn input_once_ends_with_the_first_client() {
    let Some(mut pod) = Pod::new("once") else {
        return;
    };
    let mut request = pod.request("a", &pod.config("a", "busybox wc -c"));
    request.stdin = "attach:once".to_owned();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let (stdin, stdin_write) = pipe();
    attach(&mut pod, Some(stdin.as_fd()), None);
    drop(stdin);
    // More than any pipe holds.
    let mut writer = File::from(stdin_write);
    writer.write_all(&vec![b'x'; 3 << 20]).unwrap();
    drop(writer);
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(pod.lines("a"), [format!("stdout F {}", 3 << 20)]);
    finish(pod, "a");
}

#[test]
fn client_that_does_not_read_is_dropped_and_the_log_is_whole() {
    let Some(mut pod) = Pod::new("slow") else {
        return;
    };
    let script = "read x; i=0; while [ $i -lt 20000 ]; do echo line $i $PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH$PATH; i=$((i+1)); done";
    let mut request = pod.request("a", &pod.config("a", script));
    request.stdin = "attach:".to_owned();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let (stdin, stdin_write) = pipe();
    let (out, out_write) = pipe();
    attach(&mut pod, Some(stdin.as_fd()), Some(out_write.as_fd()));
    drop((stdin, out_write));
    rustix::io::write(&stdin_write, b"\n").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    let lines = pod.lines("a");
    assert_eq!(lines.len(), 20_000);
    for (i, line) in lines.iter().enumerate() {
        assert!(line.starts_with(&format!("stdout F line {i} ")), "{line}");
    }
    // What the client has is a piece of the beginning, and then the end.
    assert!(text(out).starts_with("line 0 "));
    finish(pod, "a");
}

#[test]
fn rotation_loses_and_splits_no_line() {
    let Some(mut pod) = Pod::new("rotate") else {
        return;
    };
    let script = "i=0; while [ $i -lt 30000 ]; do echo $i; i=$((i+1)); done";
    pod.run("a", script);
    let log = pod.log("a");
    let mut parts: Vec<PathBuf> = Vec::new();
    let request = private::ReopenLogRequest { id: pod.id("a") };
    while pod.state("a").unwrap().status == 2 {
        let old = log.with_extension(parts.len().to_string());
        fs::rename(&log, &old).unwrap();
        parts.push(old);
        pod.client
            .private::<private::ReopenLogResponse>("ReopenLog", &request, &[])
            .unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    pod.wait("a", "").unwrap();
    parts.push(log);
    assert!(parts.len() > 3, "rotated {} times", parts.len());
    let all: String = parts
        .iter()
        .map(|p| fs::read_to_string(p).unwrap())
        .collect();
    let numbers: Vec<usize> = all
        .lines()
        .map(|l| l.rsplit_once(' ').unwrap().1.parse().unwrap())
        .collect();
    assert!(
        numbers.iter().copied().eq(0..30_000),
        "{} lines",
        numbers.len()
    );
    finish(pod, "a");
}

#[test]
fn pipe_held_by_another_process_delays_the_exit_two_seconds_at_most() {
    let Some(mut pod) = Pod::new("held") else {
        return;
    };
    pod.run("a", "sleep 100");
    let request = {
        let mut request = pod.exec_request("a", "e", "sleep 50 & echo out; exit 3");
        let fifo = pod.dir.join("fifo");
        assert!(
            Command::new("mkfifo")
                .arg(&fifo)
                .status()
                .unwrap()
                .success()
        );
        request.stdout = fifo.display().to_string();
        request
    };
    let fifo = request.stdout.clone();
    let reader = std::thread::spawn(move || {
        let begin = Instant::now();
        (text(File::open(fifo).unwrap()), begin.elapsed())
    });
    pod.client.call::<()>("Exec", &request).unwrap();
    pod.start("a", "e").unwrap();
    let begin = Instant::now();
    assert_eq!(pod.wait("a", "e").unwrap(), 3);
    assert!(begin.elapsed() < Duration::from_secs(1));
    let (out, took) = reader.join().unwrap();
    assert_eq!(out, "out\n");
    assert!(took < Duration::from_secs(4), "{took:?}");
    pod.delete("a", "e").unwrap();
    finish(pod, "a");
}

#[test]
fn fifos_survive_their_reader_and_files_are_appended() {
    let Some(mut pod) = Pod::new("fifo") else {
        return;
    };
    let script = "echo one; read x; echo two $x; echo e >&2";
    let mut request = pod.request("a", &pod.config("a", script));
    let path = |name: &str| pod.dir.join(name).display().to_string();
    let (stdin, stdout) = (path("in"), path("out"));
    for fifo in [&stdin, &stdout] {
        assert!(Command::new("mkfifo").arg(fifo).status().unwrap().success());
    }
    request.stdin = stdin.clone();
    request.stdout = stdout.clone();
    request.stderr = format!("file://{}", path("err"));
    fs::write(path("err"), "before\n").unwrap();
    let err = path("err");
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    // The first reader and writer go away: no end of input, no SIGPIPE.
    let mut first = File::open(&stdout).unwrap();
    assert_eq!(read_some(&mut first), "one\n");
    drop(first);
    drop(File::create(&stdin).unwrap());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(pod.state("a").unwrap().status, 2);
    let second = File::open(&stdout).unwrap();
    File::create(&stdin).unwrap().write_all(b"word\n").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(text(second), "two word\n");
    assert_eq!(fs::read_to_string(err).unwrap(), "before\ne\n");
    finish(pod, "a");
}

fn script(path: &Path, body: &str) {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn logging_binary_gets_both_streams() {
    let Some(mut pod) = Pod::new("binary") else {
        return;
    };
    let logger = pod.dir.join("logger");
    let out = pod.dir.join("logged");
    let body = format!(
        "exec 5>&-; echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\" > {0}; cat <&3 >> {0}; cat <&4 >> {0}",
        out.display()
    );
    script(&logger, &body);
    let mut request = pod.request("a", &pod.config("a", "echo o; echo e >&2"));
    request.stdout = format!("binary://{}?key=value&flag", logger.display());
    request.stderr = request.stdout.clone();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    let want = format!("{} test key value flag\no\ne\n", pod.id("a"));
    wait_until("the logger", || {
        fs::read_to_string(&out).is_ok_and(|t| t == want)
    });
    pod.delete("a", "").unwrap();
    // One that ends before it is ready, and one that is not there.
    script(&logger, "exit 1");
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("logging binary"), "{error:?}");
    request.stdout = "binary:///nonexistent/logger".to_owned();
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("/nonexistent/logger"), "{error:?}");
    pod.shutdown();
}

#[test]
fn terminal_output_is_logged_attached_and_resized() {
    let Some(mut pod) = Pod::new("tty") else {
        return;
    };
    let script = "read x; busybox stty size; echo $x";
    let mut config = pod.config("a", script);
    config["process"]["terminal"] = true.into();
    let mut request = pod.request("a", &config);
    request.terminal = true;
    request.stdin = "attach:".to_owned();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let resize = task::ResizePtyRequest {
        id: pod.id("a"),
        exec_id: String::new(),
        width: 91,
        height: 37,
    };
    pod.client.call::<()>("ResizePty", &resize).unwrap();
    let (stdin, stdin_write) = pipe();
    let (out, out_write) = pipe();
    attach(&mut pod, Some(stdin.as_fd()), Some(out_write.as_fd()));
    drop((stdin, out_write));
    rustix::io::write(&stdin_write, b"word\n").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(text(out), "word\r\n37 91\r\nword\r\n");
    assert_eq!(
        pod.lines("a"),
        ["stdout F word\r", "stdout F 37 91\r", "stdout F word\r"]
    );
    finish(pod, "a");
}

#[test]
fn terminal_exec_copies_between_console_and_passed_descriptors() {
    let Some(mut pod) = Pod::new("ttyexec") else {
        return;
    };
    pod.run("a", "sleep 100");
    let fds = open_fds(pod.shim_pid());
    let mut request = pod.exec_request("a", "e", "busybox tty; read x; echo got $x; exit 9");
    request.terminal = true;
    request.stdin = "fd:".to_owned();
    request.stdout = "fd:".to_owned();
    let (stdin, stdin_write) = pipe();
    let (out, out_write) = pipe();
    pod.client
        .send(TASK, "Exec", &request, &[stdin.as_fd(), out_write.as_fd()]);
    pod.client.receive::<()>().unwrap();
    drop((stdin, out_write));
    pod.start("a", "e").unwrap();
    rustix::io::write(&stdin_write, b"hi\n").unwrap();
    assert_eq!(pod.wait("a", "e").unwrap(), 9);
    pod.delete("a", "e").unwrap();
    let out = text(out);
    assert!(
        out.contains("/dev/pts/") && out.contains("got hi\r\n"),
        "{out:?}"
    );
    drop(stdin_write);
    wait_until("descriptors to be closed", || {
        open_fds(pod.shim_pid()) == fds
    });
    finish(pod, "a");
}

#[test]
fn full_disk_under_the_log_does_not_stop_the_container() {
    let Some(mut pod) = Pod::new("full") else {
        return;
    };
    let small = pod.dir.join("small");
    fs::create_dir(&small).unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&small)
        .status();
    assert!(status.unwrap().success());
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 6";
    let mut request = pod.request("a", &pod.config("a", script));
    request.stdout = format!("cri-log://{}", small.join("log").display());
    request.stderr = request.stdout.clone();
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 6);
    let dropped = pod.status("a").log_bytes_dropped;
    let kept = fs::read(small.join("log")).unwrap();
    assert!(kept.ends_with(b"\n"), "a line is torn");
    assert!(dropped > 0 && !kept.is_empty());
    // Reported once, not with every write.
    let journal = pod.dir.join("sandbox/shim.log");
    let reports = fs::read_to_string(&journal).unwrap();
    assert!(
        reports.contains("is lost: No space left on device") && reports.lines().count() <= 2,
        "{reports}"
    );
    fs::remove_file(&journal).unwrap();
    pod.delete("a", "").unwrap();
    assert!(
        Command::new("umount")
            .arg(&small)
            .status()
            .unwrap()
            .success()
    );
    pod.shutdown();
}

#[test]
fn output_of_a_fast_process_is_all_there_when_wait_answers() {
    let Some(mut pod) = Pod::new("flood") else {
        return;
    };
    pod.run(
        "a",
        "busybox dd if=/dev/zero bs=1M count=20 2>/dev/null | busybox tr '\\0' x; echo; echo end",
    );
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    let lines = pod.lines("a");
    let text: usize = lines[..lines.len() - 1]
        .iter()
        .map(|l| l.len() - "stdout F ".len())
        .sum();
    assert_eq!(text, 20 << 20);
    assert_eq!(lines.last().unwrap(), "stdout F end");
    assert_eq!(lines.len(), 20 * 64 + 1);
    finish(pod, "a");
}

#[test]
fn background_writer_does_not_keep_an_exit_from_being_told() {
    let Some(mut pod) = Pod::new("noisy") else {
        return;
    };
    pod.run("a", "sleep 100");
    let log = format!("cri-log://{}", pod.dir.join("exec.log").display());
    let mut request =
        pod.exec_request("a", "e", "while :; do echo noise; done & echo mine; exit 8");
    request.stdout = log.clone();
    request.stderr = log;
    pod.client.call::<()>("Exec", &request).unwrap();
    pod.start("a", "e").unwrap();
    let begin = Instant::now();
    assert_eq!(pod.wait("a", "e").unwrap(), 8);
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    assert!(
        fs::read_to_string(pod.dir.join("exec.log"))
            .unwrap()
            .contains("stdout F mine")
    );
    pod.delete("a", "e").unwrap();
    finish(pod, "a");
}
