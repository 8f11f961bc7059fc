//! Create and Start of a task's init.
//!
//! Create: check, mount the root filesystem, open stdio, (wait for a logging binary,) `runtime
//! create`, then record the pid, the cgroup and the membership before anybody is told.
//! Owns: the undoing of those steps when a later one fails.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::call::{Job, args};
use super::state::State;
use super::{Launch, Process, Task};
use crate::cgroup::Cgroup;
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result, not_found};
use crate::events::Event;
use crate::options::Options;
use crate::process::{ProcessId, StdioNames, now_nanos};
use crate::proto::containerd::events as ev;
use crate::proto::containerd::task::v2 as wire;
use crate::records::{self, TaskRecord};
use crate::runtime_cli::Runtime;
use crate::service::Reply;
use crate::stdio::Io;
use crate::stdio::open::{self, Owner, ProcessEnds, Wanted};
use crate::supervisor::{Supervisor, Timer};

const LOGGER_TIME: Duration = Duration::from_secs(10);

/// The part of config.json that a supervisor must know.
#[derive(Deserialize, Default)]
struct Config {
    linux: Option<Linux>,
}

#[derive(Deserialize, Default)]
struct Linux {
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Deserialize)]
struct Namespace {
    r#type: String,
    #[serde(default)]
    path: String,
}

/// Containers of one pid namespace do not die with one init.
fn shares_pids(bundle: &Path) -> Result<bool> {
    let path = bundle.join("config.json");
    let subject = || path.display().to_string();
    let bytes =
        fs::read(&path).map_err(|e| Error::new(Kind::Invalid, "read", subject()).source(e))?;
    let config: Config = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Invalid, "parse", subject()).source(e))?;
    let namespaces = config.linux.and_then(|l| l.namespaces).unwrap_or_default();
    Ok(!namespaces
        .iter()
        .any(|n| n.r#type == "pid" && n.path.is_empty()))
}

/// containerd's identifiers, and what may safely be a file name.
pub fn check_id(id: &str) -> Result<()> {
    let bytes = id.as_bytes();
    let good = !id.is_empty()
        && id.len() <= 255
        && bytes[0] != b'.'
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+'));
    if good {
        Ok(())
    } else {
        Err(Error::new(Kind::Invalid, "identifier", format!("{id:?}")))
    }
}

pub fn read_pid(path: &Path) -> Result<i32> {
    let subject = || path.display().to_string();
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", subject(), e))?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(Error::new(Kind::Internal, "pid file", subject()).source("no pid in it")),
    }
}

impl Supervisor {
    pub fn create(&mut self, r: wire::CreateTaskRequest, fds: Vec<OwnedFd>, reply: Reply) {
        if let Err(e) = self.prepare(&r, fds, reply) {
            self.answer(reply, Err(e));
        }
    }

    fn check_create(&self, r: &wire::CreateTaskRequest) -> Result<()> {
        if self.is_ending() {
            return Err(Error::new(Kind::Unavailable, "shim", "is shutting down"));
        }
        check_id(&r.id)?;
        if self.tasks.contains_key(&r.id) {
            return Err(Error::new(
                Kind::AlreadyExists,
                "task",
                format!("{}: already exists", r.id),
            ));
        }
        for (name, path) in [("checkpoint", &r.checkpoint), ("bundle", &r.bundle)] {
            let wanted = name == "bundle" || !path.is_empty();
            if wanted && !Path::new(path).is_absolute() {
                return Err(Error::new(Kind::Invalid, name, path).source("not absolute"));
            }
        }
        Ok(())
    }

