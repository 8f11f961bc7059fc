//! Names of units and slices, and the cgroups that they stand for. Pure.

use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;

use super::address::Scope;
use crate::error::{Error, Result};

/// The unit of a container and where it is in systemd's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// `runc-id.scope`, or a name of the spec's.
    pub name: String,
    /// `system.slice`: the last part only, as systemd's properties take it.
    pub slice: String,
    /// The slice as directories, from the root of systemd's tree.
    pub slice_path: PathBuf,
    /// What the spec calls the container, for the unit's description.
    pub title: String,
}

/// What `slice:prefix:name` says; without a path, the runtime's own choice.
///
/// # Errors
/// The path has another form, or the slice or the unit has an impossible name.
pub fn parse(path: Option<&Path>, id: &ContainerId, scope: Scope) -> Result<Unit> {
    let text = match path {
        None => "",
        Some(path) => path
            .to_str()
            .ok_or_else(|| Error::invalid("linux.cgroupsPath: not UTF-8"))?,
    };
    // Callers look for "runc-<id>.scope", whichever runtime they have configured.
    let (slice, prefix, name) = match text {
        "" => ("", "runc", id.as_str()),
        text => match text.split(':').collect::<Vec<_>>()[..] {
            [slice, prefix, name] => (slice, prefix, name),
            _ => {
                return Err(Error::invalid(format!(
                    "linux.cgroupsPath: expected cgroupsPath to be of format \
                     \"slice:prefix:name\" for systemd cgroups, got {text:?} instead"
                )));
            }
        },
    };
    let default = match scope {
        Scope::System => "system.slice",
        Scope::User => "user.slice",
    };
    let slice = if slice.is_empty() { default } else { slice };
    let unit = match name.strip_suffix(".slice") {
        // systemd attaches processes to scopes and services only.
        Some(_) => {
            return Err(Error::invalid(format!(
                "linux.cgroupsPath: {name:?} is a slice, which takes no processes"
            )));
        }
        None => format!("{prefix}-{name}.scope"),
    };
    check_name(&unit)?;
    Ok(Unit {
        slice_path: expand_slice(slice)?,
        name: unit,
        slice: slice.to_owned(),
        title: name.to_owned(),
    })
}

impl Unit {
    /// The cgroup below the one of the manager.
    pub fn cgroup(&self) -> PathBuf {
        self.slice_path.join(&self.name)
    }
}

/// The letters of systemd.unit(5), and its limit of 255 bytes.
fn check_name(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    if name.len() > 255 || !name.bytes().all(fits) {
        return Err(Error::invalid(format!(
            "linux.cgroupsPath: {name:?} is no name of a systemd unit"
        )));
    }
    Ok(())
}

/// `a-b.slice` is the cgroup `a.slice/a-b.slice`, and `-.slice` the root. Relative.
///
/// # Errors
/// It is no name of a slice.
pub fn expand_slice(slice: &str) -> Result<PathBuf> {
    let invalid = || Error::invalid(format!("linux.cgroupsPath: invalid slice name: {slice}"));
    let name = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    if name.contains('/') {
        return Err(invalid());
    }
    check_name(slice)?;
    if name == "-" {
        return Ok(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut end = 0;
    for component in name.split('-') {
        if component.is_empty() {
            return Err(invalid());
        }
        end += component.len();
        path.push(format!("{}.slice", &name[..end]));
        end += 1;
    }
    Ok(path)
}

/// The object path of a unit, with all but letters and digits as `_xx`.
pub fn object_path(name: &str) -> String {
    let mut path = String::from("/org/freedesktop/systemd1/unit/");
    for (at, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && at > 0) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

/// 257 of `257.4-1~deb13u1`, `v245.4-1.fc32`, `252`.
pub fn version_number(text: &str) -> Option<u32> {
    let digits = text.trim_start_matches('v');
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_table() {
        let id = ContainerId::parse("c1").unwrap();
        let cases: &[(Option<&str>, Scope, &str, &str)] = &[
            (None, Scope::System, "system.slice", "runc-c1.scope"),
            (Some(""), Scope::User, "user.slice", "runc-c1.scope"),
            (
                Some("machine-a.slice:libpod:x"),
                Scope::System,
                "machine.slice/machine-a.slice",
                "libpod-x.scope",
            ),
            (
                Some(":docker:1234"),
                Scope::System,
                "system.slice",
                "docker-1234.scope",
            ),
            (Some("::x"), Scope::System, "system.slice", "-x.scope"),
            (Some("-.slice:a:b"), Scope::System, "", "a-b.scope"),
            // Dots alone are letters of a name like any other.
            (Some("a.slice:..:c"), Scope::System, "a.slice", "..-c.scope"),
        ];
        for (path, scope, slice, name) in cases {
            let unit = parse(path.map(Path::new), &id, *scope).unwrap();
            assert_eq!(unit.slice_path, Path::new(slice), "{path:?}");
            assert_eq!(unit.name, *name, "{path:?}");
            assert_eq!(unit.cgroup(), Path::new(slice).join(name));
        }
        for path in [
            "/a/b",
            "a:b",
            "a.slice:b:c:d",
            "a:b:c",
            "a--b.slice:b:c",
            "-a.slice:b:c",
            "a.slice/b.slice:b:c",
            ".slice:b:c",
            "a.slice:b:c/d",
            "a.slice:b:c d",
            "a.slice:b:c.slice",
        ] {
            let error = parse(Some(Path::new(path)), &id, Scope::System).unwrap_err();
            assert!(
                error.to_string().starts_with("linux.cgroupsPath"),
                "{error}"
            );
        }
    }

    #[test]
    fn slice_table() {
        let cases = [
            ("system.slice", Some("system.slice")),
            (
                "test-a-b.slice",
                Some("test.slice/test-a.slice/test-a-b.slice"),
            ),
            ("-.slice", Some("")),
            ("test--a.slice", None),
            ("-test.slice", None),
            ("test-.slice", None),
            (".slice", None),
            ("test", None),
            ("", None),
        ];
        for (slice, want) in cases {
            assert_eq!(expand_slice(slice).ok(), want.map(PathBuf::from), "{slice}");
        }
    }

    #[test]
    fn object_paths_are_escaped() {
        assert_eq!(
            object_path("runc-c1.scope"),
            "/org/freedesktop/systemd1/unit/runc_2dc1_2escope"
        );
        assert_eq!(object_path("1a"), "/org/freedesktop/systemd1/unit/_31a");
    }

    #[test]
    fn version_table() {
        for (text, want) in [
            ("257.4-1~deb13u1", Some(257)),
            ("v245.4-1.fc32", Some(245)),
            ("252", Some(252)),
            ("", None),
            ("x1", None),
        ] {
            assert_eq!(version_number(text), want, "{text}");
        }
    }
}
