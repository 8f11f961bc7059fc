//! The shim driven as its daemon drives it: `start`, `delete`, and calls over its socket. Each
//! call has a connection of its own, so that any number can be under way.

pub mod events;
pub mod stand;
pub mod wire;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use prost::Message;
use prost_types::Any;
use rustix::process::{Pid, Signal, kill_process};

use crate::binaries;
use crate::wait_for;

pub const NAMESPACE: &str = "death";
const TASK: &str = "containerd.task.v2.Task";
const PRIVATE: &str = "coracle.shim.v1.Shim";
const REQUEST: u8 = 1;
pub const NOT_FOUND: i32 = 5;
pub const CREATED: i32 = 1;
pub const RUNNING: i32 = 2;
pub const STOPPED: i32 = 3;
pub const PAUSED: i32 = 4;

/// What a shim answers instead of a message.
#[derive(Debug)]
pub struct Refused {
    /// A gRPC code.
    pub code: i32,
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "code {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

/// The code of a refusal; an error that is none stays one.
pub fn refusal<T: std::fmt::Debug>(result: Result<T>) -> Result<Refused> {
    match result {
        Ok(answer) => bail!("was not refused: {answer:?}"),
        Err(error) => error.downcast::<Refused>(),
    }
}

/// How shims are started: where their sockets go, and what their environment says.
#[derive(Clone)]
pub struct Launcher {
    pub sockets: PathBuf,
    /// Address of an event service, or empty.
    pub events: String,
    pub env: Vec<(String, String)>,
}

impl Launcher {
    /// Sockets below `dir`.
    pub fn new(dir: &Path) -> Self {
        Self {
            sockets: dir.join("s"),
            events: String::new(),
            env: Vec::new(),
        }
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn command(&self, bundle: &Path, id: &str, action: &str) -> Result<Command> {
        let mut command = Command::new(binaries::shim()?);
        command
            .args(["-namespace", NAMESPACE, "-address", "", "-id", id])
            .arg("-bundle")
            .arg(bundle)
            .arg(action)
            .current_dir(bundle)
            .env("CORACLE_SHIM_SOCKET_DIR", &self.sockets)
            .env("TTRPC_ADDRESS", &self.events)
            .env_remove("GRPC_ADDRESS")
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    fn run(&self, bundle: &Path, id: &str, action: &str) -> Result<Output> {
        let output = self.command(bundle, id, action)?.output()?;
        ensure!(
            output.status.success(),
            "shim {action} {id}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output)
    }

    /// Finds or makes the shim of this bundle's group.
    pub fn start(&self, bundle: &Path, id: &str) -> Result<Shim> {
        let output = self.run(bundle, id, "start")?;
        Shim::at(&String::from_utf8_lossy(&output.stdout))
    }

    /// What a daemon does when the shim of a task is dead.
    pub fn delete(&self, bundle: &Path, id: &str) -> Result<wire::Deleted> {
        let output = self.run(bundle, id, "delete")?;
        Ok(wire::Deleted::decode(output.stdout.as_slice())?)
    }

    /// Names in the directory of sockets.
    pub fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.sockets).into_iter().flatten();
        entries
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

/// A shim at its socket.
#[derive(Clone)]
pub struct Shim {
    pub socket: PathBuf,
}

/// What a task is created from.
#[derive(Clone)]
pub struct NewTask {
    pub request: wire::CreateTask,
}

impl NewTask {
    pub fn new(id: &str, bundle: &Path, runtime: &Path, root: &Path) -> Self {
        let options = wire::Options {
            binary_name: runtime.display().to_string(),
            root: root.display().to_string(),
        };
        Self {
            request: wire::CreateTask {
                id: id.to_owned(),
                bundle: bundle.display().to_string(),
                options: Some(Any {
                    type_url: "containerd.runc.v1.Options".to_owned(),
                    value: options.encode_to_vec(),
                }),
                ..Default::default()
            },
        }
    }

    /// Both outputs as lines of a CRI log.
    pub fn log(mut self, path: &Path) -> Self {
        let address = format!("cri-log://{}", path.display());
        self.request.stdout = address.clone();
        self.request.stderr = address;
        self
    }

    pub fn stdout(mut self, address: &str) -> Self {
        self.request.stdout = address.to_owned();
        self
    }

    /// Mounted on the bundle's rootfs by the shim.
    pub fn rootfs(mut self, mount: wire::Mount) -> Self {
        self.request.rootfs.push(mount);
        self
    }
}

fn named(id: &str, exec_id: &str) -> wire::Named {
    wire::Named {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    }
}

impl Shim {
    /// From the answer of `start`.
    pub fn at(address: &str) -> Result<Self> {
        let path = address.trim().strip_prefix("unix://");
        Ok(Self {
            socket: path.with_context(|| format!("{address:?}"))?.into(),
        })
    }

    /// One call; a refusal is a `Refused`.
    pub fn call<Req: Message, Resp: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
    ) -> Result<Resp> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("connect to {}", self.socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(90)))?;
        let body = wire::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
        }
        .encode_to_vec();
        let mut frame = u32::try_from(body.len())?.to_be_bytes().to_vec();
        frame.extend(1u32.to_be_bytes());
        frame.extend([REQUEST, 0]);
        frame.extend(body);
        stream.write_all(&frame)?;
        let (_, _, body) = read_frame(&mut stream).with_context(|| method.to_owned())?;
        let response = wire::Response::decode(body.as_slice())?;
        match response.status {
            Some(status) if status.code != 0 => Err(Refused {
                code: status.code,
                message: status.message,
            }
            .into()),
            _ => Ok(Resp::decode(response.payload.as_slice())?),
        }
    }

