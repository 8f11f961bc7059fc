//! The checks of a config.json: a flat list of small functions, each naming the field it refuses.
//!
//! Two kinds: what cannot be right (runc's texts, which engines show), and what would change the
//! isolation and is not supported here. Nothing asked for is ignored.

use std::collections::HashSet;
use std::path::Path;

use coracle_oci::spec::{
    IOPriorityClass, Linux, LinuxNamespaceType as Kind, LinuxSchedulerPolicy, Mount, Process, Spec,
};

use super::{linux, sysctl};
use crate::error::{Error, Result};
use crate::host::HostFacts;

/// Which namespaces the container gets, and which of them by joining.
#[derive(Debug, Default)]
pub struct Namespaces {
    created: Vec<Kind>,
    joined: Vec<(Kind, std::path::PathBuf)>,
    /// Those whose sysctls are the container's own; only looked at if it sets any.
    pub(super) owned: sysctl::Owned,
}

impl Namespaces {
    /// Whether the container has one of its own or a joined one: it is not the host's.
    pub fn has(&self, kind: Kind) -> bool {
        self.creates(kind) || self.joins(kind).is_some()
    }

    pub fn creates(&self, kind: Kind) -> bool {
        self.created.contains(&kind)
    }

    pub fn joins(&self, kind: Kind) -> Option<&Path> {
        self.joined
            .iter()
            .find(|(joined, _)| *joined == kind)
            .map(|(_, path)| path.as_path())
    }

    pub fn created(&self) -> &[Kind] {
        &self.created
    }

    pub fn joined(&self) -> &[(Kind, std::path::PathBuf)] {
        &self.joined
    }
}

/// Runs every check.
pub(super) fn all(spec: &Spec, host: &HostFacts) -> Result<Namespaces> {
    root(spec)?;
    let mut namespaces = namespaces(spec)?;
    let process_spec = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::invalid("process property must not be empty"))?;
    process(process_spec, host)?;
    names(spec, &namespaces)?;
    if let Some(linux) = spec.linux() {
        mount_namespace(linux, &namespaces)?;
        user_namespace(linux, &namespaces)?;
        time_namespace(linux, &namespaces)?;
        namespaces.owned = sysctls(linux, &namespaces)?;
        linux::net_devices(linux, &namespaces, host)?;
        propagation(linux)?;
        mount_label(linux, host)?;
    }
    linux::rootless(spec, &namespaces, host)?;
    for mount in spec.mounts().iter().flatten() {
        check_mount(mount, &namespaces, host)?;
    }
    hooks(spec)?;
    Ok(namespaces)
}

fn root(spec: &Spec) -> Result<()> {
    match spec.root() {
        None => Err(Error::invalid("root must be specified")),
        Some(root) if root.path().as_os_str().is_empty() => {
            Err(Error::invalid("root.path must not be empty"))
        }
        Some(_) => Ok(()),
    }
}

fn namespaces(spec: &Spec) -> Result<Namespaces> {
    let mut found = Namespaces::default();
    let listed = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    for namespace in listed.into_iter().flatten() {
        let kind = namespace.typ();
        if found.has(kind) {
            return Err(Error::invalid(format!(
                "malformed spec file: duplicated ns {:?}",
                kind.to_string()
            )));
        }
        match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => {
                if !path.is_absolute() {
                    return Err(Error::invalid(format!(
                        "linux.namespaces: path {} is not absolute",
                        path.display()
                    )));
                }
                found.joined.push((kind, path.clone()));
            }
            _ => found.created.push(kind),
        }
    }
    Ok(found)
}

