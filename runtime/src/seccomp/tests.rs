//! Runs compiled programs in a BPF interpreter and compares them with a naive reading of the
//! profile.

use std::collections::BTreeMap;

use coracle_oci::config::spec::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Act, LinuxSeccompArg, LinuxSeccompOperator as Op,
};
use serde_json::{Value, json};

use super::syscalls::{ARM_PRIVATE, X32_BIT, find, multiplexed};
use super::{Abi, Compiled, MAX_PROGRAM, SockFilter, compile};

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;
const ENOSYS: u32 = ERRNO | 38;

#[derive(Debug, Clone, Copy)]
struct Call {
    arch: u32,
    nr: u32,
    args: [u64; 6],
}

impl Call {
    fn bytes(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&self.nr.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.arch.to_le_bytes());
        for (at, arg) in self.args.iter().enumerate() {
            bytes[16 + 8 * at..24 + 8 * at].copy_from_slice(&arg.to_le_bytes());
        }
        bytes
    }
}

/// Classic BPF as seccomp runs it; anything the kernel's checker would refuse panics.
fn interpret(program: &[SockFilter], call: Call) -> u32 {
    run(program, &call.bytes(), u32::from_le_bytes)
}

pub(super) fn run(program: &[SockFilter], data: &[u8; 64], load: fn([u8; 4]) -> u32) -> u32 {
    let (mut at, mut a) = (0, 0u32);
    loop {
        let SockFilter { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |condition: bool| at += usize::from(if condition { jt } else { jf });
        match code {
            0x20 => {
                let from = k as usize;
                assert!(from.is_multiple_of(4) && from < 64);
                a = load(data[from..from + 4].try_into().unwrap());
            }
            0x54 => a &= k,
            0x05 => at += k as usize,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

/// What the kernel's `bpf_check_classic` asks of jumps: forward and inside the program.
fn check(program: &[SockFilter]) {
    assert!(!program.is_empty() && program.len() <= MAX_PROGRAM);
    for (at, instruction) in program.iter().enumerate() {
        let left = program.len() - at - 1;
        match instruction.code {
            0x05 => assert!((instruction.k as usize) < left),
            0x15 | 0x25 | 0x35 => {
                assert!(usize::from(instruction.jt) < left && usize::from(instruction.jf) < left);
            }
            _ => {}
        }
    }
    assert_eq!(program.last().unwrap().code, 0x06);
}

/// The profile read word by word, in no hurry.
fn naive(profile: &LinuxSeccomp, native: Abi, call: Call) -> u32 {
    let default = word(profile.default_action(), profile.default_errno_ret());
    let listed = |arch| {
        profile
            .architectures()
            .as_deref()
            .unwrap_or_default()
            .contains(&arch)
    };
    let abi = match call.arch {
        0xc000_003e if call.nr & X32_BIT != 0 && listed(Arch::ScmpArchX32) => Abi::X32,
        0xc000_003e => Abi::X86_64,
        0x4000_0003 => Abi::I386,
        0xc000_00b7 => Abi::Aarch64,
        0x4000_0028 => Abi::Arm,
        _ => return KILL_PROCESS,
    };
    let known = abi == native
        || (abi.runs_on(native)
            && listed(match abi {
                Abi::X86_64 => Arch::ScmpArchX86_64,
                Abi::I386 => Arch::ScmpArchX86,
                Abi::X32 => Arch::ScmpArchX32,
                Abi::Aarch64 => Arch::ScmpArchAarch64,
                Abi::Arm => Arch::ScmpArchArm,
                other => panic!("{other:?}"),
            }));
    if !known {
        return KILL_PROCESS;
    }
    let mut matches = Vec::new();
    let mut unconditional = None;
    let mut newest = None;
    for rule in profile.syscalls().as_deref().unwrap_or_default() {
        let action = word(rule.action(), rule.errno_ret());
        let args = rule.args().as_deref().unwrap_or_default();
        for name in rule.names() {
            let number = find(name).and_then(|row| row.number(abi));
            if let Some(number) = number
                && !(abi == Abi::Arm && number >= ARM_PRIVATE)
            {
                newest = newest.max(Some(number));
            }
            if action == default {
                continue;
            }
            if abi == Abi::I386
                && let Some(multiplexed) = multiplexed(name)
                && find(multiplexed.through).unwrap().number(abi) == Some(call.nr)
                && call.args[0] as u32 & multiplexed.mask == multiplexed.call
                && (args.is_empty()
                    || !matches!(rule.action(), Act::ScmpActAllow | Act::ScmpActLog))
            {
                matches.push(action);
            }
            if number != Some(call.nr) {
                continue;
            }
            if args.is_empty() {
                unconditional = unconditional.or(Some(action));
                continue;
            }
            let mut seen = BTreeMap::new();
            args.iter()
                .for_each(|arg| *seen.entry(arg.index()).or_insert(0) += 1);
            let holds = |arg: &LinuxSeccompArg| holds(arg, abi, call);
            let matched = if seen.values().any(|count| *count > 1) {
                args.iter().any(holds)
            } else {
                args.iter().all(holds)
            };
            if matched {
                matches.push(action);
            }
        }
    }
    if let Some(action) = unconditional {
        return action;
    }
    if let Some(action) = matches
        .into_iter()
        .min_by_key(|action| (action & 0xffff_0000) as i32)
    {
        return action;
    }
    let permissive = matches!(
        profile.default_action(),
        Act::ScmpActAllow | Act::ScmpActLog | Act::ScmpActTrace
    );
    let tail = !permissive && default != ENOSYS && newest.is_some();
    if tail && call.nr > newest.unwrap() && !(abi == Abi::Arm && call.nr >= ARM_PRIVATE) {
        return ENOSYS;
    }
    if !tail && abi == Abi::X86_64 && call.nr >= X32_BIT && call.nr != u32::MAX {
        return KILL_PROCESS;
    }
    default
}

fn holds(arg: &LinuxSeccompArg, abi: Abi, call: Call) -> bool {
    let narrow = |value: u64| {
        if abi.is_32_bit() {
            value & 0xffff_ffff
        } else {
            value
        }
    };
    let (seen, value) = (narrow(call.args[arg.index()]), narrow(arg.value()));
    match arg.op() {
        Op::ScmpCmpNe => seen != value,
        Op::ScmpCmpLt => seen < value,
        Op::ScmpCmpLe => seen <= value,
        Op::ScmpCmpEq => seen == value,
        Op::ScmpCmpGe => seen >= value,
        Op::ScmpCmpGt => seen > value,
        Op::ScmpCmpMaskedEq => seen & value == arg.value_two().unwrap_or(0) & value,
    }
}

fn word(action: Act, errno: Option<u32>) -> u32 {
    let data = errno.unwrap_or(1);
    match action {
        Act::ScmpActKill | Act::ScmpActKillThread => 0,
        Act::ScmpActKillProcess => KILL_PROCESS,
        Act::ScmpActTrap => 0x0003_0000,
        Act::ScmpActErrno => ERRNO | data,
        Act::ScmpActNotify => 0x7fc0_0000,
        Act::ScmpActTrace => 0x7ff0_0000 | data,
        Act::ScmpActLog => 0x7ffc_0000,
        Act::ScmpActAllow => ALLOW,
    }
}

pub(super) fn parse(profile: Value) -> LinuxSeccomp {
    serde_json::from_value(profile).unwrap()
}

fn compiled(profile: Value) -> Compiled {
    let compiled = compile(&parse(profile), Abi::X86_64).unwrap();
    check(&compiled.program);
    compiled
}

fn number(name: &str, abi: Abi) -> u32 {
    find(name).unwrap().number(abi).unwrap()
}

fn call(abi: Abi, name: &str, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call {
        arch: abi.audit_arch(),
        nr: number(name, abi),
        args: all,
    }
}

/// A generator of the xorshift family: the same profiles every time.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Values around the edges where halves of a comparison go wrong.
    pub(super) fn value(&mut self) -> u64 {
        let edges = [0, 1, 2, 40, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
        let high = *self.pick(&[0, 0, 1, 0xffff_ffff, 0x8000_0000]);
        (high << 32) | *self.pick(&edges)
    }
}

const ACTS: &[&str] = super::ACTIONS;

fn random_profile(random: &mut Random, archs: &[&str]) -> Value {
    let defaults: Vec<_> = ACTS
        .iter()
        .filter(|act| **act != "SCMP_ACT_NOTIFY")
        .collect();
    let mut syscalls = Vec::new();
    for _ in 0..random.below(30) {
        let names: Vec<_> = (0..1 + random.below(8))
            .map(|_| match random.below(12) {
                0 => "not_a_system_call",
                1 => "socket",
                2 => "semop",
                3 => "socketcall",
                _ => super::table::ROWS[random.below(super::table::ROWS.len())].name,
            })
            .filter(|name| *name != "write")
            .collect();
        let args: Vec<_> = (0..random.below(4))
            .map(|_| {
                json!({ "index": random.below(6), "value": random.value(),
                        "valueTwo": random.value(), "op": random.pick(super::OPERATORS) })
            })
            .collect();
        let action = *random.pick(ACTS);
        let mut rule = json!({ "names": names, "action": action, "args": args });
        if random.below(2) == 0 {
            rule["errnoRet"] = json!(random.below(4096));
        }
        syscalls.push(rule);
    }
    let mut listed: Vec<_> = archs.to_vec();
    listed.retain(|_| random.below(3) != 0);
    json!({ "defaultAction": random.pick(&defaults), "architectures": listed,
            "listenerPath": "/run/agent", "syscalls": syscalls })
}

fn compare(profile: &LinuxSeccomp, native: Abi, random: &mut Random, abis: &[Abi]) {
    let compiled = compile(profile, native).unwrap();
    check(&compiled.program);
    let mut numbers: Vec<u32> = vec![0, 1, 999, u32::MAX, X32_BIT, X32_BIT | 999, ARM_PRIVATE];
    for abi in abis {
        for rule in profile.syscalls().as_deref().unwrap_or_default() {
            for name in rule.names() {
                if let Some(number) = find(name).and_then(|row| row.number(*abi)) {
                    numbers.extend([number.saturating_sub(1), number, number + 1]);
                }
            }
        }
    }
    numbers.extend([102, 117]);
    numbers.sort_unstable();
    numbers.dedup();
    for abi in abis {
        for &nr in &numbers {
            for _ in 0..6 {
                let mut args = [0; 6];
                args.iter_mut().for_each(|arg| *arg = random.value());
                if abi.is_32_bit() && *abi != Abi::X32 {
                    args.iter_mut().for_each(|arg| *arg &= 0xffff_ffff);
                }
                let call = Call {
                    arch: abi.audit_arch(),
                    nr,
                    args,
                };
                assert_eq!(
                    interpret(&compiled.program, call),
                    naive(profile, native, call),
                    "{call:x?} under {}",
                    serde_json::to_string(profile).unwrap()
                );
            }
        }
    }
}

#[test]
fn random_profiles_do_what_they_say_on_x86() {
    let archs = [
        "SCMP_ARCH_X86_64",
        "SCMP_ARCH_X86",
        "SCMP_ARCH_X32",
        "SCMP_ARCH_ARM",
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..60 {
        let profile = parse(random_profile(&mut random, &archs));
        compare(
            &profile,
            Abi::X86_64,
            &mut random,
            &[Abi::X86_64, Abi::I386, Abi::Aarch64],
        );
    }
}

#[test]
fn random_profiles_do_what_they_say_on_arm() {
    let archs = ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X86"];
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..60 {
        let profile = parse(random_profile(&mut random, &archs));
        compare(
            &profile,
            Abi::Aarch64,
            &mut random,
            &[Abi::Aarch64, Abi::Arm, Abi::I386],
        );
    }
}

#[test]
fn every_operator_compares_all_64_bits() {
    let edges = [
        0u64,
        1,
        0xffff_fffe,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        u64::MAX,
    ];
    for op in super::OPERATORS {
        for value in edges {
            let profile = parse(json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                { "names": ["ioctl"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 5, "value": value, "valueTwo": 1, "op": op }] }] }));
            let compiled = compile(&profile, Abi::X86_64).unwrap();
            for seen in edges {
                let call = call(Abi::X86_64, "ioctl", &[0, 0, 0, 0, 0, seen]);
                let result = interpret(&compiled.program, call);
                assert_eq!(
                    result,
                    naive(&profile, Abi::X86_64, call),
                    "{seen:x} {op} {value:x}"
                );
            }
        }
    }
}

#[test]
fn calls_newer_than_the_profile_get_enosys() {
    let program = compiled(json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        { "names": ["read", "openat2"], "action": "SCMP_ACT_ALLOW" }] }))
    .program;
    let run = |name| interpret(&program, call(Abi::X86_64, name, &[]));
    assert_eq!(run("read"), ALLOW);
    assert_eq!(run("write"), ERRNO | 1);
    assert_eq!(run("openat2"), ALLOW);
    assert_eq!(run("pidfd_getfd"), ENOSYS);
    let permissive = compiled(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        { "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5 }] }))
    .program;
    assert_eq!(
        interpret(&permissive, call(Abi::X86_64, "read", &[])),
        ERRNO | 5
    );
    assert_eq!(
        interpret(&permissive, call(Abi::X86_64, "openat2", &[])),
        ALLOW
    );
}

#[test]
fn x32_calls_are_refused_unless_listed() {
    let profile = |archs: Value| {
        compiled(
            json!({ "defaultAction": "SCMP_ACT_LOG", "architectures": archs, "syscalls": [
            { "names": ["read"], "action": "SCMP_ACT_ALLOW" }] }),
        )
        .program
    };
    let read = call(Abi::X32, "read", &[]);
    assert_eq!(interpret(&profile(json!([])), read), KILL_PROCESS);
    assert_eq!(interpret(&profile(json!(["SCMP_ARCH_X32"])), read), ALLOW);
    let skipped = Call {
        nr: u32::MAX,
        ..read
    };
    assert_eq!(interpret(&profile(json!([])), skipped), 0x7ffc_0000);
}

#[test]
fn a_condition_on_a_multiplexed_call_never_opens_the_multiplexer() {
    let program = compiled(json!({ "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86"], "syscalls": [
        { "names": ["socket"], "action": "SCMP_ACT_ALLOW",
          "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_NE" }] },
        { "names": ["connect"], "action": "SCMP_ACT_ALLOW" }] }))
    .program;
    let run = |name, args: &[u64]| interpret(&program, call(Abi::I386, name, args));
    assert_eq!(run("socket", &[1]), ALLOW);
    assert_eq!(run("socket", &[40]), ERRNO | 1);
    assert_eq!(run("socketcall", &[1]), ERRNO | 1);
    assert_eq!(run("socketcall", &[3]), ALLOW);
}

