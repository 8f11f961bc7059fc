//! Members of a config.json in another case than the runtime spec's.
//!
//! Go's decoder, and with it runc, takes `"CPU": {"Cpus": "0"}` for `cpu.cpus`. Read exactly, the
//! member would be an unknown one and the limit silently not there. Only documents in which some
//! member begins with a capital are looked at: the spec has none. Never touches maps whose keys
//! are the caller's (annotations, sysctl, unified).

use std::borrow::Cow;

use serde_json::{Map, Value};

/// The document with the spec's names, where a member differs from them in case only. What is no
/// JSON is given back as it is.
pub fn spec_names(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !has_capital_member(bytes) {
        return Cow::Borrowed(bytes);
    }
    let folded = serde_json::from_slice(bytes).and_then(|mut document| {
        fold(&mut document);
        serde_json::to_vec(&document)
    });
    folded.map_or(Cow::Borrowed(bytes), Cow::Owned)
}

/// Whether a string that begins with a capital is followed by a colon. Looks at each byte once;
/// a quote within a string may make it see too much, which costs a second look only.
fn has_capital_member(bytes: &[u8]) -> bool {
    let mut quotes = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'"')
        .map(|(at, _)| at)
        .peekable();
    while let Some(open) = quotes.next() {
        if !bytes.get(open + 1).is_some_and(u8::is_ascii_uppercase) {
            continue;
        }
        let Some(close) = quotes.peek() else {
            return false;
        };
        let mut after = bytes[close + 1..].iter();
        if after.find(|byte| !byte.is_ascii_whitespace()) == Some(&b':') {
            return true;
        }
    }
    false
}

/// Renames members to the spec's. Where a document has both spellings, sections are joined, and
/// a value in the spec's own spelling wins.
pub fn fold(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(fold),
        Value::Object(members) => {
            let mut other = Vec::new();
            for name in members.keys() {
                if let Some(known) = spec_name(name) {
                    other.push((name.clone(), known));
                }
            }
            for (name, known) in other {
                if let Some(value) = members.remove(&name) {
                    join(members, known, value);
                }
            }
            for (name, member) in members {
                match (name.as_str(), member) {
                    ("annotations" | "sysctl" | "unified", _) => {}
                    // The keys are devices, interfaces and clocks.
                    ("rdma" | "netDevices" | "timeOffsets", Value::Object(map)) => {
                        map.values_mut().for_each(fold);
                    }
                    (_, member) => fold(member),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn join(members: &mut Map<String, Value>, name: &str, value: Value) {
    match (members.get_mut(name), value) {
        (None, value) => {
            members.insert(name.to_owned(), value);
        }
        (Some(Value::Object(there)), Value::Object(value)) => {
            for (name, value) in value {
                join(there, &name, value);
            }
        }
        (Some(Value::Null), value) => {
            members.insert(name.to_owned(), value);
        }
        (Some(_), _) => {}
    }
}

/// The spec's spelling of a name, if the name is another one of the same letters.
fn spec_name(name: &str) -> Option<&'static str> {
    // No name of the spec begins with a capital.
    if !name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let mut known = NAMES.iter();
    let known = *known.find(|known| known.eq_ignore_ascii_case(name))?;
    (known != name).then_some(known)
}

/// The members of the runtime spec 1.3 that Linux has.
#[rustfmt::skip]
const NAMES: &[&str] = &[
    // linux.resources
    "access", "allow", "blockIO", "burst", "checkBeforeUpdate", "classID", "cpu", "cpus", "devices",
    "disableOOMKiller", "hcaHandles", "hcaObjects", "hugepageLimits", "idle", "kernel", "kernelTCP",
    "leafWeight", "limit", "major", "memory", "mems", "minor", "name", "network", "pageSize",
    "period", "pids", "priorities", "priority", "quota", "rate", "rdma", "realtimePeriod",
    "realtimeRuntime", "reservation", "shares", "swap", "swappiness", "throttleReadBpsDevice",
    "throttleReadIOPSDevice", "throttleWriteBpsDevice", "throttleWriteIOPSDevice", "type",
    "unified", "useHierarchy", "weight", "weightDevice",
    // linux
    "cgroupsPath", "gidMappings", "intelRdt", "linux", "maskedPaths", "memoryPolicy", "mountLabel",
    "namespaces", "netDevices", "personality", "readonlyPaths", "resources", "rootfsPropagation",
    "seccomp", "sysctl", "timeOffsets", "uidMappings", "containerID", "hostID", "size",
    "fileMode", "gid", "uid", "path", "architectures", "defaultAction", "defaultErrnoRet",
    "listenerMetadata", "listenerPath", "syscalls", "action", "args", "errnoRet", "names", "op",
    "index", "value", "valueTwo", "closID", "l3CacheSchema", "memBwSchema", "schemata",
    "enableMonitoring", "domain", "flags", "mode", "nodes", "nanosecs", "secs",
    // process, root, mounts, hooks
    "annotations", "apparmorProfile", "capabilities", "ambient", "bounding", "effective",
    "inheritable", "permitted", "commandLine", "consoleSize", "height", "width", "cwd", "deadline",
    "env", "execCPUAffinity", "final", "initial", "ioPriority", "class", "nice",
    "noNewPrivileges", "oomScoreAdj", "policy", "process", "rlimits", "hard", "soft", "runtime",
    "scheduler", "selinuxLabel", "terminal", "user", "additionalGids", "umask", "username",
    "destination", "domainname", "hooks", "createContainer", "createRuntime", "poststart",
    "poststop", "prestart", "startContainer", "timeout", "hostname", "mounts", "ociVersion",
    "options", "readonly", "root", "source",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> Value {
        serde_json::from_slice(&spec_names(text.as_bytes())).unwrap()
    }

    #[test]
    fn spec_names_table() {
        let cases = [
            (r#"{"CPU":{"Cpus":"0"}}"#, r#"{"cpu":{"cpus":"0"}}"#),
            // Sections are joined, the spec's spelling wins.
            (
                r#"{"cpu":{"shares":1},"CPU" : {"Cpus":"0","Shares":2}}"#,
                r#"{"cpu":{"cpus":"0","shares":1}}"#,
            ),
            (
                r#"{"Linux":{"Resources":{"HugepageLimits":[{"Pagesize":"2MB","Limit":1}]}}}"#,
                r#"{"linux":{"resources":{"hugepageLimits":[{"pageSize":"2MB","limit":1}]}}}"#,
            ),
            // The keys are the caller's.
            (
                r#"{"Annotations":{"CPU":"1","Hooks":"x"},"linux":{"rdma":{"CPU":{"HcaHandles":1}}}}"#,
                r#"{"annotations":{"CPU":"1","Hooks":"x"},"linux":{"rdma":{"CPU":{"hcaHandles":1}}}}"#,
            ),
            (r#"{"Unknown":{"CPU":1}}"#, r#"{"Unknown":{"cpu":1}}"#),
        ];
        for (text, want) in cases {
            assert_eq!(
                folded(text),
                serde_json::from_str::<Value>(want).unwrap(),
                "{text}"
            );
        }
    }

    #[test]
    fn usual_documents_are_not_copied() {
        for text in [
            r#"{"args":["A","B"],"env":["PATH=/bin","TERM=\"X\""],"capabilities":{"bounding":["CAP_KILL"]}}"#,
            "{",
            "\"A",
            "\"A\"",
            "",
            r#"{"A":"#,
        ] {
            assert!(
                matches!(spec_names(text.as_bytes()), Cow::Borrowed(_)),
                "{text}"
            );
        }
    }
}
