//! fstab-style mount options to flags and attributes, as runc reads them. Pure.
//!
//! Three families share one option list: superblock and mount flags, propagation, and options that
//! only the filesystem understands. Clears ("rw", "dev", ...) are kept apart from "not said": a
//! bind mount has its source's flags unless the config speaks.

use libc::{
    MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME,
    MOUNT_ATTR_STRICTATIME,
};

/// The mask of the three atime modes, which the kernel wants cleared as one.
const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;

/// Linux 5.10; not in libc.
pub const MS_NOSYMFOLLOW: u64 = 256;

/// mount(2)'s names for the atime modes: more of them, and none of them a plain bit.
const MS_ATIME_MODES: u64 = libc::MS_NOATIME | libc::MS_RELATIME | libc::MS_STRICTATIME;

/// All that says when an access time is written.
pub const MS_ATIME: u64 = MS_ATIME_MODES | libc::MS_NODIRATIME;

/// What a mount keeps locked when a user namespace takes it over (the kernel's MNT_LOCK_*).
pub const MS_LOCKABLE: u64 =
    libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | MS_ATIME;

/// The flags that are attributes of one mount, one bit each.
const PLAIN: [(u64, u64); 6] = [
    (libc::MS_RDONLY, MOUNT_ATTR_RDONLY),
    (libc::MS_NOSUID, MOUNT_ATTR_NOSUID),
    (libc::MS_NODEV, MOUNT_ATTR_NODEV),
    (libc::MS_NOEXEC, MOUNT_ATTR_NOEXEC),
    (libc::MS_NODIRATIME, MOUNT_ATTR_NODIRATIME),
    (MS_NOSYMFOLLOW, MOUNT_ATTR_NOSYMFOLLOW),
];

/// Attributes to set and clear on a mount, as mount_setattr(2) takes them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
}

impl Attributes {
    pub fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }

    fn turn_on(&mut self, flag: u64) {
        self.set |= flag;
        self.clear &= !flag;
    }

    fn turn_off(&mut self, flag: u64) {
        self.clear |= flag;
        self.set &= !flag;
    }

    /// The atime modes are an enumeration, not bits (RELATIME is 0): a choice replaces the field.
    fn choose_atime(&mut self, mode: u64) {
        self.set = (self.set & !ATIME_MASK) | mode;
        self.clear |= ATIME_MASK;
    }

    /// "ratime" and its like: not that mode but the default, unless another one was chosen.
    fn drop_atime(&mut self, mode: u64) {
        let chosen = match self.set & ATIME_MASK {
            set if set == mode => MOUNT_ATTR_RELATIME,
            other => other,
        };
        self.choose_atime(chosen);
    }
}

/// A parsed option list.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    /// The MS_* flags that are asked for.
    pub flags: u64,
    /// The MS_* flags that are asked to be off ("rw", "dev", ...).
    pub cleared: u64,
    /// "rro" and its like: for the whole tree.
    pub recursive_attributes: Attributes,
    /// MS_SHARED and its like with or without MS_REC, in the order given.
    pub propagation: Vec<u64>,
    pub copy_up: bool,
    /// Some(recursive) when "idmap" or "ridmap" is asked for.
    pub idmap: Option<bool>,
    /// What is left for the filesystem, in order.
    pub data: Vec<String>,
}

/// Sorts one option list.
pub fn parse(options: &[String]) -> Options {
    let mut parsed = Options::default();
    for option in options {
        if let Some((flag, on)) = flag(option) {
            parsed.flag(flag, on);
            continue;
        }
        if let Some(propagation) = propagation(option) {
            parsed.propagation.push(propagation);
            continue;
        }
        match option.as_str() {
            "" | "defaults" => {}
            "tmpcopyup" => parsed.copy_up = true,
            "idmap" => parsed.idmap = Some(false),
            "ridmap" => parsed.idmap = Some(true),
            _ => {
                if !recursive(&mut parsed.recursive_attributes, option) {
                    parsed.data.push(option.clone());
                }
            }
        }
    }
    parsed
}

