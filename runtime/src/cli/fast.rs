//! The commands that engines call for every container, parsed without the definitions of the
//! others: to build all of them takes longer than to parse the line.
//!
//! Only ever an answer to a line that is right. Whatever is not goes the whole way, so that help
//! and errors have one source.

use std::ffi::OsString;

use clap::{Args, FromArgMatches as _};

use super::args::RawGlobalArgs;
use super::{Command, GlobalArgs, create, delete, exec, kill, run, start, state};

/// The parsed line, if it is one of these commands and right.
pub(super) fn parse(argv: &[OsString]) -> Option<(GlobalArgs, Command)> {
    match word(argv)? {
        "create" => one(
            argv,
            "create",
            Command::Create as fn(create::Args) -> Command,
        ),
        "delete" => one(
            argv,
            "delete",
            Command::Delete as fn(delete::Args) -> Command,
        ),
        "exec" => one(argv, "exec", Command::Exec as fn(exec::Args) -> Command),
        "kill" => one(argv, "kill", Command::Kill as fn(kill::Args) -> Command),
        "run" => one(argv, "run", Command::Run as fn(run::Args) -> Command),
        "start" => one(argv, "start", Command::Start as fn(start::Args) -> Command),
        "state" => one(argv, "state", Command::State as fn(state::Args) -> Command),
        _ => None,
    }
}

/// The first word that is neither a global flag nor the value of one.
fn word(argv: &[OsString]) -> Option<&str> {
    let mut words = argv.iter().skip(1);
    loop {
        let word = words.next()?.to_str()?;
        let Some(flag) = word.strip_prefix("--") else {
            return (!word.starts_with('-')).then_some(word);
        };
        if matches!(flag, "root" | "log" | "log-format" | "rootless" | "criu") {
            words.next();
        }
    }
}

fn one<A: Args>(
    argv: &[OsString],
    name: &'static str,
    wrap: fn(A) -> Command,
) -> Option<(GlobalArgs, Command)> {
    let line = RawGlobalArgs::augment_args(clap::Command::new("coracle"))
        .version("")
        .disable_version_flag(true)
        .subcommand(A::augment_args(clap::Command::new(name)));
    let matches = line.try_get_matches_from(argv).ok()?;
    let global = RawGlobalArgs::from_arg_matches(&matches).ok()?;
    let (_, rest) = matches.subcommand()?;
    Some((global.resolve(), wrap(A::from_arg_matches(rest).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn word_table() {
        let cases = [
            ("coracle run x", Some("run")),
            (
                "coracle --root /r --log=/l --debug create x",
                Some("create"),
            ),
            ("coracle --root run state x", Some("state")),
            ("coracle -v", None),
            ("coracle", None),
        ];
        for (line, want) in cases {
            assert_eq!(word(&words(line)), want, "{line}");
        }
    }

    #[test]
    fn says_the_same_as_the_whole_parser() {
        for line in [
            "coracle --root /r --log /l --log-format json --systemd-cgroup create -b /b id",
            "coracle run -d --keep --preserve-fds 2 id",
            "coracle exec -t -e A=b --user 1:2 id sh -c x",
            "coracle exec --process /p -d id",
            "coracle kill --all id KILL",
            "coracle delete --force id",
            "coracle start id",
            "coracle state id",
        ] {
            let (fast_global, fast) = parse(&words(line)).unwrap();
            let (global, whole) = super::super::parse_whole(&words(line)).unwrap();
            assert_eq!(fast_global, global, "{line}");
            assert_eq!(format!("{fast:?}"), format!("{whole:?}"), "{line}");
        }
    }

    #[test]
    fn leaves_help_and_errors_to_the_whole_parser() {
        for line in [
            "coracle run --help",
            "coracle run",
            "coracle --nope state x",
            "coracle list",
        ] {
            assert!(parse(&words(line)).is_none(), "{line}");
        }
    }
}
