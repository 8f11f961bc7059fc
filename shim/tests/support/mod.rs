//! Drives the real shim binary over its socket, with a runtime from this machine.
//!
//! Owns: a temporary directory per test with bundles, sockets and logs, and its removal. The
//! runtime is `$CORACLE_TEST_RUNTIME` or runc. Without root or a runtime a test is skipped, and
//! says so.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use prost::Message;
use prost_types::Any;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

#[allow(clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}
use proto::containerd::runc::v1::{CheckpointOptions, Options};
use proto::containerd::runtime::sandbox::v1 as sandbox;
use proto::containerd::task::v2 as task;
use proto::containerd::types::Mount;
use proto::coracle::shim::v1 as private;
use proto::ttrpc;

pub const TASK: &str = "containerd.task.v2.Task";
pub const PRIVATE: &str = "coracle.shim.v1.Shim";
pub const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// Past libtest's capture, in the form that .ci/totals counts.
pub fn say_skipped(why: &str) {
    use std::io::Write as _;
    let _ = write!(std::io::stdout(), "\nSKIP shim: {why}\n");
}

/// In the guest of `make test-vm` the programs lie in one folder, and not where they were built.
fn in_guest(name: &str) -> Option<PathBuf> {
    std::env::var_os("CORACLE_VM")?;
    let folder = std::env::var_os("CORACLE_BIN_DIR")?;
    Some(Path::new(&folder).join(name))
}

pub fn shim_program() -> PathBuf {
    in_guest("containerd-shim-coracle-v2")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_containerd-shim-coracle-v2").into())
}

pub fn runtime() -> Option<PathBuf> {
    if !rustix::process::geteuid().is_root() {
        say_skipped("needs root");
        return None;
    }
    let name = std::env::var("CORACLE_TEST_RUNTIME").unwrap_or_else(|_| "runc".to_owned());
    let path = std::env::var("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|d| d.join(&name))
        .find(|p| p.is_file());
    let found = in_guest("coracle").or(found);
    let busybox = Path::new("/bin/busybox").is_file();
    if found.is_none() || !busybox {
        say_skipped(&format!("needs {name} and a static /bin/busybox"));
        return None;
    }
    found
}

#[derive(Debug, PartialEq)]
pub struct Refused {
    pub code: i32,
    pub message: String,
}

/// One connection, one call at a time.
pub struct Client {
    stream: UnixStream,
    next: u32,
}

impl Client {
    pub fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        Client { stream, next: 1 }
    }

    pub fn send(
        &mut self,
        service: &str,
        method: &str,
        body: &impl Message,
        fds: &[BorrowedFd<'_>],
    ) {
        let request = ttrpc::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: body.encode_to_vec(),
            timeout_nano: 0,
            metadata: Vec::new(),
        };
        let body = request.encode_to_vec();
        let mut frame = (body.len() as u32).to_be_bytes().to_vec();
        frame.extend(self.next.to_be_bytes());
        frame.extend([1, 0]);
        frame.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let slices = [IoSlice::new(&frame)];
        let n = rustix::net::sendmsg(&self.stream, &slices, &mut control, SendFlags::empty());
        let n = n.unwrap();
        self.stream.write_all(&frame[n..]).unwrap();
    }

    pub fn receive<R: Message + Default>(&mut self) -> Result<R, Refused> {
        let mut head = [0u8; 10];
        self.stream.read_exact(&mut head).expect("an answer");
        let length = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
        assert_eq!(
            u32::from_be_bytes(head[4..8].try_into().unwrap()),
            self.next
        );
        assert_eq!(head[8], 2);
        self.next += 2;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).unwrap();
        let response = ttrpc::Response::decode(body.as_slice()).unwrap();
        match response.status {
            Some(status) => Err(Refused {
                code: status.code,
                message: status.message,
            }),
            None => Ok(R::decode(response.payload.as_slice()).unwrap()),
        }
    }

    pub fn call<R: Message + Default>(
        &mut self,
        method: &str,
        body: &impl Message,
    ) -> Result<R, Refused> {
        self.send(TASK, method, body, &[]);
        self.receive()
    }

    pub fn sandbox<R: Message + Default>(
        &mut self,
        method: &str,
        body: &impl Message,
    ) -> Result<R, Refused> {
        self.send(SANDBOX, method, body, &[]);
        self.receive()
    }

    pub fn private<R: Message + Default>(
        &mut self,
        method: &str,
        body: &impl Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<R, Refused> {
        self.send(PRIVATE, method, body, fds);
        self.receive()
    }
}

