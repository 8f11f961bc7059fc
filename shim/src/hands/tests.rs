use std::fs::File;
use std::os::fd::OwnedFd;

use prost::Message;

use super::serve::answer;
use super::{What, wire};

fn ask(what: Option<What>, fds: &[OwnedFd]) -> wire::Answer {
    answer(&wire::Request { what }.encode_to_vec(), fds).0
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn start(program: &str) -> wire::Start {
    wire::Start {
        program: program.into(),
        args: vec![program.into()],
        ..Default::default()
    }
}

#[test]
fn a_bad_request_gets_an_answer() {
    let no_name = wire::Start::default();
    let relative = start("true");
    let hidden_zero = start("/bin/true\0x");
    let mut zero = start("/bin/true");
    zero.args.push(b"a\0b".to_vec());
    let mut preload = start("/bin/true");
    preload.env.push(b"LD_PRELOAD=/tmp/x.so".to_vec());
    let mut nameless = start("/bin/true");
    nameless.env.push(Vec::new());
    let mut missing = start("/bin/true");
    missing.targets.push(0);
    let mut far = start("/bin/true");
    far.targets.push(1 << 30);
    let mut negative = start("/bin/true");
    negative.targets.push(-1);
    let cases = [
        (no_name, 0, "not an absolute path"),
        (relative, 0, "not an absolute path"),
        (hidden_zero, 0, "not an absolute path"),
        (zero, 0, "nul byte"),
        (preload, 0, "LD_PRELOAD=/tmp/x.so: unknown variable"),
        (nameless, 0, "unknown variable"),
        (missing, 0, "not as many as numbers"),
        (start("/bin/true"), 1, "not as many as numbers"),
        (far, 1, "out of range"),
        (negative, 1, "out of range"),
    ];
    for (start, fds, want) in cases {
        let fds: Vec<OwnedFd> = (0..fds).map(|_| null()).collect();
        let got = ask(Some(What::Start(start)), &fds);
        assert_eq!((got.pid, got.code), (0, 3), "{want}: {}", got.text);
        assert!(got.text.contains(want), "{}", got.text);
    }
    let relative = wire::Unmount {
        target: b"x".to_vec(),
        rootfs: true,
    };
    assert_eq!(ask(Some(What::Unmount(relative)), &[]).code, 3);
    assert_eq!(ask(Some(What::Mount(wire::Mount::default())), &[]).code, 3);
    assert_eq!(ask(Some(What::Owner(wire::Owner::default())), &[]).code, 3);
    assert_eq!(ask(None, &[]).code, 3);
}

/// Every cut of a good request, and every one of its bytes changed.
#[test]
fn no_bytes_crash_the_hands() {
    let mut unmount = wire::Request {
        what: Some(What::Unmount(wire::Unmount {
            target: b"/nonexistent/coracle/hands".to_vec(),
            rootfs: false,
        })),
    }
    .encode_to_vec();
    let whole = answer(&unmount, &[]).0;
    assert_eq!((whole.code, whole.done), (0, true));
    for length in 0..unmount.len() {
        assert_eq!(answer(&unmount[..length], &[]).0.code, 3, "{length}");
    }
    // The path may be another one by that, but it stays one that is not there. The first byte says
    // what is asked for, and no other thing is to be done here.
    for at in 1..unmount.len() {
        for bit in 0..8 {
            unmount[at] ^= 1 << bit;
            answer(&unmount, &[]);
            unmount[at] ^= 1 << bit;
        }
    }
}
