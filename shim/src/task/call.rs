//! Runtime calls under way: what each was for, and what its end means.
//!
//! Owns: the table of purposes. A call that fails leaves the task as it was before.

use std::ffi::OsString;
use std::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::process::{Exit, ProcessId};
use crate::runtime_cli::Call;
use crate::service::Reply;
use crate::supervisor::{Supervisor, empty};

use super::checkpoint::Made;
use super::deadline::Deadline;
use super::state::State;
use crate::console::ConsoleSocket;
use crate::events::Event;
use crate::proto::containerd::events as ev;

pub enum Job {
    Create {
        console: Option<ConsoleSocket>,
    },
    Exec {
        console: Option<ConsoleSocket>,
    },
    Start,
    Pause,
    Resume,
    Kill,
    Update,
    Checkpoint {
        made: Made,
    },
    Restore {
        console: Option<ConsoleSocket>,
    },
    Delete {
        force: bool,
    },
    /// After a create that failed in its midst: what it made goes before its caller is told.
    CleanUp {
        error: Error,
    },
}

pub struct Running {
    call: Call,
    pub job: Job,
    pub id: ProcessId,
    pub reply: Option<Reply>,
    pub deadline: Deadline,
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.call.pid
    }

    pub fn may_tell_a_pid(&self) -> bool {
        matches!(
            self.job,
            Job::Create { .. } | Job::Exec { .. } | Job::Restore { .. }
        )
    }
}

/// The texts by which runtimes say that there is no such container (runc, crun, coracle).
pub fn is_absent(message: &str) -> bool {
    message.contains("does not exist") || message.contains("no such container")
}

/// The texts by which runtimes say that the process has ended.
fn is_finished(message: &str) -> bool {
    message.contains("process already finished")
        || message.contains("os: process not initialized")
        || message.contains("container not running")
        || message.contains("no such process")
}

pub fn args(parts: &[&str]) -> Vec<OsString> {
    parts.iter().map(OsString::from).collect()
}

impl Supervisor {
    /// Starts a call whose streams are nobody's.
    pub fn call(
        &mut self,
        id: &ProcessId,
        job: Job,
        reply: Option<Reply>,
        args: &[OsString],
        inputs: Vec<std::fs::File>,
    ) -> Result<()> {
        let Some(task) = self.tasks.get(&id.task) else {
            return Err(crate::error::not_found("task", &id.task));
        };
        let call = task
            .runtime
            .spawn(&self.config.socket, args, None, inputs)?;
        self.track(call, job, id, reply);
        Ok(())
    }

    pub fn track(&mut self, call: Call, job: Job, id: &ProcessId, reply: Option<Reply>) {
        let running = Running {
            deadline: Deadline::new(&job, self.config.call_limit, Instant::now()),
            job,
            id: id.clone(),
            reply,
            call,
        };
        self.calls.insert(running.call.pid, running);
    }

    pub fn call_ended(&mut self, running: Running, exit: Exit) {
        let Running {
            call,
            job,
            id,
            reply,
            deadline,
        } = running;
        let result = match exit.status {
            0 => Ok(()),
            status => Err(deadline.failure().unwrap_or_else(|| call.failure(status))),
        };
        drop(call);
        match job {
            Job::Create { console } => self.create_ended(&id, console, reply, result),
            Job::Exec { console } => self.exec_ended(&id, console, reply, result),
            Job::Start => self.start_ended(&id, reply, result),
            Job::Pause | Job::Resume => self.pause_ended(&id, &job, reply, result),
            Job::Delete { force } => self.delete_ended(&id, force, reply, result),
            Job::Kill => {
                let result = result.map_err(|text| match is_finished(&text) || is_absent(&text) {
                    true => Error::new(Kind::NotFound, "process already finished", "").source(text),
                    false => Error::new(Kind::Runtime, "OCI runtime kill failed", "").source(text),
                });
                self.tell(reply, result);
            }
            Job::Update => {
                let failed =
                    |text| Error::new(Kind::Runtime, "OCI runtime update failed", "").source(text);
                self.tell(reply, result.map_err(failed));
            }
            Job::Checkpoint { made } => self.checkpoint_ended(&id, &made, reply, result),
            Job::Restore { console } => self.restore_ended(&id, console, reply, result),
            Job::CleanUp { error } => {
                let left = result.err().filter(|text| !is_absent(text));
                if let Some(text) = left {
                    self.journal
                        .warn(&format!("clean up after {}: {text}", id.task));
                }
                self.abandon_task(&id, reply, error);
            }
        }
    }

    pub fn tell(&mut self, reply: Option<Reply>, result: Result<()>) {
        if let Some(reply) = reply {
            self.answer(reply, result.and_then(|()| empty()));
        }
    }

    fn pause_ended(
        &mut self,
        id: &ProcessId,
        job: &Job,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let pausing = matches!(job, Job::Pause);
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        let paused = match task.init.state {
            // It may have died meanwhile.
            State::Pausing { pid } | State::Resuming { pid } => {
                let paused = pausing == result.is_ok();
                task.init.state = if paused {
                    State::Paused { pid }
                } else {
                    State::Running { pid }
                };
                result.is_ok()
            }
            _ => false,
        };
        if paused {
            let container_id = id.task.clone();
            let event = match pausing {
                true => Event::Paused(ev::TaskPaused { container_id }),
                false => Event::Resumed(ev::TaskResumed { container_id }),
            };
            self.publish(&event);
        }
        let operation = if pausing {
            "runtime pause"
        } else {
            "runtime resume"
        };
        let failed = |text| Error::new(Kind::Runtime, operation, "").source(text);
        self.tell(reply, result.map_err(failed));
        self.unpark(id);
    }
}
