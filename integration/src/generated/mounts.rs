//! Features of the mount table and the root: types, options, propagation, what is hidden.

use serde_json::{Value, json};

use super::{Case, Feature, feature};
use crate::crictl::Config;

/// Flags that any mount takes.
const FLAGS: [&str; 8] = [
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "sync",
    "nosymfollow",
];
const PROPAGATIONS: [&str; 8] = [
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
];

pub const FEATURES: &[Feature] = &[
    feature("tmpfs", "tmpfs", |case, dice, _| {
        let mut options = dice.some(&FLAGS[..6]);
        options.extend(dice.some(&["size=1m", "mode=0751", "nr_inodes=50", "uid=7", "gid=8"]));
        let target = *dice.one(&["/tmp", "/new/deep/dir", "/app/sub", "/link"]);
        case.mount(tmpfs(target, &options));
        case.look("/new");
    }),
    feature("two tmpfs, one in the other", "tmpfs", |case, _, _| {
        case.mount(tmpfs("/new", &["mode=0700"]));
        case.mount(tmpfs("/new/inner", &["size=64k"]));
    }),
    feature("copied up tmpfs", "tmpfs", |case, dice, _| {
        let mut options = vec!["tmpcopyup"];
        options.extend(dice.some(&["nosuid", "size=1m", "mode=0755"]));
        case.mount(tmpfs(["/etc", "/app"][dice.below(2)], &options));
        case.look("/etc/passwd");
        case.look("/app/sub");
    }),
    feature("propagation of a tmpfs", "tmpfs", |case, dice, _| {
        case.mount(tmpfs("/tmp", &[*dice.one(&PROPAGATIONS)]));
    }),
    feature("bind of a directory", "bind", |case, dice, places| {
        let mut options = vec![*dice.one(&["bind", "rbind"])];
        options.extend(dice.some(&FLAGS[..6]));
        let target = *dice.one(&["/mnt", "/app", "/new/deep/dir", "/link", "/etc"]);
        case.mount(bind(&format!("{}/tree", places.source), target, &options));
        case.look(&format!("{target}/inside"));
    }),
    feature("bind of a file", "bind", |case, dice, places| {
        let mut options = vec!["bind"];
        options.extend(dice.some(&FLAGS[..5]));
        let target = *dice.one(&["/mnt", "/etc/passwd", "/new/file", "/app/sub/file"]);
        case.mount(bind(&format!("{}/file", places.source), target, &options));
    }),
    feature("bind without a type", "bind", |case, dice, places| {
        let mut mount = bind(&format!("{}/tree", places.source), "/mnt", &["rbind", "ro"]);
        match dice.below(3) {
            0 => mount["type"] = json!("none"),
            1 => mount["type"] = json!(""),
            _ => {
                if let Some(map) = mount.as_object_mut() {
                    map.remove("type");
                }
            }
        }
        case.mount(mount);
    }),
    feature("propagation of a bind", "bind", |case, dice, places| {
        let options = ["rbind", *dice.one(&PROPAGATIONS)];
        case.mount(bind(&format!("{}/tree", places.source), "/mnt", &options));
    }),
    feature("bind over a mount below", "bind", |case, dice, places| {
        // `tree/mounted` is a tmpfs on the host: rbind brings it along, bind does not.
        let mut options = vec![*dice.one(&["bind", "rbind"])];
        options.extend(dice.some(&["ro", "nosuid", "noexec"]));
        case.mount(bind(&format!("{}/tree", places.source), "/mnt", &options));
        case.look("/mnt/mounted");
    }),
    feature("recursive flags", "bind", |case, dice, places| {
        let mut options = vec![
            "rbind",
            *dice.one(&["rro", "rnosuid", "rnodev", "rnoexec", "rnoatime"]),
        ];
        options.extend(dice.some(&["rnosuid", "rnodev"]));
        options.dedup();
        case.mount(bind(&format!("{}/tree", places.source), "/mnt", &options));
        case.look("/mnt/mounted");
    }),
    feature("flags cleared on a bind", "bind", |case, dice, places| {
        // The source is mounted nosuid,nodev,noexec on the host.
        let mut options = vec!["bind"];
        options.extend(dice.some(&["suid", "dev", "exec", "rw", "ro", "atime", "strictatime"]));
        let source = format!("{}/tree/mounted", places.source);
        case.mount(bind(&source, "/mnt", &options));
    }),
    feature("device node by a bind", "bind", |case, dice, _| {
        let target = *dice.one(&["/dev/fuse-of-mine", "/dev/null", "/app/zero"]);
        case.mount(bind("/dev/zero", target, &["bind"]));
    }),
    feature("read-only root", "root", |case, _, _| {
        case.set("/root/readonly", true)
    }),
    feature("read-only root with a tmpfs", "root", |case, _, _| {
        case.set("/root/readonly", true);
        case.mount(tmpfs("/new/dir", &[]));
    }),
    feature("propagation of the root", "root", |case, dice, _| {
        case.set("/linux/rootfsPropagation", *dice.one(&PROPAGATIONS));
    }),
    feature("masked paths", "masked", |case, dice, _| {
        let paths = dice.some(&[
            "/proc/kcore",
            "/proc/keys",
            "/proc/timer_list",
            "/proc/nosuch",
            "/sys/firmware",
            "/etc/passwd",
            "/app",
            "/link",
            "/tmp",
        ]);
        for path in &paths {
            case.look(path);
        }
        case.set("/linux/maskedPaths", paths);
    }),
    feature("read-only paths", "readonly", |case, dice, _| {
        let paths = dice.some(&[
            "/proc/sys",
            "/proc/bus",
            "/proc/nosuch",
            "/etc/passwd",
            "/app",
            "/tmp",
            "/dev",
        ]);
        for path in &paths {
            case.look(path);
        }
        case.set("/linux/readonlyPaths", paths);
    }),
    feature("nothing masked or read-only", "masked", |case, _, _| {
        case.set("/linux/maskedPaths", json!([]));
        case.set("/linux/readonlyPaths", json!([]));
        for path in ["/proc/sys", "/proc/keys", "/proc/sysrq-trigger"] {
            case.look(path);
        }
    }),
    feature("options of proc", "proc", |case, dice, _| {
        let options = dice.some(&["nosuid", "noexec", "nodev", "ro", "hidepid=2", "subset=pid"]);
        replace(case, "/proc", |mount| mount["options"] = json!(options));
        case.look("/proc/meminfo");
    }),
    feature("writable sysfs", "sys", |case, _, _| {
        replace(case, "/sys", |mount| {
            mount["options"] = json!(["nosuid", "noexec", "nodev"]);
        });
        case.look("/sys/kernel");
    }),
    feature("no sysfs", "sys", |case, _, _| {
        retain(case, |target| !target.starts_with("/sys"));
    }),
    feature("writable cgroups", "cgroup mount", |case, _, _| {
        replace(case, "/sys/fs/cgroup", |mount| {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "relatime"]);
        });
        case.look("/sys/fs/cgroup");
        case.look("/sys/fs/cgroup/memory");
    }),
    feature("no mount of cgroups", "cgroup mount", |case, _, _| {
        retain(case, |target| target != "/sys/fs/cgroup");
        case.look("/sys/fs/cgroup");
    }),
    feature("options of devpts", "devpts", |case, dice, _| {
        let mut options = vec!["newinstance"];
        options.extend(dice.some(&[
            "nosuid",
            "noexec",
            "ptmxmode=0600",
            "mode=0600",
            "gid=7",
            "max=5",
        ]));
        replace(case, "/dev/pts", |mount| mount["options"] = json!(options));
        case.look("/dev/pts");
        case.look("/dev/pts/ptmx");
    }),
    feature("no /dev", "dev", |case, _, _| {
        retain(case, |target| !target.starts_with("/dev"));
    }),
    feature("read-only /dev", "dev", |case, _, _| {
        replace(case, "/dev", |mount| {
            mount["options"] = json!(["nosuid", "ro", "mode=755", "size=64k"]);
        });
        case.look("/dev");
    }),
    feature("/dev by a bind", "dev", |case, _, places| {
        retain(case, |target| !target.starts_with("/dev"));
        case.push(
            "/mounts",
            bind(
                &format!("{}/dev", places.source),
                "/dev",
                &["rbind", "nosuid"],
            ),
        );
        case.look("/dev/null");
    }),
    feature("size of /dev/shm", "shm", |case, dice, _| {
        let size = format!("size={}k", 64 * (1 + dice.below(8)));
        replace(case, "/dev/shm", |mount| {
            mount["options"] = json!(["nosuid", "nodev", "mode=1777", size]);
        });
        case.look("/dev/shm");
    }),
    feature("overlay", "overlay", |case, _, places| {
        let s = &places.source;
        case.mount(
            json!({"destination": "/mnt", "type": "overlay", "source": "overlay",
            "options": [format!("lowerdir={s}/lower:{s}/tree")]}),
        );
        case.look("/mnt/inside");
    }),
    feature("ramfs", "overlay", |case, _, _| {
        case.mount(
            json!({"destination": "/mnt", "type": "ramfs", "source": "r",
            "options": ["mode=0700", "nosuid"]}),
        );
    }),
];

