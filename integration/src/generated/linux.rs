//! Features of `linux`, of the host name, hooks and annotations.

use serde_json::{Value, json};

use super::{Case, Dice, Feature, Places, feature};

pub const FEATURES: &[Feature] = &[
    feature("another host name", "uts", |case, _, _| {
        case.set("/hostname", "another")
    }),
    feature("no host name", "uts", |case, _, _| {
        case.set("/hostname", Value::Null);
        case.set("/linux/namespaces", without(case, "uts"));
    }),
    feature("joined host name", "uts", |case, _, places| {
        case.set("/hostname", "joined");
        join(case, "uts", places);
    }),
    feature("domain name", "domain", |case, _, _| {
        case.set("/domainname", "example.org")
    }),
    feature("the host's network", "net", |case, _, _| {
        case.set("/linux/namespaces", without(case, "network"));
    }),
    feature("joined network", "net", |case, _, places| {
        join(case, "network", places)
    }),
    feature("the host's ipc", "ipc", |case, _, _| {
        case.set("/linux/namespaces", without(case, "ipc"));
        let mut mounts = case.get("/mounts").as_array().cloned().unwrap_or_default();
        mounts.retain(|m| m["type"] != "mqueue");
        case.set("/mounts", mounts);
    }),
    feature("joined ipc", "ipc", |case, _, places| {
        join(case, "ipc", places)
    }),
    feature("the host's pids", "pid", |case, _, _| {
        case.set("/linux/namespaces", without(case, "pid"));
    }),
    feature("joined pids", "pid", |case, _, places| {
        join(case, "pid", places)
    }),
    feature("cgroup namespace", "cgroup", |case, _, _| {
        case.push("/linux/namespaces", json!({"type": "cgroup"}));
        case.look("/sys/fs/cgroup");
    }),
    feature("user namespace", "userns", |case, dice, _| {
        let size = 1000 + dice.below(70_000);
        map(case, 0, size);
    }),
    feature("user namespace with other ids", "userns", |case, _, _| {
        map(case, 100_000, 65_536)
    }),
    feature("user namespace in two pieces", "userns", |case, _, _| {
        case.push("/linux/namespaces", json!({"type": "user"}));
        let pieces = json!([{"containerID": 0, "hostID": 0, "size": 1},
                            {"containerID": 1, "hostID": 100_001, "size": 65_535}]);
        case.set("/linux/uidMappings", pieces.clone());
        case.set("/linux/gidMappings", pieces);
    }),
    feature("time namespace", "time", |case, _, _| {
        case.push("/linux/namespaces", json!({"type": "time"}));
        case.set(
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 3600, "nanosecs": 7},
                                              "boottime": {"secs": 86_400, "nanosecs": 0}}),
        );
    }),
    feature("device", "device", |case, dice, _| {
        let mut device = json!({"path": *dice.one(&["/dev/fuse", "/dev/deep/fuse", "/dev/null"]),
            "type": *dice.one(&["c", "u"]), "major": 10, "minor": 229});
        if dice.chance(2) {
            device["fileMode"] = json!(*dice.one(&[0o600, 0o640, 0o666, 0o4755]));
        }
        if dice.chance(2) {
            device["uid"] = json!(7);
            device["gid"] = json!(8);
        }
        case.look(device["path"].as_str().unwrap_or_default());
        case.set("/linux/devices", json!([device]));
    }),
    feature("block device and fifo", "device", |case, _, _| {
        case.set("/linux/devices", json!([
            {"path": "/dev/loop-of-mine", "type": "b", "major": 7, "minor": 0, "fileMode": 0o660},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o622},
        ]));
    }),
    feature("device outside /dev", "device", |case, _, _| {
        case.set(
            "/linux/devices",
            json!([
                {"path": "/app/deep/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666},
            ]),
        );
        case.look("/app/deep/zero");
        case.look("/app/deep");
    }),
    feature("device rules", "device", |case, dice, _| {
        let mut rules = vec![json!({"allow": false, "access": "rwm"})];
        rules.extend(dice.some(&[
            json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}),
            json!({"allow": true, "type": "c", "major": 1, "access": "r"}),
            json!({"allow": false, "type": "c", "major": 1, "minor": 3, "access": "w"}),
            json!({"allow": true, "type": "b", "access": "m"}),
        ]));
        case.set("/linux/resources/devices", rules);
        case.look("/sys/fs/cgroup/devices/devices.list");
        case.look("/dev/null");
    }),
    feature("every device", "device", |case, _, _| {
        case.set(
            "/linux/resources/devices",
            json!([{"allow": true, "access": "rwm"}]),
        );
        case.look("/sys/fs/cgroup/devices/devices.list");
    }),
    feature("memory", "memory", |case, dice, _| {
        let limit = (32 + dice.below(100)) << 20;
        let mut memory = json!({"limit": limit});
        if dice.chance(2) {
            memory["reservation"] = json!(limit / 2);
        }
        match dice.below(3) {
            0 => memory["swap"] = json!(limit * 2),
            1 => memory["swap"] = json!(-1),
            _ => {}
        }
        if dice.chance(3) {
            memory["swappiness"] = json!(dice.below(101));
        }
        if dice.chance(4) {
            memory["disableOOMKiller"] = json!(true);
        }
        case.set("/linux/resources/memory", memory);
        for name in [
            "limit_in_bytes",
            "soft_limit_in_bytes",
            "memsw.limit_in_bytes",
            "swappiness",
            "oom_control",
            "use_hierarchy",
        ] {
            case.look(&format!("/sys/fs/cgroup/memory/memory.{name}"));
        }
    }),
    feature("cpu", "cpu", |case, dice, _| {
        let mut cpu = json!({});
        for (key, value) in dice.some(&[("shares", 512), ("quota", 50_000), ("period", 50_000)]) {
            cpu[key] = json!(value);
        }
        for (key, value) in dice.some(&[("cpus", "0"), ("mems", "0")]) {
            cpu[key] = json!(value);
        }
        if dice.chance(4) {
            cpu["idle"] = json!(1);
        }
        case.set("/linux/resources/cpu", cpu);
        for name in [
            "cpu/cpu.shares",
            "cpu/cpu.cfs_quota_us",
            "cpu/cpu.cfs_period_us",
            "cpu/cpu.idle",
            "cpuset/cpuset.cpus",
            "cpuset/cpuset.mems",
        ] {
            case.look(&format!("/sys/fs/cgroup/{name}"));
        }
    }),
    feature("pids", "pids", |case, dice, _| {
        case.set(
            "/linux/resources/pids",
            json!({"limit": *dice.one(&[5, 20, 1000, -1, 0])}),
        );
        case.look("/sys/fs/cgroup/pids/pids.max");
    }),
    feature("block io", "blkio", |case, dice, _| {
        let mut io = json!({});
        if dice.chance(2) {
            io["weight"] = json!(100 + dice.below(800));
        } else {
            io["throttleReadBpsDevice"] = json!([{"major": 254, "minor": 0, "rate": 1 << 20}]);
            io["throttleWriteIOPSDevice"] = json!([{"major": 254, "minor": 0, "rate": 100}]);
        }
        case.set("/linux/resources/blockIO", io);
        for name in [
            "bfq.weight",
            "throttle.read_bps_device",
            "throttle.write_iops_device",
        ] {
            case.look(&format!("/sys/fs/cgroup/blkio/blkio.{name}"));
        }
    }),
    feature("path of the cgroup", "cgroupsPath", |case, dice, places| {
        let form = *dice.one(&[
            "/MARK/deep/er/c",
            "MARK/c",
            "/MARK/../MARK/c",
            "/MARK//c/",
            "",
        ]);
        match form {
            "" => case.set("/linux/cgroupsPath", Value::Null),
            _ => case.set("/linux/cgroupsPath", form.replace("MARK", &places.mark)),
        }
    }),
    feature("sysctls", "sysctl", |case, dice, _| {
        let mut set = serde_json::Map::new();
        for (key, value) in dice.some(&[
            ("kernel.msgmax", "4096"),
            ("kernel.shm_rmid_forced", "1"),
            ("kernel.sem", "250 32000 100 128"),
            ("fs.mqueue.msg_max", "7"),
            ("net.ipv4.ip_forward", "0"),
            ("net.ipv4.ping_group_range", "0 0"),
            ("net.ipv4.ip_unprivileged_port_start", "80"),
            ("net/core/somaxconn", "99"),
        ]) {
            let namespace = match key.starts_with("net") {
                true => "the host's network",
                false => "the host's ipc",
            };
            if !case.has(namespace) {
                set.insert(key.to_owned(), json!(value));
            }
        }
        case.set("/linux/sysctl", set);
    }),
    feature("seccomp errors", "seccomp", |case, dice, _| {
        let names = dice.some(&[
            "chmod",
            "fchmodat",
            "mkdir",
            "link",
            "linkat",
            "symlink",
            "unlink",
            "unlinkat",
            "syncfs",
            "mount",
            "kill",
            "chown",
            "lchown",
            "fchownat",
            "no_such_call",
        ]);
        let mut rule = json!({"names": names, "action": "SCMP_ACT_ERRNO"});
        if dice.chance(2) {
            rule["errnoRet"] = json!(*dice.one(&[1, 13, 38, 95]));
        }
        profile(case, dice, json!([rule]));
    }),
    feature("seccomp arguments", "seccomp", |case, dice, _| {
        // The second argument of kill is 0 here; of chmod and mkdir it is 0700.
        let args = json!([{"index": 1, "value": *dice.one(&[0, 0o700, 0o777]), "valueTwo": 0,
            "op": *dice.one(&["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_GE",
                              "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"])}]);
        let rule = json!({"names": ["kill", "mkdir", "fchmodat", "chmod"], "action": "SCMP_ACT_ERRNO",
                          "errnoRet": 95, "args": args});
        profile(case, dice, json!([rule]));
    }),
    feature(
        "seccomp with two rules for a call",
        "seccomp",
        |case, dice, _| {
            let rule = |value: i32, errno: i32| {
                json!({"names": ["kill", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
                   "args": [{"index": 1, "value": value, "op": "SCMP_CMP_EQ"}]})
            };
            profile(case, dice, json!([rule(0, 13), rule(0o700, 95)]));
        },
    ),
    feature("seccomp that kills", "seccomp", |case, dice, _| {
        let action = *dice.one(&[
            "SCMP_ACT_KILL",
            "SCMP_ACT_KILL_PROCESS",
            "SCMP_ACT_KILL_THREAD",
            "SCMP_ACT_TRAP",
        ]);
        profile(case, dice, json!([{"names": ["syncfs"], "action": action}]));
    }),
    feature("seccomp that denies by default", "seccomp", |case, _, _| {
        case.set(
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 95,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ALLOWED.to_vec(), "action": "SCMP_ACT_ALLOW"}],
            }),
        );
    }),
    feature("hooks", "hooks", hooks),
    feature("hook that fails", "hooks", |case, dice, places| {
        let point = *dice.one(&[
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
        ]);
        let failing = json!({"path": "/bin/sh", "args": ["sh", "-c", "cat > /dev/null; exit 3"]});
        case.set(
            &format!("/hooks/{point}"),
            json!([logging(point, places), failing, logging("after", places)]),
        );
    }),
    feature("hook that is not there", "hooks", |case, dice, _| {
        let point = *dice.one(&[
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
        ]);
        case.set(
            &format!("/hooks/{point}"),
            json!([{"path": "/no/such/hook"}]),
        );
    }),
    feature("annotations", "annotations", |case, _, _| {
        case.set(
            "/annotations",
            json!({"org.example.a": "1", "empty": "", "with space": "x y"}),
        );
    }),
    feature("personality", "personality", |case, dice, _| {
        case.set(
            "/linux/personality",
            json!({"domain": *dice.one(&["LINUX", "LINUX32"])}),
        );
    }),
    feature("version", "version", |case, dice, _| {
        case.set(
            "/ociVersion",
            *dice.one(&["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1"]),
        );
    }),
];

