//! The parent side: from a bundle to a container that waits for its last word.
//!
//! ```text
//! probe, check, plan           nothing has happened yet
//! begin (intent on disk)       from here every failure is undone
//! cgroup -> clone3 -> maps, limits      (the child builds its root meanwhile)
//! Built -> record committed -> Launched --create--> the child waits at the gate
//!                                       --run-----> the child executes
//! ```

pub mod channel;
mod clone;
mod conversation;
pub mod foreground;
pub mod gate;
pub mod host_root;
mod idmap;
mod netdev;
pub mod network;
pub mod notify;
pub mod process;
mod rtnetlink;
mod seccomp_agent;
mod sources;
mod stage;
pub mod undo;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_oci::ContainerId;
use coracle_oci::record::{ContainerRecord, IntentRecord, NamespaceRecord};
use coracle_oci::spec::{LinuxNamespaceType, Spec};
use coracle_oci::state::{State, Status};
use coracle_sys::clone::Side;

use crate::bundle::Bundle;
use crate::cgroup::{self, Cgroup, CgroupPlan, Manager, PlanOptions};
use crate::cli::{GlobalArgs, Rootless};
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result};
use crate::host::HostFacts;
use crate::init::{self, Inheritance};
use crate::log;
use crate::plan::{Input, LaunchOptions, Plan, namespace_file};
use crate::resctrl::Resctrl;
use crate::seccomp;
use crate::spec::CheckedSpec;
use crate::state::{Entry, Intent, Store, process_start_time};

use channel::{Channel, Report};
use host_root::HostRoot;
use sources::Sources;
use undo::Undo;

pub use clone::clone;
pub use conversation::{Conversation, Goal, runtime_hooks};

/// Around every error from the first side effect on, for `create` and `run`.
const NOT_STARTED: &str = "unable to start container process";

/// What `create` and `run` ask for.
#[derive(Debug)]
pub struct Request<'a> {
    pub id: ContainerId,
    pub bundle: Bundle,
    pub global: &'a GlobalArgs,
    pub options: LaunchOptions,
    pub console_socket: Option<&'a Path>,
    pub pidfd_socket: Option<&'a Path>,
    pub pid_file: Option<&'a Path>,
    /// The runtime stays and bridges the terminal itself.
    pub foreground: bool,
}

/// A container on record whose init has one step left.
#[derive(Debug)]
pub struct Launched {
    pub record: ContainerRecord,
    pub plan: Plan,
    pub state: State,
    pub entry: Entry,
    pub cgroup: Cgroup,
    pub pidfd: OwnedFd,
    /// The terminal, unless it went to a console socket.
    pub master: Option<OwnedFd>,
    channel: Channel,
}

/// Everything that is decided before the first side effect.
pub(crate) struct Prepared {
    host: HostFacts,
    pub plan: Plan,
    pub cgroup_plan: CgroupPlan,
    /// Who makes the cgroup, with the systemd driver.
    pub systemd: Option<Manager>,
    pub resctrl: Option<Resctrl>,
    pub state: State,
    pub record: ContainerRecord,
    host_root: Option<HostRoot>,
    pub console: Option<ConsoleSocket>,
    pidfd_socket: Option<ConsoleSocket>,
    pub config: Vec<u8>,
}

impl Prepared {
    pub fn intent(&self) -> IntentRecord {
        IntentRecord {
            id: self.record.id.clone(),
            bundle: self.record.bundle.clone(),
            cgroup: self.record.cgroup.clone(),
            existing: Cgroup::open(&self.record.cgroup).existing(),
            pids: Vec::new(),
            mounts: self.record.mounts.clone(),
            resctrl: self.record.resctrl.clone(),
        }
    }
}

