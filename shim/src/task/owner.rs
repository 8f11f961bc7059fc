//! Takes requests: asks `state::decide`, performs what has no phases, starts what has.
//!
//! Owns: the order "decide, step, checkpoint, publish". A request that comes during a transition
//! is parked and decided again when it ends.

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use prost_types::Any;

use super::call::{Job, args};
use super::state::{Asked, Decision, Reason, State, decide};
use super::{Process, Task};
use crate::error::{Error, Kind, Result, not_found};
use crate::options::message_name;
use crate::process::{ProcessId, timestamp};
use crate::proto::containerd::runc::v1 as runc;
use crate::proto::containerd::runtime::sandbox::v1 as sandbox;
use crate::proto::containerd::task::v2 as wire;
use crate::proto::containerd::v1::types;
use crate::proto::coracle::shim::v1 as private;
use crate::runtime_cli::{memory_file, path_of};
use crate::service::{Reply, Request, SandboxRequest};
use crate::supervisor::{Supervisor, empty, encoded};

const SIGKILL: u32 = 9;

fn denied(reason: Reason, asked: Asked, id: &ProcessId) -> Error {
    let kind = match (reason, asked) {
        (Reason::AlreadyFinished, Asked::Kill | Asked::Resize) => Kind::NotFound,
        _ => Kind::Precondition,
    };
    let subject = if id.is_init() { &id.task } else { &id.exec };
    Error::new(kind, reason.text(), subject)
}

fn status(state: &State) -> types::Status {
    match state {
        State::Creating => types::Status::Unknown,
        State::Created { .. } | State::Starting { .. } => types::Status::Created,
        State::Running { .. } | State::Resuming { .. } => types::Status::Running,
        State::Pausing { .. } => types::Status::Pausing,
        State::Paused { .. } => types::Status::Paused,
        State::Exited { .. } | State::Stopped { .. } | State::Deleting { .. } => {
            types::Status::Stopped
        }
    }
}

fn pid_of(process: &Process) -> u32 {
    process.state.pid().unwrap_or(0) as u32
}

impl Supervisor {
    pub fn dispatch(&mut self, request: Request, fds: Vec<OwnedFd>, reply: Reply) {
        let Some((id, asked)) = request.subject() else {
            return self.unbound(request, fds, reply);
        };
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let Some(process) = process else {
            let error = match id.is_init() {
                true => not_found("task", &id.task),
                false => not_found("process", &id.exec),
            };
            return self.answer(reply, Err(error));
        };
        match decide(&process.state, asked) {
            Decision::Do => self.perform(request, &id, fds, reply),
            Decision::AlreadyDone => self.answer(reply, empty()),
            Decision::Later => {
                let ends = request.ends_its_process();
                process.parked.push((request, fds, reply));
                if ends {
                    self.hurry(&id);
                }
            }
            Decision::Deny(reason) => self.answer(reply, Err(denied(reason, asked, &id))),
            Decision::KillThenDelete => match process.state.pid() {
                Some(pid) => {
                    process.parked.push((request, fds, reply));
                    // It has not been reaped, so the pid is its own.
                    let _ = coracle_sys::spawn::kill(pid, 9);
                    self.thaw(&id);
                }
                None if id.is_init() => self.delete_unstarted(&id, reply),
                None => self.delete_exec(&id, reply),
            },
        }
    }

    /// Asks again for everything that waited for this process's transition.
    pub fn unpark(&mut self, id: &ProcessId) {
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let parked = process
            .map(|p| std::mem::take(&mut p.parked))
            .unwrap_or_default();
        for (request, fds, reply) in parked {
            self.dispatch(request, fds, reply);
        }
    }

    fn unbound(&mut self, request: Request, fds: Vec<OwnedFd>, reply: Reply) {
        match request {
            Request::Create(r) => self.create(r, fds, reply),
            Request::Connect(r) => {
                // Also the probe of a daemon that wants to know whether we live: any id will do.
                let task = self.tasks.get(&r.id);
                let answer = wire::ConnectResponse {
                    shim_pid: std::process::id(),
                    task_pid: task.map_or(0, |t| pid_of(&t.init)),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                };
                self.answer(reply, encoded(&answer));
            }
            Request::Sandbox(r) => self.sandbox_request(r, reply),
            // The daemon gives up a sandbox that it does not know any more.
            Request::Shutdown(r) if self.is_sandbox(&r.id) => {
                let sandbox_id = r.id;
                let r = sandbox::ShutdownSandboxRequest { sandbox_id };
                self.sandbox_request(SandboxRequest::Shutdown(r), reply);
            }
            // A shim with tasks, a sandbox among them, does not end.
            _ => {
                self.answer(reply, empty());
                if self.tasks.is_empty() {
                    self.end();
                }
            }
        }
    }

