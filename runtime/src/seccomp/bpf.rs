//! A filter's BPF: dispatch by architecture, then a binary search over ranges of call numbers.
//!
//! Calls next to each other with the same fate share a range, so that most programs are short.
//! What does not look at arguments uses only the instructions that the kernel can evaluate when
//! the filter is installed (kernel commit 8e01b51a31a1): always-allowed calls then skip it.

use super::profile::{Action, Condition, Filter, Operator, Rule, Section};
use super::syscalls::{ARM_PRIVATE, X32_BIT};
use super::{Abi, SockFilter};

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const GOTO: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_GT: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const IF_GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;

type Code = Vec<SockFilter>;

fn plain(code: u16, k: u32) -> SockFilter {
    SockFilter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// `if A <op> k { yes } else { no }`; both end in a return.
fn branch(op: u16, k: u32, yes: Code, no: Code) -> Code {
    let mut code = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(jt) => code.push(SockFilter {
            code: op,
            jt,
            jf: 0,
            k,
        }),
        // Conditional jumps reach 255 instructions, unconditional ones anywhere.
        Err(_) => {
            code.push(SockFilter {
                code: op,
                jt: 0,
                jf: 1,
                k,
            });
            code.push(plain(GOTO, no.len() as u32));
        }
    }
    code.extend(no);
    code.extend(yes);
    code
}

pub(super) fn program(filter: &Filter) -> Code {
    let section = |abi| filter.sections.iter().find(|section| section.abi == abi);
    let mut archs = vec![plain(RETURN, Action::FOREIGN.0)];
    for own in filter
        .sections
        .iter()
        .rev()
        .filter(|section| section.abi != Abi::X32)
    {
        let mut code = vec![plain(LOAD, NR)];
        code.extend(match (own.abi, section(Abi::X32)) {
            (Abi::X86_64, Some(x32)) => branch(IF_GE, X32_BIT, calls(x32), calls(own)),
            _ => calls(own),
        });
        archs = branch(IF_EQ, own.abi.audit_arch(), code, archs);
    }
    let mut program = vec![plain(LOAD, ARCH)];
    program.extend(archs);
    program
}

/// What happens to a range of call numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate<'a> {
    Always(Action),
    Rules(&'a [Rule], Action),
}

impl Fate<'_> {
    fn code(self) -> Code {
        match self {
            Fate::Always(action) => vec![plain(RETURN, action.0)],
            Fate::Rules(rules, default) => {
                let mut code: Code = rules.iter().flat_map(rule).collect();
                code.push(plain(RETURN, default.0));
                code
            }
        }
    }
}

fn calls(section: &Section) -> Code {
    search(&ranges(section))
}

/// The whole number space as ranges, each from its start to the next one's.
fn ranges(section: &Section) -> Vec<(u32, Fate<'_>)> {
    let default = Fate::Always(section.default);
    let mut ranges = vec![(0, default)];
    let mut next = 0;
    for (&number, rules) in &section.calls {
        if next < number {
            open(&mut ranges, next, default);
        }
        let fate = match rules.as_slice() {
            [only] if only.conditions.is_empty() => Fate::Always(only.action),
            rules => Fate::Rules(rules, section.default),
        };
        open(&mut ranges, number, fate);
        next = number + 1;
    }
    open(&mut ranges, next, default);
    newer(section, &mut ranges);
    foreign_x32(section, &mut ranges);
    ranges
}

/// Starts a range, unless the one before it has the same fate.
fn open<'a>(ranges: &mut Vec<(u32, Fate<'a>)>, start: u32, fate: Fate<'a>) {
    if ranges.last().is_some_and(|(last, _)| *last == start) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|(_, last)| *last != fate) {
        ranges.push((start, fate));
    }
}

/// Turns the default above the newest known call into ENOSYS.
fn newer<'a>(section: &'a Section, ranges: &mut Vec<(u32, Fate<'a>)>) {
    let Some(newest) = section.newest else { return };
    let enosys = Fate::Always(Action::ENOSYS);
    if section.abi != Abi::Arm {
        open(ranges, newest + 1, enosys);
        return;
    }
    // ARM's private calls lie above all others and are not newer than them.
    let private = ranges.partition_point(|(start, _)| *start < ARM_PRIVATE);
    let rest = ranges.split_off(private);
    open(ranges, newest + 1, enosys);
    open(ranges, ARM_PRIVATE, Fate::Always(section.default));
    for (start, fate) in rest {
        open(ranges, start, fate);
    }
}

