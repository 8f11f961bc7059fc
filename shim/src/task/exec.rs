//! Execs: added by Exec, started by Start, forgotten at Delete.
//!
//! Owns: the process description until the runtime has read it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::call::{Job, args};
use super::create::{check_id, read_pid};
use super::state::State;
use super::{Exec, Launch, Process, Task};
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result, not_found};
use crate::events::Event;
use crate::process::{ProcessId, StdioNames, now_nanos};
use crate::proto::containerd::events as ev;
use crate::proto::containerd::task::v2 as wire;
use crate::runtime_cli::{memory_file, path_of};
use crate::service::Reply;
use crate::stdio::open::Wanted;
use crate::supervisor::{Supervisor, empty, encoded};

/// The request's word on the terminal counts, not the description's.
fn with_terminal(spec: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let bad = |e: &dyn std::fmt::Display| Error::new(Kind::Invalid, "exec", "spec").source(e);
    let mut value: serde_json::Value = serde_json::from_slice(spec).map_err(|e| bad(&e))?;
    let object = value
        .as_object_mut()
        .ok_or_else(|| bad(&"not a JSON object"))?;
    object.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&value).map_err(|e| bad(&e))
}

fn pid_file(task: &Task, io: u32) -> PathBuf {
    task.bundle.join(format!("exec-{io}.pid"))
}

impl Supervisor {
    pub fn add_exec(&mut self, r: wire::ExecProcessRequest, fds: Vec<OwnedFd>, reply: Reply) {
        let result = self.try_add_exec(r, fds);
        self.answer(reply, result);
    }

    fn try_add_exec(&mut self, r: wire::ExecProcessRequest, fds: Vec<OwnedFd>) -> Result<Vec<u8>> {
        check_id(&r.exec_id)?;
        let wanted = Wanted::parse(&r.stdin, &r.stdout, &r.stderr, r.terminal)?;
        let spec = r.spec.as_ref().map_or(&[][..], |any| &any.value);
        let spec = with_terminal(spec, r.terminal)?;
        let Some(task) = self.tasks.get_mut(&r.id) else {
            return Err(not_found("task", &r.id));
        };
        if task.execs.contains_key(&r.exec_id) {
            let text = format!("{}: already exists", r.exec_id);
            return Err(Error::new(Kind::AlreadyExists, "process", text));
        }
        let names = StdioNames {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        };
        let id = ProcessId::new(&r.id, &r.exec_id);
        let process = Process::new(id, State::Created { pid: None }, names);
        task.execs.insert(
            r.exec_id.clone(),
            Exec {
                process,
                spec,
                wanted,
                fds,
            },
        );
        let event = ev::TaskExecAdded {
            container_id: r.id,
            exec_id: r.exec_id,
        };
        self.publish(&Event::ExecAdded(event));
        empty()
    }

    pub fn start_exec(&mut self, id: &ProcessId, reply: Reply) {
        if let Err(e) = self.try_start_exec(id, reply) {
            self.answer(reply, Err(e));
        }
    }

