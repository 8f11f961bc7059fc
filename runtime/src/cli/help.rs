//! What `--help` says, in the shape of runc's: from clap's definitions alone. Pure.

use std::fmt::Write as _;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command};

use super::line::is_switch;

const HELP: (&str, &str) = ("--help, -h", "show help");

/// The help of the program, or of one of its commands, under the name that it was called by.
pub(super) fn text(definitions: &Command, topic: Option<&str>, program: &str) -> String {
    match topic.and_then(|name| definitions.find_subcommand(name)) {
        Some(command) => of_command(definitions, command, program),
        None => of_program(definitions, program),
    }
}

fn of_program(definitions: &Command, program: &str) -> String {
    let mut text = format!(
        "NAME:\n   {program} - {}\n",
        plain(definitions.get_about(), "")
    );
    paragraph(&mut text, definitions, 10);
    let _ = write!(
        text,
        "\nUSAGE:\n   {program} [global options] [command [command options]]\n\n\
         VERSION:\n   {}\n\nCOMMANDS:\n",
        env!("CARGO_PKG_VERSION")
    );
    let commands = definitions
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .map(|command| {
            (
                command.get_name().to_owned(),
                plain(command.get_about(), ""),
            )
        })
        .chain([(
            "help, h".to_owned(),
            "Shows a list of commands or help for one command".to_owned(),
        )]);
    table(&mut text, commands.collect());
    text.push_str("\nGLOBAL OPTIONS:\n");
    let mut flags = flags(definitions, true);
    let version = flags.len().saturating_sub(1);
    flags.insert(version, own(HELP));
    table(&mut text, flags);
    text
}

fn of_command(definitions: &Command, command: &Command, program: &str) -> String {
    let name = command.get_name();
    let mut text = format!(
        "NAME:\n   {program} {name} - {}\n\nUSAGE:\n   {program} {name} [options]",
        plain(command.get_about(), "")
    );
    for arg in command.get_positionals() {
        let value = value_name(arg);
        let _ = match arg.is_required_set() {
            true => write!(text, " <{value}>"),
            false => write!(text, " [{value}]"),
        };
    }
    text.push('\n');
    if command.get_long_about().is_some() {
        text.push_str("\nDESCRIPTION:");
        paragraph(&mut text, command, 3);
    }
    text.push_str("\nOPTIONS:\n");
    let mut own_flags = flags(command, false);
    own_flags.push(own(HELP));
    table(&mut text, own_flags);
    text.push_str("\nGLOBAL OPTIONS:\n");
    table(&mut text, flags(definitions, false));
    text
}

fn own((name, help): (&str, &str)) -> (String, String) {
    (name.to_owned(), help.to_owned())
}

fn plain(text: Option<&clap::builder::StyledStr>, default: &str) -> String {
    text.map_or_else(|| default.to_owned(), ToString::to_string)
}

/// The long description, line by line behind as many blanks.
fn paragraph(text: &mut String, command: &Command, indent: usize) {
    let Some(long) = command.get_long_about() else {
        return;
    };
    text.push('\n');
    for line in long.to_string().lines() {
        if !line.is_empty() {
            let _ = write!(text, "{:indent$}{line}", "");
        }
        text.push('\n');
    }
}

fn value_name(arg: &Arg) -> String {
    arg.get_value_names()
        .and_then(<[_]>::first)
        .map_or_else(|| arg.get_id().to_string(), ToString::to_string)
}

/// Names with the type of their value, and what they do.
fn flags(command: &Command, with_version: bool) -> Vec<(String, String)> {
    command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && arg.get_long().is_some())
        .filter(|arg| with_version || !matches!(arg.get_action(), ArgAction::Version))
        .map(|arg| (names(arg), described(arg)))
        .collect()
}

fn names(arg: &Arg) -> String {
    let long = arg.get_long().unwrap_or_default();
    let names = match arg.get_short() {
        Some(short) => vec![format!("--{long}"), format!("-{short}")],
        None => vec![format!("--{long}")],
    };
    if is_switch(arg) {
        return names.join(", ");
    }
    let kind = value_type(arg);
    let names: Vec<_> = names.iter().map(|name| format!("{name} {kind}")).collect();
    let names = names.join(", ");
    match arg.get_action() {
        ArgAction::Append => format!("{names} [ {names} ]"),
        _ => names,
    }
}

/// "int" and "string", as runc names what it takes; another name where the definition has one.
fn value_type(arg: &Arg) -> String {
    let named = arg.get_value_names().and_then(<[_]>::first);
    match named.map(clap::builder::Str::as_str) {
        Some(name) if !matches!(name, "value" | "N") => name.to_owned(),
        _ if is_number(arg) => "int".to_owned(),
        _ => "string".to_owned(),
    }
}

/// Whether a flag takes an integer.
pub(super) fn is_number(arg: &Arg) -> bool {
    let kind = arg.get_value_parser().type_id();
    [
        ValueParser::from(clap::value_parser!(u16)).type_id(),
        ValueParser::from(clap::value_parser!(u32)).type_id(),
        ValueParser::from(clap::value_parser!(u64)).type_id(),
        ValueParser::from(clap::value_parser!(i32)).type_id(),
        ValueParser::from(clap::value_parser!(i64)).type_id(),
    ]
    .contains(&kind)
}

fn described(arg: &Arg) -> String {
    let mut text = plain(arg.get_long_help().or_else(|| arg.get_help()), "").replace('\n', " ");
    let default = arg.get_default_values().first();
    if let Some(default) = default.filter(|text| !is_switch(arg) && !text.is_empty()) {
        let default = default.to_string_lossy();
        let _ = match value_type(arg) == "string" {
            true => write!(text, " (default: \"{default}\")"),
            false => write!(text, " (default: {default})"),
        };
    }
    text
}

/// Two columns, two blanks apart.
fn table(text: &mut String, rows: Vec<(String, String)>) {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max();
    let width = width.unwrap_or_default();
    for (name, help) in rows {
        let _ = writeln!(text, "   {name:width$}  {help}");
    }
}
