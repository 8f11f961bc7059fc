//! The Plan: everything that the launch and the child need, computed before the first side effect.
//!
//! Pure: a checked spec and facts about the host go in, C strings, flags and numbers come out. The
//! child that walks a plan looks nothing up and parses nothing.

mod cgroup_mounts;
pub mod devices;
mod label;
pub mod memory_policy;
pub mod mounts;
pub mod namespaces;
pub mod options;
pub mod process;
pub mod sets;

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::CgroupRecord;
use coracle_oci::spec::{Hooks, Linux, LinuxNamespaceType as Kind};

use crate::cgroup::CgroupMode;
use crate::error::{Error, Result};
use crate::host::HostFacts;
use crate::spec::CheckedSpec;

pub use devices::{DevPlan, NodeStep};
pub use mounts::{MountKind, MountStep};
pub use namespaces::NamespacePlan;
pub use process::ProcessPlan;

/// How one container is to be made.
#[derive(Debug)]
pub struct Plan {
    pub namespaces: NamespacePlan,
    pub rootfs: RootfsPlan,
    pub mounts: Vec<MountStep>,
    /// What the child may not reach in its user namespace, the parent opens for it.
    pub may_ask: bool,
    pub dev: DevPlan,
    /// Paths under /proc/sys, and their values.
    pub sysctls: Vec<(CString, Vec<u8>)>,
    pub hostname: Option<Vec<u8>>,
    pub domainname: Option<Vec<u8>>,
    /// The host's network devices that the container takes over, and their names there.
    pub net_devices: Vec<(String, String)>,
    pub masked_paths: Vec<CString>,
    /// The SELinux context of what covers masked directories.
    pub mount_label: Option<CString>,
    pub readonly_paths: Vec<CString>,
    /// The name of the session keyring to join.
    pub keyring: Option<CString>,
    pub process: ProcessPlan,
    pub hooks: Hooks,
    /// The program starts only when `start` says so.
    pub gated: bool,
    /// Device nodes can be made only once the limits are written: between their two writes, v1
    /// device rules deny everything. A v2 program takes effect as a whole.
    pub waits_for_limits: bool,
}

/// The container's root.
#[derive(Debug)]
pub struct RootfsPlan {
    pub path: PathBuf,
    pub c_path: CString,
    pub readonly: bool,
    /// What the copied mount tree becomes first.
    pub initial_propagation: u64,
    /// What the root becomes after pivot_root, if the spec says so.
    pub propagation: Option<u64>,
    pub no_pivot: bool,
    /// The container has no mount namespace: the root is entered by chroot(2) alone.
    pub shares_mounts: bool,
}

/// What the command line adds to the spec.
#[derive(Debug, Default, Clone)]
pub struct LaunchOptions {
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// fds from 3 on that the program inherits.
    pub preserve_fds: u32,
    /// LISTEN_FDS of socket activation, inherited before the preserved ones.
    pub listen_fds: u32,
    /// The program starts only when `start` says so.
    pub gated: bool,
    /// The runtime stays and copies between the terminal, if there is one, and its stdio.
    pub bridged: bool,
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub id: &'a ContainerId,
    pub bundle: &'a Path,
    pub spec: &'a CheckedSpec,
    pub host: &'a HostFacts,
    pub cgroup: &'a CgroupRecord,
    pub options: &'a LaunchOptions,
}

impl Plan {
    /// Plans a container.
    ///
    /// # Errors
    /// A string with a NUL byte, or a value that no system call can take.
    pub fn new(input: Input<'_>) -> Result<Self> {
        let spec = input.spec.spec();
        let linux = spec.linux().as_ref();
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| Error::invalid("process property must not be empty"))?;
        let mut namespaces = NamespacePlan::new(input.spec, input.host)?;
        namespaces.late_cgroup = input.cgroup.unit().is_some();
        let mut process = ProcessPlan::new(process, linux, input.options)?;
        // Containers share seccomp, labels and the rest with every later exec; only here does the
        // user namespace decide whether groups can be set.
        process.setgroups = namespaces.setgroups_allowed;
        process.joined_user = namespaces.joined_user;
        // "execCPUAffinity" is what it says.
        (process.initial_affinity, process.final_affinity) = (None, None);
        let paths = |list: Option<&Vec<String>>| -> Result<Vec<CString>> {
            list.into_iter()
                .flatten()
                .map(|path| relative("linux paths", path.as_bytes()))
                .collect()
        };
        let named = |name: &Option<String>| {
            name.as_ref()
                .filter(|name| !name.is_empty())
                .map(|name| name.clone().into_bytes())
        };
        Ok(Self {
            mounts: mounts::plan(&input, &namespaces)?,
            dev: devices::plan(&input, &namespaces)?,
            rootfs: rootfs(&input)?,
            sysctls: sysctls(input.spec)?,
            hostname: named(spec.hostname()),
            domainname: named(spec.domainname()),
            net_devices: net_devices(linux),
            mount_label: label::of(linux)?,
            masked_paths: once(paths(
                linux.and_then(|linux| linux.masked_paths().as_ref()),
            )?),
            readonly_paths: paths(linux.and_then(|linux| linux.readonly_paths().as_ref()))?,
            keyring: (!input.options.no_new_keyring)
                .then(|| c_string("id", format!("_ses.{}", input.id).as_bytes()))
                .transpose()?,
            hooks: spec.hooks().clone().unwrap_or_default(),
            gated: input.options.gated,
            may_ask: namespaces.has_user() && input.host.is_root(),
            waits_for_limits: matches!(input.host.cgroup, CgroupMode::V1 { .. }),
            namespaces,
            process,
        })
    }
}

