//! From `linux.cgroupsPath` to directories. Pure.
//!
//! The forms are runc's: `/a/b` counts from the root of each hierarchy, `a/b` from this process's
//! own cgroup (v1) or its parent (v2, where a cgroup with processes cannot hand controllers down),
//! and no path means the container's id in that relative form.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::CgroupRecord;

use super::mounts::{CgroupMode, Hierarchy};
use crate::error::{Error, Kind, Result};

/// What the command line says about cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Permission errors are not faults as long as the spec asks for nothing (rootless).
    pub rootless: bool,
}

/// The container's directory in each hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub version: u8,
    pub dirs: Vec<Place>,
    /// The spec named a path: then failing to use it is a fault, even when rootless.
    pub named: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The controllers of the hierarchy; empty for cgroup2.
    pub controllers: Vec<String>,
    /// Only known while planning a new container.
    pub mountpoint: PathBuf,
    pub path: PathBuf,
}

impl Place {
    pub fn key(&self) -> String {
        self.controllers.join(",")
    }
}

impl Layout {
    pub fn record(&self) -> CgroupRecord {
        let mut dirs = self.dirs.iter();
        match (self.version, dirs.next()) {
            (_, None) => CgroupRecord::None,
            (2, Some(place)) => CgroupRecord::V2 {
                path: place.path.clone(),
                unit: None,
            },
            _ => CgroupRecord::V1 {
                paths: self
                    .dirs
                    .iter()
                    .map(|p| (p.key(), p.path.clone()))
                    .collect(),
                unit: None,
            },
        }
    }

    pub fn from_record(record: &CgroupRecord) -> Layout {
        let (version, dirs) = match record {
            CgroupRecord::None => (1, Vec::new()),
            CgroupRecord::V1 { paths, .. } => (1, places(paths)),
            CgroupRecord::V2 { path, .. } => {
                let place = Place {
                    controllers: Vec::new(),
                    mountpoint: PathBuf::new(),
                    path: path.clone(),
                };
                (2, vec![place])
            }
        };
        Layout {
            version,
            dirs,
            named: true,
        }
    }
}

fn places(paths: &BTreeMap<String, PathBuf>) -> Vec<Place> {
    paths
        .iter()
        .map(|(key, path)| Place {
            controllers: key
                .split(',')
                .filter(|c| !c.is_empty())
                .map(str::to_owned)
                .collect(),
            mountpoint: PathBuf::new(),
            path: path.clone(),
        })
        .collect()
}

pub(super) fn layout(
    cgroups_path: Option<&Path>,
    id: &ContainerId,
    mode: &CgroupMode,
) -> Result<Layout> {
    let named = cgroups_path.filter(|path| !path.as_os_str().is_empty());
    refuse_systemd(named)?;
    // An absolute path stays absolute and a relative one relative, however many `..` they hold.
    let absolute = named.is_some_and(Path::is_absolute);
    let inner = clean(named.unwrap_or_else(|| id.as_ref()));
    if inner.as_os_str().is_empty() {
        let path = named.unwrap_or(Path::new("")).display().to_string();
        return Err(Error::new(
            Kind::Invalid,
            "linux.cgroupsPath: the root of a hierarchy cannot be a container's cgroup:",
            path,
        ));
    }
    let place = |hierarchy: &Hierarchy| Place {
        controllers: hierarchy.controllers.clone(),
        path: if absolute {
            hierarchy.mountpoint.clone()
        } else {
            hierarchy.own_dir()
        }
        .join(&inner),
        mountpoint: hierarchy.mountpoint.clone(),
    };
    let (version, dirs) = match mode {
        CgroupMode::V1 {
            hierarchies,
            unified,
        } => (1, hierarchies.iter().chain(unified).map(place).collect()),
        CgroupMode::V2 { mountpoint, own } => {
            let base = if absolute {
                Path::new("/")
            } else {
                own.parent().unwrap_or(own)
            };
            let path = mountpoint
                .join(base.strip_prefix("/").unwrap_or(base))
                .join(&inner);
            (
                2,
                vec![Place {
                    controllers: Vec::new(),
                    mountpoint: mountpoint.clone(),
                    path,
                }],
            )
        }
    };
    Ok(Layout {
        version,
        dirs,
        named: named.is_some(),
    })
}

