//! Pulls one image into a store and prints where the time went, as one JSON line.
//!
//! `pull <root> <reference> [hosts directory]`

use std::process::ExitCode;

use coracle_image_store::{ImageStore, PullRequest, StoreConfig};

#[tokio::main(flavor = "multi_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, reference, hosts @ ..] = arguments.as_slice() else {
        eprintln!("usage: pull <root> <reference> [hosts directory]");
        return ExitCode::from(2);
    };
    let mut config = StoreConfig::new(root);
    config.registry_config_dirs = hosts.iter().map(Into::into).collect();
    let pulled = match ImageStore::open(config) {
        Ok(store) => {
            let request = PullRequest {
                reference: reference.clone(),
                auth: None,
            };
            store.pull_timed(request).await
        }
        Err(error) => Err(error),
    };
    match pulled {
        Ok((image, times)) => {
            let line = serde_json::json!({
                "image": image.id.to_string(),
                "layers": image.layers.len(),
                "fetched": times.fetched,
                "bytes": times.bytes,
                "total_s": times.total.as_secs_f64(),
                "resolve_s": times.resolve.as_secs_f64(),
                "layers_s": times.layers.as_secs_f64(),
                "commit_s": times.commit.as_secs_f64(),
                "network_sum_s": times.network.as_secs_f64(),
                "inflate_sum_s": times.inflate.as_secs_f64(),
                "extract_sum_s": times.extract.as_secs_f64(),
            });
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
