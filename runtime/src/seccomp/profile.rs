//! A profile's meaning: per ABI a map from call number to rules, checked and free of names.
//!
//! Owns runc's reading of the OCI profile. Never emits BPF.

use std::collections::BTreeMap;
use std::path::PathBuf;

use coracle_oci::config::spec::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::syscalls::{self, ARM_PRIVATE, Syscall};
use super::{Abi, Compiled, SockFilter};
use crate::error::{Error, Result};

const MAX_ARGS: usize = 6;
/// The kernel clamps SECCOMP_RET_ERRNO's data to MAX_ERRNO.
const MAX_ERRNO: u32 = 4095;
/// SECCOMP_RET_DATA is 16 bits.
const MAX_TRACE: u32 = 0xffff;

/// SECCOMP_RET_* with its data: the word that a filter returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Action(pub u32);

impl Action {
    /// For an ABI that the profile does not list. libseccomp kills the thread; a process that has
    /// lost one of its threads is no better off than a dead one.
    pub(super) const FOREIGN: Self = Self(libc::SECCOMP_RET_KILL_PROCESS);
    pub(super) const ENOSYS: Self = Self(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);

    /// The kernel's order of precedence: as a signed number, the lowest is the strictest.
    fn strictness(self) -> i32 {
        (self.0 & libc::SECCOMP_RET_ACTION_FULL).cast_signed()
    }

    fn lets_the_call_run(self) -> bool {
        matches!(
            self.0 & libc::SECCOMP_RET_ACTION_FULL,
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    MaskedEq(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub arg: usize,
    pub operator: Operator,
    pub value: u64,
    /// Compare the low half only.
    pub narrow: bool,
    /// The high half comes first in memory.
    pub big_endian: bool,
}

/// All conditions hold: the action. No condition: always.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub conditions: Vec<Condition>,
    pub action: Action,
}

/// What happens to calls of one ABI.
#[derive(Debug, Clone)]
pub(super) struct Section {
    pub abi: Abi,
    /// By call number. Unconditional: one rule. Else in the order to try them.
    pub calls: BTreeMap<u32, Vec<Rule>>,
    pub default: Action,
    /// Calls above this one, unknown to the profile's author, fail with ENOSYS.
    pub newest: Option<u32>,
}

#[derive(Debug, Clone)]
pub(super) struct Filter {
    pub sections: Vec<Section>,
}

/// Everything of a profile that is not in the program.
#[derive(Debug)]
pub(super) struct Terms {
    flags: u32,
    notify: bool,
    listener_path: Option<PathBuf>,
    listener_metadata: Option<String>,
}

impl Terms {
    pub(super) fn with(self, program: Vec<SockFilter>) -> Compiled {
        Compiled {
            program,
            flags: self.flags,
            notify: self.notify,
            listener_path: self.listener_path,
            listener_metadata: self.listener_metadata,
        }
    }
}

pub(super) fn terms(seccomp: &LinuxSeccomp) -> Result<Terms> {
    let notify = check_notify(seccomp)?;
    let mut flags = 0;
    // Without a list, runc asks for SPEC_ALLOW; an empty list asks for nothing.
    let default = vec![LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow];
    for flag in seccomp.flags().as_ref().unwrap_or(&default) {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // The filter is installed by a process of one thread: there is nothing to sync.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            // The kernel refuses it without a listener (kernel commit c2aa2dfef243).
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if !notify => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
            }
        } as u32;
    }
    if notify {
        flags |= libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;
    }
    Ok(Terms {
        flags,
        notify,
        listener_path: seccomp.listener_path().clone(),
        listener_metadata: seccomp.listener_metadata().clone(),
    })
}

/// Whether a rule notifies; the rules that runc sets for it.
fn check_notify(seccomp: &LinuxSeccomp) -> Result<bool> {
    if seccomp.default_action() == LinuxSeccompAction::ScmpActNotify {
        return Err(Error::invalid(
            "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY cannot be used \
                                   as default action",
        ));
    }
    let mut notify = false;
    for rule in rules_of(seccomp) {
        if rule.action() == LinuxSeccompAction::ScmpActNotify {
            notify = true;
            // The listener's fd is sent off by a write after the filter is in force.
            if rule.names().iter().any(|name| name == "write") {
                return Err(Error::invalid(
                    "linux.seccomp.syscalls: SCMP_ACT_NOTIFY cannot be \
                                           used for the write syscall",
                ));
            }
        }
    }
    let path = seccomp
        .listener_path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty());
    match (notify, path) {
        (true, None) => Err(Error::invalid(
            "linux.seccomp.listenerPath: not set, but SCMP_ACT_NOTIFY is used",
        )),
        (_, Some(path)) if !path.is_absolute() => Err(Error::invalid(format!(
            "linux.seccomp.listenerPath: {} is not absolute",
            path.display()
        ))),
        _ => Ok(notify),
    }
}

