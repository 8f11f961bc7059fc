//! What a process inside a container can find out about itself, as one JSON document. What
//! cannot be read is null, so that a missing /proc or /sys is visible and fails nothing.

use std::collections::BTreeMap;
use std::fs;

use nix::sched::CloneFlags;
use serde_json::{Value, json};

const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// What belongs to a namespace, so that a config may set it.
const SYSCTLS: [&str; 10] = [
    "fs/mqueue/msg_max",
    "fs/mqueue/queues_max",
    "kernel/domainname",
    "kernel/msgmax",
    "kernel/sem",
    "kernel/shm_rmid_forced",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/ping_group_range",
];

pub fn everything(paths: &[&str]) -> Value {
    // First of all, before any file is opened here.
    let fds = descriptors();
    let status = status();
    let field = |name: &str| status.get(name).cloned().map_or(Value::Null, Value::String);
    let ids = |name: &str| -> Value {
        status.get(name).map_or(Value::Null, |v| {
            v.split_whitespace()
                .filter_map(|n| n.parse::<u64>().ok())
                .collect()
        })
    };
    let mut seen = json!({
        "pid": std::process::id(),
        "ppid": std::os::unix::process::parent_id(),
        "args": std::env::args().collect::<Vec<_>>(),
        "uids": ids("Uid"),
        "gids": ids("Gid"),
        "groups": ids("Groups"),
        "capabilities": {
            "inheritable": field("CapInh"),
            "permitted": field("CapPrm"),
            "effective": field("CapEff"),
            "bounding": field("CapBnd"),
            "ambient": field("CapAmb"),
        },
        "seccomp": field("Seccomp"),
        "seccompFilters": field("Seccomp_filters"),
        "noNewPrivs": field("NoNewPrivs"),
        "umask": field("Umask"),
        "signals": {"blocked": field("SigBlk"), "ignored": field("SigIgn")},
        "nsPid": ids("NSpid"),
        "cpusAllowed": field("Cpus_allowed_list"),
        "cwd": std::env::current_dir().ok(),
        "env": std::env::vars().collect::<BTreeMap<_, _>>(),
        "hostname": hostname(),
        "domainname": read("/proc/sys/kernel/domainname"),
        "oomScoreAdj": read("/proc/self/oom_score_adj"),
        "cgroup": lines("/proc/self/cgroup"),
        "mounts": mounts(),
        "namespaces": namespaces(),
        "uidMap": lines("/proc/self/uid_map"),
        "gidMap": lines("/proc/self/gid_map"),
        "rlimits": rlimits(),
        "interfaces": interfaces(),
        "fds": fds,
        "apparmor": read("/proc/self/attr/apparmor/current"),
        "personality": read("/proc/self/personality"),
        "session": stat_field(5),
        "processGroup": stat_field(4),
        "ttyNr": stat_field(6),
        "devices": directory("/dev"),
        "root": directory("/"),
        "timensOffsets": lines("/proc/self/timens_offsets"),
    });
    seen["nodes"] = nodes("/dev");
    seen["nice"] = stat_field(18);
    seen["scheduling"] = stat_field(40);
    seen["sysctls"] = sysctls();
    seen["terminal"] = terminal().trim_end().into();
    seen["attempts"] = super::attempt::all();
    seen["paths"] = super::attempt::paths(paths);
    seen
}

pub fn hostname() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

fn read(path: &str) -> Value {
    fs::read_to_string(path).map_or(Value::Null, |s| Value::String(s.trim_end().to_owned()))
}

fn lines(path: &str) -> Value {
    fs::read_to_string(path).map_or(Value::Null, |s| {
        s.lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    })
}

fn status() -> BTreeMap<String, String> {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
        .collect()
}

/// Field `n` of /proc/self/stat, counted from zero; the name in parentheses may hold blanks.
fn stat_field(n: usize) -> Value {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let Some((_, after)) = text.rsplit_once(") ") else {
        return Value::Null;
    };
    after
        .split(' ')
        .nth(n - 2)
        .and_then(|v| v.parse::<i64>().ok())
        .map_or(Value::Null, Into::into)
}

fn directory(path: &str) -> Value {
    let Ok(entries) = fs::read_dir(path) else {
        return Value::Null;
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.into()
}

/// Everything directly below a directory, as `file` describes it.
fn nodes(path: &str) -> Value {
    let Ok(entries) = fs::read_dir(path) else {
        return Value::Null;
    };
    entries
        .flatten()
        .map(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            (name, super::attempt::description(&e.path()).into())
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn sysctls() -> Value {
    SYSCTLS
        .iter()
        .map(|name| ((*name).to_owned(), read(&format!("/proc/sys/{name}"))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn mounts() -> Value {
    let Ok(text) = fs::read_to_string("/proc/self/mountinfo") else {
        return Value::Null;
    };
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            Some(json!({
                "root": left.get(3)?,
                "target": left.get(4)?,
                "flags": left.get(5)?,
                "propagation": left[6..].join(" "),
                "type": right.first()?,
                "source": right.get(1)?,
                "options": right.get(2).unwrap_or(&""),
            }))
        })
        .collect()
}

fn namespaces() -> Value {
    NAMESPACES
        .iter()
        .map(|name| {
            let link = fs::read_link(format!("/proc/self/ns/{name}"));
            let inode = link.ok().map(|l| l.to_string_lossy().into_owned());
            ((*name).to_owned(), inode.map_or(Value::Null, Value::String))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn rlimits() -> Value {
    let Ok(text) = fs::read_to_string("/proc/self/limits") else {
        return Value::Null;
    };
    text.lines()
        .skip(1)
        .filter_map(|line| {
            // The name takes 25 columns and holds blanks; soft and hard limit follow.
            let name = line.get(..25)?.trim().to_owned();
            let mut rest = line.get(25..)?.split_whitespace();
            Some((name, json!([rest.next()?, rest.next()?])))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn interfaces() -> Value {
    let Ok(text) = fs::read_to_string("/proc/self/net/dev") else {
        return Value::Null;
    };
    let mut names: Vec<String> = text
        .lines()
        .skip(2)
        .filter_map(|l| l.split_once(':'))
        .map(|(name, _)| name.trim().to_owned())
        .collect();
    names.sort();
    names.into()
}

/// Open descriptors but the one that lists them.
fn descriptors() -> Value {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return Value::Null;
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let target = fs::read_link(entry.path())
                .ok()?
                .to_string_lossy()
                .into_owned();
            let fd = entry.file_name().to_string_lossy().into_owned();
            (!(target.starts_with("/proc/") && target.ends_with("/fd"))).then_some((fd, target))
        })
        .map(|(fd, target)| (fd, Value::String(target)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

pub fn terminal() -> String {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) => format!("{} rows, {} columns\n", size.ws_row, size.ws_col),
        Err(_) => "not a tty\n".to_owned(),
    }
}

pub fn unshare(kind: &str) -> anyhow::Result<u8> {
    let flag = match kind {
        "user" => CloneFlags::CLONE_NEWUSER,
        "net" => CloneFlags::CLONE_NEWNET,
        "mount" => CloneFlags::CLONE_NEWNS,
        "pid" => CloneFlags::CLONE_NEWPID,
        _ => anyhow::bail!("unknown namespace {kind}"),
    };
    match nix::sched::unshare(flag) {
        Ok(()) => {
            super::print("ok\n")?;
            Ok(0)
        }
        Err(errno) => {
            super::print(&format!("unshare {kind}: {errno:?}\n"))?;
            Ok(1)
        }
    }
}
