//! A container's cgroup as it exists: joining, limiting, freezing, killing, listing.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_oci::record::{CgroupRecord, UnitRecord};
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;

use super::create::{CgroupPlan, Devices, Limit};
use super::path::{Layout, Place};
use super::step::{Dir, Step};
use super::{freeze, remove};
use crate::error::{Error, Kind, Result};

/// The directories of one container, or of a sub-cgroup that `exec` asked for.
#[derive(Clone, Debug)]
pub struct Cgroup {
    pub(super) version: u8,
    pub(super) dirs: Vec<Place>,
    /// Directories that this process made: their device filter is known to be empty.
    made: Vec<PathBuf>,
    /// Who else keeps these directories.
    pub(super) unit: Option<UnitRecord>,
    /// This process has started the unit.
    pub(super) unit_started: bool,
}

/// Directories opened on first use.
pub(super) struct Dirs<'a> {
    pub places: &'a [Place],
}

impl Dirs<'_> {
    pub fn open(&self, index: usize) -> Result<Dir> {
        Dir::open(&self.places[index].path)
    }
}

impl Cgroup {
    pub(super) fn new(version: u8, dirs: &[Place], made: Vec<PathBuf>) -> Cgroup {
        Cgroup {
            version,
            dirs: dirs.to_vec(),
            made,
            unit: None,
            unit_started: false,
        }
    }

    /// The cgroup of a record. Makes no system call.
    pub fn open(record: &CgroupRecord) -> Cgroup {
        let layout = Layout::from_record(record);
        Cgroup {
            version: layout.version,
            dirs: layout.dirs,
            made: Vec::new(),
            unit: record.unit().cloned(),
            unit_started: false,
        }
    }

    /// Those of its directories that are there: before the creation, another's.
    pub fn existing(&self) -> Vec<PathBuf> {
        let there = |path: &&PathBuf| rustix::fs::access(*path, Access::EXISTS).is_ok();
        let paths = self.dirs.iter().map(|place| &place.path);
        paths.filter(there).cloned().collect()
    }

    /// Without the directories that are another's, and without the unit that they are of.
    pub fn without(&self, others: &[PathBuf]) -> Cgroup {
        let mut own = self.clone();
        own.dirs.retain(|place| !others.contains(&place.path));
        if own.dirs.len() < self.dirs.len() {
            own.unit = None;
        }
        own
    }

    /// Only what this process has made: what a failed launch takes away again.
    pub fn made_here(&self) -> Cgroup {
        let mut own = self.clone();
        if !self.unit_started {
            own.unit = None;
            own.dirs.retain(|place| self.made.contains(&place.path));
        }
        own
    }

    /// For the record, when it differs from the plan's: a rootless container may have gone
    /// without a cgroup.
    pub fn record(&self) -> CgroupRecord {
        Layout {
            version: self.version,
            dirs: self.dirs.clone(),
            named: true,
        }
        .record()
        .with_unit(self.unit.clone())
    }

    /// The sub-cgroups that `exec --cgroup` asks for: `path` on v2, `controller[,..]:path` on v1.
    /// Hierarchies that are not mentioned keep the container's own cgroup.
    ///
    /// # Errors
    /// An argument has the wrong form, names an unknown controller or leaves the container's
    /// cgroup.
    pub fn exec_subpath(&self, arguments: &[String]) -> Result<Cgroup> {
        let mut out = self.clone();
        out.made.clear();
        let invalid = |argument: &str, why: &str| {
            Err(Error::invalid(format!(
                "invalid --cgroup argument: {argument} ({why})"
            )))
        };
        let mut seen: Vec<&str> = Vec::new();
        for argument in arguments {
            let Some((controllers, path)) = argument.split_once(':') else {
                if arguments.len() != 1 {
                    return invalid(argument, "missing <controller>: prefix");
                }
                for place in &mut out.dirs {
                    place.path = below(place, argument)?;
                }
                continue;
            };
            for controller in controllers.split(',') {
                if controller.is_empty() {
                    return invalid(argument, "empty <controller> prefix");
                }
                if seen.contains(&controller) {
                    return Err(Error::invalid(format!(
                        "invalid --cgroup argument(s): controller {controller} specified multiple \
                         times"
                    )));
                }
                seen.push(controller);
                let place = out
                    .dirs
                    .iter_mut()
                    .find(|place| place.controllers.iter().any(|name| name == controller));
                let Some(place) = place else {
                    return Err(Error::invalid(format!("unknown controller {controller}")));
                };
                place.path = below(place, path)?;
            }
        }
        Ok(out)
    }

