//! The system call interfaces that a profile can name, and how their calls look to a filter. Pure.

use coracle_oci::config::spec::Arch;

/// A system call interface that a program can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Abi {
    X86_64,
    I386,
    X32,
    Aarch64,
    Arm,
    Loongarch64,
    M68k,
    Mips,
    Mips64,
    Mips64N32,
    Mipsel,
    Mipsel64,
    Mipsel64N32,
    Parisc,
    Parisc64,
    Ppc,
    Ppc64,
    Ppc64le,
    Riscv64,
    S390,
    S390x,
    Sh,
    Sheb,
}

/// Where an ABI's numbers stand: a column of `table` or of `foreign`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    Common(usize),
    /// And what is added to each number.
    Foreign(usize, u32),
}

impl Abi {
    #[cfg(test)]
    pub(super) const ALL: [Self; 23] = [
        Self::X86_64,
        Self::I386,
        Self::X32,
        Self::Aarch64,
        Self::Arm,
        Self::Loongarch64,
        Self::M68k,
        Self::Mips,
        Self::Mips64,
        Self::Mips64N32,
        Self::Mipsel,
        Self::Mipsel64,
        Self::Mipsel64N32,
        Self::Parisc,
        Self::Parisc64,
        Self::Ppc,
        Self::Ppc64,
        Self::Ppc64le,
        Self::Riscv64,
        Self::S390,
        Self::S390x,
        Self::Sh,
        Self::Sheb,
    ];

    /// The one that this build is for, among those that Linux distributions have hosts of.
    pub const fn native() -> Self {
        if cfg!(target_arch = "aarch64") {
            Self::Aarch64
        } else if cfg!(target_arch = "arm") {
            Self::Arm
        } else if cfg!(target_arch = "loongarch64") {
            Self::Loongarch64
        } else if cfg!(target_arch = "riscv64") {
            Self::Riscv64
        } else if cfg!(target_arch = "s390x") {
            Self::S390x
        } else if cfg!(all(target_arch = "powerpc64", target_endian = "little")) {
            Self::Ppc64le
        } else if cfg!(target_arch = "powerpc64") {
            Self::Ppc64
        } else if cfg!(all(target_arch = "mips64", target_endian = "little")) {
            Self::Mipsel64
        } else if cfg!(target_arch = "mips64") {
            Self::Mips64
        } else {
            Self::X86_64
        }
    }

    /// The ABI of a name in a profile; None for "native".
    pub(super) fn of(arch: Arch) -> Option<Self> {
        Some(match arch {
            Arch::ScmpArchNative => return None,
            Arch::ScmpArchX86 => Self::I386,
            Arch::ScmpArchX86_64 => Self::X86_64,
            Arch::ScmpArchX32 => Self::X32,
            Arch::ScmpArchArm => Self::Arm,
            Arch::ScmpArchAarch64 => Self::Aarch64,
            Arch::ScmpArchMips => Self::Mips,
            Arch::ScmpArchMips64 => Self::Mips64,
            Arch::ScmpArchMips64n32 => Self::Mips64N32,
            Arch::ScmpArchMipsel => Self::Mipsel,
            Arch::ScmpArchMipsel64 => Self::Mipsel64,
            Arch::ScmpArchMipsel64n32 => Self::Mipsel64N32,
            Arch::ScmpArchPpc => Self::Ppc,
            Arch::ScmpArchPpc64 => Self::Ppc64,
            Arch::ScmpArchPpc64le => Self::Ppc64le,
            Arch::ScmpArchS390 => Self::S390,
            Arch::ScmpArchS390x => Self::S390x,
            Arch::ScmpArchParisc => Self::Parisc,
            Arch::ScmpArchParisc64 => Self::Parisc64,
            Arch::ScmpArchRiscv64 => Self::Riscv64,
            Arch::ScmpArchLoongarch64 => Self::Loongarch64,
            Arch::ScmpArchM68k => Self::M68k,
            Arch::ScmpArchSh => Self::Sh,
            Arch::ScmpArchSheb => Self::Sheb,
        })
    }

    pub(super) fn column(self) -> Column {
        use Column::{Common, Foreign};
        match self {
            Self::X86_64 => Common(0),
            Self::I386 => Common(1),
            Self::X32 => Common(2),
            Self::Aarch64 => Common(3),
            Self::Arm => Common(4),
            Self::Loongarch64 => Foreign(0, 0),
            Self::M68k => Foreign(1, 0),
            // arch/mips/include/uapi/asm/unistd.h
            Self::Mips | Self::Mipsel => Foreign(2, 4000),
            Self::Mips64 | Self::Mipsel64 => Foreign(3, 5000),
            Self::Mips64N32 | Self::Mipsel64N32 => Foreign(4, 6000),
            Self::Parisc => Foreign(5, 0),
            Self::Parisc64 => Foreign(6, 0),
            Self::Ppc => Foreign(7, 0),
            Self::Ppc64 | Self::Ppc64le => Foreign(8, 0),
            Self::Riscv64 => Foreign(9, 0),
            Self::S390 => Foreign(10, 0),
            Self::S390x => Foreign(11, 0),
            Self::Sh | Self::Sheb => Foreign(12, 0),
        }
    }