impl Options {
    fn flag(&mut self, flag: u64, on: bool) {
        if on {
            self.flags |= flag;
            self.cleared &= !flag;
        } else {
            self.cleared |= flag;
            self.flags &= !flag;
        }
    }

    pub fn is_bind(&self) -> bool {
        self.flags & libc::MS_BIND != 0
    }

    pub fn is_recursive(&self) -> bool {
        self.flags & libc::MS_REC != 0
    }

    pub fn is_remount(&self) -> bool {
        self.flags & libc::MS_REMOUNT != 0
    }

    /// What a bind mount changes of its source's flags; None where no option names any.
    pub fn change(&self) -> Option<FlagChange> {
        let named = self.flags & !(libc::MS_BIND | libc::MS_REC | libc::MS_REMOUNT);
        (named != 0 || self.cleared != 0).then_some(FlagChange {
            flags: named,
            cleared: self.cleared,
        })
    }

    /// The attributes of a mount of a new filesystem.
    pub fn attributes(&self) -> Attributes {
        let mut attributes = Attributes {
            set: plain(self.flags),
            clear: 0,
        };
        if self.flags & MS_ATIME_MODES != 0 {
            attributes.choose_atime(atime_mode(self.flags));
        }
        attributes
    }

    /// fsconfig(2)'s names of the flags that are the superblock's.
    pub fn superblock(&self) -> impl Iterator<Item = &'static std::ffi::CStr> {
        const NAMES: [(u64, &std::ffi::CStr); 4] = [
            (libc::MS_SYNCHRONOUS, c"sync"),
            (libc::MS_DIRSYNC, c"dirsync"),
            (libc::MS_LAZYTIME, c"lazytime"),
            (libc::MS_MANDLOCK, c"mand"),
        ];
        let flags = self.flags;
        NAMES
            .into_iter()
            .filter(move |(flag, _)| flags & flag != 0)
            .map(|(_, name)| name)
    }
}

/// Flags that a bind mount asks for and asks to be off, MS_* both.
///
/// A bind mount that names any flag names all: what its source has beside is cleared, as
/// "mount --bind -o" means it. What a user namespace keeps locked stays, unless the config asks for
/// its very opposite: that is refused, and never granted by another way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlagChange {
    pub flags: u64,
    pub cleared: u64,
}

impl FlagChange {
    /// As mount(2) reads MS_REMOUNT|MS_BIND with these flags and `kept` besides. Access times stay
    /// as they are while no flag speaks of them; "atime" and "norelatime" speak of none.
    pub fn attributes(self, kept: u64) -> Attributes {
        let flags = self.flags | kept;
        let all = PLAIN.iter().fold(0, |all, (_, attribute)| all | attribute);
        let set = plain(flags);
        let mut attributes = Attributes {
            set,
            clear: all & !set,
        };
        if flags & MS_ATIME == 0 {
            attributes.clear &= !MOUNT_ATTR_NODIRATIME;
        } else {
            attributes.choose_atime(atime_mode(flags));
        }
        attributes
    }

    /// Why this cannot be had of a source that holds its flags locked; None where it can.
    pub fn refusal(self, source: u64) -> Option<String> {
        let locked = source & self.cleared & MS_LOCKABLE;
        if locked != 0 {
            return Some(format!("cannot clear locked flags {}", names(locked)));
        }
        // The kernel takes a choice of two atime modes for one of them, and says nothing.
        let atime = source & MS_ATIME;
        if self.flags & MS_ATIME != 0 && self.flags & MS_ATIME != atime {
            return Some(format!("cannot change locked atime flags {}", names(atime)));
        }
        None
    }
}

fn plain(flags: u64) -> u64 {
    PLAIN
        .iter()
        .filter(|(flag, _)| flags & flag != 0)
        .fold(0, |set, (_, attribute)| set | attribute)
}

/// The one mode that mount(2) makes of what may be several flags.
fn atime_mode(flags: u64) -> u64 {
    if flags & libc::MS_STRICTATIME != 0 {
        MOUNT_ATTR_STRICTATIME
    } else if flags & libc::MS_NOATIME != 0 {
        MOUNT_ATTR_NOATIME
    } else {
        MOUNT_ATTR_RELATIME
    }
}

