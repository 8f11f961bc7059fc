//! The options of the host's cgroup2 hierarchy, which CRIU resets.
//!
//! CRIU mounts cgroup2 for itself, without options and in the host's cgroup namespace, and the kernel
//! applies those to the whole hierarchy (`apply_cgroup_root_flags`): `nsdelegate` and
//! `memory_recursiveprot`, by which systemd delegates, would be gone for everybody. They are read
//! before CRIU is started, and put back once it has ended.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick};

/// What the hierarchy had. Its end puts that back.
#[derive(Debug)]
pub struct HostCgroup {
    place: OwnedFd,
    options: Vec<CString>,
}

impl HostCgroup {
    /// None where no cgroup2 is mounted, or without options that could be lost.
    pub fn read() -> Option<Self> {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let (place, options) = mountinfo.lines().find_map(parse)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::openat(CWD, place, flags, Mode::empty()).ok()?;
        let options = options
            .into_iter()
            .map(CString::new)
            .collect::<Result<Vec<_>, _>>()
            .ok()?;
        (!options.is_empty()).then_some(Self { place, options })
    }

    fn put_back(&self) -> rustix::io::Result<()> {
        let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
        let context = fspick(&self.place, c"", flags)?;
        for option in &self.options {
            fsconfig_set_flag(&context, option.as_c_str())?;
        }
        fsconfig_reconfigure(&context)
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // In a user namespace it is not ours to set, nor could CRIU change it.
        let _ = self.put_back();
    }
}

/// The mount point and the options of its own that a cgroup2 mount has. Those with a value, and those
/// of every filesystem, are none that a new mount resets.
fn parse(line: &str) -> Option<(&str, Vec<&str>)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = filesystem.split(' ');
    if fields.next()? != "cgroup2" {
        return None;
    }
    let options = fields.nth(1)?.split(',');
    let own = options.filter(|option| !matches!(*option, "rw" | "ro") && !option.contains('='));
    Some((mount.split(' ').nth(4)?, own.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_table() {
        let cases = [
            (
                "32 24 0:27 / /sys/fs/cgroup rw,nosuid shared:8 - cgroup2 cgroup2 \
                 rw,nsdelegate,memory_recursiveprot",
                Some(("/sys/fs/cgroup", vec!["nsdelegate", "memory_recursiveprot"])),
            ),
            (
                "31 23 0:28 / /cg rw - cgroup2 none rw",
                Some(("/cg", vec![])),
            ),
            ("31 23 0:28 / /cg rw - cgroup none rw,cpu", None),
            ("not a line", None),
        ];
        for (line, want) in cases {
            assert_eq!(parse(line), want, "{line}");
        }
    }
}