#[test]
fn terms_are_checked_and_passed_on() {
    let notify = json!({ "defaultAction": "SCMP_ACT_ERRNO", "listenerPath": "/run/agent",
        "listenerMetadata": "m", "flags": ["SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }] });
    let compiled = compiled(notify.clone());
    assert!(compiled.notify);
    assert_eq!(compiled.flags, 2 | 8 | 32);
    assert_eq!(compiled.listener_path.unwrap().to_str(), Some("/run/agent"));
    assert_eq!(compiled.listener_metadata.as_deref(), Some("m"));

    let refused = |change: &dyn Fn(&mut Value), text: &str| {
        let mut profile = notify.clone();
        change(&mut profile);
        let error = compile(&parse(profile), Abi::X86_64)
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
    };
    refused(
        &|p| p["defaultAction"] = json!("SCMP_ACT_NOTIFY"),
        "defaultAction",
    );
    refused(&|p| p["listenerPath"] = json!(""), "listenerPath");
    refused(&|p| p["listenerPath"] = json!("agent"), "not absolute");
    refused(
        &|p| p["syscalls"][0]["names"] = json!(["write"]),
        "write syscall",
    );
    refused(
        &|p| p["syscalls"][0]["names"] = json!([""]),
        "syscalls[0].names",
    );
    refused(&|p| p["defaultErrnoRet"] = json!(5000), "defaultErrnoRet");
    refused(
        &|p| {
            p["syscalls"][0]["args"] = json!([{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }]);
        },
        "syscalls[0].args",
    );
}

#[test]
fn flags_default_to_spec_allow_and_an_empty_list_to_none() {
    let profile = |flags: Value| {
        let mut profile = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
        profile["flags"] = flags;
        compiled(profile).flags
    };
    assert_eq!(profile(Value::Null), 4);
    assert_eq!(profile(json!([])), 0);
    assert_eq!(
        profile(json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])),
        0
    );
}

#[test]
fn a_program_over_the_kernels_limit_is_refused() {
    let rules: Vec<_> = (0..1500)
        .map(|value| {
            json!({ "names": ["ioctl"], "action": "SCMP_ACT_ALLOW",
                    "args": [{ "index": 1, "value": value, "op": "SCMP_CMP_EQ" }] })
        })
        .collect();
    let profile = parse(json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules }));
    let error = compile(&profile, Abi::X86_64).unwrap_err().to_string();
    assert!(error.contains("4096"), "{error}");
}

