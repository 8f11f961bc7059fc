//! `linux.resources` as writes to cgroup v1 files. Pure.
//!
//! Kernel memory limits are ignored with a warning, as runc does: the kernel has dropped them.

use coracle_oci::spec::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxNetwork, LinuxResources,
    LinuxThrottleDevice,
};

use super::convert::pids_text;
use super::step::{Step, Write};
use crate::error::{Error, Result};

/// A step and the controller whose directory it is for.
pub(super) type Placed = (&'static str, Step);

pub(super) const KERNEL_MEMORY_IGNORED: &str =
    "Kernel memory settings are ignored and will be removed";

pub(super) fn plan(resources: &LinuxResources, warnings: &mut Vec<String>) -> Result<Vec<Placed>> {
    let mut steps = Vec::new();
    if resources
        .unified()
        .as_ref()
        .is_some_and(|unified| !unified.is_empty())
    {
        return Err(Error::invalid(
            "linux.resources.unified: invalid configuration: cannot use unified on cgroup v1",
        ));
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut steps, warnings)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, &mut steps);
    }
    if let Some(pids) = resources.pids() {
        let write = Write::new(
            "linux.resources.pids.limit",
            "pids.max",
            pids_text(pids.limit()),
        );
        steps.push(("pids", Step::Write(write)));
    }
    if let Some(block_io) = resources.block_io() {
        plan_block_io(block_io, &mut steps);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let prefix = format!("hugetlb.{}", page_size(limit)?);
        let field = "linux.resources.hugepageLimits";
        let file = format!("{prefix}.limit_in_bytes");
        steps.push((
            "hugetlb",
            Step::Write(Write::new(field, file, limit.limit())),
        ));
        let reserved = format!("{prefix}.rsvd.limit_in_bytes");
        steps.push((
            "hugetlb",
            Step::IfPresent(Write::new(field, reserved, limit.limit())),
        ));
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let line = rdma_line(device, limit.hca_handles(), limit.hca_objects());
        steps.push((
            "rdma",
            Step::Write(Write::new("linux.resources.rdma", "rdma.max", line)),
        ));
    }
    if let Some(network) = resources.network() {
        plan_network(network, &mut steps);
    }
    Ok(steps)
}

/// The page size as part of a file name.
pub(super) fn page_size(limit: &LinuxHugepageLimit) -> Result<&str> {
    match limit.page_size().as_str() {
        "" => Err(Error::invalid(
            "linux.resources.hugepageLimits: pageSize is missing",
        )),
        size if size.contains('/') => Err(Error::invalid(format!(
            "linux.resources.hugepageLimits: invalid pageSize {size:?}"
        ))),
        size => Ok(size),
    }
}

pub(super) fn rdma_line(device: &str, handles: Option<u32>, objects: Option<u32>) -> String {
    let mut line = device.to_owned();
    for (name, limit) in [("hca_handle", handles), ("hca_object", objects)] {
        if let Some(limit) = limit {
            line.push_str(&format!(" {name}={limit}"));
        }
    }
    line
}

