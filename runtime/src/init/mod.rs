//! The child: from clone3 to execve, as one ordered list of steps.
//!
//! Runs in a copy of the parent's memory: the plan is read where the parent built it. One thread,
//! no locks, no look-ups but of the container's files. Every failure goes to the parent as text.

pub mod bind;
pub mod cgroup;
pub mod copy_up;
pub mod device;
pub mod identity;
pub mod mount;
pub mod program;
pub mod resolve;
pub mod rootfs;
mod walk;

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use coracle_oci::spec::{Hook, LinuxNamespaceType, PosixRlimitType};
use coracle_oci::state::{State, Status};
use coracle_sys::{clone, exec, process as sys};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::console::{self, Pty};
use crate::error::{Error, Result};
use crate::hooks::{self, Surroundings};
use crate::launch::channel::Channel;
use crate::launch::network;
use crate::launch::process::set_limits;
use crate::plan::namespaces::JoinStep;
use crate::plan::{NamespacePlan, Plan, ProcessPlan};

use bind::Parent;
use identity::LabelFiles;
use resolve::{Proc, Root};

/// What the parent has opened for the child.
#[derive(Debug)]
pub struct Inheritance<'a> {
    pub plan: &'a Plan,
    pub state: &'a State,
    pub channel: &'a Channel,
    /// Read side of `start`: see `crate::launch::gate`.
    pub gate: Option<&'a OwnedFd>,
    /// The root, attached in the runtime's mount namespace that the container shares.
    pub host_root: Option<&'a OwnedFd>,
    /// A stage has joined the namespaces before this child was cloned.
    pub staged: bool,
}

/// What the kernel gives a session keyring: all to its possessor; view, read and link to its user.
const KEYRING_PERMISSIONS: u32 = 0x3f13_0000;
const KEYRING_USER_SEARCH: u32 = 0x0008_0000;
const KEYRING_OTHER_SEARCH: u32 = 0x0000_0008;

/// Becomes the container's program, or reports why not.
pub fn run(mut inheritance: Inheritance<'_>) -> ! {
    let channel = inheritance.channel;
    let error = match steps(&mut inheritance) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if channel.report_failure(&error).is_err() {
        complain(&error);
    }
    clone::exit_now(1)
}