/// A pod's directory: `<dir>/sandbox` is the shim's own bundle, `<dir>/<id>` a container's.
pub struct Pod {
    pub dir: PathBuf,
    pub socket: PathBuf,
    pub client: Client,
    runtime: PathBuf,
    name: String,
    _temporary: tempfile::TempDir,
}

fn address_of(output: &[u8]) -> PathBuf {
    let text = String::from_utf8(output.to_vec()).unwrap();
    PathBuf::from(
        text.strip_prefix("unix://")
            .unwrap_or_else(|| panic!("address: {text:?}")),
    )
}

pub fn start_shim(bundle: &Path, sockets: &Path, id: &str, events: &str) -> PathBuf {
    start_shim_by(
        Command::new(shim_program()),
        bundle,
        sockets,
        id,
        events,
        b"",
    )
}

/// `command` is the shim, or a program that becomes it. `options` are what a daemon gives on
/// stdin.
pub fn start_shim_by(
    mut command: Command,
    bundle: &Path,
    sockets: &Path,
    id: &str,
    events: &str,
    options: &[u8],
) -> PathBuf {
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(options).unwrap();
    std::io::Seek::rewind(&mut input).unwrap();
    let output = command
        .args(["-namespace", "test", "-address", "", "-id", id, "start"])
        .current_dir(bundle)
        .env("CORACLE_SHIM_SOCKET_DIR", sockets)
        .env("TTRPC_ADDRESS", events)
        .env_remove("GRPC_ADDRESS")
        .stdin(input)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.stderr.is_empty());
    address_of(&output.stdout)
}

pub fn options_any(options: &Options) -> Any {
    Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: options.encode_to_vec(),
    }
}

impl Pod {
    pub fn new(name: &str) -> Option<Pod> {
        Pod::with_events(name, "")
    }

    pub fn with_events(name: &str, events: &str) -> Option<Pod> {
        Pod::by(name, events, Command::new(shim_program()), |_| {})
    }

    /// `options` are given to the shim's start.
    pub fn by(
        name: &str,
        events: &str,
        command: Command,
        change: impl FnOnce(&mut Options),
    ) -> Option<Pod> {
        let runtime = runtime()?;
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().to_owned();
        fs::create_dir_all(dir.join("sandbox")).unwrap();
        fs::create_dir_all(dir.join("image/bin")).unwrap();
        for sub in ["proc", "dev", "sys", "tmp", "etc"] {
            fs::create_dir_all(dir.join("image").join(sub)).unwrap();
        }
        fs::copy("/bin/busybox", dir.join("image/bin/busybox")).unwrap();
        std::os::unix::fs::symlink("busybox", dir.join("image/bin/sh")).unwrap();
        let mut options = Options {
            binary_name: runtime.display().to_string(),
            root: dir.join("runtime").display().to_string(),
            ..Default::default()
        };
        change(&mut options);
        let options = options_any(&options).encode_to_vec();
        let (bundle, sockets) = (dir.join("sandbox"), dir.join("s"));
        let socket = start_shim_by(command, &bundle, &sockets, name, events, &options);
        let client = Client::connect(&socket);
        let name = format!("{name}-{}", std::process::id());
        Some(Pod {
            dir,
            socket,
            client,
            runtime,
            name,
            _temporary: temporary,
        })
    }

    pub fn id(&self, container: &str) -> String {
        format!("{}-{container}", self.name)
    }

    pub fn bundle(&self, container: &str) -> PathBuf {
        self.dir.join(container)
    }

