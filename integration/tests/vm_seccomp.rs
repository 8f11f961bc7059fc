//! Seccomp on the guest's kernel: the listener of a NOTIFY profile gets the descriptor and the
//! state, and decides over the call.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::need_guest;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

/// One message and the descriptors that came with it.
fn receive(stream: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 64 * 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    bytes.truncate(received.bytes);
    Ok((bytes, fds))
}

fn profile(path: &str) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": path,
        "listenerMetadata": "for the agent",
        "syscalls": [{"names": ["unshare"], "action": "SCMP_ACT_NOTIFY"}],
    })
}

#[test]
fn notify_hands_descriptor_and_state_to_the_listener() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let socket = bench.dir.join("agent.sock");
    let listener = UnixListener::bind(&socket)?;
    let config = bench
        .config("c", &["unshare", "net"])
        .set("/linux/seccomp", profile(&socket.display().to_string()))
        .set("/annotations", json!({"org.example.key": "value"}));
    let bundle = bench.bundle("b", &config)?;
    let run = coracle
        .command(&["run", "-b", &bundle.display().to_string(), "c"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stream, _) = listener.accept()?;
    let (bytes, fds) = receive(&stream)?;
    let told: Value = serde_json::from_slice(&bytes).context("the state for the agent")?;
    ensure!(
        fds.len() == 1 && told["fds"] == json!(["seccompFd"]),
        "{told}"
    );
    let link = rustix::fs::readlink(
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fds[0])),
        Vec::new(),
    )?;
    ensure!(link.to_str() == Ok("anon_inode:seccomp notify"), "{link:?}");
    ensure!(told["metadata"] == "for the agent", "{told}");
    ensure!(told["state"]["id"] == "c", "{told}");
    ensure!(told["state"]["status"] == "creating", "{told}");
    ensure!(
        told["state"]["annotations"]["org.example.key"] == "value",
        "{told}"
    );
    let pid = told["pid"].as_i64().context("a pid")?;
    ensure!(told["state"]["pid"] == pid, "{told}");
    ensure!(
        std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "{told}"
    );

    // A listener that goes away leaves calls without an answer: the kernel says ENOSYS.
    drop((fds, stream));
    let output = run.wait_with_output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(
        said.contains("ENOSYS") || said.contains("os error 38"),
        "{said}"
    );
    bench.finish()
}

#[test]
fn notify_without_a_listener_stops_the_start() -> Result<()> {
    need_guest!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let socket = bench.dir.join("nobody.sock").display().to_string();
    let config = bench
        .config("c", &["true"])
        .set("/linux/seccomp", profile(&socket));
    let bundle = bench.bundle("b", &config)?.display().to_string();
    let error = coracle.refused(&["run", "-b", &bundle, "c"])?;
    ensure!(error.contains("nobody.sock"), "{error}");
    ensure!(coracle.run(&["list", "-q"])?.is_empty());
    bench.finish()
}
