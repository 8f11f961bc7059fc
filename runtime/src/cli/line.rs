//! The words of a command line, read by the rules that runc's callers rely on.
//!
//! ```text
//! argv --> flags and positionals --> clap's own order --> the arguments of a command
//!             |
//!             +--> help, version, or a refusal in runc's words
//! ```
//! These are Go's rules: `-flag` is `--flag`, a switch takes `=true` and `=false`, the last of two
//! values wins, global flags may follow the command, a value may be empty. The flags themselves
//! are clap's definitions; this file knows none by name but those of help and version.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use clap::{Arg, ArgAction, Command};

/// What a command line asks for.
#[derive(Debug)]
pub(super) enum Line {
    /// To run a command: the words in the order and the forms that clap takes.
    Run(Vec<OsString>),
    /// The help of a command, or of the program.
    Help(Option<String>),
    Version,
    Refused(Refusal),
}

/// A line that is no command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub message: String,
    pub code: u8,
    pub usage: Usage,
}

/// What is told of the right use, beside the message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Usage {
    Nothing,
    /// That it was not right.
    Wrong,
    /// The help of this command, or of the program.
    Help(Option<String>),
}

/// runc's exit code for a command that there is not.
const NO_SUCH_COMMAND: u8 = 3;

/// Reads a line.
pub(super) fn read(definitions: &Command, argv: &[OsString]) -> Line {
    let words = argv.get(1..).unwrap_or_default();
    let mut root = Scan::new(definitions, None);
    if let Err(message) = root.read(words) {
        return root.refused(message, None);
    }
    let first = root.positionals.first().filter(|word| !word.is_empty());
    let name = first.map(|word| word.to_string_lossy().into_owned());
    let found = |name: &String| definitions.find_subcommand(name).is_some();
    match name {
        // As in `-h foo`: runc has another exit code here than for `foo`.
        Some(name) if root.help && !found(&name) => no_such(&name, 1),
        name if root.help => Line::Help(name),
        _ if root.version => Line::Version,
        None => Line::Help(None),
        Some(name) if matches!(name.as_str(), "help" | "h") => {
            match root.positionals.get(1).map(|word| word.to_string_lossy()) {
                None => Line::Help(None),
                Some(topic) if topic.is_empty() => Line::Help(None),
                Some(topic) if found(&topic.clone().into_owned()) => {
                    Line::Help(Some(topic.into_owned()))
                }
                Some(topic) => no_such(&topic, NO_SUCH_COMMAND),
            }
        }
        Some(name) => match definitions.find_subcommand(&name) {
            Some(command) => command_line(definitions, command, root, argv),
            None => no_such(&name, NO_SUCH_COMMAND),
        },
    }
}

fn no_such(name: &str, code: u8) -> Line {
    Line::Refused(Refusal {
        message: format!("No help topic for '{name}'"),
        code,
        usage: Usage::Nothing,
    })
}

fn command_line<'a>(
    definitions: &'a Command,
    command: &'a Command,
    mut root: Scan<'a>,
    argv: &[OsString],
) -> Line {
    let rest = root.positionals.split_off(1);
    let mut own = Scan::new(command, Some(definitions));
    if let Err(message) = own.read(&rest) {
        return own.refused(message, Some(command.get_name()));
    }
    if own.help {
        return Line::Help(Some(command.get_name().to_owned()));
    }
    if let Err(message) = count(command, own.positionals.len(), argv.first()) {
        return Line::Refused(Refusal {
            message,
            code: 1,
            usage: Usage::Wrong,
        });
    }
    let mut words: Vec<OsString> = argv.first().cloned().into_iter().collect();
    for (arg, value) in own.inherited.drain(..) {
        put(&mut root.flags, arg, value);
    }
    words.extend(root.flags.iter().filter_map(canonical));
    words.push(command.get_name().into());
    words.extend(own.flags.iter().filter_map(canonical));
    words.push("--".into());
    words.append(&mut own.positionals);
    Line::Run(words)
}

