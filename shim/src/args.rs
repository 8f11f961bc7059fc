//! The command line of a shim: Go-style flags, then one action.
//!
//! Owns: which flags exist. Nothing here has an effect.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Start,
    Delete,
    Info,
    Version,
    /// The process of a sandbox, started by the runtime in the sandbox's container.
    Pause,
    /// No action: the shim itself, started by `start`.
    Serve,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    pub action: Action,
    pub namespace: String,
    pub id: String,
    pub address: String,
    pub publish_binary: String,
    pub bundle: PathBuf,
    pub socket: PathBuf,
    pub debug: bool,
}

pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Args> {
    let mut args = Args {
        action: Action::Serve,
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        publish_binary: String::new(),
        bundle: PathBuf::new(),
        socket: PathBuf::new(),
        debug: false,
    };
    let mut words = words.map(|w| w.to_string_lossy().into_owned());
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            args.action = match word.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                "pause" => Action::Pause,
                _ => return Err(Error::new(Kind::Invalid, "unknown action", word)),
            };
            continue;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let switch = matches!(name, "debug" | "v" | "info");
        let on = inline.as_deref() != Some("false");
        let value = match (switch, inline) {
            (true, _) => String::new(),
            (false, Some(value)) => value,
            (false, None) => words.next().ok_or_else(|| {
                Error::new(Kind::Invalid, "flag", format!("-{name}")).source("needs a value")
            })?,
        };
        match name {
            "debug" => args.debug = on,
            "v" if on => args.action = Action::Version,
            "info" if on => args.action = Action::Info,
            "v" | "info" => {}
            "namespace" => args.namespace = value,
            "id" => args.id = value,
            "address" => args.address = value,
            "publish-binary" => args.publish_binary = value,
            "bundle" => args.bundle = value.into(),
            "socket" => args.socket = value.into(),
            _ => {
                return Err(Error::new(
                    Kind::Invalid,
                    "unknown flag",
                    format!("-{name}"),
                ));
            }
        }
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Args> {
        parse(text.split(' ').map(OsString::from))
    }

    #[test]
    fn containerds_call() {
        let args =
            of("-namespace ns -address /a.sock -publish-binary /bin/c -id x -debug start").unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("ns", "x"));
        assert!(args.debug);
        let args = of("--id=x -bundle /b -debug=false delete").unwrap();
        assert_eq!((args.action, args.debug), (Action::Delete, false));
        assert_eq!(of("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn an_empty_value_is_a_value() {
        let words = ["-address", "", "-id", "x", "start"].map(OsString::from);
        assert_eq!(parse(words.into_iter()).unwrap().id, "x");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, name) in [("-nope x start", "-nope"), ("stop", "stop"), ("-id", "-id")] {
            assert!(of(text).unwrap_err().to_string().contains(name));
        }
    }
}
