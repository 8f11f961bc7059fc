//! `linux.resources` as writes to cgroup v2 files. Pure.
//!
//! config.json speaks v1; `convert` holds the arithmetic. What v2 has no file for is refused with
//! the field's name, since a limit that is not there would look like one that is.

use coracle_oci::spec::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::convert::{blkio_to_io_weight, limit_text, pids_text, shares_to_weight, swap_alone};
use super::limits_v1::{KERNEL_MEMORY_IGNORED, kernel_limit, page_size, rdma_line, throttles};
use super::step::{Step, Write};
use crate::error::{Error, Kind, Result};

/// The kernel's default, which must be spelled out when only the quota is given.
const DEFAULT_PERIOD: u64 = 100_000;

pub(super) fn plan(resources: &LinuxResources, warnings: &mut Vec<String>) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    if let Some(pids) = resources.pids() {
        let write = Write::new(
            "linux.resources.pids.limit",
            "pids.max",
            pids_text(pids.limit()),
        );
        steps.push(Step::Write(write));
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut steps, warnings)?;
    }
    if let Some(block_io) = resources.block_io() {
        plan_io(block_io, &mut steps)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, &mut steps)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let field = "linux.resources.hugepageLimits";
        let prefix = format!("hugetlb.{}", page_size(limit)?);
        steps.push(Step::Write(Write::new(
            field,
            format!("{prefix}.max"),
            limit.limit(),
        )));
        let reserved = format!("{prefix}.rsvd.max");
        steps.push(Step::IfPresent(Write::new(field, reserved, limit.limit())));
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let line = rdma_line(device, limit.hca_handles(), limit.hca_objects());
        steps.push(Step::Write(Write::new(
            "linux.resources.rdma",
            "rdma.max",
            line,
        )));
    }
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|class| class != 0) {
            return Err(no_such_file("linux.resources.network.classID"));
        }
        if network
            .priorities()
            .as_ref()
            .is_some_and(|priorities| !priorities.is_empty())
        {
            return Err(no_such_file("linux.resources.network.priorities"));
        }
    }
    plan_unified(resources, &mut steps)?;
    Ok(steps)
}

fn no_such_file(field: &'static str) -> Error {
    Error::unsupported(format!("{field}: cgroup v2 has no such limit"))
}

fn plan_memory(
    memory: &LinuxMemory,
    steps: &mut Vec<Step>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    if memory.kernel_tcp().is_some() || kernel_limit(memory) {
        warnings.push(KERNEL_MEMORY_IGNORED.to_owned());
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(no_such_file("linux.resources.memory.disableOOMKiller"));
    }
    if memory.swappiness().is_some_and(|value| value != u64::MAX) {
        return Err(no_such_file("linux.resources.memory.swappiness"));
    }
    let limit = memory.limit().unwrap_or_default();
    let memory_and_swap = memory.swap().unwrap_or_default();
    if memory.check_before_update() == Some(true) && (limit > 0 || memory_and_swap > 0) {
        steps.push(Step::MemoryUnder {
            limit,
            swap: memory_and_swap,
        });
    }
    if let Some(swap) = swap_alone(memory_and_swap, limit)? {
        let write = Write::new(
            "linux.resources.memory.swap",
            "memory.swap.max",
            limit_text(swap),
        );
        // A kernel without swap accounting has no swap to limit: unlimited and none are true.
        steps.push(if swap <= 0 {
            Step::IfPresent(write)
        } else {
            Step::Write(write)
        });
    }
    if limit != 0 {
        let field = "linux.resources.memory.limit";
        steps.push(Step::Write(Write::new(
            field,
            "memory.max",
            limit_text(limit),
        )));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        let field = "linux.resources.memory.reservation";
        steps.push(Step::Write(Write::new(
            field,
            "memory.low",
            limit_text(reservation),
        )));
    }
    Ok(())
}

