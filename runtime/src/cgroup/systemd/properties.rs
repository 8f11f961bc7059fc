//! `linux.resources` as properties of a systemd unit. Pure.
//!
//! Not all of it has a property: the files of the cgroup are written as well, and hold what is
//! exact. The properties are for systemd, which applies them again whenever it reloads.

use std::collections::BTreeMap;

use coracle_oci::spec::LinuxResources;

use super::manager::{Facts, Property};
use super::wire::Value;
use crate::cgroup::convert::{shares_to_weight, swap_alone};
use crate::cgroup::devices::{DeviceKind, DeviceRules};
use crate::error::{Error, Result};

const DEFAULT_PERIOD: u64 = 100_000;
const INFINITY: u64 = u64::MAX;

/// The first systemd with a property.
const CPU_QUOTA_PERIOD: u32 = 242;
const ALLOWED_CPUS: u32 = 244;
const CPU_IDLE: u32 = 252;
const OOM_POLICY: u32 = 253;
/// The first to take `char-136`.
pub(super) const DEVICE_MAJOR: u32 = 240;

/// Collects properties for one systemd.
struct Properties<'a> {
    version: u32,
    list: Vec<Property>,
    warnings: &'a mut Vec<String>,
}

impl Properties<'_> {
    fn add(&mut self, name: &str, value: Value) {
        self.list.push((name.to_owned(), value));
    }

    fn number(&mut self, name: &str, number: u64) {
        self.add(name, Value::U64(number));
    }
}

/// What every unit of a container has, whatever its limits.
pub(in crate::cgroup) fn accounting(cgroup: u8) -> Vec<Property> {
    let io = if cgroup == 2 {
        "IOAccounting"
    } else {
        "BlockIOAccounting"
    };
    ["MemoryAccounting", "CPUAccounting", io, "TasksAccounting"]
        .map(|name| (name.to_owned(), Value::Bool(true)))
        .into()
}

/// The properties of the limits.
///
/// # Errors
/// A value cannot be expressed: the error names the field.
pub(in crate::cgroup) fn of_resources(
    resources: &LinuxResources,
    cgroup: u8,
    version: u32,
    warnings: &mut Vec<String>,
) -> Result<Vec<Property>> {
    let mut out = Properties {
        version,
        list: Vec::new(),
        warnings,
    };
    if cgroup == 2 {
        memory_v2(resources, &mut out)?;
        weight_v2(resources, &mut out);
    } else {
        limits_v1(resources, &mut out);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_quota(
            cpu.quota().unwrap_or_default(),
            cpu.period().unwrap_or_default(),
            &mut out,
        );
    }
    if let Some(pids) = resources.pids() {
        out.number("TasksMax", tasks_max(pids.limit()));
    }
    if let Some(cpu) = resources.cpu() {
        for (property, field, list) in [
            ("AllowedCPUs", "linux.resources.cpu.cpus", cpu.cpus()),
            ("AllowedMemoryNodes", "linux.resources.cpu.mems", cpu.mems()),
        ] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                cpuset(property, field, list, &mut out)?;
            }
        }
    }
    if cgroup == 2 {
        let unified: BTreeMap<_, _> = resources.unified().iter().flatten().collect();
        for (file, value) in &unified {
            let idle = unified.get(&"cpu.idle".to_owned());
            let idle = idle.is_some_and(|idle| idle.trim() == "1");
            unified_file(file, value.trim(), idle, &mut out)?;
        }
    }
    Ok(out.list)
}

fn limits_v1(resources: &LinuxResources, out: &mut Properties<'_>) {
    let memory = resources.memory().as_ref().and_then(|m| m.limit());
    if let Some(limit) = memory.filter(|limit| *limit != 0) {
        out.number("MemoryLimit", limit as u64);
    }
    let shares = resources.cpu().as_ref().and_then(|cpu| cpu.shares());
    if let Some(shares) = shares.filter(|shares| *shares != 0) {
        out.number("CPUShares", shares);
    }
    let weight = resources.block_io().as_ref().and_then(|io| io.weight());
    if let Some(weight) = weight.filter(|weight| *weight != 0) {
        out.number("BlockIOWeight", u64::from(weight));
    }
}

fn memory_v2(resources: &LinuxResources, out: &mut Properties<'_>) -> Result<()> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    let limit = memory.limit().unwrap_or_default();
    // -1 is infinity to systemd as well, as an unsigned number.
    if limit != 0 {
        out.number("MemoryMax", limit as u64);
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        out.number("MemoryLow", reservation as u64);
    }
    if let Some(swap) = swap_alone(memory.swap().unwrap_or_default(), limit)? {
        out.number("MemorySwapMax", swap as u64);
    }
    Ok(())
}

