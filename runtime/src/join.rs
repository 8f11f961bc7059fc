//! `exec`: one more process in a container that runs.
//!
//! ```text
//! record + config + process -> JoinPlan
//! parent: setns(pid) -> clone3(INTO_CGROUP) -> setns(own pid)    child: setns(all others)
//!         limits, score, console                                        identity -> execve
//! ```

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_oci::record::{CgroupRecord, ContainerRecord};
use coracle_oci::spec::{Linux, Process};
use coracle_oci::state::{State, Status};
use coracle_sys::clone::{Side, exit_now};
use coracle_sys::exec;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;

use crate::cgroup::Cgroup;
use crate::console::{self, ConsoleSocket};
use crate::error::{Error, Kind, Result};
use crate::host;
use crate::init::identity::{self, LabelFiles};
use crate::init::resolve::Root;
use crate::init::{self, Never, program};
use crate::launch::channel::Channel;
use crate::launch::{self, Conversation, Goal, process};
use crate::plan::sets::IdSet;
use crate::plan::{LaunchOptions, ProcessPlan};
use crate::resctrl;
use crate::seccomp;
use crate::state::open_process;

/// What `exec` asks for.
#[derive(Debug)]
pub struct Request<'a> {
    pub record: &'a ContainerRecord,
    pub linux: Option<&'a Linux>,
    pub process: &'a Process,
    pub options: LaunchOptions,
    /// `--cgroup`, as given.
    pub cgroups: &'a [String],
    pub seccomp_cache: &'a Path,
    pub console: Option<ConsoleSocket>,
}

/// A process of the container that executes its program.
#[derive(Debug)]
pub struct Joined {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub master: Option<OwnedFd>,
    /// The CPUs it was started on.
    pub initial_affinity: Option<IdSet>,
}

/// Makes the process and lets it execute its program.
///
/// # Errors
/// Anything; the process is gone then.
pub fn join(request: Request<'_>) -> Result<Joined> {
    let mut plan = ProcessPlan::new(request.process, request.linux, &request.options)?;
    if let Some(profile) = request.linux.and_then(|linux| linux.seccomp().as_ref()) {
        plan.seccomp = Some(seccomp::cache::load_or_compile(
            request.seccomp_cache,
            profile,
            seccomp::Abi::native(),
        )?);
    }
    let init = open_process(request.record.init())?
        .ok_or_else(|| Error::new(Kind::State, "cannot exec in a stopped container", ""))?;
    let namespaces = Namespaces::of(request.record)?;
    if namespaces.user {
        plan.setgroups = setgroups_allowed(request.record.init_pid)?;
    } else if host::in_user_namespace() {
        plan.setgroups = host::setgroups_allowed();
    }
    let cgroup = Cgroup::open(&request.record.cgroup).exec_subpath(request.cgroups)?;
    let keyring = (!request.record.no_new_keyring)
        .then(|| crate::plan::c_string("id", format!("_ses.{}", request.record.id).as_bytes()))
        .transpose()?;
    if let Some(cpus) = &plan.initial_affinity {
        identity::set_affinity(cpus)?;
    }
    let root = match namespaces.inside.contains(ThreadNameSpaceType::MOUNT) {
        true => None,
        false => Some(root_of(request.record.init_pid)?),
    };
    let child = Child {
        plan: &plan,
        root,
        init: init.as_fd(),
        namespaces,
        keyring: keyring.as_deref(),
    };
    let (channel, pid, pidfd) = place(&child, &cgroup, request.record, request.cgroups)?;
    let resctrl = request.record.resctrl.as_ref();
    let state = State::new(request.record, Status::Running);
    let mut conversation = Conversation {
        channel: &channel,
        seccomp: plan.seccomp.as_ref(),
        hooks: None,
        sources: None,
        state: &state,
        console: request.console,
        master: None,
    };
    let executed = match plan.oom_score_adj {
        Some(adjustment) => process::set_oom_score_adj(pid, adjustment),
        None => Ok(()),
    }
    .and_then(|()| resctrl.map_or(Ok(()), |groups| resctrl::join(groups, pid)))
    .and_then(|()| channel.proceed())
    .and_then(|()| conversation.until(Goal::Executed, pid));
    let master = conversation.master;
    match executed {
        Ok(()) => Ok(Joined {
            pid,
            pidfd,
            master,
            initial_affinity: plan.initial_affinity,
        }),
        Err(error) => {
            process::end(pid, pidfd.as_fd())?;
            Err(error)
        }
    }
}