/// The last words of a child whose parent is gone: they reach the container's log.
fn complain(error: &Error) {
    let text = format!("coracle: {error:#}\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
}

/// The exit code of a process whose program was found and could not be executed.
const EXEC_REFUSED: i32 = 255;

/// No value: the steps end in execve or in an error.
pub enum Never {}

fn steps(child: &mut Inheritance<'_>) -> Result<Never> {
    let plan = child.plan;
    let process = &plan.process;
    new_session()?;
    if !child.staged {
        join_namespaces(&plan.namespaces.joins)?;
    }
    if plan.namespaces.waits() {
        child.channel.wait()?;
    }
    if plan.namespaces.has_user() {
        become_root()?;
    }
    enter_late_namespaces(&plan.namespaces)?;
    hide()?;
    // While /proc is the host's.
    let proc = identity::host_proc(process)?;
    let labels = LabelFiles::open(process, proc.as_ref())?;
    if let Some(name) = &plan.keyring {
        // The ids of a user namespace are others in the runtime's.
        let search = if plan.namespaces.has_user() {
            KEYRING_OTHER_SEARCH
        } else {
            KEYRING_USER_SEARCH
        };
        labels.with_key_label(process, || join_keyring(name, search))?;
    }
    name_host(plan)?;
    if plan.namespaces.new_network && !plan.namespaces.network_apart {
        network::loopback_up()?;
    }

    // The runtime's umask must not cut the modes of what is made for the container.
    rustix::process::umask(Mode::empty());
    let parent = Parent {
        channel: child.channel,
        opens: plan.may_ask,
    };
    let root = match child.host_root {
        Some(tree) => rootfs::attached_root(tree)?,
        None => rootfs::attach_root(&plan.rootfs, parent)?,
    };
    let filled = mount_all(child, &root, parent)?;
    sysctls(&plan.sysctls)?;
    if plan.waits_for_limits {
        child.channel.wait()?;
    }
    if plan.dev.setup {
        device::fill(&root, &plan.dev)?;
    }
    if process.terminal {
        let pty = open_console(&root, process, child.channel)?;
        device::mount_console(&root, &pty)?;
        console::take(&pty)?;
    } else if plan.dev.setup {
        device::own_null(&root)?;
    }
    make_cwd(&root, process)?;
    rootfs::make_read_only(&root, plan)?;
    rootfs::mask(&root, plan)?;
    runtime_hooks(child, &root)?;
    rootfs::seal(&root, filled, &plan.rootfs)?;
    rootfs::enter(&root, &plan.rootfs)?;
    drop(root);
    child.channel.report_built()?;

    let mut home = None;
    if process.needs_home {
        home = Some(program::home(process.uid));
    }
    let limits = process.rlimits.iter().copied();
    // In a user namespace all others are set by now, when they still could be raised.
    let late = |limit: &(PosixRlimitType, u64, u64)| {
        !plan.namespaces.has_user() || limit.0 == PosixRlimitType::RlimitNofile
    };
    set_limits(None, &limits.filter(late).collect::<Vec<_>>())?;
    // What a filter may refuse comes before it. All that is opened from here on closes by itself.
    identity::close_others(process)?;
    exec::reset_signals().map_err(|error| Error::system("sigaction", "", error))?;
    if let Some(gate) = child.gate {
        identity::close_inherited(
            process,
            &labels,
            &[gate.as_raw_fd(), child.channel.as_fd().as_raw_fd()],
        )?;
        exec::end_on_signals().map_err(|error| Error::system("sigaction", "", error))?;
    }
    identity::apply(process, &labels, child.channel)?;
    let program = program::find(process)?;
    identity::load_filter_late(process, child.channel)?;
    child.channel.wait()?;
    if let Some(gate) = child.gate {
        child.channel.report_ready()?;
        crate::launch::gate::wait(gate)?;
    }
    start_hooks(child, home.as_ref())?;
    execute(process, &program, home)
}

/// Joins the v1 hierarchies from inside: "0" is the writer itself.
pub fn join_cgroup(tasks: &[OwnedFd]) -> Result<()> {
    for file in tasks {
        rustix::io::write(file, b"0")
            .map_err(|error| Error::system("write", "the cgroup's tasks file", error))?;
    }
    Ok(())
}

/// Replaces this process by the program. What the kernel has against it is told where the program
/// itself would speak, as with runc: the runtime's part ends here.
pub fn execute(process: &ProcessPlan, program: &CString, home: Option<CString>) -> ! {
    let error = match home {
        None => exec::execve(program, &process.args, &process.env),
        Some(home) => {
            let mut all = process.env.strings().to_vec();
            all.push(home);
            exec::execve(program, &process.args, &exec::CStringArray::new(all))
        }
    };
    let error = Error::system("exec", program.to_string_lossy(), error);
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("{error:#}\n").as_bytes());
    clone::exit_now(EXEC_REFUSED)
}

pub fn new_session() -> Result<()> {
    match rustix::process::setsid() {
        // Leading a group already is as good: only a terminal would need more, and then says so.
        Ok(_) | Err(Errno::PERM) => Ok(()),
        Err(error) => Err(Error::system("setsid", "", error)),
    }
}

/// Joins namespaces by path, all opened before the first is entered: a joined mount namespace
/// would change what the other paths mean.
pub fn join_namespaces(joins: &[JoinStep]) -> Result<()> {
    let mut opened = Vec::with_capacity(joins.len());
    for join in joins {
        let path = join.path.to_string_lossy();
        let fd = rustix::fs::open(&join.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Error::system("open namespace", path, error))?;
        opened.push((join, fd));
    }
    for (join, fd) in opened {
        // The pid namespace is the parent's to choose: it takes effect at the clone.
        if join.kind == LinuxNamespaceType::Pid {
            continue;
        }
        enter(&join.path, join.kind, &fd)?;
    }
    Ok(())
}

