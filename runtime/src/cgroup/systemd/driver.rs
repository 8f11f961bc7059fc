//! The unit in the life of a [`Cgroup`]: planned, started, changed, stopped.

use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::UnitRecord;
use coracle_oci::spec::{LinuxResources, Spec};

use super::address::Scope;
use super::manager::{Facts, Manager, Property};
use super::unit::{self, Unit};
use super::wire::Value;
use super::{annotations, owner, properties};
use crate::cgroup::create::{self, CgroupPlan};
use crate::cgroup::devices::DeviceRules;
use crate::cgroup::mounts::CgroupMode;
use crate::cgroup::path::{Layout, Place};
use crate::cgroup::step::{Dir, Step};
use crate::cgroup::tree::Cgroup;
use crate::cgroup::{freeze, tree};
use crate::error::{Error, Kind, Result};

/// A unit that will be started or changed: what systemd is told.
#[derive(Clone, Debug)]
pub struct UnitPlan {
    pub record: UnitRecord,
    pub(in crate::cgroup) properties: Vec<Property>,
    /// Who gets the cgroup, once it is there.
    owner: Option<u32>,
}

impl UnitPlan {
    /// Plans the scope of a new container. Pure.
    ///
    /// # Errors
    /// The spec names what cannot be a unit, or a property that cannot be.
    pub(in crate::cgroup) fn new(
        spec: &Spec,
        unit: &Unit,
        rules: &DeviceRules,
        (cgroup, facts): (u8, &Facts),
        warnings: &mut Vec<String>,
    ) -> Result<UnitPlan> {
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        let text = |name: &str, text: &str| (name.to_owned(), Value::text(text));
        let mut list = vec![
            text(
                "Description",
                &format!("libcontainer container {}", unit.title),
            ),
            text("Slice", &unit.slice),
            ("Delegate".to_owned(), Value::Bool(true)),
        ];
        list.extend(properties::accounting(cgroup));
        list.push(("DefaultDependencies".to_owned(), Value::Bool(false)));
        list.extend(annotations::properties(spec.annotations().as_ref())?);
        list.extend(properties::devices(rules, cgroup, facts, warnings));
        if let Some(resources) = resources {
            if cgroup == 2 {
                list.extend(properties::oom_policy(resources, facts.version)?);
            }
            list.extend(properties::of_resources(
                resources,
                cgroup,
                facts.version,
                warnings,
            )?);
        }
        Ok(UnitPlan {
            record: UnitRecord {
                name: unit.name.clone(),
                user: facts.scope == Scope::User,
            },
            properties: list,
            owner: (cgroup == 2).then(|| owner::of(spec)).flatten(),
        })
    }

    /// Plans other limits for a unit that exists. Pure.
    ///
    /// # Errors
    /// A value cannot be a property.
    pub(in crate::cgroup) fn update(
        record: &UnitRecord,
        resources: &LinuxResources,
        (cgroup, facts): (u8, &Facts),
        warnings: &mut Vec<String>,
    ) -> Result<UnitPlan> {
        Ok(UnitPlan {
            record: record.clone(),
            properties: properties::of_resources(resources, cgroup, facts.version, warnings)?,
            owner: None,
        })
    }
}