/// The container's namespaces, as setns(2) on a pidfd takes them.
#[derive(Debug, Clone, Copy)]
struct Namespaces {
    /// What the child joins: all but the pid namespace, which takes effect for children only.
    inside: ThreadNameSpaceType,
    pid: bool,
    user: bool,
    /// Without rights outside the user namespace, the pid namespace is joined from within: by a
    /// stage that then clones the process as its own sibling.
    staged: bool,
}

impl Namespaces {
    fn of(record: &ContainerRecord) -> Result<Self> {
        let mut inside = ThreadNameSpaceType::empty();
        for namespace in &record.namespaces {
            inside |= match namespace.kind.as_str() {
                "mnt" => ThreadNameSpaceType::MOUNT,
                "cgroup" => ThreadNameSpaceType::CONTROL_GROUP,
                "uts" => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
                "ipc" => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
                "user" => ThreadNameSpaceType::USER,
                "pid" => ThreadNameSpaceType::PROCESS_ID,
                "net" => ThreadNameSpaceType::NETWORK,
                "time" => ThreadNameSpaceType::TIME,
                other => {
                    return Err(Error::invalid(format!(
                        "unknown namespace {other:?} in state"
                    )));
                }
            };
        }
        // Joining the user namespace one is in already is refused (EINVAL), and needless.
        if inside.contains(ThreadNameSpaceType::USER) && same_user_namespace(record.init_pid) {
            inside.remove(ThreadNameSpaceType::USER);
        }
        let pid = inside.contains(ThreadNameSpaceType::PROCESS_ID);
        let user = inside.contains(ThreadNameSpaceType::USER);
        let staged = user && pid && !rustix::process::geteuid().is_root();
        if !staged {
            inside.remove(ThreadNameSpaceType::PROCESS_ID);
        }
        Ok(Self {
            inside,
            pid,
            user,
            staged,
        })
    }
}

/// A namespace whose maps an unprivileged process has written has given up setgroups(2).
fn setgroups_allowed(pid: i32) -> Result<bool> {
    let path = format!("/proc/{pid}/setgroups");
    match std::fs::read(&path) {
        Ok(text) => Ok(!text.starts_with(b"deny")),
        Err(error) => Err(Error::system("read", path, error)),
    }
}

fn root_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|error| Error::system("open", path, error))
}

fn same_user_namespace(pid: i32) -> bool {
    let inode = |path: &str| {
        rustix::fs::statat(CWD, path, AtFlags::empty()).map(|stat| (stat.st_dev, stat.st_ino))
    };
    match (
        inode("/proc/self/ns/user"),
        inode(&format!("/proc/{pid}/ns/user")),
    ) {
        (Ok(own), Ok(other)) => own == other,
        _ => false,
    }
}

/// Clones into the container's cgroup; where that takes no processes any more, into the one that
/// its init has moved to.
fn place(
    child: &Child<'_>,
    cgroup: &Cgroup,
    record: &ContainerRecord,
    asked: &[String],
) -> Result<(Channel, i32, OwnedFd)> {
    match child.make(cgroup) {
        Err(error) if takes_none(&error) && asked.is_empty() => {
            let moved = child.make(&cgroup.of_process(record.init_pid)?);
            moved.map_err(|_| not_added(error))
        }
        Err(error) if takes_none(&error) => Err(not_added(error)),
        Err(error)
            if (record.rootless_cgroups || cgroup.has_unit())
                && matches!(error.errno(), Some(libc::EACCES | libc::EPERM)) =>
        {
            without_right(child, cgroup, record, error)
        }
        made => made,
    }
}

/// The cgroup has controllers for those below it, is threaded, or is gone.
fn takes_none(error: &Error) -> bool {
    matches!(
        error.errno(),
        Some(libc::EBUSY | libc::EOPNOTSUPP | libc::ENOENT | libc::ENODEV)
    )
}

/// In runc's words, which callers look for. There is no pid yet: 0 is the writer, to cgroup.procs.
fn not_added(error: Error) -> Error {
    error.context("error adding pid 0 to cgroups")
}