    pub fn log(&self, container: &str) -> PathBuf {
        self.bundle(container).join("0.log")
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    pub fn shim_pid(&mut self) -> u32 {
        let connect = task::ConnectRequest {
            id: "any".to_owned(),
        };
        let answer: task::ConnectResponse = self.client.call("Connect", &connect).unwrap();
        answer.shim_pid
    }

    pub fn config(&self, container: &str, script: &str) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": ["sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "hostname": "pod",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("/coracle-shim-{}", self.id(container)),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        })
    }

    pub fn runtime_path(&self) -> PathBuf {
        self.runtime.clone()
    }

    pub fn options(&self, runtime: &Path) -> Any {
        let options = Options {
            binary_name: runtime.display().to_string(),
            root: self.dir.join("runtime").display().to_string(),
            ..Default::default()
        };
        options_any(&options)
    }

    /// Writes the bundle; gives the request with a CRI log, to be changed as a test likes.
    pub fn request(&self, container: &str, config: &Value) -> task::CreateTaskRequest {
        let bundle = self.bundle(container);
        for sub in ["rootfs", "upper", "work"] {
            fs::create_dir_all(bundle.join(sub)).unwrap();
        }
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        let log = format!("cri-log://{}", self.log(container).display());
        let overlay = Mount {
            r#type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", self.dir.join("image").display()),
                format!("upperdir={}", bundle.join("upper").display()),
                format!("workdir={}", bundle.join("work").display()),
            ],
        };
        task::CreateTaskRequest {
            id: self.id(container),
            bundle: bundle.display().to_string(),
            rootfs: vec![overlay],
            stdout: log.clone(),
            stderr: log,
            options: Some(self.options(&self.runtime)),
            ..Default::default()
        }
    }

    pub fn create(&mut self, request: &task::CreateTaskRequest) -> Result<u32, Refused> {
        let answer: task::CreateTaskResponse = self.client.call("Create", request)?;
        Ok(answer.pid)
    }

    /// Creates and starts with a CRI log.
    pub fn run(&mut self, container: &str, script: &str) -> u32 {
        let request = self.request(container, &self.config(container, script));
        self.create(&request).unwrap();
        self.start(container, "").unwrap()
    }

    pub fn start(&mut self, container: &str, exec: &str) -> Result<u32, Refused> {
        let request = task::StartRequest {
            id: self.id(container),
            exec_id: exec.to_owned(),
        };
        let answer: task::StartResponse = self.client.call("Start", &request)?;
        Ok(answer.pid)
    }

    pub fn wait(&mut self, container: &str, exec: &str) -> Result<u32, Refused> {
        let request = task::WaitRequest {
            id: self.id(container),
            exec_id: exec.to_owned(),
        };
        let answer: task::WaitResponse = self.client.call("Wait", &request)?;
        assert!(answer.exited_at.is_some());
        Ok(answer.exit_status)
    }

    pub fn kill(&mut self, container: &str, exec: &str, signal: u32) -> Result<(), Refused> {
        let (id, exec_id) = (self.id(container), exec.to_owned());
        self.client.call::<()>(
            "Kill",
            &task::KillRequest {
                id,
                exec_id,
                signal,
                all: false,
            },
        )
    }

    /// Into a directory of images; the processes end by it.
    pub fn checkpoint(&mut self, container: &str, images: &Path) -> Result<(), Refused> {
        let options = CheckpointOptions {
            exit: true,
            ..Default::default()
        };
        let request = task::CheckpointTaskRequest {
            id: self.id(container),
            path: images.display().to_string(),
            options: Some(Any {
                type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
                value: options.encode_to_vec(),
            }),
        };
        self.client.call::<()>("Checkpoint", &request)
    }

    pub fn delete(&mut self, container: &str, exec: &str) -> Result<task::DeleteResponse, Refused> {
        let request = task::DeleteRequest {
            id: self.id(container),
            exec_id: exec.to_owned(),
        };
        self.client.call("Delete", &request)
    }

    pub fn state(&mut self, container: &str) -> Result<task::StateResponse, Refused> {
        let request = task::StateRequest {
            id: self.id(container),
            exec_id: String::new(),
        };
        self.client.call("State", &request)
    }

    pub fn status(&mut self, container: &str) -> private::StatusResponse {
        let request = private::StatusRequest {
            id: self.id(container),
            exec_id: String::new(),
        };
        self.client.private("Status", &request, &[]).unwrap()
    }

    pub fn exec_request(
        &self,
        container: &str,
        exec: &str,
        script: &str,
    ) -> task::ExecProcessRequest {
        let spec = json!({
            "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/",
            "user": {"uid": 0, "gid": 0},
        });
        task::ExecProcessRequest {
            id: self.id(container),
            exec_id: exec.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: spec.to_string().into_bytes(),
            }),
            ..Default::default()
        }
    }

    /// The log's lines as `<stream> <F|P> <text>`.
    pub fn lines(&self, container: &str) -> Vec<String> {
        let text = fs::read_to_string(self.log(container)).unwrap();
        text.split_terminator('\n')
            .map(|l| l.split_once(' ').unwrap().1.to_owned())
            .collect()
    }

    pub fn resources(&mut self, container: &str, json: &str) -> Result<(), Refused> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: json.as_bytes().to_vec(),
        };
        let request = task::UpdateTaskRequest {
            id: self.id(container),
            resources: Some(resources),
            annotations: Default::default(),
        };
        self.client.call::<()>("Update", &request)
    }

    /// After the death of the shim: another one.
    pub fn restart_shim(&mut self) {
        let (bundle, sockets) = (self.dir.join("sandbox"), self.dir.join("s"));
        self.socket = start_shim(&bundle, &sockets, "again", "");
        self.client = Client::connect(&self.socket);
    }

    /// Ends an empty shim; nothing of it stays.
    pub fn shutdown(mut self) {
        let pid = self.shim_pid();
        let request = task::ShutdownRequest {
            id: String::new(),
            now: false,
        };
        self.client.call::<()>("Shutdown", &request).unwrap();
        self.gone(pid);
    }

    /// Ends a shim with its sandbox.
    pub fn shutdown_sandbox(mut self, id: &str) {
        let pid = self.shim_pid();
        let request = sandbox::ShutdownSandboxRequest {
            sandbox_id: id.to_owned(),
        };
        self.client
            .sandbox::<()>("ShutdownSandbox", &request)
            .unwrap();
        assert!(!self.dir.join("sandbox/pod").exists(), "files left");
        self.gone(pid);
    }

    fn gone(&self, pid: u32) {
        wait_until("the shim to end", || !alive(pid));
        assert!(!self.socket.exists(), "socket left");
        let left: Vec<_> = fs::read_dir(self.dir.join("s"))
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.to_str().unwrap()), "mounts left");
        assert!(
            !self.dir.join("sandbox/shim.log").exists(),
            "{:?}",
            fs::read_to_string(self.dir.join("sandbox/shim.log"))
        );
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A failed test leaves its shim: `delete` ends its members once it is gone.
        if !std::thread::panicking() {
            return;
        }
        for line in fs::read_to_string(self.dir.join("sandbox/shim.log"))
            .unwrap_or_default()
            .lines()
        {
            println!("shim.log: {line}");
        }
        let _ = Command::new("umount").arg(self.dir.join("small")).status();
        let mut client = Client::connect(&self.socket);
        let connect = task::ConnectRequest {
            id: "any".to_owned(),
        };
        if let Ok(answer) = client.call::<task::ConnectResponse>("Connect", &connect) {
            kill(answer.shim_pid, 9);
            wait_until("the shim to die", || !alive(answer.shim_pid));
        }
        let _ = shim_delete(&self.dir.join("sandbox"), &self.name);
    }
}

pub fn shim_delete(bundle: &Path, id: &str) -> task::DeleteResponse {
    let output = Command::new(shim_program())
        .args(["-namespace", "test", "-address", "", "-id", id, "-bundle"])
        .arg(bundle)
        .arg("delete")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    task::DeleteResponse::decode(output.stdout.as_slice()).unwrap()
}

pub fn kill(pid: u32, signal: i32) {
    let status = Command::new("/bin/kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Runs and is no zombie.
pub fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(15);
    while !done() {
        assert!(Instant::now() < limit, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn pipe() -> (fs::File, OwnedFd) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (read.into(), write)
}

/// Everything until the end.
pub fn text(mut file: fs::File) -> String {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn all_children(pid: u32) -> Vec<String> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).unwrap();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn are_hands(pid: &String) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "shim-hands")
}

/// What a shim supervises: all but its hands.
pub fn children(pid: u32) -> Vec<String> {
    let mut all = all_children(pid);
    all.retain(|child| !are_hands(child));
    all
}

pub fn hands(pid: u32) -> Option<String> {
    all_children(pid).into_iter().find(are_hands)
}

pub fn open_fds(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}