/// Each path once: engines' defaults and users' own lists overlap.
fn once(paths: Vec<CString>) -> Vec<CString> {
    let mut kept: Vec<CString> = Vec::with_capacity(paths.len());
    for path in paths {
        if !kept.contains(&path) {
            kept.push(path);
        }
    }
    kept
}

fn rootfs(input: &Input<'_>) -> Result<RootfsPlan> {
    let spec = input.spec.spec();
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Error::invalid("root must be specified"))?;
    let path = input.bundle.join(root.path());
    let propagation = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.rootfs_propagation().as_deref())
        .and_then(options::propagation);
    // Without pivot_root the old root stays mounted below, and a private one holds it for good.
    if input.options.no_pivot && propagation.is_some_and(|flags| flags & libc::MS_PRIVATE != 0) {
        return Err(Error::invalid(
            "rootfsPropagation of [r]private is not safe without pivot_root",
        ));
    }
    Ok(RootfsPlan {
        c_path: c_string("root.path", path.as_os_str().as_bytes())?,
        path,
        readonly: root.readonly().unwrap_or(false),
        initial_propagation: initial_propagation(propagation),
        propagation,
        no_pivot: input.options.no_pivot,
        shares_mounts: !input.spec.namespaces().has(Kind::Mount),
    })
}

/// What the copied mount tree becomes before anything is mounted. runc's default: host mounts made
/// later still arrive, none of ours leaves. An unbindable tree could not be cloned from; that, and
/// the final form of the root itself, comes last.
fn initial_propagation(wanted: Option<u64>) -> u64 {
    match wanted {
        Some(flags) if flags & libc::MS_SHARED != 0 => flags,
        Some(flags) if flags & libc::MS_UNBINDABLE == 0 => flags | libc::MS_REC,
        _ => libc::MS_SLAVE | libc::MS_REC,
    }
}

/// In the order of their names.
fn net_devices(linux: Option<&Linux>) -> Vec<(String, String)> {
    let all = linux.and_then(|linux| linux.net_devices().as_ref());
    let mut devices: Vec<_> = all
        .into_iter()
        .flatten()
        .map(|(name, device)| {
            let new = device.name().as_ref().filter(|new| !new.is_empty());
            (name.clone(), new.unwrap_or(name).clone())
        })
        .collect();
    devices.sort();
    devices
}

fn sysctls(spec: &CheckedSpec) -> Result<Vec<(CString, Vec<u8>)>> {
    let all = spec
        .spec()
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    let mut sorted: Vec<_> = all.into_iter().flatten().collect();
    sorted.sort();
    sorted
        .into_iter()
        .map(|(name, value)| {
            let path = spec.sysctl_path(name, value)?;
            Ok((
                c_string("linux.sysctl", path.as_bytes())?,
                value.clone().into_bytes(),
            ))
        })
        .collect()
}

/// A C string, or an error that names the field.
pub(crate) fn c_string(field: &str, bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::invalid(format!("{field}: contains a NUL byte")))
}

/// An absolute path of the container as one relative to its root; "." for the root itself.
pub(crate) fn relative(field: &str, path: &[u8]) -> Result<CString> {
    let start = path
        .iter()
        .position(|byte| *byte != b'/')
        .unwrap_or(path.len());
    let rest = &path[start..];
    c_string(field, if rest.is_empty() { b"." } else { rest })
}

