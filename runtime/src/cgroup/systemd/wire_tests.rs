use super::*;

/// The first call on every bus, as dbus-daemon 1.14 took it.
const HELLO: &[u8] = b"l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00m\x00\x00\x00\
    \x01\x01o\x00\x15\x00\x00\x00/org/freedesktop/DBus\x00\x00\x00\
    \x02\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
    \x03\x01s\x00\x05\x00\x00\x00Hello\x00\x00\x00\
    \x06\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00";

/// Its answer, recorded.
const WELCOME: &[u8] = b"l\x02\x01\x01\x09\x00\x00\x00\x01\x00\x00\x00=\x00\x00\x00\
    \x06\x01s\x00\x04\x00\x00\x00:1.0\x00\x00\x00\x00\
    \x05\x01u\x00\x01\x00\x00\x00\
    \x08\x01g\x00\x01s\x00\x00\
    \x07\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
    \x04\x00\x00\x00:1.0\x00";

fn hello() -> Message {
    Message {
        path: "/org/freedesktop/DBus".into(),
        interface: "org.freedesktop.DBus".into(),
        member: "Hello".into(),
        destination: "org.freedesktop.DBus".into(),
        ..Message::empty(Kind::Call, 1)
    }
}

#[test]
fn recorded_frames() {
    assert_eq!(hello().encode(), HELLO);
    assert_eq!(Message::decode(HELLO).unwrap(), hello());
    let welcome = Message::decode(WELCOME).unwrap();
    assert_eq!(welcome.kind, Kind::Return);
    assert_eq!(welcome.reply_to, 1);
    assert_eq!(welcome.sender, "org.freedesktop.DBus");
    assert_eq!(welcome.body, [Value::text(":1.0")]);
    for frame in [HELLO, WELCOME] {
        let fixed = frame[..FIXED_HEADER].try_into().unwrap();
        assert_eq!(Message::length(fixed).unwrap(), frame.len());
    }
}

fn every_type() -> Vec<Value> {
    vec![
        Value::Byte(7),
        Value::Bool(true),
        Value::I16(-2),
        Value::U16(2),
        Value::I32(-3),
        Value::U32(3),
        Value::I64(-4),
        Value::U64(u64::MAX),
        Value::Double(0.5),
        Value::text("text"),
        Value::Path("/a/b".into()),
        Value::Signature("a(sv)".into()),
        Value::bytes(&[1, 2, 3]),
        Value::Array("(ss)".into(), Vec::new()),
        Value::Array(
            "(sv)".into(),
            vec![Value::Struct(vec![
                Value::text("PIDs"),
                Value::Array("u".into(), vec![Value::U32(42)]).variant(),
            ])],
        ),
        Value::Array(
            "{sv}".into(),
            vec![Value::Entry(
                Box::new(Value::text("k")),
                Box::new(Value::U64(1).variant()),
            )],
        ),
        Value::Byte(1),
        Value::Struct(vec![Value::Byte(1), Value::U64(2)]),
    ]
}

#[test]
fn every_type_survives_the_wire() {
    let message = Message {
        path: "/x".into(),
        interface: "a.b".into(),
        member: "C".into(),
        body: every_type(),
        ..Message::empty(Kind::Signal, 9)
    };
    assert_eq!(Message::decode(&message.encode()).unwrap(), message);
}

#[test]
fn big_endian_is_read() {
    let frame = b"B\x02\x00\x01\x00\x00\x00\x04\x00\x00\x00\x07\x00\x00\x00\x0f\
        \x05\x01u\x00\x00\x00\x00\x03\x08\x01g\x00\x01u\x00\x00\x00\x00\x00\x2a";
    let message = Message::decode(frame).unwrap();
    assert_eq!((message.serial, message.reply_to), (7, 3));
    assert_eq!(message.body, [Value::U32(42)]);
}

/// No cut and no flipped byte makes the decoder panic or hand out more than there is.
#[test]
fn damaged_frames_are_refused_or_read() {
    let message = Message {
        path: "/x".into(),
        body: every_type(),
        ..Message::empty(Kind::Return, 9)
    };
    let frame = message.encode();
    for end in 0..frame.len() {
        assert!(Message::decode(&frame[..end]).is_err(), "{end}");
    }
    for at in 0..frame.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = frame.clone();
            damaged[at] ^= flip;
            let _ = Message::decode(&damaged);
        }
    }
}

#[test]
fn lengths_are_bounded() {
    let mut fixed: [u8; FIXED_HEADER] = HELLO[..FIXED_HEADER].try_into().unwrap();
    fixed[7] = 0xff;
    assert_eq!(Message::length(&fixed), Err(Malformed("too long")));
    fixed[0] = b'x';
    assert_eq!(Message::length(&fixed), Err(Malformed("byte order")));
}

#[test]
fn signature_table() {
    let deep = "a".repeat(100) + "y";
    let cases: &[(&str, Option<(&str, &str)>)] = &[
        ("su", Some(("s", "u"))),
        ("a(sv)a(sa(sv))", Some(("a(sv)", "a(sa(sv))"))),
        ("a{sv}", Some(("a{sv}", ""))),
        ("(i(ss))x", Some(("(i(ss))", "x"))),
        ("", None),
        ("a", None),
        ("(s", None),
        ("()", None),
        ("{s}", None),
        ("z", None),
        (&deep, None),
    ];
    for (signature, want) in cases {
        assert_eq!(split_type(signature, 0).ok(), *want, "{signature}");
    }
}
