//! `seccomp(2)`: installs filters, asks what the kernel knows.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

/// A BPF program's instruction, laid out as the kernel reads it.
pub type SockFilter = libc::sock_filter;

const NEW_LISTENER: u32 = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;

/// `seccomp(SECCOMP_SET_MODE_FILTER)`: puts a filter on the calling thread.
///
/// `flags` are SECCOMP_FILTER_FLAG_*; with NEW_LISTENER the answer is the notification fd, which
/// the kernel makes close-on-exec. The caller has set no_new_privs or holds CAP_SYS_ADMIN. From the
/// return on, the filter judges every call of this thread.
pub fn set_filter(program: &[SockFilter], flags: u32) -> io::Result<Option<OwnedFd>> {
    let length =
        u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let header = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `header` and the `length` instructions it points to outlive the call, and the kernel
    // copies them and writes to neither (copy_from_user in seccomp_prepare_user_filter).
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
            libc::c_long::from(flags),
            &raw const header,
        )
    };
    match result {
        ..0 => Err(io::Error::last_os_error()),
        // Without TSYNC, which we never ask for, a positive result is a listener's fd.
        fd if flags & NEW_LISTENER != 0 => {
            // SAFETY: the kernel has just opened this fd for the call, so nothing else owns it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
        }
        _ => Ok(None),
    }
}

/// `seccomp(SECCOMP_GET_ACTION_AVAIL)`: whether the kernel knows a SECCOMP_RET_* action.
pub fn action_available(action: u32) -> bool {
    // SAFETY: the kernel reads one u32 from the pointer and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_GET_ACTION_AVAIL),
            0 as libc::c_long,
            &raw const action,
        )
    };
    result == 0
}

/// Whether this kernel knows SECCOMP_FILTER_FLAG_* bits. Installs nothing: the program is missing,
/// which the kernel finds out only after it has looked at the flags.
pub fn flags_available(flags: u32) -> bool {
    // SAFETY: plain integers and a null pointer, which the kernel refuses to read from.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
            libc::c_long::from(flags),
            std::ptr::null::<libc::sock_fprog>(),
        )
    };
    result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

    #[test]
    fn a_filter_is_installed_on_its_own_thread_only() {
        let program = [
            SockFilter {
                code: 0x20,
                jt: 0,
                jf: 0,
                k: 0,
            },
            SockFilter {
                code: 0x15,
                jt: 0,
                jf: 1,
                k: libc::SYS_getppid as u32,
            },
            SockFilter {
                code: RETURN,
                jt: 0,
                jf: 0,
                k: libc::SECCOMP_RET_ERRNO | 77,
            },
            SockFilter {
                code: RETURN,
                jt: 0,
                jf: 0,
                k: libc::SECCOMP_RET_ALLOW,
            },
        ];
        // SAFETY: getppid takes no argument and touches no memory.
        let parent = || unsafe { libc::syscall(libc::SYS_getppid) };
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            assert!(
                set_filter(&program, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32)
                    .unwrap()
                    .is_none()
            );
            assert_eq!(parent(), -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(77));
            let notify = [SockFilter {
                code: RETURN,
                jt: 0,
                jf: 0,
                k: libc::SECCOMP_RET_ALLOW,
            }];
            let listener =
                set_filter(&notify, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32).unwrap();
            assert!(listener.is_some());
        })
        .join()
        .unwrap();
        assert!(parent() >= 0);
    }

    #[test]
    fn a_malformed_program_is_refused() {
        let endless = [SockFilter {
            code: 0x05,
            jt: 0,
            jf: 0,
            k: 5,
        }];
        assert_eq!(
            set_filter(&endless, 0).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
        assert_eq!(
            set_filter(&[], 0).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }

    #[test]
    fn known_actions_are_available() {
        assert!(action_available(libc::SECCOMP_RET_USER_NOTIF));
        assert!(!action_available(0x1234_0000));
        assert!(flags_available(libc::SECCOMP_FILTER_FLAG_LOG as u32));
        assert!(!flags_available(1 << 30));
    }
}
