//! The plan of a container's cgroup and its creation.
//!
//! Directories first, with whatever a process needs to get in; limits are `Cgroup::apply_limits`.
//! A failed creation removes the directories that it made and no others.

use std::path::{Path, PathBuf};

use coracle_oci::record::CgroupRecord;
use coracle_oci::spec::{Linux, LinuxResources, Spec};
use rustix::fs::Mode;
use rustix::io::Errno;

use super::devices::DeviceRules;
use super::path::{Layout, Place, PlanOptions};
use super::step::{Dir, Step, Write};
use super::systemd::driver::{self, UnitPlan};
use super::systemd::{Facts, Unit};
use super::tree::Cgroup;
use super::{freeze, limits_v1, limits_v2, program, remove};
use crate::error::{Error, Kind, Result};

/// Everything that will be made and written, decided before anything is.
#[derive(Clone, Debug)]
pub struct CgroupPlan {
    pub(super) layout: Layout,
    /// v1 cpuset files, which joining depends on.
    cpuset: Vec<Write>,
    pub(super) limits: Vec<Limit>,
    pub(super) devices: Devices,
    pub(super) options: PlanOptions,
    /// The systemd driver: who makes the cgroup, once there is a process for it.
    pub(super) unit: Option<UnitPlan>,
    /// What the spec asks for and every runtime ignores, for the log.
    pub warnings: Vec<String>,
}

impl Limit {
    /// The controller, for errors about it.
    pub fn name(&self) -> &str {
        match (&self.step, self.controller) {
            (Step::Write(write) | Step::IfPresent(write) | Step::Lines(write), "") => {
                write.file.split('.').next().unwrap_or_default()
            }
            (Step::FirstPresent(_), "") => "io",
            (Step::Around { .. }, "") => "cpu",
            (_, "") => "memory",
            (_, controller) => controller,
        }
    }
}

/// A step in one of the layout's directories.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    pub dir: usize,
    pub controller: &'static str,
    pub step: Step,
}

#[derive(Clone, Debug)]
pub(super) enum Devices {
    /// An update leaves them alone.
    Keep,
    V1 {
        dir: usize,
        writes: Vec<Write>,
    },
    V2 {
        program: Vec<u64>,
        allow_all: bool,
    },
}

impl CgroupPlan {
    pub(super) fn new(
        layout: Layout,
        linux: Option<&Linux>,
        options: PlanOptions,
    ) -> Result<CgroupPlan> {
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = DeviceRules::of(linux)?;
        CgroupPlan::limits(layout, resources, options)?.with_devices(&rules)
    }

    /// The plan of a container in a unit of systemd's.
    pub(super) fn of_unit(
        spec: &Spec,
        (unit, layout): (&Unit, Layout),
        facts: &Facts,
        options: PlanOptions,
    ) -> Result<CgroupPlan> {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = DeviceRules::of(linux)?;
        let host = (layout.version, facts);
        let kept = resources.map(|resources| driver::as_systemd_keeps(resources, host));
        let plan = CgroupPlan::limits(layout, kept.as_ref(), options)?;
        let mut plan = plan.with_devices(&rules)?;
        let unit = UnitPlan::new(spec, unit, &rules, host, &mut plan.warnings)?;
        plan.unit = Some(unit);
        Ok(plan)
    }

    fn with_devices(mut self, rules: &DeviceRules) -> Result<CgroupPlan> {
        let plan = &mut self;
        plan.devices = if plan.layout.version == 2 {
            Devices::V2 {
                program: program::assemble(rules),
                allow_all: rules.default_allow && rules.exceptions.is_empty(),
            }
        } else {
            let writes = rules.v1_writes();
            match plan.layout.controller("devices") {
                Some(dir) => Devices::V1 { dir, writes },
                // Without the hierarchy nothing would hold the container back.
                None if !plan.options.rootless => {
                    return Err(Error::unsupported(
                        "linux.resources.devices: the devices cgroup is not mounted",
                    ));
                }
                None => Devices::Keep,
            }
        };
        Ok(self)
    }

