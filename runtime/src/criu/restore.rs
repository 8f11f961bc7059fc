//! `restore`: a container whose processes come out of images.
//!
//! ```text
//! prepare, open everything     nothing has happened yet
//! begin (intent on disk)       from here every failure is undone
//! cgroup -> root, CRIU started in its own mount namespace -> CRIU into the cgroup -> limits
//! setup-namespaces: hooks      post-restore: record committed      then CRIU lets them run
//! ```

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_oci::record::{ContainerRecord, NamespaceRecord};
use coracle_oci::spec::LinuxNamespaceType;
use coracle_oci::state::State;
use rustix::fs::{Mode, OFlags};

use super::rpc::{self, CgroupRoot, InheritFd, JoinNamespace, Notify, Request, RequestType};
use super::swrk::{Criu, Notified, Swrk};
use super::{Directories, EXTERNAL_NETWORK, EXTERNAL_PID, OLDEST, Options};
use super::{config_file, descriptors, mounts, namespace_key};
use super::{need_mount_namespace, quote, root};
use crate::cgroup::Cgroup;
use crate::cli::GlobalArgs;
use crate::console::ConsoleSocket;
use crate::error::{Error, Kind, Result};
use crate::launch::undo::{self, Undo};
use crate::launch::{self, Prepared, notify, write_pid_file};
use crate::log;
use crate::plan::{Plan, namespace_file};
use crate::state::{Entry, Intent, Store, process_start_time};

/// The first version in which another security label works.
const CHANGES_LABELS: i32 = 31_600;

const LOG: &str = "restore.log";

/// A directory of the container's own for its root to be mounted at.
const ROOT: &str = "criu-root";

/// What a restore has on its command line beside what a checkpoint has, too.
#[derive(Debug, Default)]
pub struct Extra {
    pub lsm_profile: Option<String>,
    pub lsm_mount_context: Option<String>,
}

/// A container that runs again.
#[derive(Debug)]
pub struct Restored {
    pub record: ContainerRecord,
    pub plan: Plan,
    pub state: State,
    pub entry: Entry,
    pub cgroup: Cgroup,
    /// The terminal, unless it went to a console socket.
    pub master: Option<OwnedFd>,
}

impl Restored {
    /// Gives everything back once the container has ended.
    ///
    /// # Errors
    /// Every failure, joined.
    pub fn destroy(&self) -> Result<()> {
        undo::destroy(
            &self.record,
            &self.cgroup,
            &self.entry,
            &self.plan.hooks,
            &self.state,
        )
    }
}

/// Makes the container from its images.
///
/// # Errors
/// CRIU is missing, too old, or fails; nothing is left behind then.
pub fn restore(request: launch::Request<'_>, options: &Options, extra: &Extra) -> Result<Restored> {
    let global = request.global;
    let pid_file = request.pid_file.map(Path::to_owned);
    let terminal = request.console_socket.is_some() || request.foreground;
    let criu = Criu::find(OLDEST)?;
    let directories = Directories::open(options, LOG)?;
    let mut opts = directories.options(options);
    opts.evasive_devices = Some(true);
    opts.rst_sibling = Some(true);
    labels(&mut opts, extra, criu)?;
    opts.inherit_fd = descriptors::read(&directories.images)?;
    let prepared = launch::prepare(request)?;
    need_mount_namespace(&prepared.plan)?;
    opts.config_file = config_file(&prepared.record.annotations);
    let files = namespaces(&mut opts, &prepared.plan, criu)?;

    let store = Store::open(&global.root);
    let intent = store.begin(&prepared.record.id, || prepared.intent())?;
    let mut undo = Undo::default();
    let attempt = Attempt {
        options,
        opts,
        files,
        log: &directories.log,
        pid_file: pid_file.as_deref(),
        stdio: !(prepared.plan.process.terminal && terminal),
        global,
    };
    match attempt.run(prepared, &intent, &mut undo) {
        Ok(started) => Ok(started.with_entry(intent.finish())),
        Err(error) => {
            // CRIU has ended; whatever it has left in the cgroup is the container's.
            let killed = undo.cgroup.as_ref().map_or(Ok(()), Cgroup::kill_all);
            let error = undo.run(intent, error);
            Err(match killed {
                Ok(()) => error,
                Err(kill) => Error::new(error.kind(), format!("{error:#} (undo: {kill:#})"), ""),
            })
        }
    }
}

