//! The command line: runc's commands and flags, parsed once and dispatched.
//!
//! Each command's own arguments and work live in the file of its name. This file knows which
//! commands there are, what each adds to an error's text and which exit code it fails with.

pub mod args;
pub mod create;
pub mod delete;
pub mod events;
pub mod exec;
mod fast;
pub mod features;
pub mod kill;
pub mod list;
pub mod pause;
pub mod pod_init;
pub mod ps;
mod resources;
pub mod resume;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
pub mod update;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use args::{GlobalArgs, LogFormat, Rootless};

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
    /// checkpoint a running container (not supported yet)
    #[command(disable_help_flag = true)]
    Checkpoint(NotServed),
    /// create a container
    Create(create::Args),
    /// delete any resources held by the container often used with detached container
    Delete(delete::Args),
    /// display container events such as OOM notifications, cpu, memory, and IO usage statistics
    Events(events::Args),
    /// execute new process inside the container
    Exec(exec::Args),
    /// show the enabled features
    Features(features::Args),
    /// send the specified signal (default: SIGTERM) to the container's init process
    Kill(kill::Args),
    /// lists containers started by coracle with the given root
    List(list::Args),
    /// suspends all processes inside the container
    Pause(pause::Args),
    /// process 1 of a pod that shares its pid namespace
    #[command(hide = true)]
    PodInit(pod_init::Args),
    /// displays the processes running inside a container
    Ps(ps::Args),
    /// restore a container from a previous checkpoint (not supported yet)
    #[command(disable_help_flag = true)]
    Restore(NotServed),
    /// resumes all processes that have been previously paused
    Resume(resume::Args),
    /// create and run a container
    Run(run::Args),
    /// create a new specification file
    Spec(spec::Args),
    /// executes the user defined process in a created container
    Start(start::Args),
    /// output the state of a container
    State(state::Args),
    /// update container resource constraints
    Update(update::Args),
}

/// Takes whatever follows, so that the refusal names the command and not one of its flags.
#[derive(Debug, clap::Args)]
struct NotServed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

impl Command {
    fn run(&self, global: &GlobalArgs) -> Result<ExitCode> {
        match self {
            Self::Checkpoint(_) => Err(not_served("checkpoint")),
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
            Self::Restore(_) => Err(not_served("restore")),
            Self::Resume(args) => resume::run(args, global),
            Self::Run(args) => run::run(args, global),
            Self::Spec(args) => spec::run(args, global),
            Self::Start(args) => start::run(args, global),
            Self::State(args) => state::run(args, global),
            Self::Update(args) => update::run(args, global),
        }
    }

    /// What runc puts before the error of this command, and the exit code it then has.
    fn failure(&self) -> (Option<&'static str>, u8) {
        match self {
            Self::Create(_) => (Some("coracle create failed"), 1),
            Self::Run(_) => (Some("coracle run failed"), 1),
            Self::Exec(_) => (Some("exec failed"), EXEC_FAILED),
            _ => (None, 1),
        }
    }
}

fn not_served(command: &'static str) -> Error {
    Error::unsupported(format!(
        "{command} is not supported by this version of coracle"
    ))
}

/// The lines of `runc --version`; the commit's only if the build knew it.
fn version() -> String {
    let commit = match option_env!("CORACLE_COMMIT") {
        Some(commit) if !commit.is_empty() => format!("commit: {commit}\n"),
        _ => String::new(),
    };
    format!(
        "coracle version {}\n{commit}spec: {SPEC_VERSION}\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn parse(argv: &[OsString]) -> std::result::Result<(GlobalArgs, Command), clap::Error> {
    match fast::parse(argv) {
        Some(parsed) => Ok(parsed),
        None => parse_whole(argv),
    }
}

fn parse_whole(argv: &[OsString]) -> std::result::Result<(GlobalArgs, Command), clap::Error> {
    let matches = CommandLine::command().try_get_matches_from(argv)?;
    let line = CommandLine::from_arg_matches(&matches)?;
    Ok((line.global.resolve(), line.command))
}

/// Runs the command line and prints its failure, if any; the one place that prints one.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    let (global, command) = match parse(&argv) {
        Ok(parsed) => parsed,
        Err(error) => return refuse(&error, &argv),
    };
    match command.run(&global) {
        Ok(code) => code,
        Err(error) => {
            let (prefix, code) = command.failure();
            let message = match prefix {
                Some(prefix) => format!("{prefix}: {error:#}"),
                None => format!("{error:#}"),
            };
            log::fatal(&global, &message);
            ExitCode::from(code)
        }
    }
}

/// Help and version are answers; anything else is a refusal with runc's exit code 1.
fn refuse(error: &clap::Error, argv: &[OsString]) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayVersion => {
            // A closed stdout leaves nobody to tell.
            let _ = std::io::stdout().write_all(version().as_bytes());
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelp | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = std::io::stdout().write_all(error.to_string().as_bytes());
            ExitCode::SUCCESS
        }
        _ => {
            let text = error.to_string();
            let mut words = text
                .lines()
                .map(str::trim)
                .take_while(|line| !line.starts_with("Usage"));
            let mut message = words
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ")
                .to_owned();
            for word in words.filter(|word| !word.is_empty()) {
                message.push(' ');
                message.push_str(word);
            }
            log::fatal(&GlobalArgs::log_flags_of(argv), &message);
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn definition_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn global_flags_take_the_forms_that_engines_use() {
        let line = "coracle --root /r --log=/l --log-format json --systemd-cgroup --debug=false \
                    --rootless=true state id";
        let (global, command) = parse(&words(&line.replace("                    ", ""))).unwrap();
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
            "coracle restore --image-path /x -d id",
            "coracle pod-init",
        ] {
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            if let Err(error) = parse(&words(&line)) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn version_has_runcs_lines() {
        let error = parse(&words("coracle --version")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayVersion);
        let text = version();
        let mut lines = text.lines();
        assert_eq!(
            lines.next(),
            Some(concat!("coracle version ", env!("CARGO_PKG_VERSION")))
        );
        assert_eq!(text.lines().last(), Some("spec: 1.3.0"));
    }

    #[test]
    fn unknown_command_is_refused() {
        assert!(parse(&words("coracle nonsense")).is_err());
        assert!(parse(&words("coracle state")).is_err());
        assert!(parse(&words("coracle state a b")).is_err());
    }

    #[test]
    fn commands_not_served_say_so() {
        let (global, command) = parse(&words("coracle checkpoint --pre-dump id")).unwrap();
        let error = command.run(&global).unwrap_err();
        assert_eq!(
            error.to_string(),
            "checkpoint is not supported by this version of coracle"
        );
    }
}
