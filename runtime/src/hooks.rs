//! Hooks: programs that run at the six points of a container's life, with its state on stdin.
//!
//! | point           | run by          | namespace | when                                |
//! |-----------------|-----------------|-----------|-------------------------------------|
//! | prestart        | parent          | runtime   | mounts stand, before pivot_root     |
//! | createRuntime   | parent          | runtime   | right after                         |
//! | createContainer | child           | container | right after, before pivot_root      |
//! | startContainer  | child           | container | at `start`, before the program      |
//! | poststart       | parent, `start` | runtime   | after the program has been executed |
//! | poststop        | `delete`        | runtime   | after the container is gone         |
//!
//! A hook without `env` has, as with runc: the runtime's own environment in the runtime's
//! namespaces; $PATH alone for createContainer; the program's for startContainer.

use std::ffi::{CString, OsStr};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use coracle_oci::spec::Hook;
use coracle_oci::state::State;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};

/// How much of a failed hook's output is shown.
const MAX_OUTPUT: u64 = 4096;

/// Runs the hooks of one point in order; the first failure ends it.
///
/// # Errors
/// A hook that cannot be started, fails or takes longer than its timeout.
pub fn run(point: &'static str, hooks: &[Hook], state: &State, cwd: Option<&Path>) -> Result<()> {
    run_in(point, hooks, state, Surroundings { cwd, env: None })
}

/// Where a hook runs, and what it has for an environment if it brings none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Surroundings<'a> {
    pub cwd: Option<&'a Path>,
    /// None is this process's own.
    pub env: Option<&'a [CString]>,
}

/// Like [`run`], in other surroundings than the runtime's.
///
/// # Errors
/// A hook that cannot be started, fails or takes longer than its timeout.
pub fn run_in(
    point: &'static str,
    hooks: &[Hook],
    state: &State,
    surroundings: Surroundings<'_>,
) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let document = serde_json::to_vec(state)
        .map_err(|error| Error::new(Kind::Internal, "encode state", "").source(error))?;
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, &document, surroundings).map_err(|reason| {
            Error::new(
                Kind::Hook,
                format!("error running {point} hook #{index}: {reason}"),
                "",
            )
        })?;
    }
    Ok(())
}

fn memory_file() -> Result<std::fs::File, String> {
    rustix::fs::memfd_create(c"hook", MemfdFlags::CLOEXEC)
        .map(std::fs::File::from)
        .map_err(|error| format!("memfd_create: {error}"))
}

/// Memory files for stdin and the output: no pipe to fill up, so no thread to empty it.
fn run_one(hook: &Hook, document: &[u8], surroundings: Surroundings<'_>) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let mut input = memory_file()?;
    input.write_all(document).map_err(text)?;
    input.rewind().map_err(text)?;
    let (mut stdout, mut stderr) = (memory_file()?, memory_file()?);

    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(rest);
    }
    set_env(&mut command, hook, surroundings.env);
    if let Some(cwd) = surroundings.cwd {
        command.current_dir(cwd);
    }
    command
        .stdin(input)
        .stdout(Stdio::from(stdout.try_clone().map_err(text)?))
        .stderr(Stdio::from(stderr.try_clone().map_err(text)?));
    let mut child = command.spawn().map_err(|error| {
        let reason = error
            .raw_os_error()
            .map_or_else(|| error.to_string(), crate::error::errno_text);
        format!("fork/exec {}: {reason}", hook.path().display())
    })?;
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let status = wait(&mut child, limit.map(Duration::from_secs))?;
    if status.success() {
        return Ok(());
    }
    Err(format!(
        "{}, stdout: {}, stderr: {}",
        describe(status),
        output(&mut stdout),
        output(&mut stderr)
    ))
}

