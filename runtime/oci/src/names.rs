//! Which name in a config.json is none that the runtime spec has, told in runc's words.
//!
//! Only asked once a document has failed to parse: serde names the type that it wanted, these the
//! member that was wrong, in the texts that callers of runc match on.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::spec;

/// The first name that is not known, if there is one. `process` points at the process.
pub(crate) fn explain(document: &Value, process: &str) -> Option<String> {
    in_linux(document).or_else(|| in_process(document.pointer(process)?))
}

fn in_linux(document: &Value) -> Option<String> {
    let linux = document.get("linux")?;
    if let Some(policy) = linux.get("memoryPolicy") {
        let mode = text(policy.get("mode"));
        if !known::<spec::MemoryPolicyModeType>(mode) {
            return Some(format!("invalid memory policy mode {mode:?}"));
        }
        if let Some(flag) = first_unknown::<spec::MemoryPolicyFlagType>(policy.get("flags")) {
            return Some(format!("invalid memory policy flag {flag:?}"));
        }
    }
    if let Some(personality) = linux.get("personality") {
        let domain = text(personality.get("domain"));
        if !known::<spec::LinuxPersonalityDomain>(domain) {
            return Some(format!("invalid personality domain {domain}"));
        }
    }
    for namespace in list(linux.get("namespaces")) {
        let kind = text(namespace.get("type"));
        if !known::<spec::LinuxNamespaceType>(kind) {
            return Some(format!("namespace {kind:?} does not exist"));
        }
    }
    for device in list(linux.get("devices")) {
        let kind = text(device.get("type"));
        if !known::<spec::LinuxDeviceType>(kind) {
            return Some(format!("invalid device type {kind:?}"));
        }
    }
    in_seccomp(linux.get("seccomp")?)
}

fn in_seccomp(seccomp: &Value) -> Option<String> {
    let wrong =
        |name: &str, what: &str| Some(format!("string {name} is not a valid {what} for seccomp"));
    let default = text(seccomp.get("defaultAction"));
    if !known::<spec::LinuxSeccompAction>(default) {
        return wrong(default, "action");
    }
    if let Some(flag) = first_unknown::<spec::LinuxSeccompFilterFlag>(seccomp.get("flags")) {
        return Some(format!("seccomp flag {flag} is not known to coracle"));
    }
    if let Some(arch) = first_unknown::<spec::Arch>(seccomp.get("architectures")) {
        return wrong(arch, "arch");
    }
    for rule in list(seccomp.get("syscalls")) {
        let action = text(rule.get("action"));
        if !known::<spec::LinuxSeccompAction>(action) {
            return wrong(action, "action");
        }
        for arg in list(rule.get("args")) {
            let operator = text(arg.get("op"));
            if !known::<spec::LinuxSeccompOperator>(operator) {
                return wrong(operator, "operator");
            }
        }
    }
    None
}

fn in_process(process: &Value) -> Option<String> {
    for limit in list(process.get("rlimits")) {
        let kind = text(limit.get("type"));
        if !known::<spec::PosixRlimitType>(kind) {
            return Some(format!("wrong rlimit value: {kind}"));
        }
    }
    if let Some(scheduler) = process.get("scheduler") {
        let policy = text(scheduler.get("policy"));
        if policy.is_empty() {
            return Some("scheduler policy is required".to_owned());
        }
        if !known::<spec::LinuxSchedulerPolicy>(policy) {
            return Some(format!("invalid scheduler policy: {policy}"));
        }
        if let Some(flag) = first_unknown::<spec::LinuxSchedulerFlag>(scheduler.get("flags")) {
            return Some(format!("invalid scheduler flag: {flag}"));
        }
    }
    let io = process.get("ioPriority")?;
    let class = text(io.get("class"));
    let known = io.get("class").is_none() || known::<spec::IOPriorityClass>(class);
    (!known).then(|| format!("invalid ioPriority.Class: {class:?}"))
}

