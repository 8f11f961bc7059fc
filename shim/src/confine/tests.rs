use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};

use super::{calls, files, is_no};

/// Both parts bind the calling thread alone, and whatever it starts.
fn confined<T: Send>(
    restrict: impl FnOnce() -> Result<String, String> + Send,
    look: impl FnOnce(&str) -> T + Send,
) -> Option<T> {
    let look = || {
        rustix::thread::set_no_new_privs(true).unwrap();
        match restrict() {
            Ok(text) => Some(look(&text)),
            Err(why) => {
                use std::io::Write as _;
                let _ = write!(std::io::stdout(), "\nSKIP shim confinement: {why}\n");
                None
            }
        }
    };
    std::thread::scope(|scope| scope.spawn(look).join().unwrap())
}

fn errno<T>(result: io::Result<T>) -> Option<Errno> {
    result.err().and_then(|e| Errno::from_io_error(&e))
}

#[test]
fn the_switch_is_off_only_where_it_says_so() {
    for text in ["0", "false", "No", "OFF"] {
        assert!(is_no(text), "{text}");
    }
    for text in ["", "1", "true", "yes", "00"] {
        assert!(!is_no(text), "{text}");
    }
}

#[test]
fn sixty_calls_at_most_and_each_once() {
    let numbers = calls::numbers();
    let different: BTreeSet<i64> = numbers.iter().copied().collect();
    assert_eq!(different.len(), numbers.len());
    assert!(numbers.len() <= calls::AT_MOST, "{}", numbers.len());
    for forbidden in [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_ptrace,
        libc::SYS_mount,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_prctl,
    ] {
        assert!(!different.contains(&forbidden), "{forbidden}");
    }
}

#[test]
fn files_are_changed_where_logs_may_lie_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let program = |path: &Path| Command::new(path).arg("--version").output();
    assert!(program(Path::new("/bin/busybox")).is_ok());
    confined(
        || files::restrict(&[]),
        |text| {
            let allowed = dir.path().join("a");
            std::fs::create_dir(&allowed).unwrap();
            std::fs::write(allowed.join("log"), "line").unwrap();
            std::fs::rename(allowed.join("log"), allowed.join("log.1")).unwrap();
            let _listener = UnixListener::bind(allowed.join("socket")).unwrap();
            UnixStream::connect(allowed.join("socket")).unwrap();
            let fifo =
                |name| rustix::fs::mknodat(CWD, allowed.join(name), FileType::Fifo, Mode::RWXU, 0);
            fifo("fifo").unwrap();
            std::fs::remove_dir_all(&allowed).unwrap();
            File::open("/etc/passwd").unwrap();
            OpenOptions::new().write(true).open("/dev/null").unwrap();

            let denied = Some(Errno::ACCESS);
            for place in [
                "/usr",
                "/usr/bin",
                "/etc",
                "/boot",
                "/",
                "/dev",
                "/sys/kernel",
            ] {
                let path = Path::new(place).join("coracle-confinement");
                if Path::new(place).exists() {
                    assert_eq!(errno(File::create(&path)), denied, "{place}");
                    assert_eq!(errno(std::fs::create_dir(&path)), denied, "{place}");
                }
            }
            let write = |path| OpenOptions::new().write(true).open(path);
            for path in [
                "/etc/passwd",
                "/proc/self/oom_score_adj",
                "/proc/sys/kernel/hostname",
            ] {
                assert_eq!(errno(write(path)), denied, "{path}");
            }
            for kind in [FileType::CharacterDevice, FileType::BlockDevice] {
                let node = dir.path().join("node");
                let made = rustix::fs::mknodat(CWD, node, kind, Mode::RUSR, 0);
                assert_eq!(made, Err(Errno::ACCESS), "{kind:?}");
            }
            assert_eq!(errno(program(Path::new("/bin/busybox"))), denied);
            let mounted = rustix::mount::mount_bind("/tmp", dir.path());
            assert_eq!(mounted, Err(Errno::PERM));
            // Network rights came with the fourth ABI.
            let abi = text.trim_start_matches("Landlock ABI ");
            let abi: u32 = abi.split(',').next().unwrap().parse().unwrap();
            if abi >= 4 {
                assert_eq!(errno(TcpStream::connect(address)), denied);
                assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), denied);
            }
        },
    );
}

