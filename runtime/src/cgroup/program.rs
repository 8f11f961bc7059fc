//! The v2 device filter: device rules as a BPF program of type CGROUP_DEVICE. Pure.
//!
//! ```text
//! r2 = type, r3 = access, r4 = major << 20 | minor, r5 = major
//! for each kind of device:  another kind -> next
//!     for each exception:   unless it covers (access, device) -> next;  return !default
//! return default
//! ```
//!
//! What the verifier does at every start grows with the conditional jumps: a device of which
//! everything is allowed costs one.

use super::devices::{Access, DeviceKind, DeviceRules, Match};

// <linux/bpf_common.h>, <linux/bpf.h>
const LOAD_WORD: u8 = 0x61;
const AND32_IMM: u8 = 0x54;
const OR32_REG: u8 = 0x4c;
const SHIFT_LEFT32_IMM: u8 = 0x64;
const SHIFT_RIGHT32_IMM: u8 = 0x74;
const MOVE32_IMM: u8 = 0xb4;
const MOVE32_REG: u8 = 0xbc;
const MOVE64_IMM: u8 = 0xb7;
const JUMP_EQUAL_IMM: u8 = 0x15;
const JUMP_UNEQUAL_IMM: u8 = 0x55;
const JUMP_UNEQUAL_REG: u8 = 0x5d;
const EXIT: u8 = 0x95;

const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// A device number as the kernel keeps it: 12 bits and 20 bits (MINORBITS).
const MINOR_BITS: i32 = 20;
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// Exceptions that one test of the kind covers: jumps have 16 bits.
const GROUP: usize = 1000;

