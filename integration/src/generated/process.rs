//! Features of `process`: who it is, what it may do, what it starts with.

use serde_json::{Value, json};

use super::{Case, Dice, Feature, Places, feature};
use crate::crictl::Config;

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_SYS_ADMIN",
    "CAP_AUDIT_WRITE",
    "CAP_MKNOD",
];

pub const FEATURES: &[Feature] = &[
    feature("plain", "plain", |_, _, _| {}),
    feature("user", "user", user),
    feature("user by number only", "user", |case, _, _| {
        case.set("/process/user", json!({"uid": 1000}));
    }),
    feature("groups", "user", |case, dice, _| {
        let groups = dice.some(&[0, 1, 5, 7, 1000, 1001, 65534, 7]);
        case.set(
            "/process/user",
            json!({"uid": 0, "gid": 0, "additionalGids": groups}),
        );
    }),
    feature("umask", "umask", |case, dice, _| {
        let mask = *dice.one(&[0, 0o002, 0o022, 0o027, 0o077, 0o777]);
        case.set("/process/user/umask", mask);
    }),
    feature("capability sets", "capabilities", capabilities),
    feature("no capability sets", "capabilities", |case, _, _| {
        case.set("/process/capabilities", Value::Null);
    }),
    feature("ambient capabilities", "capabilities", |case, dice, _| {
        let set = dice.some(&CAPABILITIES);
        case.set(
            "/process/capabilities",
            json!({"bounding": set, "effective": set, "permitted": set,
                   "inheritable": set, "ambient": set}),
        );
        case.set("/process/user", json!({"uid": 1000, "gid": 1000}));
    }),
    feature("unknown capability", "capabilities", |case, _, _| {
        let set = json!(["CAP_CHOWN", "CAP_NO_SUCH"]);
        case.set(
            "/process/capabilities",
            json!({"bounding": set, "effective": set, "permitted": set}),
        );
    }),
    feature("limits", "limits", limits),
    feature("no limits", "limits", |case, _, _| {
        case.set("/process/rlimits", Value::Null);
    }),
    feature("environment", "environment", environment),
    feature("no environment", "environment", |case, _, _| {
        case.set("/process/env", json!([]));
    }),
    feature("working directory", "cwd", |case, dice, _| {
        let cwd = *dice.one(&[
            "/app",
            "/app/sub",
            "/link",
            "/tmp",
            "/not/there/yet",
            "/proc",
        ]);
        case.set("/process/cwd", cwd);
        case.look("/not/there/yet");
        case.look("/not");
    }),
    feature("new privileges", "privileges", |case, _, _| {
        case.set("/process/noNewPrivileges", false);
    }),
    feature("oom score", "oom", |case, dice, _| {
        case.set("/process/oomScoreAdj", *dice.one(&[0, 1, 100, 999, 1000]));
    }),
    feature("terminal", "terminal", |case, _, _| {
        case.set("/process/terminal", true);
        case.terminal = true;
        case.look("/dev/console");
    }),
    feature("terminal with a size", "terminal", |case, dice, _| {
        case.set("/process/terminal", true);
        let (height, width) = (20 + dice.below(30), 60 + dice.below(100));
        case.set(
            "/process/consoleSize",
            json!({"height": height, "width": width}),
        );
        case.terminal = true;
    }),
    feature("terminal of a user", "terminal", |case, _, _| {
        case.set("/process/terminal", true);
        case.set("/process/user", json!({"uid": 1000, "gid": 1000}));
        case.terminal = true;
        case.look("/dev/console");
        case.look("/dev/pts/0");
    }),
    feature("exit code", "program", |case, dice, _| {
        let code = dice.below(256).to_string();
        case.set("/process/args", json!(["/bin/probe", "exit", code]));
    }),
    feature("program by its name", "program", |case, _, _| {
        case.set(
            "/process/env",
            json!(["PATH=/nowhere:/bin:/usr/bin", "A=b"]),
        );
        case.set("/process/args", json!(["probe", "show"]));
    }),
    feature("program that is not there", "program", |case, dice, _| {
        let program = *dice.one(&["nosuch", "/nosuch", "/bin/nosuch", "./probe", "bin/probe"]);
        case.set("/process/args", json!([program, "show"]));
    }),
    feature("program that cannot run", "program", |case, dice, _| {
        let program = *dice.one(&[
            "/app",
            "/etc/passwd",
            "/bin/script",
            "/bin/empty",
            "app",
            "",
        ]);
        case.set("/process/args", json!([program]));
    }),
];

fn user(case: &mut Case, dice: &mut Dice, _: &Places) {
    let mut user = json!({"uid": *dice.one(&[0, 1, 1000, 65534, 4242]),
                          "gid": *dice.one(&[0, 1, 1001, 65534])});
    let groups = dice.some(&[0, 7, 8, 2000]);
    if !groups.is_empty() {
        user["additionalGids"] = json!(groups);
    }
    case.set("/process/user", user);
}

