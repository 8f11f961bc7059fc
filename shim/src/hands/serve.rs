//! The other end: what the hands do with a request.
//!
//! Owns: the checks. Whatever comes, the answer is a message; only the end of the socket ends the
//! process. What a shim that is not itself any more could still ask for is one of these
//! things, spelled out, one at a time.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;

use super::{MAX_FDS, Program, path, receive, send, spawn, wire};
use crate::error::{Error, Kind, Result};
use wire::request::What;

/// What a program may be told by its environment; the rest of it is ours from our start.
const VARIABLES: [&str; 3] = ["CORACLE_SHIM_CALL", "CONTAINER_ID", "CONTAINER_NAMESPACE"];
const NAME: &std::ffi::CStr = c"shim-hands";
/// Descriptors get the numbers that a logging binary knows.
const MAX_TARGET: i32 = 15;

/// Until the shim's end of the socket closes.
pub fn serve(socket: &OwnedFd) -> i32 {
    let socket = socket.as_fd();
    // For `ps`: the command line is the shim's.
    let _ = rustix::thread::set_name(NAME);
    loop {
        let (answer, fd) = match receive(socket, MAX_FDS) {
            Ok((bytes, _)) if bytes.is_empty() => return 0,
            Ok((bytes, fds)) => answer(&bytes, &fds),
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => {
                (refusal(&bad("a request", &e)), None)
            }
            Err(_) => return 1,
        };
        let fd = fd.as_ref().map(AsFd::as_fd);
        if send(socket, &answer.encode_to_vec(), fd.as_slice()).is_err() {
            return 0;
        }
    }
}

fn bad(subject: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, "the shim's hands were asked for", subject).source(why)
}

fn refusal(error: &Error) -> wire::Answer {
    wire::Answer {
        done: false,
        code: error.kind().code(),
        text: error.to_string(),
        ..Default::default()
    }
}

fn done(pid: i32) -> wire::Answer {
    wire::Answer {
        done: true,
        pid,
        ..Default::default()
    }
}

pub fn answer(request: &[u8], fds: &[OwnedFd]) -> (wire::Answer, Option<OwnedFd>) {
    let answered = wire::Request::decode(request)
        .map_err(|e| bad("a request", e))
        .and_then(|request| match request.what {
            Some(What::Start(start)) => Ok((started(start, fds)?, None)),
            Some(What::Mount(r)) => {
                crate::mounts::mount_all(&r.mounts, absolute(&r.target)?)?;
                Ok((done(0), None))
            }
            Some(What::Unmount(r)) => {
                let target = absolute(&r.target)?;
                match r.rootfs {
                    true => crate::mounts::unmount_rootfs(target),
                    false => crate::mounts::unmount_all(target),
                }?;
                Ok((done(0), None))
            }
            Some(What::Owner(r)) => {
                let path = absolute(&r.path)?.to_string_lossy();
                Ok((done(0), Some(crate::sandbox::config::owner_of(&path)?)))
            }
            None => Err(bad("a request", "nothing in it")),
        });
    answered.unwrap_or_else(|e| (refusal(&e), None))
}

fn absolute(bytes: &[u8]) -> Result<&std::path::Path> {
    let path = path(bytes);
    match path.is_absolute() && !bytes.contains(&0) {
        true => Ok(path),
        false => Err(bad(&path.display().to_string(), "not an absolute path")),
    }
}

fn strings(list: Vec<Vec<u8>>) -> Result<Vec<CString>> {
    let text = |bytes| CString::new(bytes).map_err(|e| bad("a string", e));
    list.into_iter().map(text).collect()
}

fn started(start: wire::Start, fds: &[OwnedFd]) -> Result<wire::Answer> {
    absolute(&start.program)?;
    let program = CString::new(start.program).map_err(|e| bad("a program", e))?;
    let env = strings(start.env)?;
    for entry in &env {
        let name = entry.to_bytes().split(|b| *b == b'=').next().unwrap_or(b"");
        if !VARIABLES.iter().any(|known| known.as_bytes() == name) {
            return Err(bad(&entry.to_string_lossy(), "unknown variable"));
        }
    }
    if start.targets.len() != fds.len() {
        return Err(bad("descriptors", "not as many as numbers"));
    }
    if start.targets.iter().any(|t| !(0..=MAX_TARGET).contains(t)) {
        return Err(bad("descriptors", "a number out of range"));
    }
    let fds: Vec<(BorrowedFd<'_>, i32)> = fds.iter().map(AsFd::as_fd).zip(start.targets).collect();
    let program = Program {
        program: &program,
        args: &strings(start.args)?,
        env,
        fds: &fds,
        new_group: start.new_group,
    };
    let mut env = crate::process::environment();
    env.extend(program.env.iter().cloned());
    Ok(match spawn(&program, &env).run_for_parent() {
        Ok(pid) => done(pid),
        Err(e) => wire::Answer {
            done: false,
            errno: e.raw_os_error().unwrap_or(0),
            text: e.to_string(),
            ..Default::default()
        },
    })
}
