use super::*;
use crate::cgroup::systemd::address::Scope;

fn facts(version: u32) -> Facts {
    Facts {
        scope: Scope::System,
        version,
        control_group: Default::default(),
        proc_devices: "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n".into(),
    }
}

/// `Name=value` of every property, arrays of bytes in hexadecimal.
fn show(properties: &[Property]) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::U64(u64::MAX) => "max".to_owned(),
        Value::U64(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Text(text) => text.clone(),
        Value::Array(element, items) if element == "y" => items
            .iter()
            .map(|item| match item {
                Value::Byte(byte) => format!("{byte:02x}"),
                other => panic!("{other:?}"),
            })
            .collect(),
        Value::Array(_, items) => items
            .iter()
            .map(|item| match item {
                Value::Struct(pair) => {
                    format!(
                        "{} {};",
                        pair[0].as_text().unwrap(),
                        pair[1].as_text().unwrap()
                    )
                }
                other => panic!("{other:?}"),
            })
            .collect(),
        other => panic!("{other:?}"),
    };
    let line = |(name, value): &Property| format!("{name}={}", text(value));
    properties.iter().map(line).collect()
}

fn resources(json: &str) -> LinuxResources {
    coracle_oci::config::parse_resources(json.as_bytes()).unwrap()
}

fn of(json: &str, cgroup: u8, version: u32) -> Vec<String> {
    show(&of_resources(&resources(json), cgroup, version, &mut Vec::new()).unwrap())
}

