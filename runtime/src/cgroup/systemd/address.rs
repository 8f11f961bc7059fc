//! Which bus to talk to, and where it listens. Reads the environment, opens nothing.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use crate::error::{Error, Result};

const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

/// systemd itself, for root on hosts without a bus.
const PRIVATE: &str = "/run/systemd/private";

/// The same of a user's manager, below its runtime directory.
const USER_PRIVATE: &str = "systemd/private";

/// Whose systemd: the host's, or that of a user session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    System,
    User,
}

/// Where somebody listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    Path(PathBuf),
    Abstract(Vec<u8>),
}

/// A way to systemd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    Bus(Socket),
    /// systemd's own socket, without a bus between.
    Direct(Socket),
}

/// The ways to try, in order.
///
/// # Errors
/// There is no session bus in the environment, or its address is malformed.
pub fn ways(scope: Scope) -> Result<Vec<Way>> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    match scope {
        Scope::System => {
            let bus = match variable("DBUS_SYSTEM_BUS_ADDRESS") {
                Some(address) => parse(&address)?,
                None => vec![Socket::Path(SYSTEM_BUS.into())],
            };
            let mut ways: Vec<Way> = bus.into_iter().map(Way::Bus).collect();
            if rustix::process::geteuid().is_root() {
                ways.push(Way::Direct(Socket::Path(PRIVATE.into())));
            }
            Ok(ways)
        }
        Scope::User => user(
            variable("DBUS_SESSION_BUS_ADDRESS"),
            variable("XDG_RUNTIME_DIR").map(PathBuf::from),
        ),
    }
}

fn user(address: Option<OsString>, runtime_dir: Option<PathBuf>) -> Result<Vec<Way>> {
    if let Some(address) = address {
        return Ok(parse(&address)?.into_iter().map(Way::Bus).collect());
    }
    let socket = |name: &str| {
        let path = runtime_dir.as_ref()?.join(name);
        path.exists().then_some(Socket::Path(path))
    };
    let bus = socket("bus").map(Way::Bus);
    match bus.or_else(|| socket(USER_PRIVATE).map(Way::Direct)) {
        Some(way) => Ok(vec![way]),
        None => Err(Error::unsupported(
            "could not detect DBUS_SESSION_BUS_ADDRESS from the environment; make sure you have \
             installed the dbus-user-session or dbus-daemon package; note you may need to re-login",
        )),
    }
}

/// `unix:path=/a;unix:abstract=b,guid=c`: the unix sockets of an address list.
fn parse(address: &OsString) -> Result<Vec<Socket>> {
    let text = address.as_bytes();
    let refuse = |why: &str| {
        Err(Error::invalid(format!(
            "D-Bus address {:?}: {why}",
            address.to_string_lossy()
        )))
    };
    let mut sockets = Vec::new();
    for one in text
        .split(|byte| *byte == b';')
        .filter(|one| !one.is_empty())
    {
        let Some(keys) = one.strip_prefix(b"unix:") else {
            continue;
        };
        for pair in keys.split(|byte| *byte == b',') {
            let Some(equals) = pair.iter().position(|byte| *byte == b'=') else {
                return refuse("a key without a value");
            };
            let (key, value) = (&pair[..equals], unescape(&pair[equals + 1..]));
            let Some(value) = value else {
                return refuse("an escape is no two hexadecimal digits");
            };
            match key {
                b"path" => sockets.push(Socket::Path(OsString::from_vec(value).into())),
                b"abstract" => sockets.push(Socket::Abstract(value)),
                _ => {}
            }
        }
    }
    if sockets.is_empty() {
        return refuse("no unix socket in it");
    }
    Ok(sockets)
}

/// `%20` is a space.
fn unescape(value: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value.iter();
    while let Some(byte) = rest.next() {
        if *byte != b'%' {
            out.push(*byte);
            continue;
        }
        let digits = [*rest.next()?, *rest.next()?];
        let digits = std::str::from_utf8(&digits).ok()?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_table() {
        let path = |path: &str| Socket::Path(path.into());
        let cases: &[(&str, Option<Vec<Socket>>)] = &[
            ("unix:path=/run/bus", Some(vec![path("/run/bus")])),
            (
                "unix:path=/a%20b,guid=1f;unix:abstract=/x",
                Some(vec![path("/a b"), Socket::Abstract(b"/x".to_vec())]),
            ),
            ("tcp:host=x,port=1;unix:path=/b", Some(vec![path("/b")])),
            ("tcp:host=x,port=1", None),
            ("unix:path", None),
            ("unix:path=/a%2", None),
            ("unix:path=/a%zz", None),
            ("", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse(&OsString::from(text)).ok(), *want, "{text}");
        }
    }

    #[test]
    fn session_bus_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let runtime_dir = Some(dir.path().to_owned());
        assert!(user(None, None).is_err());
        assert!(user(None, runtime_dir.clone()).is_err());
        let private = dir.path().join(USER_PRIVATE);
        std::fs::create_dir(private.parent().unwrap()).unwrap();
        std::fs::write(&private, "").unwrap();
        assert_eq!(
            user(None, runtime_dir.clone()).unwrap(),
            [Way::Direct(Socket::Path(private))]
        );
        let bus = dir.path().join("bus");
        std::fs::write(&bus, "").unwrap();
        assert_eq!(
            user(None, runtime_dir.clone()).unwrap(),
            [Way::Bus(Socket::Path(bus))]
        );
        assert_eq!(
            user(Some("unix:path=/b".into()), runtime_dir).unwrap(),
            [Way::Bus(Socket::Path("/b".into()))]
        );
    }
}