/// A member that is missing is an empty name.
fn text(value: Option<&Value>) -> &str {
    value.and_then(Value::as_str).unwrap_or_default()
}

fn list(value: Option<&Value>) -> &[Value] {
    value
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

fn known<T: DeserializeOwned>(name: &str) -> bool {
    serde_json::from_value::<T>(name.into()).is_ok()
}

fn first_unknown<T: DeserializeOwned>(names: Option<&Value>) -> Option<&str> {
    let mut names = list(names).iter().map(|name| text(Some(name)));
    names.find(|name| !known::<T>(name))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use std::error::Error as _;

    fn refusal(change: Value) -> String {
        let mut config = json!({
            "ociVersion": "1.3.0",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["true"]},
            "linux": {}
        });
        let (section, member) = change.as_object().unwrap().iter().next().unwrap();
        for (name, value) in member.as_object().unwrap() {
            config[section][name] = value.clone();
        }
        let error = crate::config::parse(config.to_string().as_bytes()).unwrap_err();
        error.source().unwrap().to_string()
    }

    #[test]
    fn unknown_names_are_told_in_runcs_words() {
        let seccomp = |change: Value| {
            let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW"});
            for (name, value) in change.as_object().unwrap() {
                profile[name] = value.clone();
            }
            json!({"linux": {"seccomp": profile}})
        };
        let cases = [
            (
                json!({"linux": {"memoryPolicy": {}}}),
                "invalid memory policy mode \"\"",
            ),
            (
                json!({"linux": {"memoryPolicy": {"mode": "INTERLEAVE", "nodes": "0"}}}),
                "invalid memory policy mode \"INTERLEAVE\"",
            ),
            (
                json!({"linux": {"memoryPolicy": {"mode": "MPOL_BIND", "flags": ["x"]}}}),
                "invalid memory policy flag \"x\"",
            ),
            (
                json!({"linux": {"personality": {"domain": "SOLARIS"}}}),
                "invalid personality domain SOLARIS",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "nope"}]}}),
                "namespace \"nope\" does not exist",
            ),
            (
                json!({"linux": {"devices": [{"path": "/dev/x", "type": "x"}]}}),
                "invalid device type \"x\"",
            ),
            (
                seccomp(json!({"defaultAction": "SCMP_ACT_X"})),
                "string SCMP_ACT_X is not a valid action for seccomp",
            ),
            (
                seccomp(json!({"architectures": ["SCMP_ARCH_VAX"]})),
                "string SCMP_ARCH_VAX is not a valid arch for seccomp",
            ),
            (
                seccomp(json!({"flags": ["SECCOMP_FILTER_FLAG_X"]})),
                "seccomp flag SECCOMP_FILTER_FLAG_X is not known to coracle",
            ),
            (
                seccomp(json!({"syscalls": [{"names": ["read"], "action": "x"}]})),
                "string x is not a valid action for seccomp",
            ),
            (
                seccomp(
                    json!({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG",
                    "args": [{"index": 0, "value": 1, "op": "x"}]}]}),
                ),
                "string x is not a valid operator for seccomp",
            ),
            (
                json!({"process": {"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}}),
                "wrong rlimit value: RLIMIT_X",
            ),
            (
                json!({"process": {"scheduler": {}}}),
                "scheduler policy is required",
            ),
            (
                json!({"process": {"scheduler": {"policy": "x"}}}),
                "invalid scheduler policy: x",
            ),
            (
                json!({"process": {"scheduler": {"policy": "SCHED_OTHER", "flags": ["x"]}}}),
                "invalid scheduler flag: x",
            ),
            (
                json!({"process": {"ioPriority": {"class": "x"}}}),
                "invalid ioPriority.Class: \"x\"",
            ),
        ];
        for (change, want) in cases {
            assert_eq!(refusal(change.clone()), want, "{change}");
        }
    }
}