#[test]
fn v2_table() {
    let cases: &[(&str, u32, &[&str])] = &[
        ("{}", 257, &[]),
        (
            r#"{"memory":{"limit":100,"swap":300,"reservation":50}}"#,
            257,
            &["MemoryMax=100", "MemoryLow=50", "MemorySwapMax=200"],
        ),
        (
            r#"{"memory":{"limit":-1}}"#,
            257,
            &["MemoryMax=max", "MemorySwapMax=max"],
        ),
        (
            r#"{"memory":{"limit":100,"swap":100}}"#,
            257,
            &["MemoryMax=100", "MemorySwapMax=0"],
        ),
        (r#"{"cpu":{"shares":1024}}"#, 257, &["CPUWeight=100"]),
        (r#"{"cpu":{"idle":1}}"#, 257, &["CPUWeight=0"]),
        (r#"{"cpu":{"idle":1}}"#, 251, &[]),
        (
            r#"{"cpu":{"idle":0,"shares":1024}}"#,
            257,
            &["CPUWeight=100"],
        ),
        (r#"{"cpu":{"idle":1,"shares":1024}}"#, 257, &["CPUWeight=0"]),
        (
            r#"{"cpu":{"quota":5000,"period":10000}}"#,
            257,
            &["CPUQuotaPeriodUSec=10000", "CPUQuotaPerSecUSec=500000"],
        ),
        (
            r#"{"cpu":{"quota":5000,"period":10000}}"#,
            241,
            &["CPUQuotaPerSecUSec=500000"],
        ),
        (
            r#"{"cpu":{"quota":5000}}"#,
            257,
            &["CPUQuotaPerSecUSec=50000"],
        ),
        (r#"{"cpu":{"quota":-1}}"#, 257, &["CPUQuotaPerSecUSec=max"]),
        (
            r#"{"cpu":{"period":1000}}"#,
            257,
            &["CPUQuotaPeriodUSec=1000", "CPUQuotaPerSecUSec=max"],
        ),
        // 33.33 percent
        (
            r#"{"cpu":{"quota":3333,"period":10000}}"#,
            241,
            &["CPUQuotaPerSecUSec=340000"],
        ),
        (r#"{"pids":{"limit":7}}"#, 257, &["TasksMax=7"]),
        (r#"{"pids":{"limit":0}}"#, 257, &["TasksMax=1"]),
        (r#"{"pids":{"limit":-1}}"#, 257, &["TasksMax=max"]),
        (
            r#"{"cpu":{"cpus":"0,3-5,8","mems":"1"}}"#,
            257,
            &["AllowedCPUs=3901", "AllowedMemoryNodes=02"],
        ),
        (r#"{"cpu":{"cpus":"0"}}"#, 243, &[]),
        (
            r#"{"unified":{"cpu.max":"max 1000","cpu.weight":"42","cpuset.cpus":"1",
                "cpuset.mems":"0","io.max":"8:0 rbps=1","memory.high":"1","memory.low":"2",
                "memory.max":"max","memory.min":"3","memory.swap.max":"4","pids.max":"0"}}"#,
            257,
            &[
                "CPUQuotaPeriodUSec=1000",
                "CPUQuotaPerSecUSec=max",
                "CPUWeight=42",
                "AllowedCPUs=02",
                "AllowedMemoryNodes=01",
                "MemoryHigh=1",
                "MemoryLow=2",
                "MemoryMax=max",
                "MemoryMin=3",
                "MemorySwapMax=4",
                "TasksMax=1",
            ],
        ),
        (
            r#"{"unified":{"cpu.max":" 5000 10000\n"}}"#,
            257,
            &["CPUQuotaPeriodUSec=10000", "CPUQuotaPerSecUSec=500000"],
        ),
        (
            r#"{"unified":{"cpu.idle":"1\n","cpu.weight":"42"}}"#,
            257,
            &["CPUWeight=0"],
        ),
        (
            r#"{"unified":{"cpu.idle":"1","cpu.weight":"42"}}"#,
            251,
            &["CPUWeight=42"],
        ),
    ];
    for (json, version, want) in cases {
        assert_eq!(of(json, 2, *version), *want, "{json} {version}");
    }
}

#[test]
fn v1_table() {
    let json = r#"{"memory":{"limit":100,"swap":300,"reservation":50},"blockIO":{"weight":500},
        "cpu":{"shares":10,"quota":5000,"period":10000,"cpus":"0"},"pids":{"limit":3}}"#;
    assert_eq!(
        of(json, 1, 257),
        [
            "MemoryLimit=100",
            "CPUShares=10",
            "BlockIOWeight=500",
            "CPUQuotaPeriodUSec=10000",
            "CPUQuotaPerSecUSec=500000",
            "TasksMax=3",
            "AllowedCPUs=01",
        ]
    );
}

#[test]
fn refusals_name_the_field() {
    for (json, field) in [
        (r#"{"cpu":{"cpus":"a"}}"#, "linux.resources.cpu.cpus"),
        (r#"{"cpu":{"cpus":","}}"#, "linux.resources.cpu.cpus"),
        (r#"{"cpu":{"mems":"3-1"}}"#, "linux.resources.cpu.mems"),
        (
            r#"{"cpu":{"mems":"0-4294967295"}}"#,
            "linux.resources.cpu.mems",
        ),
        (r#"{"memory":{"swap":1}}"#, "linux.resources.memory.swap"),
        (
            r#"{"unified":{"cpu.max":""}}"#,
            "linux.resources.unified.cpu.max",
        ),
        (
            r#"{"unified":{"cpu.max":"1 2 3"}}"#,
            "linux.resources.unified.cpu.max",
        ),
        (
            r#"{"unified":{"pids.max":"x"}}"#,
            "linux.resources.unified.pids.max",
        ),
    ] {
        let refused = of_resources(&resources(json), 2, 257, &mut Vec::new()).unwrap_err();
        assert!(refused.to_string().starts_with(field), "{refused}");
    }
}

#[test]
fn quota_is_rounded_for_the_file_too() {
    for (quota, period, want) in [
        (0, 0, 0),
        (-1, 1000, -1),
        (5000, 10_000, 5000),
        (5000, 0, 5000),
        (3333, 10_000, 3400),
        (5001, 0, 6000),
        (i64::MAX, 1, 18_446_744_073_709),
    ] {
        assert_eq!(rounded_quota(quota, period), want, "{quota} {period}");
    }
}

#[test]
fn oom_policy_table() {
    let policy = |value: &str, version| {
        let json = format!(r#"{{"unified":{{"memory.oom.group":"{value}"}}}}"#);
        oom_policy(&resources(&json), version).map(|found| show(&Vec::from_iter(found)))
    };
    assert_eq!(policy("1", 257).unwrap(), ["OOMPolicy=kill"]);
    assert_eq!(policy("0", 257).unwrap(), ["OOMPolicy=continue"]);
    assert!(policy("1", 252).unwrap().is_empty());
    assert!(policy("2", 257).unwrap().is_empty());
    assert!(policy("x", 257).is_err());
}

fn device_list(json: &str, cgroup: u8, version: u32) -> Vec<String> {
    let resources = resources(json);
    let rules = resources.devices().as_deref().unwrap_or_default();
    let rules = DeviceRules::new(rules, None).unwrap();
    show(&devices(&rules, cgroup, &facts(version), &mut Vec::new()))
}

/// After a reload systemd applies its own list: without the terminals in it, `exec -t` fails.
#[test]
fn defaults_are_allowed_strictly() {
    for (version, terminals) in [(257, "char-136"), (239, "char-pts")] {
        let found = device_list("{}", 2, version);
        assert_eq!(found[..2], ["DeviceAllow=", "DevicePolicy=strict"]);
        let allow = found[2].strip_prefix("DeviceAllow=").unwrap();
        let allow: Vec<&str> = allow.split_terminator(';').collect();
        assert_eq!(
            allow,
            [
                "block-* m",
                "char-* m",
                "/dev/char/1:3 rwm",
                "/dev/char/1:5 rwm",
                "/dev/char/1:7 rwm",
                "/dev/char/1:8 rwm",
                "/dev/char/1:9 rwm",
                "/dev/char/5:0 rwm",
                "/dev/char/5:2 rwm",
                "/dev/char/10:200 rwm",
                &format!("{terminals} rwm"),
            ]
        );
    }
}

#[test]
fn deny_lists_are_ours_on_v2() {
    let all = r#"{"devices":[{"allow":true,"access":"rwm"}]}"#;
    let but = r#"{"devices":[{"allow":true,"access":"rwm"},
        {"allow":false,"type":"c","major":10,"minor":229,"access":"rw"}]}"#;
    for (json, cgroup, policy) in [
        (all, 2, "DevicePolicy=auto"),
        (all, 1, "DevicePolicy=auto"),
        (but, 2, "DevicePolicy=auto"),
        (but, 1, "DevicePolicy=strict"),
    ] {
        assert_eq!(device_list(json, cgroup, 257), ["DeviceAllow=", policy]);
    }
}