fn plan_memory(
    memory: &LinuxMemory,
    steps: &mut Vec<Placed>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    if memory.kernel_tcp().is_some() || kernel_limit(memory) {
        warnings.push(KERNEL_MEMORY_IGNORED.to_owned());
    }
    let limit = memory.limit().filter(|limit| *limit != 0).map(|limit| {
        Write::new(
            "linux.resources.memory.limit",
            "memory.limit_in_bytes",
            limit,
        )
    });
    let swap_file = "memory.memsw.limit_in_bytes";
    let swap = memory
        .swap()
        .filter(|swap| *swap != 0)
        .map(|swap| Write::new("linux.resources.memory.swap", swap_file, swap));
    match (limit, swap) {
        (Some(limit), Some(swap)) => steps.push(("memory", Step::EitherOrder(limit, swap))),
        (Some(limit), None) => {
            if limit.value == "-1" {
                // Unlimited memory under a finite memory+swap limit would be refused.
                let swap = Write::new("linux.resources.memory.limit", swap_file, -1);
                steps.push(("memory", Step::IfPresent(swap)));
            }
            steps.push(("memory", Step::Write(limit)));
        }
        (None, Some(swap)) => steps.push(("memory", Step::Write(swap))),
        (None, None) => {}
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        let field = "linux.resources.memory.reservation";
        let write = Write::new(field, "memory.soft_limit_in_bytes", reservation);
        steps.push(("memory", Step::Write(write)));
    }
    if memory.disable_oom_killer() == Some(true) {
        let field = "linux.resources.memory.disableOOMKiller";
        steps.push((
            "memory",
            Step::Write(Write::new(field, "memory.oom_control", 1)),
        ));
    }
    // All ones is -1 in callers that keep the value unsigned: leave it alone.
    if let Some(swappiness) = memory.swappiness().filter(|value| *value != u64::MAX) {
        if swappiness > 100 {
            return Err(Error::invalid(format!(
                "linux.resources.memory.swappiness: invalid memory swappiness value: \
                 {swappiness} (valid range is 0-100)"
            )));
        }
        let field = "linux.resources.memory.swappiness";
        steps.push((
            "memory",
            Step::Write(Write::new(field, "memory.swappiness", swappiness)),
        ));
    }
    Ok(())
}

pub(super) fn kernel_limit(memory: &LinuxMemory) -> bool {
    memory.kernel().is_some()
}

fn plan_cpu(cpu: &LinuxCpu, steps: &mut Vec<Placed>) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        let write = Write::new("linux.resources.cpu.shares", "cpu.shares", shares);
        steps.push(("cpu", Step::Checked(write)));
    }
    let period = cpu
        .period()
        .filter(|period| *period != 0)
        .map(|period| Write::new("linux.resources.cpu.period", "cpu.cfs_period_us", period));
    let burst = cpu
        .burst()
        .map(|burst| Write::new("linux.resources.cpu.burst", "cpu.cfs_burst_us", burst));
    let quota = cpu
        .quota()
        .filter(|quota| *quota != 0)
        .map(|quota| Write::new("linux.resources.cpu.quota", "cpu.cfs_quota_us", quota));
    pair(period.into_iter().chain(burst).collect(), quota, steps);
    if let Some(idle) = cpu.idle() {
        let write = Write::new("linux.resources.cpu.idle", "cpu.idle", idle);
        steps.push(("cpu", Step::Write(write)));
    }
    let rt_period = cpu
        .realtime_period()
        .filter(|period| *period != 0)
        .map(|period| {
            Write::new(
                "linux.resources.cpu.realtimePeriod",
                "cpu.rt_period_us",
                period,
            )
        });
    let rt_runtime = cpu
        .realtime_runtime()
        .filter(|runtime| *runtime != 0)
        .map(|runtime| {
            Write::new(
                "linux.resources.cpu.realtimeRuntime",
                "cpu.rt_runtime_us",
                runtime,
            )
        });
    pair(rt_period.into_iter().collect(), rt_runtime, steps);
}

/// A new period may be refused against the old quota or runtime.
fn pair(first: Vec<Write>, last: Option<Write>, steps: &mut Vec<Placed>) {
    match last {
        Some(last) => steps.push(("cpu", Step::Around { first, last })),
        None => steps.extend(first.into_iter().map(|write| ("cpu", Step::Write(write)))),
    }
}

