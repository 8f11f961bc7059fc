//! Mounts of type "cgroup", by what the host has. Pure.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use coracle_oci::record::CgroupRecord;
use coracle_oci::spec::LinuxNamespaceType as Kind;

use super::mounts::{MountKind, V1Hierarchy};
use super::{Input, c_string};
use crate::cgroup::{CgroupMode, Hierarchy};
use crate::error::Result;

pub(super) fn plan(input: &Input<'_>) -> Result<MountKind> {
    let path = |path: &Path| c_string("cgroup", path.as_os_str().as_bytes());
    match (&input.host.cgroup, input.cgroup) {
        (CgroupMode::V2 { mountpoint, own }, record) => {
            let directory = match record {
                CgroupRecord::V2 { path, .. } => path.clone(),
                _ => mountpoint.join(own.strip_prefix("/").unwrap_or(own)),
            };
            Ok(MountKind::CgroupV2 {
                directory: path(&directory)?,
                mountpoint: path(mountpoint)?,
                namespaced: input.spec.namespaces().has(Kind::Cgroup),
            })
        }
        (CgroupMode::V1 { hierarchies, .. }, record) => {
            let own = match record {
                CgroupRecord::V1 { paths, .. } => Some(paths),
                _ => None,
            };
            let mut mounts = Vec::new();
            let mut links = Vec::new();
            for hierarchy in hierarchies {
                let directory = own
                    .and_then(|paths| paths.get(&hierarchy.key()).cloned())
                    .unwrap_or_else(|| hierarchy.own_dir());
                let name = hierarchy
                    .mountpoint
                    .file_name()
                    .unwrap_or_default()
                    .as_bytes();
                let name = c_string("cgroup", name)?;
                // Co-mounted controllers are found by their single names too: cpu -> cpu,cpuacct.
                for controller in &hierarchy.controllers {
                    if !controller.starts_with("name=") && controller.as_bytes() != name.as_bytes()
                    {
                        links.push((c_string("cgroup", controller.as_bytes())?, name.clone()));
                    }
                }
                mounts.push(V1Hierarchy {
                    options: v1_options(hierarchy)?,
                    directory: path(&directory)?,
                    inherited: path(&hierarchy.own_dir())?,
                    name,
                });
            }
            Ok(MountKind::CgroupV1 {
                hierarchies: mounts,
                links,
                namespaced: input.spec.namespaces().has(Kind::Cgroup),
                label: None,
            })
        }
    }
}

/// Type "cgroup2": on a hybrid host the one beside the others; None where there is none.
pub(super) fn unified(input: &Input<'_>) -> Result<Option<MountKind>> {
    let CgroupMode::V1 { unified, .. } = &input.host.cgroup else {
        return plan(input).map(Some);
    };
    let Some(unified) = unified else {
        return Ok(None);
    };
    let own = match input.cgroup {
        CgroupRecord::V1 { paths, .. } => paths.get("").cloned(),
        _ => None,
    };
    let path = |path: &Path| c_string("cgroup", path.as_os_str().as_bytes());
    Ok(Some(MountKind::CgroupV2 {
        directory: path(&own.unwrap_or_else(|| unified.own_dir()))?,
        mountpoint: path(&unified.mountpoint)?,
        namespaced: input.spec.namespaces().has(Kind::Cgroup),
    }))
}

/// A named hierarchy has no controllers, which the kernel wants said: "none,name=systemd".
fn v1_options(hierarchy: &Hierarchy) -> Result<Vec<(CString, Option<CString>)>> {
    let mut list = Vec::new();
    for controller in &hierarchy.controllers {
        match controller.strip_prefix("name=") {
            Some(name) => {
                list.push((c"none".to_owned(), None));
                list.push((
                    c"name".to_owned(),
                    Some(c_string("cgroup", name.as_bytes())?),
                ));
            }
            None => list.push((c_string("cgroup", controller.as_bytes())?, None)),
        }
    }
    Ok(list)
}
