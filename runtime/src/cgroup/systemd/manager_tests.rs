//! The manager's calls against an imitation of systemd on a real bus.

use std::sync::mpsc;
use std::thread::JoinHandle;

use super::super::connection::tests::Daemon;
use super::super::wire::Kind as MessageKind;
use super::*;

/// What the imitation does with a StartTransientUnit or StopUnit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Ends at once, with this result.
    Ends(&'static str),
    /// Is refused with this error of systemd's.
    Refused(&'static str),
}

/// systemd as far as the manager knows it: answers from a list, notes what it was asked.
struct Imitation {
    asked: mpsc::Receiver<Message>,
    _thread: JoinHandle<()>,
}

fn imitate(daemon: &Daemon, jobs: Vec<Job>) -> Imitation {
    let mut connection = Connection::bus(&daemon.socket).unwrap();
    connection.own("org.freedesktop.systemd1").unwrap();
    let (note, asked) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut jobs = jobs.into_iter();
        let mut number = 0;
        while let Ok(call) = connection.next_call() {
            let answer = match call.member.as_str() {
                "StartTransientUnit" | "StopUnit" => {
                    number += 1;
                    Some((jobs.next().unwrap_or(Job::Ends("done")), number))
                }
                _ => None,
            };
            let _ = note.send(call.clone());
            let property = call.body.get(1).and_then(Value::as_text);
            match (answer, property) {
                (Some((Job::Refused(name), _)), _) => {
                    connection.refuse(&call, &format!("org.freedesktop.systemd1.{name}"));
                }
                (Some((Job::Ends(result), number)), _) => {
                    let path = format!("/org/freedesktop/systemd1/job/{number}");
                    connection.answer(&call, vec![Value::Path(path.clone())]);
                    // Of another job, and of another sort, first.
                    for (member, path) in [
                        ("JobRemoved", "/org/freedesktop/systemd1/job/0".to_owned()),
                        ("JobNew", path.clone()),
                        ("JobRemoved", path),
                    ] {
                        let body = vec![
                            Value::U32(number),
                            Value::Path(path),
                            Value::text("x.scope"),
                            Value::text(result),
                        ];
                        connection.emit(PATH, MANAGER, member, body);
                    }
                }
                (None, Some("Version")) => {
                    connection.answer(&call, vec![Value::text("257.4-1").variant()]);
                }
                (None, Some("ControlGroup")) => {
                    let path = "/user.slice/user-7.slice/user@7.service";
                    connection.answer(&call, vec![Value::text(path).variant()]);
                }
                (None, _) => connection.answer(&call, Vec::new()),
            }
        }
    });
    Imitation {
        asked,
        _thread: thread,
    }
}

impl Imitation {
    fn members(&self) -> Vec<String> {
        self.asked.try_iter().map(|call| call.member).collect()
    }
}

/// The other side of the protocol, for tests only.
impl Connection {
    fn own(&mut self, name: &str) -> Result<()> {
        let target = Target {
            destination: "org.freedesktop.DBus",
            path: "/org/freedesktop/DBus",
            interface: "org.freedesktop.DBus",
        };
        let body = vec![Value::text(name), Value::U32(4)];
        self.call(target, "RequestName", body).map(|_| ())
    }

    fn next_call(&mut self) -> Result<Message> {
        loop {
            let message = self.next(Instant::now() + Duration::from_secs(20))?;
            if message.kind == MessageKind::Call {
                return Ok(message);
            }
        }
    }

    fn answer(&mut self, call: &Message, body: Vec<Value>) {
        self.put(Message {
            reply_to: call.serial,
            destination: call.sender.clone(),
            body,
            ..Message::empty(MessageKind::Return, 0)
        });
    }

    fn refuse(&mut self, call: &Message, name: &str) {
        self.put(Message {
            reply_to: call.serial,
            destination: call.sender.clone(),
            error: name.to_owned(),
            body: vec![Value::text("as the test wants it")],
            ..Message::empty(MessageKind::Error, 0)
        });
    }

    fn emit(&mut self, path: &str, interface: &str, member: &str, body: Vec<Value>) {
        self.put(Message {
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            body,
            ..Message::empty(MessageKind::Signal, 0)
        });
    }

    fn put(&mut self, mut message: Message) {
        message.serial = self.next_serial();
        let soon = Instant::now() + Duration::from_secs(20);
        self.send(&message.encode(), soon).unwrap();
    }
}

fn over(daemon: &Daemon) -> Manager {
    Manager::over(Connection::bus(&daemon.socket).unwrap(), Scope::User)
}

#[test]
fn facts_are_read() {
    let Some(daemon) = Daemon::start("facts_are_read") else {
        return;
    };
    let _systemd = imitate(&daemon, Vec::new());
    let facts = over(&daemon).facts().unwrap();
    assert_eq!(facts.version, 257);
    assert_eq!(
        facts.control_group,
        Path::new("user.slice/user-7.slice/user@7.service")
    );
    assert!(facts.proc_devices.is_empty());
}