/// The flags' names, for messages.
fn names(flags: u64) -> String {
    const NAMES: [(u64, &str); 8] = [
        (libc::MS_RDONLY, "MS_RDONLY"),
        (libc::MS_NOSUID, "MS_NOSUID"),
        (libc::MS_NODEV, "MS_NODEV"),
        (libc::MS_NOEXEC, "MS_NOEXEC"),
        (libc::MS_NOATIME, "MS_NOATIME"),
        (libc::MS_NODIRATIME, "MS_NODIRATIME"),
        (libc::MS_RELATIME, "MS_RELATIME"),
        (libc::MS_STRICTATIME, "MS_STRICTATIME"),
    ];
    let named: Vec<&str> = NAMES
        .into_iter()
        .filter(|(flag, _)| flags & flag != 0)
        .map(|(_, name)| name)
        .collect();
    named.join("|")
}

/// A mount flag, and whether the option sets or clears it. "acl" is none: to MS_POSIXACL it does
/// not map, and a filesystem that knows it takes it as its own.
fn flag(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "async" => (libc::MS_SYNCHRONOUS, false),
        "atime" => (libc::MS_NOATIME, false),
        "bind" => (libc::MS_BIND, true),
        "dev" => (libc::MS_NODEV, false),
        "diratime" => (libc::MS_NODIRATIME, false),
        "dirsync" => (libc::MS_DIRSYNC, true),
        "exec" => (libc::MS_NOEXEC, false),
        "iversion" => (libc::MS_I_VERSION, true),
        "lazytime" => (libc::MS_LAZYTIME, true),
        "loud" => (libc::MS_SILENT, false),
        "mand" => (libc::MS_MANDLOCK, true),
        "noatime" => (libc::MS_NOATIME, true),
        "nodev" => (libc::MS_NODEV, true),
        "nodiratime" => (libc::MS_NODIRATIME, true),
        "noexec" => (libc::MS_NOEXEC, true),
        "noiversion" => (libc::MS_I_VERSION, false),
        "nolazytime" => (libc::MS_LAZYTIME, false),
        "nomand" => (libc::MS_MANDLOCK, false),
        "norelatime" => (libc::MS_RELATIME, false),
        "nostrictatime" => (libc::MS_STRICTATIME, false),
        "nosuid" => (libc::MS_NOSUID, true),
        "nosymfollow" => (MS_NOSYMFOLLOW, true),
        "rbind" => (libc::MS_BIND | libc::MS_REC, true),
        "relatime" => (libc::MS_RELATIME, true),
        "remount" => (libc::MS_REMOUNT, true),
        "ro" => (libc::MS_RDONLY, true),
        "rw" => (libc::MS_RDONLY, false),
        "silent" => (libc::MS_SILENT, true),
        "strictatime" => (libc::MS_STRICTATIME, true),
        "suid" => (libc::MS_NOSUID, false),
        "symfollow" => (MS_NOSYMFOLLOW, false),
        "sync" => (libc::MS_SYNCHRONOUS, true),
        _ => return None,
    })
}

