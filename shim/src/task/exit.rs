//! How a process's end is recorded, told and cleaned up.
//!
//! Order: reaped -> record on disk -> output delivered (bounded) -> event and Wait answers ->
//! Delete. An init is told after its execs.

use std::time::Duration;

use super::call::{Job, args, is_absent};
use super::state::State;
use crate::error::{Error, Kind, not_found};
use crate::events::Event;
use crate::process::{Exit, ProcessId};
use crate::proto::containerd::events as ev;
use crate::proto::containerd::task::v2 as wire;
use crate::records::ExitRecord;
use crate::service::Reply;
use crate::stdio::{Ctx, Drained};
use crate::supervisor::{LOOK, Supervisor, Timer, empty, encoded};

impl Supervisor {
    /// The reaper has seen the end of a process of ours.
    pub fn exited(&mut self, id: &ProcessId, exit: Exit) {
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let Some(process) = process else { return };
        if let State::Starting { early, .. } = &mut process.state {
            // Its start is told first, when the runtime's call has ended.
            *early = Some(exit);
            return;
        }
        process.state = State::Exited { exit };
        let io = process.io;
        if id.is_init() {
            self.record_init_exit(id, exit);
        }
        if let Some(io) = io {
            self.begin_drain(io, id);
        }
        self.try_publish_exit(id);
    }

    fn record_init_exit(&mut self, id: &ProcessId, exit: Exit) {
        if self.oom.struck_one(&id.task) {
            self.tell_oom(&id.task);
        }
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        let written = ExitRecord::new(&exit, task.oom_killed).write(&task.bundle);
        let shared = task.shared_pids;
        // In a pid namespace of its own the kernel has killed the others already. Elsewhere
        // what the container left behind must not outlive it.
        for exec in task.execs.values() {
            if let Some(pid) = exec
                .process
                .state
                .pid()
                .filter(|_| exec.process.state.alive())
            {
                // Not reaped yet, so the pid is its own.
                let _ = coracle_sys::spawn::kill(pid, 9);
            }
        }
        let cgroup = task.cgroup.clone();
        if shared {
            cgroup.kill_all(Duration::ZERO);
        }
        self.hurry(id);
        if let Err(e) = written {
            self.journal
                .warn(&format!("exit record of {}: {e}", id.task));
        }
    }

    pub fn tell_oom(&mut self, id: &str) {
        if let Some(task) = self.tasks.get_mut(id) {
            task.oom_killed = true;
            self.publish(&Event::Oom(ev::TaskOom {
                container_id: id.to_owned(),
            }));
        }
    }

