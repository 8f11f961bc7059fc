//! The command line: runc's commands and flags, parsed once and dispatched.
//!
//! Each command's own arguments and work live in the file of its name. This file knows which
//! commands there are, what each adds to an error's text and which exit code it fails with.

pub mod args;
pub mod checkpoint;
pub mod create;
pub mod delete;
pub mod events;
pub mod exec;
mod fast;
pub mod features;
mod help;
pub mod kill;
mod line;
pub mod list;
pub mod pause;
pub mod pod_init;
pub mod ps;
mod resources;
pub mod restore;
pub mod resume;
mod root;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
mod texts;
pub mod update;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use args::{GlobalArgs, LogFormat, Rootless};

use line::{Line, Usage};

use crate::error::{Error, Result};
use crate::log;

/// The newest OCI runtime-spec whose configs are understood.
pub const SPEC_VERSION: &str = "1.3.0";

/// `runc exec` alone fails with 255, which callers tell from the program's own codes.
const EXEC_FAILED: u8 = 255;

#[derive(Debug, Parser)]
#[command(
    name = "coracle",
    about = "Open Container Initiative runtime",
    long_about = texts::PROGRAM,
    version,
    disable_version_flag = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct CommandLine {
    #[command(flatten)]
    global: args::RawGlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// checkpoint a running container
    #[command(long_about = texts::CHECKPOINT)]
    Checkpoint(checkpoint::Args),
    /// create a container
    #[command(long_about = texts::CREATE)]
    Create(create::Args),
    /// delete any resources held by the container often used with detached container
    #[command(long_about = texts::DELETE)]
    Delete(delete::Args),
    /// display container events such as OOM notifications, cpu, memory, and IO usage statistics
    #[command(long_about = texts::EVENTS)]
    Events(events::Args),
    /// execute new process inside the container
    #[command(long_about = texts::EXEC)]
    Exec(exec::Args),
    /// show the enabled features
    #[command(long_about = texts::FEATURES)]
    Features(features::Args),
    /// kill sends the specified signal (default: SIGTERM) to the container's init process
    #[command(long_about = texts::KILL)]
    Kill(kill::Args),
    /// lists containers started by coracle with the given root
    #[command(long_about = texts::LIST)]
    List(list::Args),
    /// pause suspends all processes inside the container
    #[command(long_about = texts::PAUSE)]
    Pause(pause::Args),
    /// process 1 of a pod that shares its pid namespace
    #[command(hide = true)]
    PodInit(pod_init::Args),
    /// ps displays the processes running inside a container
    #[command(long_about = texts::PS)]
    Ps(ps::Args),
    /// restore a container from a previous checkpoint
    #[command(long_about = texts::RESTORE)]
    Restore(restore::Args),
    /// resumes all processes that have been previously paused
    #[command(long_about = texts::RESUME)]
    Resume(resume::Args),
    /// create and run a container
    #[command(long_about = texts::RUN)]
    Run(run::Args),
    /// create a new specification file
    #[command(long_about = texts::SPEC)]
    Spec(spec::Args),
    /// executes the user defined process in a created container
    #[command(long_about = texts::START)]
    Start(start::Args),
    /// output the state of a container
    #[command(long_about = texts::STATE)]
    State(state::Args),
    /// update container resource constraints
    #[command(long_about = texts::UPDATE)]
    Update(update::Args),
}

impl Command {
    fn run(&self, global: &GlobalArgs) -> Result<ExitCode> {
        match self {
            Self::Checkpoint(args) => checkpoint::run(args, global),
            Self::Create(args) => create::run(args, global),
            Self::Delete(args) => delete::run(args, global),
            Self::Events(args) => events::run(args, global),
            Self::Exec(args) => exec::run(args, global),
            Self::Features(args) => features::run(args, global),
            Self::Kill(args) => kill::run(args, global),
            Self::List(args) => list::run(args, global),
            Self::Pause(args) => pause::run(args, global),
            Self::PodInit(args) => pod_init::run(args, global),
            Self::Ps(args) => ps::run(args, global),
            Self::Restore(args) => restore::run(args, global),
            Self::Resume(args) => resume::run(args, global),
            Self::Run(args) => run::run(args, global),
            Self::Spec(args) => spec::run(args, global),
            Self::Start(args) => start::run(args, global),
            Self::State(args) => state::run(args, global),
            Self::Update(args) => update::run(args, global),
        }
    }