/// Applies one option for a whole tree; false if it is none.
fn recursive(attributes: &mut Attributes, option: &str) -> bool {
    let (flag, on) = match option {
        "rro" => (MOUNT_ATTR_RDONLY, true),
        "rrw" => (MOUNT_ATTR_RDONLY, false),
        "rnosuid" => (MOUNT_ATTR_NOSUID, true),
        "rsuid" => (MOUNT_ATTR_NOSUID, false),
        "rnodev" => (MOUNT_ATTR_NODEV, true),
        "rdev" => (MOUNT_ATTR_NODEV, false),
        "rnoexec" => (MOUNT_ATTR_NOEXEC, true),
        "rexec" => (MOUNT_ATTR_NOEXEC, false),
        "rnodiratime" => (MOUNT_ATTR_NODIRATIME, true),
        "rdiratime" => (MOUNT_ATTR_NODIRATIME, false),
        "rnosymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, true),
        "rsymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, false),
        "rrelatime" => (MOUNT_ATTR_RELATIME, true),
        "rnorelatime" => (MOUNT_ATTR_RELATIME, false),
        "rnoatime" => (MOUNT_ATTR_NOATIME, true),
        "ratime" => (MOUNT_ATTR_NOATIME, false),
        "rstrictatime" => (MOUNT_ATTR_STRICTATIME, true),
        "rnostrictatime" => (MOUNT_ATTR_STRICTATIME, false),
        _ => return false,
    };
    let mode = flag & !ATIME_MASK == 0;
    match (mode, on) {
        (true, true) => attributes.choose_atime(flag),
        (true, false) => attributes.drop_atime(flag),
        (false, true) => attributes.turn_on(flag),
        (false, false) => attributes.turn_off(flag),
    }
    true
}