fn labels(opts: &mut rpc::Options, extra: &Extra, criu: Criu) -> Result<()> {
    for (flag, value, place) in [
        ("lsm-profile", &extra.lsm_profile, &mut opts.lsm_profile),
        (
            "lsm-mount-context",
            &extra.lsm_mount_context,
            &mut opts.lsm_mount_context,
        ),
    ] {
        if value.is_some() && !criu.has(CHANGES_LABELS) {
            return Err(Error::unsupported(format!(
                "--{flag} requires at least CRIU 3.16"
            )));
        }
        place.clone_from(value);
    }
    Ok(())
}

/// The namespaces that are joined: those that were external in the dump come as files, in the
/// order in which CRIU is told of them; CRIU itself enters the others by their paths.
fn namespaces(opts: &mut rpc::Options, plan: &Plan, criu: Criu) -> Result<Vec<OwnedFd>> {
    let mut files = Vec::new();
    for join in &plan.namespaces.joins {
        let name = namespace_file(join.kind);
        let path = join.path.to_string_lossy().into_owned();
        let least = match join.kind {
            LinuxNamespaceType::Network => EXTERNAL_NETWORK,
            LinuxNamespaceType::Pid => EXTERNAL_PID,
            LinuxNamespaceType::Cgroup => {
                return Err(Error::unsupported(
                    "criu cannot restore into an existing cgroup namespace",
                ));
            }
            _ => {
                opts.join_ns.push(JoinNamespace {
                    ns: name.to_owned(),
                    ns_file: path,
                });
                continue;
            }
        };
        if !criu.has(least) {
            return Err(Error::unsupported(format!(
                "criu lacks support for external {name} namespace during the restoration process \
                 (old criu version?)"
            )));
        }
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| {
                Error::system(
                    format!("requested {name} namespace does not exist: open"),
                    path,
                    error,
                )
            })?;
        opts.inherit_fd.push(InheritFd {
            key: namespace_key(name),
            fd: file.as_raw_fd(),
        });
        files.push(file);
    }
    Ok(files)
}

/// Everything that is decided before the first side effect, but for what [`Prepared`] has.
struct Attempt<'a> {
    options: &'a Options,
    opts: rpc::Options,
    files: Vec<OwnedFd>,
    log: &'a Path,
    pid_file: Option<&'a Path>,
    /// CRIU, and by it the container, has our stdio.
    stdio: bool,
    global: &'a GlobalArgs,
}

/// A restored container whose directory is still locked.
struct Started {
    record: ContainerRecord,
    plan: Plan,
    state: State,
    cgroup: Cgroup,
    master: Option<OwnedFd>,
}

impl Started {
    fn with_entry(self, entry: Entry) -> Restored {
        Restored {
            record: self.record,
            plan: self.plan,
            state: self.state,
            entry,
            cgroup: self.cgroup,
            master: self.master,
        }
    }
}

impl Attempt<'_> {
    fn run(self, prepared: Prepared, intent: &Intent, undo: &mut Undo) -> Result<Started> {
        let Prepared {
            plan,
            cgroup_plan,
            systemd,
            resctrl,
            state,
            mut record,
            console,
            config,
            ..
        } = prepared;
        if notify::host().is_some() {
            notify::make_directory(intent.entry())?;
        }
        let mut cgroup = cgroup_plan.create()?;
        undo.cgroup = Some(cgroup.clone());
        record.cgroup = cgroup.record();
        let place = make_place(intent.entry())?;
        let mut opts = self.opts;
        opts.root = Some(place.to_string_lossy().into_owned());
        let (criu, _directories) = root::in_private_mounts(&place, || {
            let places = root::mount(&plan, &place)?;
            opts.ext_mnt = mounts::of_bundle(&plan, &places);
            // CRIU works in one of them, and mounts there: it has to be of its own namespace.
            let directories = Directories::open(self.options, LOG)?;
            directories.point(&mut opts);
            Ok((Swrk::spawn(self.stdio, &self.files)?, directories))
        })?;
        match systemd {
            Some(mut manager) => {
                cgroup = cgroup_plan.start_unit(&mut manager, criu.pid())?;
                undo.cgroup = Some(cgroup.clone());
                record.cgroup = cgroup.record();
            }
            None => cgroup.join(criu.pid())?,
        }
        cgroup.apply_limits(&cgroup_plan)?;
        if let Some(resctrl) = resctrl {
            // What CRIU clones is in its groups.
            undo.resctrl = Some(resctrl.record().clone());
            resctrl.apply(criu.pid())?;
        }
        opts.cg_root = cgroup_roots(criu.pid())?;

        undo.poststop(&plan, &state);
        let mut request = Request::new(RequestType::Restore);
        log::debug(self.global, || {
            format!("Using CRIU in RESTORE mode: {opts:?}")
        });
        request.opts = Some(opts);
        let mut events = Events {
            plan: &plan,
            config: &config,
            intent,
            undo,
            record,
            state,
            console,
            master: None,
            global: self.global,
        };
        criu.ask(&request, &mut events)
            .map_err(|error| quote::explain(self.global, error, self.log))?;
        let Events {
            record,
            state,
            master,
            ..
        } = events;
        if record.init_pid == 0 {
            return Err(Error::new(Kind::System, "criu restored no process", ""));
        }
        // A directory that stays goes with the container.
        let _ = rustix::fs::rmdir(&place);
        if let Some(path) = self.pid_file {
            write_pid_file(path, record.init_pid)?;
        }
        Ok(Started {
            record,
            plan,
            state,
            cgroup,
            master,
        })
    }
}