    pub(super) fn update(
        record: &CgroupRecord,
        resources: &LinuxResources,
        options: PlanOptions,
        facts: Option<&Facts>,
    ) -> Result<CgroupPlan> {
        let layout = Layout::from_record(record);
        let (Some(unit), Some(facts)) = (record.unit(), facts) else {
            return CgroupPlan::limits(layout, Some(resources), options);
        };
        let host = (layout.version, facts);
        let kept = driver::as_systemd_keeps(resources, host);
        let mut plan = CgroupPlan::limits(layout, Some(&kept), options)?;
        let unit = UnitPlan::update(unit, resources, host, &mut plan.warnings)?;
        plan.unit = Some(unit);
        Ok(plan)
    }

    fn limits(
        layout: Layout,
        resources: Option<&LinuxResources>,
        options: PlanOptions,
    ) -> Result<CgroupPlan> {
        let mut warnings = Vec::new();
        let mut limits = Vec::new();
        let mut cpuset = Vec::new();
        match resources {
            None => {}
            Some(resources) if layout.version == 2 => {
                let steps = limits_v2::plan(resources, &mut warnings)?;
                limits.extend(steps.into_iter().map(|step| Limit {
                    dir: 0,
                    controller: "",
                    step,
                }));
            }
            Some(resources) => {
                for (controller, step) in limits_v1::plan(resources, &mut warnings)? {
                    limits.push(Limit {
                        dir: layout.require(controller)?,
                        controller,
                        step,
                    });
                }
                cpuset = limits_v1::cpuset(Some(resources));
                if !cpuset.is_empty() {
                    layout.require("cpuset")?;
                }
            }
        }
        let devices = Devices::Keep;
        Ok(CgroupPlan {
            layout,
            cpuset,
            limits,
            devices,
            options,
            unit: None,
            warnings,
        })
    }

    pub fn is_rootless(&self) -> bool {
        self.options.rootless
    }

    /// What goes into the intent and the container record.
    pub fn record(&self) -> CgroupRecord {
        let unit = self.unit.as_ref().map(|unit| unit.record.clone());
        self.layout.record().with_unit(unit)
    }

    /// The same plan without any cgroup: for a rootless container whose cgroup is out of reach.
    fn without_cgroup(&self) -> Cgroup {
        Cgroup::open(&CgroupRecord::None)
    }

    /// Makes the directories, and fills the v1 cpusets that joining needs. With a unit, only
    /// looks whether its cgroup is free: [`CgroupPlan::start_unit`] makes it.
    ///
    /// # Errors
    /// A directory cannot be made, the cgroup holds processes already or is frozen.
    pub fn create(&self) -> Result<Cgroup> {
        if self.unit.is_some() {
            let mut places = self.layout.dirs.iter().filter(|place| place.path.exists());
            places
                .try_for_each(|place| check_unused(self.layout.version, place))
                .map_err(|error| error.context("unable to apply cgroup configuration"))?;
            return Ok(self.without_cgroup());
        }
        let mut made = Vec::new();
        let mut out_of_reach = Vec::new();
        match self.create_dirs(&mut made, &mut out_of_reach) {
            Ok(()) if out_of_reach.is_empty() => {
                Ok(Cgroup::new(self.layout.version, &self.layout.dirs, made))
            }
            Ok(()) => {
                let mut dirs = self.layout.dirs.clone();
                dirs.retain(|place| !out_of_reach.contains(&place.path));
                Ok(Cgroup::new(self.layout.version, &dirs, made))
            }
            Err(error) => {
                for path in made.iter().rev() {
                    // The first failure is the one to report.
                    let _ = rustix::fs::rmdir(path);
                }
                Err(error.context("unable to apply cgroup configuration"))
            }
        }
    }

    /// A rootless container that names no cgroup can live without one, as long as it asks for
    /// nothing: a limit in a hierarchy that is out of reach is refused when it is set.
    fn is_tolerable(&self, error: &Error) -> bool {
        let permission = matches!(
            error.errno().map(Errno::from_raw_os_error),
            Some(Errno::PERM | Errno::ACCESS | Errno::ROFS | Errno::NOENT)
        );
        permission && !self.layout.named && self.options.rootless
    }

