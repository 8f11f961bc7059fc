//! Owns the gRPC boundary: messages in and out, one log line for each call, errors into status
//! codes. What a call does is elsewhere.

pub mod convert;
pub mod image;
pub mod present;
mod queries;
pub mod runtime;
mod serve;

use std::pin::Pin;
use std::time::Instant;

use tokio_stream::Stream;
use tonic::{Code, Response, Status};

use crate::error::{Result, to_status};

pub use serve::serve;

/// What a unary call answers with.
pub type Served<T> = std::result::Result<Response<T>, Status>;

/// A stream of batches.
pub type Batches<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

/// Entries in one message of a streamed list.
const BATCH: usize = 500;

/// RPCs that answer Unimplemented. README's table lists the same ones.
pub const UNSERVED: [&str; 7] = [
    "CheckpointContainer",
    "CheckpointPod",
    "RestorePod",
    "ListMetricDescriptors",
    "ListPodSandboxMetrics",
    "StreamPodSandboxMetrics",
    "UpdatePodSandboxResources",
];

/// Runs a call and writes its one log line.
async fn traced<T>(
    rpc: &'static str,
    subject: &str,
    call: impl Future<Output = Result<T>>,
) -> Served<T> {
    let began = Instant::now();
    let answer = call.await;
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    match answer {
        Ok(message) => {
            // Calls that the kubelet repeats every second are worth a line only to a debugger.
            if changes(rpc) {
                tracing::info!(rpc, subject, ms, "ok");
            } else {
                tracing::debug!(rpc, subject, ms, "ok");
            }
            Ok(Response::new(message))
        }
        Err(error) => {
            let status = to_status(&error);
            let code = status.code();
            match code {
                Code::NotFound | Code::Unimplemented => {
                    tracing::info!(rpc, subject, ms, ?code, %error);
                }
                _ => tracing::error!(rpc, subject, ms, ?code, %error),
            }
            Err(status)
        }
    }
}

/// Whether a call changes something.
fn changes(rpc: &str) -> bool {
    let reading = [
        "Status",
        "List",
        "Stats",
        "Version",
        "FsInfo",
        "RuntimeConfig",
        "ExecSync",
    ];
    !reading.iter().any(|part| rpc.contains(part))
}

/// A list as a stream: whole batches, then the end.
fn batches<I: Send + 'static, T: Send + 'static>(
    items: Vec<I>,
    wrap: impl Fn(Vec<I>) -> T + Send + 'static,
) -> Response<Batches<T>> {
    let mut items = items.into_iter();
    let next = move || {
        let batch: Vec<I> = items.by_ref().take(BATCH).collect();
        (!batch.is_empty()).then(|| Ok(wrap(batch)))
    };
    Response::new(Box::pin(tokio_stream::iter(std::iter::from_fn(next))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt as _;

    #[test]
    fn readme_lists_the_unserved_rpcs() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        for rpc in UNSERVED {
            assert!(
                readme.contains(rpc),
                "README.md does not list {rpc} as not served"
            );
        }
    }

    #[tokio::test]
    async fn batches_hold_every_item_once() {
        let response = batches((0..1201).collect(), |batch: Vec<i32>| batch);
        let all: Vec<_> = response.into_inner().map(|b| b.unwrap()).collect().await;
        assert_eq!(
            all.iter().map(Vec::len).collect::<Vec<_>>(),
            [500, 500, 201]
        );
        assert_eq!(all.concat(), (0..1201).collect::<Vec<_>>());
    }
}