#[test]
fn long_chains_are_jumped_over() {
    let rules: Vec<_> = (0..100)
        .map(|value| {
            json!({ "names": ["ioctl", "socket"], "action": "SCMP_ACT_ALLOW",
                    "args": [{ "index": 1, "value": value, "op": "SCMP_CMP_EQ" }] })
        })
        .collect();
    let mut random = Random(7);
    let profile = parse(json!({ "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"], "syscalls": rules }));
    compare(
        &profile,
        Abi::X86_64,
        &mut random,
        &[Abi::X86_64, Abi::I386],
    );
    let program = compile(&profile, Abi::X86_64).unwrap().program;
    assert_eq!(
        interpret(&program, call(Abi::X86_64, "ioctl", &[0, 99])),
        ALLOW
    );
    assert_eq!(
        interpret(&program, call(Abi::X86_64, "ioctl", &[0, 100])),
        ERRNO | 1
    );
}

/// seccompiler has one action for matches and one for the rest: in that subset it must agree.
#[test]
fn seccompiler_agrees_where_it_can_express_the_profile() {
    use seccompiler as s;
    let mut random = Random(0xdead_beef_cafe);
    for _ in 0..100 {
        let mut rules: BTreeMap<i64, Vec<s::SeccompRule>> = BTreeMap::new();
        let mut syscalls = Vec::new();
        for _ in 0..1 + random.below(12) {
            let name = super::table::ROWS[random.below(super::table::ROWS.len())].name;
            let Some(number) = find(name).and_then(|row| row.number(Abi::X86_64)) else {
                continue;
            };
            let (index, value, value_two) = (random.below(6), random.value(), random.value());
            let (op, theirs) = match random.below(7) {
                0 => ("SCMP_CMP_EQ", s::SeccompCmpOp::Eq),
                1 => ("SCMP_CMP_NE", s::SeccompCmpOp::Ne),
                2 => ("SCMP_CMP_LT", s::SeccompCmpOp::Lt),
                3 => ("SCMP_CMP_LE", s::SeccompCmpOp::Le),
                4 => ("SCMP_CMP_GT", s::SeccompCmpOp::Gt),
                5 => ("SCMP_CMP_GE", s::SeccompCmpOp::Ge),
                _ => ("SCMP_CMP_MASKED_EQ", s::SeccompCmpOp::MaskedEq(value)),
            };
            let compared = if op == "SCMP_CMP_MASKED_EQ" {
                value_two & value
            } else {
                value
            };
            let condition =
                s::SeccompCondition::new(index as u8, s::SeccompCmpArgLen::Qword, theirs, compared)
                    .unwrap();
            rules
                .entry(number.into())
                .or_default()
                .push(s::SeccompRule::new(vec![condition]).unwrap());
            syscalls.push(json!({ "names": [name], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": index, "value": value, "valueTwo": value_two, "op": op }] }));
        }
        let numbers: Vec<_> = rules.keys().copied().collect();
        let theirs: s::BpfProgram = s::SeccompFilter::new(
            rules,
            s::SeccompAction::Errno(38),
            s::SeccompAction::Allow,
            s::TargetArch::x86_64,
        )
        .unwrap()
        .try_into()
        .unwrap();
        let theirs: Vec<_> = theirs
            .iter()
            .map(|i| SockFilter {
                code: i.code,
                jt: i.jt,
                jf: i.jf,
                k: i.k,
            })
            .collect();
        let ours = compiled(
            json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
                                    "syscalls": syscalls }),
        )
        .program;
        for nr in numbers.into_iter().chain([0, 1, 500]) {
            for _ in 0..20 {
                let mut args = [0; 6];
                args.iter_mut().for_each(|arg| *arg = random.value());
                let call = Call {
                    arch: Abi::X86_64.audit_arch(),
                    nr: nr as u32,
                    args,
                };
                assert_eq!(
                    interpret(&ours, call),
                    interpret(&theirs, call),
                    "{call:x?}"
                );
            }
        }
    }
}

/// The shape of containerd's default profile: one long allow list, conditions, and ENOSYS.
fn containerd_like() -> LinuxSeccomp {
    let refused = [
        "add_key",
        "bpf",
        "clone3",
        "keyctl",
        "mount",
        "open_by_handle_at",
        "ptrace",
        "reboot",
        "request_key",
        "setns",
        "socket",
        "umount2",
        "unshare",
        "clone",
        "personality",
    ];
    let allowed: Vec<_> = super::table::ROWS
        .iter()
        .map(|row| row.name)
        .filter(|n| !refused.contains(n))
        .collect();
    let personality = |value: u64| {
        json!({ "names": ["personality"], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }] })
    };
    let mut syscalls = vec![
        json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" }),
        json!({ "names": ["socket"], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_NE" }] }),
        json!({ "names": ["clone"], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": 0, "value": 0x7e02_0000, "valueTwo": 0,
                           "op": "SCMP_CMP_MASKED_EQ" }] }),
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }),
    ];
    syscalls.extend([0, 8, 0x20000, 0x20008, 0xffff_ffff].map(personality));
    parse(json!({ "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": syscalls }))
}

