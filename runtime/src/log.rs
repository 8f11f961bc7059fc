//! runc's log records, which engines read back: one line on stderr or one record in `--log`.
//!
//! The shapes are logrus's text and JSON formatters. Nothing is set up before there is something
//! to say; a log that cannot be written is not an error of the command.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cli::{GlobalArgs, LogFormat};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Debug,
    Error,
    Warning,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// Writes the command's failure: to the log, and as plain text to stderr if the log is a file.
pub fn fatal(global: &GlobalArgs, message: &str) {
    write(global, Level::Error, message);
    if global.log.is_some() {
        // Whoever closed stderr does not want it.
        let _ = writeln!(std::io::stderr(), "{message}");
    }
}

/// Writes something that was survived and that the caller should know.
pub fn warning(global: &GlobalArgs, message: &str) {
    write(global, Level::Warning, message);
}

/// Writes a step of the command, for `--debug`; without it this is one comparison.
pub fn debug(global: &GlobalArgs, message: impl FnOnce() -> String) {
    if global.debug {
        write(global, Level::Debug, &message());
    }
}

/// Writes each of several things, for `--debug`; without it nothing is looked for.
pub fn debug_each<T: IntoIterator<Item = String>>(
    global: &GlobalArgs,
    messages: impl FnOnce() -> T,
) {
    if global.debug {
        for message in messages() {
            write(global, Level::Debug, &message);
        }
    }
}

fn write(global: &GlobalArgs, level: Level, message: &str) {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let record = record(global.log_format, level, message, seconds);
    let Some(path) = &global.log else {
        let _ = std::io::stderr().write_all(record.as_bytes());
        return;
    };
    let opened = open(path);
    // One write call: records of several commands in one file do not mix.
    let written = opened.and_then(|mut file| file.write_all(record.as_bytes()));
    if let Err(error) = written {
        let _ = writeln!(
            std::io::stderr(),
            "cannot write log {}: {error}",
            path.display()
        );
    }
}

/// The log, made if it is not there.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
}

fn record(format: LogFormat, level: Level, message: &str, seconds: u64) -> String {
    let time = rfc3339(seconds);
    let level = level.name();
    match format {
        LogFormat::Json => {
            let message = serde_json::Value::from(message);
            format!("{{\"level\":\"{level}\",\"msg\":{message},\"time\":\"{time}\"}}\n")
        }
        LogFormat::Text => {
            format!(
                "time=\"{time}\" level={level} msg={}\n",
                quoted_if_needed(message)
            )
        }
    }
}

/// logrus leaves a value bare only when all of it is in `[A-Za-z0-9-._/@^+]`.
fn quoted_if_needed(message: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !message.is_empty() && message.chars().all(bare) {
        return message.to_owned();
    }
    let mut quoted = String::with_capacity(message.len() + 2);
    quoted.push('"');
    for c in message.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(quoted, "\\u{:04x}", c as u32);
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Seconds since the epoch as `2026-01-02T03:04:05Z`.
fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date in the proleptic Gregorian calendar, with the year starting in March
    // so that the leap day is a year's last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_knows_leap_days_and_year_ends() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }

    #[test]
    fn records_have_the_shape_that_engines_parse() {
        assert_eq!(
            record(LogFormat::Text, Level::Error, "exec: \"x\": not\nfound", 0),
            "time=\"1970-01-01T00:00:00Z\" level=error msg=\"exec: \\\"x\\\": not\\nfound\"\n"
        );
        assert_eq!(
            record(LogFormat::Text, Level::Warning, "plain", 0),
            "time=\"1970-01-01T00:00:00Z\" level=warning msg=plain\n"
        );
        assert_eq!(
            record(LogFormat::Json, Level::Error, "a \"b\"", 0),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\",\"time\":\"1970-01-01T00:00:00Z\"}\n"
        );
    }

    #[test]
    fn a_log_file_gets_every_record_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let global = GlobalArgs {
            root: dir.path().into(),
            log: Some(path.clone()),
            log_format: LogFormat::Json,
            debug: false,
            systemd_cgroup: false,
            rootless: crate::cli::Rootless::Auto,
        };
        warning(&global, "one");
        debug(&global, || "not asked for".to_owned());
        let asked = GlobalArgs {
            debug: true,
            ..global.clone()
        };
        debug(&asked, || "step".to_owned());
        write(&global, Level::Error, "two");
        let text = std::fs::read_to_string(path).unwrap();
        let levels: Vec<_> = text
            .lines()
            .map(|line| {
                let record: serde_json::Value = serde_json::from_str(line).unwrap();
                (
                    record["level"].as_str().unwrap().to_owned(),
                    record["msg"].clone(),
                )
            })
            .collect();
        assert_eq!(
            levels,
            [
                ("warning".into(), "one".into()),
                ("debug".into(), "step".into()),
                ("error".into(), "two".into())
            ]
        );
    }
}