/// How many positionals a command takes, in runc's words for any other number.
fn count(command: &Command, given: usize, argv0: Option<&OsString>) -> Result<(), String> {
    let positionals = || command.get_positionals();
    let least = positionals().filter(|arg| arg.is_required_set()).count();
    let most = match positionals().any(is_trailing) {
        true => usize::MAX,
        false => positionals().count(),
    };
    let wants = match given {
        _ if least == most && given != least => format!("exactly {least}"),
        _ if given < least => format!("a minimum of {least}"),
        _ if given > most => format!("a maximum of {most}"),
        _ => return Ok(()),
    };
    Err(format!(
        "{}: \"{}\" requires {wants} argument(s)",
        argv0.map(|word| word.to_string_lossy()).unwrap_or_default(),
        command.get_name()
    ))
}

fn is_trailing(arg: &Arg) -> bool {
    arg.is_trailing_var_arg_set()
}

/// Whether words from this positional on are not the command's own flags.
fn takes_anything(command: &Command, positional: usize) -> bool {
    let foreign = |arg: &Arg| is_trailing(arg) || arg.is_allow_hyphen_values_set();
    command.get_positionals().take(positional + 1).any(foreign)
}

/// The flags and positionals of one command.
struct Scan<'a> {
    command: &'a Command,
    parent: Option<&'a Command>,
    flags: Vec<(&'a Arg, OsString)>,
    /// Flags of the parent.
    inherited: Vec<(&'a Arg, OsString)>,
    positionals: Vec<OsString>,
    help: bool,
    version: bool,
}

impl<'a> Scan<'a> {
    fn new(command: &'a Command, parent: Option<&'a Command>) -> Self {
        Self {
            command,
            parent,
            flags: Vec::new(),
            inherited: Vec::new(),
            positionals: Vec::new(),
            help: false,
            version: false,
        }
    }

    fn read(&mut self, words: &[OsString]) -> Result<(), String> {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                self.positionals.extend(words.cloned());
                return Ok(());
            }
            let first_of_all = self.positionals.is_empty();
            let help = first_of_all && matches!(bytes, b"-h" | b"--help");
            let foreign = !help && takes_anything(self.command, self.positionals.len());
            // A command, or what starts like a flag and is none.
            let command = self.parent.is_none()
                && first_of_all
                && word.to_str().is_some_and(|name| self.is_command(name));
            let odd = bytes.len() > 1
                && bytes[0] == b'-'
                && bytes[1] != b'-'
                && !bytes[1].is_ascii_alphabetic();
            if foreign || command || odd {
                self.positionals.push(word.clone());
                self.positionals.extend(words.cloned());
                return Ok(());
            }
            if bytes.len() < 2 || bytes[0] != b'-' {
                self.positionals.push(word.clone());
                continue;
            }
            self.flag(word, &mut words)?;
        }
        Ok(())
    }

    fn is_command(&self, name: &str) -> bool {
        matches!(name, "help" | "h") || self.command.find_subcommand(name).is_some()
    }

    fn flag(
        &mut self,
        word: &OsString,
        rest: &mut std::slice::Iter<'_, OsString>,
    ) -> Result<(), String> {
        let bytes = word.as_bytes();
        let dashes = if bytes[1] == b'-' { 2 } else { 1 };
        let flag = &bytes[dashes..];
        let (name, value) = match flag.iter().position(|byte| *byte == b'=') {
            Some(at) => (&flag[..at], Some(OsStr::from_bytes(&flag[at + 1..]))),
            None => (flag, None),
        };
        let name = String::from_utf8_lossy(name).into_owned();
        if let "help" | "h" = name.as_str() {
            self.help = switch("help", value)?;
            return Ok(());
        }
        let (arg, inherited) = self.find(&name)?;
        if let ArgAction::Version = arg.get_action() {
            self.version = switch("version", value)?;
            return Ok(());
        }
        let value = match (is_switch(arg), value) {
            (true, value) => {
                let value = switch(&name, value)?;
                OsString::from(if value { "true" } else { "false" })
            }
            (false, Some(value)) => value.to_owned(),
            (false, None) => {
                let missing = || format!("flag needs an argument: {}", word.to_string_lossy());
                rest.next().cloned().ok_or_else(missing)?
            }
        };
        let flags = if inherited {
            &mut self.inherited
        } else {
            &mut self.flags
        };
        put(flags, arg, value);
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(&'a Arg, bool), String> {
        if let Some(arg) = named(self.command, name) {
            return Ok((arg, false));
        }
        let inherited = self.parent.and_then(|parent| named(parent, name));
        inherited
            .filter(|arg| !matches!(arg.get_action(), ArgAction::Version))
            .map(|arg| (arg, true))
            .ok_or_else(|| format!("flag provided but not defined: -{name}"))
    }

    fn refused(&self, message: String, command: Option<&str>) -> Line {
        let command = command.map(str::to_owned);
        if self.help {
            return Line::Help(command);
        }
        Line::Refused(Refusal {
            message,
            code: 1,
            usage: Usage::Help(command),
        })
    }
}

