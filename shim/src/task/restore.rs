//! Tasks that are created from the images of a checkpoint: as with containerd's runc shim, the
//! processes come at the start, and until then the task has no pid.

use std::ffi::OsString;

use super::call::{Job, args};
use super::create::read_pid;
use super::state::State;
use super::{Images, Launch};
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result, not_found};
use crate::events::Event;
use crate::process::{Exit, ProcessId, now_nanos};
use crate::proto::containerd::events as ev;
use crate::proto::containerd::task::v2 as wire;
use crate::service::Reply;
use crate::stdio::open::ProcessEnds;
use crate::supervisor::{Supervisor, encoded};

impl Supervisor {
    /// Answers a Create whose container is in images.
    pub fn created_from_images(
        &mut self,
        id: &ProcessId,
        r: &wire::CreateTaskRequest,
        streams: (ProcessEnds, Option<ConsoleSocket>),
        reply: Reply,
    ) {
        if let Some(task) = self.tasks.get_mut(&id.task) {
            task.images = Some(Images {
                path: r.checkpoint.clone().into(),
                streams: Some(streams),
            });
            task.init.state = State::Created { pid: None };
        }
        self.publish_create(id, 0, r.checkpoint.clone());
        self.answer(reply, encoded(&wire::CreateTaskResponse { pid: 0 }));
        self.unpark(id);
    }

    pub fn start_from_images(&mut self, id: &ProcessId, reply: Reply) {
        let Some(task) = self.tasks.get_mut(&id.task) else {
            return;
        };
        let streams = task
            .images
            .as_mut()
            .and_then(|images| images.streams.take());
        let Some((ends, console)) = streams else {
            let error = Error::new(Kind::Precondition, "start", &id.task)
                .source("its restore has failed before");
            return self.answer(reply, Err(error));
        };
        task.init.state = State::Starting {
            pid: None,
            early: None,
        };
        task.init.started_nanos = now_nanos();
        let logger = task.init.io.and_then(|io| self.ios.get(&io)?.logger());
        let waits = logger.is_some_and(|logger| !logger.is_ready());
        let launch = Launch {
            ends,
            console,
            reply,
        };
        self.launch_when_ready(id, launch, waits);
    }

    pub fn launch_restore(&mut self, id: &ProcessId, launch: Launch) -> Result<()> {
        let task = self.task(id)?;
        let Some(images) = &task.images else {
            return Err(not_found("images of task", &id.task));
        };
        let mut parts = args(&["restore", "--detach", "--no-subreaper", "--image-path"]);
        parts.push(images.path.clone().into());
        // The log goes to the bundle: the images may be read-only, and another's.
        let work = match task.options.criu_work_path.as_os_str().is_empty() {
            true => task.bundle.clone(),
            false => task.options.criu_work_path.clone(),
        };
        let pid_file = task.bundle.join("init.pid");
        for (flag, value) in [
            ("--work-path", &work),
            ("--bundle", &task.bundle),
            ("--pid-file", &pid_file),
        ] {
            parts.extend([OsString::from(flag), value.into()]);
        }
        if let Some(console) = &launch.console {
            parts.extend([OsString::from("--console-socket"), console.path().into()]);
        }
        parts.extend(task.options.no_pivot_root.then(|| "--no-pivot".into()));
        parts.push((&task.id).into());
        let stdio = launch.console.is_none().then_some(&launch.ends.0);
        let call = task
            .runtime
            .spawn(&self.config.socket, &parts, stdio, Vec::new())?;
        let job = Job::Restore {
            console: launch.console,
        };
        self.track(call, job, id, Some(launch.reply));
        Ok(())
    }

    pub fn restore_ended(
        &mut self,
        id: &ProcessId,
        console: Option<ConsoleSocket>,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let result = result
            .map_err(|text| {
                Error::new(Kind::Runtime, "OCI runtime restore failed", "").source(text)
            })
            .and_then(|()| self.restored(id, console));
        let pid = match result {
            Ok(pid) => pid,
            Err(e) => return self.restore_failed(id, reply, e),
        };
        self.publish(&Event::Start(ev::TaskStart {
            container_id: id.task.clone(),
            pid: pid as u32,
        }));
        if let Some(reply) = reply {
            self.answer(reply, encoded(&wire::StartResponse { pid: pid as u32 }));
        }
        if let Some(exit) = self.reaper.claim(pid) {
            self.pids.remove(&pid);
            self.exited(id, exit);
        }
        self.unpark(id);
    }

    fn restored(&mut self, id: &ProcessId, console: Option<ConsoleSocket>) -> Result<i32> {
        let pid = read_pid(&self.task(id)?.bundle.join("init.pid"))?;
        self.connect_io(id, console)?;
        self.record_init(id, pid)?;
        if let Some(task) = self.tasks.get_mut(&id.task) {
            task.init.state = State::Running { pid };
        }
        Ok(pid)
    }

    /// The task stays, to be deleted by whoever has created it. What the runtime may have left,
    /// or what runs although we could not take it over, goes with that.
    pub fn restore_failed(&mut self, id: &ProcessId, reply: Option<Reply>, error: Error) {
        if let Some(task) = self.tasks.get_mut(&id.task) {
            task.init.state = State::Created { pid: None };
            task.init.started_nanos = 0;
        }
        self.tell(reply, Err(error));
        self.unpark(id);
    }

    /// Delete of a task that has never run: it counts as ended with 0.
    pub fn delete_unstarted(&mut self, id: &ProcessId, reply: Reply) {
        let parts = args(&["delete", "--force", &id.task]);
        let job = Job::Delete { force: true };
        if let Err(e) = self.call(id, job, Some(reply), &parts, Vec::new()) {
            return self.answer(reply, Err(e));
        }
        if let Some(task) = self.tasks.get_mut(&id.task) {
            let exit = Exit {
                pid: 0,
                status: 0,
                at_nanos: now_nanos(),
            };
            task.init.state = State::Deleting { exit };
        }
    }
}
