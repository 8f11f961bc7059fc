//! The program of a container or of an exec: identity, rights and limits as system calls take
//! them. Pure.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;

use coracle_oci::spec::{
    Capability, IOPriorityClass, Linux, LinuxCapabilities, LinuxPersonalityDomain,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process, Scheduler,
};
use coracle_sys::exec::CStringArray;
use coracle_sys::process::SchedulerAttributes;

use super::memory_policy::MemoryPolicy;
use super::sets::IdSet;
use super::{LaunchOptions, c_string};
use crate::error::{Error, Result};
use crate::seccomp::Compiled;

/// The five capability sets as kernel bit masks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityMasks {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

/// One process of a container.
#[derive(Debug)]
pub struct ProcessPlan {
    pub args: CStringArray,
    pub env: CStringArray,
    /// $PATH of that env, for the search of args[0].
    pub search_path: Vec<u8>,
    /// The env has no HOME: it comes from the container's passwd.
    pub needs_home: bool,
    pub cwd: CString,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub setgroups: bool,
    /// The user namespace is another's, who may have given up setgroups(2).
    pub joined_user: bool,
    pub umask: Option<u32>,
    pub capabilities: CapabilityMasks,
    pub no_new_privileges: bool,
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    pub oom_score_adj: Option<i32>,
    pub scheduler: Option<SchedulerAttributes>,
    /// The container is kept to some processors, which rules out some schedulers.
    pub has_cpuset: bool,
    /// Class and priority.
    pub io_priority: Option<(u32, u32)>,
    pub personality: Option<u32>,
    pub memory_policy: Option<MemoryPolicy>,
    /// What is written to /proc/self/attr/exec, or its AppArmor twin.
    pub selinux_label: Option<Vec<u8>>,
    pub apparmor_profile: Option<Vec<u8>>,
    pub seccomp: Option<Compiled>,
    pub terminal: bool,
    /// The runtime itself copies between the terminal and its stdio.
    pub bridged: bool,
    /// Rows and columns.
    pub console_size: Option<(u16, u16)>,
    /// The first fd that the program must not inherit.
    pub first_closed_fd: i32,
    /// CPUs while joining, and CPUs of the program (exec only).
    pub initial_affinity: Option<IdSet>,
    pub final_affinity: Option<IdSet>,
}

impl ProcessPlan {
    /// Plans a process of a container whose `linux` section is given.
    ///
    /// # Errors
    /// A string with a NUL byte, or a value out of range.
    pub fn new(process: &Process, linux: Option<&Linux>, options: &LaunchOptions) -> Result<Self> {
        let args = process.args().as_deref().unwrap_or_default();
        let mut env = environment(process.env().as_deref().unwrap_or_default())?;
        let value_of = |env: &[CString], name: &[u8]| {
            env.iter().find_map(|entry| {
                let rest = entry.as_bytes().strip_prefix(name)?;
                rest.strip_prefix(b"=").map(<[u8]>::to_vec)
            })
        };
        let search_path = value_of(&env, b"PATH").unwrap_or_default();
        let needs_home = value_of(&env, b"HOME").is_none_or(|home| home.is_empty());
        if needs_home {
            env.retain(|entry| entry.as_bytes() != b"HOME=");
        }
        if options.listen_fds > 0 {
            env.push(c_string(
                "env",
                format!("LISTEN_FDS={}", options.listen_fds).as_bytes(),
            )?);
            env.push(c"LISTEN_PID=1".to_owned());
        }
        let user = process.user();
        let given = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
        let affinity = process.exec_cpu_affinity().as_ref();
        let cpus = |list: Option<&String>, field: &str| -> Result<Option<IdSet>> {
            list.filter(|list| !list.is_empty())
                .map(|list| IdSet::parse(list))
                .transpose()
                .map_err(|reason| Error::invalid(format!("bad CPUAffinity.{field}: {reason}")))
        };
        Ok(Self {
            args: CStringArray::new(
                args.iter()
                    .map(|a| c_string("args", a.as_bytes()))
                    .collect::<Result<_>>()?,
            ),
            env: CStringArray::new(env),
            search_path,
            needs_home,
            cwd: c_string("cwd", process.cwd().as_os_str().as_bytes())?,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            setgroups: true,
            joined_user: false,
            umask: user.umask(),
            capabilities: process
                .capabilities()
                .as_ref()
                .map(masks)
                .unwrap_or_default(),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
            oom_score_adj: process.oom_score_adj(),
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
            has_cpuset: has_cpuset(linux),
            io_priority: process
                .io_priority()
                .map(|io| (io_class(io.class()), io.priority().unsigned_abs() as u32)),
            personality: linux
                .and_then(|linux| linux.personality().as_ref())
                .map(|p| match p.domain() {
                    LinuxPersonalityDomain::PerLinux => 0,
                    LinuxPersonalityDomain::PerLinux32 => 8,
                }),
            memory_policy: linux
                .and_then(|linux| linux.memory_policy().as_ref())
                .map(MemoryPolicy::new)
                .transpose()?,
            selinux_label: given(process.selinux_label()).map(String::into_bytes),
            apparmor_profile: given(process.apparmor_profile())
                .map(|profile| format!("exec {profile}").into_bytes()),
            seccomp: None,
            terminal: process.terminal().unwrap_or(false),
            bridged: options.bridged,
            console_size: process.console_size().map(|size| {
                let cut = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
                (cut(size.height()), cut(size.width()))
            }),
            first_closed_fd: 3_i32
                .saturating_add_unsigned(options.preserve_fds)
                .saturating_add_unsigned(options.listen_fds),
            initial_affinity: cpus(affinity.and_then(|a| a.initial().as_ref()), "Initial")?,
            final_affinity: cpus(
                affinity.and_then(|a| a.cpu_affinity_final().as_ref()),
                "Final",
            )?,
        })
    }
}

