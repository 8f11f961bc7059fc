//! Calls of the OCI runtime by its command line.
//!
//! Owns: the argument vector, and the memory files through which a call takes its inputs and
//! leaves its errors (`/proc/<shim>/fd/<n>`: nothing to clean up in the bundle, nothing inherited
//! by the container). Never waits: the reaper tells the end.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::calls;
use crate::error::{Error, Kind, Result};
use crate::hands::{self, Program};
use crate::options::Options;

const DEFAULT_NAME: &str = "coracle";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Runtime {
    pub binary: PathBuf,
    pub root: PathBuf,
    pub systemd_cgroup: bool,
}

/// A running call.
pub struct Call {
    pub pid: i32,
    log: File,
    output: File,
    _inputs: Vec<File>,
}

/// A file that exists only as long as the call.
pub fn memory_file(name: &str, content: &[u8]) -> Result<File> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io("memfd_create", name, e))?;
    let mut file = File::from(fd);
    file.write_all(content)
        .map_err(|e| Error::io("write", name, e))?;
    Ok(file)
}

/// The path by which another process opens a file of ours.
pub fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

fn executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}

/// A name is looked for beside our own binary if it is the default one, then in PATH.
fn find(name: &str) -> Result<PathBuf> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match path.is_absolute() && executable(&path) {
            true => Ok(path),
            false => Err(Error::new(Kind::Invalid, "runtime binary", name)
                .source("not an executable file with an absolute path")),
        };
    }
    if name == DEFAULT_NAME
        && let Ok(own) = std::env::current_exe()
        && let Some(beside) = own.parent().map(|dir| dir.join(name))
        && executable(&beside)
    {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_absolute() && executable(p))
        .ok_or_else(|| {
            Error::new(Kind::Precondition, "runtime binary", name).source("not found in PATH")
        })
}

impl Runtime {
    pub fn new(options: &Options, namespace: &str) -> Result<Runtime> {
        let name = match options.binary_name.as_str() {
            "" => DEFAULT_NAME,
            name => name,
        };
        let root = match options.root.as_str() {
            "" => format!(
                "/run/containerd/{}",
                if options.binary_name.is_empty() {
                    DEFAULT_NAME
                } else {
                    "runc"
                }
            ),
            root => root.to_owned(),
        };
        Ok(Runtime {
            binary: find(name)?,
            root: Path::new(&root).join(namespace),
            systemd_cgroup: options.systemd_cgroup,
        })
    }

    /// Starts `args` with these streams, or with none, for the shim that listens at `socket`.
    pub fn spawn(
        &self,
        socket: &Path,
        args: &[OsString],
        stdio: Option<&[OwnedFd; 3]>,
        inputs: Vec<File>,
    ) -> Result<Call> {
        let log = memory_file("runtime-log", b"")?;
        let output = memory_file("runtime-output", b"")?;
        let mut all: Vec<OsString> = vec![self.binary.clone().into(), "--root".into()];
        all.push(self.root.clone().into());
        all.extend(["--log".into(), path_of(&log).into()]);
        all.extend(["--log-format".into(), "json".into()]);
        if self.systemd_cgroup {
            all.push("--systemd-cgroup".into());
        }
        all.extend_from_slice(args);
        let failed =
            |e: std::io::Error| Error::io("start runtime", self.binary.display().to_string(), e);
        let text = |s: &OsStr| CString::new(s.as_bytes()).map_err(|e| failed(e.into()));
        let argv = all
            .iter()
            .map(|a| text(a))
            .collect::<Result<Vec<CString>>>()?;
        let program = text(self.binary.as_os_str())?;
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed(e.into()))?;
        let streams: [BorrowedFd<'_>; 3] = match stdio {
            Some([stdin, stdout, stderr]) => [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            None => [null.as_fd(), output.as_fd(), output.as_fd()],
        };
        let fds: Vec<(BorrowedFd<'_>, i32)> = streams.into_iter().zip(0..).collect();
        let pid = hands::start(&Program {
            program: &program,
            args: &argv,
            env: vec![calls::mark(socket).map_err(failed)?],
            fds: &fds,
            new_group: true,
        })
        .map_err(failed)?;
        Ok(Call {
            pid,
            log,
            output,
            _inputs: inputs,
        })
    }
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

fn read_all(file: &File) -> String {
    let mut bytes = vec![0; 64 * 1024];
    let mut length = 0;
    while let Ok(n @ 1..) = file.read_at(&mut bytes[length..], length as u64) {
        length += n;
    }
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// The last error that a runtime has logged.
fn last_error(log: &str) -> Option<String> {
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal") && !line.msg.is_empty())
        .map(|line| line.msg)
}

impl Call {
    /// Why the call failed, in the runtime's own words where it left some.
    pub fn failure(&self, status: u32) -> String {
        if let Some(message) = last_error(&read_all(&self.log)) {
            return message;
        }
        let output = read_all(&self.output);
        match output.trim() {
            "" => format!("runtime ended with status {status} and no message"),
            text => text.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_line_counts() {
        let log = r#"{"level":"warning","msg":"w","time":"t"}
{"level":"error","msg":"first","time":"t"}
{"level":"error","msg":"container_linux.go:1: \"x\" not found","time":"t"}
garbage
{"level":"info","msg":"later"}
"#;
        assert_eq!(
            last_error(log).as_deref(),
            Some("container_linux.go:1: \"x\" not found")
        );
        assert_eq!(last_error("garbage\n"), None);
    }

    #[test]
    fn a_missing_binary_is_named() {
        let options = Options {
            binary_name: "/nonexistent/rt".into(),
            ..Default::default()
        };
        let error = Runtime::new(&options, "ns").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/rt"));
        let options = Options {
            binary_name: "no-such-runtime".into(),
            ..Default::default()
        };
        assert_eq!(
            Runtime::new(&options, "ns").unwrap_err().kind(),
            Kind::Precondition
        );
    }

    #[test]
    fn root_is_per_namespace() {
        let options = Options {
            binary_name: "sh".into(),
            ..Default::default()
        };
        let runtime = Runtime::new(&options, "k8s.io").unwrap();
        assert_eq!(runtime.root, Path::new("/run/containerd/runc/k8s.io"));
        let options = Options {
            root: "/r".into(),
            ..options
        };
        assert_eq!(
            Runtime::new(&options, "ns").unwrap().root,
            Path::new("/r/ns")
        );
    }
}