fn set_env(command: &mut Command, hook: &Hook, default: Option<&[CString]>) {
    let entries: Vec<&[u8]> = match (hook.env(), default) {
        (Some(own), _) => own.iter().map(String::as_bytes).collect(),
        (None, Some(default)) => default.iter().map(|entry| entry.as_bytes()).collect(),
        (None, None) => return,
    };
    command.env_clear();
    for entry in entries {
        if let Some(at) = entry.iter().position(|byte| *byte == b'=') {
            let (name, value) = (&entry[..at], &entry[at + 1..]);
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
}

fn wait(child: &mut std::process::Child, limit: Option<Duration>) -> Result<ExitStatus, String> {
    let text = |error: std::io::Error| error.to_string();
    let Some(limit) = limit else {
        return child.wait().map_err(text);
    };
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let pidfd = pid
        .ok_or(Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(|error| format!("pidfd_open: {error}"))?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(0) => {
                child.kill().map_err(text)?;
                child.wait().map_err(text)?;
                return Err(format!(
                    "hook ran past specified timeout of {:.1}s",
                    limit.as_secs_f64()
                ));
            }
            Ok(_) => return child.wait().map_err(text),
            Err(Errno::INTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal: {}", signal_text(signal)),
        (None, None) => status.to_string(),
    }
}

/// strsignal(3) in lower case, as Go and with it runc's callers have it.
fn signal_text(signal: i32) -> String {
    let text = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        libc::SIGXCPU => "CPU time limit exceeded",
        libc::SIGXFSZ => "file size limit exceeded",
        libc::SIGSYS => "bad system call",
        other => return other.to_string(),
    };
    text.to_owned()
}

fn output(file: &mut std::fs::File) -> String {
    let mut bytes = Vec::new();
    if file.rewind().is_err() || file.take(MAX_OUTPUT).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_oci::state::Status;
    use serde_json::json;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"]});
        if let Some(timeout) = timeout {
            hook["timeout"] = json!(timeout);
        }
        serde_json::from_value(hook).unwrap()
    }

    fn state() -> State {
        State {
            oci_version: "1.2.0".into(),
            id: "c".into(),
            status: Status::Creating,
            pid: 1,
            bundle: "/b".into(),
            annotations: Default::default(),
        }
    }

    #[test]
    fn hook_reads_the_state_and_its_own_environment_only() {
        let script = "grep -q '\"id\":\"c\"' && [ \"$A\" = b ] && [ -z \"$USER\" ]";
        run("prestart", &[hook(script, None)], &state(), None).unwrap();
    }

    #[test]
    fn environment_of_a_hook_that_brings_none() {
        let path = std::env::var("PATH").unwrap();
        let cases: [(serde_json::Value, Option<&[CString]>, String); 4] = [
            (json!(null), None, format!("[ \"$PATH\" = '{path}' ]")),
            (
                json!(null),
                Some(&[c"A=1".to_owned(), c"B=2=3".to_owned()]),
                "[ $A$B = 12=3 ] && [ -z \"$HOME\" ]".to_owned(),
            ),
            (
                json!([]),
                None,
                "[ -z \"$HOME$CARGO_MANIFEST_DIR\" ]".to_owned(),
            ),
            (
                json!(["A=2"]),
                Some(&[c"A=1".to_owned()]),
                "[ $A = 2 ]".to_owned(),
            ),
        ];
        for (env, default, script) in cases {
            let mut document = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
            if !env.is_null() {
                document["env"] = env;
            }
            let hook = serde_json::from_value(document).unwrap();
            let surroundings = Surroundings {
                cwd: None,
                env: default,
            };
            run_in("prestart", &[hook], &state(), surroundings).unwrap();
        }
    }

    #[test]
    fn failure_names_point_number_and_output() {
        let hooks = [
            hook("true", None),
            hook("echo out; echo err >&2; exit 3", None),
        ];
        let error = run("poststart", &hooks, &state(), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running poststart hook #1: exit status 3, stdout: out, stderr: err"
        );
    }

    #[test]
    fn timeout_ends_the_hook() {
        let error = run("prestart", &[hook("sleep 30", Some(1))], &state(), None).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("hook ran past specified timeout of 1.0s"),
            "{error}"
        );
    }

    #[test]
    fn missing_program_is_named() {
        let hook: Hook = serde_json::from_value(json!({"path": "/no/such/hook"})).unwrap();
        let error = run("prestart", &[hook], &state(), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running prestart hook #0: fork/exec /no/such/hook: no such file or directory"
        );
    }
}