fn capabilities(case: &mut Case, dice: &mut Dice, _: &Places) {
    let bounding = dice.some(&CAPABILITIES);
    let permitted = if dice.chance(3) {
        dice.some(&bounding)
    } else {
        bounding.clone()
    };
    let effective = dice.some(&permitted);
    let mut sets = json!({
        "bounding": bounding, "permitted": permitted, "effective": effective,
    });
    if dice.chance(2) {
        let inheritable = dice.some(&permitted);
        sets["ambient"] = json!(dice.some(&inheritable));
        sets["inheritable"] = json!(inheritable);
    }
    case.set("/process/capabilities", sets);
    if dice.chance(2) {
        case.set("/process/user", json!({"uid": 1000, "gid": 1000}));
    }
}

fn limits(case: &mut Case, dice: &mut Dice, _: &Places) {
    let kinds = [
        "RLIMIT_CORE",
        "RLIMIT_CPU",
        "RLIMIT_DATA",
        "RLIMIT_FSIZE",
        "RLIMIT_LOCKS",
        "RLIMIT_MSGQUEUE",
        "RLIMIT_NOFILE",
        "RLIMIT_NPROC",
        "RLIMIT_RSS",
        "RLIMIT_SIGPENDING",
        "RLIMIT_STACK",
    ];
    let mut list = Vec::new();
    for kind in dice.some(&kinds) {
        // Enough for the probe to run.
        let hard = match kind {
            "RLIMIT_STACK" | "RLIMIT_FSIZE" => 8 << 20,
            // runc's init has its limits already when it is not done yet.
            "RLIMIT_DATA" => 4 << 30,
            _ => 200 + dice.below(300),
        };
        let soft = hard - dice.below(100);
        list.push(json!({"type": kind, "hard": hard, "soft": soft}));
    }
    case.set("/process/rlimits", list);
}

fn environment(case: &mut Case, dice: &mut Dice, _: &Places) {
    let words = [
        "PATH=/bin",
        "A=1",
        "A=2",
        "EMPTY=",
        "SPACES= a  b ",
        "HOME=/app",
        "EQUALS=a=b=c",
        "UNICODE=grüße",
        "container=coracle",
        "LISTEN_PID=7",
        "_LIBCONTAINER_X=1",
    ];
    case.set("/process/env", dice.some(&words));
    if dice.chance(2) {
        case.set("/process/user/uid", 1000);
    }
}

/// Flags that runc and crun both know.
pub fn exec_flags(dice: &mut Dice) -> Vec<String> {
    let flags: &[&str] = match dice.below(7) {
        0 => &["--user", "1000:1000"],
        1 => &["--cwd", "/app"],
        2 => &["--env", "A=b", "--env", "C="],
        3 => &["--cap", "CAP_NET_ADMIN"],
        4 => &["--user", "4242", "--cwd", "/tmp", "--env", "HOME=/x"],
        5 => &["--no-new-privs"],
        _ => &[],
    };
    flags.iter().map(|f| (*f).to_owned()).collect()
}

pub fn refused(base: &dyn Fn() -> Config) -> Vec<(&'static str, Config)> {
    let limit = |list: Value| base().set("/process/rlimits", list);
    vec![
        ("no arguments", base().set("/process/args", json!([]))),
        ("no process", base().set("/process", Value::Null)),
        ("relative cwd", base().set("/process/cwd", "app")),
        ("empty cwd", base().set("/process/cwd", "")),
        ("cwd is a file", base().set("/process/cwd", "/etc/passwd")),
        (
            "limit of an unknown kind",
            limit(json!([{"type": "RLIMIT_NONE", "hard": 1, "soft": 1}])),
        ),
        (
            "soft limit above hard",
            limit(json!([{"type": "RLIMIT_NOFILE", "hard": 100, "soft": 200}])),
        ),
        (
            "limit given twice",
            limit(json!([{"type": "RLIMIT_NOFILE", "hard": 100, "soft": 100},
                         {"type": "RLIMIT_NOFILE", "hard": 200, "soft": 200}])),
        ),
        (
            "hard limit above the caller's",
            limit(json!([{"type": "RLIMIT_NOFILE", "hard": 900_000, "soft": 100}])),
        ),
        (
            "environment without a value",
            base().set("/process/env", json!(["PATH=/bin", "NOVALUE"])),
        ),
        (
            "environment with a NUL",
            base().set("/process/env", json!(["PATH=/bin", "A=b\u{0}c"])),
        ),
        (
            "argument with a NUL",
            base().set("/process/args", json!(["/bin/probe", "a\u{0}b"])),
        ),
        ("negative uid", base().set("/process/user/uid", -1)),
        ("uid is a word", base().set("/process/user/uid", "root")),
        (
            "uid out of range",
            base().set("/process/user/uid", 1u64 << 33),
        ),
        (
            "oom score too large",
            base().set("/process/oomScoreAdj", 5000),
        ),
        (
            "AppArmor profile where there is no AppArmor",
            base().set("/process/apparmorProfile", "nosuch"),
        ),
        (
            "SELinux label where there is no SELinux",
            base().set("/process/selinuxLabel", "system_u:system_r:svirt_t:s0"),
        ),
        (
            "console size without a terminal",
            base().set("/process/consoleSize", json!({"height": 1, "width": 1})),
        ),
    ]
}