/// setns(2) with the type checked by the kernel.
pub fn enter(path: &CStr, kind: LinuxNamespaceType, fd: &OwnedFd) -> Result<()> {
    let link = match kind {
        LinuxNamespaceType::Mount => LinkNameSpaceType::Mount,
        LinuxNamespaceType::Cgroup => LinkNameSpaceType::ControlGroup,
        LinuxNamespaceType::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        LinuxNamespaceType::Ipc => LinkNameSpaceType::InterProcessCommunication,
        LinuxNamespaceType::User => LinkNameSpaceType::User,
        LinuxNamespaceType::Pid => LinkNameSpaceType::ProcessID,
        LinuxNamespaceType::Network => LinkNameSpaceType::Network,
        LinuxNamespaceType::Time => LinkNameSpaceType::Time,
    };
    rustix::thread::move_into_link_name_space(fd.as_fd(), Some(link))
        .map_err(|error| Error::system(format!("setns({kind})"), path.to_string_lossy(), error))
}

/// Root of the user namespace: what the child makes is owned by it, and its capabilities count.
pub fn become_root() -> Result<()> {
    let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
    // A caller who had to give up setgroups keeps its groups, which are unmapped.
    let _ = rustix::thread::set_thread_groups(&[]);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(|error| Error::system("setresgid", "0 in the user namespace", error))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .map_err(|error| Error::system("setresuid", "0 in the user namespace", error))
}

/// Neither traced nor looked into by the container's processes until the program runs, by way of
/// shared namespaces: /proc/pid/exe, /proc/pid/fd (CVE-2016-9962, CVE-2019-5736). Inherited from the
/// parent where that is root; a change of ids sets it anew.
pub fn hide() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| Error::system("prctl(PR_SET_DUMPABLE, 0)", "", error))
}

fn show() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
        .map_err(|error| Error::system("prctl(PR_SET_DUMPABLE, 1)", "", error))
}

/// The cgroup namespace, whose root is the cgroup that this process is in by now; the time
/// namespace, whose offsets must be written before any process is in it; the ipc namespace of a
/// user namespace.
fn enter_late_namespaces(plan: &NamespacePlan) -> Result<()> {
    let mut flags = UnshareFlags::empty();
    if plan.new_cgroup {
        flags |= UnshareFlags::NEWCGROUP;
    }
    if plan.new_time {
        flags |= UnshareFlags::NEWTIME;
    }
    if plan.late_ipc {
        flags |= UnshareFlags::NEWIPC;
    }
    if flags.is_empty() {
        return Ok(());
    }
    sys::unshare(flags.bits())
        .map_err(|error| Error::system("unshare", format!("{flags:?}"), error))?;
    if !plan.new_time {
        return Ok(());
    }
    if let Some(offsets) = &plan.time_offsets {
        if plan.new_user {
            // A hidden process's files in /proc belong to the host's root, who this no longer is.
            // Nobody else is in a user namespace that was made with this process.
            show()?;
        }
        let file = Proc::open()?.file("self/timens_offsets", OFlags::WRONLY)?;
        rustix::io::write(&file, offsets.as_bytes())
            .map_err(|error| Error::system("write", "/proc/self/timens_offsets", error))?;
    }
    let path = c"/proc/self/ns/time_for_children";
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::system("open", "/proc/self/ns/time_for_children", error))?;
    enter(path, LinuxNamespaceType::Time, &fd)
}

/// Joins the container's session keyring, made by whoever is first. `searchable_by` are the
/// permissions that let a later exec, who does not possess it, find it by its name.
pub fn join_keyring(name: &CStr, searchable_by: u32) -> Result<()> {
    let keyring = match sys::join_session_keyring(name) {
        // A kernel without keyrings has no keys to hide.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(()),
        keyring => {
            keyring.map_err(|error| Error::system("unable to join session keyring", "", error))?
        }
    };
    if searchable_by == 0 {
        return Ok(());
    }
    sys::set_keyring_permissions(keyring, KEYRING_PERMISSIONS | searchable_by)
        .map_err(|error| Error::system("unable to mod keyring permissions", "", error))
}

fn name_host(plan: &Plan) -> Result<()> {
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name)
            .map_err(|error| Error::system("sethostname", String::from_utf8_lossy(name), error))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name).map_err(|error| {
            Error::system("setdomainname", String::from_utf8_lossy(name), error)
        })?;
    }
    Ok(())
}