    fn perform(&mut self, request: Request, id: &ProcessId, fds: Vec<OwnedFd>, reply: Reply) {
        let done = match request {
            Request::State(_) => self.report(id),
            Request::Status(_) => self.private_status(id),
            Request::Pids(_) => self.processes_of(id),
            Request::Stats(_) => self.stats(id),
            Request::ResizePty(r) => self.resize(id, &r),
            Request::CloseIo(r) => self.close_io(id, &r),
            Request::Attach(r) => self.attach(id, &r, fds),
            Request::ReopenLog(_) => self.reopen_log(id),
            Request::Kill(r) => return self.kill(id, &r, reply),
            Request::Wait(_) => return self.wait(id, reply),
            Request::Pause(_) => return self.pause(id, reply, true),
            Request::Resume(_) => return self.pause(id, reply, false),
            Request::Update(r) => return self.update(id, &r, reply),
            Request::Checkpoint(r) => return self.checkpoint(id, &r, reply),
            Request::Exec(r) => return self.add_exec(r, fds, reply),
            Request::Start(_) if id.is_init() => return self.start(id, reply),
            Request::Start(_) => return self.start_exec(id, reply),
            Request::Delete(_) if id.is_init() => return self.delete(id, reply),
            Request::Delete(_) => return self.delete_exec(id, reply),
            Request::Create(_)
            | Request::Connect(_)
            | Request::Shutdown(_)
            | Request::Sandbox(_) => empty(),
        };
        self.answer(reply, done);
    }

    pub fn task(&self, id: &ProcessId) -> Result<&Task> {
        self.tasks
            .get(&id.task)
            .ok_or_else(|| not_found("task", &id.task))
    }

    pub fn process(&self, id: &ProcessId) -> Result<&Process> {
        self.task(id)?
            .process(&id.exec)
            .ok_or_else(|| not_found("process", &id.exec))
    }

    fn report(&self, id: &ProcessId) -> Result<Vec<u8>> {
        let task = self.task(id)?;
        let process = self.process(id)?;
        let exit = process.state.exit();
        encoded(&wire::StateResponse {
            id: if id.is_init() {
                id.task.clone()
            } else {
                id.exec.clone()
            },
            bundle: task.bundle.display().to_string(),
            pid: pid_of(process),
            status: status(&process.state) as i32,
            stdin: process.names.stdin.clone(),
            stdout: process.names.stdout.clone(),
            stderr: process.names.stderr.clone(),
            terminal: process.names.terminal,
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map(|e| e.timestamp()),
            exec_id: id.exec.clone(),
        })
    }

    fn private_status(&self, id: &ProcessId) -> Result<Vec<u8>> {
        let task = self.task(id)?;
        let process = self.process(id)?;
        let exit = process.state.exit();
        let io = process.io.and_then(|io| self.ios.get(&io));
        encoded(&private::StatusResponse {
            pid: pid_of(process),
            status: status(&process.state) as u32,
            exit_status: exit.map_or(0, |e| e.status),
            started_at: (process.started_nanos > 0).then(|| timestamp(process.started_nanos)),
            exited_at: exit.map(|e| e.timestamp()),
            oom_killed: task.oom_killed,
            log_bytes_dropped: io.map_or(0, |io| io.log_bytes_dropped()),
        })
    }

    fn processes_of(&self, id: &ProcessId) -> Result<Vec<u8>> {
        let task = self.task(id)?;
        let mut pids = task
            .cgroup
            .pids()
            .map_err(|e| Error::io("read cgroup.procs", &id.task, e))?;
        // containerd (1.7 and later) takes a task without processes for a leaked shim when it
        // starts, and forgets the task with its exit code: one that ended while nobody was there
        // to be told shows the pid whose exit is still to be fetched.
        if let (true, State::Exited { exit } | State::Stopped { exit }) =
            (pids.is_empty(), &task.init.state)
        {
            pids.push(exit.pid);
        }
        let details = |pid: i32| {
            let exec = task
                .execs
                .values()
                .find(|e| e.process.state.pid() == Some(pid))?;
            let details = runc::ProcessDetails {
                exec_id: exec.process.id.exec.clone(),
            };
            Some(Any {
                type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                value: prost::Message::encode_to_vec(&details),
            })
        };
        let processes = pids
            .into_iter()
            .map(|pid| types::ProcessInfo {
                pid: pid as u32,
                info: details(pid),
            })
            .collect();
        encoded(&wire::PidsResponse { processes })
    }

    fn stats(&self, id: &ProcessId) -> Result<Vec<u8>> {
        let stats = Some(crate::stats::read(&self.task(id)?.cgroup));
        encoded(&wire::StatsResponse { stats })
    }

    fn resize(&self, id: &ProcessId, r: &wire::ResizePtyRequest) -> Result<Vec<u8>> {
        let io = self.process(id)?.io.and_then(|io| self.ios.get(&io));
        match io {
            Some(io) => io.resize(r.width, r.height).and_then(|()| empty()),
            None => Err(Error::new(
                Kind::Precondition,
                "resize",
                "process without a terminal",
            )),
        }
    }

    fn close_io(&mut self, id: &ProcessId, r: &wire::CloseIoRequest) -> Result<Vec<u8>> {
        let io = self.process(id)?.io;
        if r.stdin
            && let Some(io) = io.and_then(|io| self.ios.get_mut(&io))
        {
            io.close_stdin();
        }
        empty()
    }