/// Makes the container.
///
/// # Errors
/// Anything; nothing is left behind then.
pub fn launch(request: Request<'_>) -> Result<Launched> {
    let pid_file = request.pid_file.map(Path::to_owned);
    let global = request.global;
    let store = Store::open(&request.global.root);
    let prepared = prepare(request)?;
    let intent = store.begin(&prepared.record.id, || prepared.intent())?;
    let mut undo = Undo::default();
    if notify::host().is_some()
        && let Err(error) = notify::make_directory(intent.entry())
    {
        return Err(undo.run(intent, error.context(NOT_STARTED)));
    }
    match start(prepared, &intent, &mut undo, (global, pid_file.as_deref())) {
        Ok(started) => Ok(started.with_entry(intent.finish())),
        Err(error) => Err(undo.run(intent, error.context(NOT_STARTED))),
    }
}

/// # Errors
/// The config, the command line or the host does not allow it. Nothing has happened yet.
pub(crate) fn prepare(request: Request<'_>) -> Result<Prepared> {
    let host = HostFacts::probe()?;
    let spec = CheckedSpec::check(&request.bundle.config, &host)?;
    let config = spec.spec();
    check_terminal(&spec, &request)?;
    let (cgroup_plan, systemd) = plan_cgroup(config, &request, &host)?;
    for warning in spec.warnings.iter().chain(&cgroup_plan.warnings) {
        log::warning(request.global, warning);
    }
    let cgroup_record = cgroup_plan.record();
    let mut plan = Plan::new(Input {
        id: &request.id,
        bundle: &request.bundle.directory,
        spec: &spec,
        host: &host,
        cgroup: &cgroup_record,
        options: &request.options,
    })?;
    for warning in plan.process.capabilities.warnings() {
        log::warning(request.global, &warning);
    }
    check_rootfs(&plan.rootfs.path)?;
    let resctrl = Resctrl::plan(config.linux().as_ref(), &request.id)?;
    if let Some(profile) = config
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref())
    {
        let filter =
            seccomp::cache::load_or_compile(&request.global.root, profile, seccomp::Abi::native())?;
        log::debug_each(request.global, || seccomp::unknown_calls(profile));
        log::debug(request.global, || {
            format!("seccomp filter flags: {}", filter.flags)
        });
        plan.process.seccomp = Some(filter);
    }
    let connect = |path: Option<&Path>| path.map(ConsoleSocket::connect).transpose();
    let annotations: BTreeMap<String, String> = config
        .annotations()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    let state = State {
        oci_version: config.version().clone(),
        id: request.id.as_str().to_owned(),
        status: Status::Creating,
        pid: 0,
        bundle: request.bundle.directory.to_string_lossy().into_owned(),
        annotations: annotations.clone(),
    };
    let host_root = HostRoot::new(&plan.rootfs)?;
    let record = ContainerRecord {
        mounts: host_root.iter().map(|root| root.record.clone()).collect(),
        oci_version: config.version().clone(),
        bundle: request.bundle.directory.clone(),
        rootfs: plan.rootfs.path.clone(),
        init_pid: 0,
        init_start_time: 0,
        created: String::new(),
        owner: owner(host.euid),
        annotations,
        cgroup: cgroup_record,
        namespaces: Vec::new(),
        private_pid_namespace: plan.namespaces.new_pid,
        rootless_cgroups: cgroup_plan.is_rootless(),
        no_new_keyring: request.options.no_new_keyring,
        resctrl: resctrl.as_ref().map(|resctrl| resctrl.record().clone()),
        id: request.id,
    };
    Ok(Prepared {
        console: connect(request.console_socket)?,
        pidfd_socket: connect(request.pidfd_socket)?,
        config: request.bundle.config,
        host,
        plan,
        cgroup_plan,
        systemd,
        resctrl,
        state,
        record,
        host_root,
    })
}

const WITHOUT_CGROUP: &str = "Creating a rootless container with no cgroup and no private pid \
     namespace. Such configuration is strongly discouraged (as it is impossible to properly kill \
     all container's processes) and will result in an error in a future runc version.";

