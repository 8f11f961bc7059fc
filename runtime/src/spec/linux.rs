//! Checks of `linux` that compare it with the host: what it takes from there, and what it would
//! share with it. Warnings, for what is let pass as runc does.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use coracle_oci::spec::{Linux, LinuxNamespaceType as Kind, Mount, Spec};

use super::checks::Namespaces;
use super::sysctl::Owned;
use crate::error::{Error, Result};
use crate::host::HostFacts;
use crate::plan::namespace_file;

/// include/uapi/linux/if.h: IFNAMSIZ, with the final NUL.
const MAX_DEVICE_NAME: usize = 16;

/// `linux.netDevices`
pub(super) fn net_devices(linux: &Linux, namespaces: &Namespaces, host: &HostFacts) -> Result<()> {
    let devices = linux.net_devices().as_ref();
    let Some(devices) = devices.filter(|devices| !devices.is_empty()) else {
        return Ok(());
    };
    if !namespaces.has(Kind::Network) {
        return Err(Error::invalid(
            "unable to move network devices without a NET namespace",
        ));
    }
    if !host.is_root() {
        return Err(Error::invalid(
            "network devices are not supported for rootless containers",
        ));
    }
    let mut taken = std::collections::HashSet::new();
    for (name, device) in devices {
        let new = device.name().as_ref().filter(|new| !new.is_empty());
        for name in std::iter::once(name).chain(new) {
            if !is_device_name(name) {
                return Err(Error::invalid(format!(
                    "invalid network device name {name:?}"
                )));
            }
        }
        if !taken.insert(new.unwrap_or(name)) {
            return Err(Error::invalid(format!(
                "linux.netDevices: two devices become {:?}",
                new.unwrap_or(name)
            )));
        }
    }
    Ok(())
}

/// net/core/dev.c: dev_valid_name
fn is_device_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < MAX_DEVICE_NAME
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| matches!(c, '/' | ':' | '\0') || c.is_ascii_whitespace())
}

/// What an unprivileged caller's container needs.
pub(super) fn rootless(spec: &Spec, namespaces: &Namespaces, host: &HostFacts) -> Result<()> {
    if host.is_root() {
        return Ok(());
    }
    if !namespaces.has(Kind::User) {
        return Err(Error::invalid(
            "rootless container requires user namespaces",
        ));
    }
    let Some(linux) = spec
        .linux()
        .as_ref()
        .filter(|_| namespaces.creates(Kind::User))
    else {
        return Ok(());
    };
    for mount in spec.mounts().iter().flatten() {
        for option in mount.options().iter().flatten() {
            check_owner_option(option, linux)?;
        }
    }
    Ok(())
}

/// An id that is not mapped would be refused by the mount itself, with less to say.
fn check_owner_option(option: &str, linux: &Linux) -> Result<()> {
    let (what, id, mappings) = match option.split_once('=') {
        Some(("uid", id)) => ("uid", id, linux.uid_mappings()),
        Some(("gid", id)) => ("gid", id, linux.gid_mappings()),
        _ => return Ok(()),
    };
    let Ok(id) = id.parse::<u32>() else {
        return Ok(());
    };
    let mut mappings = mappings.iter().flatten();
    if mappings.any(|map| id.wrapping_sub(map.container_id()) < map.size()) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "cannot specify {option} mount option for rootless container: user namespaces enabled, \
         but no mapping found for {what} {id}"
    )))
}

/// The namespaces whose sysctls are the container's: made for it, or joined and not the caller's
/// own. An engine that joins the host's by path must not get at the host's settings.
///
/// # Errors
/// A namespace's path cannot be looked at.
pub(super) fn owned(namespaces: &Namespaces) -> Result<Owned> {
    let own = |kind: Kind| match namespaces.joins(kind) {
        None => Ok(namespaces.creates(kind)),
        Some(path) => is_callers(kind, path).map(|callers| !callers),
    };
    Ok(Owned {
        ipc: own(Kind::Ipc)?,
        network: own(Kind::Network)?,
        uts: own(Kind::Uts)?,
        user: own(Kind::User)?,
    })
}

fn is_callers(kind: Kind, path: &Path) -> Result<bool> {
    let inode = |path: &Path| {
        std::fs::metadata(path)
            .map(|meta| (meta.dev(), meta.ino()))
            .map_err(|error| {
                let what = format!("invalid {}ns path: stat", namespace_file(kind));
                Error::system(what, path.display().to_string(), error)
            })
    };
    let own = Path::new("/proc/self/ns").join(namespace_file(kind));
    Ok(inode(path)? == inode(&own)?)
}

/// What is let pass, and should not be asked for.
pub(super) fn warnings(spec: &Spec, namespaces: &Namespaces) -> Vec<String> {
    let mut warnings: Vec<String> = spec
        .mounts()
        .iter()
        .flatten()
        .filter(|mount| !mount.destination().is_absolute())
        .map(relative_destination)
        .collect();
    let linux = spec.linux().as_ref();
    if namespaces.joins(Kind::User).is_some()
        && linux.is_some_and(|linux| linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()))
    {
        warnings.push(
            "config.json has both a userns path to join and a matching userns mapping specified \
             -- you may only provide one. Future versions may return an error with this \
             configuration"
                .to_owned(),
        );
    }
    let personality = linux.and_then(|linux| linux.personality().as_ref());
    let flags = personality.and_then(|personality| personality.flags().as_ref());
    if let Some(flags) = flags.filter(|flags| !flags.is_empty()) {
        warnings.push(format!(
            "ignoring unsupported personality flags: [{}] because personality flag has not \
             supported at this time",
            flags.join(" ")
        ));
    }
    warnings
}

