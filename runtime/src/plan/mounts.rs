//! The mount steps in the config's order, each with everything its system calls need. Pure.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use coracle_oci::spec::{LinuxIdMapping, Mount};

use super::label;
use super::options::{self, Attributes, FlagChange, Options};
use super::{Input, NamespacePlan, c_string, relative};
use crate::error::{Error, Result};

/// One mount.
#[derive(Debug)]
pub struct MountStep {
    /// As the config has it: for messages.
    pub destination: String,
    /// Relative to the root.
    pub target: CString,
    pub kind: MountKind,
    /// Of a new filesystem; a bind mount has its own.
    pub attributes: Attributes,
    pub recursive_attributes: Attributes,
    pub propagation: Vec<u64>,
    /// Becomes read-only once all is made: a /dev or a tmpfs that other mounts stand in.
    pub late_read_only: bool,
}

/// What is mounted.
#[derive(Debug)]
pub enum MountKind {
    Bind(BindSource),
    /// A filesystem that goes through fsopen(2).
    Fs(FsSource),
    /// A filesystem that only mount(2) configures fully, or a remount.
    Legacy {
        fstype: CString,
        source: CString,
        flags: u64,
        data: CString,
    },
    /// A tmpfs with one directory for each v1 hierarchy.
    CgroupV1 {
        hierarchies: Vec<V1Hierarchy>,
        links: Vec<(CString, CString)>,
        namespaced: bool,
        /// The tmpfs's SELinux context.
        label: Option<CString>,
    },
    /// cgroup2, or the container's directory in it where the kernel refuses that.
    CgroupV2 {
        directory: CString,
        mountpoint: CString,
        namespaced: bool,
    },
}

#[derive(Debug)]
pub struct BindSource {
    pub path: CString,
    pub recursive: bool,
    pub change: Option<FlagChange>,
    pub idmap: Option<IdMap>,
    /// The source is in the container's own root, at this path: an image's symlinks lead nowhere
    /// else there.
    pub inside: Option<CString>,
}

/// An id-mapped mount.
#[derive(Debug)]
pub struct IdMap {
    /// The uid and gid maps of its own; without them it has the container's user namespace.
    pub own: Option<(String, String)>,
    pub recursive: bool,
}

#[derive(Debug)]
pub struct FsSource {
    pub fstype: &'static CStr,
    pub source: CString,
    pub options: Vec<(CString, Option<CString>)>,
    /// tmpfs: the content of the directory below is copied in.
    pub copy_up: bool,
    /// tmpfs: takes over the mode of the directory below unless the config gives one.
    pub inherit_mode: bool,
    /// proc and sysfs: only at a real directory, never through a symlink.
    pub strict_target: bool,
    /// The root's SELinux label, of a filesystem that takes no context.
    pub root_label: Option<CString>,
    /// What a user namespace without the matching other namespace gets instead.
    pub fallback: Option<&'static CStr>,
}

#[derive(Debug)]
pub struct V1Hierarchy {
    /// The directory under the mount.
    pub name: CString,
    /// What fsconfig(2) takes to mount it afresh.
    pub options: Vec<(CString, Option<CString>)>,
    /// The container's own cgroup, bound where there is no cgroup namespace.
    pub directory: CString,
    /// The runtime's, for a rootless container that could not get one of its own.
    pub inherited: CString,
}

/// Files of /proc that engines replace by a bind mount (lxcfs and the like). Nothing else may be
/// mounted inside /proc: it would lie to the runtime that joins later (CVE-2019-19921).
const PROC_REPLACEABLE: [&str; 10] = [
    "proc/cpuinfo",
    "proc/diskstats",
    "proc/meminfo",
    "proc/stat",
    "proc/swaps",
    "proc/uptime",
    "proc/loadavg",
    "proc/slabinfo",
    "proc/sys/kernel/ns_last_pid",
    "proc/sys/crypto/fips_enabled",
];

/// Plans all mounts.
pub(super) fn plan(input: &Input<'_>, namespaces: &NamespacePlan) -> Result<Vec<MountStep>> {
    let mounts = input.spec.spec().mounts().as_deref().unwrap_or_default();
    mounts
        .iter()
        .map(|mount| step(input, namespaces, mount))
        .collect()
}