/// In the config's order; the network namespace is joined as late as it may be, for the parent is
/// still making it. Gives back what has to become read-only yet.
fn mount_all(child: &Inheritance<'_>, root: &Root, parent: Parent<'_>) -> Result<Vec<OwnedFd>> {
    let mut filled = Vec::new();
    let mut apart = child.plan.namespaces.network_apart;
    for (index, step) in child.plan.mounts.iter().enumerate() {
        if apart && network::shows_in(step) {
            network::join(child.channel)?;
            apart = false;
        }
        filled.extend(mount::apply(root, step, (index, parent))?);
    }
    if apart {
        network::join(child.channel)?;
    }
    Ok(filled)
}

/// The files are those of the calling process's namespaces.
fn sysctls(settings: &[(CString, Vec<u8>)]) -> Result<()> {
    if settings.is_empty() {
        return Ok(());
    }
    let proc = Proc::open()?;
    for (path, value) in settings {
        let path = format!("sys/{}", path.to_string_lossy());
        let file = proc.file(&path, OFlags::WRONLY | OFlags::NOFOLLOW)?;
        rustix::io::write(&file, value)
            .map_err(|error| Error::system("write", format!("/proc/{path}"), error))?;
    }
    Ok(())
}

/// Images name working directories that they do not have; runc makes those.
fn make_cwd(root: &Root, process: &ProcessPlan) -> Result<()> {
    let path = crate::plan::relative("cwd", process.cwd.to_bytes())?;
    match root.find(&path) {
        Err(Errno::NOENT) => root.make_directory(&path, 0o755).map(drop),
        // Whatever else is wrong with it, the program's own chdir finds.
        _ => Ok(()),
    }
}

/// Opens the container's terminal and hands the master to the parent.
pub fn open_console(root: &Root, process: &ProcessPlan, channel: &Channel) -> Result<OwnedFd> {
    let pty = Pty::open(root)?;
    if process.bridged {
        pty.keep_newlines()?;
    }
    if let Some((rows, columns)) = process.console_size {
        pty.resize(rows, columns)?;
    }
    channel.report_console(pty.master.as_fd())?;
    Ok(pty.slave)
}

#[allow(deprecated)]
fn runtime_hooks(child: &Inheritance<'_>, root: &Root) -> Result<()> {
    let hooks = &child.plan.hooks;
    let any = |list: &Option<Vec<Hook>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if any(hooks.prestart()) || any(hooks.create_runtime()) {
        child.channel.report_hooks()?;
        child.channel.wait()?;
    }
    let Some(list) = hooks.create_container().as_ref().filter(|l| !l.is_empty()) else {
        return Ok(());
    };
    rustix::process::fchdir(root.as_fd())
        .map_err(|error| Error::system("fchdir", "the container's root", error))?;
    let env = child.plan.process.env.strings();
    let env: Vec<CString> = env
        .iter()
        .filter(|entry| entry.as_bytes().starts_with(b"PATH="))
        .cloned()
        .collect();
    let surroundings = Surroundings {
        cwd: None,
        env: Some(&env),
    };
    hooks::run_in("createContainer", list, &own_state(child), surroundings)
}

fn start_hooks(child: &Inheritance<'_>, home: Option<&CString>) -> Result<()> {
    let list = child.plan.hooks.start_container();
    let Some(list) = list.as_ref().filter(|list| !list.is_empty()) else {
        return Ok(());
    };
    let mut state = own_state(child);
    state.status = Status::Created;
    let mut env = child.plan.process.env.strings().to_vec();
    env.extend(home.cloned());
    let surroundings = Surroundings {
        cwd: None,
        env: Some(&env),
    };
    // An empty environment counts as none here, and here only.
    let list: Vec<Hook> = list.iter().map(without_empty_env).collect();
    hooks::run_in("startContainer", &list, &state, surroundings)
}

fn without_empty_env(hook: &Hook) -> Hook {
    let mut hook = hook.clone();
    if hook.env().as_ref().is_some_and(Vec::is_empty) {
        hook.set_env(None);
    }
    hook
}

/// The state as this process sees it: its pid is the one in its own namespace.
fn own_state(child: &Inheritance<'_>) -> State {
    let mut state = child.state.clone();
    state.pid = rustix::process::getpid().as_raw_nonzero().get();
    state
}
