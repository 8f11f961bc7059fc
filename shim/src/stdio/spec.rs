//! What a stdio address of a request means.
//!
//! Owns: parsing of the addresses. Never opens anything.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Null,
    Fifo(PathBuf),
    File(PathBuf),
    Binary {
        program: PathBuf,
        args: Vec<String>,
        /// `binary-v2`: it says that it is ready by a byte, and dead silence is a failure.
        speaks: bool,
    },
    CriLog(PathBuf),
    /// stdin fed by attachments; `once`: ends with the first one.
    Attach {
        once: bool,
    },
    /// The descriptor came with the request.
    Passed,
}

pub fn parse(address: &str) -> Result<Address> {
    if address.is_empty() {
        return Ok(Address::Null);
    }
    if address.starts_with('/') {
        return Ok(Address::Fifo(address.into()));
    }
    let bad = |why: &str| Error::new(Kind::Invalid, "stdio address", address).source(why);
    let (scheme, rest) = address
        .split_once(':')
        .ok_or_else(|| bad("neither a path nor a URI"))?;
    match (scheme, rest) {
        ("attach", "") => return Ok(Address::Attach { once: false }),
        ("attach", "once") => return Ok(Address::Attach { once: true }),
        ("fd", "") => return Ok(Address::Passed),
        _ => {}
    }
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = decode(path).ok_or_else(|| bad("bad percent-encoding"))?;
    let path = PathBuf::from(OsString::from_vec(path));
    if !path.is_absolute() {
        return Err(bad("the path is not absolute"));
    }
    match scheme {
        "fifo" => Ok(Address::Fifo(path)),
        "file" => Ok(Address::File(path)),
        // Not percent-decoded: the daemon writes the bare path.
        "cri-log" => Ok(Address::CriLog(Path::new(rest).to_owned())),
        "binary" | "binary-v2" => {
            let args = arguments(query).ok_or_else(|| bad("bad percent-encoding"))?;
            Ok(Address::Binary {
                program: path,
                args,
                speaks: scheme == "binary-v2",
            })
        }
        _ => Err(bad("unknown scheme")),
    }
}

/// A logging binary is called with the keys and values of the query as its arguments.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        for part in [key, value] {
            let bytes = decode(&part.replace('+', " "))?;
            args.push(String::from_utf8(bytes).ok()?);
        }
        if value.is_empty() {
            args.pop();
        }
    }
    Some(args)
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let high = (bytes.next()? as char).to_digit(16)?;
        let low = (bytes.next()? as char).to_digit(16)?;
        let value = (high * 16 + low) as u8;
        if value == 0 {
            return None;
        }
        out.push(value);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let binary = |args: &[&str]| Address::Binary {
            program: "/bin/log er".into(),
            args: args.iter().map(|s| s.to_string()).collect(),
            speaks: false,
        };
        let cases = [
            ("", Address::Null),
            ("/run/f", Address::Fifo("/run/f".into())),
            ("fifo:///run/f", Address::Fifo("/run/f".into())),
            ("file:///a%20b", Address::File("/a b".into())),
            (
                "cri-log:///var/log/x?y%20",
                Address::CriLog("/var/log/x?y%20".into()),
            ),
            ("attach:", Address::Attach { once: false }),
            ("attach:once", Address::Attach { once: true }),
            ("fd:", Address::Passed),
            ("binary:///bin/log%20er", binary(&[])),
            (
                "binary:///bin/log%20er?id=a%2Fb&-v",
                binary(&["id", "a/b", "-v"]),
            ),
            (
                "binary-v2:///l",
                Address::Binary {
                    program: "/l".into(),
                    args: vec![],
                    speaks: true,
                },
            ),
        ];
        for (text, want) in cases {
            assert_eq!(parse(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn bad_addresses_are_named() {
        for text in [
            "relative",
            "file://rel",
            "npipe:///x",
            "file:///%zz",
            "file:///%00",
            "attach:x",
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{text}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
