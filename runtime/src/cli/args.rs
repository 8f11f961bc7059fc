//! The global flags, resolved: what `--root`, `--log` and the others come to on this host.
//!
//! Owns the flags that stand before the command. Never touches the file system.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, ValueEnum};

/// Where container state lives for root.
const ROOT: &str = "/run/coracle";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
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
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Self::True),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Self::False),
            _ => Err("must be one of true, false, auto".into()),
        }
    }
}

/// `--flag`, `--flag=true` and `--flag=false`, as Go's flag package takes them.
fn parse_bool(text: &str) -> Result<bool, String> {
    match Rootless::parse(text) {
        Ok(Rootless::True) => Ok(true),
        Ok(Rootless::False) => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

/// The flags as they stand on the command line.
#[derive(Debug, Args)]
pub(super) struct RawGlobalArgs {
    /// enable debug logging
    #[arg(long, value_name = "bool", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", value_parser = parse_bool,
          hide_default_value = true, hide_possible_values = true)]
    debug: bool,
    /// set the log file to write coracle logs to (default is '/dev/stderr')
    #[arg(long, value_name = "value")]
    log: Option<PathBuf>,
    /// set the log format ('text' (default), or 'json')
    #[arg(long, value_name = "value", value_enum, default_value_t = LogFormat::Text,
          hide_default_value = true, hide_possible_values = true)]
    log_format: LogFormat,
    /// root directory for storage of container state (this should be located in tmpfs)
    #[arg(long, value_name = "value")]
    root: Option<PathBuf>,
    /// path to the criu binary used for checkpoint and restore; ignored, for old callers
    #[arg(long, value_name = "value", hide = true)]
    criu: Option<PathBuf>,
    /// enable systemd cgroup support, expects cgroupsPath to be of form "slice:prefix:name"
    #[arg(long, value_name = "bool", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", value_parser = parse_bool,
          hide_default_value = true, hide_possible_values = true)]
    systemd_cgroup: bool,
    /// ignore cgroup permission errors ('true', 'false', or 'auto')
    #[arg(long, value_name = "value", default_value = "auto", value_parser = Rootless::parse)]
    rootless: Rootless,
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
    pub(super) fn resolve(self) -> GlobalArgs {
        GlobalArgs {
            root: self.root.unwrap_or_else(|| {
                default_root(
                    rustix::process::geteuid().is_root(),
                    std::env::var_os("XDG_RUNTIME_DIR").as_deref(),
                )
            }),
            log: log_file(self.log),
            log_format: self.log_format,
            debug: self.debug,
            systemd_cgroup: self.systemd_cgroup,
            rootless: self.rootless,
        }
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

fn default_root(is_root: bool, runtime_dir: Option<&OsStr>) -> PathBuf {
    match runtime_dir {
        Some(dir) if !is_root && !dir.is_empty() => Path::new(dir).join("coracle"),
        _ => PathBuf::from(ROOT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_root_follows_the_runtime_dir_only_for_users() {
        let dir = Some(OsStr::new("/run/user/7"));
        assert_eq!(default_root(true, dir), Path::new("/run/coracle"));
        assert_eq!(default_root(false, dir), Path::new("/run/user/7/coracle"));
        assert_eq!(default_root(false, None), Path::new("/run/coracle"));
    }

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