/// The cgroup's plan, and the connection to the systemd that will carry it out.
fn plan_cgroup(
    config: &Spec,
    request: &Request<'_>,
    host: &HostFacts,
) -> Result<(CgroupPlan, Option<Manager>)> {
    let auto = request.global.rootless == Rootless::Auto;
    let namespaced = auto && host.in_user_namespace;
    let unprivileged = request.global.rootless == Rootless::True || (auto && !host.is_root());
    let (id, mode) = (&request.id, &host.cgroup);
    if !request.global.systemd_cgroup {
        let rootless = unprivileged || namespaced;
        let options = PlanOptions { rootless };
        return Ok((cgroup::plan(config, id, mode, options)?, None));
    }
    let (mut manager, rootless) = cgroup::manager_for(unprivileged, namespaced)?;
    let options = PlanOptions { rootless };
    let facts = manager.facts()?;
    let plan = cgroup::plan_unit(config, id, mode, options, &facts)?;
    Ok((plan, Some(manager)))
}

fn check_terminal(spec: &CheckedSpec, request: &Request<'_>) -> Result<()> {
    let terminal = spec
        .spec()
        .process()
        .as_ref()
        .is_some_and(|process| process.terminal().unwrap_or(false));
    terminal_fits(
        terminal,
        request.foreground,
        request.console_socket.is_some(),
    )
}

/// A terminal has to have somebody at its other end.
pub fn terminal_fits(terminal: bool, foreground: bool, console_socket: bool) -> Result<()> {
    if terminal && !foreground && !console_socket {
        return Err(Error::invalid(
            "cannot allocate tty if runc will detach without setting console socket",
        ));
    }
    if console_socket && (!terminal || foreground) {
        return Err(Error::invalid(
            "cannot use console socket if runc will not detach or allocate tty",
        ));
    }
    Ok(())
}

fn check_rootfs(path: &Path) -> Result<()> {
    match rustix::fs::lstat(path) {
        Ok(stat)
            if rustix::fs::FileType::from_raw_mode(stat.st_mode)
                == rustix::fs::FileType::Directory =>
        {
            Ok(())
        }
        // Whoever may change the link could point it elsewhere between two looks.
        Ok(stat)
            if rustix::fs::FileType::from_raw_mode(stat.st_mode)
                == rustix::fs::FileType::Symlink =>
        {
            Err(Error::invalid(
                "invalid rootfs: not an absolute path, or a symlink",
            ))
        }
        Ok(_) => Err(Error::invalid(format!(
            "rootfs ({}) is not a directory",
            path.display()
        ))),
        Err(rustix::io::Errno::NOENT) => Err(Error::new(
            Kind::NotFound,
            format!(
                "invalid rootfs: stat {}: no such file or directory",
                path.display()
            ),
            "",
        )),
        Err(error) => Err(Error::system(
            "invalid rootfs: stat",
            path.display().to_string(),
            error,
        )),
    }
}

fn owner(uid: u32) -> String {
    if uid == 0 {
        return "root".to_owned();
    }
    std::fs::File::open("/etc/passwd")
        .ok()
        .and_then(|file| user_name(std::io::BufReader::new(file), uid))
        .unwrap_or_else(|| uid.to_string())
}

/// getpwuid(3) would load what nsswitch.conf names into a static program, and may crash in it.
fn user_name(passwd: impl std::io::BufRead, uid: u32) -> Option<String> {
    passwd
        .lines()
        .map_while(std::result::Result::ok)
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let id: u32 = fields.nth(1)?.parse().ok()?;
            (id == uid).then(|| name.to_owned())
        })
}

/// A started child and what belongs to it, before its directory is unlocked.
struct Started {
    record: ContainerRecord,
    plan: Plan,
    state: State,
    cgroup: Cgroup,
    pidfd: OwnedFd,
    master: Option<OwnedFd>,
    channel: Channel,
}