fn has_cpuset(linux: Option<&Linux>) -> bool {
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let cpus = cpu.and_then(|cpu| cpu.cpus().as_ref());
    cpus.is_some_and(|cpus| !cpus.is_empty())
}

impl CapabilityMasks {
    /// Ambient capabilities that the kernel will refuse, since they are not both permitted and
    /// inheritable: they are left out, and the caller is told.
    pub fn warnings(&self) -> Vec<String> {
        let lost = self.ambient & !(self.permitted & self.inheritable);
        (0..64)
            .filter(|number| lost & (1 << number) != 0)
            .map(|number| {
                let name = NAMES.get(number).map_or("unknown", |name| *name);
                format!("can't raise ambient capability CAP_{name}: operation not permitted")
            })
            .collect()
    }
}

/// The last value of a name wins, at the place of its first: runc's rule since 1.3.
fn environment(env: &[String]) -> Result<Vec<CString>> {
    let mut kept: Vec<CString> = Vec::with_capacity(env.len() + 3);
    let name = |entry: &[u8]| entry.iter().position(|b| *b == b'=');
    for entry in env {
        let Some(end) = name(entry.as_bytes()).filter(|end| *end > 0) else {
            return Err(Error::invalid(format!(
                "invalid environment variable: {entry:?}"
            )));
        };
        let entry = c_string("env", entry.as_bytes())?;
        let key = &entry.as_bytes()[..=end];
        match kept.iter().position(|old| old.as_bytes().starts_with(key)) {
            Some(at) => kept[at] = entry,
            None => kept.push(entry),
        }
    }
    Ok(kept)
}

/// oci-spec lists the capabilities in the order of its own; the kernel's number comes from `caps`.
fn masks(capabilities: &LinuxCapabilities) -> CapabilityMasks {
    let mask = |set: &Option<HashSet<Capability>>| {
        set.iter()
            .flatten()
            .map(|capability| 1u64 << number(*capability))
            .sum()
    };
    CapabilityMasks {
        bounding: mask(capabilities.bounding()),
        effective: mask(capabilities.effective()),
        permitted: mask(capabilities.permitted()),
        inheritable: mask(capabilities.inheritable()),
        ambient: mask(capabilities.ambient()),
    }
}

/// By number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// include/uapi/linux/capability.h
fn number(capability: Capability) -> u8 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn rlimit(limit: &PosixRlimit) -> (PosixRlimitType, u64, u64) {
    (limit.typ(), limit.soft(), limit.hard())
}

fn io_class(class: IOPriorityClass) -> u32 {
    match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    }
}

fn scheduler(scheduler: &Scheduler) -> Result<SchedulerAttributes> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let mut flags = 0;
    for flag in scheduler.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        };
    }
    let priority = scheduler.priority().unwrap_or(0);
    Ok(SchedulerAttributes {
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(priority)
            .map_err(|_| Error::invalid(format!("invalid scheduler.priority: {priority}")))?,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_ambient_capabilities_are_told() {
        let masks = CapabilityMasks {
            permitted: 0b10_0001,
            inheritable: 0b10_0000,
            ambient: 0b10_0001,
            ..CapabilityMasks::default()
        };
        let told = "can't raise ambient capability CAP_CHOWN: operation not permitted";
        assert_eq!(masks.warnings(), [told]);
        let known: Vec<&str> = NAMES
            .iter()
            .copied()
            .filter(|name| {
                let capability: Capability = name.parse().unwrap();
                NAMES[usize::from(number(capability))] == *name
            })
            .collect();
        assert_eq!(known, NAMES);
    }

    #[test]
    fn environment_last_value_wins() {
        let env: Vec<String> = ["A=1", "B=2", "A=3", "AB=4"].map(str::to_owned).to_vec();
        let kept = environment(&env).unwrap();
        let kept: Vec<&str> = kept.iter().map(|e| e.to_str().unwrap()).collect();
        assert_eq!(kept, ["A=3", "B=2", "AB=4"]);
        assert!(environment(&["=x".to_owned()]).is_err());
        assert!(environment(&["x".to_owned()]).is_err());
        assert!(environment(&["x=\0".to_owned()]).is_err());
    }
}