pub(super) fn filter(seccomp: &LinuxSeccomp, native: Abi) -> Result<Filter> {
    let default = action(
        seccomp.default_action(),
        seccomp.default_errno_ret(),
        "linux.seccomp.defaultErrnoRet",
    )?;
    let parsed = rules_of(seccomp)
        .iter()
        .enumerate()
        .map(|(at, rule)| parse(rule, at, default))
        .collect::<Result<Vec<_>>>()?;
    let tail = wants_tail(seccomp, default);
    let sections = abis(seccomp, native)
        .into_iter()
        .map(|abi| section(abi, &parsed, default, tail))
        .collect();
    Ok(Filter { sections })
}

/// The names in `seccomp` that no table knows, in rules that say something else than the default:
/// those that runc tells of. What a faulty rule says is told by `filter`.
pub(super) fn unknown(seccomp: &LinuxSeccomp) -> Vec<&str> {
    let effect = |kind, data| action(kind, data, "").ok();
    let default = effect(seccomp.default_action(), seccomp.default_errno_ret());
    rules_of(seccomp)
        .iter()
        .filter(|rule| effect(rule.action(), rule.errno_ret()) != default)
        .flat_map(LinuxSyscall::names)
        .map(String::as_str)
        .filter(|name| syscalls::find(name).is_none())
        .collect()
}

fn rules_of(seccomp: &LinuxSeccomp) -> &[LinuxSyscall] {
    seccomp.syscalls().as_deref().unwrap_or_default()
}

/// The ABIs to serve, the native one first. Those of other kernels are left out: no call can ever
/// come from one.
fn abis(seccomp: &LinuxSeccomp, native: Abi) -> Vec<Abi> {
    let mut abis = vec![native];
    for arch in seccomp.architectures().as_deref().unwrap_or_default() {
        let abi = Abi::of(*arch).unwrap_or(native);
        if abi.runs_on(native) && !abis.contains(&abi) {
            abis.push(abi);
        }
    }
    abis
}

/// runc's rule: newer calls get ENOSYS, so that programs fall back, unless the default lets them
/// through to something that answers for itself, or is ENOSYS already.
fn wants_tail(seccomp: &LinuxSeccomp, default: Action) -> bool {
    let permissive = matches!(
        seccomp.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    );
    !permissive && default != Action::ENOSYS
}

fn action(kind: LinuxSeccompAction, data: Option<u32>, field: &str) -> Result<Action> {
    let with_data = |base: u32, limit: u32| {
        let data = data.unwrap_or(libc::EPERM as u32);
        if data > limit {
            return Err(Error::invalid(format!(
                "{field}: {data} is more than {limit}"
            )));
        }
        Ok(Action(base | data))
    };
    match kind {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            Ok(Action(libc::SECCOMP_RET_KILL_THREAD))
        }
        LinuxSeccompAction::ScmpActKillProcess => Ok(Action(libc::SECCOMP_RET_KILL_PROCESS)),
        LinuxSeccompAction::ScmpActTrap => Ok(Action(libc::SECCOMP_RET_TRAP)),
        LinuxSeccompAction::ScmpActErrno => with_data(libc::SECCOMP_RET_ERRNO, MAX_ERRNO),
        LinuxSeccompAction::ScmpActTrace => with_data(libc::SECCOMP_RET_TRACE, MAX_TRACE),
        LinuxSeccompAction::ScmpActNotify => Ok(Action(libc::SECCOMP_RET_USER_NOTIF)),
        LinuxSeccompAction::ScmpActLog => Ok(Action(libc::SECCOMP_RET_LOG)),
        LinuxSeccompAction::ScmpActAllow => Ok(Action(libc::SECCOMP_RET_ALLOW)),
    }
}

/// An OCI rule with its names looked up; unknown names are skipped as runc does.
struct Parsed<'a> {
    names: Vec<(&'a str, Option<Syscall>)>,
    /// Alternatives, each a list of conditions that hold together. None: the rule says what the
    /// default says, so that it only tells which calls the author knew.
    alternatives: Option<Vec<Vec<LinuxSeccompArg>>>,
    action: Action,
}

