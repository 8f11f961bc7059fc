//! config.json, parsed once. The wire types are oci-spec's.
//!
//! Owns the tolerances of the other runtimes that oci-spec lacks: a capability that this build does
//! not know is dropped with a warning instead of failing the container (so that a newer engine can
//! drive an older runtime), an explicit `null` means "not there", members are known in any case
//! of their letters, a process without a user is root's, and the scheduler's flags have the runtime
//! spec's names.

use std::fmt;

use serde::de::{DeserializeOwned, Error as _};
use serde_json::Value;

pub use oci_spec::runtime as spec;

use crate::{fold, names};

/// A parsed config.json and what had to be dropped from it.
#[derive(Debug)]
pub struct ParsedSpec {
    pub spec: spec::Spec,
    pub warnings: Vec<String>,
}

/// A document that is no valid config.json (or process.json, or resources).
#[derive(Debug)]
pub struct ConfigError {
    what: &'static str,
    source: serde_json::Error,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parse {}", self.what)
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Parses config.json.
///
/// # Errors
/// The bytes are no JSON, or a property has a type or value that the runtime spec rules out.
pub fn parse(bytes: &[u8]) -> Result<ParsedSpec, ConfigError> {
    let bytes = &*fold::spec_names(bytes);
    let (mut spec, warnings): (spec::Spec, _) = parse_tolerant("config.json", bytes, "/process")?;
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let corrected = resources.and_then(|r| correct_resources(r, bytes, "/linux/resources"));
    if corrected.is_some() {
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_resources(corrected);
        spec.set_linux(Some(linux));
    }
    Ok(ParsedSpec { spec, warnings })
}

/// Where oci-spec's defaults mean something else than an absent member: a `pids` without a limit
/// would be a limit of 0, which the kernel enforces, and a huge page limit needs its page size,
/// whose name callers of Go runtimes may have in lower case. `None` if there is nothing of the
/// kind, which takes no second look at the document.
fn correct_resources(
    resources: &spec::LinuxResources,
    bytes: &[u8],
    pointer: &str,
) -> Option<spec::LinuxResources> {
    let pids = resources.pids().as_ref();
    let zero_pids = pids.is_some_and(|pids| pids.limit() == 0);
    let mut pages = resources.hugepage_limits().iter().flatten();
    let nameless_pages = pages.any(|limit| limit.page_size().is_empty());
    if !zero_pids && !nameless_pages {
        return None;
    }
    let mut document: Value = serde_json::from_slice(bytes).ok()?;
    let resources = document.pointer_mut(pointer)?.as_object_mut()?;
    let limit = resources.get("pids").and_then(|pids| pids.get("limit"));
    if limit.is_none_or(Value::is_null) {
        resources.remove("pids");
    }
    let pages = resources.get_mut("hugepageLimits");
    let pages = pages.and_then(Value::as_array_mut).into_iter().flatten();
    for page in pages.filter_map(Value::as_object_mut) {
        if let Some(size) = page.remove("pagesize") {
            page.insert("pageSize".into(), size);
        }
    }
    let mut resources = Value::Object(std::mem::take(resources));
    drop_nulls(&mut resources);
    serde_json::from_value(resources).ok()
}

/// Parses the process.json of `exec --process`, with the same tolerances.
///
/// # Errors
/// As for [`parse`].
pub fn parse_process(bytes: &[u8]) -> Result<(spec::Process, Vec<String>), ConfigError> {
    parse_tolerant("process.json", &fold::spec_names(bytes), "")
}

/// Parses the resources document of `update --resources`.
///
/// # Errors
/// As for [`parse`].
pub fn parse_resources(bytes: &[u8]) -> Result<spec::LinuxResources, ConfigError> {
    let bytes = &*fold::spec_names(bytes);
    let (mut resources, _): (spec::LinuxResources, _) =
        parse_tolerant("resources", bytes, "/none")?;
    if let Some(corrected) = correct_resources(&resources, bytes, "") {
        resources = corrected;
    }
    Ok(resources)
}

/// Tries the direct way first: a document that needs no tolerance is read in a single pass.
/// `process` points at the process in the document.
fn parse_tolerant<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
    process: &str,
) -> Result<(T, Vec<String>), ConfigError> {
    let strict = match serde_json::from_slice(bytes) {
        Ok(parsed) => return Ok((parsed, Vec::new())),
        Err(error) => error,
    };
    let Ok(mut document) = serde_json::from_slice::<Value>(bytes) else {
        return Err(ConfigError {
            what,
            source: strict,
        });
    };
    drop_nulls(&mut document);
    let mut warnings = Vec::new();
    if let Some(Value::Object(process)) = document.pointer_mut(process) {
        // Members that every other runtime takes for their zero values when they are missing.
        process
            .entry("user")
            .or_insert_with(|| serde_json::json!({"uid": 0, "gid": 0}));
        process.entry("cwd").or_insert_with(|| "".into());
        if let Some(flags) = process
            .get_mut("scheduler")
            .and_then(|s| s.get_mut("flags"))
        {
            rename_scheduler_flags(flags);
        }
        if let Some(sets) = process.get_mut("capabilities") {
            warnings = drop_unknown_capabilities(sets);
        }
    }
    drop_empty_seccomp(&mut document);
    drop_other_platforms(&mut document);
    match T::deserialize(&document) {
        Ok(parsed) => Ok((parsed, warnings)),
        // Errors from a Value have lost line and column: the first error says where to look,
        // unless it was one of those that we just tolerated.
        Err(source) => {
            if let Some(unknown) = names::explain(&document, process) {
                let source = serde_json::Error::custom(unknown);
                return Err(ConfigError { what, source });
            }
            let tolerated = source.to_string() != message(&strict);
            Err(ConfigError {
                what,
                source: if tolerated { source } else { strict },
            })
        }
    }
}

