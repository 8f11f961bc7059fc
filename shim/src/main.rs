//! containerd-shim-coracle-v2
#![forbid(unsafe_code)]
#[allow(dead_code, clippy::all)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}
fn main() {}
