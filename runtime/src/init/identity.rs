//! Who the program is and what it may do: scheduling, capabilities, ids, directory, and last the
//! seccomp filter. Used by the init of a container and by exec alike.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use coracle_sys::{exec, process as sys};
use rustix::fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Error, Kind, Result};
use crate::launch::channel::Channel;
use crate::plan::ProcessPlan;
use crate::plan::process::CapabilityMasks;
use crate::plan::sets::IdSet;

/// The files by which a process tells the security modules its labels.
#[derive(Debug, Default)]
pub struct LabelFiles {
    selinux: Option<OwnedFd>,
    apparmor: Option<OwnedFd>,
    /// The SELinux label of the keys that the process makes.
    keys: Option<OwnedFd>,
}

/// The host's /proc, if the plan has labels to write. What stands in its place in a container is
/// the container's word: a label written there may end up anywhere (CVE-2019-16884, CVE-2019-19921).
pub fn host_proc(plan: &ProcessPlan) -> Result<Option<OwnedFd>> {
    if plan.selinux_label.is_none() && plan.apparmor_profile.is_none() {
        return Ok(None);
    }
    let fail = |error: Errno| Error::system("open", "/proc", error);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(fail)?;
    let found = rustix::fs::fstatfs(&proc).map_err(fail)?;
    if found.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Err(Error::new(Kind::System, "/proc is no proc filesystem", ""));
    }
    Ok(Some(proc))
}

/// A file of the calling thread in that /proc, and none that is mounted over it.
fn open_attribute(proc: &OwnedFd, name: &str) -> std::result::Result<OwnedFd, Errno> {
    let path = format!("thread-self/attr/{name}");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(proc, &path, flags, Mode::empty(), resolve) {
        // Linux before 5.6, or a sandbox that hides the call.
        Err(Errno::NOSYS | Errno::PERM) => {
            let file = rustix::fs::openat(proc, &path, flags, Mode::empty())?;
            match rustix::fs::fstatfs(&file)?.f_type {
                rustix::fs::PROC_SUPER_MAGIC => Ok(file),
                _ => Err(Errno::XDEV),
            }
        }
        opened => opened,
    }
}

impl LabelFiles {
    /// Opens the files that the plan will write; `proc` is what [`host_proc`] gave. They belong to
    /// the process that opens them.
    pub fn open(plan: &ProcessPlan, proc: Option<&OwnedFd>) -> Result<Self> {
        let Some(proc) = proc else {
            return Ok(Self::default());
        };
        let named = |name: &str| {
            open_attribute(proc, name).map_err(|error| {
                Error::system("open", format!("/proc/thread-self/attr/{name}"), error)
            })
        };
        let selinux = plan.selinux_label.is_some();
        let apparmor = || match open_attribute(proc, "apparmor/exec") {
            // Before Linux 5.8 the modules share one file.
            Err(Errno::NOENT) => named("exec"),
            opened => opened.map_err(|error| {
                Error::system("open", "/proc/thread-self/attr/apparmor/exec", error)
            }),
        };
        Ok(Self {
            selinux: selinux.then(|| named("exec")).transpose()?,
            keys: selinux.then(|| named("keycreate")).transpose()?,
            apparmor: plan
                .apparmor_profile
                .as_ref()
                .map(|_| apparmor())
                .transpose()?,
        })
    }

    /// What `make` makes are keys with the process's label: the program could not use others.
    pub fn with_key_label<T>(
        &self,
        plan: &ProcessPlan,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let (Some(file), Some(label)) = (&self.keys, &plan.selinux_label) else {
            return make();
        };
        let set = |label: &[u8]| {
            rustix::io::write(file, label)
                .map(drop)
                .map_err(|error| Error::system("unable to set the label of keys", "", error))
        };
        set(label)?;
        let made = make()?;
        set(&[])?;
        Ok(made)
    }

    fn fds(&self) -> impl Iterator<Item = RawFd> {
        let files = self.selinux.iter().chain(&self.apparmor).chain(&self.keys);
        files.map(std::os::fd::AsRawFd::as_raw_fd)
    }

