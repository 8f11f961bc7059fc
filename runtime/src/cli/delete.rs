//! `delete`: gives back everything that a container holds.
//!
//! ```text
//! record   --stopped, created or forced--> kill, cgroup, directory, poststop hooks
//! intent   --creator dead, or forced-----> kill, what it made of the cgroup, mounts, directory
//! neither  ------------------------------> directory
//! damaged  --forced----------------------> as its intent says
//! ```
//! Never kills in, or removes, a cgroup that is not the container's: an intent is older than the
//! look at what its path already holds, so it says what was there before.
//!
//! Every step is done however the others end; the first failure is reported, and the directory
//! stays for another attempt as long as anything is left that it names.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use coracle_oci::config;
use coracle_oci::record::{IntentRecord, ProcessRecord};
use coracle_oci::spec::Hook;
use coracle_oci::state::State;

use super::GlobalArgs;
use super::kill::SIGKILL;
use crate::cgroup::Cgroup;
use crate::error::{Error, Kind, Result};
use crate::hooks;
use crate::launch::host_root;
use crate::log;
use crate::resctrl;
use crate::state::{
    Begun, Container, Decision, Entry, Lock, Request, Status, Store, decide, open_process,
    parse_id, process_start_time, wait_exit,
};

const POSTSTOP: &[u8] = b"\"poststop\"";

/// How long a killed process may take to die, or a creator to give up its lock.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// forcibly deletes the container if it is still running (uses SIGKILL)
    #[arg(short, long)]
    force: bool,
}

/// # Errors
/// There is no such container (without force), its status forbids it, or something that it holds
/// cannot be given back.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let id = parse_id(&args.id)?;
    let entry = match Store::open(&global.root).entry(&id) {
        Err(error) if error.kind() == Kind::NotFound && args.force => {
            return Ok(ExitCode::SUCCESS);
        }
        found => found?,
    };
    match entry.record() {
        Ok(record) => delete_created(Container { entry, record }, args.force)?,
        Err(error) if error.kind() == Kind::NotFound => {
            let found = delete_unfinished(entry, &id, (args.force, Damage::None), global)?;
            if found == Found::Unfinished && !args.force {
                return Err(error);
            }
        }
        // What the container holds is in the intent as well.
        Err(damaged) if args.force => {
            log::warning(global, &damaged.to_string());
            delete_unfinished(entry, &id, (true, Damage::Record), global)?;
        }
        Err(error) => return Err(error),
    }
    Ok(ExitCode::SUCCESS)
}

fn delete_created(container: Container, force: bool) -> Result<()> {
    let request = Request::Delete { force };
    let status = container.status()?;
    if let Decision::Deny(reason) = decide(status, request) {
        return Err(reason.error(container.id()));
    }
    kill(&container, status)?;
    // Whoever holds the lock is not in the way any more: its container is dead.
    let lock = lock_within(&container.entry, TIMEOUT)?;
    let Some(lock) = lock else {
        return Err(locked(container.id().as_str()));
    };
    let poststop = poststop_hooks(&container.entry);
    destroy(&container, lock)?;
    // The container is gone whatever the hooks say; their failure is still the command's.
    hooks::run(
        "poststop",
        &poststop?,
        &State::new(&container.record, Status::Stopped),
        None,
    )
}

fn locked(id: &str) -> Error {
    Error::new(
        Kind::State,
        format!("container {id} is in use by another command"),
        "",
    )
}

