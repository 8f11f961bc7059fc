//! Runs one plugin once: configuration in by stdin, result out by stdout, within a time.
//!
//! A plugin gets a process group of its own, an environment of nothing but CNI_* and PATH, and is
//! killed with its group when it overstays, floods, or when the caller goes away. Knows nothing
//! of chains.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

const MAX_STDOUT: usize = 4 * 1024 * 1024;
const MAX_STDERR: usize = 64 * 1024;
/// How long output may still come after the plugin's exit: a child of its may hold the pipe.
const DRAIN: Duration = Duration::from_secs(1);
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) struct Run<'a> {
    pub plugin: &'a Path,
    /// CNI_COMMAND and its companions.
    pub env: Vec<(&'static str, String)>,
    pub stdin: Vec<u8>,
    pub timeout: Duration,
}

#[derive(Debug)]
pub(super) enum Failure {
    /// Not started, or its pipes broke.
    Io(io::Error),
    TimedOut(Duration),
    Flooded,
    /// It said why in the specification's form.
    Refused(PluginError),
    /// It failed without saying why in that form.
    Exited {
        status: ExitStatus,
        stdout: String,
        stderr: String,
    },
}

/// The specification's error object.
#[derive(Debug, Deserialize)]
pub(super) struct PluginError {
    #[serde(default)]
    pub code: u64,
    #[serde(default)]
    pub msg: String,
    #[serde(default)]
    pub details: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Io(error) => write!(f, "{error}"),
            Failure::TimedOut(after) => {
                write!(f, "no answer within {} s; killed", after.as_secs_f32())
            }
            Failure::Flooded => write!(f, "more than {MAX_STDOUT} bytes on stdout; killed"),
            Failure::Refused(error) if error.details.is_empty() => write!(f, "{}", error.msg),
            Failure::Refused(error) => write!(f, "{}; {}", error.msg, error.details),
            Failure::Exited {
                status,
                stdout,
                stderr,
            } => {
                write!(f, "{status} without an error message")?;
                for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
                    let text = text.trim();
                    if !text.is_empty() {
                        write!(f, "; {name}: {text}")?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// Finds the plugin as an executable regular file; `kind` is known to be a bare name.
pub(super) fn find(kind: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    dirs.iter().map(|dir| dir.join(kind)).find(|path| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    })
}

/// Stdout of a plugin that ended with 0.
pub(super) async fn run(run: Run<'_>) -> Result<Vec<u8>, Failure> {
    let mut child = spawn(&run).await.map_err(Failure::Io)?;
    let mut group = Group(child.id());
    let stdout = Mutex::new(Vec::new());
    let stderr = Mutex::new(Vec::new());
    let finished =
        tokio::time::timeout(run.timeout, talk(&mut child, run.stdin, &stdout, &stderr)).await;
    let status = match finished {
        Ok(Ok(status)) => status,
        outcome => {
            group.kill();
            let _ = child.wait().await;
            return Err(match outcome {
                Ok(Err(failure)) => failure,
                _ => Failure::TimedOut(run.timeout),
            });
        }
    };
    group.release();
    let stdout = stdout.into_inner().unwrap_or_else(PoisonError::into_inner);
    if status.success() {
        return Ok(stdout);
    }
    let stderr = stderr.into_inner().unwrap_or_else(PoisonError::into_inner);
    match serde_json::from_slice::<PluginError>(&stdout) {
        Ok(error) if error.code != 0 || !error.msg.is_empty() => Err(Failure::Refused(error)),
        _ => {
            let text = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned()
            };
            Err(Failure::Exited {
                status,
                stdout: text(&stdout),
                stderr: text(&stderr),
            })
        }
    }
}

async fn spawn(run: &Run<'_>) -> io::Result<Child> {
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut command = Command::new(run.plugin);
    command
        .env_clear()
        .env("PATH", path)
        .envs(run.env.iter().map(|(key, value)| (key, value)))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    // A plugin that has just been installed may still be open for writing in a fork of ours.
    for _ in 0..5 {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            outcome => return outcome,
        }
    }
    command.spawn()
}

