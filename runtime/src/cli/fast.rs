//! The commands that engines call for every container, parsed without the definitions of the
//! others: to build all of them takes longer than to parse the line.
//!
//! Only ever an answer to a line that is right. Whatever is not goes the whole way, so that help
//! and errors have one source.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use clap::{Args, FromArgMatches as _};

use super::args::RawGlobalArgs;
use super::{Command, create, delete, exec, kill, run, start, state};

/// The parsed line, if it is one of these commands and right.
pub(super) fn parse(argv: &[OsString]) -> Option<(RawGlobalArgs, Command)> {
    let (at, name) = word(argv)?;
    if has_gos_forms(argv.get(at + 1..)?, name == "exec") {
        return None;
    }
    match name {
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

/// The first word that is neither a global flag nor the value of one, and where it stands.
fn word(argv: &[OsString]) -> Option<(usize, &str)> {
    let mut words = argv.iter().enumerate().skip(1);
    loop {
        let (at, word) = words.next()?;
        let word = word.to_str()?;
        let Some(flag) = word.strip_prefix("--") else {
            return (!word.starts_with('-')).then_some((at, word));
        };
        if matches!(flag, "root" | "log" | "log-format" | "rootless" | "criu") {
            words.next();
        }
    }
}

/// Whether a word like `-bundle` is among a command's: to clap it is `-b undle`. Of `exec` only
/// those in front of the container's own command count; they end where two words follow each other
/// that are no flags.
fn has_gos_forms(words: &[OsString], is_exec: bool) -> bool {
    let mut after_flag = false;
    for word in words {
        let bytes = word.as_bytes();
        let flag = bytes.first() == Some(&b'-');
        if flag && bytes.len() > 2 && bytes[1] != b'-' {
            return true;
        }
        if bytes == b"--" || (is_exec && !flag && !after_flag) {
            return false;
        }
        after_flag = flag;
    }
    false
}

fn one<A: Args>(
    argv: &[OsString],
    name: &'static str,
    wrap: fn(A) -> Command,
) -> Option<(RawGlobalArgs, Command)> {
    let line = RawGlobalArgs::augment_args(clap::Command::new("coracle"))
        .version("")
        .disable_version_flag(true)
        .subcommand(A::augment_args(clap::Command::new(name)));
    let matches = line.try_get_matches_from(argv).ok()?;
    let global = RawGlobalArgs::from_arg_matches(&matches).ok()?;
    let (_, rest) = matches.subcommand()?;
    Some((global, wrap(A::from_arg_matches(rest).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::line;

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
            let words = words(line);
            assert_eq!(word(&words).map(|(_, word)| word), want, "{line}");
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
            "coracle exec id ls -la",
            "coracle exec -d id ls -la --all",
        ] {
            let (fast_global, fast) = parse(&words(line)).unwrap();
            let definitions = super::super::definitions();
            let line::Line::Run(words) = line::read(&definitions, &words(line)) else {
                panic!("{line}");
            };
            let (global, whole) = super::super::parse(definitions, words).unwrap();
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
            "coracle run -bundle /b x",
            "coracle run x -bundle=/b",
            "coracle exec -tty x sh",
            "coracle exec -e A=b -cwd /x x sh",
            "coracle create --no-pivot=true x",
        ] {
            assert!(parse(&words(line)).is_none(), "{line}");
        }
    }
}