    fn write(&self, plan: &ProcessPlan) -> Result<()> {
        for (file, label, what) in [
            (&self.selinux, &plan.selinux_label, "selinux label"),
            (&self.apparmor, &plan.apparmor_profile, "apparmor profile"),
        ] {
            if let (Some(file), Some(label)) = (file, label) {
                rustix::io::write(file, label).map_err(|error| {
                    Error::system(
                        format!("unable to apply {what}"),
                        String::from_utf8_lossy(label),
                        error,
                    )
                })?;
            }
        }
        Ok(())
    }
}

/// Takes on the identity. On return only [`load_filter`] and exec are left.
pub fn apply(plan: &ProcessPlan, labels: &LabelFiles, channel: &Channel) -> Result<()> {
    if let Some(persona) = plan.personality {
        sys::set_personality(persona)
            .map_err(|error| Error::system("personality", format!("{persona:#x}"), error))?;
    }
    if let Some(policy) = &plan.memory_policy {
        sys::set_memory_policy(policy.mode, policy.nodes.words())
            .map_err(|error| Error::system("set_mempolicy", "", error))?;
    }
    if let Some(attributes) = &plan.scheduler {
        sys::set_scheduler(attributes).map_err(|error| refused_scheduler(plan, error))?;
    }
    if let Some((class, priority)) = plan.io_priority {
        sys::set_io_priority(class, priority)
            .map_err(|error| Error::system("failed to set io priority", "", error))?;
    }
    match (&plan.initial_affinity, &plan.final_affinity) {
        (_, Some(cpus)) => set_affinity(cpus)?,
        (Some(_), None) => {}
        (None, None) => reset_affinity(),
    }
    labels.write(plan)?;
    if plan.no_new_privileges {
        rustix::thread::set_no_new_privs(true)
            .map_err(|error| Error::system("prctl(PR_SET_NO_NEW_PRIVS)", "", error))?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is about to go.
        load_filter(plan, channel)?;
    }
    drop_bounding(plan.capabilities.bounding)?;
    stdio_to(plan.uid)?;
    // A directory that only root may enter is reached now; one that only the user may enter, on a
    // network file system say, below.
    let there = rustix::process::chdir(&plan.cwd).is_ok();
    // The capabilities survive the change of ids, and are cut to the wanted ones after it.
    rustix::thread::set_keep_capabilities(true)
        .map_err(|error| Error::system("prctl(PR_SET_KEEPCAPS)", "", error))?;
    set_ids(plan)?;
    super::hide()?;
    rustix::process::umask(Mode::from_raw_mode(plan.umask.unwrap_or(0o022)));
    change_directory(plan, there)?;
    set_capabilities(&plan.capabilities)
}

fn refused_scheduler(plan: &ProcessPlan, error: std::io::Error) -> Error {
    if plan.has_cpuset && error.raw_os_error() == Some(libc::EPERM) {
        return Error::invalid("process scheduler can't be used together with AllowedCPUs");
    }
    Error::system("error setting scheduler", "", error)
}

pub fn set_affinity(cpus: &IdSet) -> Result<()> {
    sys::set_affinity(cpus.words())
        .map_err(|error| Error::system("sched_setaffinity", cpus.to_string(), error))
}

/// All processors that the cpuset allows, whatever the caller of the runtime keeps to. A sandbox
/// that refuses this leaves the caller's choice in force.
fn reset_affinity() {
    // As many as the kernel can be built for (CONFIG_NR_CPUS).
    let _ = sys::set_affinity(&[libc::c_ulong::MAX; 8192 / libc::c_ulong::BITS as usize]);
}

/// Loads the filter now that no_new_privs is on; the plan without it has loaded it before.
pub fn load_filter_late(plan: &ProcessPlan, channel: &Channel) -> Result<()> {
    if plan.no_new_privileges {
        load_filter(plan, channel)
    } else {
        Ok(())
    }
}