/// The checks of a process, of `create` and of `exec` alike.
pub(super) fn process(process: &Process, host: &HostFacts) -> Result<()> {
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::invalid("Cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid("Cwd must be an absolute path"));
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::invalid("args must not be empty"));
    }
    let user = process.user();
    let groups = user.additional_gids().iter().flatten();
    // 0xffffffff means "leave as it is" to setresuid(2): the process would stay root.
    if [user.uid(), user.gid()]
        .iter()
        .chain(groups)
        .any(|id| *id == u32::MAX)
    {
        return Err(Error::invalid(
            "process.user: id 4294967295 is not a valid id",
        ));
    }
    let mut seen = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        if !seen.insert(limit.typ() as u32) {
            return Err(Error::invalid(format!(
                "process.rlimits: {} is listed twice",
                limit.typ()
            )));
        }
        if limit.soft() > limit.hard() {
            return Err(Error::invalid(format!(
                "process.rlimits: soft limit of {} is above the hard limit",
                limit.typ()
            )));
        }
    }
    if let Some(adjustment) = process.oom_score_adj()
        && !(-1000..=1000).contains(&adjustment)
    {
        return Err(Error::invalid(format!(
            "process.oomScoreAdj: {adjustment} is out of range"
        )));
    }
    labels(process, host)?;
    scheduler(process)?;
    io_priority(process)
}

fn labels(process: &Process, host: &HostFacts) -> Result<()> {
    let given = |label: &Option<String>| label.as_ref().is_some_and(|label| !label.is_empty());
    if given(process.apparmor_profile()) && !host.apparmor {
        return Err(Error::unsupported(
            "apparmor: config provided but apparmor not supported",
        ));
    }
    if given(process.selinux_label()) && !host.selinux {
        return Err(Error::unsupported(
            "selinux label is specified in config, but selinux is disabled or not supported",
        ));
    }
    Ok(())
}

fn scheduler(process: &Process) -> Result<()> {
    let Some(scheduler) = process.scheduler() else {
        return Ok(());
    };
    let policy = *scheduler.policy();
    let realtime = matches!(
        policy,
        LinuxSchedulerPolicy::SchedFifo | LinuxSchedulerPolicy::SchedRr
    );
    // The others have no use for it.
    let timeshared = matches!(
        policy,
        LinuxSchedulerPolicy::SchedOther | LinuxSchedulerPolicy::SchedBatch
    );
    if let Some(nice) = scheduler.nice()
        && timeshared
        && !(-20..=19).contains(nice)
    {
        return Err(Error::invalid(format!(
            "invalid scheduler.nice: {nice} when scheduler.policy is {policy}"
        )));
    }
    if scheduler.priority().is_some_and(|priority| priority != 0) && !realtime {
        return Err(Error::invalid(
            "scheduler.priority can only be specified for SchedFIFO or SchedRR policy",
        ));
    }
    let deadline = [
        scheduler.runtime(),
        scheduler.deadline(),
        scheduler.period(),
    ];
    if policy != LinuxSchedulerPolicy::SchedDeadline
        && deadline
            .iter()
            .any(|value| value.is_some_and(|value| value != 0))
    {
        return Err(Error::invalid(
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ));
    }
    Ok(())
}

fn io_priority(process: &Process) -> Result<()> {
    let Some(io) = process.io_priority() else {
        return Ok(());
    };
    if !(0..=7).contains(&io.priority()) {
        return Err(Error::invalid(format!(
            "invalid ioPriority.Priority: {}",
            io.priority()
        )));
    }
    match io.class() {
        IOPriorityClass::IoprioClassRt
        | IOPriorityClass::IoprioClassBe
        | IOPriorityClass::IoprioClassIdle => Ok(()),
    }
}

fn names(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    let given = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    for (field, name) in [
        ("hostname", spec.hostname()),
        ("domainname", spec.domainname()),
    ] {
        if !given(name) {
            continue;
        }
        if !namespaces.has(Kind::Uts) {
            return Err(Error::invalid(format!(
                "unable to set {field} without a private UTS namespace"
            )));
        }
        if name
            .as_ref()
            .is_some_and(|name| name.len() > 64 || name.contains('\0'))
        {
            return Err(Error::invalid(format!("{field}: longer than 64 bytes")));
        }
    }
    Ok(())
}

fn mount_namespace(linux: &Linux, namespaces: &Namespaces) -> Result<()> {
    let any = |paths: &Option<Vec<String>>| paths.as_ref().is_some_and(|paths| !paths.is_empty());
    if !namespaces.has(Kind::Mount) && (any(linux.masked_paths()) || any(linux.readonly_paths())) {
        return Err(Error::invalid(
            "unable to restrict sys entries without a private MNT namespace",
        ));
    }
    Ok(())
}

