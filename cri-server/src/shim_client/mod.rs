//! Owns the conversation with shims: containerd's Task service and the shim's private service,
//! as typed calls with a deadline each, so that a hung shim blocks one call and not the daemon.
//! Never keeps state of tasks.

mod connection;
mod launch;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use prost_types::Any;

pub use connection::ShimError;
use connection::{Connection, Target};
pub use launch::{Shim, delete_leftovers, start};

use crate::proto::shim::containerd::runc::v1::Options;
use crate::proto::shim::containerd::task::v2 as task;
use crate::proto::shim::containerd::types::Mount;
use crate::proto::shim::coracle::shim::v1 as private;

/// The containerd namespace that our shims run in; the kubelet's tools expect this name.
pub const NAMESPACE: &str = "k8s.io";

const TASK: &str = "containerd.task.v2.Task";
const PRIVATE: &str = "coracle.shim.v1.Shim";

/// Calls that only read the shim's memory.
const QUICK: Duration = Duration::from_secs(5);
/// Calls that run the runtime.
const RUN: Duration = Duration::from_secs(60);

type Reply<T> = Result<T, ShimError>;

/// A connection to one shim. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShimClient {
    connection: Arc<Connection>,
}

/// What a task is created from.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// Container id.
    pub id: String,
    /// Directory with config.json.
    pub bundle: PathBuf,
    /// What the shim mounts on `<bundle>/rootfs`.
    pub rootfs: Vec<RootfsMount>,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Where input comes from.
    pub stdin: String,
    /// Where output goes.
    pub stdout: String,
    /// Where error output goes.
    pub stderr: String,
    /// The runtime binary.
    pub runtime: PathBuf,
    /// Its `--root`.
    pub runtime_root: PathBuf,
}

/// One mount of a root file system.
#[derive(Debug, Clone)]
pub struct RootfsMount {
    /// File system type.
    pub kind: String,
    /// Source.
    pub source: String,
    /// Options.
    pub options: Vec<String>,
}

/// What an exec is created from.
#[derive(Debug)]
pub struct NewExec {
    /// Container id.
    pub id: String,
    /// Name of the exec, unique in the container.
    pub exec_id: String,
    /// OCI Process as JSON.
    pub process: Vec<u8>,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Read end for its input; none: /dev/null.
    pub stdin: Option<OwnedFd>,
    /// Write end for its output.
    pub stdout: Option<OwnedFd>,
    /// Write end for its error output.
    pub stderr: Option<OwnedFd>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskExit {
    /// Exit status, 128 + signal when killed.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_ns: i64,
}

fn target(service: &'static str, method: &'static str, deadline: Duration) -> Target {
    Target {
        service,
        method,
        deadline: Some(deadline),
    }
}

/// Nanoseconds since the epoch; 0 for none.
pub fn nanos(time: Option<prost_types::Timestamp>) -> i64 {
    time.map_or(0, |t| {
        t.seconds.saturating_mul(1_000_000_000) + i64::from(t.nanos)
    })
}

impl ShimClient {
    /// Connects to the socket of a running shim, within two seconds.
    pub async fn connect(socket: &Path) -> std::io::Result<ShimClient> {
        let open = tokio::time::timeout(Duration::from_secs(2), Connection::open(socket));
        let connection = open
            .await
            .unwrap_or(Err(std::io::ErrorKind::TimedOut.into()))?;
        Ok(ShimClient {
            connection: Arc::new(connection),
        })
    }

    /// Whether the shim has gone away.
    pub fn is_gone(&self) -> bool {
        self.connection.is_closed()
    }

    /// Returns when the shim has gone away.
    pub async fn gone(&self) {
        self.connection.wait_closed().await;
    }

    async fn task<Req: Message, Resp: Message + Default>(
        &self,
        method: &'static str,
        deadline: Duration,
        request: &Req,
    ) -> Reply<Resp> {
        let to = target(TASK, method, deadline);
        self.connection.call(to, request, Vec::new()).await
    }

    /// Creates a task; its init waits for [`ShimClient::start`].
    pub async fn create(&self, new: &NewTask) -> Reply<u32> {
        let options = Options {
            binary_name: new.runtime.display().to_string(),
            root: new.runtime_root.display().to_string(),
            ..Options::default()
        };
        let mount = |m: &RootfsMount| Mount {
            r#type: m.kind.clone(),
            source: m.source.clone(),
            target: String::new(),
            options: m.options.clone(),
        };
        let request = task::CreateTaskRequest {
            id: new.id.clone(),
            bundle: new.bundle.display().to_string(),
            rootfs: new.rootfs.iter().map(mount).collect(),
            terminal: new.terminal,
            stdin: new.stdin.clone(),
            stdout: new.stdout.clone(),
            stderr: new.stderr.clone(),
            options: Some(Any {
                type_url: "containerd.runc.v1.Options".to_owned(),
                value: options.encode_to_vec(),
            }),
            ..task::CreateTaskRequest::default()
        };
        let answer: task::CreateTaskResponse = self.task("Create", RUN, &request).await?;
        Ok(answer.pid)
    }

