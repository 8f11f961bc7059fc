//! Owns StartContainer: the task is made and started in the pod's shim, and its end is watched
//! from then on. A start that fails leaves the container exited with reason StartError.

use std::sync::Arc;

use super::config::ContainerConfig;
use super::create::require_ready;
use super::state::{ContainerState, Decision, Exit, Request, decide};
use super::{Container, Fixed};
use crate::daemon::{Daemon, now_ns};
use crate::error::{Error, Result};
use crate::events::EventKind;
use crate::sandbox::Sandbox;
use crate::shim_client::{NewTask, RootfsMount, ShimClient};

impl Daemon {
    /// Starts a created container.
    pub async fn start_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let sandbox = self
            .registry
            .sandboxes
            .find(container.fixed.sandbox_id.as_str())?;
        let _in_sandbox = sandbox.step.read().await;
        let _step = container.step.lock().await;
        if let Decision::Deny(why) = decide(&container.state(), Request::Start) {
            return Err(Error::state(format!("container {}", container.id()), why));
        }
        require_ready(&sandbox)?;
        container.change(&self.records, |live| live.state = ContainerState::Starting)?;
        match self.run_task(&sandbox, container).await {
            Ok((shim, pid, started_at_ns)) => {
                container.change(&self.records, |live| {
                    live.state = ContainerState::Running { pid, started_at_ns };
                })?;
                self.events
                    .publish(EventKind::Started, container.id(), sandbox.id());
                self.watch(sandbox.clone(), container.clone(), shim);
                Ok(())
            }
            Err(error) => {
                let error = error.within("start container", container.id());
                let exit = Exit::start_error(error.to_string(), now_ns());
                self.settle(container, exit)?;
                Err(error)
            }
        }
    }

    /// The shim, the process, and when it was told to go: a process that ends at once may have
    /// ended before the answer is here, and must not seem to have started after that.
    async fn run_task(
        &self,
        sandbox: &Sandbox,
        container: &Container,
    ) -> Result<(ShimClient, u32, i64)> {
        let shim = self.shim(sandbox).await?;
        let task = self.new_task(sandbox, &container.fixed)?;
        let id = container.id();
        let started = async {
            shim.create(&task).await?;
            let at_ns = now_ns();
            shim.start(id, "").await.map(|pid| (pid, at_ns))
        };
        match started.await {
            Ok((pid, at_ns)) => Ok((shim, pid, at_ns)),
            Err(error) => {
                self.abandon_task(sandbox, &shim, &container.fixed).await;
                Err(error.into())
            }
        }
    }

    /// Takes back a task that may be half made.
    pub async fn abandon_task(&self, sandbox: &Sandbox, shim: &ShimClient, fixed: &Fixed) {
        let id = fixed.id.as_str();
        let _ = shim.kill(id, "", 9, true).await;
        if shim.delete(id, "").await.is_err()
            && let Err(error) = self.clear_leftovers(sandbox, fixed).await
        {
            tracing::warn!(container = id, %error, "a failed start left something behind");
        }
    }

    fn new_task(&self, sandbox: &Sandbox, fixed: &Fixed) -> Result<NewTask> {
        let handler = self.handler(&sandbox.fixed.handler)?;
        let snapshot = self.images.snapshot(fixed.id.as_str()).ok_or_else(|| {
            Error::state(
                format!("container {}", fixed.id),
                "its root file system is gone",
            )
        })?;
        let log = match &fixed.log_path {
            Some(path) => format!("cri-log://{}", path.display()),
            // Nobody wants the log; attachments still work.
            None => "cri-log:///dev/null".to_owned(),
        };
        Ok(NewTask {
            id: fixed.id.to_string(),
            bundle: fixed.bundle.clone(),
            rootfs: vec![RootfsMount {
                kind: "overlay".to_owned(),
                source: "overlay".to_owned(),
                options: snapshot.overlay_options(),
            }],
            terminal: fixed.config.tty,
            stdin: stdin(&fixed.config).to_owned(),
            // With a terminal there is one stream.
            stderr: match fixed.config.tty {
                true => String::new(),
                false => log.clone(),
            },
            stdout: log,
            runtime: handler.runtime.clone(),
            runtime_root: handler.runtime_root.clone(),
        })
    }
}

fn stdin(config: &ContainerConfig) -> &'static str {
    match (config.stdin, config.stdin_once) {
        (false, _) => "",
        (true, false) => "attach:",
        (true, true) => "attach:once",
    }
}
