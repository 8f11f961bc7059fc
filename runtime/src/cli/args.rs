//! The global flags, resolved: what `--root`, `--log` and the others come to on this host.
//!
//! Owns the flags that stand before the command.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args};

use super::line::parse_bool;
use super::root;
use crate::error::{Error, Result};
use crate::log;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Whether cgroup permission errors are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rootless {
    True,
    False,
    #[default]
    Auto,
}

impl Rootless {
    /// Go's `strconv.ParseBool` spellings, and `auto`: what runc takes.
    fn parse(text: &str) -> Result<Self> {
        if text.is_empty() || text.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        match parse_bool(text) {
            Some(true) => Ok(Self::True),
            Some(false) => Ok(Self::False),
            None => Err(Error::invalid(format!(
                "strconv.ParseBool: parsing \"{text}\": invalid syntax"
            ))),
        }
    }
}

impl LogFormat {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "" | "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(Error::invalid(format!("invalid log-format: {text}"))),
        }
    }
}

/// The flags as they stand on the command line.
#[derive(Debug, PartialEq, Eq, Args)]
pub(super) struct RawGlobalArgs {
    /// enable debug logging
    #[arg(long)]
    debug: bool,
    /// set the log file to write coracle logs to (default is '/dev/stderr')
    #[arg(long, value_name = "string")]
    log: Option<PathBuf>,
    /// set the log format ('text' (default), or 'json')
    #[arg(long, value_name = "string", default_value = "text")]
    log_format: String,
    /// root directory for storage of container state (this should be located in tmpfs), by default
    /// /run/coracle, or for users other than root $XDG_RUNTIME_DIR/coracle
    #[arg(long, value_name = "string")]
    root: Option<PathBuf>,
    /// path to the criu binary used for checkpoint and restore; ignored, for old callers
    #[arg(long, value_name = "string", hide = true)]
    criu: Option<PathBuf>,
    /// enable systemd cgroup support, expects cgroupsPath to be of form "slice:prefix:name"
    #[arg(long)]
    systemd_cgroup: bool,
    /// ignore cgroup permission errors ('true', 'false', or 'auto')
    #[arg(long, value_name = "string", default_value = "auto")]
    rootless: String,
    /// print the version
    #[arg(long, short = 'v', action = ArgAction::Version)]
    version: Option<bool>,
}

/// The flags that stand before the command, with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalArgs {
    pub root: PathBuf,
    /// None is stderr.
    pub log: Option<PathBuf>,
    pub log_format: LogFormat,
    pub debug: bool,
    pub systemd_cgroup: bool,
    pub rootless: Rootless,
}

impl RawGlobalArgs {
    /// # Errors
    /// A value that means nothing, or a log that cannot be written.
    pub(super) fn resolve(self) -> Result<GlobalArgs> {
        let log_format = LogFormat::parse(&self.log_format)?;
        let log = log_file(self.log);
        // Found out now: a command whose records are lost is not begun.
        if let Some(path) = &log {
            log::open(path)
                .map_err(|error| Error::system("open", path.display().to_string(), error))?;
        }
        Ok(GlobalArgs {
            root: match self.root {
                Some(root) => root::absolute(root)?,
                None => root::default()?,
            },
            log,
            log_format,
            debug: self.debug,
            systemd_cgroup: self.systemd_cgroup,
            rootless: Rootless::parse(&self.rootless)?,
        })
    }
}

impl GlobalArgs {
    /// The log flags alone, read from a command line that clap refuses, so that the refusal still
    /// reaches the file that the caller named.
    pub(super) fn log_flags_of(argv: &[OsString]) -> Self {
        let mut found = Self {
            root: PathBuf::new(),
            log: None,
            log_format: LogFormat::Text,
            debug: false,
            systemd_cgroup: false,
            rootless: Rootless::Auto,
        };
        let mut words = argv.iter().skip(1);
        while let Some(word) = words.next().and_then(|word| word.to_str()) {
            let Some(flag) = word.strip_prefix("--") else {
                break;
            };
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (flag, None),
            };
            if value.is_none()
                && matches!(name, "log" | "log-format" | "root" | "rootless" | "criu")
            {
                value = words.next().cloned();
            }
            match (name, value) {
                ("log", Some(value)) => found.log = log_file(Some(value.into())),
                ("log-format", Some(value)) if value == "json" => {
                    found.log_format = LogFormat::Json;
                }
                _ => {}
            }
        }
        found
    }
}

fn log_file(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty() && path != Path::new("/dev/stderr"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_flags_are_found_on_a_refused_command_line() {
        let argv = [
            "coracle",
            "--root",
            "/r",
            "--log=/l",
            "--log-format",
            "json",
            "no",
            "--log=x",
        ]
        .map(OsString::from);
        let found = GlobalArgs::log_flags_of(&argv);
        assert_eq!(found.log.as_deref(), Some(Path::new("/l")));
        assert_eq!(found.log_format, LogFormat::Json);
    }
}