#[test]
fn containerds_default_profile_is_expressible_and_short() {
    let profile = containerd_like();
    let mut random = Random(11);
    compare(
        &profile,
        Abi::X86_64,
        &mut random,
        &[Abi::X86_64, Abi::I386],
    );
    compare(
        &profile,
        Abi::Aarch64,
        &mut random,
        &[Abi::Aarch64, Abi::Arm],
    );
    let program = compile(&profile, Abi::X86_64).unwrap().program;
    assert!(program.len() < 600, "{} instructions", program.len());
    let run = |name, args: &[u64]| interpret(&program, call(Abi::X86_64, name, args));
    assert_eq!(run("unshare", &[0x1000_0000]), ERRNO | 1);
    assert_eq!(run("clone", &[0x1000_0000]), ERRNO | 1);
    assert_eq!(run("clone", &[0x0120_0011]), ALLOW);
    assert_eq!(run("clone3", &[]), ENOSYS);
    assert_eq!(run("socket", &[40]), ERRNO | 1);
    assert_eq!(run("socket", &[2]), ALLOW);
}

#[test]
fn the_kernel_takes_the_program_and_obeys_it() {
    let compiled = compile(&containerd_like(), Abi::native()).unwrap();
    std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        coracle_sys::seccomp::set_filter(&compiled.program, compiled.flags).unwrap();
        let refused = rustix::net::socket(
            rustix::net::AddressFamily::VSOCK,
            rustix::net::SocketType::STREAM,
            None,
        );
        assert_eq!(refused.unwrap_err(), rustix::io::Errno::PERM);
        rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        )
        .unwrap();
        assert_eq!(
            rustix::mount::unmount("/nowhere", rustix::mount::UnmountFlags::empty()),
            Err(rustix::io::Errno::PERM)
        );
    })
    .join()
    .unwrap();
}

