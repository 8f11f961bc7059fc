//! Owns StopContainer: the stop signal, the grace period, then SIGKILL for everything in the
//! container. Stops of one container may run at the same time; the most impatient wins.

use std::time::Duration;

use super::Container;
use super::state::{Decision, Request, decide};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::shim_client::ShimError;

/// How long the kernel may take to end a killed container.
const AFTER_KILL: Duration = Duration::from_secs(20);

impl Daemon {
    /// Stops a container; one that does not run is stopped already.
    pub async fn stop_container(&self, container: &Container, grace: Duration) -> Result<()> {
        {
            // A start that is under way comes first, so that there is something to stop.
            let _step = container.step.lock().await;
            if decide(&container.state(), Request::Stop) == Decision::AlreadyDone {
                return Ok(());
            }
        }
        let signal = container.fixed.stop_signal;
        if !grace.is_zero() {
            self.signal(container, signal, false).await?;
            if tokio::time::timeout(grace, container.ended()).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(container, libc::SIGKILL, true).await?;
        if tokio::time::timeout(AFTER_KILL, container.ended())
            .await
            .is_ok()
        {
            return Ok(());
        }
        let stuck = self.host.cgroups.processes(&container.fixed.cgroups_path);
        let text = format!("still alive after SIGKILL: pids {stuck:?}");
        let subject = format!("stop container {}", container.id());
        Err(Error::new(Kind::DeadlineExceeded, subject, text))
    }

    async fn signal(&self, container: &Container, signal: i32, all: bool) -> Result<()> {
        let sandbox = self
            .registry
            .sandboxes
            .find(container.fixed.sandbox_id.as_str())?;
        let Some(shim) = self.running_shim(&sandbox).await else {
            // The watcher sees the dead shim too, kills what is left and records the end.
            return Ok(());
        };
        let number = u32::try_from(signal).unwrap_or(9);
        match shim.kill(container.id(), "", number, all).await {
            Ok(()) => Ok(()),
            // It ended by itself in the meantime, or its shim is going.
            Err(e) if e.is_not_found() || shim.is_gone() => Ok(()),
            Err(e) if signal == libc::SIGKILL => {
                // A hung or failing shim must not keep a container alive.
                tracing::warn!(container = container.id(), error = %e, "killing by cgroup");
                self.host.cgroups.kill(&container.fixed.cgroups_path);
                if matches!(e, ShimError::Timeout { .. }) {
                    self.kill_shim(&sandbox);
                }
                Ok(())
            }
            // The grace period is over with it; the kill that follows deals with a hung shim.
            Err(ShimError::Timeout { .. }) => Ok(()),
            Err(e) => {
                let error: Error = e.into();
                Err(error.within(format!("signal {signal} to container"), container.id()))
            }
        }
    }
}
