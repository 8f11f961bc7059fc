//! The resource flags of `update`, and how new limits join old ones. Pure.

use serde_json::{Map, Value, json};

use crate::error::{Error, Kind, Result};

#[derive(Debug, Default, clap::Args)]
pub(super) struct Flags {
    /// Specifies per cgroup weight, range is from 10 to 1000
    #[arg(
        long,
        value_name = "value",
        default_value_t = 0,
        hide_default_value = true
    )]
    blkio_weight: u16,
    /// CPU CFS period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_period: Option<String>,
    /// CPU CFS hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_quota: Option<String>,
    /// CPU CFS hardcap burst limit (in usecs). Allowed accumulated cpu time additionally for burst
    /// a given period
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_burst: Option<String>,
    /// CPU shares (relative weight vs. other containers)
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_share: Option<String>,
    /// CPU realtime period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_rt_period: Option<String>,
    /// CPU realtime hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_rt_runtime: Option<String>,
    /// CPU(s) to use
    #[arg(long, value_name = "value")]
    cpuset_cpus: Option<String>,
    /// Memory node(s) to use
    #[arg(long, value_name = "value")]
    cpuset_mems: Option<String>,
    /// (obsoleted; do not use)
    #[arg(long, value_name = "value", allow_hyphen_values = true, hide = true)]
    kernel_memory: Option<String>,
    /// (obsoleted; do not use)
    #[arg(long, value_name = "value", allow_hyphen_values = true, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Memory limit (in bytes)
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    memory: Option<String>,
    /// set cgroup SCHED_IDLE or not, 0: default behavior, 1: SCHED_IDLE
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    cpu_idle: Option<String>,
    /// Memory reservation or soft_limit (in bytes)
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Total memory usage (memory + swap); set '-1' to enable unlimited swap
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Maximum number of pids allowed in the container
    #[arg(long, value_name = "value", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// The string of Intel RDT/CAT L3 cache schema
    #[arg(long, value_name = "value")]
    l3_cache_schema: Option<String>,
    /// The string of Intel RDT/MBA memory bandwidth schema
    #[arg(long, value_name = "value")]
    mem_bw_schema: Option<String>,
}

impl Flags {
    /// The flags as a resources document.
    pub fn parse(&self) -> Result<Map<String, Value>> {
        let mut cpu = Map::new();
        let texts = [("cpus", &self.cpuset_cpus), ("mems", &self.cpuset_mems)];
        for (member, text) in texts {
            if let Some(text) = given(text) {
                cpu.insert(member.into(), text.into());
            }
        }
        let unsigned = [
            ("cpu-burst", "burst", &self.cpu_burst),
            ("cpu-period", "period", &self.cpu_period),
            ("cpu-rt-period", "realtimePeriod", &self.cpu_rt_period),
            ("cpu-share", "shares", &self.cpu_share),
        ];
        for (flag, member, text) in unsigned {
            if let Some(text) = given(text) {
                cpu.insert(member.into(), number::<u64>(flag, text)?.into());
            }
        }
        let signed = [
            ("cpu-quota", "quota", &self.cpu_quota),
            ("cpu-rt-runtime", "realtimeRuntime", &self.cpu_rt_runtime),
            ("cpu-idle", "idle", &self.cpu_idle),
        ];
        for (flag, member, text) in signed {
            if let Some(text) = given(text) {
                cpu.insert(member.into(), number::<i64>(flag, text)?.into());
            }
        }
        let mut memory = Map::new();
        let sizes = [
            ("memory", "limit", &self.memory),
            ("memory-swap", "swap", &self.memory_swap),
            ("kernel-memory", "kernel", &self.kernel_memory),
            ("kernel-memory-tcp", "kernelTCP", &self.kernel_memory_tcp),
            (
                "memory-reservation",
                "reservation",
                &self.memory_reservation,
            ),
        ];
        for (flag, member, text) in sizes {
            if let Some(text) = given(text) {
                memory.insert(member.into(), size(flag, text)?.into());
            }
        }
        let mut out = Map::new();
        for (section, members) in [("cpu", cpu), ("memory", memory)] {
            if !members.is_empty() {
                out.insert(section.into(), members.into());
            }
        }
        if self.blkio_weight != 0 {
            out.insert("blockIO".into(), json!({ "weight": self.blkio_weight }));
        }
        if let Some(limit) = self.pids_limit {
            out.insert("pids".into(), json!({ "limit": limit }));
        }
        Ok(out)
    }