#[test]
fn unknown_calls_are_named_where_their_rule_says_anything() {
    let profile: LinuxSeccomp = serde_json::from_value(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["read", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["kexec_tomorrow"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            // What the default says already; runc looks at no name of it.
            {"names": ["redundant_call"], "action": "SCMP_ACT_ERRNO"},
        ]
    }))
    .unwrap();
    assert_eq!(
        super::unknown_calls(&profile),
        [
            "unknown seccomp syscall \"no_such_call\" ignored",
            "unknown seccomp syscall \"kexec_tomorrow\" ignored",
        ]
    );
}

/// Not a test of behaviour: `cargo test -r -- --ignored seccomp::tests::timing --nocapture`.
#[test]
#[ignore = "measures"]
fn timing() {
    let profile = containerd_like();
    let root = tempfile::tempdir().unwrap();
    super::cache::load_or_compile(root.path(), &profile, Abi::X86_64).unwrap();
    let time = |name: &str, f: &dyn Fn()| {
        let start = std::time::Instant::now();
        (0..200).for_each(|_| f());
        println!("{name}: {:?}", start.elapsed() / 200);
    };
    time("compile", &|| drop(compile(&profile, Abi::X86_64)));
    time("cached", &|| {
        drop(super::cache::load_or_compile(
            root.path(),
            &profile,
            Abi::X86_64,
        ));
    });
}