fn lock_within(entry: &Entry, timeout: Duration) -> Result<Option<Lock>> {
    let deadline = Instant::now() + timeout;
    loop {
        match entry.try_lock()? {
            Some(lock) => return Ok(Some(lock)),
            None if Instant::now() >= deadline => return Ok(None),
            // A record lock has no event to wait for that could also time out.
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn kill(container: &Container, status: Status) -> Result<()> {
    let cgroup = container.cgroup();
    if !container.record.private_pid_namespace {
        match cgroup.kill_all() {
            Err(_) if container.record.rootless_cgroups => {}
            killed => killed?,
        }
    }
    if status == Status::Stopped {
        return Ok(());
    }
    let Some(process) = open_process(container.record.init())? else {
        return Ok(());
    };
    coracle_sys::signal::send(&process, SIGKILL)
        .map_err(|error| Error::system("unable to signal init", "", error))?;
    if status == Status::Paused {
        cgroup.thaw()?;
    }
    if wait_exit(&process, TIMEOUT)? {
        return Ok(());
    }
    Err(Error::new(Kind::System, "container init still running", ""))
}

fn destroy(container: &Container, lock: Lock) -> Result<()> {
    container
        .cgroup()
        .delete()
        .map_err(|error| error.context("unable to remove container's cgroup"))?;
    for mount in &container.record.mounts {
        host_root::remove(mount)?;
    }
    if let Some(resctrl) = &container.record.resctrl {
        resctrl::remove(resctrl)?;
    }
    container
        .entry
        .remove()
        .map_err(|error| error.context("unable to remove container state dir"))?;
    drop(lock);
    Ok(())
}

/// The poststop hooks of the config that the container was created with.
fn poststop_hooks(entry: &Entry) -> Result<Vec<Hook>> {
    let config = entry.config()?;
    // Few configs have any, and most of a config is not worth parsing to find that out.
    if !config.windows(POSTSTOP.len()).any(|part| part == POSTSTOP) {
        return Ok(Vec::new());
    }
    let parsed = config::parse(&config)
        .map_err(|error| Error::system("read the hooks of", "config.json", error))?;
    let hooks = parsed.spec.hooks().as_ref();
    Ok(hooks
        .and_then(|hooks| hooks.poststop().clone())
        .unwrap_or_default())
}

/// What is known of a container without its record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Damage {
    /// There never was one: a creation that was interrupted, or is still under way.
    None,
    /// There was one: the creation had found the cgroup free, and taken it.
    Record,
}

/// What there was behind the lock of a container without a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Unfinished,
    /// Its creator had come to the end meanwhile.
    Created,
}

fn delete_unfinished(
    entry: Entry,
    id: &coracle_oci::ContainerId,
    (force, damage): (bool, Damage),
    global: &GlobalArgs,
) -> Result<Found> {
    let intent = known_intent(&entry, force, global)?;
    let lock = match entry.try_lock()? {
        Some(lock) => lock,
        None => {
            if let Decision::Deny(reason) = decide(Status::Creating, Request::Delete { force }) {
                return Err(reason.error(id));
            }
            // Its init killed, the creator gives up and undoes what it did.
            kill_listed(intent.as_ref().map(|begun| &begun.intent))?;
            match lock_within(&entry, TIMEOUT) {
                Ok(Some(lock)) => lock,
                Ok(None) => return Err(locked(id.as_str())),
                Err(error) if error.kind() == Kind::NotFound => return Ok(Found::Unfinished),
                Err(error) => return Err(error),
            }
        }
    };
    if damage == Damage::None
        && let Ok(record) = entry.record()
    {
        drop(lock);
        delete_created(Container { entry, record }, force)?;
        return Ok(Found::Created);
    }
    // Written since, by a creator that got further than we saw.
    let intent = known_intent(&entry, force, global)?.or(intent);
    if let Some(intent) = &intent {
        undo(intent, damage)?;
    }
    entry.remove()?;
    drop(lock);
    Ok(Found::Unfinished)
}

/// The intent, if there is one. By force, one that cannot be read is as good as none: the directory
/// would stay for ever.
fn known_intent(entry: &Entry, force: bool, global: &GlobalArgs) -> Result<Option<Begun>> {
    match entry.intent() {
        Err(error) if force => {
            log::warning(
                global,
                &format!("{error}: what the container held is not known, and may be left"),
            );
            Ok(None)
        }
        found => found,
    }
}

fn kill_listed(intent: Option<&IntentRecord>) -> Result<()> {
    for process in intent.iter().flat_map(|intent| &intent.pids) {
        if let Some(fd) = open_process(*process)? {
            // Gone is as good as killed.
            let _ = coracle_sys::signal::send(&fd, SIGKILL);
            wait_exit(&fd, TIMEOUT)?;
        }
    }
    Ok(())
}

fn undo(begun: &Begun, damage: Damage) -> Result<()> {
    let intent = &begun.intent;
    kill_listed(Some(intent))?;
    let cgroup = match damage {
        Damage::None => Cgroup::open(&intent.cgroup).without(&intent.existing),
        Damage::Record => Cgroup::open(&intent.cgroup),
    };
    if is_ours(&cgroup, begun.creator)? {
        cgroup.kill_all()?;
        cgroup.delete()?;
    }
    if let Some(resctrl) = &intent.resctrl {
        resctrl::remove(resctrl)?;
    }
    for mount in intent.mounts.iter().rev() {
        host_root::remove(mount)?;
    }
    Ok(())
}

/// Whether everybody in the cgroup came after the creation had begun: for what another has made
/// between our look and our death.
fn is_ours(cgroup: &Cgroup, creator: ProcessRecord) -> Result<bool> {
    let before = |pid: &i32| {
        // One that has gone since says nothing.
        process_start_time(*pid).is_ok_and(|start_time| start_time < creator.start_time)
    };
    Ok(!cgroup.pids()?.iter().any(before))
}