    pub fn prepare(
        &mut self,
        r: &wire::CreateTaskRequest,
        fds: Vec<OwnedFd>,
        reply: Reply,
    ) -> Result<()> {
        self.check_create(r)?;
        let options = crate::options::parse(r.options.as_ref())?;
        let runtime = Runtime::new(&options, &self.config.namespace)?;
        let wanted = Wanted::parse(&r.stdin, &r.stdout, &r.stderr, r.terminal)?;
        let bundle = PathBuf::from(&r.bundle);
        self.share_with(&bundle)?;
        let shared_pids = shares_pids(&bundle)?;
        let id = ProcessId::new(&r.id, "");
        let (io, ends) = self.open_stdio(&id, &options, &wanted, fds)?;
        let console = self.console_socket(r.terminal)?;
        let rootfs = bundle.join("rootfs");
        if !r.rootfs.is_empty() {
            fs::create_dir_all(&rootfs)
                .map_err(|e| Error::io("mkdir", rootfs.display().to_string(), e))?;
            crate::hands::mount(&r.rootfs, &rootfs)?;
        }
        // Records of an earlier life of this id must not be taken for this one's.
        for name in ["exit.json", "init.pid", "shim.json"] {
            let _ = fs::remove_file(bundle.join(name));
        }
        let names = StdioNames {
            stdin: r.stdin.clone(),
            stdout: r.stdout.clone(),
            stderr: r.stderr.clone(),
            terminal: r.terminal,
        };
        let mut init = Process::new(id.clone(), State::Creating, names);
        init.io = Some(io.id());
        let waits = io.logger().is_some();
        self.ios.insert(io.id(), io);
        let task = Task {
            id: r.id.clone(),
            bundle,
            runtime,
            options,
            init,
            execs: Default::default(),
            launches: Default::default(),
            cgroup: Cgroup::default(),
            shared_pids,
            oom_killed: false,
            images: None,
            mounted: !r.rootfs.is_empty(),
        };
        self.tasks.insert(r.id.clone(), task);
        // Before the runtime makes anything: a shim that dies now must not leave it unknown.
        if let Err(e) = self.record(&id, 0).and_then(|()| self.write_members()) {
            self.abandon_task(&id, Some(reply), e);
            return Ok(());
        }
        if !r.checkpoint.is_empty() {
            self.created_from_images(&id, r, (ends, console), reply);
            return Ok(());
        }
        self.launch_when_ready(
            &id,
            Launch {
                ends,
                console,
                reply,
            },
            waits,
        );
        Ok(())
    }

    pub fn open_stdio(
        &mut self,
        id: &ProcessId,
        options: &Options,
        wanted: &Wanted,
        fds: Vec<OwnedFd>,
    ) -> Result<(Io, ProcessEnds)> {
        let number = self.next_number();
        let owner = Owner {
            io: number,
            container: &id.task,
            namespace: &self.config.namespace,
            uid: options.io_uid,
            gid: options.io_gid,
        };
        open::open(&self.poll, &owner, wanted, fds)
    }

    pub fn console_socket(&mut self, terminal: bool) -> Result<Option<ConsoleSocket>> {
        let number = self.next_number();
        match (terminal, self.config.socket.parent()) {
            (true, Some(dir)) => ConsoleSocket::bind(dir, number).map(Some),
            _ => Ok(None),
        }
    }

    /// Calls the runtime now, or once the logging binary says that it listens.
    pub fn launch_when_ready(&mut self, id: &ProcessId, launch: Launch, waits: bool) {
        if waits {
            if let Some(task) = self.tasks.get_mut(&id.task) {
                task.launches.insert(id.exec.clone(), launch);
            }
            self.after(LOGGER_TIME, Timer::LoggerReady { owner: id.clone() });
            return;
        }
        let reply = launch.reply;
        let restores = id.is_init() && self.task(id).is_ok_and(|task| task.images.is_some());
        let result = match id.is_init() {
            true if restores => self.launch_restore(id, launch),
            true => self.launch_init(id, launch),
            false => self.launch_exec(id, launch),
        };
        if let Err(e) = result {
            self.launch_failed(id, Some(reply), e);
        }
    }

    pub fn logger_changed(&mut self, io: u32) {
        let owner = self
            .tasks
            .values()
            .flat_map(Task::processes)
            .find(|p| p.io == Some(io));
        let Some(id) = owner.map(|p| p.id.clone()) else {
            return self.drop_io(io);
        };
        let Some(logger) = self.ios.get(&io).and_then(Io::logger) else {
            return;
        };
        let ready = logger.is_ready();
        let silent = logger.silent();
        let alive = logger.alive() && !silent && !(ready && logger.dying());
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        let Some(launch) = task.launches.remove(&id.exec) else {
            return;
        };
        if ready && alive {
            self.launch_when_ready(&id, launch, false);
        } else if ready {
            let why = match silent {
                true => "did not say that it is ready",
                false => "ended before the container was started",
            };
            let error = Error::new(Kind::Internal, "logging binary", &id.task).source(why);
            self.launch_failed(&id, Some(launch.reply), error);
        } else {
            task.launches.insert(id.exec.clone(), launch);
        }
    }

