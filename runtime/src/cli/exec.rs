//! `exec`: a new process in a running container.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use coracle_oci::config;
use coracle_oci::spec::{Capability, LinuxCapabilities, Process, Spec};

use super::GlobalArgs;
use crate::bundle::read_document;
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result};
use crate::host::HostFacts;
use crate::join::{self, Joined};
use crate::launch::foreground::Signals;
use crate::launch::{terminal_fits, write_pid_file};
use crate::log;
use crate::plan::LaunchOptions;
use crate::seccomp;
use crate::state::{self, Container};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// path to an AF_UNIX socket which will receive the master end of the console's pseudoterminal
    #[arg(long, value_name = "value")]
    console_socket: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor of the process
    #[arg(long, value_name = "value")]
    pidfd_socket: Option<PathBuf>,
    /// current working directory in the container
    #[arg(long, value_name = "value")]
    cwd: Option<PathBuf>,
    /// set environment variables
    #[arg(long, short = 'e', value_name = "value")]
    env: Vec<String>,
    /// allocate a pseudo-TTY
    #[arg(long, short = 't')]
    tty: bool,
    /// UID (format: <uid>[:<gid>])
    #[arg(long, short = 'u', value_name = "value")]
    user: Option<String>,
    /// additional gids
    #[arg(long, short = 'g', value_name = "value")]
    additional_gids: Vec<u32>,
    /// path to the process.json
    #[arg(long, short = 'p', value_name = "value")]
    process: Option<PathBuf>,
    /// detach from the container's process
    #[arg(long, short = 'd')]
    detach: bool,
    /// specify the file to write the process id to
    #[arg(long, value_name = "value")]
    pid_file: Option<PathBuf>,
    /// set the asm process label for the process commonly used with selinux
    #[arg(long, value_name = "value")]
    process_label: Option<String>,
    /// set the apparmor profile for the process
    #[arg(long, value_name = "value")]
    apparmor: Option<String>,
    /// set the no new privileges value for the process
    #[arg(long, value_name = "bool", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", hide_possible_values = true)]
    no_new_privs: Option<bool>,
    /// add a capability to the bounding set for the process
    #[arg(long, short = 'c', value_name = "value")]
    cap: Vec<String>,
    /// Pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>
    #[arg(long, value_name = "value")]
    cgroup: Vec<String>,
    /// allow exec in a paused container
    #[arg(long)]
    ignore_paused: bool,
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// the command and its arguments
    #[arg(
        value_name = "command",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<String>,
}

pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let listen_fds = super::create::check_inherited_fds(args.preserve_fds)?;
    crate::sealed::ensure()?;
    let container = Container::open(&global.root, &args.id)?;
    container.allows(state::Request::Exec {
        ignore_paused: args.ignore_paused,
    })?;
    let parsed = config::parse(&container.entry.config()?)
        .map_err(|error| Error::new(Kind::Invalid, "", "").source(error))?;
    let mut warnings = Vec::new();
    let process = args.process(&parsed.spec, &mut warnings)?;
    for warning in &warnings {
        log::warning(global, warning);
    }
    crate::spec::check_process(&process, &HostFacts::probe()?)?;
    let terminal = process.terminal().unwrap_or(false);
    terminal_fits(terminal, !args.detach, args.console_socket.is_some())?;
    let connect = |path: &Option<PathBuf>| {
        let path = path.as_deref().filter(|path| !path.as_os_str().is_empty());
        path.map(ConsoleSocket::connect).transpose()
    };
    let pidfd_socket = connect(&args.pidfd_socket)?;
    let signals = if args.detach {
        None
    } else {
        Some(Signals::block()?)
    };
    let joined = join::join(join::Request {
        record: &container.record,
        linux: parsed.spec.linux().as_ref(),
        process: &process,
        options: LaunchOptions {
            preserve_fds: args.preserve_fds,
            listen_fds,
            bridged: !args.detach,
            ..LaunchOptions::default()
        },
        cgroups: &args.cgroup,
        seccomp_cache: &global.root,
        console: connect(&args.console_socket)?,
    })
    .map_err(|error| error.context("unable to start container process"))?;
    let linux = parsed.spec.linux().as_ref();
    if let Some(profile) = linux.and_then(|linux| linux.seccomp().as_ref()) {
        log::debug_each(global, || seccomp::unknown_calls(profile));
    }
    tell(global, &joined);
    finish(args, joined, pidfd_socket.as_ref(), signals.as_ref())
}