/// An empty directory to mount the root at, as a path without links.
fn make_place(entry: &Entry) -> Result<PathBuf> {
    rustix::fs::mkdirat(entry, ROOT, Mode::from_raw_mode(0o755))
        .map_err(|error| Error::system("mkdir", ROOT, error))?;
    let path = entry.path().join(ROOT);
    std::fs::canonicalize(&path)
        .map_err(|error| Error::system("realpath", path.display().to_string(), error))
}

/// The cgroups of the processes-to-be: those that CRIU is in itself.
fn cgroup_roots(pid: i32) -> Result<Vec<CgroupRoot>> {
    let path = format!("/proc/{pid}/cgroup");
    let text =
        std::fs::read_to_string(&path).map_err(|error| Error::system("read", &path, error))?;
    let mut roots = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(place)) = (fields.next(), fields.next()) else {
            continue;
        };
        // Co-mounted controllers are told one by one; cgroup2 has the empty name.
        roots.extend(controllers.split(',').map(|controller| CgroupRoot {
            ctrl: Some(controller.to_owned()),
            path: place.to_owned(),
        }));
    }
    Ok(roots)
}

/// What happens between CRIU's steps.
struct Events<'a> {
    plan: &'a Plan,
    config: &'a [u8],
    intent: &'a Intent,
    undo: &'a mut Undo,
    record: ContainerRecord,
    state: State,
    console: Option<ConsoleSocket>,
    master: Option<OwnedFd>,
    global: &'a GlobalArgs,
}

impl Notified for Events<'_> {
    fn notified(&mut self, notify: &Notify, file: Option<OwnedFd>) -> Result<()> {
        log::debug(self.global, || format!("notify: {}", notify.script()));
        match notify.script() {
            "setup-namespaces" => {
                self.state.pid = notify.pid();
                launch::runtime_hooks(&self.plan.hooks, &self.state, &self.record.bundle)
            }
            "post-restore" => self.restored(notify.pid()),
            "orphan-pts-master" => {
                let Some(file) = file else {
                    return Err(Error::new(Kind::System, "criu sent no terminal", ""));
                };
                match &self.console {
                    Some(socket) => socket.send(file.as_fd(), b"orphan-pts-master")?,
                    None => self.master = Some(file),
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Events<'_> {
    /// The processes are there, stopped: from here on they are on record.
    fn restored(&mut self, pid: i32) -> Result<()> {
        let wanted = launch::process::pid_of(pid)?;
        let pidfd = rustix::process::pidfd_open(wanted, rustix::process::PidfdFlags::empty())
            .map_err(|error| Error::system("pidfd_open", pid.to_string(), error))?;
        self.undo.child(pid, pidfd)?;
        self.state.pid = pid;
        self.record.init_pid = pid;
        self.record.init_start_time = process_start_time(pid)?;
        self.record.created = coracle_oci::time::rfc3339_nano(std::time::SystemTime::now());
        self.record.namespaces = namespaces_of(pid)?;
        self.intent.commit(&self.record, self.config)
    }
}

/// The namespaces of a process that are not ours, in the order in which exec joins them. CRIU
/// restores into a time namespace, whatever the config says: the clocks must not jump.
fn namespaces_of(pid: i32) -> Result<Vec<NamespaceRecord>> {
    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Time, User, Uts};
    let mut found = Vec::new();
    for kind in [User, Ipc, Uts, Network, Pid, Mount, Cgroup, Time] {
        let file = namespace_file(kind);
        let path = PathBuf::from(format!("/proc/{pid}/ns/{file}"));
        let theirs = match std::fs::read_link(&path) {
            Ok(link) => link,
            // A kernel without this kind.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::system("readlink", path.display().to_string(), error)),
        };
        let own = format!("/proc/self/ns/{file}");
        let own =
            std::fs::read_link(&own).map_err(|error| Error::system("readlink", own, error))?;
        if own != theirs {
            found.push(NamespaceRecord {
                kind: file.to_owned(),
                path,
            });
        }
    }
    Ok(found)
}