/// The last value counts, but of a list every one does.
fn put<'a>(flags: &mut Vec<(&'a Arg, OsString)>, arg: &'a Arg, value: OsString) {
    if !matches!(arg.get_action(), ArgAction::Append) {
        flags.retain(|(other, _)| other.get_id() != arg.get_id());
    }
    flags.push((arg, value));
}

fn named<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| {
        arg.get_long() == Some(name)
            || arg
                .get_short()
                .is_some_and(|short| name.chars().eq(std::iter::once(short)))
    })
}

/// Takes no value of its own word.
pub(super) fn is_switch(arg: &Arg) -> bool {
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::Version => true,
        _ => arg
            .get_num_args()
            .is_some_and(|count| count.min_values() == 0 && count.max_values() == 1),
    }
}

/// Go's `strconv.ParseBool`, where no value is true.
fn switch(name: &str, value: Option<&OsStr>) -> Result<bool, String> {
    let text = value.map(OsStr::to_string_lossy).unwrap_or_default();
    match parse_bool(&text) {
        Some(value) => Ok(value),
        None if text.is_empty() => Ok(true),
        None => Err(format!(
            "invalid value \"{text}\" for flag -{name}: parse error"
        )),
    }
}

/// Go's `strconv.ParseBool`.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// One word that clap takes, or none for what says the same as nothing.
fn canonical((arg, value): &(&Arg, OsString)) -> Option<OsString> {
    let long = arg.get_long()?;
    let mut word = format!("--{long}");
    if let ArgAction::SetTrue = arg.get_action() {
        return (value == "true").then(|| word.into());
    }
    // An empty path is none; clap has a word for that only in leaving the flag out.
    if value.is_empty() && is_path(arg) {
        return None;
    }
    word.push('=');
    let mut bytes = word.into_bytes();
    bytes.extend_from_slice(value.as_bytes());
    Some(OsString::from_vec(bytes))
}

