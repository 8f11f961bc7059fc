//! `start`: lets the program of a created container begin.

use std::os::fd::AsFd as _;
use std::process::ExitCode;

use coracle_oci::ContainerId;
use coracle_oci::record::ContainerRecord;
use coracle_oci::spec::Hook;
use coracle_oci::state::{State, Status};

use super::GlobalArgs;
use super::kill::SIGKILL;
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::hooks;
use crate::launch::gate;
use crate::launch::notify::{self, NotifySocket};
use crate::state::{Decision, Request, Store, decide, is_alive, open_process, status};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let id = ContainerId::parse(&args.id).map_err(|error| Error::invalid(error.to_string()))?;
    let entry = Store::open(&global.root).entry(&id)?;
    let lock = entry.lock()?;
    let record = entry.record()?;
    match decide(status(&record, entry.path())?, Request::Start) {
        Decision::Do => {}
        Decision::AlreadyDone => return Ok(ExitCode::SUCCESS),
        Decision::Deny(reason) => return Err(reason.error(&id)),
    }
    let notify = match notify::host() {
        Some(host) => NotifySocket::bind(&entry, host, record.init_pid)?,
        None => None,
    };
    let init = notify
        .as_ref()
        .map(|_| open_process(record.init()))
        .transpose()?
        .flatten();
    gate::open(&entry, is_alive(record.init()))?;
    drop(lock);
    let hooks = poststart(&entry.config()?)?;
    let state = State::new(&record, Status::Running);
    if let Err(failed) = hooks::run("poststart", &hooks, &state, Some(&record.bundle)) {
        end(&record)?;
        return Err(failed);
    }
    if let (Some(notify), Some(init)) = (notify, init) {
        notify.wait(init.as_fd())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A failed poststart hook ends the container, as with runc; `delete` does the rest.
fn end(record: &ContainerRecord) -> Result<()> {
    if !record.private_pid_namespace {
        Cgroup::open(&record.cgroup).kill_all()?;
    }
    match open_process(record.init())? {
        Some(init) => coracle_sys::signal::send(&init, SIGKILL)
            .map_err(|error| Error::system("unable to signal init", "", error)),
        None => Ok(()),
    }
}

/// A config without the word has no such hooks: most are not parsed again.
fn poststart(config: &[u8]) -> Result<Vec<Hook>> {
    let word = b"\"poststart\"";
    if !config.windows(word.len()).any(|window| window == word) {
        return Ok(Vec::new());
    }
    let parsed = coracle_oci::config::parse(config)
        .map_err(|error| Error::new(crate::Kind::Invalid, "", "").source(error))?;
    let hooks = parsed
        .spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().clone());
    Ok(hooks.unwrap_or_default())
}