fn tell(global: &GlobalArgs, joined: &Joined) {
    let pid = joined.pid;
    log::debug(global, || {
        format!("nsexec container setup: cloned pid {pid}")
    });
    if let Some(cpus) = &joined.initial_affinity {
        log::debug(global, || format!("nsexec: affinity: {cpus}"));
    }
    log::debug(global, || {
        format!("child process in init(): pid {pid} has joined the container")
    });
    log::debug(global, || "setns_init: about to exec".to_owned());
}

fn finish(
    args: &Args,
    mut joined: Joined,
    pidfd_socket: Option<&ConsoleSocket>,
    signals: Option<&Signals>,
) -> Result<ExitCode> {
    use std::os::fd::AsFd as _;
    if let Some(socket) = pidfd_socket {
        socket.send(joined.pidfd.as_fd(), b"pidfd")?;
    }
    if let Some(path) = args
        .pid_file
        .as_deref()
        .filter(|path| !path.as_os_str().is_empty())
    {
        write_pid_file(path, joined.pid)?;
    }
    match signals {
        None => Ok(ExitCode::SUCCESS),
        Some(signals) => signals
            .follow(joined.pid, joined.master.take(), None)
            .map(ExitCode::from),
    }
}

impl Args {
    /// The process to run: the given document, or the container's own with the flags applied.
    fn process(&self, spec: &Spec, warnings: &mut Vec<String>) -> Result<Process> {
        let own = spec
            .process()
            .as_ref()
            .ok_or_else(|| Error::invalid("process property must not be empty"))?;
        if let Some(path) = &self.process {
            return document(path, own, warnings);
        }
        if self.command.is_empty() {
            return Err(Error::invalid("exec args cannot be empty"));
        }
        let mut process = own.clone();
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        process.set_console_size(None);
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if let Some(profile) = &self.apparmor {
            process.set_apparmor_profile(Some(profile.clone()));
        }
        if let Some(label) = &self.process_label {
            process.set_selinux_label(Some(label.clone()));
        }
        if self.no_new_privs.is_some() {
            process.set_no_new_privileges(self.no_new_privs);
        }
        if !self.env.is_empty() {
            let mut env = own.env().clone().unwrap_or_default();
            env.extend(self.env.iter().cloned());
            process.set_env(Some(env));
        }
        if !self.cap.is_empty() {
            process.set_capabilities(Some(with_capabilities(own, &self.cap, warnings)?));
        }
        if let Some(user) = &self.user {
            let (uid, gid) = parse_user(user)?;
            process.user_mut().set_uid(uid);
            if let Some(gid) = gid {
                process.user_mut().set_gid(gid);
            }
        }
        if !self.additional_gids.is_empty() {
            let mut gids = own.user().additional_gids().clone().unwrap_or_default();
            gids.extend(&self.additional_gids);
            process.user_mut().set_additional_gids(Some(gids));
        }
        Ok(process)
    }
}

/// A process.json; what it leaves out comes from the container.
fn document(path: &Path, own: &Process, warnings: &mut Vec<String>) -> Result<Process> {
    let (mut process, unknown) = config::parse_process(&read_document(path)?)
        .map_err(|error| Error::new(Kind::Invalid, "", "").source(error))?;
    warnings.extend(unknown);
    if process.capabilities().is_none() {
        process.set_capabilities(own.capabilities().clone());
    }
    if process
        .apparmor_profile()
        .as_deref()
        .unwrap_or_default()
        .is_empty()
    {
        process.set_apparmor_profile(own.apparmor_profile().clone());
    }
    if process
        .selinux_label()
        .as_deref()
        .unwrap_or_default()
        .is_empty()
    {
        process.set_selinux_label(own.selinux_label().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(own.rlimits().clone());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(own.oom_score_adj());
    }
    if process.scheduler().is_none() {
        process.set_scheduler(own.scheduler().clone());
    }
    if process.io_priority().is_none() {
        process.set_io_priority(*own.io_priority());
    }
    if process.exec_cpu_affinity().is_none() {
        process.set_exec_cpu_affinity(own.exec_cpu_affinity().clone());
    }
    Ok(process)
}

/// `--cap`: added to the sets that a program can use. A name that this build does not know may be
/// one of a newer kernel.
fn with_capabilities(
    own: &Process,
    names: &[String],
    warnings: &mut Vec<String>,
) -> Result<LinuxCapabilities> {
    let mut sets = match own.capabilities() {
        Some(sets) => sets.clone(),
        None => empty_capabilities()?,
    };
    for name in names {
        let bare = name.to_ascii_uppercase();
        let bare = bare.strip_prefix("CAP_").unwrap_or(&bare);
        let Ok(capability) = bare.parse::<Capability>() else {
            warnings.push(format!(
                "ignoring unknown or unavailable capabilities: [{name}]"
            ));
            continue;
        };
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective, permitted) = (
            with(sets.bounding()),
            with(sets.effective()),
            with(sets.permitted()),
        );
        // Ambient takes inheritable, which this flag does not give.
        if sets.inheritable().is_some() {
            let ambient = with(sets.ambient());
            sets.set_ambient(ambient);
        }
        sets.set_bounding(bounding)
            .set_effective(effective)
            .set_permitted(permitted);
    }
    Ok(sets)
}

