//! `linux.intelRdt`: the container's group in the resctrl filesystem, which shares out cache ways
//! and memory bandwidth, and its monitoring group.
//!
//! Owns the groups' directories and files. Never mounts resctrl: that is the administrator's.

mod stats;

use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::ResctrlRecord;
use coracle_oci::spec::{Linux, LinuxIntelRdt};
use rustix::fs::CWD;
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};

pub use stats::Stats;

const NOT_ENABLED: &str = "intelRdt is specified in config, but Intel RDT is not enabled";
const MOUNTPOINT: &str = "/sys/fs/resctrl";
/// include/uapi/linux/magic.h: RDTGROUP_SUPER_MAGIC
const MAGIC: rustix::fs::FsWord = 0x0765_5821;

/// What a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resctrl {
    root: PathBuf,
    record: ResctrlRecord,
    /// Lines for the group's `schemata` file, empty for none.
    schemata: String,
    /// The config names a group and nothing to set: somebody else has made it.
    must_exist: bool,
}

impl Resctrl {
    /// Plans the group of a container whose config asks for one.
    ///
    /// # Errors
    /// The host has no resctrl, or lacks what is asked of it.
    pub fn plan(linux: Option<&Linux>, id: &ContainerId) -> Result<Option<Self>> {
        let Some(rdt) = linux.and_then(|linux| linux.intel_rdt().as_ref()) else {
            return Ok(None);
        };
        let root = mountpoint().ok_or_else(|| Error::unsupported(NOT_ENABLED))?;
        Self::plan_in(root, rdt, id).map(Some)
    }

    fn plan_in(root: PathBuf, rdt: &LinuxIntelRdt, id: &ContainerId) -> Result<Self> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let clos = given(rdt.clos_id());
        if let Some(clos) = &clos
            && (matches!(clos.as_str(), "." | "..")
                || (clos.len() > 1 && clos.contains('/'))
                || clos.contains('\0'))
        {
            return Err(Error::invalid(format!("invalid intelRdt.ClosID {clos:?}")));
        }
        let (l3, bandwidth) = (given(rdt.l3_cache_schema()), given(rdt.mem_bw_schema()));
        for (asked, resource, field, name) in [
            (&l3, "L3", "l3CacheSchema", "CAT"),
            (&bandwidth, "MB", "memBwSchema", "MBA"),
        ] {
            if asked.is_some() && !root.join("info").join(resource).exists() {
                return Err(Error::unsupported(format!(
                    "intelRdt.{field} is specified in config, but Intel RDT/{name} is not enabled"
                )));
            }
        }
        let more = rdt.schemata().clone().unwrap_or_default();
        let lines = l3.into_iter().chain(bandwidth).chain(more);
        let lines = lines.filter(|line| !line.is_empty());
        let schemata: String = lines.map(|line| line + "\n").collect();
        let group = match clos.as_deref() {
            // The default group.
            Some("/") => root.clone(),
            Some(name) => root.join(name),
            None => root.join(id.as_str()),
        };
        let monitored = rdt.enable_monitoring().unwrap_or(false);
        Ok(Self {
            must_exist: clos.is_some() && schemata.is_empty(),
            record: ResctrlRecord {
                monitor: monitored.then(|| group.join("mon_groups").join(id.as_str())),
                // A group with a name of its own is shared, and whoever named it removes it.
                owned: clos.is_none() && !group.exists(),
                group,
            },
            schemata,
            root,
        })
    }

    pub fn record(&self) -> &ResctrlRecord {
        &self.record
    }

    /// Makes the groups, sets the shares and puts the process there.
    ///
    /// # Errors
    /// With the kernel's own explanation, where it gives one.
    pub fn apply(&self, pid: i32) -> Result<()> {
        self.steps(pid).map_err(|error| {
            let error = match last_status(&self.root) {
                Some(status) => Error::new(
                    error.kind(),
                    format!("{error:#}, last_cmd_status: {status}"),
                    "",
                ),
                None => error,
            };
            error.context("unable to apply Intel RDT configuration")
        })
    }

    fn steps(&self, pid: i32) -> Result<()> {
        let group = &self.record.group;
        if self.must_exist && !group.exists() {
            return Err(Error::new(
                Kind::NotFound,
                "clos dir not accessible (must be pre-created when schemata, l3CacheSchema and \
                 memBwSchema are empty): stat",
                group.display().to_string(),
            )
            .source(Errno::NOENT));
        }
        make(group)?;
        if !self.schemata.is_empty() {
            write(&group.join("schemata"), &self.schemata)?;
        }
        if let Some(monitor) = &self.record.monitor {
            make(monitor)?;
        }
        join(&self.record, pid)
    }
}

/// Puts one more process of a container into its groups.
///
/// # Errors
/// The kernel refuses; a group that is gone has nothing to join.
pub fn join(record: &ResctrlRecord, pid: i32) -> Result<()> {
    // The control group first: joining one leaves the monitoring groups of another.
    let groups = std::iter::once(&record.group).chain(&record.monitor);
    for group in groups.filter(|group| group.exists()) {
        write(&group.join("tasks"), &pid.to_string())?;
    }
    Ok(())
}