fn relative_destination(mount: &Mount) -> String {
    format!(
        "mount destination {} is not absolute. Support for non-absolute mount destinations will \
         be removed in a future release.",
        mount.destination().display()
    )
}

#[cfg(test)]
mod tests {
    use super::super::CheckedSpec;
    use super::*;
    use crate::cgroup::CgroupMode;
    use serde_json::{Value, json};

    fn check(
        euid: u32,
        change: impl FnOnce(&mut Value),
    ) -> std::result::Result<Vec<String>, String> {
        let host = HostFacts {
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
        };
        let mut config = json!({
            "ociVersion": "1.3.0",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "ipc"}]}
        });
        change(&mut config);
        let bytes = serde_json::to_vec(&config).unwrap();
        CheckedSpec::check(&bytes, &host)
            .map(|spec| spec.warnings)
            .map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn network_devices_need_a_namespace_a_right_and_names() {
        let devices = |devices: Value| move |c: &mut Value| c["linux"]["netDevices"] = devices;
        check(0, devices(json!({"eth0": {}, "eth1": {"name": "eth2"}}))).unwrap();
        let long = "a".repeat(16);
        let cases = [
            (json!({"a b": {}}), "invalid network device name \"a b\""),
            (json!({"": {}}), "invalid network device name \"\""),
            (
                json!({&long: {}}),
                "invalid network device name \"aaaaaaaaaaaaaaaa\"",
            ),
            (
                json!({"a": {"name": ".."}}),
                "invalid network device name \"..\"",
            ),
            (
                json!({"a": {"name": "x/y"}}),
                "invalid network device name \"x/y\"",
            ),
            (
                json!({"a": {"name": "b"}, "b": {}}),
                "two devices become \"b\"",
            ),
        ];
        for (value, want) in cases {
            let got = check(0, devices(value.clone())).unwrap_err();
            assert!(got.contains(want), "{value}: {got}");
        }
        let got = check(0, |c| {
            c["linux"]["namespaces"] = json!([{"type": "mount"}]);
            c["linux"]["netDevices"] = json!({"eth0": {}});
        });
        assert_eq!(
            got.unwrap_err(),
            "unable to move network devices without a NET namespace"
        );
        let got = check(1000, |c| {
            map_one(c);
            c["linux"]["netDevices"] = json!({"eth0": {}});
        });
        assert_eq!(
            got.unwrap_err(),
            "network devices are not supported for rootless containers"
        );
    }

    fn map_one(config: &mut Value) {
        let list = config["linux"]["namespaces"].as_array_mut().unwrap();
        list.push(json!({"type": "user"}));
        for map in ["uidMappings", "gidMappings"] {
            config["linux"][map] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        }
    }

    #[test]
    fn rootless_containers_have_a_user_namespace_and_mapped_owners() {
        assert_eq!(
            check(1000, |_| {}).unwrap_err(),
            "rootless container requires user namespaces"
        );
        let mount = |options: Value| {
            move |c: &mut Value| {
                map_one(c);
                c["mounts"] = json!([{"destination": "/dev/pts", "type": "devpts",
                    "source": "devpts", "options": options}]);
            }
        };
        check(1000, mount(json!(["gid=0", "uid=x"]))).unwrap();
        assert_eq!(
            check(1000, mount(json!(["nosuid", "gid=5"]))).unwrap_err(),
            "cannot specify gid=5 mount option for rootless container: user namespaces enabled, \
             but no mapping found for gid 5"
        );
    }

    #[test]
    fn callers_own_namespace_joined_by_path_is_not_the_containers() {
        let join = |kind: &'static str, file: &'static str, sysctl: &'static str| {
            move |c: &mut Value| {
                c["linux"]["namespaces"] = json!([{"type": "mount"},
                    {"type": kind, "path": format!("/proc/self/ns/{file}")}]);
                c["linux"]["sysctl"] = json!({sysctl: "1"});
            }
        };
        for (change, want) in [
            (
                join("network", "net", "net.ipv4.ip_forward"),
                "not allowed in host network namespace",
            ),
            (
                join("ipc", "ipc", "kernel.shmmax"),
                "is not allowed in the hosts ipc namespace",
            ),
            (
                join("network", "no-such-file", "net.ipv4.ip_forward"),
                "invalid netns path: stat /proc/self/ns/no-such-file",
            ),
        ] {
            let got = check(0, change).unwrap_err();
            assert!(got.contains(want), "{got}");
        }
    }

    #[test]
    fn what_runc_warns_of() {
        assert!(check(0, |_| {}).unwrap().is_empty());
        let warnings = check(0, |c| {
            c["linux"]["personality"] = json!({"domain": "LINUX", "flags": ["A", "B"]});
            c["mounts"] = json!([{"destination": "proc", "type": "proc", "source": "proc"}]);
        })
        .unwrap();
        assert!(warnings[0].starts_with("mount destination proc is not absolute."));
        assert!(warnings[1].starts_with("ignoring unsupported personality flags: [A B] "));
    }
}
