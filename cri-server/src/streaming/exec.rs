//! One exec session, from its streams to its exit code.

use std::pin::pin;

use bytes::Bytes;
use tokio::sync::watch;

use super::session::{self, Wanted};
use super::spdy::connection::{Connection, Outgoing};
use super::status::{Outcome, Protocol};
use super::{Backend, ExecSession, StreamingConfig};

pub(super) async fn serve<B: Backend>(
    backend: B,
    request: ExecSession,
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
            tracing::debug!(container = id, %error, "exec session not begun");
            return close(connection).await;
        }
    };
    let (io, resize, pumps, error) = match plumbed {
        Ok(plumbed) => plumbed,
        Err(error) => {
            tracing::warn!(container = id, %error, "exec session has no pipes");
            return close(connection).await;
        }
    };
    let (exit, exited) = watch::channel(false);
    let mut running = pin!(backend.exec(request, io, resize));
    let mut ended = pin!(connection.ended(config.idle_timeout));
    let mut pumping = Box::pin(pumps.run(exited));
    let result = tokio::select! {
        result = &mut running => result,
        // Not before `exit`.
        () = &mut pumping => running.await,
        () = &mut ended => {
            // The process finds its stdin at an end and its outputs closed, and is waited for.
            drop((pumping, error, connection));
            let result = running.await;
            tracing::debug!(container = id, ?result, "exec outlived its client");
            return;
        }
    };
    exit.send_replace(true);
    tokio::select! {
        () = &mut pumping => {}
        () = &mut ended => return,
    }
    drop(pumping);
    let outcome = match result {
        Ok(0) => Outcome::Success,
        Ok(code) => Outcome::Exit(code),
        Err(error) => Outcome::Failure(format!("error executing command in container: {error}")),
    };
    report(error, protocol, &outcome).await;
    close(connection).await;
}

pub(super) async fn report(mut error: Outgoing, protocol: Protocol, outcome: &Outcome) {
    // A client that has gone does not read it.
    let _ = error.send(Bytes::from(protocol.text(outcome))).await;
    error.finish().await;
}

pub(super) async fn close(connection: Connection) {
    if let Err(error) = connection.finish().await {
        tracing::debug!(%error, "streaming connection ended");
    }
}
