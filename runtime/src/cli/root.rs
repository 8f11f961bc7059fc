//! Where container state lives when `--root` says so, and when it does not.

use std::ffi::OsStr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// For root.
const ROOT: &str = "/run/coracle";

/// The default root. A user's is made here, with the sticky bit that keeps the cleaning of
/// $XDG_RUNTIME_DIR away (XDG Base Directory Specification).
///
/// # Errors
/// The user's cannot be made.
pub(super) fn default() -> Result<PathBuf> {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let Some(root) = runtime_dir.filter(|_| is_users()).map(|dir| under(&dir)) else {
        return Ok(PathBuf::from(ROOT));
    };
    let fail = |call: &'static str| {
        let root = root.display().to_string();
        move |error: std::io::Error| Error::system(call, root, error)
    };
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&root).map_err(fail("mkdir"))?;
    let sticky = std::fs::Permissions::from_mode(0o1700);
    std::fs::set_permissions(&root, sticky).map_err(fail("chmod"))?;
    Ok(root)
}

fn under(runtime_dir: &OsStr) -> PathBuf {
    Path::new(runtime_dir).join("coracle")
}

/// Whether the caller is a user: also as root of a user namespace, unless it says that it is root
/// there for good ($USER), as a container's root does.
fn is_users() -> bool {
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    in_user_namespace(&map) && std::env::var_os("USER").is_none_or(|user| user != "root")
}

/// The first user namespace maps all ids to themselves.
fn in_user_namespace(map: &str) -> bool {
    !map.is_empty() && !map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// `--root`, absolute and without detours.
///
/// # Errors
/// It is the file system's root, whose directories are no containers.
pub(super) fn absolute(root: PathBuf) -> Result<PathBuf> {
    let plain = |root: &Path| {
        let normal = |part| matches!(part, Component::RootDir | Component::Normal(_));
        root.is_absolute() && root.components().all(normal)
    };
    let root = if plain(&root) {
        root
    } else {
        let directory = std::env::current_dir()
            .map_err(|error| Error::system("getcwd", "for --root", error))?;
        cleaned(&directory.join(root))
    };
    if root == Path::new("/") {
        return Err(Error::invalid(
            "Option --root argument should not be set to /",
        ));
    }
    Ok(root)
}

/// Go's `filepath.Clean`: by the words, not by what links say.
fn cleaned(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        for (root, want) in [
            ("/a/b", PathBuf::from("/a/b")),
            ("/a/../b/./c", PathBuf::from("/b/c")),
            ("/../x", PathBuf::from("/x")),
            ("r", here.join("r")),
        ] {
            assert_eq!(absolute(root.into()).unwrap(), want, "{root}");
        }
        for root in ["/", "//", "/a/..", "/../.."] {
            let error = absolute(root.into()).unwrap_err();
            let want = "Option --root argument should not be set to /";
            assert_eq!(error.to_string(), want, "{root}");
        }
    }

    #[test]
    fn user_namespaces_have_other_maps() {
        assert!(!in_user_namespace("         0          0 4294967295\n"));
        assert!(in_user_namespace("         0       1000          1\n"));
        assert!(in_user_namespace("0 0 4294967294\n"));
        assert!(!in_user_namespace(""));
        assert_eq!(
            under(OsStr::new("/run/user/7")),
            Path::new("/run/user/7/coracle")
        );
    }
}