fn parse(rule: &LinuxSyscall, at: usize, default: Action) -> Result<Parsed<'_>> {
    let field = |name: &str| format!("linux.seccomp.syscalls[{at}].{name}");
    let mut names = Vec::with_capacity(rule.names().len());
    for name in rule.names() {
        if name.is_empty() {
            return Err(Error::invalid(format!("{}: empty name", field("names"))));
        }
        names.push((name.as_str(), syscalls::find(name)));
    }
    let args = rule.args().as_deref().unwrap_or_default();
    if let Some(arg) = args.iter().find(|arg| arg.index() >= MAX_ARGS) {
        let error = format!("{}: index {} is more than 5", field("args"), arg.index());
        return Err(Error::invalid(error));
    }
    let action = action(rule.action(), rule.errno_ret(), &field("errnoRet"))?;
    let alternatives = (action != default).then(|| alternatives(args));
    Ok(Parsed {
        names,
        alternatives,
        action,
    })
}

/// Conditions hold together, but where two look at the same argument each becomes a rule of its
/// own: runc keeps this from libseccomp before 2.2, and profiles have come to rely on it.
fn alternatives(args: &[LinuxSeccompArg]) -> Vec<Vec<LinuxSeccompArg>> {
    let repeated = args.iter().enumerate().any(|(at, arg)| {
        args[..at]
            .iter()
            .any(|earlier| earlier.index() == arg.index())
    });
    if repeated {
        args.iter().map(|arg| vec![*arg]).collect()
    } else {
        vec![args.to_vec()]
    }
}

fn condition(arg: &LinuxSeccompArg, abi: Abi) -> Condition {
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (Operator::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (Operator::Lt, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (Operator::Le, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (Operator::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (Operator::Ge, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (Operator::Gt, arg.value()),
        // `value` is the mask, `valueTwo` what is left of the argument under it.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let mask = arg.value();
            (
                Operator::MaskedEq(mask),
                arg.value_two().unwrap_or(0) & mask,
            )
        }
    };
    Condition {
        arg: arg.index(),
        operator,
        value,
        narrow: abi.is_32_bit(),
        big_endian: abi.is_big_endian(),
    }
}

fn section(abi: Abi, parsed: &[Parsed<'_>], default: Action, tail: bool) -> Section {
    let mut calls: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
    let mut newest = None;
    for rule in parsed {
        for (name, call) in &rule.names {
            let number = call.and_then(|call| call.number(abi));
            if let Some(number) = number.filter(|number| abi != Abi::Arm || *number < ARM_PRIVATE) {
                newest = newest.max(Some(number));
            }
            let Some(alternatives) = &rule.alternatives else {
                continue;
            };
            for args in alternatives {
                let conditions: Vec<_> = args.iter().map(|arg| condition(arg, abi)).collect();
                if abi.multiplexes()
                    && let Some((number, rule)) =
                        multiplexed(name, abi, !conditions.is_empty(), rule.action)
                {
                    newest = newest.max(Some(number));
                    calls.entry(number).or_default().push(rule);
                }
                if let Some(number) = number {
                    let rule = Rule {
                        conditions,
                        action: rule.action,
                    };
                    calls.entry(number).or_default().push(rule);
                }
            }
        }
    }
    for rules in calls.values_mut() {
        settle(rules);
    }
    Section {
        abi,
        calls,
        default,
        newest: newest.filter(|_| tail),
    }
}

/// The rule for `socketcall` or `ipc` that a rule for `name` implies.
///
/// The call's own arguments lie in memory, where no filter can see them. So a rule that depends on
/// them lets nothing through here, and restricts whatever it might restrict.
fn multiplexed(name: &str, abi: Abi, conditional: bool, action: Action) -> Option<(u32, Rule)> {
    let multiplexed = syscalls::multiplexed(name)?;
    if conditional && action.lets_the_call_run() {
        return None;
    }
    let number = syscalls::find(multiplexed.through)?.number(abi)?;
    let condition = Condition {
        arg: 0,
        operator: Operator::MaskedEq(multiplexed.mask.into()),
        value: multiplexed.call.into(),
        // The kernel takes it as an int, so that the other half must not tell calls apart.
        narrow: true,
        big_endian: abi.is_big_endian(),
    };
    Some((
        number,
        Rule {
            conditions: vec![condition],
            action,
        },
    ))
}

/// Puts a call's rules in the order to try them: the first unconditional one stands alone.
fn settle(rules: &mut Vec<Rule>) {
    if let Some(at) = rules.iter().position(|rule| rule.conditions.is_empty()) {
        rules.swap(0, at);
        rules.truncate(1);
        return;
    }
    rules.sort_by_key(|rule| rule.action.strictness());
    rules.dedup();
}
