//! libseccomp as oracle: the same verdict for every call and many arguments, on every ABI that the
//! installed library can compile for. Programs of both sides run in the tests' interpreter.
//!
//! A small C program, compiled when the test runs, is the way to the library: nothing of coracle
//! links it. Left out is what is meant to differ: the action for foreign ABIs (the process dies,
//! not a thread), runc's -ENOSYS tail (not libseccomp's), conditions on multiplexed calls.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::syscalls::{ARM_PRIVATE, find, multiplexed};
use super::table::ROWS;
use super::tests::{Random, parse, run};
use super::{Abi, SockFilter, compile};

const HELPER: &str = r#"
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv)
{
    char line[4096];
    unsigned int arch = strtoul(argv[2], 0, 16);
    if (!strcmp(argv[1], "table")) {
        while (fgets(line, sizeof line, stdin)) {
            line[strcspn(line, "\n")] = 0;
            printf("%d\n", seccomp_syscall_resolve_name_arch(arch, line));
        }
        return 0;
    }
    scmp_filter_ctx ctx = seccomp_init(strtoul(argv[3], 0, 16));
    if (!ctx)
        return 2;
    if (arch != seccomp_arch_native()) {
        seccomp_arch_remove(ctx, SCMP_ARCH_NATIVE);
        if (seccomp_arch_add(ctx, arch))
            return 3;
    }
    while (fgets(line, sizeof line, stdin)) {
        struct scmp_arg_cmp args[6];
        unsigned int count = 0;
        unsigned int action = strtoul(strtok(line, " \n"), 0, 16);
        char *name = strtok(0, " \n"), *word;
        int number = seccomp_syscall_resolve_name(name);
        if (number == __NR_SCMP_ERROR)
            continue;
        while ((word = strtok(0, " \n"))) {
            args[count].arg = atoi(word);
            args[count].op = atoi(strtok(0, " \n"));
            args[count].datum_a = strtoull(strtok(0, " \n"), 0, 16);
            args[count].datum_b = strtoull(strtok(0, " \n"), 0, 16);
            count++;
        }
        int error = seccomp_rule_add_array(ctx, action, number, count, args);
        if (error) {
            fprintf(stderr, "%s: %s\n", name, strerror(-error));
            return 4;
        }
    }
    return seccomp_export_bpf(ctx, 1) ? 5 : 0;
}
"#;

const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
const EQUAL: usize = 3;

/// Words that a filter returns, with the names that they have in a profile.
const ACTIONS: [(u32, &str, Option<u32>); 6] = [
    (0x7fff_0000, "SCMP_ACT_ALLOW", None),
    (0x7ffc_0000, "SCMP_ACT_LOG", None),
    (0x0005_0026, "SCMP_ACT_ERRNO", Some(38)),
    (0x0005_0007, "SCMP_ACT_ERRNO", Some(7)),
    (0x0003_0000, "SCMP_ACT_TRAP", None),
    (0x7ff0_0009, "SCMP_ACT_TRACE", Some(9)),
];
/// Those of them after which no tail is wanted.
const DEFAULTS: usize = 3;

fn skip(test: &str, why: &str) {
    // Past libtest's capture.
    let _ = write!(std::io::stdout(), "\nSKIP {test}: {why}\n");
}

/// The helper program, or why there is none.
fn helper(directory: &Path) -> Result<PathBuf, String> {
    let (source, program) = (directory.join("oracle.c"), directory.join("oracle"));
    std::fs::write(&source, HELPER).unwrap();
    let built = Command::new("cc")
        .args(["-O1", "-o"])
        .args([&program, &source])
        .arg("-lseccomp")
        .output()
        .map_err(|error| format!("cc: {error}"))?;
    if built.status.success() {
        return Ok(program);
    }
    let text = String::from_utf8_lossy(&built.stderr).into_owned();
    match text.contains("seccomp.h") || text.contains("-lseccomp") {
        true => Err("libseccomp-dev is not installed".to_owned()),
        false => panic!("{text}"),
    }
}

