//! Generated message types. Nothing is written by hand here but the module tree.

/// CRI `runtime.v1`: what crictl and the kubelet speak.
#[allow(clippy::all, clippy::unwrap_used, missing_docs)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// containerd's task service and the shim's private service: what we speak to shims.
#[allow(clippy::all, clippy::unwrap_used, missing_docs)]
pub mod shim {
    include!(concat!(env!("OUT_DIR"), "/shim/mod.rs"));
}