fn is_path(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == clap::builder::ValueParser::path_buf().type_id()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definitions() -> Command {
        let switch = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let path = |name: &'static str| {
            let parser = clap::builder::ValueParser::path_buf();
            Arg::new(name).long(name).value_parser(parser)
        };
        let id = || Arg::new("id").required(true);
        let rest = Arg::new("rest")
            .num_args(0..)
            .trailing_var_arg(true)
            .allow_hyphen_values(true);
        Command::new("box")
            .arg(switch("debug"))
            .arg(path("root"))
            .arg(
                Arg::new("version")
                    .long("version")
                    .short('v')
                    .action(ArgAction::Version),
            )
            .subcommand(
                Command::new("make")
                    .arg(path("bundle").short('b'))
                    .arg(switch("keep"))
                    .arg(id()),
            )
            .subcommand(
                Command::new("enter")
                    .arg(
                        Arg::new("env")
                            .long("env")
                            .short('e')
                            .action(ArgAction::Append),
                    )
                    .arg(id())
                    .arg(rest),
            )
            .subcommand(
                Command::new("kill")
                    .arg(id())
                    .arg(Arg::new("signal").allow_hyphen_values(true)),
            )
            .subcommand(Command::new("list"))
            .subcommand(
                Command::new("later").arg(
                    Arg::new("rest")
                        .num_args(0..)
                        .trailing_var_arg(true)
                        .allow_hyphen_values(true),
                ),
            )
    }

    fn of(line: &str) -> Line {
        let argv: Vec<OsString> = line
            .split(' ')
            .map(|word| OsString::from(word.replace('\'', "")))
            .collect();
        read(&definitions(), &argv)
    }

    #[test]
    fn right_lines_in_claps_order() {
        for (line, want) in [
            ("box make x", "box make -- x"),
            (
                "box -debug make -bundle /b x",
                "box --debug make --bundle=/b -- x",
            ),
            (
                "box make x -b=/b --root /r",
                "box --root=/r make --bundle=/b -- x",
            ),
            ("box --root /a make --root=/b x", "box --root=/b make -- x"),
            ("box make --keep=false x", "box make -- x"),
            ("box make --keep=0 --keep x", "box make --keep -- x"),
            ("box make --keep --keep=F x", "box make -- x"),
            ("box make -b /a -b /b x", "box make --bundle=/b -- x"),
            ("box make -b '' x", "box make -- x"),
            ("box make -- --keep", "box make -- --keep"),
            ("box make -1", "box make -- -1"),
            (
                "box enter -e A=1 -e B=2 x sh -c -e",
                "box enter --env=A=1 --env=B=2 -- x sh -c -e",
            ),
            ("box enter x -- sh", "box enter -- x sh"),
            ("box enter -e -x x", "box enter --env=-x -- x"),
            ("box kill x -9", "box kill -- x -9"),
            ("box list --debug", "box --debug list --"),
            ("box make help", "box make -- help"),
            ("box later --any x", "box later -- --any x"),
        ] {
            let Line::Run(words) = of(line) else {
                panic!("{line}: {:?}", of(line));
            };
            let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
            assert_eq!(words.join(" "), want, "{line}");
        }
    }

    #[test]
    fn help_and_version() {
        for (line, want) in [
            ("box", None),
            ("box ''", None),
            ("box -h", None),
            ("box help", None),
            ("box h", None),
            ("box --help make", Some("make")),
            ("box help make", Some("make")),
            ("box h make more", Some("make")),
            ("box make --help", Some("make")),
            ("box make -h x y", Some("make")),
            ("box make -h --nope", Some("make")),
            ("box later -h", Some("later")),
        ] {
            match of(line) {
                Line::Help(topic) => assert_eq!(topic.as_deref(), want, "{line}"),
                other => panic!("{line}: {other:?}"),
            }
        }
        for line in [
            "box -v",
            "box --version",
            "box -v make",
            "box --debug -v nope",
        ] {
            assert!(matches!(of(line), Line::Version), "{line}");
        }
    }

    #[test]
    fn refusals_have_runcs_words() {
        let root = || Usage::Help(None);
        let make = || Usage::Help(Some("make".to_owned()));
        for (line, message, code, usage) in [
            ("box nope", "No help topic for 'nope'", 3, Usage::Nothing),
            ("box nope -h", "No help topic for 'nope'", 1, Usage::Nothing),
            (
                "box help nope",
                "No help topic for 'nope'",
                3,
                Usage::Nothing,
            ),
            (
                "box --nope",
                "flag provided but not defined: -nope",
                1,
                root(),
            ),
            (
                "box make -v",
                "flag provided but not defined: -v",
                1,
                make(),
            ),
            (
                "box make -kb x",
                "flag provided but not defined: -kb",
                1,
                make(),
            ),
            ("box make x -b", "flag needs an argument: -b", 1, make()),
            ("box --root", "flag needs an argument: --root", 1, root()),
            (
                "box make --keep=x y",
                "invalid value \"x\" for flag -keep: parse error",
                1,
                make(),
            ),
            (
                "box make",
                "box: \"make\" requires exactly 1 argument(s)",
                1,
                Usage::Wrong,
            ),
            (
                "box make x y",
                "box: \"make\" requires exactly 1 argument(s)",
                1,
                Usage::Wrong,
            ),
            (
                "box list x",
                "box: \"list\" requires exactly 0 argument(s)",
                1,
                Usage::Wrong,
            ),
            (
                "box enter",
                "box: \"enter\" requires a minimum of 1 argument(s)",
                1,
                Usage::Wrong,
            ),
            (
                "box kill a b c",
                "box: \"kill\" requires a maximum of 2 argument(s)",
                1,
                Usage::Wrong,
            ),
        ] {
            let want = Refusal {
                message: message.to_owned(),
                code,
                usage,
            };
            match of(line) {
                Line::Refused(refusal) => assert_eq!(refusal, want, "{line}"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }
}