    /// Starts a created task or exec; answers with its pid.
    pub async fn start(&self, id: &str, exec_id: &str) -> Reply<u32> {
        let request = task::StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let answer: task::StartResponse = self.task("Start", RUN, &request).await?;
        Ok(answer.pid)
    }

    /// Prepares an exec; [`ShimClient::start`] runs it.
    pub async fn exec(&self, new: NewExec) -> Reply<()> {
        let given = |fd: &Option<OwnedFd>| match fd {
            Some(_) => "fd:".to_owned(),
            None => String::new(),
        };
        let request = task::ExecProcessRequest {
            id: new.id,
            exec_id: new.exec_id,
            terminal: new.terminal,
            stdin: given(&new.stdin),
            stdout: given(&new.stdout),
            stderr: given(&new.stderr),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: new.process,
            }),
        };
        let fds = [new.stdin, new.stdout, new.stderr];
        let fds = fds.into_iter().flatten().collect();
        let to = target(TASK, "Exec", RUN);
        self.connection.call::<_, ()>(to, &request, fds).await
    }

    /// Signals a task (all its processes with `all`) or an exec.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Reply<()> {
        let request = task::KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
        };
        self.task("Kill", Duration::from_secs(10), &request).await
    }

    /// Waits until a task or exec has ended, however long that takes.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Reply<TaskExit> {
        let request = task::WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let to = Target {
            service: TASK,
            method: "Wait",
            deadline: None,
        };
        let answer: task::WaitResponse = self.connection.call(to, &request, Vec::new()).await?;
        Ok(TaskExit {
            status: answer.exit_status,
            at_ns: nanos(answer.exited_at),
        })
    }

    /// Removes an ended task or exec; an unknown one is a success.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Reply<()> {
        let request = task::DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        match self
            .task::<_, task::DeleteResponse>("Delete", RUN, &request)
            .await
        {
            Ok(_) => Ok(()),
            Err(e) if e.is_not_found() => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Changes the size of a terminal.
    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Reply<()> {
        let request = task::ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height,
        };
        self.task("ResizePty", QUICK, &request).await
    }

    /// Closes the input of a process.
    pub async fn close_stdin(&self, id: &str, exec_id: &str) -> Reply<()> {
        let request = task::CloseIoRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: true,
        };
        self.task("CloseIO", QUICK, &request).await
    }

    /// Applies new limits: `resources` is OCI LinuxResources as JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Reply<()> {
        let request = task::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: resources,
            }),
            ..task::UpdateTaskRequest::default()
        };
        self.task("Update", RUN, &request).await
    }

    /// Ends the shim, unless it still has tasks.
    pub async fn shutdown(&self, id: &str) -> Reply<()> {
        let request = task::ShutdownRequest {
            id: id.to_owned(),
            now: false,
        };
        match self.task("Shutdown", QUICK, &request).await {
            // The shim may be gone before its answer is out.
            Err(ShimError::Gone) => Ok(()),
            answer => answer,
        }
    }

    /// Pid of the shim.
    pub async fn shim_pid(&self, id: &str) -> Reply<u32> {
        let request = task::ConnectRequest { id: id.to_owned() };
        let answer: task::ConnectResponse = self.task("Connect", QUICK, &request).await?;
        Ok(answer.shim_pid)
    }

    /// Everything the shim knows of a task or exec.
    pub async fn status(&self, id: &str, exec_id: &str) -> Reply<private::StatusResponse> {
        let request = private::StatusRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let to = target(PRIVATE, "Status", QUICK);
        self.connection.call(to, &request, Vec::new()).await
    }

    /// Copies a running task's streams to and from the given descriptors.
    pub async fn attach(&self, id: &str, io: AttachIo) -> Reply<()> {
        let request = private::AttachRequest {
            id: id.to_owned(),
            stdin: io.stdin.is_some(),
            stdout: io.stdout.is_some(),
            stderr: io.stderr.is_some(),
        };
        let fds = [io.stdin, io.stdout, io.stderr];
        let fds = fds.into_iter().flatten().collect();
        let to = target(PRIVATE, "Attach", QUICK);
        self.connection
            .call::<_, private::AttachResponse>(to, &request, fds)
            .await
            .map(|_| ())
    }

    /// Opens the log file of a task again, after a rename.
    pub async fn reopen_log(&self, id: &str) -> Reply<()> {
        let request = private::ReopenLogRequest { id: id.to_owned() };
        let to = target(PRIVATE, "ReopenLog", QUICK);
        self.connection
            .call::<_, private::ReopenLogResponse>(to, &request, Vec::new())
            .await
            .map(|_| ())
    }
}

/// Ends of pipes for an attachment.
#[derive(Debug, Default)]
pub struct AttachIo {
    /// Read end: what is typed.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

/// Whether a process with this status number of a shim was started: 0 is being created, 1 waits
/// for its start.
pub fn was_started(status: u32) -> bool {
    status > 1
}

/// A shim's status number of a stopped process (containerd.v1.types.Status).
pub const STATUS_STOPPED: u32 = 3;