/// New shares for a container that runs: `update --l3-cache-schema`, `--mem-bw-schema`.
#[derive(Debug)]
pub struct Update<'a> {
    group: Option<&'a Path>,
    schemata: String,
}

impl<'a> Update<'a> {
    /// Checks what is asked.
    ///
    /// # Errors
    /// The host cannot do it, or the container has no group.
    pub fn check(
        record: Option<&'a ResctrlRecord>,
        l3: Option<&str>,
        bandwidth: Option<&str>,
    ) -> Result<Self> {
        let root = match (l3, bandwidth) {
            (None, None) => None,
            _ => mountpoint(),
        };
        let enabled = |resource: &str| {
            let root = root.as_ref();
            root.is_some_and(|root| root.join("info").join(resource).exists())
        };
        let refuse = |text: &'static str| Err(Error::unsupported(text));
        if l3.is_some() && !enabled("L3") {
            return refuse("Intel RDT/CAT: l3 cache schema is not enabled");
        }
        if bandwidth.is_some() && !enabled("MB") {
            return refuse("Intel RDT/MBA: memory bandwidth schema is not enabled");
        }
        let lines = l3.into_iter().chain(bandwidth);
        let schemata: String = lines.map(|line| format!("{line}\n")).collect();
        if !schemata.is_empty() && record.is_none() {
            return refuse("updating a non-existent Intel RDT configuration is not supported");
        }
        Ok(Self {
            group: record.map(|record| record.group.as_path()),
            schemata,
        })
    }

    /// Sets the shares, if any are asked for.
    ///
    /// # Errors
    /// The kernel refuses them.
    pub fn apply(&self) -> Result<()> {
        match self.group {
            Some(group) if !self.schemata.is_empty() => {
                write(&group.join("schemata"), &self.schemata)
            }
            _ => Ok(()),
        }
    }
}

/// Removes what was made for the container, and nothing that it only used.
///
/// # Errors
/// The kernel refuses.
pub fn remove(record: &ResctrlRecord) -> Result<()> {
    // The kernel removes monitoring groups with their control group.
    let directory = if record.owned {
        Some(&record.group)
    } else {
        record.monitor.as_ref()
    };
    let Some(directory) = directory else {
        return Ok(());
    };
    match rustix::fs::unlinkat(CWD, directory, rustix::fs::AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::system(
            "rmdir",
            directory.display().to_string(),
            error,
        )),
    }
}

fn make(directory: &Path) -> Result<()> {
    match rustix::fs::mkdir(directory, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(Error::system(
            "mkdir",
            directory.display().to_string(),
            error,
        )),
    }
}

/// One write: the kernel takes or refuses it as a whole.
fn write(file: &Path, text: &str) -> Result<()> {
    let fail = |error| {
        let what = format!("intelrdt: unable to write {text:?} to");
        Error::system(what, file.display().to_string(), error)
    };
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(file, flags, rustix::fs::Mode::empty()).map_err(fail)?;
    rustix::io::write(&file, text.as_bytes())
        .map(drop)
        .map_err(fail)
}

fn last_status(root: &Path) -> Option<String> {
    let text = std::fs::read_to_string(root.join("info/last_cmd_status")).ok()?;
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
}

/// Where resctrl is mounted.
fn mountpoint() -> Option<PathBuf> {
    match rustix::fs::statfs(MOUNTPOINT) {
        Ok(found) if found.f_type == MAGIC => return Some(MOUNTPOINT.into()),
        // The kernel makes this directory where there is anything to mount.
        Err(_) => return None,
        Ok(_) => {}
    }
    find_mount(&std::fs::read_to_string("/proc/self/mountinfo").ok()?)
}

fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let resctrl = filesystem.split(' ').next() == Some("resctrl");
        let point = mount.split(' ').nth(4).filter(|_| resctrl)?;
        Some(PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A directory with the files that the tests' groups would have.
    fn fake() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in ["info/L3", "info/MB", "mon_groups"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        std::fs::write(root.path().join("info/last_cmd_status"), "ok\n").unwrap();
        root
    }

    fn files(group: &Path) {
        std::fs::create_dir_all(group).unwrap();
        for file in ["tasks", "schemata"] {
            std::fs::write(group.join(file), "").unwrap();
        }
    }

    fn plan(root: &Path, rdt: Value) -> Result<Resctrl> {
        let rdt: LinuxIntelRdt = serde_json::from_value(rdt).unwrap();
        Resctrl::plan_in(root.to_owned(), &rdt, &ContainerId::parse("c1").unwrap())
    }

    #[test]
    fn group_is_the_closs_or_the_containers_own() {
        let root = fake();
        let root = root.path();
        std::fs::create_dir(root.join("gold")).unwrap();
        let cases = [
            (json!({}), root.join("c1"), true),
            (json!({"closID": "gold"}), root.join("gold"), false),
            (
                json!({"closID": "new", "schemata": ["MB:0=10"]}),
                root.join("new"),
                false,
            ),
            (json!({"closID": "/"}), root.to_owned(), false),
        ];
        for (rdt, group, owned) in cases {
            let planned = plan(root, rdt.clone()).unwrap();
            assert_eq!(planned.record.group, group, "{rdt}");
            assert_eq!(planned.record.owned, owned, "{rdt}");
            assert_eq!(planned.record.monitor, None);
        }
        let monitored = plan(root, json!({"closID": "gold", "enableMonitoring": true})).unwrap();
        let monitor = root.join("gold/mon_groups/c1");
        assert_eq!(monitored.record.monitor, Some(monitor));
    }

    #[test]
    fn refusals_are_runcs() {
        let root = fake();
        std::fs::remove_dir(root.path().join("info/MB")).unwrap();
        std::fs::remove_dir(root.path().join("info/L3")).unwrap();
        for (rdt, want) in [
            (json!({"closID": ".."}), "invalid intelRdt.ClosID \"..\""),
            (json!({"closID": "a/b"}), "invalid intelRdt.ClosID \"a/b\""),
            (
                json!({"l3CacheSchema": "L3:0=f"}),
                "intelRdt.l3CacheSchema is specified in config, but Intel RDT/CAT is not enabled",
            ),
            (
                json!({"memBwSchema": "MB:0=10"}),
                "intelRdt.memBwSchema is specified in config, but Intel RDT/MBA is not enabled",
            ),
        ] {
            let error = plan(root.path(), rdt).unwrap_err();
            assert_eq!(error.to_string(), want);
        }
        let missing = plan(root.path(), json!({"closID": "gold"})).unwrap();
        let error = format!("{:#}", missing.apply(1).unwrap_err());
        assert!(
            error.contains("clos dir not accessible (must be pre-created"),
            "{error}"
        );
        assert!(error.ends_with("last_cmd_status: ok"), "{error}");
    }

    #[test]
    fn process_joins_the_groups_and_the_shares_are_written_at_once() {
        let root = fake();
        let planned = plan(
            root.path(),
            json!({"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20",
                "schemata": ["L2:0=1", "", "SMBA:0=64"], "enableMonitoring": true}),
        )
        .unwrap();
        let (group, monitor) = (root.path().join("c1"), root.path().join("c1/mon_groups/c1"));
        files(&group);
        files(&monitor);
        planned.apply(42).unwrap();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        assert_eq!(
            read(group.join("schemata")),
            "L3:0=f\nMB:0=20\nL2:0=1\nSMBA:0=64\n"
        );
        assert_eq!(read(group.join("tasks")), "42");
        assert_eq!(read(monitor.join("tasks")), "42");
        join(planned.record(), 43).unwrap();
        assert!(read(monitor.join("tasks")).starts_with("43"));
    }

    #[test]
    fn update_without_resctrl_is_refused() {
        Update::check(None, None, None).unwrap().apply().unwrap();
        if mountpoint().is_none() {
            let error = Update::check(None, Some("L3:0=f"), None).unwrap_err();
            assert_eq!(
                error.to_string(),
                "Intel RDT/CAT: l3 cache schema is not enabled"
            );
        }
        let root = fake();
        let group = root.path().join("g");
        files(&group);
        let update = Update {
            group: Some(&group),
            schemata: "MB:0=30\n".to_owned(),
        };
        update.apply().unwrap();
        let written = std::fs::read_to_string(group.join("schemata")).unwrap();
        assert_eq!(written, "MB:0=30\n");
    }

    #[test]
    fn only_own_groups_are_removed() {
        let root = fake();
        let own = plan(root.path(), json!({})).unwrap();
        std::fs::create_dir(&own.record.group).unwrap();
        remove(own.record()).unwrap();
        assert!(!own.record.group.exists());
        remove(own.record()).unwrap();

        let gold = root.path().join("gold");
        std::fs::create_dir_all(gold.join("mon_groups/c1")).unwrap();
        let shared = json!({"closID": "gold", "enableMonitoring": true});
        let shared = plan(root.path(), shared).unwrap();
        remove(shared.record()).unwrap();
        assert!(gold.exists() && !gold.join("mon_groups/c1").exists());
    }

    #[test]
    fn mount_elsewhere_is_found() {
        let mountinfo = "22 27 0:21 / /sys rw shared:7 - sysfs sysfs rw\n\
            90 22 0:40 / /mnt/res\\040ctrl rw,relatime - resctrl none rw,cdp\n";
        assert_eq!(find_mount(mountinfo), Some("/mnt/res ctrl".into()));
        assert_eq!(
            find_mount("22 27 0:21 / /resctrl rw - tmpfs resctrl rw\n"),
            None
        );
    }
}
