//! The Plan: everything that the launch and the child need, computed before the first side effect.
//!
//! Pure: a checked spec and facts about the host go in, C strings, flags and numbers come out. The
//! child that walks a plan looks nothing up and parses nothing.

pub mod devices;
pub mod mounts;
pub mod namespaces;
pub mod options;
pub mod process;

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::CgroupRecord;
use coracle_oci::spec::{Hooks, LinuxNamespaceType as Kind};

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
    pub dev: DevPlan,
    /// Paths under /proc/sys, and their values.
    pub sysctls: Vec<(CString, Vec<u8>)>,
    pub hostname: Option<Vec<u8>>,
    pub domainname: Option<Vec<u8>>,
    pub masked_paths: Vec<CString>,
    pub readonly_paths: Vec<CString>,
    /// The name of the session keyring to join.
    pub keyring: Option<CString>,
    pub process: ProcessPlan,
    pub hooks: Hooks,
    /// The program starts only when `start` says so.
    pub gated: bool,
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
        let namespaces = NamespacePlan::new(input.spec, input.host)?;
        let mut process = ProcessPlan::new(process, linux, input.options)?;
        // Containers share seccomp, labels and the rest with every later exec; only here does the
        // user namespace decide whether groups can be set.
        process.setgroups = namespaces.setgroups_allowed;
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
            masked_paths: paths(linux.and_then(|linux| linux.masked_paths().as_ref()))?,
            readonly_paths: paths(linux.and_then(|linux| linux.readonly_paths().as_ref()))?,
            keyring: (!input.options.no_new_keyring)
                .then(|| c_string("id", format!("_ses.{}", input.id).as_bytes()))
                .transpose()?,
            hooks: spec.hooks().clone().unwrap_or_default(),
            gated: input.options.gated,
            namespaces,
            process,
        })
    }
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
    Ok(RootfsPlan {
        c_path: c_string("root.path", path.as_os_str().as_bytes())?,
        path,
        readonly: root.readonly().unwrap_or(false),
        initial_propagation: initial_propagation(propagation),
        propagation,
        no_pivot: input.options.no_pivot,
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
