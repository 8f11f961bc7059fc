//! A Debian guest with cgroup v2, systemd, AppArmor and CRIU, for what the machines that build
//! and test this project do not have. `make test-vm` runs tests in it.
//!
//! ```text
//! image   the guest's disk, built by mmdebstrap and cached
//! guest   one qemu
//! wire    requests and frames on a virtio-serial port
//! agent   the guest's end: runs commands
//! client  the host's end
//! lane    test executables in the guest, results as libtest prints them
//! ```
//!
//! # A new file of tests for the guest
//!
//! Write `integration/tests/vm_<what>.rs`, an ordinary libtest file that uses this crate
//! (`bundle::Bench` and so on), and name it in `integration/Cargo.toml`, so that it is built but
//! not run on the host:
//!
//! ```toml
//! [[test]]
//! name = "vm_<what>"
//! test = false
//! ```
//!
//! The lane finds it by its name. The test runs as root in the guest, one test at a time, with
//! `CORACLE_VM` set (begin with `need_guest!()`) and `CORACLE_BIN_DIR` to a directory with coracle, the shim, probe and fixtures; the packages
//! that the guest has are listed in `image.rs`. Programs that it finds missing are a failure, not a
//! skip: the guest is ours.
//!
//! # A guest at hand
//!
//! ```text
//! vm up work --share target:/host       # stays up; the disk is as new at every start
//! vm exec work -- systemctl status
//! vm exec work -- sh -c 'CORACLE_BIN_DIR=/host/release /host/.../vm_cgroups-<hash> --test-threads=1'
//! vm down work
//! ```
pub mod agent;
pub mod client;
pub mod guest;
pub mod image;
pub mod lane;
pub mod wire;

/// Skips a test that needs the guest when it is run anywhere else.
#[macro_export]
macro_rules! need_guest {
    () => {
        if std::env::var_os("CORACLE_VM").is_none() {
            $crate::skip!("only in the guest: make test-vm");
        }
    };
}