/// Whether systemd makes the unit idle, which leaves no room for a weight.
pub(in crate::cgroup) fn is_idle(idle: Option<i64>, version: u32) -> bool {
    idle == Some(1) && version >= CPU_IDLE
}

fn weight_v2(resources: &LinuxResources, out: &mut Properties<'_>) {
    let Some(cpu) = resources.cpu() else { return };
    let idle = is_idle(cpu.idle(), out.version);
    let weight = shares_to_weight(cpu.shares().unwrap_or_default());
    match (idle, weight) {
        // Weight 0 is how systemd spells idle.
        (true, 0) => out.number("CPUWeight", 0),
        (true, _) => {
            out.number("CPUWeight", 0);
            let warning =
                "unable to apply both CPUWeight and CpuIdle to systemd, ignoring CPUWeight";
            out.warnings.push(warning.to_owned());
        }
        (false, 0) => {}
        (false, weight) => out.number("CPUWeight", weight),
    }
}

fn tasks_max(limit: i64) -> u64 {
    match limit {
        // Not accepted by systemd, and the same to the kernel: the container's own process is one.
        0 => 1,
        1.. => limit as u64,
        _ => INFINITY,
    }
}

/// systemd keeps a quota as whole percents of a processor. The rounded one is what the file gets
/// too, or the two would contradict each other.
pub(in crate::cgroup) fn rounded_quota(quota: i64, period: u64) -> i64 {
    if quota <= 0 {
        return quota;
    }
    let period = if period == 0 { DEFAULT_PERIOD } else { period };
    let per_second = per_second(quota, period);
    let exact = quota as u128 * 1_000_000 / u128::from(period);
    if exact == u128::from(per_second) {
        return quota;
    }
    i64::try_from(u128::from(per_second) * u128::from(period) / 1_000_000).unwrap_or(i64::MAX)
}

/// Microseconds in a second, rounded up to a hundredth.
fn per_second(quota: i64, period: u64) -> u64 {
    let exact = quota.unsigned_abs() as u128 * 1_000_000 / u128::from(period.max(1));
    u64::try_from(exact.next_multiple_of(10_000)).unwrap_or(INFINITY)
}

fn cpu_quota(quota: i64, period: u64, out: &mut Properties<'_>) {
    if quota == 0 && period == 0 {
        return;
    }
    if period != 0 && out.version >= CPU_QUOTA_PERIOD {
        out.number("CPUQuotaPeriodUSec", period);
    }
    let per_second = match quota {
        1.. => per_second(quota, if period == 0 { DEFAULT_PERIOD } else { period }),
        _ => INFINITY,
    };
    out.number("CPUQuotaPerSecUSec", per_second);
}

fn cpuset(property: &str, field: &str, list: &str, out: &mut Properties<'_>) -> Result<()> {
    let bits = range_to_bits(list)
        .ok_or_else(|| Error::invalid(format!("{field}: {list:?} is no list of numbers")))?;
    if out.version >= ALLOWED_CPUS {
        out.add(property, Value::bytes(&bits));
    }
    Ok(())
}

/// `1,3-5` as a mask, the lowest eight in the first byte.
fn range_to_bits(list: &str) -> Option<Vec<u8>> {
    // The kernel's limit of processors is far below.
    const MAX: usize = 1 << 16;
    let mut bits = Vec::new();
    let parts = list.split(',').map(str::trim);
    for part in parts.filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX {
            return None;
        }
        for number in first..=last {
            if bits.len() <= number / 8 {
                bits.resize(number / 8 + 1, 0);
            }
            bits[number / 8] |= 1 << (number % 8);
        }
    }
    (!bits.is_empty()).then_some(bits)
}