fn tmpfs(target: &str, options: &[&str]) -> Value {
    json!({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options})
}

fn bind(source: &str, target: &str, options: &[&str]) -> Value {
    json!({"destination": target, "type": "bind", "source": source, "options": options})
}

/// Changes the mount that the defaults have at `target`.
fn replace(case: &mut Case, target: &str, change: impl FnOnce(&mut Value)) {
    let mut mounts = case.get("/mounts").as_array().cloned().unwrap_or_default();
    if let Some(mount) = mounts.iter_mut().find(|m| m["destination"] == target) {
        change(mount);
    }
    case.set("/mounts", mounts);
}

fn retain(case: &mut Case, keep: impl Fn(&str) -> bool) {
    let mut mounts = case.get("/mounts").as_array().cloned().unwrap_or_default();
    mounts.retain(|m| keep(m["destination"].as_str().unwrap_or_default()));
    case.set("/mounts", mounts);
}

pub fn refused(base: &dyn Fn() -> Config) -> Vec<(&'static str, Config)> {
    let with = |mount: Value| base().push("/mounts", mount);
    vec![
        (
            "bind of nothing",
            with(bind("/no/such/source", "/mnt", &["bind"])),
        ),
        (
            "bind of a directory on a file",
            with(bind("/etc", "/etc/passwd", &["bind"])),
        ),
        (
            "bind of a file on a directory",
            with(bind("/etc/passwd", "/app", &["bind"])),
        ),
        (
            "mount without a target",
            with(json!({"type": "tmpfs", "source": "tmpfs"})),
        ),
        ("mount with a relative target", with(tmpfs("app", &[]))),
        (
            "unknown file system",
            with(json!({"destination": "/mnt", "type": "nosuchfs", "source": "x"})),
        ),
        ("unknown option", with(tmpfs("/mnt", &["nosuchoption"]))),
        ("tmpfs with a bad size", with(tmpfs("/mnt", &["size=much"]))),
        ("tmpfs on a file", with(tmpfs("/etc/passwd", &[]))),
        ("mount over /proc", with(tmpfs("/proc", &[]))),
        ("bind over /proc", with(bind("/etc", "/proc", &["bind"]))),
        ("mount inside /proc", with(tmpfs("/proc/bus", &[]))),
        (
            "bind on a file of /proc",
            with(bind("/etc/passwd", "/proc/uptime", &["bind"])),
        ),
        ("target with dots", with(tmpfs("/app/../../mnt", &[]))),
        ("no root", base().set("/root", Value::Null)),
        ("root that is not there", base().set("/root/path", "nosuch")),
        (
            "root that is a file",
            base().set("/root/path", "config.json"),
        ),
        ("root that is empty", base().set("/root/path", "")),
        (
            "root that is the host's",
            base().set("/root/path", "/nosuch/root"),
        ),
        (
            "unknown propagation",
            base().set("/linux/rootfsPropagation", "sideways"),
        ),
        (
            "copied up onto a file",
            with(tmpfs("/etc/passwd", &["tmpcopyup"])),
        ),
        (
            "copied up bind",
            with(bind("/etc", "/mnt", &["bind", "tmpcopyup"])),
        ),
        (
            "mapped mount without a user namespace",
            with(
                json!({"destination": "/mnt", "type": "bind", "source": "/etc", "options": ["bind"],
                "uidMappings": [{"containerID": 0, "hostID": 0, "size": 10}],
                "gidMappings": [{"containerID": 0, "hostID": 0, "size": 10}]}),
            ),
        ),
        (
            "masked path that is relative",
            base().set("/linux/maskedPaths", json!(["app"])),
        ),
        (
            "read-only path that is relative",
            base().set("/linux/readonlyPaths", json!(["app"])),
        ),
    ]
}
