//! Control groups: where a container's processes are accounted, limited, frozen and killed.
//!
//! ```text
//!  spec + CgroupMode --plan (pure)--> CgroupPlan --create--> Cgroup --apply_limits--> (limits on)
//!                                         |                     |
//!                                      record()        clone_into / self_join / join
//!                                         |                     v
//!             CgroupRecord --Cgroup::open--> Cgroup: pids freeze thaw kill_all stats delete
//! ```
//!
//! `create` makes the directories and whatever joining needs (v1 cpusets); `apply_limits` writes
//! everything else and may run while the child builds its root file system, since no program of
//! the container runs before both are done. A CPU quota that is applied early would throttle our
//! own set-up.
//!
//! How a new process gets in, cheapest way first:
//! - v2, and the cgroup2 mount of a hybrid host: `clone3` with [`Cgroup::clone_into`].
//! - v1: the child itself writes `0` to each fd of [`Cgroup::self_join`], before it makes threads.
//!   Moving the calling thread alone takes no lock on the whole system since Linux 5.14
//!   (9a3284fad42f), about 10 us for each hierarchy. A write of another process's pid to
//!   `cgroup.procs` waits for an RCU grace period, 5 to 15 ms for the first one.
//! - [`Cgroup::join`] with a pid: kernels before 5.7, and processes that are not ours to instruct.
//!
//! With `--systemd-cgroup` the directories are those of a transient unit (see [`systemd`]): `create`
//! makes none, and `CgroupPlan::start_unit` follows the clone.
//!
//! This module never touches a cgroup that is not the container's own or below it, but for the
//! `cgroup.subtree_control` (v2) and the empty cpusets (v1) of its ancestors.

mod convert;
mod create;
mod devices;
mod freeze;
mod limits_v1;
mod limits_v2;
mod mounts;
mod oom;
mod path;
mod program;
mod remove;
pub mod stats;
mod stats_v1;
mod stats_v2;
mod step;
mod systemd;
mod tree;
mod update;

pub use create::CgroupPlan;
pub use mounts::{CgroupMode, Hierarchy, detect};
pub use oom::{OomWatch, Seen};
pub use path::PlanOptions;
pub use stats::Stats;
pub use systemd::driver::manager_for;
pub use systemd::{Facts, Manager, Scope};
pub use tree::Cgroup;

use coracle_oci::ContainerId;
use coracle_oci::spec::{LinuxResources, Spec};

use crate::error::Result;

/// Plans the container's cgroup: its directories and every write. Pure.
///
/// # Errors
/// The spec asks for what cannot be expressed here: the error names the field.
pub fn plan(
    spec: &Spec,
    id: &ContainerId,
    mode: &CgroupMode,
    options: PlanOptions,
) -> Result<CgroupPlan> {
    let linux = spec.linux().as_ref();
    let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let layout = path::layout(cgroups_path, id, mode)?;
    CgroupPlan::new(layout, linux, options)
}

/// Plans the container's cgroup as the one of a unit that systemd will make. Pure.
///
/// # Errors
/// As for [`plan`].
pub fn plan_unit(
    spec: &Spec,
    id: &ContainerId,
    mode: &CgroupMode,
    options: PlanOptions,
    facts: &Facts,
) -> Result<CgroupPlan> {
    let (unit, layout) = systemd::driver::layout(spec, id, mode, facts)?;
    CgroupPlan::of_unit(spec, (&unit, layout), facts, options)
}

/// Plans an update of the limits of an existing container. Devices stay as they are. Pure.
///
/// # Errors
/// As for [`plan`].
pub fn plan_update(
    record: &coracle_oci::record::CgroupRecord,
    resources: &LinuxResources,
    options: PlanOptions,
    facts: Option<&Facts>,
) -> Result<CgroupPlan> {
    CgroupPlan::update(record, resources, options, facts)
}
