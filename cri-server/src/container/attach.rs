//! Owns Attach: the shim copies the streams of the container's first process to and from the
//! session's pipes.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::create::require;
use super::state::Request;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::shim_client::AttachIo;
use crate::streaming::{AttachSession, SessionIo, TerminalSize};

impl Daemon {
    /// Attaches a streaming session until the container ends.
    pub async fn attach_session(
        self: &Arc<Self>,
        session: AttachSession,
        io: SessionIo,
        mut resize: mpsc::Receiver<TerminalSize>,
    ) -> Result<()> {
        let container = self.registry.containers.find(&session.container_id)?;
        require(&container, Request::Reach)?;
        let shim = self.shim_of(&container).await?;
        let io = AttachIo {
            // Input for a container that takes none would wait in the pipe for ever.
            stdin: io.stdin.filter(|_| container.fixed.config.stdin),
            stdout: io.stdout,
            stderr: io.stderr,
        };
        shim.attach(container.id(), io)
            .await
            .map_err(|e| Error::from(e).within("attach to container", container.id()))?;
        loop {
            tokio::select! {
                () = container.ended() => return Ok(()),
                Some(size) = resize.recv() => {
                    let (width, height) = (u32::from(size.width), u32::from(size.height));
                    let _ = shim.resize(container.id(), "", width, height).await;
                }
            }
        }
    }
}
