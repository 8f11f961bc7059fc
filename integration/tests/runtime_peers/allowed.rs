//! What may differ between coracle and Debian's runc 1.1.5 or crun 1.8.1, each with its reason.
//! An entry that no case needs any more is an error, so that the list cannot rot.

use super::Difference;

pub struct Allowed {
    pub peer: &'static str,
    /// A feature of the case, `""` for any.
    pub feature: &'static str,
    /// Every part that the difference must have.
    pub text: &'static [&'static str],
    pub why: &'static str,
}

impl Allowed {
    pub fn covers(&self, peer: &str, difference: &Difference) -> bool {
        self.peer == peer
            && (self.feature.is_empty() || difference.features.contains(&self.feature))
            && self.text.iter().all(|t| difference.text.contains(t))
    }
}

const fn allow(
    peer: &'static str,
    feature: &'static str,
    text: &'static [&'static str],
    why: &'static str,
) -> Allowed {
    Allowed {
        peer,
        feature,
        text,
        why,
    }
}

const MOUNT: &str = "/mounts: only";
const ONLY_OURS: &str = "/code: ours 0, theirs ";
const ONLY_THEIRS: &str = "/code: ours 1, theirs 0 ";

pub const ALLOWED: &[Allowed] = &[
    // --- runc 1.1.5: what newer releases do as coracle does
    allow(
        "runc",
        "time namespace",
        &[ONLY_OURS, "does not exist"],
        "came with runc 1.2",
    ),
    allow(
        "runc",
        "domain name",
        &["domainname: ours"],
        "came with runc 1.2",
    ),
    allow(
        "runc",
        "personality",
        &["/sees/personality: ours \"00000008\""],
        "came with runc 1.2",
    ),
    allow(
        "runc",
        "",
        &["seccomp flags are not yet supported"],
        "came with runc 1.1.6",
    ),
    allow(
        "runc",
        "cpu",
        &["/sys/fs/cgroup/cpu/cpu."],
        "cpu.idle came with runc 1.2",
    ),
    allow(
        "runc",
        "pids",
        &["pids.max/text: ours \"1\\n\""],
        "a limit of 0 is one process since runc 1.4",
    ),
    allow(
        "runc",
        "",
        &["/hooks: only", "poststart"],
        "runs at start, as the spec says, since runc 1.2",
    ),
    allow(
        "runc",
        "program that cannot run",
        &["/error: ours is a directory"],
        "the words are those of a newer Go",
    ),
    allow(
        "runc",
        "flags cleared on a bind",
        &[MOUNT, "\"target\":\"/mnt\""],
        "runc clears the source's flags since 1.2",
    ),
    allow(
        "runc",
        "propagation of the root",
        &[MOUNT, "\"target\":\"/\""],
        "a shared root stays shared since runc 1.2",
    ),
    allow(
        "runc",
        "tmpfs",
        &["/sees/paths//tmp/"],
        "mode and ro of a tmpfs over /tmp hold since runc 1.2",
    ),
    allow(
        "runc",
        "mount inside /proc",
        &[ONLY_THEIRS],
        "refused since runc 1.2",
    ),
    allow(
        "runc",
        "time offsets without their namespace",
        &[ONLY_THEIRS],
        "refused since runc 1.2",
    ),
    allow(
        "runc",
        "personality of an unknown domain",
        &[ONLY_THEIRS],
        "refused since runc 1.2",
    ),
    allow(
        "runc",
        "",
        &["/sees/paths//sys/fs/cgroup/is", "theirs \"directory 0555"],
        "the tmpfs above the hierarchies has mode 755 since runc 1.2",
    ),
    allow(
        "runc",
        "writable cgroups",
        &["/sees/paths//sys/fs/cgroup/write: ours \"ok\""],
        "follows from the mode of the tmpfs above the hierarchies",
    ),
    allow(
        "runc",
        "program that cannot run",
        &["/code: ours 255, theirs 1 ", "exec format error"],
        "a program that cannot be executed ends with 255 since runc 1.2",
    ),
    // --- runc of any age
    allow(
        "runc",
        "",
        &[MOUNT, "\"target\":\"/sys/fs/cgroup\",\"type\":\"tmpfs\""],
        "asked for read-only hierarchies, runc leaves the tmpfs above them writable",
    ),
    allow(
        "runc",
        "cgroup namespace",
        &["/sees/paths//sys/fs/cgroup/write: ours \"EROFS\""],
        "asked for read-only hierarchies, runc leaves the tmpfs above them writable",
    ),
    allow(
        "runc",
        "no mount of cgroups",
        &["/sees/paths//sys/fs/cgroup/write: ours \"EACCES\""],
        "sysfs is read-only by its mount here, by its superblock there: the mode is asked first",
    ),
    allow(
        "runc",
        "options of proc",
        &["/sees/paths//proc/meminfo/write"],
        "procfs is read-only by its mount here, by its superblock there: the mode is asked first",
    ),
    allow(
        "runc",
        "device",
        &[": ours ", "error reopening /dev/null inside container"],
        "runc opens its stdio at what the config has put in the place of /dev/null",
    ),
    allow(
        "runc",
        "the host's network",
        &[ONLY_OURS, "error mounting \\\"sysfs\\\""],
        "a user namespace that does not own the network cannot mount sysfs: the host's is bound",
    ),
    allow(
        "runc",
        "masked paths",
        &[MOUNT, "\"target\":\"/etc/passwd\""],
        "masked with the host's null device, which is checked, not with the container's",
    ),
    allow(
        "runc",
        "masked paths",
        &[MOUNT, "\"readOnly\":true", "\"type\":\"tmpfs\""],
        "the tmpfs over a masked directory has a limit of its size",
    ),
    allow(
        "runc",
        "no /dev",
        &[MOUNT, "/proc/"],
        "without a /dev runc masks with a plain file that it finds in its place",
    ),
    allow(
        "runc",
        "bind of a file",
        &["/sees/env/HOME"],
        "a passwd without the user leaves / as HOME, not nothing",
    ),
    allow(
        "runc",
        "",
        &["/left in the root/", "ours \"100644", "theirs \"100755"],
        "a file that is made to be mounted on need not be executable",
    ),
    allow(
        "runc",
        "user namespace with other ids",
        &["/nodes/mqueue"],
        "mounted before the ids of the namespace are taken",
    ),
    allow(
        "runc",
        "/dev by a bind",
        &["/hooks: ours null"],
        "both fail: the terminal is set up before the createContainer hooks",
    ),
    allow(
        "runc",
        "mappings without a user namespace",
        &[ONLY_THEIRS],
        "refused since runc 1.2",
    ),
    // --- crun 1.8.1: as runc above
    allow(
        "crun",
        "time namespace",
        &[ONLY_OURS],
        "crun 1.8.1 fails to join its second stage here",
    ),
    allow(
        "crun",
        "pids",
        &["pids.max/text: ours \"1\\n\""],
        "a limit of 0 is one process since runc 1.4",
    ),
    allow(
        "crun",
        "pids",
        &["ours 0, theirs 1", "writing file `pids.max`"],
        "-1 is `max` for every other field",
    ),
    allow(
        "crun",
        "",
        &[MOUNT, "\"target\":\"/sys/fs/cgroup\",\"type\":\"tmpfs\""],
        "asked for read-only hierarchies, crun leaves the tmpfs above them writable",
    ),
    allow(
        "crun",
        "cgroup namespace",
        &["/sees/paths//sys/fs/cgroup/write"],
        "asked for read-only hierarchies, crun leaves the tmpfs above them writable",
    ),
    allow(
        "crun",
        "",
        &["/sees/paths//sys/fs/cgroup/is", "theirs \"directory 1777"],
        "the tmpfs above the hierarchies has mode 755",
    ),
    allow(
        "crun",
        "",
        &["/sees/paths//sys/fs/cgroup/entries: only theirs \"net_"],
        "links of controllers that are not mounted",
    ),
    allow(
        "crun",
        "options of proc",
        &["/sees/paths//proc/meminfo/write"],
        "procfs is read-only by its mount here, by its superblock there: the mode is asked first",
    ),
    allow(
        "crun",
        "device",
        &[": ours ", "theirs 1 "],
        "crun opens its stdio at what the config has put in the place of /dev/null",
    ),
    allow(
        "crun",
        "seccomp without a default",
        &[ONLY_OURS],
        "an empty profile is none, as under runc",
    ),
    allow(
        "crun",
        "masked paths",
        &[MOUNT, "\"target\":\"/etc/passwd\""],
        "crun's null device over it is read-only",
    ),
    allow(
        "crun",
        "masked paths",
        &[MOUNT, "\"readOnly\":true", "\"type\":\"tmpfs\""],
        "the tmpfs over a masked directory has another limit of its size",
    ),
    allow(
        "crun",
        "",
        &["/sees/env/HOME: ours \"/\", theirs null"],
        "a passwd without the user leaves / as HOME, as under runc",
    ),
    allow(
        "crun",
        "",
        &["/left in the root/", "ours \"100644", "theirs \"100700"],
        "a file that is made to be mounted on",
    ),
    allow(
        "crun",
        "/dev by a bind",
        &["/hooks: ours null"],
        "both fail: the terminal is set up before the createContainer hooks",
    ),
    allow(
        "crun",
        "program that cannot run",
        &["/code: ours 255, theirs 1 ", "exec format error"],
        "a program that cannot be executed ends with 255 since runc 1.2",
    ),
    // --- crun 1.8.1: its own ways
    allow(
        "crun",
        "",
        &["only theirs \"core\""],
        "/dev/core even where there is no /proc/kcore",
    ),
    allow(
        "crun",
        "",
        &["/nodes/core: ours null"],
        "/dev/core even where there is no /proc/kcore",
    ),
    allow(
        "crun",
        "",
        &["/left in the root/dev/core"],
        "/dev/core even where there is no /proc/kcore",
    ),
    allow(
        "crun",
        "",
        &["/live/exec/sees/"],
        "crun's exec takes what is not given by flags from nowhere",
    ),
    allow(
        "crun",
        "",
        &["/live/exec when stopped: ours 255"],
        "exec fails with 255, as under runc",
    ),
    allow(
        "crun",
        "",
        &["/hooks: only ours", " creating "],
        "the status is `created` too early: the spec says creating",
    ),
    allow(
        "crun",
        "",
        &["/hooks: only theirs", " created "],
        "the status is `created` too early: the spec says creating",
    ),
    allow(
        "crun",
        "",
        &["/left in the root/", "ours \"40755", "theirs \"41755"],
        "sticky directories to mount on",
    ),
    allow(
        "crun",
        "",
        &[
            "/sees/paths//app/",
            "is: ours \"directory 0755",
            "theirs \"directory 1777",
        ],
        "a tmpfs without a mode has that of what it covers, as under runc",
    ),
    allow(
        "crun",
        "copied up tmpfs",
        &["/sees/paths//app/"],
        "a tmpfs without a mode has that of what it covers, as under runc",
    ),
    allow(
        "crun",
        "",
        &[MOUNT, "\"target\":\"/dev/", "\"type\":\"devtmpfs\""],
        "crun binds the host's nodes into a user namespace with flags that runc does not add",
    ),
    allow(
        "crun",
        "",
        &[MOUNT, "\"target\":\"/dev/console\""],
        "of the container's devpts, with its flags",
    ),
    allow(
        "crun",
        "/dev by a bind",
        &[MOUNT, "\"target\":\"/dev\""],
        "remounting into a user namespace drops the flags",
    ),
    allow(
        "crun",
        "options of proc",
        &[MOUNT, "\"target\":\"/proc/"],
        "a read-only path keeps the flags of procfs",
    ),
    allow(
        "crun",
        "propagation of a tmpfs",
        &[MOUNT, "\"target\":\"/tmp\""],
        "crun applies no propagation to it",
    ),
    allow(
        "crun",
        "propagation of a bind",
        &[MOUNT, "\"target\":\"/mnt"],
        "crun makes it private again",
    ),
    allow(
        "crun",
        "bind over a mount below",
        &[MOUNT, "\"target\":\"/mnt/mounted\""],
        "crun does not bind recursively into a user namespace",
    ),
    allow(
        "crun",
        "bind over a mount below",
        &["/sees/paths//mnt/mounted/"],
        "crun does not bind recursively into a user namespace",
    ),
    allow(
        "crun",
        "the host's network",
        &[MOUNT, "\"target\":\"/sys"],
        "both bind the host's sysfs: crun read-only all the way down, without the other flags",
    ),
    allow(
        "crun",
        "recursive flags",
        &[ONLY_OURS, "mount_setattr"],
        "crun takes rnoatime for no time at all",
    ),
    allow(
        "crun",
        "block io",
        &[ONLY_OURS, "blkio.weight"],
        "blkio.bfq.weight where there is no blkio.weight",
    ),
    allow(
        "crun",
        "version",
        &[ONLY_OURS, "unknown version"],
        "versions of the spec that came later",
    ),
    allow(
        "crun",
        "device rules",
        &["devices.list/text"],
        "order, and tun, which runc allows",
    ),
    allow(
        "crun",
        "path of the cgroup",
        &["/sees/cgroup: only"],
        "without a path, a child of the caller's cgroup in each hierarchy, as under runc",
    ),
    allow(
        "crun",
        "device outside /dev",
        &[ONLY_THEIRS, "read-only file system"],
        "a read-only mount that the node's path is below is read-only already, as under runc",
    ),
    allow(
        "crun",
        "flags cleared on a bind",
        &["ours 1, theirs 0 "],
        "a user namespace cannot clear the flags that the host has set, as under runc",
    ),
    allow(
        "crun",
        "",
        &["ours 1, theirs 255", "hook"],
        "a hook that fails is 1, as under runc",
    ),
    allow(
        "crun",
        "hook that fails",
        &["/hooks: only theirs", "stopped b"],
        "no hook runs after one that failed, as under runc",
    ),
    allow("crun", "no version", &[ONLY_OURS], "runc does not look"),
    allow(
        "crun",
        "version of another world",
        &[ONLY_OURS],
        "runc does not look",
    ),
    allow(
        "crun",
        "version that is none",
        &[ONLY_OURS],
        "runc does not look",
    ),
    allow(
        "crun",
        "hook that fails",
        &[ONLY_THEIRS],
        "a poststart hook that fails ends the container, as under runc",
    ),
    // --- crun 1.8.1: configs that it does not check
    allow(
        "crun",
        "copied up bind",
        &[ONLY_OURS],
        "runc ignores the option there",
    ),
    allow(
        "crun",
        "device without a path",
        &[ONLY_OURS],
        "runc takes it for a rule of the cgroup",
    ),
    allow(
        "crun",
        "argument with a NUL",
        &["theirs 2"],
        "crun runs what is before the NUL",
    ),
    allow(
        "crun",
        "environment with a NUL",
        &[ONLY_THEIRS],
        "crun takes what is before the NUL",
    ),
    allow(
        "crun",
        "environment without a value",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
    allow(
        "crun",
        "relative cwd",
        &[ONLY_THEIRS],
        "the spec says absolute",
    ),
    allow(
        "crun",
        "mount inside /proc",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
    allow(
        "crun",
        "mount over /proc",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
    allow("crun", "bind over /proc", &[ONLY_THEIRS], "runc refuses it"),
    allow(
        "crun",
        "rdma without its controller",
        &[ONLY_THEIRS],
        "a limit that was asked for and cannot be set",
    ),
    allow(
        "crun",
        "intelRdt where there is none",
        &[ONLY_THEIRS],
        "a limit that was asked for and cannot be set",
    ),
    allow(
        "crun",
        "swappiness too large",
        &[ONLY_THEIRS],
        "the range is 0 to 100",
    ),
    allow(
        "crun",
        "seccomp that asks nobody",
        &[ONLY_THEIRS],
        "nobody would ever answer",
    ),
    allow(
        "crun",
        "namespace given twice",
        &[ONLY_THEIRS],
        "the spec forbids it",
    ),
    allow(
        "crun",
        "uid is a word",
        &[ONLY_THEIRS],
        "the spec says a number",
    ),
    allow(
        "crun",
        "device of an unknown kind",
        &[ONLY_THEIRS],
        "the spec lists the kinds",
    ),
    allow(
        "crun",
        "unknown propagation",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
    allow(
        "crun",
        "time offsets without their namespace",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
    allow(
        "crun",
        "mappings without a user namespace",
        &[ONLY_THEIRS],
        "runc refuses it",
    ),
];