/// Without an x32 section, x32 calls on x86_64 are those of a foreign ABI. Where newer calls get
/// ENOSYS they already do, as with runc.
fn foreign_x32<'a>(section: &Section, ranges: &mut Vec<(u32, Fate<'a>)>) {
    if section.abi != Abi::X86_64 || section.newest.is_some() {
        return;
    }
    open(ranges, X32_BIT, Fate::Always(Action::FOREIGN));
    // A tracer skips a call by setting its number to -1, and since Linux 4.8 filters see that.
    open(ranges, u32::MAX, Fate::Always(section.default));
}

fn search(ranges: &[(u32, Fate<'_>)]) -> Code {
    match ranges {
        [] => Vec::new(),
        [(_, fate)] => fate.code(),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            branch(IF_GE, high[0].0, search(high), search(low))
        }
    }
}

/// Where a comparison goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The instruction after it.
    Fall,
    /// The next condition: this one holds.
    Holds,
    /// The next rule: this one does not.
    Fails,
}

use Target::{Fails, Fall, Holds};

enum Step {
    Plain(u16, u32),
    If(u16, u32, Target, Target),
}

/// A rule: falls out of its end if a condition fails.
fn rule(rule: &Rule) -> Code {
    let conditions: Vec<Vec<Step>> = rule.conditions.iter().map(condition).collect();
    let length = conditions.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(length);
    for steps in &conditions {
        let end = code.len() + steps.len();
        for step in steps {
            let after = code.len() + 1;
            // Six conditions of seven instructions at most: in reach of eight bits.
            let offset = |target| match target {
                Fall => 0,
                Holds => (end - after) as u8,
                Fails => (length - after) as u8,
            };
            code.push(match *step {
                Step::Plain(op, k) => plain(op, k),
                Step::If(op, k, yes, no) => SockFilter {
                    code: op,
                    jt: offset(yes),
                    jf: offset(no),
                    k,
                },
            });
        }
    }
    code.push(plain(RETURN, rule.action.0));
    code
}

/// Compares the high halves, then, if they do not decide, the low halves.
fn condition(condition: &Condition) -> Vec<Step> {
    let at = ARGS + 8 * condition.arg as u32;
    let (low_at, high_at) = match condition.big_endian {
        true => (at + 4, at),
        false => (at, at + 4),
    };
    let (high, low) = ((condition.value >> 32) as u32, condition.value as u32);
    let mut steps = Vec::with_capacity(7);
    if let Operator::MaskedEq(mask) = condition.operator {
        let halves = [
            (high_at, (mask >> 32) as u32, high),
            (low_at, mask as u32, low),
        ];
        for (at, mask, value) in halves {
            if mask != 0 && !(condition.narrow && at != low_at) {
                steps.push(Step::Plain(LOAD, at));
                if mask != u32::MAX {
                    steps.push(Step::Plain(AND, mask));
                }
                steps.push(Step::If(IF_EQ, value, Fall, Fails));
            }
        }
        return steps;
    }
    let (op, yes, no) = match condition.operator {
        Operator::Eq | Operator::MaskedEq(_) => (IF_EQ, Holds, Fails),
        Operator::Ne => (IF_EQ, Fails, Holds),
        Operator::Gt => (IF_GT, Holds, Fails),
        Operator::Le => (IF_GT, Fails, Holds),
        Operator::Ge => (IF_GE, Holds, Fails),
        Operator::Lt => (IF_GE, Fails, Holds),
    };
    if !condition.narrow {
        steps.push(Step::Plain(LOAD, high_at));
        match op {
            IF_EQ => steps.push(Step::If(IF_EQ, high, Fall, no)),
            _ => {
                steps.push(Step::If(IF_GT, high, yes, Fall));
                steps.push(Step::If(IF_EQ, high, Fall, no));
            }
        }
    }
    steps.push(Step::Plain(LOAD, low_at));
    steps.push(Step::If(op, low, yes, no));
    steps
}
