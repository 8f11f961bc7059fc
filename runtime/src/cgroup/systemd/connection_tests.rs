use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};

use super::*;

/// A dbus-daemon of the test's own.
pub(in crate::cgroup::systemd) struct Daemon {
    child: Child,
    _dir: tempfile::TempDir,
    pub socket: Socket,
}

impl Daemon {
    /// `None`, said on the terminal, where there is none installed.
    pub fn start(test: &str) -> Option<Daemon> {
        use std::io::{BufRead as _, Write as _};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        let config = dir.path().join("conf");
        let text = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
            "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
            <busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>
            <policy context="default"><allow send_destination="*" eavesdrop="true"/>
            <allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"#,
            path.display()
        );
        std::fs::write(&config, text).unwrap();
        let spawned = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile", "--print-address"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                // Past the capture of the test harness, which only replaces print!.
                let _ = write!(std::io::stdout(), "\nSKIP {test}: dbus-daemon: {error}\n");
                return None;
            }
        };
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.starts_with("unix:"), "dbus-daemon: {line:?}");
        Some(Daemon {
            child,
            _dir: dir,
            socket: Socket::Path(path),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn calls_over_a_real_bus() {
    let Some(daemon) = Daemon::start("calls_over_a_real_bus") else {
        return;
    };
    let mut connection = Connection::bus(&daemon.socket).unwrap();
    assert!(connection.name.starts_with(":1."), "{}", connection.name);
    assert_eq!(
        connection.user_on_bus().unwrap(),
        Some(rustix::process::getuid().as_raw())
    );
    let reply = connection
        .call(bus_target(), "ListNames", Vec::new())
        .unwrap();
    let Some(Value::Array(_, names)) = reply.body.first() else {
        panic!("{reply:?}")
    };
    assert!(names.contains(&Value::text(connection.name.clone())));

    let error = connection
        .call(
            bus_target(),
            "GetNameOwner",
            vec![Value::text("no.such.name")],
        )
        .unwrap_err();
    assert_eq!(
        Refusal::name_of(&error),
        Some("org.freedesktop.DBus.Error.NameHasNoOwner")
    );

    connection
        .add_match("type='signal',member='NameOwnerChanged'")
        .unwrap();
    let other = Connection::bus(&daemon.socket).unwrap();
    let far = Instant::now() + Duration::from_secs(20);
    let seen = connection
        .signal(far, |signal| {
            signal.member == "NameOwnerChanged"
                && signal.body.first().and_then(Value::as_text) == Some(&other.name)
        })
        .unwrap();
    assert!(seen.is_some());
    let none = connection
        .signal(Instant::now() + Duration::from_millis(20), |_| false)
        .unwrap();
    assert_eq!(none, None);
}

/// A peer that says what it is told to.
fn peer(script: impl FnOnce(UnixStream) + Send + 'static) -> (tempfile::TempDir, Socket) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || script(listener.accept().unwrap().0));
    (dir, Socket::Path(path))
}

#[test]
fn odd_peers_are_refused() {
    use std::io::Write as _;
    let long = vec![b'x'; 3000];
    let answers: [&[u8]; 5] = [
        b"REJECTED EXTERNAL\r\n",
        b"DATA\r\nREJECTED\r\n",
        b"DATA\r\nERROR\r\n",
        b"",
        &long,
    ];
    for answer in answers.map(<[u8]>::to_vec) {
        let (_dir, socket) = peer(move |mut stream| {
            let _ = stream.write_all(&answer);
        });
        let error = Connection::direct(&socket).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.starts_with("D-Bus authentication: "), "{text}");
    }
}

#[test]
fn malformed_answers_end_the_call() {
    use std::io::{Read as _, Write as _};
    for answer in [
        &b"x23456789012345678"[..],
        b"l\x02\x00\x01\xff\xff\xff\x7f\0\0\0\0\0\0\0\0",
    ] {
        let (_dir, socket) = peer(move |mut stream| {
            let _ = stream.write_all(b"DATA\r\nOK 1234\r\n");
            let _ = stream.write_all(answer);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let mut connection = Connection::direct(&socket).unwrap();
        let error = connection
            .call(bus_target(), "Hello", Vec::new())
            .unwrap_err();
        assert!(format!("{error:#}").contains("malformed"), "{error:#}");
    }
}

#[test]
fn nobody_there_is_told_with_the_path() {
    let error = Connection::bus(&Socket::Path("/nonexistent/bus".into())).unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "connect to D-Bus socket /nonexistent/bus: no such file or directory"
    );
}
