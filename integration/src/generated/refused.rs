//! Configs of `linux` and around it that a runtime refuses, or should.

use serde_json::{Value, json};

use crate::crictl::Config;

pub fn all(base: &dyn Fn() -> Config) -> Vec<(&'static str, Config)> {
    let sysctl = |key: &str| base().set("/linux/sysctl", json!({key: "1"}));
    let namespaces = |list: Value| base().set("/linux/namespaces", list);
    let seccomp = |profile: Value| base().set("/linux/seccomp", profile);
    let device = |device: Value| base().set("/linux/devices", json!([device]));
    vec![
        (
            "host name without its namespace",
            base().set(
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "pid"}, {"type": "network"},
                                                {"type": "ipc"}]),
            ),
        ),
        (
            "namespace of an unknown kind",
            namespaces(json!([{"type": "mount"}, {"type": "uts"}, {"type": "moon"}])),
        ),
        (
            "namespace given twice",
            base().push("/linux/namespaces", json!({"type": "uts"})),
        ),
        (
            "namespace that is not there",
            namespaces(
                json!([{"type": "mount"}, {"type": "uts"}, {"type": "network", "path": "/no/such/ns"}]),
            ),
        ),
        (
            "namespace of another kind",
            namespaces(
                json!([{"type": "mount"}, {"type": "uts"}, {"type": "network", "path": "/proc/self/ns/ipc"}]),
            ),
        ),
        (
            "namespace that is a plain file",
            namespaces(
                json!([{"type": "mount"}, {"type": "uts"}, {"type": "network", "path": "/etc/passwd"}]),
            ),
        ),
        (
            "user namespace without mappings",
            base().push("/linux/namespaces", json!({"type": "user"})),
        ),
        (
            "mappings without a user namespace",
            base()
                .set(
                    "/linux/uidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10}]),
                )
                .set(
                    "/linux/gidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10}]),
                ),
        ),
        (
            "mappings that overlap",
            base()
                .push("/linux/namespaces", json!({"type": "user"}))
                .set(
                    "/linux/uidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10},
                                                 {"containerID": 5, "hostID": 50, "size": 10}]),
                )
                .set(
                    "/linux/gidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10}]),
                ),
        ),
        (
            "user that is not mapped",
            base()
                .push("/linux/namespaces", json!({"type": "user"}))
                .set(
                    "/linux/uidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10}]),
                )
                .set(
                    "/linux/gidMappings",
                    json!([{"containerID": 0, "hostID": 0, "size": 10}]),
                )
                .set("/process/user/uid", 500),
        ),
        ("sysctl of the whole machine", sysctl("kernel.panic")),
        ("sysctl of the host name", sysctl("kernel.hostname")),
        ("sysctl that is not there", sysctl("net.ipv4.no_such")),
        (
            "sysctl with dots to climb",
            sysctl("net.../../kernel/panic"),
        ),
        (
            "sysctl of the host's network",
            namespaces(json!([{"type": "mount"}, {"type": "uts"}]))
                .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"})),
        ),
        (
            "sysctl of the host's ipc",
            namespaces(json!([{"type": "mount"}, {"type": "uts"}]))
                .set("/linux/sysctl", json!({"kernel.msgmax": "1"})),
        ),
        (
            "seccomp with an unknown action",
            seccomp(
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NONE"}]}),
            ),
        ),
        (
            "seccomp with an unknown default",
            seccomp(json!({"defaultAction": "SCMP_ACT_NONE"})),
        ),
        (
            "seccomp without a default",
            seccomp(json!({"syscalls": []})),
        ),
        (
            "seccomp with an unknown architecture",
            seccomp(
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_MOON"],
                        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}),
            ),
        ),
        (
            "seccomp with an unknown comparison",
            seccomp(
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"],
                        "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_NONE"}]}]}),
            ),
        ),
        (
            "seccomp with an argument too many",
            seccomp(
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"],
                        "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}),
            ),
        ),
        (
            "seccomp with an unknown flag",
            seccomp(
                json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NONE"],
                        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}),
            ),
        ),
        (
            "seccomp that asks nobody",
            seccomp(json!({"defaultAction": "SCMP_ACT_ALLOW",
                        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]})),
        ),
        (
            "device of an unknown kind",
            device(json!({"path": "/dev/x", "type": "z", "major": 1, "minor": 3})),
        ),
        (
            "device without a path",
            device(json!({"type": "c", "major": 1, "minor": 3})),
        ),
        (
            "device rule with an unknown kind",
            base().set(
                "/linux/resources/devices",
                json!([{"allow": true, "type": "z", "access": "rwm"}]),
            ),
        ),
        (
            "device rule with an unknown access",
            base().set(
                "/linux/resources/devices",
                json!([{"allow": true, "access": "rwz"}]),
            ),
        ),
        (
            "memory limit too small",
            base().set("/linux/resources/memory", json!({"limit": 1})),
        ),
        (
            "swap below memory",
            base().set(
                "/linux/resources/memory",
                json!({"limit": 100 << 20, "swap": 50 << 20}),
            ),
        ),
        (
            "swappiness too large",
            base().set("/linux/resources/memory", json!({"swappiness": 200})),
        ),
        (
            "cpu that is not there",
            base().set("/linux/resources/cpu", json!({"cpus": "4000"})),
        ),
        (
            "cpu period too long",
            base().set(
                "/linux/resources/cpu",
                json!({"period": 100_000_000, "quota": 1000}),
            ),
        ),
        (
            "cpu quota too small",
            base().set(
                "/linux/resources/cpu",
                json!({"period": 100_000, "quota": 1}),
            ),
        ),
        (
            "unified resources on v1",
            base().set(
                "/linux/resources/unified",
                json!({"memory.max": "10000000"}),
            ),
        ),
        (
            "huge pages without their controller",
            base().set(
                "/linux/resources/hugepageLimits",
                json!([{"pageSize": "2MB", "limit": 4_194_304}]),
            ),
        ),
        (
            "network class without its controller",
            base().set("/linux/resources/network", json!({"classID": 1_048_577})),
        ),
        (
            "rdma without its controller",
            base().set(
                "/linux/resources/rdma",
                json!({"mlx5_1": {"hcaHandles": 3}}),
            ),
        ),
        (
            "io weight too large",
            base().set("/linux/resources/blockIO", json!({"weight": 5000})),
        ),
        ("no version", base().set("/ociVersion", Value::Null)),
        (
            "version of another world",
            base().set("/ociVersion", "99.0.0"),
        ),
        ("version that is none", base().set("/ociVersion", "latest")),
        ("no linux", base().set("/linux", Value::Null)),
        (
            "hook without a path",
            base().set("/hooks/prestart", json!([{"args": ["x"]}])),
        ),
        (
            "hook with a relative path",
            base().set("/hooks/prestart", json!([{"path": "bin/true"}])),
        ),
        (
            "intelRdt where there is none",
            base().set("/linux/intelRdt", json!({"l3CacheSchema": "L3:0=f"})),
        ),
        (
            "personality of an unknown domain",
            base().set("/linux/personality", json!({"domain": "MOON"})),
        ),
        (
            "time offsets without their namespace",
            base().set(
                "/linux/timeOffsets",
                json!({"monotonic": {"secs": 1, "nanosecs": 0}}),
            ),
        ),
    ]
}