    fn begin_drain(&mut self, io: u32, id: &ProcessId) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        let mut ctx = Ctx {
            poll: &self.poll,
            scratch: &mut self.scratch,
        };
        if entry.settle(&mut ctx) == Drained::No {
            self.after(
                LOOK,
                Timer::Drain {
                    io,
                    owner: Some(id.clone()),
                },
            );
        }
    }

    /// The time has come to look again whether the reader of a FIFO has taken what is there.
    pub fn look_at_hold(&mut self, io: u32, id: &ProcessId) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        match entry.hold_exit() {
            Some(delay) => self.after(
                delay,
                Timer::Hold {
                    io,
                    owner: id.clone(),
                },
            ),
            None => self.try_publish_exit(id),
        }
    }

    /// Tells an exit when nothing stands before it.
    pub fn try_publish_exit(&mut self, id: &ProcessId) {
        let process = self.tasks.get(&id.task).and_then(|t| t.process(&id.exec));
        let exited = process.filter(|p| matches!(p.state, State::Exited { .. }));
        if let Some(io) = exited.and_then(|p| p.io)
            && let Some(entry) = self.ios.get_mut(&io)
        {
            if entry.exit_is_held() {
                return;
            }
            if let Some(delay) = entry.hold_exit() {
                return self.after(
                    delay,
                    Timer::Hold {
                        io,
                        owner: id.clone(),
                    },
                );
            }
        }
        let Some(task) = self.tasks.get(&id.task) else {
            return;
        };
        let Some(process) = task.process(&id.exec) else {
            return;
        };
        let State::Exited { exit } = process.state else {
            return;
        };
        if let Some(io) = process.io.and_then(|io| self.ios.get(&io))
            && io.delays_exit()
            && io.drained() == Drained::No
        {
            return;
        }
        let before = |state: &State| {
            state.alive() || matches!(state, State::Exited { .. } | State::Starting { .. })
        };
        if id.is_init() && task.execs.values().any(|e| before(&e.process.state)) {
            return;
        }
        self.publish_exit(id, exit);
    }

    fn publish_exit(&mut self, id: &ProcessId, exit: Exit) {
        let event = ev::TaskExit {
            container_id: id.task.clone(),
            id: if id.is_init() {
                id.task.clone()
            } else {
                id.exec.clone()
            },
            pid: exit.pid as u32,
            exit_status: exit.status,
            exited_at: Some(exit.timestamp()),
        };
        self.publish(&Event::Exit(event));
        let process = self
            .tasks
            .get_mut(&id.task)
            .and_then(|t| t.process_mut(&id.exec));
        let Some(process) = process else { return };
        process.state = State::Stopped { exit };
        let answer = wire::WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.timestamp()),
        };
        for waiter in std::mem::take(&mut process.waiters) {
            self.answer(waiter, encoded(&answer));
        }
        self.unpark(id);
        if !id.is_init() {
            self.try_publish_exit(&ProcessId::new(&id.task, ""));
        }
    }

    /// Delete of a stopped init: the runtime removes its state and the cgroup.
    pub fn delete(&mut self, id: &ProcessId, reply: Reply) {
        let parts = args(&["delete", &id.task]);
        let job = Job::Delete { force: false };
        if let Err(e) = self.call(id, job, Some(reply), &parts, Vec::new()) {
            return self.answer(reply, Err(e));
        }
        if let Some(task) = self.tasks.get_mut(&id.task)
            && let Some(exit) = task.init.state.exit()
        {
            task.init.state = State::Deleting { exit };
        }
    }

    pub fn delete_ended(
        &mut self,
        id: &ProcessId,
        force: bool,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let failure = result.err().filter(|text| !is_absent(text));
        if let Some(text) = &failure
            && !force
        {
            self.journal
                .warn(&format!("runtime delete of {}: {text}", id.task));
            let parts = args(&["delete", "--force", &id.task]);
            if self
                .call(id, Job::Delete { force: true }, reply, &parts, Vec::new())
                .is_ok()
            {
                return;
            }
        }
        let failed = failure
            .map(|text| Error::new(Kind::Runtime, "OCI runtime delete failed", "").source(text))
            .or_else(|| {
                let task = self.tasks.get(&id.task).filter(|t| t.mounted)?;
                crate::hands::unmount_rootfs(&task.rootfs()).err()
            });
        if let Some(error) = failed {
            if let Some(task) = self.tasks.get_mut(&id.task)
                && let State::Deleting { exit } = task.init.state
            {
                task.init.state = State::Stopped { exit };
            }
            self.tell(reply, Err(error));
            return self.unpark(id);
        }
        self.deleted(id, reply);
    }

    fn deleted(&mut self, id: &ProcessId, reply: Option<Reply>) {
        let Some(task) = self.tasks.remove(&id.task) else {
            return;
        };
        self.oom.remove(&id.task);
        for process in task.processes() {
            if let Some(io) = process.io {
                self.release_io(io);
            }
        }
        let _ = std::fs::remove_file(task.bundle.join("shim.json"));
        if let Err(e) = self.write_members() {
            self.journal.warn(&e.to_string());
        }
        if let Some(exit) = task.init.state.exit() {
            let event = ev::TaskDelete {
                container_id: id.task.clone(),
                pid: exit.pid as u32,
                exit_status: exit.status,
                exited_at: Some(exit.timestamp()),
                id: String::new(),
            };
            self.publish(&Event::Delete(event));
            let answer = wire::DeleteResponse {
                pid: exit.pid as u32,
                exit_status: exit.status,
                exited_at: Some(exit.timestamp()),
            };
            let sandbox = self.is_sandbox(&id.task);
            if sandbox {
                self.forget_sandbox();
            }
            if let Some(reply) = reply {
                let answer = if sandbox { empty() } else { encoded(&answer) };
                self.answer(reply, answer);
            }
            if sandbox && self.tasks.is_empty() {
                self.end();
            }
        }
        let execs = task.execs.into_values().map(|e| e.process);
        for process in std::iter::once(task.init).chain(execs) {
            for waiter in process.waiters {
                self.answer(waiter, Err(not_found("task", &id.task)));
            }
            for (request, fds, reply) in process.parked {
                self.dispatch(request, fds, reply);
            }
        }
    }

    /// The process is forgotten; its undelivered output is kept for a bounded time.
    pub fn release_io(&mut self, io: u32) {
        let Some(entry) = self.ios.get_mut(&io) else {
            return;
        };
        if entry.logger().is_some_and(|l| l.alive()) {
            self.after(LOOK, Timer::LoggerTerm { io });
        }
        self.drop_io(io);
    }
}