async fn talk(
    child: &mut Child,
    input: Vec<u8>,
    stdout: &Mutex<Vec<u8>>,
    stderr: &Mutex<Vec<u8>>,
) -> Result<ExitStatus, Failure> {
    let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A plugin may end without reading; its exit says more than the broken pipe.
            let _ = stdin.write_all(&input).await;
        }
        Ok(())
    };
    let streams = async {
        let out = read(out, stdout, MAX_STDOUT, true);
        let err = read(err, stderr, MAX_STDERR, false);
        tokio::try_join!(out, err, feed)
    };
    tokio::pin!(streams);
    tokio::select! {
        all = &mut streams => {
            all?;
            child.wait().await.map_err(Failure::Io)
        }
        status = child.wait() => {
            let status = status.map_err(Failure::Io)?;
            if let Ok(all) = tokio::time::timeout(DRAIN, &mut streams).await {
                all?;
            }
            Ok(status)
        }
    }
}

/// Fills `to` up to `limit`. Past it: fails, or goes on and discards.
async fn read(
    from: Option<impl AsyncRead + Unpin>,
    to: &Mutex<Vec<u8>>,
    limit: usize,
    fail: bool,
) -> Result<(), Failure> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else {
            return Ok(());
        };
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        let room = limit - to.len();
        to.extend_from_slice(&buffer[..count.min(room)]);
        if count > room && fail {
            return Err(Failure::Flooded);
        }
    }
}

/// Kills the plugin and its children unless it is released.
struct Group(Option<u32>);

impl Group {
    fn kill(&mut self) {
        let pid = self.0.take().and_then(|id| Pid::from_raw(id as i32));
        if let Some(pid) = pid {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    fn release(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    async fn script(text: &str, timeout: Duration) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let plugin = dir.path().join("plugin");
        std::fs::write(&plugin, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&plugin, PermissionsExt::from_mode(0o755)).unwrap();
        let env = vec![("CNI_COMMAND", "ADD".to_owned())];
        let outcome = run(Run {
            plugin: &plugin,
            env,
            stdin: b"input".to_vec(),
            timeout,
        })
        .await;
        outcome
            .map(|out| String::from_utf8(out).unwrap())
            .map_err(|e| e.to_string())
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn plugin_sees_stdin_and_a_clean_environment() {
        let out = script(
            "cat; echo; env | cut -d= -f1 | grep -v -e PWD -e '^_' | sort | tr '\\n' ' '",
            LONG,
        )
        .await
        .unwrap();
        assert_eq!(out, "input\nCNI_COMMAND PATH ");
    }

    #[tokio::test]
    async fn refusal_is_told_verbatim() {
        let refusal = r#"echo '{"code": 999, "msg": "cni0 already has an IP address", "details": "different from 10.1.0.1"}'; exit 1"#;
        let error = script(refusal, LONG).await.unwrap_err();
        assert_eq!(
            error,
            "cni0 already has an IP address; different from 10.1.0.1"
        );
        let error = script("echo out; echo err >&2; exit 3", LONG)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            "exit status: 3 without an error message; stdout: out; stderr: err"
        );
    }

    #[tokio::test]
    async fn overstaying_plugin_dies_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let start = Instant::now();
        let text = format!("sleep 60 & echo $! > {}; sleep 60", pids.display());
        let error = script(&text, Duration::from_millis(500)).await.unwrap_err();
        assert_eq!(error, "no answer within 0.5 s; killed");
        assert!(start.elapsed() < Duration::from_secs(5));
        let pid = std::fs::read_to_string(pids).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let deadline = Instant::now() + Duration::from_secs(5);
        let gone = || std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z"));
        while gone() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!gone(), "the plugin's child lives");
    }

    #[tokio::test]
    async fn output_is_bounded_and_a_held_pipe_does_not_hold_us() {
        let error = script("head -c 5000000 /dev/zero; sleep 60", LONG)
            .await
            .unwrap_err();
        assert_eq!(error, "more than 4194304 bytes on stdout; killed");
        let start = Instant::now();
        let out = script("head -c 200000 /dev/zero >&2; sleep 3 & echo ok", LONG)
            .await
            .unwrap();
        assert_eq!(out, "ok\n");
        assert!(start.elapsed() < Duration::from_millis(2900));
    }
}
