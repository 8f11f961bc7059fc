//! systemd's Manager interface: the few calls that a container runtime needs.
//!
//! ```text
//! start: StartTransientUnit --UnitExists--> ResetFailedUnit, once more
//!                           --job--> JobRemoved: done | anything else: ResetFailedUnit, error
//! stop:  StopUnit --job--> JobRemoved, ResetFailedUnit          (no such unit: stopped)
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::address::{self, Scope, Way};
use super::connection::{Connection, Refusal, Target};
use super::wire::{Message, Value};
use super::{properties, unit};
use crate::error::{Error, Kind, Result};

/// How long systemd may take for a job.
const JOB_TIMEOUT: Duration = Duration::from_secs(30);

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PATH: &str = "/org/freedesktop/systemd1";

/// Name and value, as systemd takes them.
pub type Property = (String, Value);

/// What a plan depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub scope: Scope,
    /// 0 if systemd does not say.
    pub version: u32,
    /// The cgroup that a user's manager has its units in, relative; empty for the system's.
    pub control_group: PathBuf,
    /// /proc/devices, for a systemd that knows majors by name only.
    pub proc_devices: String,
}

#[derive(Debug)]
pub struct Manager {
    connection: Connection,
    scope: Scope,
    listening: bool,
}

impl Manager {
    /// Connects to the systemd of the host or of the user.
    ///
    /// # Errors
    /// systemd does not run here, or cannot be reached.
    pub fn connect(scope: Scope) -> Result<Manager> {
        if !is_running() {
            return Err(Error::unsupported(
                "systemd not running on this host, cannot use systemd cgroups manager",
            ));
        }
        let mut failure = None;
        for way in address::ways(scope)? {
            let connection = match &way {
                Way::Bus(socket) => Connection::bus(socket),
                Way::Direct(socket) => Connection::direct(socket),
            };
            match connection {
                Ok(connection) => return Ok(Manager::over(connection, scope)),
                // The bus is what is expected: its failure says more than the fallback's.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let failure = failure.unwrap_or_else(|| Error::unsupported("no address"));
        Err(failure.context(
            "failed to connect to dbus (hint: for rootless containers, maybe you need to install \
             dbus-user-session package)",
        ))
    }

    pub fn over(connection: Connection, scope: Scope) -> Manager {
        Manager {
            connection,
            scope,
            listening: false,
        }
    }

    pub fn facts(&mut self) -> Result<Facts> {
        let version = self.property(PATH, MANAGER, "Version")?;
        let version = version.as_text().and_then(unit::version_number);
        let mut control_group = PathBuf::new();
        if self.scope == Scope::User {
            let found = self.property(PATH, MANAGER, "ControlGroup")?;
            let path = Path::new(found.as_text().unwrap_or_default());
            let climbs = |path: &Path| path.components().any(|c| c.as_os_str() == "..");
            control_group = match path.strip_prefix("/") {
                Ok(below) if !climbs(below) => below.to_owned(),
                _ => {
                    return Err(Error::new(
                        Kind::System,
                        "systemd's ControlGroup is no path:",
                        format!("{found:?}"),
                    ));
                }
            };
        }
        let version = version.unwrap_or(0);
        let mut proc_devices = String::new();
        if version < properties::DEVICE_MAJOR {
            proc_devices = std::fs::read_to_string("/proc/devices").unwrap_or_default();
        }
        Ok(Facts {
            scope: self.scope,
            version,
            control_group,
            proc_devices,
        })
    }

    /// The user that the bus takes this process for.
    pub fn user_on_bus(&mut self) -> Result<Option<u32>> {
        self.connection.user_on_bus()
    }

    /// Starts a transient unit and waits until it has started.
    ///
    /// # Errors
    /// systemd refuses a property, the job fails or takes too long. No unit is left then, unless
    /// one with this name was there before.
    pub fn start(&mut self, name: &str, properties: &[Property]) -> Result<()> {
        let deadline = Instant::now() + JOB_TIMEOUT;
        let mut started = self.start_once(name, properties);
        if started
            .as_ref()
            .is_err_and(|error| is_named(error, "UnitExists"))
        {
            // The leftover of a unit that failed, most often: then it goes when told to.
            let _ = self.reset_failed(name);
            started = self.start_once(name, properties);
        }
        let failed = |error: Error| error.context(format!("unable to start unit {name:?}"));
        let job = started.map_err(failed)?;
        let result = self.job_result(&job, deadline);
        match result {
            Ok(Some(result)) if result == "done" => return Ok(()),
            Ok(Some(result)) => {
                let _ = self.reset_failed(name);
                Err(Error::new(
                    Kind::System,
                    format!("error creating systemd unit `{name}`: got `{result}`"),
                    "",
                ))
            }
            // It may still come: it must not stay.
            Ok(None) => {
                let _ = self.stop(name);
                Err(Error::new(
                    Kind::System,
                    format!("timeout waiting for systemd to create {name}"),
                    "",
                ))
            }
            Err(error) => Err(error),
        }
        .map_err(failed)
    }

    fn start_once(&mut self, name: &str, properties: &[Property]) -> Result<Message> {
        self.listen()?;
        let body = vec![
            Value::text(name),
            Value::text("replace"),
            pairs(properties),
            Value::Array("(sa(sv))".into(), Vec::new()),
        ];
        self.connection.call(manager(), "StartTransientUnit", body)
    }

    /// Stops a unit, waits until it has stopped, and has a failed one forgotten. A unit that is
    /// not there is stopped.
    ///
    /// # Errors
    /// systemd refuses or takes too long.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let deadline = Instant::now() + JOB_TIMEOUT;
        self.listen()?;
        let body = vec![Value::text(name), Value::text("replace")];
        let stopped = self.connection.call(manager(), "StopUnit", body);
        match stopped {
            Ok(job) => {
                if self.job_result(&job, deadline)?.is_none() {
                    return Err(Error::new(
                        Kind::System,
                        format!("timed out while waiting for systemd to remove {name}"),
                        "",
                    ));
                }
            }
            Err(error) if is_named(&error, "NoSuchUnit") => return Ok(()),
            Err(error) => {
                let _ = self.reset_failed(name);
                return Err(error.context(format!("unable to stop unit {name:?}")));
            }
        }
        // Not failed is the usual case, and an error to systemd.
        let _ = self.reset_failed(name);
        Ok(())
    }

    pub fn reset_failed(&mut self, name: &str) -> Result<()> {
        let body = vec![Value::text(name)];
        self.connection
            .call(manager(), "ResetFailedUnit", body)
            .map(|_| ())
    }

    /// Changes properties until the next boot, that is for as long as the unit lives.
    pub fn set(&mut self, name: &str, properties: &[Property]) -> Result<()> {
        let body = vec![Value::text(name), Value::Bool(true), pairs(properties)];
        self.connection
            .call(manager(), "SetUnitProperties", body)
            .map(|_| ())
            .map_err(|error| error.context("unable to set unit properties"))
    }

    /// Has systemd move a process into the unit, `below` its cgroup: who may not write to the
    /// cgroups on the way cannot do it himself.
    pub fn attach(&mut self, name: &str, below: &str, pid: i32) -> Result<()> {
        let body = vec![
            Value::text(name),
            Value::text(format!("/{}", below.trim_matches('/'))),
            Value::Array("u".into(), vec![Value::U32(pid.unsigned_abs())]),
        ];
        self.connection
            .call(manager(), "AttachProcessesToUnit", body)
            .map(|_| ())
    }

    /// A property of a unit, of one of its interfaces: `Unit`, `Scope`.
    pub fn unit_property(&mut self, name: &str, interface: &str, property: &str) -> Result<Value> {
        let interface = format!("{SYSTEMD}.{interface}");
        self.property(&unit::object_path(name), &interface, property)
    }

    fn property(&mut self, path: &str, interface: &str, property: &str) -> Result<Value> {
        let target = Target {
            destination: SYSTEMD,
            path,
            interface: "org.freedesktop.DBus.Properties",
        };
        let body = vec![Value::text(interface), Value::text(property)];
        let mut reply = self.connection.call(target, "Get", body)?;
        match reply.body.pop() {
            Some(Value::Variant(value)) => Ok(*value),
            other => Err(Error::new(
                Kind::System,
                format!("systemd's {property} is no variant:"),
                format!("{other:?}"),
            )),
        }
    }

    fn listen(&mut self) -> Result<()> {
        if !self.listening {
            self.connection.add_match(
                "type='signal',sender='org.freedesktop.systemd1',\
                 path='/org/freedesktop/systemd1',\
                 interface='org.freedesktop.systemd1.Manager',member='JobRemoved'",
            )?;
            self.listening = true;
        }
        Ok(())
    }

    /// The result of the job that a call has answered with; `None` if it does not end in time.
    fn job_result(&mut self, reply: &Message, deadline: Instant) -> Result<Option<String>> {
        let Some(Value::Path(job)) = reply.body.first() else {
            return Err(Error::new(
                Kind::System,
                "systemd answered without a job",
                "",
            ));
        };
        let signal = self.connection.signal(deadline, |signal| {
            // Any peer of the bus may send us such a signal: only who has the job may end it.
            signal.sender == reply.sender
                && signal.interface == MANAGER
                && signal.member == "JobRemoved"
                && matches!(signal.body.get(1), Some(Value::Path(path)) if path == job)
        })?;
        let result = |signal: Message| {
            let result = signal.body.get(3).and_then(Value::as_text);
            result.unwrap_or_default().to_owned()
        };
        Ok(signal.map(result))
    }
}

fn manager() -> Target<'static> {
    Target {
        destination: SYSTEMD,
        path: PATH,
        interface: MANAGER,
    }
}

fn pairs(properties: &[Property]) -> Value {
    let pair = |(name, value): &Property| {
        Value::Struct(vec![Value::text(name.clone()), value.clone().variant()])
    };
    Value::Array("(sv)".into(), properties.iter().map(pair).collect())
}

fn is_named(error: &Error, name: &str) -> bool {
    let refusal = Refusal::name_of(error).and_then(|full| full.strip_prefix(SYSTEMD));
    refusal.is_some_and(|short| short.strip_prefix('.') == Some(name))
}

/// The test of sd_booted(3).
fn is_running() -> bool {
    std::fs::symlink_metadata("/run/systemd/system").is_ok_and(|found| found.is_dir())
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
