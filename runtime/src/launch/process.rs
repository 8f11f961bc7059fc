//! Processes that this one has made, from outside: reaping, limits, scores.

use std::os::fd::BorrowedFd;

use coracle_oci::spec::PosixRlimitType;
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus};

use crate::error::{Error, Kind, Result};

pub fn pid_of(pid: i32) -> Result<Pid> {
    Pid::from_raw(pid)
        .ok_or_else(|| Error::new(Kind::Internal, "invalid process id", pid.to_string()))
}

/// Waits for a child to end.
///
/// # Errors
/// It is no child of this process.
pub fn reap(pid: i32) -> Result<WaitStatus> {
    let wanted = pid_of(pid)?;
    loop {
        match rustix::process::waitpid(Some(wanted), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(status),
            Ok(None) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::system("waitpid", pid.to_string(), error)),
        }
    }
}

/// Kills a child through its pidfd and reaps it.
pub fn end(pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(Error::system("pidfd_send_signal", pid.to_string(), error)),
    }
    reap(pid).map(drop)
}

/// The shell's convention: the code, or 128 and the signal.
pub fn exit_code(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(code & 0xff).unwrap_or(255)
}

/// Sets resource limits: of a child, or of this process.
///
/// Across the change of ids only CAP_SYS_RESOURCE sets them, so a process sets its own before it;
/// in a user namespace that capability does not count, so there they are set before entering it.
///
/// # Errors
/// A hard limit is raised without CAP_SYS_RESOURCE.
pub fn set_limits(pid: Option<i32>, limits: &[(PosixRlimitType, u64, u64)]) -> Result<()> {
    let process = pid.map(pid_of).transpose()?;
    for (kind, soft, hard) in limits {
        // RLIM_INFINITY is the largest number in the kernel and None in rustix.
        let value = |limit: u64| (limit != u64::MAX).then_some(limit);
        let limit = Rlimit {
            current: value(*soft),
            maximum: value(*hard),
        };
        rustix::process::prlimit(process, resource(*kind), limit).map_err(|error| {
            let what = format!("error setting rlimit {kind} (soft {soft}, hard {hard})");
            Error::system(what, "", error)
        })?;
    }
    Ok(())
}

/// The limits as a user namespace is entered: files are not yet held down, since the mounts that
/// the parent has opened need many. To lower a limit takes no right, so the program's init does.
pub fn with_room_for_files(
    limits: &[(PosixRlimitType, u64, u64)],
) -> Vec<(PosixRlimitType, u64, u64)> {
    let now = rustix::process::getrlimit(Resource::Nofile);
    let (soft_now, hard_now) = (
        now.current.unwrap_or(u64::MAX),
        now.maximum.unwrap_or(u64::MAX),
    );
    let roomy = |(kind, soft, hard): (PosixRlimitType, u64, u64)| match kind {
        PosixRlimitType::RlimitNofile => (kind, soft.max(soft_now), hard.max(hard_now)),
        _ => (kind, soft, hard),
    };
    limits.iter().copied().map(roomy).collect()
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Writes oom_score_adj; a value that is in force already needs no right to write it.
///
/// # Errors
/// Lowering it without CAP_SYS_RESOURCE.
pub fn set_oom_score_adj(pid: i32, adjustment: i32) -> Result<()> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let text = adjustment.to_string();
    match std::fs::write(&path, &text) {
        Ok(()) => Ok(()),
        Err(error) => {
            if std::fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == text) {
                return Ok(());
            }
            Err(Error::system(
                format!("failed to set oom_score_adj {text}: write"),
                path,
                error,
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_never_held_down_early() {
        let limits = [
            (PosixRlimitType::RlimitNofile, 8, u64::MAX),
            (PosixRlimitType::RlimitCore, 0, 0),
        ];
        let roomy = with_room_for_files(&limits);
        assert!(roomy[0].1 > 8);
        assert_eq!((roomy[0].2, roomy[1]), (u64::MAX, limits[1]));
    }

    #[test]
    fn exit_code_follows_the_shell() {
        for (script, want) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
            let child = std::process::Command::new("sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            let code = exit_code(reap(pid).unwrap());
            // Reaped above, which std does not know.
            std::mem::forget(child);
            assert_eq!(code, want, "{script}");
        }
    }
}