    /// The cgroup that a process is in now, where `exec` goes when the container's own cgroup
    /// takes no processes any more (its init moved below to hand out controllers).
    ///
    /// # Errors
    /// The process is gone.
    pub fn of_process(&self, pid: i32) -> Result<Cgroup> {
        let file = format!("/proc/{pid}/cgroup");
        let text =
            std::fs::read_to_string(&file).map_err(|error| Error::system("read", &file, error))?;
        let mode = super::mounts::detect()?;
        let mut out = self.clone();
        out.made.clear();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(key), Some(path)) = (fields.next(), fields.next()) else {
                continue;
            };
            let Some(place) = out.dirs.iter_mut().find(|place| place.key() == key) else {
                continue;
            };
            if let Some(dir) = mode.dir_of(key, Path::new(path)) {
                place.path = dir;
            }
        }
        Ok(out)
    }

    pub fn is_v2(&self) -> bool {
        self.version == 2
    }

    /// Whether systemd keeps the cgroup.
    pub fn has_unit(&self) -> bool {
        self.unit.is_some()
    }

    /// Whether the container has a cgroup at all.
    pub fn is_none(&self) -> bool {
        self.dirs.is_empty()
    }

    /// The directory for `clone3`'s CLONE_INTO_CGROUP: the whole membership on v2, that of the
    /// cgroup2 mount on hybrid hosts, none elsewhere.
    ///
    /// # Errors
    /// The directory is gone.
    pub fn clone_into(&self) -> Result<Option<OwnedFd>> {
        let unified = |place: &&Place| place.controllers.is_empty();
        let Some(place) = self.dirs.iter().find(unified) else {
            return Ok(None);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&place.path, flags, Mode::empty())
            .map(Some)
            .map_err(|errno| cannot_join(&place.path, errno))
    }

    /// Files to each of which the new process writes `0` to join the v1 hierarchies, while it
    /// still has one thread. Empty on v2. See the head of the module for why not `cgroup.procs`.
    ///
    /// # Errors
    /// A directory is gone or cannot be written.
    pub fn self_join(&self) -> Result<Vec<OwnedFd>> {
        let v1 = self
            .dirs
            .iter()
            .filter(|place| !place.controllers.is_empty());
        v1.map(|place| {
            let path = place.path.join("tasks");
            rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|errno| cannot_join(&path, errno))
        })
        .collect()
    }

    /// Moves a process in from outside: one write for each hierarchy, the first of which waits
    /// for an RCU grace period (5 to 15 ms).
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses it.
    pub fn join(&self, pid: i32) -> Result<()> {
        for place in &self.dirs {
            join_one(place, pid)?;
        }
        Ok(())
    }

    /// Writes the plan's limits and the device rules.
    ///
    /// # Errors
    /// The kernel refuses a value or lacks its file: the error names field, value and file.
    pub fn apply_limits(&self, plan: &CgroupPlan) -> Result<()> {
        if self.is_none() {
            let mut limits = plan.limits.iter();
            return limits.try_for_each(|limit| self.check_joined(plan, limit));
        }
        // The plan's own list: its steps number the directories, in an order of their own.
        let dirs = Dirs {
            places: &plan.layout.dirs,
        };
        let mut open: Option<(usize, Dir)> = None;
        for limit in &plan.limits {
            if self.dirs.len() != plan.layout.dirs.len() {
                self.check_joined(plan, limit)?;
            }
            let dir = match open.take() {
                Some((index, dir)) if index == limit.dir => dir,
                _ => dirs.open(limit.dir)?,
            };
            dir.apply(&limit.step)
                .map_err(|error| self.explain(&dir, &limit.step, error))?;
            open = Some((limit.dir, dir));
        }
        match self.apply_devices(plan, &dirs) {
            Err(_) if plan.options.rootless => Ok(()),
            applied => applied,
        }
    }

    /// A rootless container may have gone without some hierarchies.
    fn check_joined(&self, plan: &CgroupPlan, limit: &Limit) -> Result<()> {
        let path = &plan.layout.dirs[limit.dir].path;
        if self.dirs.iter().any(|place| place.path == *path) {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "cannot set {} limit: container could not join or create cgroup",
            limit.name()
        )))
    }

    /// A missing `unified` file is most often a controller that was not handed down.
    fn explain(&self, dir: &Dir, step: &Step, error: Error) -> Error {
        let Step::Lines(write) = step else {
            return error;
        };
        let missing = matches!(
            error.errno().map(Errno::from_raw_os_error),
            Some(Errno::NOENT | Errno::PERM | Errno::ACCESS)
        );
        let controller = write.file.split('.').next().unwrap_or_default();
        let available = dir.read("cgroup.controllers").unwrap_or_default();
        if missing
            && controller != "cgroup"
            && !available
                .split_whitespace()
                .any(|found| found == controller)
        {
            return Error::unsupported(format!(
                "unified resource {:?} can't be set: controller {controller:?} not available",
                write.file
            ));
        }
        error.context(format!("unable to set unified resource {:?}", write.file))
    }

    fn apply_devices(&self, plan: &CgroupPlan, dirs: &Dirs<'_>) -> Result<()> {
        match &plan.devices {
            Devices::Keep => Ok(()),
            Devices::V1 { dir, writes } => {
                match dirs.open(*dir)?.write_all(writes) {
                    // mknod and foreign devices are out of reach in a user namespace anyway.
                    Err(_) if in_user_namespace() => Ok(()),
                    written => written,
                }
            }
            Devices::V2 { program, allow_all } => {
                let Some(place) = self.dirs.first() else {
                    return Ok(());
                };
                let fresh = self.made.contains(&place.path);
                match attach_program(&place.path, program, fresh) {
                    // Nothing to forbid, or no right to forbid it and no need to.
                    Err(_) if *allow_all || in_user_namespace() => Ok(()),
                    attached => attached,
                }
            }
        }
    }

    /// Whether the container was paused. False without a freezer.
    ///
    /// # Errors
    /// The freezer cannot be read.
    pub fn is_frozen(&self) -> Result<bool> {
        let Some(place) = self.freezer() else {
            return Ok(false);
        };
        match Dir::open(&place.path) {
            Ok(dir) => freeze::is_frozen(self.version, &dir),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stops every process of the container, and waits until they have stopped.
    ///
    /// # Errors
    /// There is no freezer, or a process does not freeze; then all are thawed again.
    pub fn freeze(&self) -> Result<()> {
        freeze::freeze(self.version, &self.freezer_dir()?)
    }

    /// Lets the processes run again.
    ///
    /// # Errors
    /// There is no freezer.
    pub fn thaw(&self) -> Result<()> {
        freeze::thaw(self.version, &self.freezer_dir()?)
    }

    fn freezer(&self) -> Option<&Place> {
        self.place_of("freezer")
    }

    fn freezer_dir(&self) -> Result<Dir> {
        let place = self.freezer().ok_or_else(|| {
            Error::unsupported("cannot toggle freezer: cgroups not configured for container")
        })?;
        Dir::open(&place.path)
    }

    /// The directory of a controller; the only one on v2.
    pub(super) fn place_of(&self, controller: &str) -> Option<&Place> {
        if self.version == 2 {
            return self.dirs.first();
        }
        self.dirs
            .iter()
            .find(|place| place.controllers.iter().any(|name| name == controller))
    }

    /// The hierarchy that stands for all when only membership matters: the cgroup2 one on hybrid
    /// hosts, where it has events, else any with a kernel controller.
    pub(super) fn member_place(&self) -> Option<&Place> {
        let unified = self.dirs.iter().find(|place| place.controllers.is_empty());
        unified
            .or_else(|| self.place_of("devices"))
            .or_else(|| self.dirs.first())
    }

    /// The processes of the container, those in sub-cgroups included.
    ///
    /// # Errors
    /// The cgroup cannot be read. One that is gone has no processes.
    pub fn pids(&self) -> Result<Vec<i32>> {
        // v1 lists from a hierarchy that the container itself cannot have rearranged.
        let place = match self.version {
            2 => self.dirs.first(),
            _ => self.place_of("devices").or_else(|| self.member_place()),
        };
        place.map_or(Ok(Vec::new()), |place| remove::processes_below(&place.path))
    }

    /// Kills every process in the cgroup and below it.
    ///
    /// # Errors
    /// A process cannot be signalled, or processes keep appearing.
    pub fn kill_all(&self) -> Result<()> {
        remove::kill_all(self)
    }

    /// Stops the unit, and removes the container's directories and those below, waiting for dying
    /// processes to leave. What is gone already is fine.
    ///
    /// # Errors
    /// A directory stays busy, or the unit does not stop.
    pub fn delete(&self) -> Result<()> {
        let stopped = self.stop_unit();
        self.delete_dirs()?;
        stopped
    }

    pub(super) fn delete_dirs(&self) -> Result<()> {
        remove::delete(self)
    }

    /// Times the OOM killer struck in this cgroup.
    ///
    /// # Errors
    /// The counter cannot be read. Without a memory controller there were none.
    pub fn oom_kills(&self) -> Result<u64> {
        super::stats::oom_kills(self)
    }
}

pub(super) fn is_gone(error: &Error) -> bool {
    matches!(
        error.errno().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NODEV)
    )
}