impl Started {
    fn with_entry(self, entry: Entry) -> Launched {
        Launched {
            record: self.record,
            plan: self.plan,
            state: self.state,
            entry,
            cgroup: self.cgroup,
            pidfd: self.pidfd,
            master: self.master,
            channel: self.channel,
        }
    }
}

fn start(
    prepared: Prepared,
    intent: &Intent,
    undo: &mut Undo,
    (global, pid_file): (&GlobalArgs, Option<&Path>),
) -> Result<Started> {
    let Prepared {
        host,
        plan,
        cgroup_plan,
        systemd,
        resctrl,
        mut state,
        mut record,
        host_root,
        console,
        ..
    } = prepared;
    // A plan that was refused, because the cgroup is another's, has made nothing.
    let mut cgroup = cgroup_plan.create()?;
    if cgroup.is_none() && systemd.is_none() {
        // Out of reach, which only a rootless container's may be.
        record.rootless_cgroups = true;
        if !plan.namespaces.new_pid {
            log::warning(global, WITHOUT_CGROUP);
        }
    }
    undo.cgroup = Some(cgroup.clone());
    record.cgroup = cgroup.record();
    if let Some(root) = &host_root {
        root.attach()?;
        undo.mounts = record.mounts.clone();
    }
    let gate = plan
        .gated
        .then(|| gate::create(intent.entry()))
        .transpose()?;
    let (channel, theirs) = Channel::pair()?;
    let child = Child {
        plan: &plan,
        state: &state,
        gate: gate.as_ref(),
        host_root: host_root.as_ref(),
    };
    let (channel, pid, pidfd) = child.make(channel, theirs, &cgroup, undo)?;
    drop(gate);
    log::debug(global, || {
        let flags = plan.namespaces.clone_flags;
        format!("nsexec container setup: cloned pid {pid} with flags {flags:#x}")
    });

    state.pid = pid;
    if let Some(mut manager) = systemd {
        cgroup = cgroup_plan.start_unit(&mut manager, pid)?;
        undo.cgroup = Some(cgroup.clone());
        record.cgroup = cgroup.record();
    }
    if plan.namespaces.waits_for_maps() {
        write_maps(&plan, &host, pid)?;
    }
    if plan.namespaces.waits() {
        channel.proceed()?;
    }
    if plan.namespaces.network_apart {
        network::make(&channel)?;
    }
    cgroup
        .apply_limits(&cgroup_plan)
        .map_err(|error| conversation::last_words(&channel, pidfd.as_fd()).unwrap_or(error))?;
    if let Some(resctrl) = resctrl {
        undo.resctrl = Some(resctrl.record().clone());
        resctrl.apply(pid)?;
    }
    netdev::move_to(&plan, pid)?;
    if let Some(adjustment) = plan.process.oom_score_adj {
        process::set_oom_score_adj(pid, adjustment)?;
    }
    undo.poststop(&plan, &state);
    if plan.waits_for_limits {
        channel.proceed()?;
    }
    let mut conversation = Conversation {
        channel: &channel,
        seccomp: plan.process.seccomp.as_ref(),
        hooks: Some((&plan.hooks, &record.bundle)),
        sources: Some(Sources::new(&plan, &host, pid)),
        state: &state,
        console,
        master: None,
    };
    conversation
        .until(Goal::Built, pid)
        .map_err(|error| explain(error, &cgroup))?;
    let master = conversation.master;
    log::debug(global, || {
        format!("child process in init(): pid {pid} has built its root")
    });

    record.init_pid = pid;
    record.init_start_time = process_start_time(pid)?;
    record.created = coracle_oci::time::rfc3339_nano(std::time::SystemTime::now());
    record.namespaces = namespaces(&plan, pid);
    intent.commit(&record, &prepared.config)?;
    if let Some(socket) = prepared.pidfd_socket {
        socket.send(pidfd.as_fd(), b"pidfd")?;
    }
    if let Some(path) = pid_file {
        write_pid_file(path, pid)?;
    }
    Ok(Started {
        record,
        plan,
        state,
        cgroup,
        pidfd,
        master,
        channel,
    })
}