fn user_namespace(linux: &Linux, namespaces: &Namespaces) -> Result<()> {
    let any = |m: &Option<Vec<_>>| m.as_ref().is_some_and(|mappings| !mappings.is_empty());
    let (uids, gids) = (any(linux.uid_mappings()), any(linux.gid_mappings()));
    if !namespaces.has(Kind::User) {
        if uids || gids {
            return Err(Error::invalid(
                "user namespace mappings specified, but user namespace isn't enabled in the config",
            ));
        }
        return Ok(());
    }
    if namespaces.creates(Kind::User) {
        if !uids {
            return Err(Error::invalid(
                "user namespaces enabled, but no uid mappings found",
            ));
        }
        if !gids {
            return Err(Error::invalid(
                "user namespaces enabled, but no gid mappings found",
            ));
        }
    }
    Ok(())
}

fn time_namespace(linux: &Linux, namespaces: &Namespaces) -> Result<()> {
    let Some(offsets) = linux
        .time_offsets()
        .as_ref()
        .filter(|offsets| !offsets.is_empty())
    else {
        return Ok(());
    };
    if !namespaces.has(Kind::Time) {
        return Err(Error::invalid(
            "time namespace offsets specified, but time namespace isn't enabled in the config",
        ));
    }
    if namespaces.joins(Kind::Time).is_some() {
        return Err(Error::invalid(
            "time namespace enabled, but both namespace path and time offsets specified -- you may \
             only provide one",
        ));
    }
    match offsets
        .keys()
        .find(|name| !matches!(name.as_str(), "monotonic" | "boottime"))
    {
        Some(name) => Err(Error::invalid(format!(
            "linux.timeOffsets: unknown clock {name:?}"
        ))),
        None => Ok(()),
    }
}

fn sysctls(linux: &Linux, namespaces: &Namespaces) -> Result<sysctl::Owned> {
    let settings = linux.sysctl().as_ref();
    let Some(settings) = settings.filter(|settings| !settings.is_empty()) else {
        return Ok(sysctl::Owned::default());
    };
    let owned = linux::owned(namespaces)?;
    for (name, value) in settings {
        sysctl::check(name, value, owned)?;
    }
    Ok(owned)
}

fn propagation(linux: &Linux) -> Result<()> {
    match linux.rootfs_propagation().as_deref() {
        None | Some("") => Ok(()),
        Some(name) if crate::plan::options::propagation(name).is_some() => Ok(()),
        Some(name) => Err(Error::invalid(format!(
            "rootfsPropagation={name} is not supported"
        ))),
    }
}

fn mount_label(linux: &Linux, host: &HostFacts) -> Result<()> {
    if linux.mount_label().as_ref().is_none_or(String::is_empty) {
        return Ok(());
    }
    if host.selinux {
        return Ok(());
    }
    Err(Error::unsupported(
        "selinux label is specified in config, but selinux is disabled or not supported",
    ))
}

fn check_mount(mount: &Mount, namespaces: &Namespaces, host: &HostFacts) -> Result<()> {
    let at = mount.destination().display();
    if mount.destination().as_os_str().is_empty() {
        return Err(Error::invalid("mounts: destination must not be empty"));
    }
    let any = |m: &Option<Vec<_>>| m.as_ref().is_some_and(|mappings| !mappings.is_empty());
    let (uids, gids) = (any(mount.uid_mappings()), any(mount.gid_mappings()));
    if uids != gids {
        return Err(Error::invalid(format!(
            "invalid mount {at}: id-mapped mounts must have both uid and gid mappings specified"
        )));
    }
    let options = crate::plan::options::parse(mount.options().as_deref().unwrap_or_default());
    let idmapped = uids || options.idmap.is_some();
    let bind = options.is_bind() || mount.typ().as_deref() == Some("bind");
    if idmapped {
        if !bind {
            return Err(Error::invalid(format!(
                "invalid mount {at}: id-mapped mounts are only supported for bind-mounts"
            )));
        }
        if !host.is_root() {
            return Err(Error::unsupported(format!(
                "invalid mount {at}: id-mapped mounts are not supported for rootless containers"
            )));
        }
        if !uids && !namespaces.has(Kind::User) {
            return Err(Error::invalid(format!(
                "invalid mount {at}: id-mapped mount without mappings and without a user namespace"
            )));
        }
    }
    if bind && !options.data.is_empty() {
        return Err(Error::invalid(format!(
            "invalid mount {at}: bind mounts cannot have any filesystem-specific options applied"
        )));
    }
    Ok(())
}