    /// What is asked of the cache and of memory bandwidth.
    pub fn resctrl_schemas(&self) -> (Option<&str>, Option<&str>) {
        (given(&self.l3_cache_schema), given(&self.mem_bw_schema))
    }
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|error: T::Err| {
        Error::new(Kind::Invalid, format!("invalid value for {flag}"), "").source(error)
    })
}

/// Bytes with an optional unit: `64M`, `1.5g`, `32MiB`, `10 kb`; units count in 1024s. -1 is
/// unlimited.
fn size(flag: &str, text: &str) -> Result<i64> {
    if text == "-1" {
        return Ok(-1);
    }
    parse_size(text).ok_or_else(|| {
        Error::new(
            Kind::Invalid,
            format!("invalid value for {flag}: invalid size: '{text}'"),
            "",
        )
    })
}

fn parse_size(text: &str) -> Option<i64> {
    let digits_end = text.rfind(|c: char| c.is_ascii_digit() || c == '.')? + 1;
    let (digits, unit) = text.split_at(digits_end);
    let value: f64 = digits.parse().ok().filter(|value: &f64| *value >= 0.0)?;
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if matches!(unit.as_str(), "" | "b") => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    if !matches!(unit.get(1..), None | Some("" | "b" | "ib")) {
        return None;
    }
    Some((value * 1024f64.powi(power)) as i64)
}

/// The two documents of an update.
#[derive(Debug, PartialEq)]
pub(super) struct Update {
    /// What goes to the kernel: the sections that were asked about, completed from the old
    /// values where one limit is meaningless without the other.
    pub to_write: Value,
    /// The container's resources from now on.
    pub to_keep: Value,
}

/// Joins new limits with old ones as runc does.
///
/// Limits that come in pairs (quota and period, memory and swap) keep their old other half.
/// `cpus`, `mems`, `burst` and `idle` are written only when asked for.
pub(super) fn merge(old: &Value, mut asked: Map<String, Value>) -> Update {
    // Update never touches devices.
    asked.remove("devices");
    asked.retain(|_, section| !section.is_null());
    drop_nulls(&mut asked);
    let mut write = Map::new();
    let mut keep = old.as_object().cloned().unwrap_or_default();
    for (name, new) in asked {
        let before = keep.get(&name).cloned().unwrap_or(Value::Null);
        let (written, kept) = match (name.as_str(), new) {
            ("cpu", Value::Object(new)) => merge_cpu(&before, new),
            ("memory", Value::Object(new)) => both(merge_memory(&before, new)),
            ("blockIO", Value::Object(new)) => both(merge_block_io(&before, new)),
            ("unified", new) => {
                let mut all = before.as_object().cloned().unwrap_or_default();
                all.extend(new.as_object().cloned().unwrap_or_default());
                (new, all.into())
            }
            (_, new) => both(new),
        };
        write.insert(name.clone(), written);
        keep.insert(name, kept);
    }
    Update {
        to_write: write.into(),
        to_keep: keep.into(),
    }
}

fn both(value: Value) -> (Value, Value) {
    (value.clone(), value)
}

fn drop_nulls(map: &mut Map<String, Value>) {
    map.retain(|_, value| !value.is_null());
    map.values_mut()
        .filter_map(Value::as_object_mut)
        .for_each(drop_nulls);
}

fn overlay(before: &Value, new: Map<String, Value>) -> Map<String, Value> {
    let mut merged = before.as_object().cloned().unwrap_or_default();
    merged.extend(new);
    merged
}

fn merge_cpu(before: &Value, new: Map<String, Value>) -> (Value, Value) {
    let idle_alone = new.contains_key("idle") && !new.contains_key("shares");
    let asked: Vec<String> = new.keys().cloned().collect();
    let mut kept = overlay(before, new);
    if idle_alone {
        // An idle cgroup takes no weight, now or in a later update.
        kept.remove("shares");
    }
    let mut written = kept.clone();
    for member in ["cpus", "mems", "burst", "idle"] {
        if !asked.iter().any(|name| name == member) {
            written.remove(member);
        }
    }
    (written.into(), kept.into())
}

fn merge_memory(before: &Value, new: Map<String, Value>) -> Value {
    let unlimited = new.get("limit").and_then(Value::as_i64) == Some(-1);
    let swap_open = unlimited && !new.contains_key("swap");
    let mut merged = overlay(before, new);
    if swap_open {
        // A finite memory+swap limit would contradict unlimited memory.
        merged.remove("swap");
    }
    merged.into()
}