    /// The refusal of a limit whose cgroup is out of reach, where it can be told by now.
    fn cannot_limit(&self, place: &Place) -> Option<&'static str> {
        let cpuset = place.controllers.iter().any(|name| name == "cpuset");
        if self.layout.version == 2 && !self.limits.is_empty() {
            return Some(
                "rootless needs no limits + no cgrouppath when no permission is granted for cgroups",
            );
        }
        (cpuset && !self.cpuset.is_empty())
            .then_some("cannot set cpuset limit: container could not join or create cgroup")
    }

    fn create_dirs(&self, made: &mut Vec<PathBuf>, out_of_reach: &mut Vec<PathBuf>) -> Result<()> {
        for place in &self.layout.dirs {
            let before = made.len();
            let Err(error) = self.create_dir(place, made) else {
                continue;
            };
            if !self.is_tolerable(&error) {
                return Err(error);
            }
            if let Some(refusal) = self.cannot_limit(place) {
                return Err(error.context(refusal));
            }
            for path in made.drain(before..).rev() {
                // Whoever could make it can remove it; there is nothing to do if not.
                let _ = rustix::fs::rmdir(&path);
            }
            out_of_reach.push(place.path.clone());
        }
        Ok(())
    }

    fn create_dir(&self, place: &Place, made: &mut Vec<PathBuf>) -> Result<()> {
        let before = made.len();
        make_dir(place, made)?;
        let existed = made.len() == before;
        if existed {
            check_unused(self.layout.version, place)?;
        }
        match self.layout.version {
            2 => enable_controllers(place),
            _ if place.controllers.iter().any(|c| c == "cpuset") => self.fill_cpusets(place),
            _ => Ok(()),
        }
    }

    /// v1 cpusets start empty and take no process until they have processors and memory nodes:
    /// the asked ones, or the parent's.
    pub(super) fn fill_cpusets(&self, place: &Place) -> Result<()> {
        let Some(parent) = place.path.parent() else {
            return Ok(());
        };
        let parent = Dir::open(parent)?;
        let leaf = Dir::open(&place.path)?;
        for (file, old_name) in [("cpuset.cpus", "cpus"), ("cpuset.mems", "mems")] {
            // A hierarchy mounted with `noprefix` has the names without "cpuset.".
            let (file, value) = match filled(&parent, &place.mountpoint, file) {
                Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => {
                    (old_name, filled(&parent, &place.mountpoint, old_name)?)
                }
                value => (file, value?),
            };
            let asked = self
                .cpuset
                .iter()
                .find(|w| w.file.trim_start_matches("cpuset.") == old_name);
            match asked {
                Some(asked) => {
                    let write = Write {
                        file: file.into(),
                        ..asked.clone()
                    };
                    leaf.apply(&Step::Write(write))?;
                }
                None => write_cpuset(&leaf, file, &value)?,
            }
        }
        Ok(())
    }

    /// The v1 cpuset files, for updates.
    pub(super) fn cpuset(&self) -> &[Write] {
        &self.cpuset
    }
}

impl Layout {
    pub(super) fn controller(&self, name: &str) -> Option<usize> {
        self.dirs
            .iter()
            .position(|place| place.controllers.iter().any(|c| c == name))
    }

    fn require(&self, controller: &'static str) -> Result<usize> {
        self.controller(controller).ok_or_else(|| {
            let why = if self.dirs.is_empty() {
                "container could not join or create cgroup"
            } else {
                "the controller is not mounted"
            };
            Error::unsupported(format!("cannot set {controller} limit: {why}"))
        })
    }
}

pub(super) fn make_dir(place: &Place, made: &mut Vec<PathBuf>) -> Result<()> {
    // Most often only the last component is new.
    let mode = Mode::from_raw_mode(0o755);
    let mut missing = vec![place.path.as_path()];
    while let Some(path) = missing.last().copied() {
        match rustix::fs::mkdir(path, mode) {
            Ok(()) => {
                made.push(path.to_owned());
                missing.pop();
            }
            Err(Errno::EXIST) => {
                missing.pop();
            }
            Err(Errno::NOENT) if path.starts_with(&place.mountpoint) && missing.len() < 512 => {
                let Some(parent) = path.parent().filter(|parent| *parent != place.mountpoint)
                else {
                    return Err(cannot_make(path, Errno::NOENT));
                };
                missing.push(parent);
            }
            Err(errno) => return Err(cannot_make(path, errno)),
        }
    }
    Ok(())
}