/// A directory of that name would be what nobody has asked for.
fn refuse_systemd(path: Option<&Path>) -> Result<()> {
    let text = path.and_then(Path::to_str).unwrap_or_default();
    let mut parts = text.split(':');
    let slice = parts
        .next()
        .is_some_and(|slice| slice.is_empty() || slice.ends_with(".slice"));
    if slice && parts.count() == 2 && !text.contains('/') {
        return Err(Error::new(
            Kind::Invalid,
            "linux.cgroupsPath: the slice:prefix:name form needs --systemd-cgroup:",
            text,
        ));
    }
    Ok(())
}

/// The path without `.`, `..` and the leading slash; `..` never leaves the top.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1() -> CgroupMode {
        let hierarchy = |controllers: &[&str], mount: &str, own: &str| Hierarchy {
            controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
            mountpoint: mount.into(),
            root: "/".into(),
            own: own.into(),
        };
        CgroupMode::V1 {
            hierarchies: vec![
                hierarchy(&["memory"], "/sys/fs/cgroup/memory", "/own"),
                hierarchy(&["cpu", "cpuacct"], "/sys/fs/cgroup/cpu,cpuacct", "/"),
            ],
            unified: Some(hierarchy(&[], "/sys/fs/cgroup/unified", "/")),
        }
    }

    fn v2(own: &str) -> CgroupMode {
        CgroupMode::V2 {
            mountpoint: "/sys/fs/cgroup".into(),
            own: own.into(),
        }
    }

    #[test]
    fn path_table() {
        let id = ContainerId::parse("c1").unwrap();
        let cases: &[(Option<&str>, CgroupMode, &str)] = &[
            (None, v1(), "/sys/fs/cgroup/memory/own/c1"),
            (Some(""), v1(), "/sys/fs/cgroup/memory/own/c1"),
            (Some("a/b"), v1(), "/sys/fs/cgroup/memory/own/a/b"),
            (Some("/a/b"), v1(), "/sys/fs/cgroup/memory/a/b"),
            (Some("/a/../../b"), v1(), "/sys/fs/cgroup/memory/b"),
            (Some("../../b"), v1(), "/sys/fs/cgroup/memory/own/b"),
            (None, v2("/"), "/sys/fs/cgroup/c1"),
            (
                None,
                v2("/user.slice/session"),
                "/sys/fs/cgroup/user.slice/c1",
            ),
            (
                Some("a"),
                v2("/user.slice/session"),
                "/sys/fs/cgroup/user.slice/a",
            ),
            (Some("/a"), v2("/user.slice/session"), "/sys/fs/cgroup/a"),
        ];
        for (path, mode, want) in cases {
            let layout = layout(path.map(Path::new), &id, mode).unwrap();
            assert_eq!(layout.dirs[0].path, Path::new(want), "{path:?}");
        }
    }

    #[test]
    fn v1_record_has_every_hierarchy() {
        let id = ContainerId::parse("c1").unwrap();
        let layout = layout(Some(Path::new("/a")), &id, &v1()).unwrap();
        let CgroupRecord::V1 { paths, .. } = layout.record() else {
            panic!("not v1")
        };
        let paths: Vec<_> = paths
            .iter()
            .map(|(k, p)| (k.as_str(), p.to_str().unwrap()))
            .collect();
        assert_eq!(
            paths,
            [
                ("", "/sys/fs/cgroup/unified/a"),
                ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/a"),
                ("memory", "/sys/fs/cgroup/memory/a"),
            ]
        );
    }

    #[test]
    fn refused_forms_name_the_field() {
        let id = ContainerId::parse("c1").unwrap();
        for path in ["/", "..", "system.slice:docker:x", ":docker:x"] {
            let error = layout(Some(Path::new(path)), &id, &v1()).unwrap_err();
            assert!(error.to_string().contains("linux.cgroupsPath"), "{error}");
        }
    }
}