/// oci-spec's own default grants three capabilities; this one grants none.
fn empty_capabilities() -> Result<LinuxCapabilities> {
    serde_json::from_str("{}")
        .map_err(|error| Error::new(Kind::Internal, "empty capabilities", "").source(error))
}

fn parse_user(text: &str) -> Result<(u32, Option<u32>)> {
    let number = |kind: &str, part: &str| {
        let digits = part.strip_prefix('+').unwrap_or(part);
        let digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        part.parse::<u32>().map_err(|_| {
            let why = if digits {
                "value out of range"
            } else {
                "invalid syntax"
            };
            Error::invalid(format!("bad {kind}: strconv.Atoi: parsing {part:?}: {why}"))
        })
    };
    match text.split_once(':') {
        Some((uid, gid)) => {
            let gid = number("gid", gid)?;
            Ok((number("uid", uid)?, Some(gid)))
        }
        None => Ok((number("uid", text)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_table() {
        type Want = Option<(u32, Option<u32>)>;
        let cases: &[(&str, Want)] = &[
            ("0", Some((0, None))),
            ("1000:100", Some((1000, Some(100)))),
            ("name", None),
            ("1:", None),
            ("-1", None),
            ("4294967296", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse_user(text).ok(), *want, "{text}");
        }
        for (text, want) in [
            ("x", "bad uid: strconv.Atoi: parsing \"x\": invalid syntax"),
            (
                "x:y",
                "bad gid: strconv.Atoi: parsing \"y\": invalid syntax",
            ),
            (
                "4294967296",
                "bad uid: strconv.Atoi: parsing \"4294967296\": value out of range",
            ),
        ] {
            assert_eq!(parse_user(text).unwrap_err().to_string(), want);
        }
    }

    fn own() -> Process {
        serde_json::from_str(
            r#"{"cwd":"/w","user":{"uid":5,"gid":6},"args":["init"],"env":["A=1"],
                "terminal":true,"capabilities":{"bounding":["CAP_KILL"]},
                "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}],"oomScoreAdj":7}"#,
        )
        .unwrap()
    }

    #[test]
    fn document_takes_the_rest_from_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("process.json");
        std::fs::write(
            &path,
            r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["x"]}"#,
        )
        .unwrap();
        let process = document(&path, &own(), &mut Vec::new()).unwrap();
        assert_eq!(process.user().uid(), 0);
        assert_eq!(process.capabilities(), own().capabilities());
        assert_eq!(process.rlimits(), own().rlimits());
        assert_eq!(process.oom_score_adj(), Some(7));
        assert_eq!(process.terminal(), None);
    }

    #[test]
    fn capabilities_are_added_to_three_sets() {
        let mut warnings = Vec::new();
        let sets = with_capabilities(&own(), &["cap_chown".to_owned()], &mut warnings).unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 2);
        assert_eq!(sets.effective().as_ref().unwrap().len(), 1);
        assert!(sets.ambient().as_ref().is_none_or(|set| set.is_empty()));
        let mut inheriting = own();
        let mut sets = inheriting.capabilities().clone().unwrap();
        sets.set_inheritable(Some(Default::default()));
        inheriting.set_capabilities(Some(sets));
        let sets =
            with_capabilities(&inheriting, &["CAP_CHOWN".to_owned()], &mut warnings).unwrap();
        assert_eq!(sets.ambient().as_ref().unwrap().len(), 1);
        assert!(warnings.is_empty());
        let sets = with_capabilities(&own(), &["CAP_NOPE".to_owned()], &mut warnings).unwrap();
        assert_eq!(&sets, own().capabilities().as_ref().unwrap());
        assert_eq!(
            warnings,
            ["ignoring unknown or unavailable capabilities: [CAP_NOPE]"]
        );
        assert!(
            empty_capabilities()
                .unwrap()
                .bounding()
                .as_ref()
                .is_none_or(|set| set.is_empty())
        );
    }
}
