//! System call names to numbers, per architecture, and the calls that some multiplex.
//!
//! Owns the look-ups over `table.rs` and `foreign.rs`. Never decides what a profile means.

use super::Abi;
use super::abi::Column;
use super::foreign;
use super::table::ROWS;

/// One system call's numbers, in the order of `Column::Common`; negative is none.
pub(super) struct Row {
    pub name: &'static str,
    pub numbers: [i32; 5],
}

/// Bit 30 marks an x32 call; the kernel reports it under x86_64's audit architecture.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// ARM's private calls (`breakpoint`, `cacheflush`, ...) start here, far above the others.
pub(super) const ARM_PRIVATE: u32 = 0x000f_0000;

/// A system call by its place in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Syscall(usize);

pub(super) fn find(name: &str) -> Option<Syscall> {
    ROWS.binary_search_by(|row| row.name.cmp(name))
        .ok()
        .map(Syscall)
}

impl Syscall {
    /// The number as it stands in `seccomp_data.nr`.
    pub(super) fn number(self, abi: Abi) -> Option<u32> {
        match abi.column() {
            Column::Common(column) => {
                let number = u32::try_from(ROWS[self.0].numbers[column]).ok()?;
                let bit = if abi == Abi::X32 { X32_BIT } else { 0 };
                Some(number | bit)
            }
            Column::Foreign(column, base) => {
                let number = foreign::ROWS[self.0][column];
                (number != foreign::NO).then(|| u32::from(number) + base)
            }
        }
    }
}

/// A call that some architectures also reach through `socketcall(2)` or `ipc(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Multiplexed {
    /// The name of the multiplexer.
    pub through: &'static str,
    /// Its first argument.
    pub call: u32,
    /// `ipc` keeps a version in the upper half of its first argument.
    pub mask: u32,
}

/// The multiplexer of a call, where there is one: the numbers are those of linux/net.h and linux/ipc.h.
pub(super) fn multiplexed(name: &str) -> Option<Multiplexed> {
    let socket = |call| {
        Some(Multiplexed {
            through: "socketcall",
            call,
            mask: u32::MAX,
        })
    };
    let ipc = |call| {
        Some(Multiplexed {
            through: "ipc",
            call,
            mask: 0xffff,
        })
    };
    match name {
        "socket" => socket(1),
        "bind" => socket(2),
        "connect" => socket(3),
        "listen" => socket(4),
        "accept" => socket(5),
        "getsockname" => socket(6),
        "getpeername" => socket(7),
        "socketpair" => socket(8),
        "send" => socket(9),
        "recv" => socket(10),
        "sendto" => socket(11),
        "recvfrom" => socket(12),
        "shutdown" => socket(13),
        "setsockopt" => socket(14),
        "getsockopt" => socket(15),
        "sendmsg" => socket(16),
        "recvmsg" => socket(17),
        "accept4" => socket(18),
        "recvmmsg" => socket(19),
        "sendmmsg" => socket(20),
        "semop" => ipc(1),
        "semget" => ipc(2),
        "semctl" => ipc(3),
        "semtimedop" => ipc(4),
        "msgsnd" => ipc(11),
        "msgrcv" => ipc(12),
        "msgget" => ipc(13),
        "msgctl" => ipc(14),
        "shmat" => ipc(21),
        "shmdt" => ipc(22),
        "shmget" => ipc(23),
        "shmctl" => ipc(24),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_known_numbers_are_right() {
        assert!(ROWS.windows(2).all(|pair| pair[0].name < pair[1].name));
        assert_eq!(ROWS.len(), foreign::ROWS.len());
        let number = |name, abi| find(name).and_then(|row| row.number(abi));
        assert_eq!(number("read", Abi::X86_64), Some(0));
        assert_eq!(number("read", Abi::X32), Some(X32_BIT));
        assert_eq!(number("execve", Abi::X32), Some(X32_BIT | 520));
        assert_eq!(number("read", Abi::I386), Some(3));
        assert_eq!(number("read", Abi::Aarch64), Some(63));
        assert_eq!(number("open", Abi::Aarch64), None);
        assert_eq!(number("cacheflush", Abi::Arm), Some(0xf0002));
        assert_eq!(number("file_setattr", Abi::Arm), Some(469));
        assert_eq!(number("read", Abi::Mips), Some(4003));
        assert_eq!(number("read", Abi::Mipsel64), Some(5000));
        assert_eq!(number("read", Abi::Mips64N32), Some(6000));
        assert_eq!(number("openat", Abi::Riscv64), Some(56));
        assert_eq!(number("openat", Abi::Loongarch64), Some(56));
        assert_eq!(number("openat", Abi::S390x), Some(288));
        assert_eq!(number("openat", Abi::Ppc64le), Some(286));
        assert_eq!(number("riscv_hwprobe", Abi::Riscv64), Some(258));
        assert_eq!(number("riscv_hwprobe", Abi::X86_64), None);
        for abi in Abi::ALL {
            // Since Linux 5.1 new calls have one number everywhere.
            let base = number("clone3", abi).or(number("openat2", abi)).unwrap();
            assert!(
                base % 1000 == 435 || base % 1000 == 437 || abi == Abi::X32,
                "{abi:?}"
            );
        }
        assert!(find("no_such_call").is_none());
    }

    #[test]
    fn table_agrees_with_libc_on_this_architecture() {
        for (name, number) in [
            ("openat2", libc::SYS_openat2),
            ("clone3", libc::SYS_clone3),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("io_uring_setup", libc::SYS_io_uring_setup),
            ("landlock_restrict_self", libc::SYS_landlock_restrict_self),
        ] {
            let found = find(name).and_then(|row| row.number(Abi::native()));
            assert_eq!(found.map(libc::c_long::from), Some(number), "{name}");
        }
    }
}
