//! Compiles the CRI into a gRPC client for the benchmark: one client drives us and the peer.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = "../cri-server/proto";
    println!("cargo:rerun-if-changed={protos}");
    let files = protox::compile(["runtime/v1/api.proto"], [protos])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)?;
    Ok(())
}
