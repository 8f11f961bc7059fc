//! Which file the container's args[0] is, looked up as its user in its root, with the error texts
//! of Go's os/exec that engines match. And $HOME, from the container's passwd.

use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader, Read};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result, errno_text};
use crate::plan::ProcessPlan;

/// More of a passwd file than any system has; an image may bring one without an end.
const MAX_PASSWD: u64 = 1 << 20;

/// The path to execute.
///
/// # Errors
/// `exec: "x": executable file not found in $PATH` and its like.
pub fn find(plan: &ProcessPlan) -> Result<CString> {
    let name = plan
        .args
        .strings()
        .first()
        .map(CString::as_c_str)
        .unwrap_or_default();
    let fail = |reason: String| {
        Err(Error::new(
            Kind::Exec,
            format!("exec: {:?}: {reason}", name.to_string_lossy()),
            "",
        ))
    };
    if name.is_empty() {
        return fail("executable file not found in $PATH".into());
    }
    if name.to_bytes().contains(&b'/') {
        return match check(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(Errno::ACCESS) => fail(errno_text(libc::EACCES)),
            Err(Errno::ISDIR) => fail(errno_text(libc::EISDIR)),
            Err(error) => fail(format!(
                "stat {}: {}",
                name.to_string_lossy(),
                errno_text(error.raw_os_error())
            )),
        };
    }
    let mut denied = false;
    for directory in plan.search_path.split(|byte| *byte == b':') {
        // An empty element means the current directory, and is as unsafe as "." itself.
        let directory = if directory.is_empty() {
            &b"."[..]
        } else {
            directory
        };
        let Ok(candidate) = CString::new([directory, b"/", name.to_bytes()].concat()) else {
            continue;
        };
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ACCESS) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return fail(errno_text(libc::EACCES));
    }
    fail("executable file not found in $PATH".into())
}

fn check(path: &CStr) -> Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // Kernels before 5.8 have no faccessat2: exec itself will tell.
        Err(Errno::NOSYS | Errno::INVAL) => Ok(()),
        result => result,
    }
}

/// "HOME=..." for a user, from /etc/passwd of the root; "/" for a user who is not in it.
pub fn home(uid: u32) -> CString {
    let home = read_home(uid).unwrap_or_else(|| b"/".to_vec());
    CString::new([b"HOME=", home.as_slice()].concat()).unwrap_or_else(|_| c"HOME=/".to_owned())
}

fn read_home(uid: u32) -> Option<Vec<u8>> {
    // O_NONBLOCK and the type check: a fifo or a device in its place must not hang the start.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/etc/passwd", flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    home_in(
        BufReader::new(std::fs::File::from(file).take(MAX_PASSWD)),
        uid,
    )
}

/// The home of the first line with this uid, unless it would not be one clean line itself.
pub fn home_in(passwd: impl BufRead, uid: u32) -> Option<Vec<u8>> {
    for line in passwd.split(b'\n') {
        let line = line.ok()?;
        let mut fields = line.split(|byte| *byte == b':');
        let id = fields.nth(2).and_then(|id| std::str::from_utf8(id).ok());
        if id.and_then(|id| id.parse::<u32>().ok()) != Some(uid) {
            continue;
        }
        let home = fields.nth(2)?;
        // A carriage return would become a second line for whoever prints the environment
        // (CVE-2026-46680).
        if home.is_empty() || home.iter().any(|byte| *byte < b' ') {
            return None;
        }
        return Some(home.to_vec());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_table() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad\nu:x:7:7::/home/u:/bin/sh\n\
                      e:x:8:8:::\nr:x:9:9::/h\r:/bin/sh\nn:x:4294967296:1::/no:\n";
        let cases: &[(u32, Option<&str>)] = &[
            (0, Some("/root")),
            (7, Some("/home/u")),
            (8, None),
            (9, None),
            (5, None),
        ];
        for (uid, want) in cases {
            let home = home_in(passwd.as_bytes(), *uid);
            assert_eq!(home.as_deref(), want.map(str::as_bytes), "{uid}");
        }
    }
}