/// `struct bpf_insn` as the kernel reads it from memory.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    let mut bytes = [0u8; 8];
    bytes[0] = code;
    bytes[1] = if cfg!(target_endian = "little") {
        src << 4 | dst
    } else {
        dst << 4 | src
    };
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn answer(allow: bool) -> [u64; 2] {
    [
        instruction(MOVE64_IMM, 0, 0, 0, i32::from(allow)),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

pub(super) fn assemble(rules: &DeviceRules) -> Vec<u64> {
    let mut program = vec![
        // struct bpf_cgroup_dev_ctx { u32 access_type, major, minor }; type in the low half
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(AND32_IMM, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 3, 1, 0, 0),
        instruction(SHIFT_RIGHT32_IMM, 3, 0, 0, 16),
        instruction(LOAD_WORD, 5, 1, 4, 0),
        instruction(LOAD_WORD, 4, 1, 8, 0),
        instruction(MOVE32_REG, 1, 5, 0, 0),
        instruction(SHIFT_LEFT32_IMM, 1, 0, 0, MINOR_BITS),
        instruction(OR32_REG, 4, 1, 0, 0),
    ];
    for (kind, number) in [(DeviceKind::Char, CHAR), (DeviceKind::Block, BLOCK)] {
        let mut exceptions: Vec<_> = rules
            .exceptions
            .iter()
            .filter(|(device, _)| device.kind == kind && exists(**device))
            .collect();
        // One that covers all leaves nothing to the others: the verifier refuses code that no jump
        // reaches.
        if let Some(at) = exceptions.iter().position(|found| covers_all(*found)) {
            exceptions = vec![exceptions[at]];
        }
        for group in exceptions.chunks(GROUP) {
            let mut block = Vec::with_capacity(group.len() * 4);
            for (device, access) in group {
                block.extend(exception(**device, **access, !rules.default_allow));
            }
            let past = block.len() as i16;
            program.push(instruction(JUMP_UNEQUAL_IMM, 2, 0, past, number));
            program.extend(block);
        }
    }
    program.extend(answer(rules.default_allow));
    program
}

/// Whether any device has these numbers; a rule for another would cover one that it does not name.
fn exists(device: Match) -> bool {
    device.major.is_none_or(|major| major <= MAX_MAJOR)
        && device.minor.is_none_or(|minor| minor <= MAX_MINOR)
}

fn covers_all((device, access): (&Match, &Access)) -> bool {
    device.major.is_none() && device.minor.is_none() && access.is_all()
}

/// At most 9 instructions.
fn exception(device: Match, access: Access, allow: bool) -> Vec<u64> {
    let mut mask = 0;
    for (letter, bit) in [
        (Access::READ, READ),
        (Access::WRITE, WRITE),
        (Access::MKNOD, MKNOD),
    ] {
        if access.has(letter) {
            mask |= bit;
        }
    }
    // Tests as (code, dst, src, immediate); each jumps past the answer when it fails.
    let mut tests = Vec::with_capacity(7);
    if !access.is_all() {
        // An allowed access must lie within the mask; a denied one is any that touches it.
        tests.push((MOVE32_REG, 1, 3, 0));
        tests.push((AND32_IMM, 1, 0, mask));
        if allow {
            tests.push((JUMP_UNEQUAL_REG, 1, 3, 0));
        } else {
            tests.push((JUMP_EQUAL_IMM, 1, 0, 0));
        }
    }
    match (device.major, device.minor) {
        (Some(major), Some(minor)) => {
            let number = (major << MINOR_BITS | minor).cast_signed();
            if number >= 0 {
                tests.push((JUMP_UNEQUAL_IMM, 4, 0, number));
            } else {
                // The immediate of a 64-bit comparison is signed.
                tests.push((MOVE32_IMM, 1, 0, number));
                tests.push((JUMP_UNEQUAL_REG, 4, 1, 0));
            }
        }
        (Some(major), None) => tests.push((JUMP_UNEQUAL_IMM, 5, 0, major.cast_signed())),
        (None, Some(minor)) => {
            tests.push((MOVE32_REG, 1, 4, 0));
            tests.push((AND32_IMM, 1, 0, MAX_MINOR.cast_signed()));
            tests.push((JUMP_UNEQUAL_IMM, 1, 0, minor.cast_signed()));
        }
        (None, None) => {}
    }
    let count = tests.len();
    let mut block = Vec::with_capacity(count + 2);
    for (index, (code, dst, src, immediate)) in tests.into_iter().enumerate() {
        let jumps = matches!(code, JUMP_UNEQUAL_IMM | JUMP_UNEQUAL_REG | JUMP_EQUAL_IMM);
        // Past the remaining tests and the two instructions of the answer.
        let offset = if jumps {
            (count - index - 1 + 2) as i16
        } else {
            0
        };
        block.push(instruction(code, dst, src, offset, immediate));
    }
    block.extend(answer(allow));
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program for one access: an interpreter of the instructions used above.
    fn run(program: &[u64], kind: i32, access: i32, major: u32, minor: u32) -> bool {
        let context = [(access << 16 | kind) as u32, major, minor];
        let mut r = [0u64; 11];
        let mut pc = 0usize;
        loop {
            let bytes = program[pc].to_ne_bytes();
            let (dst, src) = ((bytes[1] & 15) as usize, (bytes[1] >> 4) as usize);
            let offset = i16::from_ne_bytes([bytes[2], bytes[3]]);
            let imm = i32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            let wide = i64::from(imm) as u64;
            pc += 1;
            let jump = match bytes[0] {
                LOAD_WORD => {
                    r[dst] = u64::from(context[offset as usize / 4]);
                    false
                }
                AND32_IMM => {
                    r[dst] = u64::from(r[dst] as u32 & imm as u32);
                    false
                }
                SHIFT_RIGHT32_IMM => {
                    r[dst] = u64::from(r[dst] as u32 >> imm);
                    false
                }
                OR32_REG => {
                    r[dst] = u64::from(r[dst] as u32 | r[src] as u32);
                    false
                }
                SHIFT_LEFT32_IMM => {
                    r[dst] = u64::from((r[dst] as u32) << imm);
                    false
                }
                MOVE32_IMM => {
                    r[dst] = u64::from(imm as u32);
                    false
                }
                MOVE32_REG => {
                    r[dst] = u64::from(r[src] as u32);
                    false
                }
                MOVE64_IMM => {
                    r[dst] = wide;
                    false
                }
                JUMP_UNEQUAL_IMM => r[dst] != wide,
                JUMP_EQUAL_IMM => r[dst] == wide,
                JUMP_UNEQUAL_REG => r[dst] != r[src],
                EXIT => return r[0] == 1,
                other => panic!("instruction {other:#x}"),
            };
            if jump {
                pc += offset as usize;
            }
        }
    }

    fn device(kind: DeviceKind, major: Option<u32>, minor: Option<u32>) -> Match {
        Match { major, minor, kind }
    }

    #[test]
    fn allow_list_table() {
        let read_write = {
            let mut rules = DeviceRules::default();
            rules
                .exceptions
                .insert(device(DeviceKind::Char, None, None), Access::MKNOD);
            rules
        };
        let resources = coracle_oci::config::parse_resources(
            br#"{"devices":[{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]}"#,
        )
        .unwrap();
        let rules =
            DeviceRules::new(resources.devices().as_deref().unwrap_or_default(), None).unwrap();
        let program = assemble(&rules);
        let cases = [
            (CHAR, READ | WRITE, 1, 3, true),
            (CHAR, READ, 10, 229, true),
            (CHAR, READ | WRITE, 10, 229, true),
            // Each access must be allowed by a single exception, as on v1.
            (CHAR, READ | MKNOD, 10, 229, false),
            (CHAR, MKNOD, 99, 9, true),
            (CHAR, READ, 99, 9, false),
            (BLOCK, READ, 1, 3, false),
            (BLOCK, MKNOD, 8, 0, true),
            (CHAR, WRITE, 136, 77, true),
        ];
        for (kind, access, major, minor, want) in cases {
            assert_eq!(
                run(&program, kind, access, major, minor),
                want,
                "{kind} {access} {major}:{minor}"
            );
        }
        assert!(!run(&assemble(&read_write), CHAR, READ, 1, 3));
    }

    #[test]
    fn deny_list_table() {
        let resources = coracle_oci::config::parse_resources(
            br#"{"devices":[{"allow":true,"access":"rwm"},
                {"allow":false,"type":"c","major":10,"minor":229,"access":"w"},
                {"allow":false,"type":"b","access":"rwm"}]}"#,
        )
        .unwrap();
        let rules =
            DeviceRules::new(resources.devices().as_deref().unwrap_or_default(), None).unwrap();
        let program = assemble(&rules);
        assert!(run(&program, CHAR, READ, 10, 229));
        assert!(!run(&program, CHAR, WRITE, 10, 229));
        assert!(!run(&program, CHAR, READ | WRITE, 10, 229));
        assert!(run(&program, CHAR, WRITE, 10, 228));
        assert!(!run(&program, BLOCK, WRITE, 10, 229));
        // The default rules give mknod back.
        assert!(run(&program, BLOCK, MKNOD, 10, 229));
    }

    #[test]
    fn numbers_at_the_edges() {
        let all = Access::READ;
        for (major, minor) in [
            (Some(2047), Some(MAX_MINOR)),
            (Some(2048), Some(0)),
            (Some(MAX_MAJOR), Some(MAX_MINOR)),
            (Some(MAX_MAJOR), None),
            (None, Some(MAX_MINOR)),
        ] {
            let mut rules = DeviceRules::default();
            rules
                .exceptions
                .insert(device(DeviceKind::Char, major, minor), all);
            let program = assemble(&rules);
            let (at, sub) = (major.unwrap_or(7), minor.unwrap_or(7));
            assert!(run(&program, CHAR, READ, at, sub), "{major:?}:{minor:?}");
            assert!(!run(&program, BLOCK, READ, at, sub), "{major:?}:{minor:?}");
            assert!(!run(&program, CHAR, READ, 1, 1), "{major:?}:{minor:?}");
            assert!(!run(&program, CHAR, WRITE, at, sub), "{major:?}:{minor:?}");
        }
    }

    #[test]
    fn number_of_no_device_matches_none() {
        let mut rules = DeviceRules::default();
        // 4096 << 20 is 0:0 in 32 bits.
        rules.exceptions.insert(
            device(DeviceKind::Char, Some(MAX_MAJOR + 1), Some(0)),
            Access::READ,
        );
        assert!(!run(&assemble(&rules), CHAR, READ, 0, 0));
    }

    #[test]
    fn rule_for_all_stands_alone() {
        let mut rules = DeviceRules::default();
        for (minor, access) in [(None, Access::ALL), (Some(3), Access::READ)] {
            let major = minor.map(|_| 1);
            rules
                .exceptions
                .insert(device(DeviceKind::Char, major, minor), access);
        }
        let program = assemble(&rules);
        // Loads, the test of the kind, the answer, the default.
        assert_eq!(program.len(), 9 + 1 + 2 + 2);
        assert!(run(&program, CHAR, READ | WRITE, 99, 9));
        assert!(!run(&program, BLOCK, READ, 99, 9));
    }

    #[test]
    fn more_devices_than_a_jump_reaches() {
        let mut rules = DeviceRules::default();
        for minor in 0..20_000 {
            rules.exceptions.insert(
                device(DeviceKind::Char, Some(240), Some(minor)),
                Access::READ,
            );
        }
        rules
            .exceptions
            .insert(device(DeviceKind::Block, Some(8), Some(1)), Access::READ);
        let program = assemble(&rules);
        assert!(run(&program, CHAR, READ, 240, 19_999));
        assert!(!run(&program, CHAR, READ, 240, 20_000));
        assert!(run(&program, BLOCK, READ, 8, 1));
        assert!(!run(&program, BLOCK, READ, 240, 5));
    }
}
