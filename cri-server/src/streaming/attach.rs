//! One attach session: a container's own streams, for as long as client and container last.

use std::pin::pin;

use tokio::sync::watch;

use super::exec::{close, report};
use super::session::{self, Wanted};
use super::spdy::connection::Connection;
use super::status::{Outcome, Protocol};
use super::{AttachSession, Backend, StreamingConfig};

pub(super) async fn serve<B: Backend>(
    backend: B,
    request: AttachSession,
    protocol: Protocol,
    mut connection: Connection,
    config: &StreamingConfig,
) {
    let wanted = Wanted {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        resize: request.tty && protocol >= Protocol::V3,
    };
    let id = request.container_id.clone();
    let gathered = session::gather(&mut connection, wanted, config.stream_creation_timeout).await;
    let plumbed = match gathered {
        Ok(streams) => session::plumb(streams),
        Err(error) => {
            tracing::debug!(container = id, %error, "attach session not begun");
            return close(connection).await;
        }
    };
    let (io, resize, pumps, error) = match plumbed {
        Ok(plumbed) => plumbed,
        Err(error) => {
            tracing::warn!(container = id, %error, "attach session has no pipes");
            return close(connection).await;
        }
    };
    let (exit, exited) = watch::channel(false);
    let mut ended = pin!(connection.ended(config.idle_timeout));
    let mut pumping = Box::pin(pumps.run(exited));
    let result = {
        // In a scope of its own: it is dropped, and so detached, before the streams close.
        let mut attached = pin!(backend.attach(request, io, resize));
        tokio::select! {
            result = &mut attached => result,
            // Not before `exit`.
            () = &mut pumping => attached.await,
            () = &mut ended => return,
        }
    };
    exit.send_replace(true);
    tokio::select! {
        () = &mut pumping => {}
        () = &mut ended => return,
    }
    drop(pumping);
    let outcome = match result {
        Ok(()) => Outcome::Success,
        Err(error) => Outcome::Failure(format!("error attaching to container: {error}")),
    };
    report(error, protocol, &outcome).await;
    close(connection).await;
}