fn load_filter(plan: &ProcessPlan, channel: &Channel) -> Result<()> {
    let Some(filter) = &plan.seccomp else {
        return Ok(());
    };
    let listener = coracle_sys::seccomp::set_filter(&filter.program, filter.flags)
        .map_err(|error| Error::system("unable to init seccomp", "", error))?;
    match listener {
        Some(listener) => channel.report_listener(listener.as_fd()),
        None => Ok(()),
    }
}

/// Drops what is not wanted from the bounding set.
fn drop_bounding(wanted: u64) -> Result<()> {
    for number in 0..64 {
        let bit = 1u64 << number;
        if wanted & bit != 0 {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
            bit,
        )) {
            Ok(()) => {}
            // The first number beyond the kernel's last capability.
            Err(Errno::INVAL) => break,
            // An exec in a user namespace joined without CAP_SETPCAP has nothing to drop.
            Err(error) => {
                return Err(Error::system(
                    "prctl(PR_CAPBSET_DROP)",
                    number.to_string(),
                    error,
                ));
            }
        }
    }
    Ok(())
}

/// Lets the program's user reopen its own stdio through /proc/self/fd.
fn stdio_to(uid: u32) -> Result<()> {
    if uid == 0 {
        return Ok(());
    }
    let stdio = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for file in stdio {
        let Ok(stat) = rustix::fs::fstat(file) else {
            continue;
        };
        let null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3);
        if stat.st_uid == uid || null {
            continue;
        }
        match rustix::fs::fchown(file, Some(Uid::from_raw(uid)), None) {
            // Sockets without an inode of their own, read-only mounts, ids that are not mapped.
            Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS | Errno::ACCESS) => {}
            Err(error) => return Err(Error::system("fchown", "stdio", error)),
        }
    }
    Ok(())
}

fn set_ids(plan: &ProcessPlan) -> Result<()> {
    if plan.setgroups {
        let groups: Vec<Gid> = plan.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        match rustix::thread::set_thread_groups(&groups) {
            Err(Errno::PERM) if plan.joined_user && groups.is_empty() => {}
            set => set
                .map_err(|error| Error::system("setgroups", format!("{:?}", plan.groups), error))?,
        }
    } else if !plan.groups.is_empty() {
        return Err(Error::unsupported(
            "cannot set any additional groups in a rootless container",
        ));
    }
    let gid = Gid::from_raw(plan.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(|error| unmapped("gid", plan.gid, error))?;
    let uid = Uid::from_raw(plan.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .map_err(|error| unmapped("uid", plan.uid, error))
}

fn unmapped(what: &str, id: u32, error: Errno) -> Error {
    match error {
        Errno::INVAL => Error::invalid(format!(
            "cannot set {what} to unmapped user in user namespace: {id}"
        )),
        error => Error::system(format!("setres{what}"), id.to_string(), error),
    }
}

/// Is in the program's directory, as its user if root could not get there, and makes sure that it is one of the
/// container's: an fd that leaked could otherwise name a host directory (CVE-2024-21626).
fn change_directory(plan: &ProcessPlan, there: bool) -> Result<()> {
    let name = || plan.cwd.to_string_lossy().into_owned();
    if !there {
        rustix::process::chdir(&plan.cwd).map_err(|error| {
            let subject = format!("({:?}) set in config.json failed", name());
            Error::system("chdir to cwd", subject, error)
        })?;
    }
    let verify = |ok: bool| {
        if ok {
            return Ok(());
        }
        Err(Error::invalid(
            "current working directory is outside of container mount namespace root -- possible container breakout detected",
        ))
    };
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) => verify(path.as_bytes().first() == Some(&b'/')),
        Err(Errno::NOENT) => verify(false),
        Err(error) => Err(Error::system("getcwd", name(), error)),
    }
}