/// A profile that names neither a default nor a call is none, as in runc.
fn drop_empty_seccomp(document: &mut Value) {
    let Some(linux) = document.get_mut("linux").and_then(Value::as_object_mut) else {
        return;
    };
    let empty = linux.get("seccomp").is_some_and(|seccomp| {
        let default = seccomp.get("defaultAction").and_then(Value::as_str);
        let calls = seccomp.get("syscalls").and_then(Value::as_array);
        default.is_none_or(str::is_empty) && calls.is_none_or(Vec::is_empty)
    });
    if empty {
        linux.remove("seccomp");
    }
}

/// What is for other platforms is not looked at, whatever it is.
fn drop_other_platforms(document: &mut Value) {
    if let Some(members) = document.as_object_mut() {
        members.retain(|name, _| !matches!(name.as_str(), "vm" | "windows" | "solaris" | "zos"));
    }
}

/// The text of a serde_json error without its position.
fn message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, member| !member.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// oci-spec 0.10 spells two flags differently from the runtime spec.
fn rename_scheduler_flags(flags: &mut Value) {
    for flag in flags.as_array_mut().into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
}

fn drop_unknown_capabilities(sets: &mut Value) -> Vec<String> {
    let mut unknown = Vec::new();
    let Some(sets) = sets.as_object_mut() else {
        return unknown;
    };
    for names in sets.values_mut().filter_map(Value::as_array_mut) {
        names.retain(|name| {
            let known = serde_json::from_value::<spec::Capability>(name.clone()).is_ok();
            if let (false, Some(name)) = (known, name.as_str())
                && !unknown.iter().any(|seen| seen == name)
            {
                unknown.push(name.to_owned());
            }
            // Anything but a string stays, so that the parse names the wrong type.
            known || !name.is_string()
        });
    }
    unknown.sort();
    if unknown.is_empty() {
        return unknown;
    }
    vec![format!(
        "ignoring unknown or unavailable capabilities: [{}]",
        unknown.join(" ")
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    fn config(process: &str) -> String {
        format!(r#"{{"ociVersion":"1.0.2","process":{process},"root":{{"path":"rootfs"}}}}"#)
    }

    #[test]
    fn parse_plain_has_no_warnings() {
        let text = config(
            r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["sh"],"capabilities":{"bounding":["CAP_CHOWN"]}}"#,
        );
        let parsed = parse(text.as_bytes()).unwrap();
        assert!(parsed.warnings.is_empty());
        assert_eq!(parsed.spec.version(), "1.0.2");
    }

    #[test]
    fn parse_unknown_capability_is_dropped_with_a_warning() {
        let text = config(
            r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["sh"],
               "capabilities":{"bounding":["CAP_CHOWN","CAP_NEW"],"ambient":["CAP_NEW","CAP_OLD"]}}"#,
        );
        let parsed = parse(text.as_bytes()).unwrap();
        assert_eq!(
            parsed.warnings,
            ["ignoring unknown or unavailable capabilities: [CAP_NEW CAP_OLD]"]
        );
        let process = parsed.spec.process().as_ref().unwrap();
        let caps = process.capabilities().as_ref().unwrap();
        assert_eq!(caps.bounding().as_ref().unwrap().len(), 1);
        assert_eq!(caps.ambient().as_ref().unwrap().len(), 0);
    }

    #[test]
    fn page_size_in_lower_case() {
        let text = br#"{"hugepageLimits":[{"pagesize":"2MB","limit":9}],"pids":{"limit":3}}"#;
        let resources = parse_resources(text).unwrap();
        let limits = resources.hugepage_limits().clone().unwrap();
        assert_eq!(limits[0].page_size(), "2MB");
        assert_eq!(resources.pids().map(|pids| pids.limit()), Some(3));
    }

    #[test]
    fn scheduler_flags_are_the_specs() {
        let text = r#"{"cwd":"/","scheduler":{"policy":"SCHED_OTHER",
            "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN","SCHED_FLAG_RECLAIM"]}}"#;
        let (process, _) = parse_process(text.as_bytes()).unwrap();
        let scheduler = process.scheduler().clone().unwrap();
        assert_eq!(scheduler.flags().as_ref().map(Vec::len), Some(3));
    }

    #[test]
    fn process_without_user_is_roots() {
        let (process, _) = parse_process(br#"{"args":["sh"],"cwd":"/"}"#).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        assert!(parse(config(r#"{"cwd":"/","args":["sh"]}"#).as_bytes()).is_ok());
        assert!(parse_process(br#"{"args":"sh","cwd":"/"}"#).is_err());
    }

    #[test]
    fn empty_seccomp_profile_is_none() {
        for profile in ["{}", r#"{"defaultAction":"","syscalls":[]}"#] {
            let text = format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"seccomp":{profile},"mountLabel":"x"}}}}"#
            );
            let linux = parse(text.as_bytes())
                .unwrap()
                .spec
                .linux()
                .clone()
                .unwrap();
            assert!(linux.seccomp().is_none() && linux.mount_label().is_some());
        }
    }

    #[test]
    fn other_platforms_members_are_not_looked_at() {
        let text = r#"{"ociVersion":"1.0.2","windows":{"layerFolders":7},"vm":[],"hostname":"h"}"#;
        let spec = parse(text.as_bytes()).unwrap().spec;
        assert_eq!(spec.hostname().as_deref(), Some("h"));
    }

    #[test]
    fn parse_null_members_are_absent() {
        let text = r#"{"ociVersion":"1.0.2","root":null,"hostname":null,
            "linux":{"resources":{"pids":{"limit":null}}}}"#;
        let parsed = parse(text.as_bytes()).unwrap();
        let resources = parsed
            .spec
            .linux()
            .as_ref()
            .unwrap()
            .resources()
            .clone()
            .unwrap();
        assert!(resources.pids().is_none());
    }

    #[test]
    fn parse_errors_keep_the_position() {
        let cases: &[(&str, &str)] = &[
            ("{", "EOF while parsing"),
            (
                r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":5}]}}"#,
                "namespace \"\" does not exist",
            ),
            (r#"{"ociVersion":"1.0.2","hostname":5}"#, "line 1"),
            (r#"{"ociVersion":"1.0.2","linux":{"sysctl":5}}"#, "line 1"),
        ];
        for (text, want) in cases {
            let error = parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), "parse config.json");
            let source = error.source().unwrap().to_string();
            assert!(source.contains(want), "{source}");
        }
    }

    #[test]
    fn pids_limit_of_zero_is_told_from_none() {
        for (text, want) in [
            (r#"{"pids":{}}"#, None),
            (r#"{"pids":{"limit":null}}"#, None),
            (r#"{"pids":{"limit":0}}"#, Some(0)),
            (r#"{"pids":{"limit":-1}}"#, Some(-1)),
        ] {
            let resources = parse_resources(text.as_bytes()).unwrap();
            assert_eq!(resources.pids().map(|pids| pids.limit()), want, "{text}");
            let config = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{text}}}}}"#);
            let spec = parse(config.as_bytes()).unwrap().spec;
            let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
            assert_eq!(resources.pids().map(|pids| pids.limit()), want, "{config}");
        }
    }

    #[test]
    fn parse_resources_of_update() {
        let text = r#"{"memory":{"limit":33554432,"reservation":33554432},"cpu":{"shares":10,"cpus":"0"},"pids":{"limit":20}}"#;
        let resources = parse_resources(text.as_bytes()).unwrap();
        assert_eq!(resources.pids().unwrap().limit(), 20);
    }
}
