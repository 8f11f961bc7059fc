//! External mounts: those whose content is not CRIU's to save, known to the images by a name.
//!
//! | mount                          | name in the images       | on restore               |
//! |--------------------------------|--------------------------|--------------------------|
//! | bind mount                     | its place, links followed| its source in the bundle |
//! | bind mount of the cgroup       | its place                | the container's cgroup   |
//! | masked file                    | /dev/null                | /dev/null                |
//! | device bound into a userns     | its place                | the host's device        |

use std::ffi::{CStr, CString, OsStr, OsString};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::rpc::ExternalMount;
use crate::error::{Error, Result};
use crate::init::resolve::{Root, at};
use crate::plan::{MountKind, MountStep, Plan};

const NULL: &str = "/dev/null";

/// What is external in a running container.
///
/// # Errors
/// The container's root cannot be looked into.
pub fn of_running(plan: &Plan, pid: i32) -> Result<Vec<ExternalMount>> {
    let path = format!("/proc/{pid}/root");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&path, flags, Mode::empty())
        .map(Root::new)
        .map_err(|error| Error::system("open", path, error))?;
    let mut mounts = Vec::new();
    for step in &plan.mounts {
        match &step.kind {
            MountKind::Bind(_) => {
                let place =
                    place_in(&root, &step.target)?.unwrap_or_else(|| absolute(&step.target));
                mounts.push(named(place.clone(), place));
            }
            _ => {
                let bound = cgroups(plan, step).into_iter();
                mounts.extend(bound.map(|(place, _)| named(place.clone(), place)));
            }
        }
    }
    for path in &plan.masked_paths {
        if let Some(place) = masked_file(&root, path)? {
            mounts.push(named(place, NULL.to_owned()));
        }
    }
    mounts.extend(devices(plan).map(|(place, _)| named(place.clone(), place)));
    Ok(mounts)
}

/// Where each external mount comes from. `places` are those of the mount steps, links followed.
pub fn of_bundle(plan: &Plan, places: &[String]) -> Vec<ExternalMount> {
    let mut mounts = Vec::new();
    for (step, place) in plan.mounts.iter().zip(places) {
        match &step.kind {
            MountKind::Bind(source) => {
                mounts.push(named(place.clone(), real(&source.path)));
            }
            _ => {
                let bound = cgroups(plan, step).into_iter();
                mounts.extend(bound.map(|(place, from)| named(place, from)));
            }
        }
    }
    if !plan.masked_paths.is_empty() {
        mounts.push(named(NULL.to_owned(), NULL.to_owned()));
    }
    mounts.extend(devices(plan).map(|(place, host)| named(place, host)));
    mounts
}

/// The path without links and dots: CRIU looks for the mount that a source is on by its text.
fn real(path: &CStr) -> String {
    let path = Path::new(OsStr::from_bytes(path.to_bytes()));
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real.to_string_lossy().into_owned()
}

fn named(key: String, val: String) -> ExternalMount {
    ExternalMount { key, val }
}

/// A target, which is relative to the root, as CRIU names it.
pub fn absolute(target: &CStr) -> String {
    format!("/{}", target.to_string_lossy())
}

/// The place and the source of each cgroup mount that is a bind mount of the container's cgroup:
/// v1 hierarchies, and cgroup2 in a user namespace, which may mount none of a namespace that it
/// does not own.
fn cgroups(plan: &Plan, step: &MountStep) -> Vec<(String, String)> {
    let place = absolute(&step.target);
    let text = |path: &CStr| path.to_string_lossy().into_owned();
    match &step.kind {
        MountKind::CgroupV1 {
            hierarchies,
            namespaced: false,
            ..
        } => hierarchies
            .iter()
            .map(|one| (format!("{place}/{}", text(&one.name)), text(&one.directory)))
            .collect(),
        MountKind::CgroupV2 {
            directory,
            namespaced: false,
            ..
        } if plan.namespaces.has_user() => vec![(place, text(directory))],
        _ => Vec::new(),
    }
}

/// The place and the source of each device that is bound, not made.
fn devices(plan: &Plan) -> impl Iterator<Item = (String, String)> {
    let bound = match plan.dev.bind && plan.dev.setup {
        true => plan.dev.nodes.as_slice(),
        false => &[],
    };
    bound.iter().map(|node| {
        let place = format!(
            "/{}/{}",
            node.parent.to_string_lossy(),
            node.name.to_string_lossy()
        );
        (place, node.host.to_string_lossy().into_owned())
    })
}

/// Where a path leads inside the container; None when nothing is there.
fn place_in(root: &Root, path: &CStr) -> Result<Option<String>> {
    match root.find(path) {
        Ok(found) => place_of(&found).map(|place| Some(place.to_string_lossy().into_owned())),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(at("openat2", path, error)),
    }
}

/// Where a masked path leads, if a file is there: a directory is masked by a tmpfs, which CRIU
/// saves like any other.
fn masked_file(root: &Root, path: &CStr) -> Result<Option<String>> {
    let found = match root.find(path) {
        Ok(found) => found,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(at("openat2", path, error)),
    };
    let stat = rustix::fs::fstat(&found).map_err(|error| at("fstat", path, error))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Ok(None);
    }
    place_of(&found).map(|place| Some(place.to_string_lossy().into_owned()))
}

/// The path of an open file, as the kernel knows it.
pub fn place_of(file: &OwnedFd) -> Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::readlink(&link, Vec::new())
        .map(|path: CString| PathBuf::from(OsString::from_vec(path.into_bytes())))
        .map_err(|error| Error::system("readlink", link, error))
}

/// Whether a mount stands in one that CRIU makes anew, with the mount point: nothing has to be
/// made for it in the root.
pub fn stands_in_another(steps: &[MountStep], index: usize) -> bool {
    let path = Path::new(&steps[index].destination);
    steps[..index].iter().any(|other| {
        let other_path = Path::new(&other.destination);
        !matches!(other.kind, MountKind::Bind(_))
            && other_path != path
            && path.starts_with(other_path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_named_without_links_and_dots() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::fs::create_dir(dir.join("there")).unwrap();
        std::os::unix::fs::symlink("there", dir.join("link")).unwrap();
        for (given, want) in [("./there/.", "there"), ("link", "there"), ("gone", "gone")] {
            let path = CString::new(format!("{}/{given}", dir.display())).unwrap();
            assert_eq!(real(&path), dir.join(want).display().to_string(), "{given}");
        }
    }
}