/// The unit that a spec asks for, and where its cgroup will be in each hierarchy. Pure.
///
/// # Errors
/// `linux.cgroupsPath` is no `slice:prefix:name`, or the host cannot have such a unit.
pub(in crate::cgroup) fn layout(
    spec: &Spec,
    id: &ContainerId,
    mode: &CgroupMode,
    facts: &Facts,
) -> Result<(Unit, Layout)> {
    let path = spec
        .linux()
        .as_ref()
        .and_then(|l| l.cgroups_path().as_deref());
    let named = path.filter(|path| !path.as_os_str().is_empty());
    let unit = unit::parse(named, id, facts.scope)?;
    let below = facts.control_group.join(unit.cgroup());
    let place = |controllers: &[String], mountpoint: &Path| Place {
        controllers: controllers.to_vec(),
        path: mountpoint.join(&below),
        mountpoint: mountpoint.to_owned(),
    };
    let (version, dirs) = match mode {
        CgroupMode::V2 { mountpoint, .. } => (2, vec![place(&[], mountpoint)]),
        CgroupMode::V1 { .. } if facts.scope == Scope::User => {
            return Err(Error::unsupported(
                "cannot use rootless systemd cgroups manager on cgroup v1",
            ));
        }
        CgroupMode::V1 {
            hierarchies,
            unified,
        } => {
            let all = hierarchies.iter().chain(unified);
            (
                1,
                all.map(|h| place(&h.controllers, &h.mountpoint)).collect(),
            )
        }
    };
    let layout = Layout {
        version,
        dirs,
        named: named.is_some(),
    };
    Ok((unit, layout))
}

/// The limits as the files get them: with the quota that systemd will make of it, and without the
/// weight that a property could not be given, and that an idle cgroup refuses.
pub(in crate::cgroup) fn as_systemd_keeps(
    resources: &LinuxResources,
    (cgroup, facts): (u8, &Facts),
) -> LinuxResources {
    let idle = |idle| cgroup == 2 && properties::is_idle(idle, facts.version);
    let mut resources = resources.clone();
    if let Some(mut cpu) = resources.cpu().clone() {
        if let Some(quota) = cpu.quota() {
            let period = cpu.period().unwrap_or_default();
            cpu.set_quota(Some(properties::rounded_quota(quota, period)));
        }
        if idle(cpu.idle()) {
            cpu.set_shares(None);
        }
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut unified) = resources.unified().clone() {
        let asked = unified.get("cpu.idle");
        let asked = asked.and_then(|value| value.trim().parse().ok());
        if idle(asked) && unified.remove("cpu.weight").is_some() {
            resources.set_unified(Some(unified));
        }
    }
    resources
}

impl CgroupPlan {
    /// Starts the unit around a process that this one has cloned, and completes its cgroup.
    ///
    /// # Errors
    /// systemd refuses, or a directory cannot be made; the unit is gone again then.
    pub fn start_unit(&self, manager: &mut Manager, pid: i32) -> Result<Cgroup> {
        let Some(unit) = &self.unit else {
            return Err(Error::new(Kind::Internal, "no unit is planned", ""));
        };
        let mut properties = unit.properties.clone();
        let pids = Value::Array("u".into(), vec![Value::U32(pid.unsigned_abs())]);
        properties.push(("PIDs".to_owned(), pids));
        manager
            .start(&unit.record.name, &properties)
            .map_err(apply_failed)?;
        let mut made = Vec::new();
        match self.complete(unit, pid, &mut made) {
            Ok(()) => Ok(self.started(unit, made)),
            Err(error) => {
                let error = apply_failed(error);
                let cgroup = self.started(unit, made);
                match manager
                    .stop(&unit.record.name)
                    .and_then(|()| cgroup.delete_dirs())
                {
                    Ok(()) => Err(error),
                    Err(undo) => Err(error.context(format!("(undo: {undo:#})"))),
                }
            }
        }
    }

    fn started(&self, unit: &UnitPlan, made: Vec<PathBuf>) -> Cgroup {
        let mut cgroup = Cgroup::new(self.layout.version, &self.layout.dirs, made);
        cgroup.unit = Some(unit.record.clone());
        cgroup.unit_started = true;
        cgroup
    }