/// The cpuset files: written before anything joins, since an empty cpuset takes no process.
pub(super) fn cpuset(resources: Option<&LinuxResources>) -> Vec<Write> {
    let Some(cpu) = resources.and_then(|resources| resources.cpu().as_ref()) else {
        return Vec::new();
    };
    let write = |field: &'static str, file: &'static str, value: &Option<String>| {
        let value = value.as_ref().filter(|value| !value.is_empty())?;
        Some(Write::new(field, file, value))
    };
    let cpus = write("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus());
    let mems = write("linux.resources.cpu.mems", "cpuset.mems", cpu.mems());
    cpus.into_iter().chain(mems).collect()
}

fn plan_block_io(block_io: &LinuxBlockIo, steps: &mut Vec<Placed>) {
    let mut push = |step| steps.push(("blkio", step));
    // The CFQ files went away with Linux 5.0; BFQ has its own.
    let either = |field: &'static str, name: &str, value: String| {
        Step::FirstPresent(vec![
            Write::new(field, format!("blkio.{name}"), &value),
            Write::new(field, format!("blkio.bfq.{name}"), &value),
        ])
    };
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        push(either(
            "linux.resources.blockIO.weight",
            "weight",
            weight.to_string(),
        ));
    }
    if let Some(weight) = block_io.leaf_weight().filter(|weight| *weight != 0) {
        let field = "linux.resources.blockIO.leafWeight";
        push(Step::Write(Write::new(field, "blkio.leaf_weight", weight)));
    }
    for device in block_io.weight_device().iter().flatten() {
        let number = format!("{}:{}", device.major(), device.minor());
        let field = "linux.resources.blockIO.weightDevice";
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            push(either(field, "weight_device", format!("{number} {weight}")));
        }
        if let Some(weight) = device.leaf_weight().filter(|weight| *weight != 0) {
            let line = format!("{number} {weight}");
            push(Step::Write(Write::new(
                field,
                "blkio.leaf_weight_device",
                line,
            )));
        }
    }
    for (field, file, devices) in throttles(block_io) {
        for device in devices {
            let line = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            push(Step::Write(Write::new(
                field,
                format!("blkio.throttle.{file}"),
                line,
            )));
        }
    }
}

type Throttle<'a> = (&'static str, &'static str, &'a [LinuxThrottleDevice]);

/// Field, v1 file and devices of each throttle, in the order of the runtime spec.
pub(super) fn throttles(block_io: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    fn list(devices: &Option<Vec<LinuxThrottleDevice>>) -> &[LinuxThrottleDevice] {
        devices.as_deref().unwrap_or_default()
    }
    [
        (
            "linux.resources.blockIO.throttleReadBpsDevice",
            "read_bps_device",
            list(block_io.throttle_read_bps_device()),
        ),
        (
            "linux.resources.blockIO.throttleWriteBpsDevice",
            "write_bps_device",
            list(block_io.throttle_write_bps_device()),
        ),
        (
            "linux.resources.blockIO.throttleReadIOPSDevice",
            "read_iops_device",
            list(block_io.throttle_read_iops_device()),
        ),
        (
            "linux.resources.blockIO.throttleWriteIOPSDevice",
            "write_iops_device",
            list(block_io.throttle_write_iops_device()),
        ),
    ]
}