fn step(input: &Input<'_>, namespaces: &NamespacePlan, mount: &Mount) -> Result<MountStep> {
    let mut parsed = options::parse(mount.options().as_deref().unwrap_or_default());
    let fstype = mount.typ().as_deref().unwrap_or("");
    if fstype == "bind" {
        parsed.flags |= libc::MS_BIND;
    }
    let destination = mount.destination().display().to_string();
    let mut kind = if parsed.is_remount() {
        legacy("none", mount, &parsed)?
    } else if parsed.is_bind() {
        MountKind::Bind(bind(input, mount, &parsed)?)
    } else {
        match fstype {
            "" => {
                return Err(Error::invalid(format!(
                    "mounts: {destination}: type must not be empty"
                )));
            }
            "proc" => MountKind::Fs(filesystem(c"proc", mount, &parsed, namespaces)?),
            "sysfs" => MountKind::Fs(filesystem(c"sysfs", mount, &parsed, namespaces)?),
            "tmpfs" => MountKind::Fs(filesystem(c"tmpfs", mount, &parsed, namespaces)?),
            "devpts" => MountKind::Fs(filesystem(c"devpts", mount, &parsed, namespaces)?),
            "mqueue" => MountKind::Fs(filesystem(c"mqueue", mount, &parsed, namespaces)?),
            "cgroup" => super::cgroup_mounts::plan(input)?,
            "cgroup2" => match super::cgroup_mounts::unified(input)? {
                Some(kind) => kind,
                None => legacy(fstype, mount, &parsed)?,
            },
            other => legacy(other, mount, &parsed)?,
        }
    };
    if let Some(label) = label::of(input.spec.spec().linux().as_ref())? {
        label::set(&mut kind, &label)?;
    }
    // As runc does for old configs that name the place with the host's path of the root.
    let inside = inside_root(input, mount.destination());
    let target = match &inside {
        Some(inside) => inside.clone(),
        None => relative("mounts", mount.destination().as_os_str().as_bytes())?,
    };
    if clean(mount.destination()).is_empty()
        || clean(Path::new(&*target.to_string_lossy())).is_empty()
    {
        return Err(Error::invalid(format!(
            "mountpoint {destination:?} is on the top of rootfs"
        )));
    }
    check_proc(&destination, mount, &kind)?;
    let mut attributes = match &kind {
        MountKind::Legacy { .. } | MountKind::Bind(_) => Attributes::default(),
        _ => parsed.attributes(),
    };
    let filled = match &kind {
        MountKind::Fs(source) => source.fstype == c"tmpfs" || clean(mount.destination()) == "dev",
        _ => false,
    };
    let mut recursive_attributes = parsed.recursive_attributes;
    let asked = attributes.set | recursive_attributes.set;
    let late_read_only = filled && asked & libc::MOUNT_ATTR_RDONLY != 0;
    if late_read_only {
        attributes.set &= !libc::MOUNT_ATTR_RDONLY;
        recursive_attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    Ok(MountStep {
        destination,
        target,
        kind,
        attributes,
        recursive_attributes,
        propagation: parsed.propagation,
        late_read_only,
    })
}

/// A path of the host that lies in the container's root, relative to that.
fn inside_root(input: &Input<'_>, path: &Path) -> Option<CString> {
    let root = input.spec.spec().root().as_ref()?;
    let root = input.bundle.join(root.path());
    if root == Path::new("/") {
        return None;
    }
    relative(
        "mounts",
        path.strip_prefix(root).ok()?.as_os_str().as_bytes(),
    )
    .ok()
}

fn check_proc(destination: &str, mount: &Mount, kind: &MountKind) -> Result<()> {
    let clean = clean(mount.destination());
    let bind = matches!(kind, MountKind::Bind(_));
    // Whether a bind mount's source is a procfs, the child sees.
    if clean == "proc" && !bind && mount.typ().as_deref() != Some("proc") {
        return Err(not_of_type_proc(destination));
    }
    if clean.starts_with("proc/") && !(bind && PROC_REPLACEABLE.contains(&clean.as_str())) {
        return Err(Error::invalid(format!(
            "{destination:?} cannot be mounted because it is inside /proc"
        )));
    }
    Ok(())
}

/// What everybody reads as the kernel's word must be it.
pub fn not_of_type_proc(destination: &str) -> Error {
    Error::invalid(format!(
        "{destination:?} cannot be mounted because it is not of type proc"
    ))
}

/// Whether the planned target may resolve to a place on a procfs other than its root.
pub fn may_be_inside_proc(step: &MountStep) -> bool {
    clean(Path::new(&step.destination)).starts_with("proc/")
}

/// Whether the step's target is /proc itself.
pub fn is_proc(step: &MountStep) -> bool {
    clean(Path::new(&step.destination)) == "proc"
}

/// The path without "." and "..", relative.
pub(super) fn clean(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            std::path::Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            std::path::Component::ParentDir => {
                parts.pop();
            }
            _ => {}
        }
    }
    parts.join("/")
}