    /// What systemd does not do: on v2 the controllers that it does not know, on v1 the whole
    /// hierarchies.
    fn complete(&self, unit: &UnitPlan, pid: i32, made: &mut Vec<PathBuf>) -> Result<()> {
        for place in &self.layout.dirs {
            if self.layout.version == 2 {
                create::enable_controllers(place)?;
                if let Some(uid) = unit.owner {
                    owner::give(&place.path, uid)?;
                }
                continue;
            }
            // systemd's own, and on hybrid hosts the one that it tracks processes in.
            if is_systemds(place) {
                continue;
            }
            create::make_dir(place, made)?;
            if place.controllers.iter().any(|c| c == "cpuset") {
                self.fill_cpusets(place)?;
            }
            tree::join_one(place, pid)?;
        }
        Ok(())
    }
}

fn is_systemds(place: &Place) -> bool {
    place.controllers.is_empty() || place.controllers.iter().any(|c| c == "name=systemd")
}

fn apply_failed(error: Error) -> Error {
    error.context("unable to apply cgroup configuration")
}

impl Cgroup {
    /// The systemd that keeps this cgroup, if one does.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn manager(&self) -> Result<Option<Manager>> {
        let Some(unit) = &self.unit else {
            return Ok(None);
        };
        Manager::connect(scope_of(unit)).map(Some)
    }

    /// Has the unit stopped and forgotten. Without systemd the directories are removed all the
    /// same, by the caller.
    pub(in crate::cgroup) fn stop_unit(&self) -> Result<()> {
        let Some(unit) = &self.unit else {
            return Ok(());
        };
        match Manager::connect(scope_of(unit)) {
            Ok(mut manager) => manager.stop(&unit.name),
            // It is gone with the systemd that had it.
            Err(_) => Ok(()),
        }
    }

    /// Tells systemd the new limits, before the files are written.
    ///
    /// # Errors
    /// systemd refuses one of them, or the container does not freeze. `before` has what to set
    /// back then.
    pub(in crate::cgroup) fn update_unit(
        &self,
        plan: &CgroupPlan,
        manager: Option<&mut Manager>,
        before: &mut Vec<Property>,
    ) -> Result<()> {
        let (Some(unit), Some(manager)) = (&plan.unit, manager) else {
            return Ok(());
        };
        // Systemd would have the kernel kill what does not fit before the files are looked at.
        let dirs = tree::Dirs {
            places: &plan.layout.dirs,
        };
        for limit in &plan.limits {
            if let Step::MemoryUnder { .. } = limit.step {
                dirs.open(limit.dir)?.apply(&limit.step)?;
            }
        }
        if unit.properties.is_empty() {
            return Ok(());
        }
        for (name, _) in &unit.properties {
            let value = manager.unit_property(&unit.record.name, "Scope", name)?;
            before.push((name.clone(), value));
        }
        self.set_frozen(unit, manager, &unit.properties)
    }

    /// Tells systemd the old limits again.
    pub(in crate::cgroup) fn restore_unit(
        &self,
        plan: &CgroupPlan,
        manager: Option<&mut Manager>,
        before: &[Property],
    ) -> Result<()> {
        match (&plan.unit, manager) {
            (Some(unit), Some(manager)) if !before.is_empty() => {
                self.set_frozen(unit, manager, before)
            }
            _ => Ok(()),
        }
    }

    fn set_frozen(
        &self,
        unit: &UnitPlan,
        manager: &mut Manager,
        properties: &[Property],
    ) -> Result<()> {
        let frozen = self.freeze_for_update(&unit.record, manager)?;
        let set = manager.set(&unit.record.name, properties);
        if let Some(dir) = frozen {
            freeze::thaw(1, &dir)?;
        }
        set
    }

    /// On v1 systemd writes the whole list of devices anew, deny-all first: who opens one at that
    /// moment must not run. Gives back the freezer to thaw.
    fn freeze_for_update(&self, unit: &UnitRecord, manager: &mut Manager) -> Result<Option<Dir>> {
        let Some(place) = self.place_of("freezer").filter(|_| !self.is_v2()) else {
            return Ok(None);
        };
        let dir = Dir::open(&place.path)?;
        if freeze::is_frozen(1, &dir)? || allows_all_devices(unit, manager) {
            return Ok(None);
        }
        freeze::freeze(1, &dir)?;
        Ok(Some(dir))
    }

    /// Has systemd move a process in, for callers without the right to.
    ///
    /// # Errors
    /// There is no unit, or systemd refuses.
    pub fn attach_by_unit(&self, pid: i32) -> Result<()> {
        let Some(unit) = &self.unit else {
            return Err(Error::new(Kind::Internal, "the cgroup has no unit", ""));
        };
        let dir = self.dirs.first().map(|place| &place.path);
        // `exec --cgroup` goes below the unit's own directory, which has the unit's name.
        let below = dir.and_then(|dir| {
            let own = dir
                .ancestors()
                .find(|dir| dir.file_name().is_some_and(|name| name == &*unit.name))?;
            dir.strip_prefix(own).ok()?.to_str()
        });
        Manager::connect(scope_of(unit))?.attach(&unit.name, below.unwrap_or_default(), pid)
    }
}