/// What the helper answers; None for an architecture that this libseccomp does not have.
fn ask(helper: &Path, arguments: &[String], input: &str) -> Option<Vec<u8>> {
    let mut child = Command::new(helper)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    let output = child.wait_with_output().unwrap();
    if output.status.code() == Some(3) {
        return None;
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {complaint}", output.status);
    Some(output.stdout)
}

/// SCMP_ARCH_*, which is the audit architecture but for x32.
fn token(abi: Abi) -> String {
    match abi {
        Abi::X32 => "4000003e".to_owned(),
        abi => format!("{:x}", abi.audit_arch()),
    }
}

/// What libseccomp has for each row: its number, or a negative one.
fn table(helper: &Path, abi: Abi) -> Vec<i32> {
    let names: String = ROWS.iter().map(|row| format!("{}\n", row.name)).collect();
    let arguments = ["table".to_owned(), token(abi)];
    let answer = ask(helper, &arguments, &names).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    answer.lines().map(|line| line.parse().unwrap()).collect()
}

/// libseccomp has one pseudo number for these two, so that a rule for one is the other's.
const CONFUSED: [&str; 2] = ["switch_endian", "sys_debug_setcontext"];

/// The calls that libseccomp knows of as much as we do.
fn common(helper: &Path, abi: Abi) -> Vec<&'static str> {
    const UNKNOWN: i32 = -1;
    let agreed = |name: &str, theirs: i32| match find(name).unwrap().number(abi) {
        None => theirs < 0,
        Some(_) => theirs >= 0 || (multiplexed(name).is_some() && theirs != UNKNOWN),
    };
    let rows = ROWS.iter().zip(table(helper, abi));
    rows.filter(|(row, theirs)| agreed(row.name, *theirs) && !CONFUSED.contains(&row.name))
        .map(|(row, _)| row.name)
        .collect()
}

#[test]
fn call_numbers_are_libseccomps() {
    const TEST: &str = "seccomp::oracle::call_numbers_are_libseccomps";
    let directory = tempfile::tempdir().unwrap();
    let helper = match helper(directory.path()) {
        Ok(helper) => helper,
        Err(why) => return skip(TEST, &why),
    };
    for abi in Abi::ALL {
        let mut known = 0;
        for (row, theirs) in ROWS.iter().zip(table(&helper, abi)) {
            // Negative: not there, multiplexed, or newer than the library.
            let Ok(theirs) = u32::try_from(theirs) else {
                continue;
            };
            known += 1;
            // An error of libseccomp's that its later versions have put right.
            if (row.name, abi) == ("_llseek", Abi::Parisc64) {
                continue;
            }
            let ours = find(row.name).unwrap().number(abi);
            assert_eq!(ours, Some(theirs), "{} on {abi:?}", row.name);
        }
        match known {
            0 => skip(TEST, &format!("{abi:?} is not in this libseccomp")),
            known => assert!(known > 200, "{abi:?}: only {known} calls"),
        }
    }
}

/// A profile in both forms.
struct Profile {
    document: Value,
    default: u32,
    lines: String,
    /// Values that its conditions compare with.
    values: Vec<u64>,
}

