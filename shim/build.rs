//! Compiles `proto/` with protox, so that no `protoc` is needed. Messages only: the services
//! are dispatched by hand in `src/service.rs`.

use std::path::Path;

const FILES: &[&str] = &[
    "cgroups/v1/metrics.proto",
    "cgroups/v2/metrics.proto",
    "containerd/events/task.proto",
    "containerd/linux/runc/options.proto",
    "containerd/runc/v1/options.proto",
    "containerd/runtime/bootstrap/v1/bootstrap.proto",
    "containerd/runtime/sandbox/v1/sandbox.proto",
    "containerd/services/events/ttrpc/v1/events.proto",
    "containerd/task/v2/task.proto",
    "containerd/types/introspection.proto",
    "coracle/shim/v1/hands.proto",
    "coracle/shim/v1/shim.proto",
    "runtime/v1/pod.proto",
    "runtimeoptions/v1/options.proto",
    "ttrpc/ttrpc.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    println!("cargo:rerun-if-changed=proto");
    let set = protox::compile(FILES.iter().map(|f| root.join(f)), [root])?;
    prost_build::Config::new()
        .btree_map(["."])
        .include_file("messages.rs")
        .compile_fds(set)?;
    Ok(())
}