/// clone and setns flags by OCI namespace type.
pub fn namespace_flag(kind: Kind) -> u64 {
    (match kind {
        Kind::Mount => libc::CLONE_NEWNS,
        Kind::Cgroup => libc::CLONE_NEWCGROUP,
        Kind::Uts => libc::CLONE_NEWUTS,
        Kind::Ipc => libc::CLONE_NEWIPC,
        Kind::User => libc::CLONE_NEWUSER,
        Kind::Pid => libc::CLONE_NEWPID,
        Kind::Network => libc::CLONE_NEWNET,
        Kind::Time => 0x80, // CLONE_NEWTIME shares its bit with the old CSIGNAL mask
    }) as u64
}

/// The file of a namespace under /proc/pid/ns.
pub fn namespace_file(kind: Kind) -> &'static str {
    match kind {
        Kind::Mount => "mnt",
        Kind::Cgroup => "cgroup",
        Kind::Uts => "uts",
        Kind::Ipc => "ipc",
        Kind::User => "user",
        Kind::Pid => "pid",
        Kind::Network => "net",
        Kind::Time => "time",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn host(euid: u32) -> HostFacts {
        HostFacts {
            cgroup: CgroupMode::V2 {
                mountpoint: "/sys/fs/cgroup".into(),
                own: "/".into(),
            },
            euid,
            egid: euid,
            in_user_namespace: false,
            setgroups: true,
            apparmor: false,
            selinux: false,
        }
    }

    fn plan(euid: u32, change: impl FnOnce(&mut Value)) -> Result<Plan> {
        let mut config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"cwd": "/w", "args": ["a", "b"], "env": ["PATH=/bin:/sbin", "X=1"],
                "user": {"uid": 5, "gid": 6, "additionalGids": [7]}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "mode=755", "ro"]},
                {"destination": "/data", "type": "bind", "source": "data",
                 "options": ["rbind", "ro", "rslave"]}
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}],
                "maskedPaths": ["/proc/kcore"]}
        });
        change(&mut config);
        let host = host(euid);
        let bytes = serde_json::to_vec(&config).expect("a JSON value encodes");
        let spec = CheckedSpec::check(&bytes, &host)?;
        let id = ContainerId::parse("c1").expect("a valid id");
        Plan::new(Input {
            id: &id,
            bundle: Path::new("/b"),
            spec: &spec,
            host: &host,
            cgroup: &CgroupRecord::None,
            options: &LaunchOptions::default(),
        })
    }

    fn user_namespace(config: &mut Value) {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        config["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "user"}, {"type": "pid"}]);
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map;
    }

    #[test]
    fn plain_container() {
        let plan = plan(0, |_| {}).unwrap();
        assert_eq!(
            plan.namespaces.clone_flags,
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64
        );
        assert_eq!(plan.rootfs.path, Path::new("/b/rootfs"));
        assert!(
            plan.rootfs.readonly
                && plan.dev.setup
                && plan.mounts[1].late_read_only
                && !plan.dev.bind
        );
        assert_eq!(plan.dev.nodes.len(), 6);
        assert_eq!(plan.masked_paths, [c"proc/kcore".to_owned()]);
        assert_eq!(plan.process.search_path, b"/bin:/sbin");
        assert!(plan.process.needs_home && plan.process.setgroups);
        assert_eq!(plan.process.first_closed_fd, 3);
        let MountKind::Bind(bind) = &plan.mounts[2].kind else {
            panic!("{:?}", plan.mounts[2])
        };
        assert_eq!(bind.path, c"/b/data".to_owned());
        assert!(bind.recursive && bind.change.is_some() && !plan.may_ask);
        assert_eq!(plan.mounts[2].propagation, [libc::MS_SLAVE | libc::MS_REC]);
    }

    #[test]
    fn user_namespace_has_the_help_of_a_privileged_parent_only() {
        for (euid, may_ask) in [(0, true), (1000, false)] {
            let plan = plan(euid, user_namespace).unwrap();
            assert!(plan.dev.bind && plan.namespaces.has_user());
            assert!(!plan.namespaces.needs_stage());
            assert_eq!(plan.namespaces.uid_map, "0 100000 65536\n");
            assert_eq!(plan.may_ask, may_ask);
        }
    }

    #[test]
    fn child_of_a_stage_waits_to_be_known() {
        let plan = plan(0, |config| {
            config["linux"]["namespaces"] =
                json!([{"type": "mount"}, {"type": "user", "path": "/proc/1/ns/user"}]);
        })
        .unwrap();
        assert!(plan.namespaces.needs_stage() && plan.namespaces.waits());
        assert!(!plan.namespaces.waits_for_maps());
    }

    #[test]
    fn user_namespace_with_joined_ones_needs_a_stage() {
        let plan = plan(0, |config| {
            user_namespace(config);
            let list = config["linux"]["namespaces"].as_array_mut().unwrap();
            list.push(json!({"type": "network", "path": "/run/netns/x"}));
        })
        .unwrap();
        assert!(plan.namespaces.needs_stage());
    }

    #[test]
    fn own_gid_alone_costs_setgroups() {
        for (maps, setgroups) in [
            (&["uidMappings", "gidMappings"][..], false),
            (&["gidMappings"], false),
            (&["uidMappings"], true),
        ] {
            let plan = plan(1000, |config| {
                user_namespace(config);
                for map in maps {
                    config["linux"][map] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
                }
            })
            .unwrap();
            assert_eq!(plan.process.setgroups, setgroups, "{maps:?}");
        }
    }

    #[test]
    fn listed_device_replaces_the_default() {
        let plan = plan(0, |config| {
            config["linux"]["devices"] = json!([
                {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 384},
                {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}
            ]);
        })
        .unwrap();
        assert_eq!(plan.dev.nodes.len(), 7);
        assert_eq!(
            (plan.dev.nodes[0].mode, plan.dev.nodes[1].mode),
            (0o600, 0o666)
        );
        assert_eq!(plan.dev.nodes[1].parent, c"dev/net".to_owned());
    }

    #[test]
    fn propagation_table() {
        use libc::{MS_PRIVATE, MS_REC, MS_SHARED, MS_SLAVE, MS_UNBINDABLE};
        let cases = [
            (None, MS_SLAVE | MS_REC),
            (Some(MS_PRIVATE), MS_PRIVATE | MS_REC),
            (Some(MS_SHARED), MS_SHARED),
            (Some(MS_SHARED | MS_REC), MS_SHARED | MS_REC),
            (Some(MS_UNBINDABLE), MS_SLAVE | MS_REC),
        ];
        for (wanted, initial) in cases {
            assert_eq!(initial_propagation(wanted), initial, "{wanted:?}");
        }
    }

    #[test]
    fn mount_label_goes_where_each_mount_takes_it() {
        let mounts = |config: &mut Value| {
            config["mounts"] = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
                {"destination": "/r", "type": "ramfs", "source": "r", "options": ["a=b"]},
                {"destination": "/r", "type": "none", "options": ["remount"]},
                {"destination": "/b", "type": "bind", "source": "/b"}
            ]);
        };
        assert!(plan(0, mounts).unwrap().mount_label.is_none());
        let mut plan = plan(0, mounts).unwrap();
        let wanted = c"u:r:t:s0:c1,c2";
        let shown: Vec<String> = plan
            .mounts
            .iter_mut()
            .map(|step| {
                label::set(&mut step.kind, wanted).unwrap();
                match &step.kind {
                    MountKind::Fs(source) => {
                        format!("{:?} {:?}", source.options, source.root_label)
                    }
                    MountKind::Legacy { data, .. } => format!("{data:?}"),
                    other => format!("{}", matches!(other, MountKind::Bind(_))),
                }
            })
            .collect();
        assert_eq!(
            shown,
            [
                "[] None",
                "[(\"context\", Some(\"u:r:t:s0:c1,c2\"))] None",
                "[] Some(\"u:r:t:s0:c1,c2\")",
                "\"a=b,context=\\\"u:r:t:s0:c1,c2\\\"\"",
                "\"\"",
                "true",
            ]
        );
    }

    #[test]
    fn masked_paths_are_masked_once() {
        let plan = plan(0, |config| {
            config["linux"]["maskedPaths"] = json!(["/a", "/b", "/a"]);
        })
        .unwrap();
        assert_eq!(plan.masked_paths, [c"a".to_owned(), c"b".to_owned()]);
    }

    #[test]
    fn sources_and_targets_inside_the_root() {
        let plan = plan(0, |config| {
            user_namespace(config);
            config["mounts"] = json!([
                {"destination": "/b/rootfs/x/y", "type": "bind", "source": "/b/rootfs/z"},
                {"destination": "/b/rootfs2/y", "type": "bind", "source": "/b/rootfs2"}
            ]);
        })
        .unwrap();
        let bind = |at: usize| match &plan.mounts[at].kind {
            MountKind::Bind(bind) => bind.inside.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(plan.mounts[0].target, c"x/y".to_owned());
        assert_eq!(bind(0), Some(c"z".to_owned()));
        assert_eq!(plan.mounts[1].target, c"b/rootfs2/y".to_owned());
        assert_eq!(bind(1), None);
    }

    #[test]
    fn relative_table() {
        for (path, want) in [
            ("/a/b", c"a/b"),
            ("//a", c"a"),
            ("a", c"a"),
            ("/", c"."),
            ("", c"."),
        ] {
            assert_eq!(relative("x", path.as_bytes()).unwrap(), want.to_owned());
        }
        assert!(relative("x", b"/a\0b").is_err());
    }
}