/// The id maps of a new user namespace, and what is set before they hold.
fn write_maps(plan: &Plan, host: &HostFacts, pid: i32) -> Result<()> {
    let maps = idmap::Maps {
        uid: &plan.namespaces.uid_map,
        gid: &plan.namespaces.gid_map,
        setgroups: plan.namespaces.setgroups_allowed,
    };
    if !plan.namespaces.needs_stage() {
        let limits = process::with_room_for_files(&plan.process.rlimits);
        process::set_limits(Some(pid), &limits)?;
    }
    idmap::write(pid, maps, host)
}

/// An init that was killed could not say why; the memory cgroup knows the usual reason.
fn explain(error: Error, cgroup: &Cgroup) -> Error {
    if cgroup.oom_kills().is_ok_and(|kills| kills > 0) {
        return Error::new(
            error.kind(),
            "container init was OOM-killed (memory limit too low?)",
            "",
        );
    }
    error
}

/// The namespaces of the container that differ from the host's, as exec joins them.
fn namespaces(plan: &Plan, pid: i32) -> Vec<NamespaceRecord> {
    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Time, User, Uts};
    let namespaces = &plan.namespaces;
    [User, Ipc, Uts, Network, Pid, Mount, Cgroup, Time]
        .into_iter()
        .filter(|kind| {
            namespaces.joins.iter().any(|join| join.kind == *kind)
                || namespaces.clone_flags & crate::plan::namespace_flag(*kind) != 0
                || (*kind == Network && namespaces.new_network)
                || (*kind == Cgroup && namespaces.new_cgroup)
                || (*kind == Time && namespaces.new_time)
                || (*kind == Ipc && namespaces.late_ipc)
        })
        .map(|kind| NamespaceRecord {
            kind: namespace_file(kind).to_owned(),
            path: PathBuf::from(format!("/proc/{pid}/ns/{}", namespace_file(kind))),
        })
        .collect()
}

/// Written beside and renamed: a reader that sees the file sees the whole number.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}"));
    std::fs::write(&temporary, pid.to_string())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| Error::system("write pid file", path.display().to_string(), error))
}

/// What the clone needs.
struct Child<'a> {
    plan: &'a Plan,
    state: &'a State,
    gate: Option<&'a OwnedFd>,
    host_root: Option<&'a HostRoot>,
}

impl Child<'_> {
    /// Clones the container's init: at once, or by way of the stage.
    fn make(
        &self,
        mine: Channel,
        theirs: Channel,
        cgroup: &Cgroup,
        undo: &mut Undo,
    ) -> Result<(Channel, i32, OwnedFd)> {
        let namespaces = &self.plan.namespaces;
        let target = cgroup.clone_into()?;
        let joins = cgroup.self_join()?;
        let staged = namespaces.needs_stage();
        let flags = if staged { 0 } else { namespaces.clone_flags };
        let restore = if staged {
            None
        } else {
            enter_pid_namespace(self.plan)?
        };
        let side = clone(flags, target.as_ref().map(AsFd::as_fd))?;
        if let Side::Child = side {
            // The parent's end: with a copy of it open here, its death would go unnoticed.
            drop(mine);
            if let Err(error) = init::join_cgroup(&joins) {
                let _ = theirs.report_failure(&error);
                coracle_sys::clone::exit_now(1)
            }
            if staged {
                let stage::Staged::Init = stage::run(self.plan, &theirs);
            }
            init::run(Inheritance {
                plan: self.plan,
                state: self.state,
                channel: &theirs,
                gate: self.gate,
                host_root: self.host_root.map(|root| &root.tree),
                staged,
            })
        }
        let Side::Parent { pid, pidfd } = side else {
            return Err(Error::new(
                Kind::Internal,
                "clone returned to neither side",
                "",
            ));
        };
        if let Some(own) = restore {
            init::enter(c"/proc/self/ns/pid", LinuxNamespaceType::Pid, &own)?;
        }
        drop(theirs);
        let (pid, pidfd) = if staged {
            cloned_by_stage(&mine, pid)?
        } else {
            (pid, pidfd)
        };
        let (pid, pidfd) = undo.child(pid, pidfd)?;
        Ok((mine, pid, pidfd))
    }
}

