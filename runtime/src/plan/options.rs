//! fstab-style mount options to mount attributes, as runc reads them. Pure.
//!
//! Three families share one option list: superblock and mount flags, propagation, and options that
//! only the filesystem understands. Clears ("rw", "dev", ...) are kept apart from "not said": a
//! bind mount inherits its source's flags unless the config speaks.

use libc::{
    MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME,
    MOUNT_ATTR_STRICTATIME,
};

/// The mask of the three atime modes, which the kernel wants cleared as one.
const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;

/// Attributes to set and clear on a mount.
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
}

/// Whether a mount is a bind, and of how much.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum BindMode {
    #[default]
    No,
    One,
    Recursive,
}

/// A parsed option list.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    pub bind: BindMode,
    pub remount: bool,
    pub attributes: Attributes,
    /// "rro" and its like: for the whole tree.
    pub recursive_attributes: Attributes,
    /// MS_SHARED and its like with or without MS_REC, in the order given.
    pub propagation: Vec<u64>,
    /// Superblock switches that are not attributes of a mount: "sync", "dirsync", ...
    pub superblock: Vec<&'static str>,
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
        if parsed.flag(option) || parsed.recursive(option) {
            continue;
        }
        if let Some(propagation) = propagation(option) {
            parsed.propagation.push(propagation);
            continue;
        }
        match option.as_str() {
            "" | "defaults" => {}
            "bind" => parsed.bind = BindMode::One,
            "rbind" => parsed.bind = BindMode::Recursive,
            "remount" => parsed.remount = true,
            "tmpcopyup" => parsed.copy_up = true,
            "idmap" => parsed.idmap = Some(false),
            "ridmap" => parsed.idmap = Some(true),
            _ => match superblock(option) {
                Some(name) => parsed.superblock.push(name),
                None => parsed.data.push(option.clone()),
            },
        }
    }
    parsed
}

impl Options {
    fn flag(&mut self, option: &str) -> bool {
        apply(&mut self.attributes, option)
    }

    fn recursive(&mut self, option: &str) -> bool {
        // "rw", "ro", "relatime", "rbind", "remount" start with an r of their own; those were
        // taken by `flag` or are named in `parse`.
        match option.strip_prefix('r') {
            Some("bind" | "idmap" | "emount" | "elatime") | None => false,
            Some(rest) => apply(&mut self.recursive_attributes, rest),
        }
    }
}

/// Applies one mount attribute option; false if it is none.
fn apply(attributes: &mut Attributes, option: &str) -> bool {
    let (flag, on) = match option {
        "ro" => (MOUNT_ATTR_RDONLY, true),
        "rw" => (MOUNT_ATTR_RDONLY, false),
        "nosuid" => (MOUNT_ATTR_NOSUID, true),
        "suid" => (MOUNT_ATTR_NOSUID, false),
        "nodev" => (MOUNT_ATTR_NODEV, true),
        "dev" => (MOUNT_ATTR_NODEV, false),
        "noexec" => (MOUNT_ATTR_NOEXEC, true),
        "exec" => (MOUNT_ATTR_NOEXEC, false),
        "nodiratime" => (MOUNT_ATTR_NODIRATIME, true),
        "diratime" => (MOUNT_ATTR_NODIRATIME, false),
        "nosymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, true),
        "symfollow" => (MOUNT_ATTR_NOSYMFOLLOW, false),
        "noatime" => return choose(attributes, MOUNT_ATTR_NOATIME),
        "strictatime" => return choose(attributes, MOUNT_ATTR_STRICTATIME),
        // The kernel's default is relatime, so not asking for another mode is asking for it.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => {
            return choose(attributes, MOUNT_ATTR_RELATIME);
        }
        _ => return false,
    };
    if on {
        attributes.turn_on(flag);
    } else {
        attributes.turn_off(flag);
    }
    true
}

fn choose(attributes: &mut Attributes, mode: u64) -> bool {
    attributes.choose_atime(mode);
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

/// fsconfig(2)'s spelling of a superblock switch; "" for one that only states the default.
fn superblock(option: &str) -> Option<&'static str> {
    Some(match option {
        "sync" => "sync",
        "dirsync" => "dirsync",
        "lazytime" => "lazytime",
        "mand" => "mand",
        "acl" => "acl",
        "noacl" => "noacl",
        "iversion" => "iversion",
        "noiversion" => "noiversion",
        "silent" => "silent",
        "async" | "nolazytime" | "nomand" | "loud" => "",
        _ => return None,
    })
}

