//! The device nodes of /dev: runc's defaults, and `linux.devices` over them. Pure.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;

use coracle_oci::spec::{LinuxDevice, LinuxDeviceType};

use super::options;
use super::{Input, NamespacePlan, c_string, mounts, relative};
use crate::error::{Error, Result};

/// Everything that becomes of /dev.
#[derive(Debug, Default)]
pub struct DevPlan {
    /// False when the config binds a /dev of its own: then it is left as it is.
    pub setup: bool,
    pub nodes: Vec<NodeStep>,
    /// In a user namespace mknod(2) is refused: the host's nodes are bound instead.
    pub bind: bool,
}

/// One device node.
#[derive(Debug)]
pub struct NodeStep {
    /// The directory, relative to the root.
    pub parent: CString,
    pub name: CString,
    /// S_IFCHR, S_IFBLK or S_IFIFO.
    pub file_type: u32,
    pub mode: u32,
    pub major: u32,
    pub minor: u32,
    pub uid: u32,
    pub gid: u32,
    /// The same device on the host.
    pub host: CString,
}

/// Name and number of the devices that every container has.
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

pub(super) fn plan(input: &Input<'_>, namespaces: &NamespacePlan) -> Result<DevPlan> {
    let spec = input.spec.spec();
    let mut plan = DevPlan {
        setup: true,
        bind: namespaces.has_user(),
        ..DevPlan::default()
    };
    for mount in spec.mounts().iter().flatten() {
        if mounts::clean(mount.destination()) != "dev" {
            continue;
        }
        let parsed = options::parse(mount.options().as_deref().unwrap_or_default());
        let bind = parsed.is_bind() || mount.typ().as_deref() == Some("bind");
        plan.setup = !bind;
    }
    let listed = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref());
    let listed = listed.unwrap_or_default();
    // One without a path is there for the cgroup's sake only.
    for device in listed
        .iter()
        .filter(|device| !device.path().as_os_str().is_empty())
    {
        plan.nodes.push(listed_node(device)?);
    }
    for (path, major, minor) in DEFAULTS {
        if !listed
            .iter()
            .any(|device| device.path().as_os_str() == path)
        {
            plan.nodes
                .push(node(path.as_bytes(), libc::S_IFCHR, (major, minor))?);
        }
    }
    Ok(plan)
}

fn listed_node(device: &LinuxDevice) -> Result<NodeStep> {
    let path = device.path();
    if !path.is_absolute() {
        return Err(Error::invalid(format!(
            "linux.devices: path {} is not absolute",
            path.display()
        )));
    }
    let file_type = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(Error::invalid(format!(
                "linux.devices: {}: type \"a\" is not a device type",
                path.display()
            )));
        }
    };
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| {
            Error::invalid(format!("linux.devices: {}: number {value}", path.display()))
        })
    };
    let numbers = match file_type {
        libc::S_IFIFO => (0, 0),
        _ => (number(device.major())?, number(device.minor())?),
    };
    let mut step = node(path.as_os_str().as_bytes(), file_type, numbers)?;
    step.mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    step.uid = device.uid().unwrap_or(0);
    step.gid = device.gid().unwrap_or(0);
    Ok(step)
}

fn node(path: &[u8], file_type: u32, (major, minor): (u32, u32)) -> Result<NodeStep> {
    let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (parent, name) = (&path[..slash], &path[slash + 1..]);
    if name.is_empty() || name == b"." || name == b".." {
        return Err(Error::invalid("linux.devices: path names no file"));
    }
    Ok(NodeStep {
        parent: relative("linux.devices", parent)?,
        name: c_string("linux.devices", name)?,
        file_type,
        mode: 0o666,
        major,
        minor,
        uid: 0,
        gid: 0,
        host: c_string("linux.devices", path)?,
    })
}