fn plan_cpu(cpu: &LinuxCpu, steps: &mut Vec<Step>) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
        return Err(no_such_file("linux.resources.cpu.realtimeRuntime"));
    }
    if cpu.realtime_period().is_some_and(|period| period != 0) {
        return Err(no_such_file("linux.resources.cpu.realtimePeriod"));
    }
    // Before the weight, which an idle cgroup refuses.
    if let Some(idle) = cpu.idle() {
        steps.push(Step::Write(Write::new(
            "linux.resources.cpu.idle",
            "cpu.idle",
            idle,
        )));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        let weight = shares_to_weight(shares);
        steps.push(Step::Write(Write::new(
            "linux.resources.cpu.shares",
            "cpu.weight",
            weight,
        )));
    }
    let burst = cpu
        .burst()
        .map(|burst| Write::new("linux.resources.cpu.burst", "cpu.max.burst", burst));
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota_text = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        let field = if quota.is_some() {
            "linux.resources.cpu.quota"
        } else {
            "linux.resources.cpu.period"
        };
        let value = format!("{quota_text} {}", period.unwrap_or(DEFAULT_PERIOD));
        let last = Write::new(field, "cpu.max", value);
        steps.push(Step::Around {
            first: burst.into_iter().collect(),
            last,
        });
    } else {
        steps.extend(burst.map(Step::Write));
    }
    for (field, file, list) in [
        ("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("linux.resources.cpu.mems", "cpuset.mems", cpu.mems()),
    ] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            steps.push(Step::Write(Write::new(field, file, list)));
        }
    }
    Ok(())
}

fn plan_io(block_io: &LinuxBlockIo, steps: &mut Vec<Step>) -> Result<()> {
    // BFQ, where it is the scheduler, has its own file in v1 units.
    let either = |field: &'static str, device: &str, weight: u16| {
        Step::FirstPresent(vec![
            Write::new(field, "io.bfq.weight", format!("{device}{weight}")),
            Write::new(
                field,
                "io.weight",
                format!("{device}{}", blkio_to_io_weight(weight)),
            ),
        ])
    };
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        steps.push(either("linux.resources.blockIO.weight", "", weight));
    }
    if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(no_such_file("linux.resources.blockIO.leafWeight"));
    }
    for device in block_io.weight_device().iter().flatten() {
        let field = "linux.resources.blockIO.weightDevice";
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(no_such_file(
                "linux.resources.blockIO.weightDevice.leafWeight",
            ));
        }
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let number = format!("{}:{} ", device.major(), device.minor());
            steps.push(either(field, &number, weight));
        }
    }
    for ((field, _, devices), name) in throttles(block_io)
        .into_iter()
        .zip(["rbps", "wbps", "riops", "wiops"])
    {
        for device in devices {
            // v1 takes a rate of 0 for no limit; io.max refuses 0.
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let line = format!("{}:{} {name}={rate}", device.major(), device.minor());
            steps.push(Step::Write(Write::new(field, "io.max", line)));
        }
    }
    Ok(())
}