#[test]
fn start_table() {
    let cases: &[(&[Job], Option<&str>, &[&str])] = &[
        (&[Job::Ends("done")], None, &["StartTransientUnit"]),
        (
            &[Job::Ends("failed")],
            Some("got `failed`"),
            &["StartTransientUnit", "ResetFailedUnit"],
        ),
        (
            &[Job::Refused("UnitExists"), Job::Ends("done")],
            None,
            &[
                "StartTransientUnit",
                "ResetFailedUnit",
                "StartTransientUnit",
            ],
        ),
        (
            &[Job::Refused("UnitExists"), Job::Refused("UnitExists")],
            Some("as the test wants it"),
            &[
                "StartTransientUnit",
                "ResetFailedUnit",
                "StartTransientUnit",
            ],
        ),
        (
            &[Job::Refused("BadProperty")],
            Some("unable to start unit \"x.scope\""),
            &["StartTransientUnit"],
        ),
    ];
    for (jobs, error, want) in cases {
        let Some(daemon) = Daemon::start("start_table") else {
            return;
        };
        let systemd = imitate(&daemon, jobs.to_vec());
        let properties = [("Delegate".to_owned(), Value::Bool(true))];
        let started = over(&daemon).start("x.scope", &properties);
        match (started, error) {
            (Ok(()), None) => {}
            (Err(found), Some(want)) => {
                assert!(format!("{found:#}").contains(want), "{found:#}");
            }
            (found, want) => panic!("{jobs:?}: {found:?}, not {want:?}"),
        }
        assert_eq!(systemd.members(), *want, "{jobs:?}");
    }
}

#[test]
fn start_sends_what_systemd_takes() {
    let Some(daemon) = Daemon::start("start_sends_what_systemd_takes") else {
        return;
    };
    let systemd = imitate(&daemon, Vec::new());
    let pids = Value::Array("u".into(), vec![Value::U32(7)]);
    let properties = [("PIDs".to_owned(), pids.clone())];
    over(&daemon).start("x.scope", &properties).unwrap();
    let call = systemd.asked.recv().unwrap();
    let signature: String = call.body.iter().map(Value::signature).collect();
    assert_eq!(signature, "ssa(sv)a(sa(sv))");
    let pair = Value::Struct(vec![Value::text("PIDs"), pids.variant()]);
    assert_eq!(call.body[2], Value::Array("(sv)".into(), vec![pair]));
}

#[test]
fn stop_table() {
    let cases: &[(Job, bool, &[&str])] = &[
        (Job::Ends("done"), true, &["StopUnit", "ResetFailedUnit"]),
        (
            Job::Ends("canceled"),
            true,
            &["StopUnit", "ResetFailedUnit"],
        ),
        (Job::Refused("NoSuchUnit"), true, &["StopUnit"]),
        (
            Job::Refused("OnlyByDependency"),
            false,
            &["StopUnit", "ResetFailedUnit"],
        ),
    ];
    for (job, works, want) in cases {
        let Some(daemon) = Daemon::start("stop_table") else {
            return;
        };
        let systemd = imitate(&daemon, vec![*job]);
        let stopped = over(&daemon).stop("x.scope");
        assert_eq!(stopped.is_ok(), *works, "{job:?}: {stopped:?}");
        assert_eq!(systemd.members(), *want, "{job:?}");
    }
}

/// Anybody on the bus may send a signal to anybody.
#[test]
fn a_strangers_signal_ends_no_job() {
    let Some(daemon) = Daemon::start("a_strangers_signal_ends_no_job") else {
        return;
    };
    let mut manager = over(&daemon);
    manager.listen().unwrap();
    let mut stranger = Connection::bus(&daemon.socket).unwrap();
    let path = Value::Path("/org/freedesktop/systemd1/job/1".into());
    let body = vec![
        Value::U32(1),
        path.clone(),
        Value::text("x.scope"),
        Value::text("done"),
    ];
    stranger.put(Message {
        path: PATH.into(),
        interface: MANAGER.into(),
        member: "JobRemoved".into(),
        destination: manager.connection.name.clone(),
        body,
        ..Message::empty(MessageKind::Signal, 0)
    });
    let reply = Message {
        sender: ":1.4242".into(),
        body: vec![path],
        ..Message::empty(MessageKind::Return, 1)
    };
    let soon = Instant::now() + Duration::from_millis(300);
    assert_eq!(manager.job_result(&reply, soon).unwrap(), None);
    // It did arrive.
    let arrived = manager
        .connection
        .signal(soon, |signal| signal.member == "JobRemoved");
    assert!(arrived.unwrap().is_some());
}

#[test]
fn refusals_are_told_apart_by_name() {
    let refusal = Refusal {
        name: "org.freedesktop.systemd1.UnitExists".into(),
        text: String::new(),
    };
    let error = Error::new(Kind::System, "", "")
        .source(refusal)
        .context("x");
    assert!(is_named(&error, "UnitExists"));
    assert!(!is_named(&error, "UnitExist"));
    assert!(!is_named(&Error::invalid("x"), "UnitExists"));
}