    pub fn logger_late(&mut self, id: &ProcessId) {
        let launch = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.launches.remove(&id.exec));
        if let Some(launch) = launch {
            let error = Error::new(Kind::Internal, "logging binary", &id.task)
                .source("was not ready within 10 s");
            self.launch_failed(id, Some(launch.reply), error);
        }
    }

    fn launch_init(&mut self, id: &ProcessId, launch: Launch) -> Result<()> {
        let task = self.task(id)?;
        let pid_file = task.bundle.join("init.pid");
        let mut parts = args(&["create", "--bundle"]);
        parts.push(task.bundle.clone().into());
        parts.extend([OsString::from("--pid-file"), pid_file.into()]);
        if let Some(console) = &launch.console {
            parts.extend([OsString::from("--console-socket"), console.path().into()]);
        }
        parts.extend(task.options.no_pivot_root.then(|| "--no-pivot".into()));
        parts.extend(
            task.options
                .no_new_keyring
                .then(|| "--no-new-keyring".into()),
        );
        parts.push((&task.id).into());
        let stdio = launch.console.is_none().then_some(&launch.ends.0);
        let call = task
            .runtime
            .spawn(&self.config.socket, &parts, stdio, Vec::new())?;
        self.track(
            call,
            Job::Create {
                console: launch.console,
            },
            id,
            Some(launch.reply),
        );
        Ok(())
    }

    pub fn create_ended(
        &mut self,
        id: &ProcessId,
        console: Option<ConsoleSocket>,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let result = result
            .map_err(|text| Error::new(Kind::Runtime, "OCI runtime create failed", "").source(text))
            .and_then(|()| self.created(id, console));
        let pid = match result {
            Ok(pid) => pid,
            Err(e) => return self.launch_failed(id, reply, e),
        };
        if let Some(reply) = reply {
            self.answer(reply, self.created_answer(id, pid));
        }
        if let Some(exit) = self.reaper.claim(pid) {
            self.pids.remove(&pid);
            self.exited(id, exit);
        }
        self.unpark(id);
    }

    fn created(&mut self, id: &ProcessId, console: Option<ConsoleSocket>) -> Result<i32> {
        let pid = read_pid(&self.task(id)?.bundle.join("init.pid"))?;
        self.connect_io(id, console)?;
        self.record_init(id, pid)?;
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return Err(not_found("task", &id.task));
        };
        task.init.state = State::Created { pid: Some(pid) };
        self.publish_create(id, pid, String::new());
        Ok(pid)
    }

    /// The init is there: what has to be known of it, in memory and on disk.
    pub fn record_init(&mut self, id: &ProcessId, pid: i32) -> Result<()> {
        // An init that has ended already has no cgroup to tell.
        let cgroup = Cgroup::of(pid).unwrap_or_default();
        if let Err(e) = self.oom.add(&self.poll, &id.task, &cgroup) {
            self.journal
                .warn(&format!("watch for OOM kills of {}: {e}", id.task));
        }
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return Err(not_found("task", &id.task));
        };
        task.cgroup = cgroup;
        self.record(id, pid)?;
        self.pids.insert(pid, id.clone());
        Ok(())
    }

    /// What it takes to end this task without us. Without a pid, it is only being created.
    fn record(&self, id: &ProcessId, pid: i32) -> Result<()> {
        let task = self.task(id)?;
        let record = TaskRecord {
            id: id.task.clone(),
            socket: self.config.socket.clone(),
            boot_id: self.config.boot_id.clone(),
            runtime: task.runtime.clone(),
            init_pid: pid,
            init_start: records::start_time(pid).unwrap_or(0),
            cgroup: task.cgroup.clone(),
        };
        record
            .write(&task.bundle)
            .map_err(|e| Error::io("write shim.json", task.bundle.display().to_string(), e))
    }

    pub fn publish_create(&mut self, id: &ProcessId, pid: i32, checkpoint: String) {
        let Some(task) = self.tasks.get(&id.task) else {
            return;
        };
        let event = ev::TaskCreate {
            container_id: id.task.clone(),
            bundle: task.bundle.display().to_string(),
            rootfs: Vec::new(),
            io: Some(ev::TaskIo {
                stdin: task.init.names.stdin.clone(),
                stdout: task.init.names.stdout.clone(),
                stderr: task.init.names.stderr.clone(),
                terminal: task.init.names.terminal,
            }),
            checkpoint,
            pid: pid as u32,
        };
        self.publish(&Event::Create(event));
    }

    pub fn write_members(&self) -> Result<()> {
        let bundles = self.tasks.values().map(|t| t.bundle.as_path());
        records::write_members(&self.config.socket, bundles).map_err(|e| {
            Error::io(
                "write members of",
                self.config.socket.display().to_string(),
                e,
            )
        })
    }

    /// The process exists: takes its console and begins to copy.
    pub fn connect_io(&mut self, id: &ProcessId, console: Option<ConsoleSocket>) -> Result<()> {
        let io = self.process(id)?.io;
        let Some(io) = io.and_then(|io| self.ios.get_mut(&io)) else {
            return Ok(());
        };
        if let Some(console) = console {
            io.set_console(console.accept()?)?;
        }
        io.start(&self.poll)
    }

    /// Undoes a Create, or puts an exec back, and tells the caller. A runtime removes what it
    /// made when it fails, but not when it was killed, or when the failure was ours.
    pub fn launch_failed(&mut self, id: &ProcessId, reply: Option<Reply>, error: Error) {
        if !id.is_init() {
            return self.exec_failed(id, reply, error);
        }
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        if task.images.is_some() {
            return self.restore_failed(id, reply, error);
        }
        task.init.state = State::Creating;
        let parts = args(&["delete", "--force", &id.task]);
        match task
            .runtime
            .spawn(&self.config.socket, &parts, None, Vec::new())
        {
            Ok(call) => self.track(call, Job::CleanUp { error }, id, reply),
            Err(e) => {
                self.journal.warn(&e.to_string());
                self.abandon_task(id, reply, error);
            }
        }
    }

    /// Forgets a task that never came to be.
    pub fn abandon_task(&mut self, id: &ProcessId, reply: Option<Reply>, error: Error) {
        let Some(mut task) = self.tasks.remove(&id.task) else {
            return;
        };
        self.pids.retain(|_, owner| owner != id);
        self.oom.remove(&task.id);
        if let Some(io) = task.init.io.take() {
            self.abandon_io(io);
        }
        if task.mounted
            && let Err(e) = crate::hands::unmount_rootfs(&task.rootfs())
        {
            self.journal.warn(&e.to_string());
        }
        for name in ["shim.json", "init.pid"] {
            let _ = fs::remove_file(task.bundle.join(name));
        }
        if let Err(e) = self.write_members() {
            self.journal.warn(&e.to_string());
        }
        if self.is_sandbox(&task.id) {
            self.forget_sandbox();
        }
        let heard = reply.is_some_and(|reply| self.is_heard(reply));
        self.tell(reply, Err(error));
        for waiter in std::mem::take(&mut task.init.waiters) {
            self.answer(waiter, Err(not_found("task", &task.id)));
        }
        for (request, fds, reply) in std::mem::take(&mut task.init.parked) {
            self.dispatch(request, fds, reply);
        }
        // The daemon that asked has died. The one after it knows us and no task of ours: it would
        // neither delete one nor let us go, and learns by our end that there is nothing.
        if !heard && self.tasks.is_empty() {
            self.end();
        }
    }

    /// Streams of a process that never came to be.
    pub fn abandon_io(&mut self, io: u32) {
        if let Some(entry) = self.ios.remove(&io)
            && let Some(logger) = entry.logger()
            && logger.alive()
        {
            let _ = coracle_sys::spawn::kill(logger.pid(), 9);
        }
    }

    pub fn start(&mut self, id: &ProcessId, reply: Reply) {
        if self.task(id).is_ok_and(|task| task.images.is_some()) {
            return self.start_from_images(id, reply);
        }
        let parts = args(&["start", &id.task]);
        if let Err(e) = self.call(id, Job::Start, Some(reply), &parts, Vec::new()) {
            return self.answer(reply, Err(e));
        }
        if let Some(task) = self.tasks.get_mut(&id.task) {
            let pid = task.init.state.pid();
            task.init.state = State::Starting { pid, early: None };
            // Not when the runtime says so: a short process has ended by then.
            task.init.started_nanos = now_nanos();
        }
    }

    pub fn start_ended(
        &mut self,
        id: &ProcessId,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        let State::Starting { pid, early } = task.init.state else {
            return;
        };
        let pid = pid.unwrap_or(0);
        match result {
            Ok(()) => {
                task.init.state = State::Running { pid };
                let event = ev::TaskStart {
                    container_id: id.task.clone(),
                    pid: pid as u32,
                };
                self.publish(&Event::Start(event));
                if let Some(reply) = reply {
                    self.answer(reply, self.started_answer(id, pid));
                }
            }
            Err(text) => {
                task.init.state = State::Created { pid: Some(pid) };
                task.init.started_nanos = 0;
                let error = Error::new(Kind::Runtime, "OCI runtime start failed", "").source(text);
                self.tell(reply, Err(error));
            }
        }
        if let Some(exit) = early {
            self.exited(id, exit);
        }
        self.unpark(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_file_names() {
        for good in ["a", "abc-1.2_x", "0f3", "x+y"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "a/b",
            "a b",
            "a\0",
            "é",
            &"x".repeat(256),
        ] {
            assert_eq!(check_id(bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }

    #[test]
    fn a_pid_namespace_of_its_own_has_no_path() {
        let dir = tempfile::tempdir().unwrap();
        for (json, want) in [
            (r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#, false),
            (
                r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#,
                true,
            ),
            (
                r#"{"linux":{"namespaces":[{"type":"mount"}]},"x":[1,{}]}"#,
                true,
            ),
            (r#"{}"#, true),
        ] {
            fs::write(dir.path().join("config.json"), json).unwrap();
            assert_eq!(shares_pids(dir.path()).unwrap(), want, "{json}");
        }
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert_eq!(shares_pids(dir.path()).unwrap_err().kind(), Kind::Invalid);
    }
}
