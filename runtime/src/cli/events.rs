//! `events`: usage at intervals, and OOM kills as they happen, as lines of JSON.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::GlobalArgs;
use super::state::write_stdout;
use crate::cgroup::{OomWatch, Stats};
use crate::error::{Error, Kind, Result};
use crate::log;
use crate::resctrl;
use crate::state::{Container, Request};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// set the stats collection interval
    #[arg(long, value_name = "value", default_value = "5s", value_parser = parse_duration)]
    interval: Duration,
    /// display the container's stats then exit
    #[arg(long)]
    stats: bool,
}

#[derive(Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Stats>,
}

/// # Errors
/// There is no such container, it does not run, or its cgroup cannot be read.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    if args.interval.is_zero() {
        return Err(Error::invalid("duration interval must be greater than 0"));
    }
    container.allows(Request::Events)?;
    let id = container.id().as_str();
    let cgroup = container.cgroup();
    if args.stats {
        print("stats", id, Some(read(&container)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut watch = OomWatch::new(&cgroup)?;
    let mut next = Instant::now() + args.interval;
    // Ends with the container: its cgroup goes, or nobody is left in it.
    loop {
        let seen = watch.wait(next)?;
        for _ in 0..seen.oom_kills {
            print("oom", id, None)?;
        }
        if seen.ended {
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= next {
            next += args.interval;
            match read(&container) {
                Ok(stats) => print("stats", id, Some(stats))?,
                Err(error) => log::warning(global, &format!("{error:#}")),
            }
        }
    }
}

fn read(container: &Container) -> Result<Stats> {
    let mut stats = Stats::read(&container.cgroup())?;
    stats.intel_rdt = resctrl::Stats::read(container.record.resctrl.as_ref())?;
    Ok(stats)
}

fn print(kind: &'static str, id: &str, data: Option<Stats>) -> Result<()> {
    let mut line = serde_json::to_string(&Event { kind, id, data })
        .map_err(|error| Error::new(Kind::Internal, "encode", "event").source(error))?;
    line.push('\n');
    write_stdout(&line)
}

/// Go's duration: `5s`, `100ms`, `1m30s`, `1.5h`.
fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    const UNITS: [(&str, f64); 7] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let invalid = || format!("time: invalid duration {text:?}");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    let mut rest = text;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(|| format!("time: missing unit in duration {text:?}"))?;
        let value: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        rest = &rest[digits..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = UNITS
            .iter()
            .find(|(name, _)| *name == &rest[..end])
            .ok_or_else(invalid)?;
        seconds += value * unit.1;
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_table() {
        let cases = [
            ("5s", Some(5000)),
            ("100ms", Some(100)),
            ("1m30s", Some(90_000)),
            ("1.5h", Some(5_400_000)),
            ("0", Some(0)),
            ("5", None),
            ("", None),
            ("-5s", None),
            ("5x", None),
            ("s", None),
        ];
        for (text, want) in cases {
            let found = parse_duration(text).ok().map(|d| d.as_millis());
            assert_eq!(found, want, "{text:?}");
        }
    }

    #[test]
    fn oom_event_has_no_data() {
        let event = Event {
            kind: "oom",
            id: "a",
            data: None,
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"type":"oom","id":"a"}"#
        );
    }
}
