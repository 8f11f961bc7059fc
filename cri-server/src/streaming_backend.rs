//! Owns the answer to the streaming server's three questions: run this, attach to that, where is
//! this pod's network.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::daemon::Daemon;
use crate::error::Error;
use crate::sandbox::state::{Decision, Request, decide};
use crate::streaming::{
    AttachSession, Backend, ExecSession, SessionError, SessionIo, TerminalSize,
};

/// The daemon, as the streaming server sees it.
#[derive(Clone)]
pub struct DaemonBackend(pub Arc<Daemon>);

fn told(error: Error) -> SessionError {
    SessionError::new(error.to_string())
}

impl Backend for DaemonBackend {
    async fn exec(
        &self,
        session: ExecSession,
        io: SessionIo,
        resize: mpsc::Receiver<TerminalSize>,
    ) -> Result<i32, SessionError> {
        self.0.exec_session(session, io, resize).await.map_err(told)
    }

    async fn attach(
        &self,
        session: AttachSession,
        io: SessionIo,
        resize: mpsc::Receiver<TerminalSize>,
    ) -> Result<(), SessionError> {
        self.0
            .attach_session(session, io, resize)
            .await
            .map_err(told)
    }

    fn port_forward_netns(&self, sandbox_id: &str) -> Result<Option<PathBuf>, SessionError> {
        let sandbox = self.0.registry.sandboxes.find(sandbox_id).map_err(told)?;
        match decide(sandbox.state(), Request::PortForward) {
            Decision::Proceed => Ok(sandbox.fixed.netns.clone()),
            _ => Err(SessionError::new(format!(
                "sandbox {sandbox_id} is not ready"
            ))),
        }
    }
}