/// A file of `unified` that systemd has a property for; the others are its cgroup's alone.
fn unified_file(file: &str, value: &str, idle: bool, out: &mut Properties<'_>) -> Result<()> {
    let invalid = || {
        Error::invalid(format!(
            "linux.resources.unified.{file}: invalid value {value:?}"
        ))
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| invalid());
    let or_max = |text: &str| match text {
        "max" => Ok(INFINITY),
        text => number(text),
    };
    let idle = idle && out.version >= CPU_IDLE;
    match file {
        "cpu.idle" if idle => out.number("CPUWeight", 0),
        "cpu.max" => {
            let words: Vec<&str> = value.split_whitespace().collect();
            let (quota, period) = match words[..] {
                [quota] => (quota, DEFAULT_PERIOD),
                [quota, period] => (quota, number(period)?),
                _ => return Err(invalid()),
            };
            let quota = match quota {
                "max" => 0,
                quota => quota.parse().map_err(|_| invalid())?,
            };
            cpu_quota(quota, period, out);
        }
        "cpu.weight" if idle => out.warnings.push(
            "unable to apply both cpu.weight and cpu.idle to systemd, ignoring cpu.weight".into(),
        ),
        "cpu.weight" => out.number("CPUWeight", number(value)?),
        "cpuset.cpus" | "cpuset.mems" => {
            let property = if file == "cpuset.cpus" {
                "AllowedCPUs"
            } else {
                "AllowedMemoryNodes"
            };
            cpuset(
                property,
                &format!("linux.resources.unified.{file}"),
                value,
                out,
            )?;
        }
        "memory.high" => out.number("MemoryHigh", or_max(value)?),
        "memory.low" => out.number("MemoryLow", or_max(value)?),
        "memory.max" => out.number("MemoryMax", or_max(value)?),
        "memory.min" => out.number("MemoryMin", or_max(value)?),
        "memory.swap.max" => out.number("MemorySwapMax", or_max(value)?),
        "pids.max" => out.number("TasksMax", or_max(value)?.max(1)),
        _ => {}
    }
    Ok(())
}

/// The one that can only be given to a new unit.
///
/// # Errors
/// The value is no number.
pub(in crate::cgroup) fn oom_policy(
    resources: &LinuxResources,
    version: u32,
) -> Result<Option<Property>> {
    let group = resources.unified().as_ref();
    let Some(value) = group.and_then(|unified| unified.get("memory.oom.group")) else {
        return Ok(None);
    };
    let policy = match value.trim().parse::<u64>() {
        Ok(0) => "continue",
        Ok(1) => "kill",
        Ok(_) => return Ok(None),
        Err(_) => {
            return Err(Error::invalid(format!(
                "linux.resources.unified.memory.oom.group: invalid value {value:?}"
            )));
        }
    };
    Ok((version >= OOM_POLICY).then(|| ("OOMPolicy".to_owned(), Value::text(policy))))
}

/// The device rules. systemd knows allow-lists only, applies them again on every reload, and
/// must then not take anything away: the terminals of `char-136` above all.
pub(in crate::cgroup) fn devices(
    rules: &DeviceRules,
    cgroup: u8,
    facts: &Facts,
    warnings: &mut Vec<String>,
) -> Vec<Property> {
    let none = Value::Array("(ss)".into(), Vec::new());
    let property = |policy: &str, allow: Option<Value>| {
        // The empty list takes away what a unit has; entries are added to it.
        let mut list = vec![
            ("DeviceAllow".to_owned(), none.clone()),
            ("DevicePolicy".to_owned(), Value::text(policy)),
        ];
        list.extend(allow.map(|allow| ("DeviceAllow".to_owned(), allow)));
        list
    };
    if rules.default_allow {
        // On v2 our own program denies the exceptions, next to whatever systemd does. On v1 there
        // is one list only, and systemd would allow all of it on reload: too little then.
        let policy = if cgroup == 2 || rules.exceptions.is_empty() {
            "auto"
        } else {
            warnings.push(
                "systemd doesn't support blacklist device rules -- applying temporary deny-all rule"
                    .to_owned(),
            );
            "strict"
        };
        return property(policy, None);
    }
    let mut allow = Vec::new();
    for (device, access) in &rules.exceptions {
        let (kind, name) = match device.kind {
            DeviceKind::Block => ("block", "Block devices:"),
            DeviceKind::Char => ("char", "Character devices:"),
        };
        let path = match (device.major, device.minor) {
            (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
            (Some(major), None) if facts.version >= DEVICE_MAJOR => format!("{kind}-{major}"),
            (Some(major), None) => match device_group(&facts.proc_devices, name, major) {
                Some(group) => format!("{kind}-{group}"),
                None => continue,
            },
            (None, None) => format!("{kind}-*"),
            (None, Some(_)) => {
                warnings.push(format!(
                    "systemd doesn't support '*:n' device rules -- temporarily ignoring rule: \
                     {device} {access}"
                ));
                continue;
            }
        };
        let entry = vec![Value::Text(path), Value::Text(access.to_string())];
        allow.push(Value::Struct(entry));
    }
    property("strict", Some(Value::Array("(ss)".into(), allow)))
}

/// The name of a major number in /proc/devices.
fn device_group<'a>(text: &'a str, section: &str, major: u32) -> Option<&'a str> {
    let lines = text.lines().skip_while(|line| *line != section).skip(1);
    let mut lines = lines.take_while(|line| !line.is_empty());
    lines.find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then_some(name)
    })
}

#[cfg(test)]
#[path = "properties_tests.rs"]
mod tests;