/// Device lists are joined by device number, the last entry of a device winning.
fn merge_block_io(before: &Value, new: Map<String, Value>) -> Value {
    let mut merged = before.as_object().cloned().unwrap_or_default();
    for (member, value) in new {
        let Value::Array(entries) = value else {
            merged.insert(member, value);
            continue;
        };
        let list = merged
            .entry(member)
            .or_insert_with(|| Value::Array(Vec::new()));
        if !list.is_array() {
            *list = Value::Array(Vec::new());
        }
        let Some(list) = list.as_array_mut() else {
            continue;
        };
        for entry in entries {
            let number = |device: &Value| {
                let part = |name| device.get(name).and_then(Value::as_i64).unwrap_or_default();
                (part("major"), part("minor"))
            };
            let same = list
                .iter_mut()
                .rev()
                .find(|known| number(known) == number(&entry));
            match (same, entry) {
                (Some(Value::Object(known)), Value::Object(entry)) => known.extend(entry),
                (_, entry) => list.push(entry),
            }
        }
    }
    merged.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_table() {
        let cases = [
            ("0", Some(0)),
            ("33554432", Some(33_554_432)),
            ("32M", Some(33_554_432)),
            ("32m", Some(33_554_432)),
            ("32MB", Some(33_554_432)),
            ("32MiB", Some(33_554_432)),
            ("32 mb", Some(33_554_432)),
            ("1.5k", Some(1536)),
            ("10b", Some(10)),
            ("1g", Some(1 << 30)),
            ("", None),
            ("M", None),
            ("-5", None),
            ("5x", None),
            ("5bb", None),
            ("5kk", None),
            ("5ib", None),
        ];
        for (text, want) in cases {
            assert_eq!(parse_size(text), want, "{text:?}");
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn merge_table() {
        let old = json!({
            "cpu": {"shares": 100, "quota": 500, "period": 1000, "cpus": "0", "burst": 5},
            "memory": {"limit": 100, "swap": 200},
            "pids": {"limit": 7},
            "blockIO": {"weight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 1}]},
        });
        let cases = [
            (json!({}), json!({})),
            (
                json!({"cpu": {"period": 2000}}),
                json!({"cpu": {"shares": 100, "quota": 500, "period": 2000}}),
            ),
            (
                json!({"cpu": {"idle": 1}}),
                json!({"cpu": {"idle": 1, "quota": 500, "period": 1000}}),
            ),
            (
                json!({"memory": {"limit": -1}}),
                json!({"memory": {"limit": -1}}),
            ),
            (
                json!({"memory": {"limit": 150, "swap": null}, "pids": null}),
                json!({"memory": {"limit": 150, "swap": 200}}),
            ),
            (
                json!({"blockIO": {"weightDevice": [
                    {"major": 8, "minor": 0, "weight": 2}, {"major": 8, "minor": 16, "weight": 3}]}}),
                json!({"blockIO": {"weight": 10, "weightDevice": [
                    {"major": 8, "minor": 0, "weight": 2}, {"major": 8, "minor": 16, "weight": 3}]}}),
            ),
            (
                json!({"devices": [{"allow": true, "access": "rwm"}]}),
                json!({}),
            ),
        ];
        for (asked, to_write) in cases {
            let update = merge(&old, object(asked.clone()));
            assert_eq!(update.to_write, to_write, "{asked}");
            assert_eq!(update.to_keep["pids"]["limit"], 7);
        }
    }

    #[test]
    fn flags_become_a_document() {
        let flags = Flags {
            blkio_weight: 500,
            cpu_quota: Some("-1".into()),
            memory: Some("64M".into()),
            memory_swap: Some("-1".into()),
            pids_limit: Some(-1),
            ..Flags::default()
        };
        assert_eq!(
            Value::from(flags.parse().unwrap()),
            json!({
                "cpu": {"quota": -1},
                "memory": {"limit": 67_108_864, "swap": -1},
                "blockIO": {"weight": 500},
                "pids": {"limit": -1},
            })
        );
        let bad = Flags {
            cpu_share: Some("x".into()),
            ..Flags::default()
        };
        let error = format!("{:#}", bad.parse().unwrap_err());
        assert!(
            error.starts_with("invalid value for cpu-share: "),
            "{error}"
        );
    }
}