fn set_capabilities(masks: &CapabilityMasks) -> Result<()> {
    let set = CapabilitySet::from_bits_retain;
    // What this process does not hold cannot be given: runc's and the spec's "ignore".
    let held = rustix::thread::capabilities(None)
        .map_err(|error| Error::system("capget", "", error))?
        .permitted
        .bits();
    let permitted = masks.permitted & held;
    let sets = CapabilitySets {
        effective: set(masks.effective & permitted),
        permitted: set(permitted),
        inheritable: set(masks.inheritable & held & masks.bounding),
    };
    rustix::thread::set_capabilities(None, sets)
        .map_err(|error| Error::system("capset", "", error))?;
    rustix::thread::clear_ambient_capability_set()
        .or_else(|error| {
            if error == Errno::INVAL {
                Ok(())
            } else {
                Err(error)
            }
        })
        .map_err(|error| Error::system("prctl(PR_CAP_AMBIENT_CLEAR_ALL)", "", error))?;
    // The kernel holds ambient within permitted and inheritable.
    let ambient = masks.ambient & permitted & masks.inheritable & masks.bounding;
    for number in 0..64 {
        let bit = 1u64 << number;
        if ambient & bit != 0 {
            rustix::thread::configure_capability_in_ambient_set(set(bit), true).map_err(
                |error| Error::system("prctl(PR_CAP_AMBIENT_RAISE)", number.to_string(), error),
            )?;
        }
    }
    Ok(())
}

/// Everything above stdio closes at exec but for what the caller passed down.
pub fn close_others(plan: &ProcessPlan) -> Result<()> {
    for fd in 3..plan.first_closed_fd {
        exec::keep_over_exec(fd)
            .map_err(|error| Error::system("unable to preserve fd", fd.to_string(), error))?;
    }
    exec::close_on_exec_from(plan.first_closed_fd)
        .map_err(|error| Error::system("close_range(CLOSE_RANGE_CLOEXEC)", "", error))
}

/// Closes what the runtime was started with and has not been told to pass on: an init that waits
/// for `start` would hold it open for as long. Of what was opened since, only `kept` is needed.
pub fn close_inherited(plan: &ProcessPlan, labels: &LabelFiles, kept: &[RawFd]) -> Result<()> {
    let mut kept: Vec<RawFd> = kept.iter().copied().chain(labels.fds()).collect();
    kept.sort_unstable();
    exec::close_all_but(plan.first_closed_fd, &kept)
        .map_err(|error| Error::system("close_range", "", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::LaunchOptions;
    use serde_json::json;

    #[test]
    fn labels_are_the_calling_threads_and_only_where_asked() {
        let plan = |members: serde_json::Value| {
            let mut process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["x"]});
            for (name, value) in members.as_object().unwrap() {
                process[name] = value.clone();
            }
            let process = serde_json::from_value(process).unwrap();
            ProcessPlan::new(&process, None, &LaunchOptions::default()).unwrap()
        };
        let none = plan(json!({}));
        assert!(host_proc(&none).unwrap().is_none());
        let files = LabelFiles::open(&none, None).unwrap();
        assert_eq!(files.fds().count(), 0);
        files.write(&none).unwrap();
        files.with_key_label(&none, || Ok(())).unwrap();

        // Kernels without security modules have no such files.
        if !std::path::Path::new("/proc/thread-self/attr/exec").exists() {
            return;
        }
        let both = plan(json!({"selinuxLabel": "u:r:t:s0", "apparmorProfile": "p"}));
        let proc = host_proc(&both).unwrap();
        let files = LabelFiles::open(&both, proc.as_ref()).unwrap();
        assert_eq!(files.fds().count(), 3);
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        for fd in files.fds() {
            let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
            let path = path.to_string_lossy().into_owned();
            assert!(path.contains(&format!("/task/{thread}/attr/")), "{path}");
        }
        // Another thread's files are not this one's to write: a label never goes astray.
        let moved = std::thread::spawn(move || {
            let same = plan(json!({"selinuxLabel": "u:r:t:s0", "apparmorProfile": "p"}));
            files.write(&same).unwrap_err().to_string()
        });
        let error = moved.join().unwrap();
        assert!(
            error.starts_with("unable to apply selinux label"),
            "{error}"
        );
    }
}