fn cannot_make(path: &Path, errno: Errno) -> Error {
    Error::system("mkdir", path.display().to_string(), errno)
}

/// A directory that was there before must not hold anybody else's processes.
fn check_unused(version: u8, place: &Place) -> Result<()> {
    let tree = remove::processes_below(&place.path)?;
    if !tree.is_empty() {
        return Err(Error::new(
            Kind::State,
            format!(
                "container's cgroup is not empty: {} process(es) found",
                tree.len()
            ),
            "",
        ));
    }
    let freezer = version == 2 || place.controllers.iter().any(|c| c == "freezer");
    if freezer && freeze::is_frozen(version, &Dir::open(&place.path)?)? {
        return Err(Error::new(
            Kind::State,
            "container's cgroup unexpectedly frozen",
            "",
        ));
    }
    Ok(())
}

/// The value of a cpuset file, after an ancestor's was handed down to those that are empty. Looks
/// no further up than it has to.
fn filled(dir: &Dir, top: &Path, file: &str) -> Result<String> {
    let value = dir
        .read(file)
        .map_err(|errno| Error::system("read", dir.path().join(file).display().to_string(), errno))?
        .trim()
        .to_owned();
    let Some(parent) = dir.path().parent() else {
        return Ok(value);
    };
    if !value.is_empty() || dir.path() == top {
        return Ok(value);
    }
    let value = filled(&Dir::open(parent)?, top, file)?;
    write_cpuset(dir, file, &value)?;
    Ok(value)
}

fn write_cpuset(dir: &Dir, file: &str, value: &str) -> Result<()> {
    dir.write(file, value).map_err(|errno| {
        let path = dir.path().join(file).display().to_string();
        Error::system(format!("write {value:?} to"), path, errno)
    })
}

/// Hands every controller of the root down to the parent of the container's cgroup, so that the
/// container is accounted for all of them. Only what is missing is written.
pub(super) fn enable_controllers(place: &Place) -> Result<()> {
    let root = Dir::open(&place.mountpoint)?;
    let available = root.read("cgroup.controllers").unwrap_or_default();
    if available.trim().is_empty() {
        return Ok(());
    }
    let leaf = Dir::open(&place.path)?;
    let present = leaf.read("cgroup.controllers").unwrap_or_default();
    let is_missing = |name: &&str| !present.split_whitespace().any(|found| found == *name);
    let missing: Vec<&str> = available.split_whitespace().filter(is_missing).collect();
    if !missing.is_empty() {
        let below = place
            .path
            .strip_prefix(&place.mountpoint)
            .unwrap_or(Path::new(""));
        let mut current = place.mountpoint.clone();
        for name in below.components() {
            delegate(&Dir::open(&current)?, &missing);
            current.push(name);
        }
    }
    check_type(&leaf)
}

/// What cannot be handed down (no permission, processes in the way) shows when its limit is set.
fn delegate(dir: &Dir, controllers: &[&str]) {
    let all = format!("+{}", controllers.join(" +"));
    if dir.write("cgroup.subtree_control", &all).is_err() {
        for controller in controllers {
            let _ = dir.write("cgroup.subtree_control", &format!("+{controller}"));
        }
    }
}

/// Below a cgroup with processes a new one is "domain invalid" and takes no process until it is
/// made threaded, which costs it the domain controllers; their limits then say so.
fn check_type(leaf: &Dir) -> Result<()> {
    let Ok(kind) = leaf.read("cgroup.type") else {
        return Ok(());
    };
    if kind.trim() == "domain invalid" {
        leaf.write("cgroup.type", "threaded").map_err(|errno| {
            let path = leaf.path().display().to_string();
            Error::system("cannot enter cgroup in an invalid state", path, errno)
        })?;
    }
    Ok(())
}
