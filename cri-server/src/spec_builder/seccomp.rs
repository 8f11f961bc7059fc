//! Owns the default seccomp profile: facts from data/seccomp-default.json, gated by the
//! capabilities a container has, as the OCI `linux.seccomp` object. Also reads profiles of
//! Localhost. Compiling to BPF is the runtime's work.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::container::config::SeccompRequest;
use crate::error::{Error, Result};

const FIELD: &str = "config.linux.security_context.seccomp";
/// A profile larger than this is not a profile.
const MAX_PROFILE: u64 = 4 << 20;

#[derive(Deserialize)]
struct Facts {
    allow: Vec<String>,
    architectures: BTreeMap<String, Architecture>,
    personalities: Vec<u64>,
    socket_families: Vec<Masked>,
    capabilities: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Architecture {
    abis: Vec<String>,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Masked {
    mask: u64,
    value: u64,
}

static FACTS: LazyLock<Facts> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../data/seccomp-default.json"))
        .expect("the embedded profile is checked by a test")
});

/// The profile that a container asks for; `None` is unconfined.
pub fn profile(
    request: Option<&SeccompRequest>,
    privileged: bool,
    bounding: &[String],
) -> Result<Option<Value>> {
    match request {
        _ if privileged => Ok(None),
        None | Some(SeccompRequest::Unconfined) => Ok(None),
        Some(SeccompRequest::RuntimeDefault) => Ok(Some(default_profile(bounding))),
        Some(SeccompRequest::Localhost(path)) => localhost(path).map(Some),
    }
}

fn localhost(path: &str) -> Result<Value> {
    let field = format!("{FIELD}.localhost_ref");
    let file = Path::new(path);
    if !file.is_absolute() {
        let text = format!("{path:?} is not an absolute path");
        return Err(Error::invalid(field, text));
    }
    let text = super::host_files::read_bounded(file, MAX_PROFILE)
        .map_err(|e| Error::invalid(field.clone(), path).because(e))?;
    serde_json::from_slice(&text).map_err(|e| Error::invalid(field, path).because(e))
}

/// The profile of RuntimeDefault for a container with these capabilities in its bounding set.
pub fn default_profile(bounding: &[String]) -> Value {
    let facts = &*FACTS;
    let mut rules = vec![json!({"names": facts.allow, "action": "SCMP_ACT_ALLOW"})];
    let mut abis: &[String] = &[];
    if let Some(architecture) = facts.architectures.get(std::env::consts::ARCH) {
        abis = &architecture.abis;
        rules.push(json!({"names": architecture.allow, "action": "SCMP_ACT_ALLOW"}));
    }
    for persona in &facts.personalities {
        rules.push(compare(
            "personality",
            json!({
            "index": 0, "value": persona, "op": "SCMP_CMP_EQ"}),
        ));
    }
    // AF_ALG and AF_VSOCK are refused. The kernel looks at the low 32 bits of the family only, so
    // every comparison is masked: a plain "not equal" could be passed with a high bit set.
    for family in &facts.socket_families {
        rules.push(compare(
            "socket",
            json!({
            "index": 0, "value": family.mask, "valueTwo": family.value,
            "op": "SCMP_CMP_MASKED_EQ"}),
        ));
    }
    for (capability, names) in &facts.capabilities {
        if bounding.contains(capability) {
            rules.push(json!({"names": names, "action": "SCMP_ACT_ALLOW"}));
        }
    }
    if !bounding.iter().any(|c| c == "CAP_SYS_ADMIN") {
        // clone without any CLONE_NEW* flag; clone3 hides its flags behind a pointer, so libc is
        // told that it does not exist and uses clone (moby pull request 42681).
        rules.push(compare(
            "clone",
            json!({
            "index": 0, "value": 0x7E02_0000_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}),
        ));
        rules.push(json!({
            "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": abis,
        "syscalls": rules,
    })
}

fn compare(name: &str, arg: Value) -> Value {
    json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [arg]})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket_allowed(family: u64) -> bool {
        FACTS
            .socket_families
            .iter()
            .any(|rule| family & rule.mask == rule.value)
    }

    #[test]
    fn socket_families_leave_out_alg_and_vsock_only() {
        for family in 0..48 {
            assert_eq!(
                socket_allowed(family),
                family != 38 && family != 40,
                "{family}"
            );
        }
        // A high bit does not help: the kernel truncates, and so do the masks.
        assert!(!socket_allowed((1 << 32) + 38));
    }

    #[test]
    fn profile_depends_on_capabilities() {
        let plain = default_profile(&[]).to_string();
        assert!(!plain.contains("unshare"));
        assert!(plain.contains("\"errnoRet\":38"));
        let admin = default_profile(&["CAP_SYS_ADMIN".to_owned()]).to_string();
        assert!(admin.contains("unshare"));
        assert!(!admin.contains("\"errnoRet\":38"));
    }

    #[test]
    fn clone_mask_is_every_namespace_flag() {
        let flags = libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET;
        assert_eq!(flags, 0x7E02_0000);
    }

    #[test]
    fn localhost_profile_must_be_an_absolute_readable_json_file() {
        let request = |p: &str| Some(SeccompRequest::Localhost(p.to_owned()));
        assert!(profile(request("a.json").as_ref(), false, &[]).is_err());
        assert!(profile(request("/nonexistent").as_ref(), false, &[]).is_err());
        assert!(
            profile(request("/nonexistent").as_ref(), true, &[])
                .unwrap()
                .is_none()
        );
    }
}