/// Rules for calls that no ABI gives the same number: of two rules for one call with different
/// actions, which wins is not libseccomp's to say.
fn random_profile(random: &mut Random, abi: Abi, names: &[&'static str]) -> Profile {
    let (default, default_name, default_data) = ACTIONS[random.below(DEFAULTS)];
    let mut profile = Profile {
        document: json!({"defaultAction": default_name, "defaultErrnoRet": default_data}),
        default,
        lines: String::new(),
        values: vec![0, 1, u64::from(u32::MAX), u64::MAX],
    };
    if abi == Abi::X32 {
        profile.document["architectures"] = json!(["SCMP_ARCH_X32"]);
    }
    let mut numbers = BTreeSet::new();
    let mut rules = Vec::new();
    for _ in 0..random.below(60) + 1 {
        let name = names[random.below(names.len())];
        let call = find(name).unwrap();
        let fresh = call.number(abi).is_none_or(|number| numbers.insert(number));
        // A call that only the multiplexer has is as good as unnumbered, and may not come twice.
        let fresh = fresh && !rules.iter().any(|rule: &Value| rule["names"][0] == name);
        if !fresh || matches!(name, "socketcall" | "ipc") {
            continue;
        }
        let (action, action_name, data) = ACTIONS[random.below(ACTIONS.len())];
        if action == default {
            continue;
        }
        let conditions = match multiplexed(name) {
            Some(_) => 0,
            None => random.below(5).saturating_sub(1),
        };
        let conditions = random_conditions(random, abi, conditions);
        rules.push(
            json!({"names": [name], "action": action_name, "errnoRet": data,
            "args": conditions.iter().map(|c| c.document()).collect::<Vec<_>>()}),
        );
        profile
            .values
            .extend(conditions.iter().flat_map(|c| [c.value, c.two]));
        // libseccomp 2.5 forgets to load the number if the first call it comes to is none of the
        // architecture's.
        if call.number(abi).is_some() || (abi.multiplexes() && multiplexed(name).is_some()) {
            profile.add_lines(action, name, &conditions);
        }
    }
    profile.document["syscalls"] = rules.into();
    profile
}

/// Where two look at one argument, both are for equality, as in real profiles: of ordered ones that
/// overlap, libseccomp 2.5 takes some for true that are not.
fn random_conditions(random: &mut Random, abi: Abi, count: usize) -> Vec<Condition> {
    let mut conditions: Vec<_> = (0..count).map(|_| random_condition(random, abi)).collect();
    let indices: BTreeSet<usize> = conditions.iter().map(|c| c.index).collect();
    if indices.len() < conditions.len() {
        for condition in &mut conditions {
            (condition.operator, condition.two) = (EQUAL, 0);
        }
    }
    conditions
}

struct Condition {
    index: usize,
    operator: usize,
    value: u64,
    two: u64,
}

impl Condition {
    fn document(&self) -> Value {
        json!({"index": self.index, "op": OPERATORS[self.operator], "value": self.value,
            "valueTwo": self.two})
    }

    fn words(&self) -> String {
        let Self {
            index,
            operator,
            value,
            two,
        } = self;
        format!(" {index} {} {value:x} {two:x}", operator + 1)
    }
}

fn random_condition(random: &mut Random, abi: Abi) -> Condition {
    let mut value = || {
        let value = random.value();
        if abi.is_32_bit() {
            value & 0xffff_ffff
        } else {
            value
        }
    };
    let (value, two) = (value(), value());
    let operator = random.below(OPERATORS.len());
    Condition {
        index: random.below(6),
        operator,
        value,
        // libseccomp wants no bits there that the mask hides.
        two: if operator == 6 { value & two } else { 0 },
    }
}

impl Profile {
    /// As runc drives the library: conditions on one argument become rules of their own.
    fn add_lines(&mut self, action: u32, name: &str, conditions: &[Condition]) {
        let mut add = |words: String| {
            self.lines += &format!("{action:x} {name}{words}\n");
        };
        let indices: BTreeSet<usize> = conditions.iter().map(|c| c.index).collect();
        if indices.len() == conditions.len() {
            add(conditions.iter().map(Condition::words).collect());
        } else {
            conditions.iter().for_each(|c| add(c.words()));
        }
    }
}

/// sock_filter as the architecture itself would have it in memory.
fn decode(bytes: &[u8], big_endian: bool) -> Vec<SockFilter> {
    let instruction = |bytes: &[u8]| {
        let (code, k) = (
            bytes[..2].try_into().unwrap(),
            bytes[4..].try_into().unwrap(),
        );
        SockFilter {
            code: if big_endian {
                u16::from_be_bytes(code)
            } else {
                u16::from_le_bytes(code)
            },
            jt: bytes[2],
            jf: bytes[3],
            k: if big_endian {
                u32::from_be_bytes(k)
            } else {
                u32::from_le_bytes(k)
            },
        }
    };
    bytes.chunks_exact(8).map(instruction).collect()
}

/// seccomp_data in that architecture's memory.
fn data(abi: Abi, number: u32, arguments: [u64; 6]) -> [u8; 64] {
    let mut bytes = [0; 64];
    let big = abi.is_big_endian();
    let word = |value: u32| {
        if big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    };
    bytes[..4].copy_from_slice(&word(number));
    bytes[4..8].copy_from_slice(&word(abi.audit_arch()));
    for (at, value) in arguments.into_iter().enumerate() {
        let value = if big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        };
        bytes[16 + 8 * at..24 + 8 * at].copy_from_slice(&value);
    }
    bytes
}

fn verdict(program: &[SockFilter], data: &[u8; 64], abi: Abi) -> u32 {
    let load = if abi.is_big_endian() {
        u32::from_be_bytes
    } else {
        u32::from_le_bytes
    };
    match run(program, data, load) {
        // A thread or the whole process: see above.
        0 => 0x8000_0000,
        word => word,
    }
}

/// Compiling for the other byte order, libseccomp 2.5 leaves some actions in the host's.
fn in_order(word: u32, abi: Abi) -> u32 {
    let swapped = word.swap_bytes();
    match abi.is_big_endian() && ACTIONS.iter().any(|action| action.0 == swapped) {
        true => swapped,
        false => word,
    }
}

fn arguments(random: &mut Random, abi: Abi, values: &[u64]) -> [u64; 6] {
    std::array::from_fn(|_| {
        let value = values[random.below(values.len())];
        let value = match random.below(6) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => value ^ (1 << 32),
            3 => random.value(),
            _ => value,
        };
        if abi.is_32_bit() {
            value & 0xffff_ffff
        } else {
            value
        }
    })
}

