//! Owns the connections of gRPC clients: HTTP/2 on the unix socket, both services, an end that
//! lets calls finish.
//!
//! tonic's own server is not used because it answers a call whose `grpc-timeout` has passed with
//! CANCELLED (tonic 0.14, `Status::from_error`) where clients expect DEADLINE_EXCEEDED. Here the
//! header is the client's business: it gives up by itself, and work goes on in its own job.

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixStream;
use tonic::service::Routes;

use super::image::Images;
use super::runtime::Runtime;
use crate::daemon::Daemon;
use crate::error::Result;
use crate::listen::Listening;
use crate::proto::cri::image_service_server::ImageServiceServer;
use crate::proto::cri::runtime_service_server::RuntimeServiceServer;

/// The CRI's clients send and accept 16 MiB.
const MAX_MESSAGE: usize = 16 << 20;

/// For calls under way when the daemon is told to stop.
const PATIENCE: Duration = Duration::from_secs(5);

/// A kubelet has some hundred calls under way at most.
const MAX_STREAMS: u32 = 4096;

/// Serves both services until `stop` is done; calls under way then get some time to finish.
pub async fn serve(
    daemon: Arc<Daemon>,
    listening: Listening,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let runtime = RuntimeServiceServer::new(Runtime(daemon.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let images = ImageServiceServer::new(Images(daemon.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let routes = Routes::new(runtime).add_service(images).prepare();
    let connections = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            accepted = listening.listener.accept() => match accepted {
                Ok((stream, _)) => connect(stream, routes.clone(), &connections),
                Err(error) => {
                    // EMFILE, most likely: one client fails, the others go on.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = &mut stop => break,
        }
    }
    daemon.stopping.send_replace(true);
    let _ = tokio::time::timeout(PATIENCE, connections.shutdown()).await;
    drop(listening);
    Ok(())
}

fn connect(stream: UnixStream, routes: Routes, connections: &GracefulShutdown) {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    let service = TowerToHyperService::new(routes);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let connection = connections.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            // A client that went without a word; its calls were cancelled or are in their jobs.
            tracing::trace!(%error, "connection ended");
        }
    });
}
