//! Who owns the cgroup of a container that may manage it: one with a cgroup namespace of its own
//! and a writable /sys/fs/cgroup.

use std::path::{Component, Path, PathBuf};

use coracle_oci::spec::{LinuxNamespaceType, Spec};
use rustix::io::Errno;

use crate::error::{Error, Result};

const DELEGATE: &str = "/sys/kernel/cgroup/delegate";

/// The host's id of the process's user, where the cgroup is to be its own. Pure.
pub fn of(spec: &Spec) -> Option<u32> {
    let linux = spec.linux().as_ref()?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let private = |kind| {
        let mut found = namespaces.iter().filter(|n| n.typ() == kind);
        found.any(|n| n.path().is_none())
    };
    let writable = spec.mounts().iter().flatten().any(|mount| {
        let read_only = mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "ro");
        mount.source().as_deref() == Some(Path::new("cgroup"))
            && without_dots(mount.destination()) == Path::new("/sys/fs/cgroup")
            && !read_only
    });
    if !private(LinuxNamespaceType::Cgroup) || !writable {
        return None;
    }
    let uid = spec
        .process()
        .as_ref()
        .map_or(0, |process| process.user().uid());
    let has_user = namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    if !has_user {
        return Some(uid);
    }
    linux.uid_mappings().iter().flatten().find_map(|mapping| {
        let offset = uid.checked_sub(mapping.container_id())?;
        let inside = offset < mapping.size();
        inside.then(|| mapping.host_id().checked_add(offset))?
    })
}

fn without_dots(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// Gives the directory and the files that the kernel names for it to the user.
///
/// # Errors
/// The kernel refuses it.
pub fn give(dir: &Path, uid: u32) -> Result<()> {
    // Before Linux 4.15 there is no list: those of cgroups(7).
    let listed = std::fs::read_to_string(DELEGATE)
        .unwrap_or_else(|_| "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n".to_owned());
    let owner = Some(rustix::fs::Uid::from_raw(uid));
    let chown = |path: &Path| {
        rustix::fs::chown(path, owner, None).map_err(|errno| {
            Error::system(format!("chown({uid})"), path.display().to_string(), errno)
        })
    };
    chown(dir)?;
    for name in listed.lines() {
        match chown(&dir.join(name)) {
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => {}
            done => done?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_table() {
        let cgroup = r#"{"destination":"/sys/fs/cgroup/","type":"cgroup","source":"cgroup"}"#;
        let read_only = r#"{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup",
            "options":["ro"]}"#;
        let maps = r#","uidMappings":[{"containerID":0,"hostID":100000,"size":10}]"#;
        let cases = [
            (cgroup, r#"{"type":"cgroup"}"#, "", Some(5)),
            (read_only, r#"{"type":"cgroup"}"#, "", None),
            (cgroup, r#"{"type":"cgroup","path":"/x"}"#, "", None),
            (cgroup, r#"{"type":"pid"}"#, "", None),
            (
                cgroup,
                r#"{"type":"cgroup"},{"type":"user"}"#,
                maps,
                Some(100_005),
            ),
            (cgroup, r#"{"type":"cgroup"},{"type":"user"}"#, "", None),
        ];
        for (mount, namespaces, maps, want) in cases {
            let json = format!(
                r#"{{"ociVersion":"1.2.0","root":{{"path":"r"}},"mounts":[{mount}],
                    "process":{{"cwd":"/","args":["x"],"user":{{"uid":5,"gid":0}}}},
                    "linux":{{"namespaces":[{namespaces}]{maps}}}}}"#
            );
            let spec = coracle_oci::config::parse(json.as_bytes()).unwrap().spec;
            assert_eq!(of(&spec), want, "{json}");
        }
    }
}