/// The propagation that an option, or `linux.rootfsPropagation`, names.
pub fn propagation(option: &str) -> Option<u64> {
    let (name, recursive) = match option.strip_prefix('r') {
        Some(name) => (name, libc::MS_REC),
        None => (option, 0),
    };
    let flag = match name {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &[&str]) -> Options {
        parse(&list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn new_mounts_attribute_table() {
        let cases: &[(&[&str], u64, u64)] = &[
            (&[], 0, 0),
            (&["ro"], MOUNT_ATTR_RDONLY, 0),
            (&["ro", "rw", "sync"], 0, 0),
            (
                &["nosuid", "noexec", "nodev"],
                MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV,
                0,
            ),
            (&["nosuid", "suid", "dev", "exec", "atime"], 0, 0),
            (&["relatime"], MOUNT_ATTR_RELATIME, ATIME_MASK),
            (&["noatime"], MOUNT_ATTR_NOATIME, ATIME_MASK),
            (
                &["noatime", "strictatime"],
                MOUNT_ATTR_STRICTATIME,
                ATIME_MASK,
            ),
        ];
        for (list, set, clear) in cases {
            let parsed = of(list);
            let want = Attributes {
                set: *set,
                clear: *clear,
            };
            assert_eq!(parsed.attributes(), want, "{list:?}");
            assert!(
                parsed.data.is_empty() && parsed.recursive_attributes.is_empty(),
                "{list:?}"
            );
        }
    }

    #[test]
    fn bind_change_table() {
        let plain = MOUNT_ATTR_RDONLY
            | MOUNT_ATTR_NOSUID
            | MOUNT_ATTR_NODEV
            | MOUNT_ATTR_NOEXEC
            | MOUNT_ATTR_NOSYMFOLLOW;
        let cases: &[(&[&str], u64, u64)] = &[
            (&["bind", "dev"], 0, plain),
            (
                &["bind", "ro"],
                MOUNT_ATTR_RDONLY,
                plain & !MOUNT_ATTR_RDONLY,
            ),
            // Says nothing of access times.
            (&["bind", "atime", "norelatime", "nostrictatime"], 0, plain),
            (
                &["bind", "relatime"],
                0,
                plain | ATIME_MASK | MOUNT_ATTR_NODIRATIME,
            ),
            (
                &["bind", "nodiratime"],
                MOUNT_ATTR_NODIRATIME,
                plain | ATIME_MASK,
            ),
            (
                &["bind", "nodiratime", "strictatime"],
                MOUNT_ATTR_NODIRATIME | MOUNT_ATTR_STRICTATIME,
                plain | ATIME_MASK,
            ),
        ];
        for (list, set, clear) in cases {
            let change = of(list).change().unwrap();
            let want = Attributes {
                set: *set,
                clear: *clear,
            };
            assert_eq!(change.attributes(0), want, "{list:?}");
        }
        assert_eq!(of(&["rbind", "rprivate", "rro", "remount"]).change(), None);
    }

    #[test]
    fn locked_flags_stay_or_refuse() {
        use libc::{MS_NOATIME, MS_NODEV, MS_NODIRATIME, MS_RDONLY, MS_RELATIME, MS_STRICTATIME};
        let cases: &[(&[&str], u64, Option<&str>)] = &[
            (&["rw"], MS_RDONLY | MS_RELATIME, Some("MS_RDONLY")),
            (&["dev"], MS_NODEV | MS_RELATIME, Some("MS_NODEV")),
            (&["nosuid"], MS_RDONLY | MS_RELATIME, None),
            (&["rw"], MS_NODEV | MS_RELATIME, None),
            (&["relatime"], MS_NOATIME, Some("MS_NOATIME")),
            (&["strictatime"], MS_RELATIME, Some("MS_RELATIME")),
            (&["nodiratime"], MS_STRICTATIME, Some("MS_STRICTATIME")),
            (&["noatime", "nodiratime"], MS_NOATIME | MS_NODIRATIME, None),
            (&["symfollow"], MS_NOSYMFOLLOW | MS_RELATIME, None),
        ];
        for (list, source, refused) in cases {
            let change = of(list).change().unwrap();
            let refusal = change.refusal(*source);
            assert_eq!(refusal.is_some(), refused.is_some(), "{list:?} {refusal:?}");
            if let (Some(refusal), Some(name)) = (refusal, refused) {
                assert!(refusal.contains(name), "{refusal}");
            }
        }
        let kept = of(&["nosuid"]).change().unwrap();
        let kept = kept.attributes(MS_RDONLY | MS_NOATIME);
        assert_eq!(
            kept.set,
            MOUNT_ATTR_NOSUID | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOATIME
        );
    }

    #[test]
    fn recursive_attributes_are_apart() {
        let parsed = of(&["rbind", "rro", "rnosuid", "rnoatime", "rsuid"]);
        assert!(parsed.is_bind() && parsed.is_recursive());
        assert_eq!(parsed.change(), None);
        assert_eq!(
            parsed.recursive_attributes.set,
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOATIME
        );
        assert_eq!(
            parsed.recursive_attributes.clear,
            MOUNT_ATTR_NOSUID | ATIME_MASK
        );
        for (list, mode) in [
            (&["rrelatime"][..], 0),
            (&["ratime"], 0),
            (&["rnoatime", "ratime"], 0),
            (&["rnoatime", "rnostrictatime"], MOUNT_ATTR_NOATIME),
            (&["rnoatime", "rstrictatime"], MOUNT_ATTR_STRICTATIME),
        ] {
            let attributes = of(list).recursive_attributes;
            assert_eq!(attributes.set, mode, "{list:?}");
            assert_eq!(attributes.clear, ATIME_MASK, "{list:?}");
        }
    }

    #[test]
    fn the_rest_is_data_in_order() {
        let parsed = of(&[
            "mode=755",
            "ro",
            "size=64k",
            "tmpcopyup",
            "rprivate",
            "sync",
            "nolazytime",
            "acl",
        ]);
        assert_eq!(parsed.data, ["mode=755", "size=64k", "acl"]);
        assert_eq!(parsed.propagation, [libc::MS_PRIVATE | libc::MS_REC]);
        assert_eq!(parsed.superblock().collect::<Vec<_>>(), [c"sync"]);
        assert!(parsed.copy_up);
    }

    #[test]
    fn idmap_and_remount() {
        assert_eq!(of(&["idmap"]).idmap, Some(false));
        assert_eq!(of(&["ridmap"]).idmap, Some(true));
        assert!(of(&["remount"]).is_remount());
    }

    #[test]
    fn flags_are_those_of_mount() {
        assert_eq!(
            of(&["ro", "nosuid", "noatime", "sync", "rbind"]).flags,
            libc::MS_RDONLY
                | libc::MS_NOSUID
                | libc::MS_NOATIME
                | libc::MS_SYNCHRONOUS
                | libc::MS_BIND
                | libc::MS_REC
        );
        let off = of(&["noatime", "atime"]);
        assert_eq!((off.flags, off.cleared), (0, libc::MS_NOATIME));
    }
}
