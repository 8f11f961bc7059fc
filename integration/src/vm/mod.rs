//! A Debian guest with cgroup v2, systemd, AppArmor and CRIU, for what the machines that build
//! and test this project do not have.
//!
//! ```text
//! image   the guest's disk, built by mmdebstrap and cached
//! guest   one qemu
//! wire    requests and frames on a virtio-serial port
//! agent   the guest's end: runs commands
//! client  the host's end
//! ```
pub mod agent;
pub mod client;
pub mod guest;
pub mod image;
pub mod wire;