/// Who may not write to the cgroups between his own and the container's has systemd move the
/// process. A container whose cgroup may be out of reach does without.
fn without_right(
    child: &Child<'_>,
    cgroup: &Cgroup,
    record: &ContainerRecord,
    error: Error,
) -> Result<(Channel, i32, OwnedFd)> {
    let (channel, pid, pidfd) = child.make(&Cgroup::open(&CgroupRecord::None))?;
    match cgroup.attach_by_unit(pid) {
        Err(second) if !record.rootless_cgroups => {
            process::end(pid, pidfd.as_fd())?;
            Err(error.context(format!("error adding pid {pid} to cgroups ({second:#})")))
        }
        _ => Ok((channel, pid, pidfd)),
    }
}

/// What the new process needs.
struct Child<'a> {
    plan: &'a ProcessPlan,
    /// The container's root, where no mount namespace brings it along.
    root: Option<OwnedFd>,
    init: BorrowedFd<'a>,
    namespaces: Namespaces,
    keyring: Option<&'a CStr>,
}

impl Child<'_> {
    fn make(&self, cgroup: &Cgroup) -> Result<(Channel, i32, OwnedFd)> {
        let target = cgroup.clone_into()?;
        let joins = cgroup.self_join()?;
        let (mine, theirs) = Channel::pair()?;
        let staged = self.namespaces.staged;
        if self.namespaces.pid && !staged {
            self.enter_pid_namespace()?;
        }
        let side = launch::clone(0, target.as_ref().map(AsFd::as_fd));
        if let Ok(Side::Child) = side {
            drop(mine);
            self.run(&joins, &theirs)
        }
        drop(theirs);
        match side? {
            Side::Parent { pid, .. } if staged => {
                let (pid, pidfd) = launch::cloned_by_stage(&mine, pid)?;
                Ok((mine, pid, pidfd))
            }
            Side::Parent { pid, pidfd } => Ok((mine, pid, pidfd)),
            Side::Child => Err(Error::new(Kind::Internal, "clone returned twice", "")),
        }
    }

    /// Takes effect for children only, and exec has but one: there is no coming back, which a
    /// caller in a user namespace, as under rootless podman, would have no right to.
    fn enter_pid_namespace(&self) -> Result<()> {
        rustix::thread::move_into_thread_name_spaces(self.init, ThreadNameSpaceType::PROCESS_ID)
            .map_err(|error| Error::system("setns(CLONE_NEWPID)", "the container's init", error))
    }

    fn run(&self, joins: &[OwnedFd], channel: &Channel) -> ! {
        let error = match self.steps(joins, channel) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        // Without the parent there is nobody to tell.
        let _ = channel.report_failure(&error);
        exit_now(1)
    }

    fn steps(&self, joins: &[OwnedFd], channel: &Channel) -> Result<Never> {
        let plan = self.plan;
        init::join_cgroup(joins)?;
        let proc = identity::host_proc(plan)?;
        process::set_limits(None, &plan.rlimits)?;
        if !self.namespaces.inside.is_empty() {
            rustix::thread::move_into_thread_name_spaces(self.init, self.namespaces.inside)
                .map_err(|error| {
                    Error::system(
                        format!("setns({:#x})", self.namespaces.inside.bits()),
                        "the container's init",
                        error,
                    )
                })?;
        }
        if let Some(root) = &self.root {
            rustix::process::fchdir(root)
                .and_then(|()| rustix::process::chroot(c"."))
                .map_err(|error| Error::system("chroot", "the container's root", error))?;
        }
        if self.namespaces.user {
            init::become_root()?;
        }
        if self.namespaces.staged
            && let Side::Parent { pid, pidfd } = launch::clone(libc::CLONE_PARENT as u64, None)?
        {
            channel.report_clone(pid, pidfd.as_fd())?;
            exit_now(0)
        }
        let labels = LabelFiles::open(plan, proc.as_ref())?;
        init::new_session()?;
        init::hide()?;
        if let Some(name) = self.keyring {
            labels.with_key_label(plan, || init::join_keyring(name, 0))?;
        }
        if plan.terminal {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(c"/", flags, Mode::empty())
                .map_err(|error| Error::system("open", "/", error))?;
            let slave = init::open_console(&Root::new(root), plan, channel)?;
            console::take(&slave)?;
        }
        let home = plan.needs_home.then(|| program::home(plan.uid));
        // What a filter may refuse comes before it. All that is opened from here on closes by itself.
        identity::close_others(plan)?;
        exec::reset_signals().map_err(|error| Error::system("sigaction", "", error))?;
        identity::apply(plan, &labels, channel)?;
        let file = program::find(plan)?;
        identity::load_filter_late(plan, channel)?;
        channel.wait()?;
        init::execute(plan, &file, home)
    }
}