/// The numbers of an ABI's calls and their neighbours.
fn numbers(abi: Abi) -> BTreeSet<u32> {
    let known = ROWS.iter().filter_map(|row| find(row.name)?.number(abi));
    let around = |number: u32| [number.saturating_sub(1), number, number + 1];
    let mut numbers: BTreeSet<u32> = known.flat_map(around).collect();
    numbers.extend([0, 0x3fff_ffff, ARM_PRIVATE - 1]);
    if abi == Abi::X32 {
        numbers.retain(|number| *number >= super::syscalls::X32_BIT);
    }
    numbers
}

fn compare(helper: &Path, abi: Abi, names: &[&'static str], random: &mut Random) -> Option<usize> {
    let profile = random_profile(random, abi, names);
    let arguments_ = [
        "filter".to_owned(),
        token(abi),
        format!("{:x}", profile.default),
    ];
    let theirs = ask(helper, &arguments_, &profile.lines)?;
    let theirs = decode(&theirs, abi.is_big_endian());
    let native = if abi == Abi::X32 { Abi::X86_64 } else { abi };
    let ours = compile(&parse(profile.document.clone()), native)
        .unwrap()
        .program;
    let [ipc, socketcall] =
        ["ipc", "socketcall"].map(|name| find(name).and_then(|call| call.number(abi)));
    let mut compared = 0;
    for number in numbers(abi) {
        for _ in 0..8 {
            let mut arguments = arguments(random, abi, &profile.values);
            // The kernel looks at no more of the multiplexed call's number, libseccomp at all.
            if ipc == Some(number) {
                arguments[0] &= 0xffff;
            } else if socketcall == Some(number) {
                arguments[0] &= 0xffff_ffff;
            }
            let data = data(abi, number, arguments);
            let ours = verdict(&ours, &data, abi);
            let theirs = in_order(verdict(&theirs, &data, abi), abi);
            assert_eq!(
                ours, theirs,
                "{abi:?}: call {number} with {arguments:x?}: {ours:x}, libseccomp {theirs:x}, of\n{}",
                profile.lines
            );
            compared += 1;
        }
    }
    Some(compared)
}

#[test]
fn verdicts_are_libseccomps() {
    const TEST: &str = "seccomp::oracle::verdicts_are_libseccomps";
    let directory = tempfile::tempdir().unwrap();
    let helper = match helper(directory.path()) {
        Ok(helper) => helper,
        Err(why) => return skip(TEST, &why),
    };
    let mut random = Random(0x5eed_0c0d_e5ec_c09b);
    for abi in Abi::ALL {
        let names = common(&helper, abi);
        for _ in 0..12 {
            match compare(&helper, abi, &names, &mut random) {
                Some(compared) => assert!(compared > 1000),
                None => {
                    skip(TEST, &format!("{abi:?} is not in this libseccomp"));
                    break;
                }
            }
        }
    }
}

/// Without the library: what no x86 filter shows.
#[test]
fn every_architecture_compares_whole_arguments_and_has_the_tail() {
    const ALLOW: u32 = 0x7fff_0000;
    let profile = parse(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X32"],
        "syscalls": [{"names": ["read", "openat"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 1, "op": "SCMP_CMP_EQ", "value": 0x1_0000_0002_u64}]}]}),
    );
    for abi in Abi::ALL {
        let native = if abi == Abi::X32 { Abi::X86_64 } else { abi };
        let program = compile(&profile, native).unwrap().program;
        let number = |name| find(name).unwrap().number(abi).unwrap();
        let said = |number, argument| {
            verdict(&program, &data(abi, number, [7, argument, 7, 7, 7, 7]), abi)
        };
        let narrow = abi.is_32_bit();
        for name in ["read", "openat"] {
            assert_eq!(said(number(name), 0x1_0000_0002), ALLOW, "{abi:?}");
            let half = if narrow { ALLOW } else { 0x0005_0001 };
            assert_eq!(said(number(name), 2), half, "{abi:?}");
            assert_eq!(said(number(name), 0x2_0000_0001), 0x0005_0001, "{abi:?}");
        }
        let newest = number("read").max(number("openat"));
        assert_eq!(said(newest - 1, 0), 0x0005_0001, "{abi:?}");
        assert_eq!(said(newest + 1, 0), 0x0005_0026, "{abi:?}");
        assert_eq!(said(number("openat2"), 0), 0x0005_0026, "{abi:?}");
    }
}