fn hooks(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated)]
    let all = [
        hooks.prestart(),
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    for hook in all.into_iter().flatten().flatten() {
        if !hook.path().is_absolute() {
            return Err(Error::invalid(format!(
                "hooks: path {} is not absolute",
                hook.path().display()
            )));
        }
        if hook.timeout().is_some_and(|timeout| timeout <= 0) {
            return Err(Error::invalid(format!(
                "hooks: timeout of {} must be greater than zero",
                hook.path().display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::CgroupMode;
    use serde_json::{Value, json};

    fn host() -> HostFacts {
        HostFacts {
            cgroup: CgroupMode::V2 {
                mountpoint: "/sys/fs/cgroup".into(),
                own: "/".into(),
            },
            euid: 0,
            egid: 0,
            in_user_namespace: false,
            setgroups: true,
            apparmor: false,
            selinux: false,
        }
    }

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "uts"}]}
        })
    }

    fn check(change: impl FnOnce(&mut Value)) -> std::result::Result<(), String> {
        let mut config = minimal();
        change(&mut config);
        let bytes = serde_json::to_vec(&config).unwrap();
        super::super::CheckedSpec::check(&bytes, &host())
            .map(drop)
            .map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn minimal_config_passes() {
        check(|_| {}).unwrap();
    }

    #[test]
    fn refusals_name_the_field() {
        type Change = fn(&mut Value);
        let cases: &[(Change, &str)] = &[
            (
                |c| c["process"] = Value::Null,
                "process property must not be empty",
            ),
            (
                |c| c["process"]["cwd"] = json!("tmp"),
                "Cwd must be an absolute path",
            ),
            (
                |c| c["process"]["args"] = json!([]),
                "args must not be empty",
            ),
            (
                |c| c["process"]["user"]["uid"] = json!(u32::MAX),
                "process.user",
            ),
            (
                |c| c["process"]["user"]["additionalGids"] = json!([5, u32::MAX]),
                "process.user",
            ),
            (
                |c| c["process"]["apparmorProfile"] = json!("x"),
                "apparmor: config provided",
            ),
            (
                |c| c["process"]["selinuxLabel"] = json!("x"),
                "selinux label is specified",
            ),
            (|c| c["root"] = Value::Null, "root must be specified"),
            (
                |c| c["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}}),
                "time namespace offsets",
            ),
            (
                |c| {
                    c["linux"]["uidMappings"] =
                        json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
                },
                "user namespace mappings specified",
            ),
            (
                |c| c["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "pid"}]),
                "duplicated ns",
            ),
            (
                |c| {
                    c["linux"]["namespaces"] = json!([{"type": "pid"}]);
                    c["linux"]["maskedPaths"] = json!(["/proc/kcore"]);
                },
                "private MNT namespace",
            ),
            (
                |c| {
                    c["hostname"] = json!("x");
                    c["linux"]["namespaces"] = json!([{"type": "mount"}]);
                },
                "unable to set hostname without a private UTS namespace",
            ),
            (
                |c| c["linux"]["sysctl"] = json!({"vm.swappiness": "1"}),
                "vm.swappiness",
            ),
            (
                |c| c["linux"]["rootfsPropagation"] = json!("sideways"),
                "rootfsPropagation=sideways",
            ),
            (
                |c| c["hooks"] = json!({"prestart": [{"path": "rel"}]}),
                "hooks: path rel is not absolute",
            ),
            (
                |c| {
                    c["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/y",
                        "options": ["bind", "size=1"]}]);
                },
                "filesystem-specific options",
            ),
            (
                |c| {
                    c["process"]["rlimits"] =
                        json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]);
                },
                "soft limit of RLIMIT_CORE",
            ),
        ];
        for (change, want) in cases {
            let got = check(*change).expect_err(want);
            assert!(got.contains(want), "{got} does not contain {want}");
        }
    }
}