    fn task<Req: Message, Resp: Message + Default>(&self, method: &str, r: &Req) -> Result<Resp> {
        self.call(TASK, method, r)
    }

    /// Whether somebody accepts at its socket.
    pub fn is_served(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// The shim's own pid.
    pub fn pid(&self) -> Result<i32> {
        let answer: wire::Pid = self.task("Connect", &wire::Task { id: "any".into() })?;
        Ok(i32::try_from(answer.pid)?)
    }

    pub fn create(&self, task: &NewTask) -> Result<i32> {
        let answer: wire::Pid = self.task("Create", &task.request)?;
        Ok(i32::try_from(answer.pid)?)
    }

    pub fn start(&self, id: &str, exec: &str) -> Result<i32> {
        let answer: wire::Pid = self.task("Start", &named(id, exec))?;
        Ok(i32::try_from(answer.pid)?)
    }

    pub fn state(&self, id: &str, exec: &str) -> Result<wire::StateResponse> {
        self.task("State", &named(id, exec))
    }

    pub fn wait(&self, id: &str, exec: &str) -> Result<wire::Waited> {
        self.task("Wait", &named(id, exec))
    }

    pub fn delete(&self, id: &str, exec: &str) -> Result<wire::Deleted> {
        self.task("Delete", &named(id, exec))
    }

    pub fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = wire::Kill {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
        };
        self.task("Kill", &request)
    }

    /// Pause, Resume, Shutdown, Stats, Pids: calls about a task whose answer is not looked at.
    pub fn ask(&self, method: &str, id: &str) -> Result<()> {
        self.task(method, &wire::Task { id: id.to_owned() })
    }

    /// Adds an exec of `args`; `start` runs it.
    pub fn exec(&self, id: &str, exec: &str, args: &[&str], stdout: &str) -> Result<()> {
        let spec = serde_json::json!({
            "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/usr/bin:/bin"],
        });
        let request = wire::Exec {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdout: stdout.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: serde_json::to_vec(&spec)?,
            }),
            ..Default::default()
        };
        self.task("Exec", &request)
    }

    pub fn private_status(&self, id: &str) -> Result<wire::PrivateStatus> {
        self.call(PRIVATE, "Status", &named(id, ""))
    }

    /// kill -9, and waits until nobody serves the socket.
    pub fn crash(&self) -> Result<()> {
        let pid = Pid::from_raw(self.pid()?).context("pid")?;
        kill_process(pid, Signal::KILL)?;
        self.gone()
    }

    /// Returns when nobody serves the socket.
    pub fn gone(&self) -> Result<()> {
        wait_for("the shim's end", Duration::from_secs(10), || {
            Ok((!self.is_served()).then_some(()))
        })
    }

    /// Lets a shim without tasks go.
    pub fn shut_down(&self) -> Result<()> {
        self.ask("Shutdown", "any")?;
        self.gone()
    }

    /// Kills, waits for and deletes a task.
    pub fn end(&self, id: &str) -> Result<wire::Deleted> {
        self.kill(id, "", 9, false)?;
        self.wait(id, "")?;
        self.delete(id, "")
    }
}

/// Stream, kind and body.
pub fn read_frame(stream: &mut UnixStream) -> Result<(u32, u8, Vec<u8>)> {
    let mut head = [0; 10];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    ensure!(length <= 4 << 20, "a frame of {length} bytes");
    let id = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((id, head[8], body))
}