/// What a stage has cloned; the stage itself is reaped.
///
/// # Errors
/// It failed.
pub fn cloned_by_stage(channel: &Channel, stage: i32) -> Result<(i32, OwnedFd)> {
    let cloned = channel.next();
    process::reap(stage)?;
    match cloned? {
        Report::Cloned(pid, pidfd) => Ok((pid, pidfd)),
        Report::Failed(error) => Err(error),
        _ => Err(Error::new(
            Kind::Internal,
            "the stage ended without a report",
            "",
        )),
    }
}

/// A joined pid namespace takes effect for children only, so the parent is the one to enter it.
/// Gives back its own, to be entered again after the clone: hooks are not the container's.
fn enter_pid_namespace(plan: &Plan) -> Result<Option<OwnedFd>> {
    let Some(join) = plan
        .namespaces
        .joins
        .iter()
        .find(|j| j.kind == LinuxNamespaceType::Pid)
    else {
        return Ok(None);
    };
    let open = |path: &std::ffi::CStr| {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty())
            .map_err(|error| Error::system("open namespace", path.to_string_lossy(), error))
    };
    let own = open(c"/proc/self/ns/pid")?;
    init::enter(&join.path, join.kind, &open(&join.path)?)?;
    Ok(Some(own))
}

impl Launched {
    /// Lets the init go: to the gate, or to its program.
    ///
    /// # Errors
    /// It does not get there.
    pub fn release(&self, global: &GlobalArgs) -> Result<()> {
        self.channel.proceed()?;
        let mut conversation = Conversation {
            channel: &self.channel,
            seccomp: self.plan.process.seccomp.as_ref(),
            hooks: None,
            sources: None,
            state: &self.state,
            console: None,
            master: None,
        };
        let goal = if self.plan.gated {
            Goal::Ready
        } else {
            Goal::Executed
        };
        conversation.until(goal, self.record.init_pid)?;
        log::debug(global, || {
            "init: closing the pipe to signal completion".to_owned()
        });
        if goal == Goal::Ready {
            log::debug(global, || "init: about to wait on exec fifo".to_owned());
        }
        Ok(())
    }

    /// Takes the container back after it did not get there. The error with those of the undoing.
    pub fn give_up(&self, error: Error) -> Error {
        let error = error.context(NOT_STARTED);
        match self.end().and_then(|()| self.destroy()) {
            Ok(()) => error,
            Err(undo) => Error::new(error.kind(), format!("{error:#} (undo: {undo:#})"), ""),
        }
    }

    /// Kills the init, whatever it is doing, and reaps it.
    ///
    /// # Errors
    /// It is no child of this process any more.
    pub fn end(&self) -> Result<()> {
        process::end(self.record.init_pid, self.pidfd.as_fd())
    }

    /// Ends the container and forgets it; collects what fails on the way. Nothing is left to do where
    /// a `delete` was faster: the id, and the path of the cgroup, may be another container's by now.
    ///
    /// # Errors
    /// Every failure, joined.
    pub fn destroy(&self) -> Result<()> {
        let _lock = match self.entry.lock() {
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            lock => lock?,
        };
        undo::destroy(
            &self.record,
            &self.cgroup,
            &self.entry,
            &self.plan.hooks,
            &self.state,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_names() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbad\n\nu:x:7:8::/:\n";
        for (uid, want) in [(0, Some("root")), (7, Some("u")), (8, None)] {
            assert_eq!(user_name(passwd.as_bytes(), uid).as_deref(), want);
        }
    }
}