    /// The error of this command as runc words it, and the exit code it then has. Two commands name
    /// the program: by the name it was called by, as the version does.
    fn failure(&self, program: impl FnOnce() -> String, error: &Error) -> (String, u8) {
        match self {
            Self::Create(_) => (format!("{} create failed: {error:#}", program()), 1),
            Self::Run(_) => (format!("{} run failed: {error:#}", program()), 1),
            Self::Exec(_) => (format!("exec failed: {error:#}"), EXEC_FAILED),
            _ => (format!("{error:#}"), 1),
        }
    }
}

/// The name that this program was called by, which is runc's where coracle stands in for it.
fn program(argv: &[OsString]) -> String {
    let name = argv.first().and_then(|word| Path::new(word).file_name());
    name.map_or_else(
        || "coracle".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// The lines of `runc --version`; the commit's only if the build knew it.
fn version(program: &str) -> String {
    let commit = match option_env!("CORACLE_COMMIT") {
        Some(commit) if !commit.is_empty() => format!("commit: {commit}\n"),
        _ => String::new(),
    };
    format!(
        "{program} version {}\n{commit}spec: {SPEC_VERSION}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The definitions of all commands and flags, for the generators of manual pages and completions.
pub fn definitions() -> clap::Command {
    CommandLine::command()
}

/// Runs the command line and prints its failure, if any; the one place that prints one.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    let (global, command) = match fast::parse(&argv) {
        Some(parsed) => parsed,
        None => match whole(&argv) {
            Ok(parsed) => parsed,
            Err(code) => return code,
        },
    };
    let global = match global.resolve() {
        Ok(global) => global,
        Err(error) => {
            // There is no log yet but stderr.
            log::fatal(&GlobalArgs::log_flags_of(&[]), &format!("{error:#}"));
            return ExitCode::FAILURE;
        }
    };
    match command.run(&global) {
        Ok(code) => code,
        Err(error) => {
            let (message, code) = command.failure(|| program(&argv), &error);
            log::fatal(&global, &message);
            ExitCode::from(code)
        }
    }
}

/// Any line, with the definitions of all commands. What is no command is answered here.
fn whole(argv: &[OsString]) -> std::result::Result<(args::RawGlobalArgs, Command), ExitCode> {
    let definitions = CommandLine::command();
    let refusal = match line::read(&definitions, argv) {
        Line::Run(words) => match parse(definitions.clone(), words) {
            Ok(parsed) => return Ok(parsed),
            Err(error) => refusal_of(&definitions, &error),
        },
        Line::Help(topic) => {
            let text = help::text(&definitions, topic.as_deref(), &program(argv));
            return Err(answer(&text));
        }
        Line::Version => return Err(answer(&version(&program(argv)))),
        Line::Refused(refusal) => refusal,
    };
    let stdout = match &refusal.usage {
        Usage::Nothing => String::new(),
        Usage::Wrong => "Incorrect Usage.\n\n".to_owned(),
        Usage::Help(topic) => {
            let mistake = format!("Incorrect Usage: {}\n\n", refusal.message);
            let _ = std::io::stderr().write_all(mistake.as_bytes());
            help::text(&definitions, topic.as_deref(), &program(argv))
        }
    };
    let _ = std::io::stdout().write_all(stdout.as_bytes());
    log::fatal(&GlobalArgs::log_flags_of(argv), &refusal.message);
    Err(ExitCode::from(refusal.code))
}

fn parse(
    definitions: clap::Command,
    words: Vec<OsString>,
) -> std::result::Result<(args::RawGlobalArgs, Command), clap::Error> {
    let matches = definitions.try_get_matches_from(words)?;
    let line = CommandLine::from_arg_matches(&matches)?;
    Ok((line.global, line.command))
}

/// A closed stdout leaves nobody to tell.
fn answer(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// What clap still finds wrong is a value: the words are Go's, where Go has any.
fn refusal_of(definitions: &clap::Command, error: &clap::Error) -> line::Refusal {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let arg = context(ContextKind::InvalidArg).unwrap_or_default();
    let flag = arg.trim_start_matches('-');
    let flag = flag.split([' ', '=', '[']).next().unwrap_or_default();
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let number = definitions
        .get_subcommands()
        .chain([definitions])
        .flat_map(clap::Command::get_arguments)
        .any(|arg| arg.get_long() == Some(flag) && help::is_number(arg));
    let source = std::error::Error::source(error).map(ToString::to_string);
    let why = match source {
        _ if number => {
            let digits = value.strip_prefix(['-', '+']).unwrap_or(value);
            let digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            let why = match digits {
                true => "value out of range",
                false => "invalid syntax",
            };
            format!("strconv.ParseInt: parsing \"{value}\": {why}")
        }
        Some(source) => source,
        None => error.kind().to_string(),
    };
    line::Refusal {
        message: format!("invalid value \"{value}\" for flag -{flag}: {why}"),
        code: 1,
        usage: Usage::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn parsed(line: &str) -> (GlobalArgs, Command) {
        let argv = words(line);
        let (global, command) = match fast::parse(&argv) {
            Some(parsed) => parsed,
            None => match line::read(&definitions(), &argv) {
                Line::Run(words) => {
                    parse(definitions(), words).unwrap_or_else(|error| panic!("{line}: {error}"))
                }
                other => panic!("{line}: {other:?}"),
            },
        };
        (global.resolve().unwrap(), command)
    }

    #[test]
    fn definition_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn global_flags_take_the_forms_that_engines_use() {
        let line = "coracle --root /r --log=/l --log-format json --systemd-cgroup --debug=false \
                    --rootless=true state id";
        let (global, command) = parsed(line);
        assert_eq!(global.root, Path::new("/r"));
        assert_eq!(global.log.as_deref(), Some(Path::new("/l")));
        assert_eq!(global.log_format, LogFormat::Json);
        assert!(global.systemd_cgroup);
        assert!(!global.debug);
        assert_eq!(global.rootless, Rootless::True);
        assert!(matches!(command, Command::State(_)));
    }

    #[test]
    fn every_form_that_engines_use_parses() {
        for line in [
            "coracle create --bundle /b --pid-file /p --console-socket /c --no-pivot \
             --no-new-keyring --preserve-fds 2 --pidfd-socket /s id",
            "coracle create -b /b id",
            "coracle run -d --keep --no-subreaper --bundle=/b id",
            "coracle run id --detach",
            "coracle start id",
            "coracle state id",
            "coracle kill id",
            "coracle kill --all id KILL",
            "coracle kill id 9",
            "coracle kill -a id SIGTERM",
            "coracle delete -f id",
            "coracle delete id --force",
            "coracle exec id ls -l --color",
            "coracle exec -t -e A=b --env C=d -u 1:2 -g 3 --additional-gids 4 --cwd /x id sh -c x",
            "coracle exec --process /p -d --pid-file /f --console-socket /c id",
            "coracle exec --cap CAP_KILL -c CAP_CHOWN --no-new-privs --apparmor a \
             --process-label l --preserve-fds 1 --cgroup c --ignore-paused id true",
            "coracle list -q",
            "coracle list --format json",
            "coracle ps -f json id",
            "coracle ps id -ef",
            "coracle pause id",
            "coracle resume id",
            "coracle update -r - id",
            "coracle update --memory 64M --cpu-quota 1000 --pids-limit 3 id",
            "coracle events --stats id",
            "coracle events --interval 5s id",
            "coracle spec --rootless -b /b",
            "coracle features",
            "coracle checkpoint --image-path /x --leave-running id",
            "coracle checkpoint --work-path /w --parent-path ../p --tcp-established \
             --tcp-skip-in-flight --link-remap --ext-unix-sk --shell-job --lazy-pages \
             --status-fd 3 --page-server 1.2.3.4:5 --file-locks --pre-dump \
             --manage-cgroups-mode ignore --empty-ns network --auto-dedup id",
            "coracle checkpoint --status-fd -1 id",
            "coracle restore --image-path /x -d id",
            "coracle restore --console-socket /c --work-path /w --tcp-established --ext-unix-sk \
             --shell-job --file-locks --manage-cgroups-mode=soft -b /b --detach --pid-file /p \
             --no-subreaper --no-pivot --empty-ns network --auto-dedup --lazy-pages \
             --lsm-profile apparmor:x --lsm-mount-context c id",
            "coracle pod-init",
        ] {
            parsed(line);
        }
    }

    #[test]
    fn version_has_runcs_lines() {
        let text = version(&program(&words("/usr/sbin/runc -v")));
        let first = concat!("runc version ", env!("CARGO_PKG_VERSION"));
        assert_eq!(text.lines().next(), Some(first));
        assert_eq!(text.lines().last(), Some("spec: 1.3.0"));
        assert_eq!(program(&[]), "coracle");
    }

    #[test]
    fn wrong_values_have_gos_words() {
        for (words, want) in [
            (
                "coracle run --preserve-fds=x -- y",
                "invalid value \"x\" for flag -preserve-fds: \
                 strconv.ParseInt: parsing \"x\": invalid syntax",
            ),
            (
                "coracle run --preserve-fds=99999999999 -- y",
                "invalid value \"99999999999\" for flag -preserve-fds: \
                 strconv.ParseInt: parsing \"99999999999\": value out of range",
            ),
            (
                "coracle events --interval=x -- y",
                "invalid value \"x\" for flag -interval: time: invalid duration \"x\"",
            ),
        ] {
            let error = parse(definitions(), self::words(words)).unwrap_err();
            assert_eq!(refusal_of(&definitions(), &error).message, want, "{words}");
        }
    }

    #[test]
    fn every_command_and_flag_has_help() {
        let definitions = definitions();
        let visible = |command: &&clap::Command| !command.is_hide_set();
        let program = help::text(&definitions, None, "coracle");
        for command in definitions.get_subcommands().filter(visible) {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name}");
            assert!(command.get_long_about().is_some(), "{name}");
            assert!(program.contains(&format!("\n   {name} ")), "{name}");
            let text = help::text(&definitions, Some(name), "coracle");
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let id = arg.get_id();
                assert!(arg.get_help().is_some(), "{name}: {id}");
                let shown = match arg.get_long() {
                    Some(long) => format!("\n   --{long}"),
                    None => arg.get_value_names().unwrap()[0].to_string(),
                };
                assert!(text.contains(&shown), "{name}: {id} in\n{text}");
            }
        }
    }

    #[test]
    fn help_has_runcs_shape() {
        let text = help::text(&definitions(), Some("list"), "runc");
        let want = [
            "NAME:\n   runc list - lists containers",
            "\n\nUSAGE:\n   runc list [options]\n\nDESCRIPTION:\n   Lists",
            "\n\nOPTIONS:\n   --format string, -f string  select one of: table or json \
             (default: \"table\")\n   --quiet, -q                 display only container IDs\n   \
             --help, -h                  show help\n\nGLOBAL OPTIONS:\n   --debug  ",
        ];
        for part in want {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        let text = help::text(&definitions(), Some("checkpoint"), "runc");
        assert!(!text.contains("(default: \"\")"), "{text}");
        let text = help::text(&definitions(), None, "runc");
        assert!(text.starts_with("NAME:\n   runc - Open Container Initiative runtime\n\n"));
        assert!(text.contains("\n   --help, -h           show help\n   --version, -v "));
    }
}
