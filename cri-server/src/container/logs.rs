//! Owns ReopenContainerLog: the shim writes the log, so the shim opens it again.

use super::Container;
use super::create::require;
use super::state::Request;
use crate::daemon::Daemon;
use crate::error::Result;

impl Daemon {
    /// Opens the log of a running container again. Of one that does not run it is an error, and
    /// no file appears.
    pub async fn reopen_log(&self, container: &Container) -> Result<()> {
        require(container, Request::Reach)?;
        let shim = self.shim_of(container).await?;
        shim.reopen_log(container.id()).await?;
        Ok(())
    }
}
