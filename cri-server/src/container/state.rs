//! Owns the life cycle of a container and the one function that decides what a request may do.
//!
//! ```text
//! Creating -> Created -> Starting -> Running -> Exited -> Removing -> (gone)
//!                 |          |                    ^
//!                 |          +- start failed -----+
//!                 +---------------------------------------> Removing
//! ```

use serde::{Deserialize, Serialize};

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, 128 + signal when killed.
    pub code: i32,
    /// Completed, Error, OOMKilled, StartError or Unknown.
    pub reason: String,
    /// More about it, for people.
    pub message: String,
    /// When it had started; 0: never.
    pub started_at_ns: i64,
    /// When it ended.
    pub finished_at_ns: i64,
}

impl Exit {
    /// A process that ended, as the shim or its exit record tells it.
    pub fn of_process(status: u32, at_ns: i64, oom_killed: bool, started_at_ns: i64) -> Exit {
        let reason = match (oom_killed, status) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        Exit {
            code: i32::try_from(status).unwrap_or(255),
            reason: reason.to_owned(),
            message: String::new(),
            started_at_ns,
            finished_at_ns: at_ns,
        }
    }

    /// A container whose end nobody saw.
    pub fn unknown(message: &str, started_at_ns: i64, at_ns: i64) -> Exit {
        Exit {
            code: 137,
            reason: "Unknown".to_owned(),
            message: message.to_owned(),
            started_at_ns,
            finished_at_ns: at_ns,
        }
    }

    /// A container that could not be started.
    pub fn start_error(message: String, at_ns: i64) -> Exit {
        Exit {
            code: 128,
            reason: "StartError".to_owned(),
            message,
            started_at_ns: 0,
            finished_at_ns: at_ns,
        }
    }
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "is")]
pub enum ContainerState {
    /// Being made; nobody has been told its id.
    Creating,
    /// Made: it has a root file system and a spec, and no process.
    Created,
    /// The shim is starting it.
    Starting,
    /// Its first process runs.
    Running {
        /// Pid on the host.
        pid: u32,
        /// Since when.
        started_at_ns: i64,
    },
    /// It has ended.
    Exited {
        /// How.
        exit: Exit,
    },
    /// Being removed.
    Removing {
        /// How it had ended.
        exit: Exit,
    },
}

/// What is asked of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Run a process in it, attach to it, or reopen its log.
    Reach,
    /// Change its limits.
    Update,
    /// Remove it.
    Remove,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on with it.
    Proceed,
    /// Kill it first, then remove it.
    KillFirst,
    /// Nothing is left to do.
    AlreadyDone,
    /// No; the reason completes "container is ...".
    Deny(&'static str),
}

/// Decides; looks at nothing but its arguments.
pub fn decide(state: &ContainerState, request: Request) -> Decision {
    use ContainerState::{Created, Creating, Exited, Removing, Running, Starting};
    use Decision::{AlreadyDone, Deny, KillFirst, Proceed};
    match (request, state) {
        (Request::Start, Created) => Proceed,
        (Request::Start, Creating) => Deny("still being created"),
        (Request::Start, Starting) => Deny("already being started"),
        (Request::Start, Running { .. }) => Deny("already running"),
        (Request::Start, Exited { .. }) => Deny("in exited state: it cannot be started again"),
        (Request::Start, Removing { .. }) => Deny("being removed"),

        (Request::Stop, Running { .. } | Starting) => Proceed,
        (Request::Stop, Creating | Created | Exited { .. } | Removing { .. }) => AlreadyDone,

        (Request::Reach, Running { .. }) => Proceed,
        (Request::Reach, Creating | Created | Starting) => Deny("not running: it was not started"),
        (Request::Reach, Exited { .. } | Removing { .. }) => Deny("not running: it has exited"),

        (Request::Update, Created | Running { .. }) => Proceed,
        (Request::Update, Creating | Starting) => Deny("being started"),
        (Request::Update, Exited { .. } | Removing { .. }) => Deny("not running: it has exited"),

        (Request::Remove, Running { .. } | Starting) => KillFirst,
        (Request::Remove, Creating | Created | Exited { .. } | Removing { .. }) => Proceed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decide_over_every_state_and_request() {
        use Decision::{AlreadyDone, Deny, KillFirst, Proceed};
        let exit = Exit::unknown("", 0, 0);
        let running = ContainerState::Running {
            pid: 1,
            started_at_ns: 1,
        };
        let exited = ContainerState::Exited { exit: exit.clone() };
        let removing = ContainerState::Removing { exit };
        let unstarted = Deny("not running: it was not started");
        let ended = Deny("not running: it has exited");
        let again = Deny("in exited state: it cannot be started again");
        // Columns: Start, Stop, Reach, Update, Remove.
        for (state, expected) in [
            (
                ContainerState::Creating,
                [
                    Deny("still being created"),
                    AlreadyDone,
                    unstarted,
                    Deny("being started"),
                    Proceed,
                ],
            ),
            (
                ContainerState::Created,
                [Proceed, AlreadyDone, unstarted, Proceed, Proceed],
            ),
            (
                ContainerState::Starting,
                [
                    Deny("already being started"),
                    Proceed,
                    unstarted,
                    Deny("being started"),
                    KillFirst,
                ],
            ),
            (
                running,
                [
                    Deny("already running"),
                    Proceed,
                    Proceed,
                    Proceed,
                    KillFirst,
                ],
            ),
            (exited, [again, AlreadyDone, ended, ended, Proceed]),
            (
                removing,
                [Deny("being removed"), AlreadyDone, ended, ended, Proceed],
            ),
        ] {
            let requests = [
                Request::Start,
                Request::Stop,
                Request::Reach,
                Request::Update,
                Request::Remove,
            ];
            let decided = requests.map(|request| decide(&state, request));
            assert_eq!(decided, expected, "{state:?}");
        }
    }

    #[test]
    fn reason_follows_code_and_oom() {
        let reason = |status, oom| Exit::of_process(status, 2, oom, 1).reason;
        assert_eq!(reason(0, false), "Completed");
        assert_eq!(reason(1, false), "Error");
        assert_eq!(reason(137, true), "OOMKilled");
    }
}