/// The MS_* flags of a parsed list, for the filesystems that go through mount(2).
pub fn legacy_flags(options: &Options) -> u64 {
    const PAIRS: [(u64, u64); 6] = [
        (MOUNT_ATTR_RDONLY, libc::MS_RDONLY),
        (MOUNT_ATTR_NOSUID, libc::MS_NOSUID),
        (MOUNT_ATTR_NODEV, libc::MS_NODEV),
        (MOUNT_ATTR_NOEXEC, libc::MS_NOEXEC),
        (MOUNT_ATTR_NODIRATIME, libc::MS_NODIRATIME),
        (MOUNT_ATTR_NOSYMFOLLOW, 256),
    ];
    let set = options.attributes.set;
    let mut flags = 0;
    for (attribute, flag) in PAIRS {
        if set & attribute != 0 {
            flags |= flag;
        }
    }
    flags |= match set & ATIME_MASK {
        MOUNT_ATTR_NOATIME => libc::MS_NOATIME,
        MOUNT_ATTR_STRICTATIME => libc::MS_STRICTATIME,
        _ if options.attributes.clear & ATIME_MASK != 0 => libc::MS_RELATIME,
        _ => 0,
    };
    for name in &options.superblock {
        flags |= match *name {
            "sync" => libc::MS_SYNCHRONOUS,
            "dirsync" => libc::MS_DIRSYNC,
            "lazytime" => libc::MS_LAZYTIME,
            "mand" => libc::MS_MANDLOCK,
            "acl" => libc::MS_POSIXACL,
            "iversion" => libc::MS_I_VERSION,
            "silent" => libc::MS_SILENT,
            _ => 0,
        };
    }
    if options.remount {
        flags |= libc::MS_REMOUNT;
    }
    match options.bind {
        BindMode::No => flags,
        BindMode::One => flags | libc::MS_BIND,
        BindMode::Recursive => flags | libc::MS_BIND | libc::MS_REC,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &[&str]) -> Options {
        parse(&list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn attribute_table() {
        let cases: &[(&[&str], u64, u64)] = &[
            (&[], 0, 0),
            (&["ro"], MOUNT_ATTR_RDONLY, 0),
            (&["ro", "rw"], 0, MOUNT_ATTR_RDONLY),
            (
                &["nosuid", "noexec", "nodev"],
                MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV,
                0,
            ),
            (
                &["suid", "dev", "exec"],
                0,
                MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
            ),
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
            assert_eq!(
                parsed.attributes,
                Attributes {
                    set: *set,
                    clear: *clear
                },
                "{list:?}"
            );
            assert!(
                parsed.data.is_empty() && parsed.recursive_attributes.is_empty(),
                "{list:?}"
            );
        }
    }

    #[test]
    fn recursive_attributes_are_apart() {
        let parsed = of(&["rbind", "rro", "rnosuid", "rnoatime", "rsuid"]);
        assert_eq!(parsed.bind, BindMode::Recursive);
        assert!(parsed.attributes.is_empty());
        assert_eq!(
            parsed.recursive_attributes.set,
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOATIME
        );
        assert_eq!(
            parsed.recursive_attributes.clear,
            MOUNT_ATTR_NOSUID | ATIME_MASK
        );
        assert!(of(&["rrelatime"]).recursive_attributes.clear == ATIME_MASK);
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
            "async",
        ]);
        assert_eq!(parsed.data, ["mode=755", "size=64k"]);
        assert_eq!(parsed.propagation, [libc::MS_PRIVATE | libc::MS_REC]);
        assert_eq!(parsed.superblock, ["sync", ""]);
        assert!(parsed.copy_up);
    }

    #[test]
    fn idmap_and_remount() {
        assert_eq!(of(&["idmap"]).idmap, Some(false));
        assert_eq!(of(&["ridmap"]).idmap, Some(true));
        assert!(of(&["remount"]).remount);
    }

    #[test]
    fn legacy_flags_table() {
        assert_eq!(
            legacy_flags(&of(&["ro", "nosuid", "noatime", "sync", "rbind"])),
            libc::MS_RDONLY
                | libc::MS_NOSUID
                | libc::MS_NOATIME
                | libc::MS_SYNCHRONOUS
                | libc::MS_BIND
                | libc::MS_REC
        );
        assert_eq!(legacy_flags(&of(&["relatime"])), libc::MS_RELATIME);
    }
}
