//! The systemd cgroup driver: the container's cgroup is that of a transient scope, which systemd
//! makes, keeps its limits, and takes away.
//!
//! ```text
//! connect --> facts --plan (pure)--> UnitPlan --clone3--> start(pid) --> the files of the limits
//!                                                                 exec, update, kill: the cgroup
//!                                        delete: StopUnit, then whatever directories are left
//! ```
//!
//! A scope cannot be without a process, so the container's init is cloned first and waits, outside
//! its cgroup namespace and before its program, until systemd has moved it. All limits that have a
//! property go with the one call that makes the unit: a refused one leaves nothing.
//!
//! | file | is |
//! |---|---|
//! | `wire`, `connection`, `address` | D-Bus: bytes, one blocking socket, where to connect |
//! | `manager` | the calls of org.freedesktop.systemd1.Manager |
//! | `unit`, `properties`, `annotations`, `gvariant` | spec -> unit, pure |
//! | `driver` | what [`Cgroup`](super::Cgroup) does with them |

mod address;
mod annotations;
mod connection;
pub(super) mod driver;
mod gvariant;
mod manager;
mod owner;
mod properties;
mod unit;
mod wire;

pub use address::Scope;
pub(super) use manager::Property;
pub use manager::{Facts, Manager};
pub(super) use unit::Unit;