/// A directory at or below the container's own.
fn below(place: &Place, path: &str) -> Result<PathBuf> {
    let below = sub_path(path)?;
    // Joining an empty path would add a slash.
    Ok(if below.as_os_str().is_empty() {
        place.path.clone()
    } else {
        place.path.join(below)
    })
}

fn sub_path(path: &str) -> Result<PathBuf> {
    let mut out = PathBuf::new();
    for name in path
        .split('/')
        .filter(|name| !name.is_empty() && *name != ".")
    {
        if name == ".." && !out.pop() {
            return Err(Error::new(Kind::Invalid, "bad sub cgroup path:", path));
        }
        if name != ".." {
            out.push(name);
        }
    }
    Ok(out)
}

/// The words that callers of `exec --cgroup` look for.
fn cannot_join(path: &Path, errno: Errno) -> Error {
    Error::system("open", path.display().to_string(), errno).context("error adding pid to cgroups")
}

pub(super) fn join_one(place: &Place, pid: i32) -> Result<()> {
    let path = place.path.join("cgroup.procs");
    let failed =
        |errno: Errno| Error::system(format!("write {pid} to"), path.display().to_string(), errno);
    let fd =
        rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let text = pid.to_string();
    // EINVAL is a process that fork has not finished yet (TASK_NEW); it will have soon.
    for _ in 0..5 {
        match rustix::io::write(fd.as_fd(), text.as_bytes()) {
            Ok(_) => return Ok(()),
            Err(Errno::INVAL) => std::thread::sleep(std::time::Duration::from_millis(1)),
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(failed(Errno::INVAL))
}

fn attach_program(path: &Path, program: &[u64], fresh: bool) -> Result<()> {
    let failed = |call: &'static str, error: std::io::Error| {
        let subject = path.display().to_string();
        Error::system(format!("linux.resources.devices: {call}"), subject, error)
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| failed("open cgroup", errno.into()))?;
    let loaded = coracle_sys::bpf::load_device_program(program)
        .map_err(|error| failed("bpf(BPF_PROG_LOAD) for", error))?;
    let mut old = Vec::new();
    if !fresh {
        let ids = coracle_sys::bpf::device_programs(&dir)
            .map_err(|error| failed("bpf(BPF_PROG_QUERY)", error))?;
        old.extend(
            ids.into_iter()
                .filter_map(|id| coracle_sys::bpf::program_by_id(id).ok()),
        );
    }
    let replace = if old.len() == 1 { old.pop() } else { None };
    coracle_sys::bpf::attach_device_program(&dir, &loaded, replace.as_ref())
        .map_err(|error| failed("bpf(BPF_PROG_ATTACH)", error))?;
    for program in &old {
        coracle_sys::bpf::detach_device_program(&dir, program)
            .map_err(|error| failed("bpf(BPF_PROG_DETACH)", error))?;
    }
    Ok(())
}

fn in_user_namespace() -> bool {
    // The initial user namespace maps everything onto itself.
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| !map.split_whitespace().eq(["0", "0", "4294967295"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1() -> Cgroup {
        let paths = [
            ("cpu,cpuacct", "/c/cpu/x"),
            ("memory", "/c/memory/x"),
            ("", "/c/unified/x"),
        ]
        .map(|(key, path)| (key.to_owned(), PathBuf::from(path)));
        Cgroup::open(&CgroupRecord::V1 {
            paths: paths.into(),
            unit: None,
        })
    }

    fn v2() -> Cgroup {
        Cgroup::open(&CgroupRecord::V2 {
            path: "/c/x".into(),
            unit: None,
        })
    }

    fn paths(cgroup: &Cgroup) -> Vec<&str> {
        cgroup
            .dirs
            .iter()
            .map(|place| place.path.to_str().unwrap())
            .collect()
    }

    #[test]
    fn exec_subpath_table() {
        type Case<'a> = (
            Cgroup,
            &'a [&'a str],
            std::result::Result<&'a [&'a str], &'a str>,
        );
        let cases: &[Case<'_>] = &[
            (v2(), &["a/b"], Ok(&["/c/x/a/b"])),
            (v2(), &["/"], Ok(&["/c/x"])),
            (v2(), &["/a/../b"], Ok(&["/c/x/b"])),
            (v2(), &["../y"], Err("bad sub cgroup path")),
            (v2(), &["a/../../y"], Err("bad sub cgroup path")),
            (v2(), &["memory:a"], Err("unknown controller memory")),
            (
                v1(),
                &["memory:a"],
                Ok(&["/c/unified/x", "/c/cpu/x", "/c/memory/x/a"]),
            ),
            (
                v1(),
                &["cpu:b", "memory:a"],
                Ok(&["/c/unified/x", "/c/cpu/x/b", "/c/memory/x/a"]),
            ),
            (
                v1(),
                &["memory:a", "memory:b"],
                Err("specified multiple times"),
            ),
            (v1(), &[":a"], Err("empty <controller> prefix")),
            (v1(), &["a", "b"], Err("missing <controller>: prefix")),
        ];
        for (cgroup, arguments, want) in cases {
            let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
            match (cgroup.exec_subpath(&arguments), want) {
                (Ok(found), Ok(want)) => assert_eq!(paths(&found), *want, "{arguments:?}"),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
                (found, want) => panic!("{arguments:?}: {found:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn record_round_trip() {
        for cgroup in [v1(), v2(), Cgroup::open(&CgroupRecord::None)] {
            assert_eq!(paths(&Cgroup::open(&cgroup.record())), paths(&cgroup));
        }
    }
}