    fn attach(
        &mut self,
        id: &ProcessId,
        r: &private::AttachRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>> {
        let mut fds = fds.into_iter();
        let mut take = |wanted: bool, name: &str| match (wanted, wanted.then(|| fds.next())) {
            (true, Some(Some(fd))) => Ok(Some(fd)),
            (true, _) => Err(Error::new(Kind::Invalid, "attach", name)
                .source("no descriptor came with the request")),
            (false, _) => Ok(None),
        };
        let ends = [
            take(r.stdin, "stdin")?,
            take(r.stdout, "stdout")?,
            take(r.stderr, "stderr")?,
        ];
        let io = self.process(id)?.io;
        if let Some(io) = io.and_then(|io| self.ios.get_mut(&io)) {
            io.attach(&self.poll, ends)?;
        }
        encoded(&private::AttachResponse {})
    }

    fn reopen_log(&mut self, id: &ProcessId) -> Result<Vec<u8>> {
        let io = self.process(id)?.io;
        match io.and_then(|io| self.ios.get_mut(&io)) {
            Some(io) => io.reopen_log()?,
            None => {
                return Err(Error::new(
                    Kind::Precondition,
                    "reopen",
                    "task without a log file",
                ));
            }
        }
        encoded(&private::ReopenLogResponse {})
    }

    fn wait(&mut self, id: &ProcessId, reply: Reply) {
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let Some(process) = process else { return };
        match process.state {
            State::Stopped { exit } | State::Deleting { exit } => {
                let answer = wire::WaitResponse {
                    exit_status: exit.status,
                    exited_at: Some(exit.timestamp()),
                };
                self.answer(reply, encoded(&answer));
            }
            _ => process.waiters.push(reply),
        }
    }

    fn kill(&mut self, id: &ProcessId, r: &wire::KillRequest, reply: Reply) {
        let Ok(process) = self.process(id) else {
            return;
        };
        let paused = matches!(process.state, State::Paused { .. });
        let through_runtime = id.is_init() && (r.all || paused);
        if let Some(pid) = process.state.pid().filter(|_| !through_runtime) {
            // A child that has not been reaped: the pid cannot be anybody else's. Signal 0 tests.
            let result = coracle_sys::spawn::kill(pid, r.signal as i32).map_err(|e| {
                match e.raw_os_error() {
                    Some(3) => Error::new(Kind::NotFound, "process already finished", &id.task),
                    Some(22) => Error::new(Kind::Invalid, "signal", r.signal.to_string()),
                    _ => Error::io("kill", pid.to_string(), e),
                }
            });
            if result.is_ok() && id.is_init() && r.signal == SIGKILL {
                self.thaw(id);
            }
            return self.tell(Some(reply), result);
        }
        let signal = r.signal.to_string();
        let mut parts = vec!["kill"];
        parts.extend(r.all.then_some("--all"));
        parts.extend([id.task.as_str(), signal.as_str()]);
        self.call_or_tell(id, Job::Kill, reply, &args(&parts), Vec::new());
    }

    /// Somebody may have frozen the cgroup without us: the kernel would keep the signal until it
    /// is thawed.
    fn thaw(&self, id: &ProcessId) {
        if let Ok(task) = self.task(id) {
            task.cgroup.thaw();
        }
    }

    pub fn call_or_tell(
        &mut self,
        id: &ProcessId,
        job: Job,
        reply: Reply,
        args: &[OsString],
        inputs: Vec<std::fs::File>,
    ) {
        if let Err(e) = self.call(id, job, Some(reply), args, inputs) {
            self.answer(reply, Err(e));
        }
    }

    fn pause(&mut self, id: &ProcessId, reply: Reply, pausing: bool) {
        let (verb, job) = match pausing {
            true => ("pause", Job::Pause),
            false => ("resume", Job::Resume),
        };
        if let Err(e) = self.call(id, job, Some(reply), &args(&[verb, &id.task]), Vec::new()) {
            return self.answer(reply, Err(e));
        }
        if let Some(task) = self.tasks.get_mut(&id.task)
            && let Some(pid) = task.init.state.pid()
        {
            task.init.state = if pausing {
                State::Pausing { pid }
            } else {
                State::Resuming { pid }
            };
        }
    }

    fn update(&mut self, id: &ProcessId, r: &wire::UpdateTaskRequest, reply: Reply) {
        let resources = match r.resources.as_ref() {
            Some(any) if !any.value.is_empty() => any,
            _ => {
                let error = Error::new(Kind::Invalid, "update", &id.task).source("no resources");
                return self.answer(reply, Err(error));
            }
        };
        if serde_json::from_slice::<serde::de::IgnoredAny>(&resources.value).is_err() {
            let error = Error::new(Kind::Invalid, "update resources", message_name(resources))
                .source("not JSON");
            return self.answer(reply, Err(error));
        }
        let file = match memory_file("resources", &resources.value) {
            Ok(file) => file,
            Err(e) => return self.answer(reply, Err(e)),
        };
        let mut parts = args(&["update", "--resources"]);
        parts.push(path_of(&file).into());
        parts.push((&id.task).into());
        self.call_or_tell(id, Job::Update, reply, &parts, vec![file]);
    }
}