fn plan_network(network: &LinuxNetwork, steps: &mut Vec<Placed>) {
    if let Some(class) = network.class_id().filter(|class| *class != 0) {
        let field = "linux.resources.network.classID";
        steps.push((
            "net_cls",
            Step::Write(Write::new(field, "net_cls.classid", class)),
        ));
    }
    for priority in network.priorities().iter().flatten() {
        let line = format!("{} {}", priority.name(), priority.priority());
        let field = "linux.resources.network.priorities";
        steps.push((
            "net_prio",
            Step::Write(Write::new(field, "net_prio.ifpriomap", line)),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `controller file=value` of every write, in order.
    fn writes(json: &str) -> Vec<String> {
        let resources = coracle_oci::config::parse_resources(json.as_bytes()).unwrap();
        let mut out = Vec::new();
        for (controller, step) in plan(&resources, &mut Vec::new()).unwrap() {
            let mut line = |mark: &str, write: &Write| {
                out.push(format!("{controller} {mark}{}={}", write.file, write.value));
            };
            match &step {
                Step::Write(write) | Step::Checked(write) => line("", write),
                Step::IfPresent(write) => line("?", write),
                Step::FirstPresent(writes) => writes.iter().for_each(|write| line("|", write)),
                Step::EitherOrder(one, other) => {
                    [one, other].into_iter().for_each(|write| line("~", write))
                }
                Step::Around { first, last } => {
                    first.iter().for_each(|write| line("<", write));
                    line(">", last);
                }
                Step::Lines(_) | Step::MemoryUnder { .. } => panic!("not a v1 step"),
            }
        }
        out
    }

    #[test]
    fn v1_table() {
        let cases: &[(&str, &[&str])] = &[
            ("{}", &[]),
            (
                r#"{"memory":{"limit":100,"swap":200,"reservation":50,"swappiness":60,"disableOOMKiller":true}}"#,
                &[
                    "memory ~memory.limit_in_bytes=100",
                    "memory ~memory.memsw.limit_in_bytes=200",
                    "memory memory.soft_limit_in_bytes=50",
                    "memory memory.oom_control=1",
                    "memory memory.swappiness=60",
                ],
            ),
            (
                r#"{"memory":{"limit":-1}}"#,
                &[
                    "memory ?memory.memsw.limit_in_bytes=-1",
                    "memory memory.limit_in_bytes=-1",
                ],
            ),
            (
                r#"{"memory":{"limit":0,"swap":0,"swappiness":18446744073709551615}}"#,
                &[],
            ),
            (
                r#"{"cpu":{"shares":10,"quota":5000,"period":10000,"burst":0,"idle":1}}"#,
                &[
                    "cpu cpu.shares=10",
                    "cpu <cpu.cfs_period_us=10000",
                    "cpu <cpu.cfs_burst_us=0",
                    "cpu >cpu.cfs_quota_us=5000",
                    "cpu cpu.idle=1",
                ],
            ),
            (
                r#"{"cpu":{"period":10000,"realtimeRuntime":5,"realtimePeriod":6}}"#,
                &[
                    "cpu cpu.cfs_period_us=10000",
                    "cpu <cpu.rt_period_us=6",
                    "cpu >cpu.rt_runtime_us=5",
                ],
            ),
            (r#"{"pids":{"limit":-1}}"#, &["pids pids.max=max"]),
            (
                r#"{"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":7}]}}"#,
                &[
                    "blkio |blkio.weight=500",
                    "blkio |blkio.bfq.weight=500",
                    "blkio blkio.throttle.read_bps_device=8:0 7",
                ],
            ),
            (
                r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9}],"rdma":{"mlx":{"hcaHandles":3}}}"#,
                &[
                    "hugetlb hugetlb.2MB.limit_in_bytes=9",
                    "hugetlb ?hugetlb.2MB.rsvd.limit_in_bytes=9",
                    "rdma rdma.max=mlx hca_handle=3",
                ],
            ),
            (
                r#"{"network":{"classID":5,"priorities":[{"name":"eth0","priority":2}]}}"#,
                &[
                    "net_cls net_cls.classid=5",
                    "net_prio net_prio.ifpriomap=eth0 2",
                ],
            ),
        ];
        for (json, want) in cases {
            assert_eq!(writes(json), *want, "{json}");
        }
    }

    #[test]
    fn refusals_name_the_field() {
        for (json, field) in [
            (
                r#"{"unified":{"memory.max":"1"}}"#,
                "linux.resources.unified",
            ),
            (
                r#"{"memory":{"swappiness":101}}"#,
                "linux.resources.memory.swappiness",
            ),
        ] {
            let resources = coracle_oci::config::parse_resources(json.as_bytes()).unwrap();
            let error = plan(&resources, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }

    #[test]
    fn kernel_memory_is_a_warning() {
        let resources =
            coracle_oci::config::parse_resources(br#"{"memory":{"kernelTCP":5}}"#).unwrap();
        let mut warnings = Vec::new();
        assert!(plan(&resources, &mut warnings).unwrap().is_empty());
        assert_eq!(warnings, [KERNEL_MEMORY_IGNORED]);
    }
}