#[test]
fn own_places_are_writable_wherever_they_lie() {
    let inside = Path::new("/dev/shm").join(format!("coracle-confinement-{}", std::process::id()));
    std::fs::create_dir(&inside).unwrap();
    confined(
        || files::restrict(&[&inside]),
        |_| std::fs::write(inside.join("x"), "x").unwrap(),
    );
    std::fs::remove_dir_all(&inside).unwrap();
}

/// The filter leaves a thread no way to end but with its process: results go through a pipe, and
/// the thread stays where it is until the tests are over.
#[test]
fn other_calls_fail_with_eperm() {
    let dir = tempfile::tempdir().unwrap();
    let (mut reader, mut writer) = io::pipe().unwrap();
    let path = dir.path().to_owned();
    std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        calls::restrict().unwrap();
        let wrong = std::panic::catch_unwind(|| refused_and_allowed(&path))
            .unwrap_or_else(|_| vec!["a call that must work did not".to_owned()]);
        io::Write::write_all(&mut writer, wrong.join("; ").as_bytes()).unwrap();
        drop(writer);
        loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        }
    });
    assert_eq!(io::read_to_string(&mut reader).unwrap(), "");
}

/// What was not refused.
fn refused_and_allowed(dir: &Path) -> Vec<String> {
    std::fs::write(dir.join("x"), "x").unwrap();
    std::fs::rename(dir.join("x"), dir.join("y")).unwrap();
    assert_eq!(std::fs::read(dir.join("y")).unwrap(), b"x");
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1);
    let listener = UnixListener::bind(dir.join("s")).unwrap();
    UnixStream::connect(dir.join("s")).unwrap();
    drop(listener);
    drop(vec![0u8; 1 << 20]);
    let socket = |family| rustix::net::socket(family, SocketType::STREAM, None).map(drop);
    let exec =
        nix::unistd::execve::<&std::ffi::CStr, &std::ffi::CStr>(c"/bin/true", &[c"true"], &[]);
    let results = [
        (
            "execve",
            exec.map(drop)
                .map_err(|e| Errno::from_raw_os_error(e as i32)),
        ),
        ("socket(AF_INET)", socket(AddressFamily::INET)),
        ("socket(AF_NETLINK)", socket(AddressFamily::NETLINK)),
        ("mount", rustix::mount::mount_bind("/tmp", dir)),
        (
            "umount",
            rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH),
        ),
        (
            "mknod",
            rustix::fs::mknodat(CWD, dir.join("f"), FileType::Fifo, Mode::RWXU, 0),
        ),
        (
            "chmod(setuid)",
            rustix::fs::chmod(dir.join("y"), Mode::SUID | Mode::RWXU),
        ),
        ("symlink", rustix::fs::symlink("y", dir.join("z"))),
        ("chroot", rustix::process::chroot(dir)),
        ("sethostname", rustix::system::sethostname(b"x")),
        (
            "pidfd_open",
            rustix::process::pidfd_open(
                rustix::process::getpid(),
                rustix::process::PidfdFlags::empty(),
            )
            .map(drop),
        ),
    ];
    let mut wrong: Vec<String> = results
        .into_iter()
        .filter(|(_, result)| *result != Err(Errno::PERM))
        .map(|(name, result)| format!("{name}: {result:?}"))
        .collect();
    if errno(Command::new("/bin/true").spawn()) != Some(Errno::PERM) {
        wrong.push("clone".to_owned());
    }
    wrong
}