    /// AUDIT_ARCH_* of linux/audit.h: what `seccomp_data.arch` holds.
    pub(super) fn audit_arch(self) -> u32 {
        const IS_64_BIT: u32 = 0x8000_0000;
        const LITTLE_ENDIAN: u32 = 0x4000_0000;
        const N32: u32 = 0x2000_0000;
        // The ELF machine of each.
        let (machine, wide) = match self {
            Self::X86_64 | Self::X32 => (62, true),
            Self::I386 => (3, false),
            Self::Aarch64 => (183, true),
            Self::Arm => (40, false),
            Self::Loongarch64 => (258, true),
            Self::M68k => (4, false),
            Self::Mips | Self::Mipsel => (8, false),
            Self::Mips64 | Self::Mipsel64 => (8, true),
            Self::Mips64N32 | Self::Mipsel64N32 => (8 | N32, true),
            Self::Parisc => (15, false),
            Self::Parisc64 => (15, true),
            Self::Ppc => (20, false),
            Self::Ppc64 | Self::Ppc64le => (21, true),
            Self::Riscv64 => (243, true),
            Self::S390 => (22, false),
            Self::S390x => (22, true),
            Self::Sh | Self::Sheb => (42, false),
        };
        let width = if wide { IS_64_BIT } else { 0 };
        let order = if self.is_big_endian() {
            0
        } else {
            LITTLE_ENDIAN
        };
        machine | width | order
    }

    /// Whether arguments are compared as 32 bits, as libseccomp does for these.
    pub(super) fn is_32_bit(self) -> bool {
        matches!(
            self,
            Self::I386
                | Self::X32
                | Self::Arm
                | Self::M68k
                | Self::Mips
                | Self::Mips64N32
                | Self::Mipsel
                | Self::Mipsel64N32
                | Self::Parisc
                | Self::Ppc
                | Self::S390
                | Self::Sh
                | Self::Sheb
        )
    }

    /// Whether the high half of a 64-bit argument comes first in memory.
    pub(super) fn is_big_endian(self) -> bool {
        matches!(
            self,
            Self::M68k
                | Self::Mips
                | Self::Mips64
                | Self::Mips64N32
                | Self::Parisc
                | Self::Parisc64
                | Self::Ppc
                | Self::Ppc64
                | Self::S390
                | Self::S390x
                | Self::Sheb
        )
    }

    /// Whether its kernels have `socketcall(2)` and `ipc(2)`.
    pub(super) fn multiplexes(self) -> bool {
        matches!(
            self,
            Self::I386
                | Self::M68k
                | Self::Mips
                | Self::Mipsel
                | Self::Ppc
                | Self::Ppc64
                | Self::Ppc64le
                | Self::S390
                | Self::S390x
                | Self::Sh
                | Self::Sheb
        )
    }

    /// Whether a kernel of architecture `native` can run this ABI at all.
    pub(super) fn runs_on(self, native: Self) -> bool {
        self.family() == native.family()
    }

    /// The widest ABI of the same kernels.
    fn family(self) -> Self {
        match self {
            Self::X86_64 | Self::I386 | Self::X32 => Self::X86_64,
            Self::Aarch64 | Self::Arm => Self::Aarch64,
            Self::Mips | Self::Mips64 | Self::Mips64N32 => Self::Mips64,
            Self::Mipsel | Self::Mipsel64 | Self::Mipsel64N32 => Self::Mipsel64,
            Self::Parisc | Self::Parisc64 => Self::Parisc64,
            Self::Ppc | Self::Ppc64 => Self::Ppc64,
            Self::S390 | Self::S390x => Self::S390x,
            Self::Loongarch64
            | Self::M68k
            | Self::Ppc64le
            | Self::Riscv64
            | Self::Sh
            | Self::Sheb => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_of_the_spec_is_an_abi() {
        for abi in Abi::ALL {
            // The crate's numbers are those of linux/audit.h, but for x32, which has none.
            let arch = Abi::ALL_NAMES[abi as usize];
            let parsed: Arch = serde_json::from_value(format!("SCMP_ARCH_{arch}").into()).unwrap();
            assert_eq!(Abi::of(parsed), Some(abi), "{arch}");
            if abi != Abi::X32 {
                assert_eq!(abi.audit_arch(), parsed as u32, "{arch}");
            }
            let listed = crate::seccomp::ARCHITECTURES;
            assert!(listed.contains(&format!("SCMP_ARCH_{arch}").as_str()));
        }
        assert_eq!(crate::seccomp::ARCHITECTURES.len(), Abi::ALL.len());
        assert!(crate::seccomp::ARCHITECTURES.is_sorted());
    }

    impl Abi {
        const ALL_NAMES: [&'static str; 23] = [
            "X86_64",
            "X86",
            "X32",
            "AARCH64",
            "ARM",
            "LOONGARCH64",
            "M68K",
            "MIPS",
            "MIPS64",
            "MIPS64N32",
            "MIPSEL",
            "MIPSEL64",
            "MIPSEL64N32",
            "PARISC",
            "PARISC64",
            "PPC",
            "PPC64",
            "PPC64LE",
            "RISCV64",
            "S390",
            "S390X",
            "SH",
            "SHEB",
        ];
    }
}