/// What a static program needs, with what the probe does but for mkdir and mount.
const ALLOWED: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "capget",
    "capset",
    "chdir",
    "chmod",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fchmodat",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpid",
    "getppid",
    "getrandom",
    "getrlimit",
    "gettid",
    "getuid",
    "ioctl",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "poll",
    "ppoll",
    "prctl",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "setgroups",
    "sigaltstack",
    "stat",
    "statx",
    "tgkill",
    "uname",
    "write",
    "writev",
];

fn without(case: &Case, kind: &str) -> Vec<Value> {
    let all = case
        .get("/linux/namespaces")
        .as_array()
        .cloned()
        .unwrap_or_default();
    all.into_iter().filter(|n| n["type"] != kind).collect()
}

fn join(case: &mut Case, kind: &str, places: &Places) {
    let file = match kind {
        "network" => "net",
        "pid" => "pid_for_children",
        other => other,
    };
    let mut list = without(case, kind);
    list.push(json!({"type": kind, "path": format!("/proc/{}/ns/{file}", places.neighbour)}));
    case.set("/linux/namespaces", list);
}

fn map(case: &mut Case, host: usize, size: usize) {
    case.push("/linux/namespaces", json!({"type": "user"}));
    let mapping = json!([{"containerID": 0, "hostID": host, "size": size}]);
    case.set("/linux/uidMappings", mapping.clone());
    case.set("/linux/gidMappings", mapping);
}

fn profile(case: &mut Case, dice: &mut Dice, syscalls: Value) {
    let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls});
    if dice.chance(2) {
        profile["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]);
    }
    if dice.chance(3) {
        profile["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG"]);
    }
    case.set("/linux/seccomp", profile);
}

/// A hook of the host that writes its name and the container's status.
fn logging(point: &str, places: &Places) -> Value {
    let script = format!(
        "echo {point} $(sed 's/.*\"status\": *\"\\([a-z]*\\)\".*/\\1/') $A >> {}",
        places.hook_log
    );
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b", "PATH=/usr/bin:/bin"]})
}

fn hooks(case: &mut Case, dice: &mut Dice, places: &Places) {
    for point in dice.some(&[
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ]) {
        let mut list = vec![logging(point, places)];
        if dice.chance(3) {
            list.push(logging("second", places));
        }
        case.set(&format!("/hooks/{point}"), list);
    }
    // Runs inside: the only program there is the probe.
    if dice.chance(2) {
        case.set(
            "/hooks/startContainer",
            json!([{"path": "/bin/probe",
            "args": ["probe", "drain", "/tmp/hook", "was here"]}]),
        );
        case.look("/tmp/hook");
    }
}
