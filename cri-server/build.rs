//! Turns the .proto files into Rust: the CRI for the gRPC server, the containerd task service
//! and the shim's own service for the ttrpc client (messages only).

use std::path::{Path, PathBuf};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let here = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    cri(&here.join("proto"))?;
    shim(&here.join("../shim/proto"))
}

fn cri(root: &Path) -> Result<(), Failure> {
    println!("cargo:rerun-if-changed={}", root.display());
    let files = protox::compile(["runtime/v1/api.proto"], [root])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_transport(false)
        .btree_map(".")
        .compile_fds(files)?;
    Ok(())
}

fn shim(root: &Path) -> Result<(), Failure> {
    println!("cargo:rerun-if-changed={}", root.display());
    let mut protos = Vec::new();
    collect(root, root, &mut protos)?;
    protos.sort();
    let files = protox::compile(&protos, [root])?;
    // Of its own: both sides have a package runtime.v1, and files are named after packages.
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("shim");
    std::fs::create_dir_all(&out)?;
    prost_build::Config::new()
        .out_dir(&out)
        .include_file("mod.rs")
        .compile_fds(files)?;
    Ok(())
}

/// Paths of all .proto files below `dir`, relative to `root`.
fn collect(root: &Path, dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, found)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            found.push(path.strip_prefix(root)?.to_path_buf());
        }
    }
    Ok(())
}