fn source_of(mount: &Mount) -> &[u8] {
    mount
        .source()
        .as_ref()
        .map_or(b"", |source| source.as_os_str().as_bytes())
}

fn bind(input: &Input<'_>, mount: &Mount, parsed: &Options) -> Result<BindSource> {
    let source = mount
        .source()
        .as_ref()
        .filter(|s| !s.as_os_str().is_empty())
        .ok_or_else(|| {
            Error::invalid(format!(
                "mounts: {}: a bind mount needs a source",
                mount.destination().display()
            ))
        })?;
    let path = input.bundle.join(source);
    let mapped = |m: &Option<Vec<LinuxIdMapping>>| {
        super::namespaces::id_map(m.as_deref().unwrap_or_default())
    };
    let (uid_map, gid_map) = (mapped(mount.uid_mappings()), mapped(mount.gid_mappings()));
    let own = (!uid_map.is_empty()).then_some((uid_map, gid_map));
    let idmap = (own.is_some() || parsed.idmap.is_some()).then(|| IdMap {
        own,
        recursive: parsed.idmap == Some(true),
    });
    Ok(BindSource {
        path: c_string("mounts.source", path.as_os_str().as_bytes())?,
        recursive: parsed.is_recursive(),
        change: parsed.change(),
        inside: inside_root(input, &path),
        idmap,
    })
}

fn filesystem(
    fstype: &'static CStr,
    mount: &Mount,
    parsed: &Options,
    namespaces: &NamespacePlan,
) -> Result<FsSource> {
    let source = match source_of(mount) {
        b"" => fstype.to_owned(),
        source => c_string("mounts.source", source)?,
    };
    let mut list = Vec::new();
    for option in &parsed.data {
        list.push(match option.split_once('=') {
            Some((key, value)) => (
                c_string("mounts.options", key.as_bytes())?,
                Some(c_string("mounts.options", value.as_bytes())?),
            ),
            None => (c_string("mounts.options", option.as_bytes())?, None),
        });
    }
    for name in parsed.superblock() {
        list.push((name.to_owned(), None));
    }
    let tmpfs = fstype == c"tmpfs";
    let strict_target = fstype == c"proc" || fstype == c"sysfs";
    let fallback = if !namespaces.has_user() {
        None
    } else if fstype == c"proc" {
        Some(c"/proc")
    } else if fstype == c"sysfs" {
        Some(c"/sys")
    } else {
        None
    };
    Ok(FsSource {
        fstype,
        source,
        copy_up: tmpfs && parsed.copy_up,
        inherit_mode: tmpfs && !list.iter().any(|(key, _)| key.as_c_str() == c"mode"),
        options: list,
        strict_target,
        root_label: None,
        fallback,
    })
}

fn legacy(fstype: &str, mount: &Mount, parsed: &Options) -> Result<MountKind> {
    Ok(MountKind::Legacy {
        fstype: c_string("mounts.type", fstype.as_bytes())?,
        source: c_string("mounts.source", source_of(mount))?,
        flags: parsed.flags,
        data: c_string("mounts.options", parsed.data.join(",").as_bytes())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_table() {
        let cases = [
            ("/proc", "proc"),
            ("/a/../proc/x", "proc/x"),
            ("/", ""),
            ("//a/./b", "a/b"),
        ];
        for (path, want) in cases {
            assert_eq!(clean(Path::new(path)), want);
        }
    }

    #[test]
    fn inside_proc_only_known_files_by_bind() {
        let bind = || {
            MountKind::Bind(BindSource {
                path: c"/x".to_owned(),
                recursive: false,
                change: None,
                idmap: None,
                inside: None,
            })
        };
        let tmpfs = || MountKind::Legacy {
            fstype: c"tmpfs".to_owned(),
            source: c"".to_owned(),
            flags: 0,
            data: c"".to_owned(),
        };
        let cases = [
            ("/proc", "tmpfs", tmpfs(), false),
            ("/proc", "proc", tmpfs(), true),
            ("/a/../proc/", "none", bind(), true),
            ("/proc/meminfo", "", bind(), true),
            ("/proc/meminfo", "tmpfs", tmpfs(), false),
            ("/proc/net/dev", "", bind(), false),
            ("/proc/self/attr", "", bind(), false),
            ("/tmp/../proc/sys", "", bind(), false),
            ("/procfs/x", "tmpfs", tmpfs(), true),
        ];
        for (path, fstype, kind, ok) in cases {
            let mount: Mount =
                serde_json::from_value(serde_json::json!({"destination": path, "type": fstype}))
                    .unwrap();
            assert_eq!(
                check_proc(path, &mount, &kind).is_ok(),
                ok,
                "{path} {kind:?}"
            );
        }
    }
}