fn scope_of(unit: &UnitRecord) -> Scope {
    if unit.user {
        Scope::User
    } else {
        Scope::System
    }
}

/// A unit without device rules has none written.
fn allows_all_devices(unit: &UnitRecord, manager: &mut Manager) -> bool {
    let mut property = |name: &str| manager.unit_property(&unit.name, "Scope", name).ok();
    property("DevicePolicy").is_some_and(|policy| policy.as_text() == Some("auto"))
        && matches!(property("DeviceAllow"), Some(Value::Array(_, list)) if list.is_empty())
}

/// The systemd that a caller's containers belong to, and whether it is a user's: the session's
/// for who has no rights on the host's cgroups. For root in a user namespace that is whoever the
/// session bus takes him for.
///
/// # Errors
/// systemd does not run here, or cannot be reached.
pub fn manager_for(unprivileged: bool, namespaced: bool) -> Result<(Manager, bool)> {
    if unprivileged {
        return Ok((Manager::connect(Scope::User)?, true));
    }
    if namespaced
        && let Ok(mut manager) = Manager::connect(Scope::User)
        && matches!(manager.user_on_bus(), Ok(Some(uid)) if uid != 0)
    {
        return Ok((manager, true));
    }
    Ok((Manager::connect(Scope::System)?, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle cgroup refuses a weight (sched_group_set_shares), so an update of both would fail
    /// after systemd had been told.
    #[test]
    fn idle_leaves_no_weight_for_the_files() {
        let cases = [
            (r#"{"cpu":{"idle":1,"shares":200}}"#, 2, 257, false),
            (r#"{"cpu":{"idle":0,"shares":200}}"#, 2, 257, true),
            (r#"{"cpu":{"shares":200}}"#, 2, 257, true),
            (r#"{"cpu":{"idle":1,"shares":200}}"#, 2, 251, true),
            (r#"{"cpu":{"idle":1,"shares":200}}"#, 1, 257, true),
            (
                r#"{"unified":{"cpu.idle":" 1","cpu.weight":"8"}}"#,
                2,
                257,
                false,
            ),
            (
                r#"{"unified":{"cpu.idle":"0","cpu.weight":"8"}}"#,
                2,
                257,
                true,
            ),
        ];
        for (text, cgroup, version, weight) in cases {
            let resources = coracle_oci::config::parse_resources(text.as_bytes()).unwrap();
            let facts = Facts {
                scope: Scope::System,
                version,
                control_group: PathBuf::new(),
                proc_devices: String::new(),
            };
            let kept = as_systemd_keeps(&resources, (cgroup, &facts));
            let shares = kept.cpu().as_ref().and_then(|cpu| cpu.shares());
            let unified = kept.unified().as_ref();
            let unified = unified.and_then(|unified| unified.get("cpu.weight"));
            assert_eq!(shares.is_some() || unified.is_some(), weight, "{text}");
        }
    }
}