/// Verbatim files. Last, so that they win over the converted values, and in the order of names,
/// so that a plan is the same each time.
fn plan_unified(resources: &LinuxResources, steps: &mut Vec<Step>) -> Result<()> {
    let mut files: Vec<_> = resources.unified().iter().flatten().collect();
    files.sort();
    for (file, value) in files {
        let refuse = |text: &str| {
            Err(Error::new(
                Kind::Invalid,
                format!("linux.resources.unified: {text}:"),
                file,
            ))
        };
        if file.contains('/') {
            return refuse("unified resource must be a file name (no slashes)");
        }
        if !file.contains('.') {
            return refuse("unified resource must be in the form CONTROLLER.PARAMETER");
        }
        let field = format!("linux.resources.unified.{file}");
        steps.push(Step::Lines(Write::new(field, file.clone(), value)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(json: &str) -> Vec<String> {
        let resources = coracle_oci::config::parse_resources(json.as_bytes()).unwrap();
        let mut out = Vec::new();
        for step in plan(&resources, &mut Vec::new()).unwrap() {
            let mut line = |mark: &str, write: &Write| {
                out.push(format!("{mark}{}={}", write.file, write.value));
            };
            match &step {
                Step::Write(write) => line("", write),
                Step::Lines(write) => line("+", write),
                Step::IfPresent(write) => line("?", write),
                Step::FirstPresent(writes) => writes.iter().for_each(|write| line("|", write)),
                Step::Around { first, last } => {
                    first.iter().for_each(|write| line("<", write));
                    line(">", last);
                }
                Step::MemoryUnder { limit, swap } => out.push(format!("under {limit} {swap}")),
                Step::EitherOrder(..) | Step::Checked(_) => panic!("not a v2 step"),
            }
        }
        out
    }

    #[test]
    fn v2_table() {
        let cases: &[(&str, &[&str])] = &[
            ("{}", &[]),
            (
                r#"{"memory":{"limit":100,"swap":300,"reservation":50,"checkBeforeUpdate":true}}"#,
                &[
                    "under 100 300",
                    "memory.swap.max=200",
                    "memory.max=100",
                    "memory.low=50",
                ],
            ),
            (
                r#"{"memory":{"limit":100,"swap":100}}"#,
                &["?memory.swap.max=0", "memory.max=100"],
            ),
            (
                r#"{"memory":{"limit":-1}}"#,
                &["?memory.swap.max=max", "memory.max=max"],
            ),
            (r#"{"memory":{"limit":100}}"#, &["memory.max=100"]),
            (
                r#"{"cpu":{"shares":1024,"quota":5000,"period":10000,"burst":1,"cpus":"0","mems":"0"}}"#,
                &[
                    "cpu.weight=100",
                    "<cpu.max.burst=1",
                    ">cpu.max=5000 10000",
                    "cpuset.cpus=0",
                    "cpuset.mems=0",
                ],
            ),
            (r#"{"cpu":{"quota":-1}}"#, &[">cpu.max=max 100000"]),
            (r#"{"cpu":{"period":1000}}"#, &[">cpu.max=max 1000"]),
            (
                r#"{"cpu":{"idle":1,"burst":3}}"#,
                &["cpu.idle=1", "cpu.max.burst=3"],
            ),
            (r#"{"pids":{"limit":0}}"#, &["pids.max=1"]),
            (
                r#"{"blockIO":{"weight":1000,"weightDevice":[{"major":8,"minor":0,"weight":10}],
                    "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":7}],
                    "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":0}]}}"#,
                &[
                    "|io.bfq.weight=1000",
                    "|io.weight=10000",
                    "|io.bfq.weight=8:0 10",
                    "|io.weight=8:0 1",
                    "io.max=8:0 rbps=max",
                    "io.max=8:0 wiops=7",
                ],
            ),
            (
                r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9}]}"#,
                &["hugetlb.2MB.max=9", "?hugetlb.2MB.rsvd.max=9"],
            ),
            (
                r#"{"pids":{"limit":3},"unified":{"pids.max":"7","io.max":"8:0 rbps=1\n8:0 wbps=1"}}"#,
                &[
                    "pids.max=3",
                    "+io.max=8:0 rbps=1\n8:0 wbps=1",
                    "+pids.max=7",
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
            (r#"{"memory":{"swap":100}}"#, "linux.resources.memory.swap"),
            (
                r#"{"memory":{"swappiness":1}}"#,
                "linux.resources.memory.swappiness",
            ),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "linux.resources.memory.disableOOMKiller",
            ),
            (
                r#"{"cpu":{"realtimeRuntime":1}}"#,
                "linux.resources.cpu.realtimeRuntime",
            ),
            (
                r#"{"blockIO":{"leafWeight":20}}"#,
                "linux.resources.blockIO.leafWeight",
            ),
            (
                r#"{"network":{"classID":1}}"#,
                "linux.resources.network.classID",
            ),
            (r#"{"unified":{"../x":"1"}}"#, "linux.resources.unified"),
            (r#"{"unified":{"x":"1"}}"#, "linux.resources.unified"),
        ] {
            let resources = coracle_oci::config::parse_resources(json.as_bytes()).unwrap();
            let error = plan(&resources, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }
}