    fn try_start_exec(&mut self, id: &ProcessId, reply: Reply) -> Result<()> {
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return Err(not_found("task", &id.task));
        };
        if !matches!(task.init.state, State::Running { .. }) {
            return Err(Error::new(
                Kind::Precondition,
                "container not running",
                &id.task,
            ));
        }
        let options = task.options.clone();
        let Some(exec) = task.execs.get_mut(&id.exec) else {
            return Err(not_found("process", &id.exec));
        };
        let (wanted, fds) = (exec.wanted.clone(), std::mem::take(&mut exec.fds));
        let (io, ends) = self.open_stdio(id, &options, &wanted, fds)?;
        let console = self.console_socket(wanted.terminal)?;
        let waits = io.logger().is_some();
        let number = io.id();
        self.ios.insert(number, io);
        if let Some(exec) = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.execs.get_mut(&id.exec))
        {
            exec.process.io = Some(number);
            exec.process.state = State::Starting {
                pid: None,
                early: None,
            };
        }
        self.launch_when_ready(
            id,
            Launch {
                ends,
                console,
                reply,
            },
            waits,
        );
        Ok(())
    }

    pub fn launch_exec(&mut self, id: &ProcessId, launch: Launch) -> Result<()> {
        let task = self.task(id)?;
        let exec = task
            .execs
            .get(&id.exec)
            .ok_or_else(|| not_found("process", &id.exec))?;
        let spec = memory_file("process.json", &exec.spec)?;
        let mut parts = args(&["exec", "--detach", "--process"]);
        parts.push(path_of(&spec).into());
        parts.push("--pid-file".into());
        parts.push(pid_file(task, exec.process.io.unwrap_or(0)).into());
        if let Some(console) = &launch.console {
            parts.extend([OsString::from("--console-socket"), console.path().into()]);
        }
        parts.push((&task.id).into());
        let stdio = launch.console.is_none().then_some(&launch.ends.0);
        let call = task
            .runtime
            .spawn(&self.config.socket, &parts, stdio, vec![spec])?;
        self.track(
            call,
            Job::Exec {
                console: launch.console,
            },
            id,
            Some(launch.reply),
        );
        Ok(())
    }

    pub fn exec_ended(
        &mut self,
        id: &ProcessId,
        console: Option<ConsoleSocket>,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let started = result
            .map_err(|text| Error::new(Kind::Runtime, "OCI runtime exec failed", "").source(text))
            .and_then(|()| self.exec_started(id, console));
        let pid = match started {
            Ok(pid) => pid,
            Err(e) => return self.exec_failed(id, reply, e),
        };
        if let Some(reply) = reply {
            self.answer(reply, encoded(&wire::StartResponse { pid: pid as u32 }));
        }
        if let Some(exit) = self.reaper.claim(pid) {
            self.pids.remove(&pid);
            self.exited(id, exit);
        }
        self.unpark(id);
        self.try_publish_exit(&ProcessId::new(&id.task, ""));
    }

    fn exec_started(&mut self, id: &ProcessId, console: Option<ConsoleSocket>) -> Result<i32> {
        let task = self.task(id)?;
        let io = self.process(id)?.io.unwrap_or(0);
        let file = pid_file(task, io);
        let pid = read_pid(&file);
        // Only a message from the runtime to us.
        let _ = fs::remove_file(&file);
        let pid = pid?;
        if let Err(e) = self.connect_io(id, console) {
            self.pids.remove(&pid);
            let _ = coracle_sys::spawn::kill(pid, 9);
            return Err(e);
        }
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let Some(process) = process else {
            return Err(not_found("process", &id.exec));
        };
        process.state = State::Running { pid };
        process.started_nanos = now_nanos();
        self.pids.insert(pid, id.clone());
        let event = ev::TaskExecStarted {
            container_id: id.task.clone(),
            exec_id: id.exec.clone(),
            pid: pid as u32,
        };
        self.publish(&Event::ExecStarted(event));
        Ok(pid)
    }

    /// As if it had only been added: it can be deleted, or started again.
    pub fn exec_failed(&mut self, id: &ProcessId, reply: Option<Reply>, error: Error) {
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let mut io = None;
        if let Some(process) = process {
            process.state = State::Created { pid: None };
            io = process.io.take();
        }
        if let Some(io) = io {
            if let Ok(task) = self.task(id) {
                let _ = fs::remove_file(pid_file(task, io));
            }
            self.abandon_io(io);
        }
        self.tell(reply, Err(error));
        self.unpark(id);
        self.try_publish_exit(&ProcessId::new(&id.task, ""));
    }

    pub fn delete_exec(&mut self, id: &ProcessId, reply: Reply) {
        let task = self.tasks.get_mut(&id.task);
        let Some(exec) = task.and_then(|t| t.execs.remove(&id.exec)) else {
            return;
        };
        let exit = exec.process.state.exit();
        if let Some(io) = exec.process.io {
            self.release_io(io);
        }
        let answer = wire::DeleteResponse {
            pid: exit.map_or(0, |e| e.pid as u32),
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map(|e| e.timestamp()),
        };
        self.answer(reply, encoded(&answer));
        for waiter in exec.process.waiters {
            self.answer(waiter, Err(not_found("process", &id.exec)));
        }
        for (request, fds, reply) in exec.process.parked {
            self.dispatch(request, fds, reply);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_terminal_wins() {
        let got = with_terminal(br#"{"args":["a"],"terminal":true}"#, false).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&got).unwrap();
        assert_eq!(value["terminal"], false);
        assert_eq!(value["args"][0], "a");
        for bad in [&b""[..], b"[]", b"{"] {
            assert_eq!(with_terminal(bad, true).unwrap_err().kind(), Kind::Invalid);
        }
    }
}
