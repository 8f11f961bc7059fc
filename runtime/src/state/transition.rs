//! Which request may be served in which status. Pure; the texts are runc's, which engines match.

use coracle_oci::ContainerId;

use super::Status;
use crate::error::{Error, Kind};

/// What is asked of a container that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Start,
    Exec {
        ignore_paused: bool,
    },
    /// `all` is the obsolete flag that makes a stopped container no error.
    Kill {
        all: bool,
    },
    Pause,
    Resume,
    Update,
    Checkpoint,
    Delete {
        force: bool,
    },
    Events,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Do,
    AlreadyDone,
    Deny(Reason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    NotRunning,
    NotPaused,
    NoEvents,
    StartStopped,
    StartRunning,
    StartIn(Status),
    ExecStopped,
    ExecPaused,
    ExecCreating,
    CheckpointIn(Status),
    DeleteUnstopped(Status),
}

impl Reason {
    pub fn error(self, id: &ContainerId) -> Error {
        let text = match self {
            Reason::NotRunning => "container not running".to_owned(),
            Reason::NotPaused => "container not paused".to_owned(),
            Reason::NoEvents => format!("container with id {id} is not running"),
            Reason::StartStopped => "cannot start a container that has stopped".to_owned(),
            Reason::StartRunning => "cannot start an already running container".to_owned(),
            Reason::StartIn(status) => format!("cannot start a container in the {status} state"),
            Reason::ExecStopped => "cannot exec in a stopped container".to_owned(),
            Reason::ExecPaused => {
                "cannot exec in a paused container (use --ignore-paused to override)".to_owned()
            }
            Reason::ExecCreating => "cannot exec in a container that is being created".to_owned(),
            Reason::CheckpointIn(status) => {
                format!("container cannot be checkpointed in {status} state")
            }
            Reason::DeleteUnstopped(status) => {
                format!("cannot delete container {id} that is not stopped: {status}")
            }
        };
        Error::new(Kind::State, text, "")
    }
}

/// The one place that knows what a status allows.
pub fn decide(status: Status, request: Request) -> Decision {
    use Decision::{AlreadyDone, Deny, Do};
    use Status::{Created, Creating, Paused, Running, Stopped};
    match (request, status) {
        (Request::Start, Created) => Do,
        (Request::Start, Stopped) => Deny(Reason::StartStopped),
        (Request::Start, Running) => Deny(Reason::StartRunning),
        (Request::Start, Creating | Paused) => Deny(Reason::StartIn(status)),

        (Request::Exec { .. }, Created | Running) => Do,
        (
            Request::Exec {
                ignore_paused: true,
            },
            Paused,
        ) => Do,
        (
            Request::Exec {
                ignore_paused: false,
            },
            Paused,
        ) => Deny(Reason::ExecPaused),
        (Request::Exec { .. }, Stopped) => Deny(Reason::ExecStopped),
        (Request::Exec { .. }, Creating) => Deny(Reason::ExecCreating),

        (Request::Kill { .. }, Created | Running | Paused) => Do,
        (Request::Kill { all: true }, Stopped) => AlreadyDone,
        (Request::Kill { all: false }, Stopped) => Deny(Reason::NotRunning),
        (Request::Kill { .. }, Creating) => Deny(Reason::NotRunning),

        (Request::Pause, Created | Running) => Do,
        (Request::Pause, Creating | Paused | Stopped) => Deny(Reason::NotRunning),

        (Request::Resume, Paused) => Do,
        (Request::Resume, Creating | Created | Running | Stopped) => Deny(Reason::NotPaused),

        (Request::Update, Created | Running | Paused) => Do,
        (Request::Update, Creating | Stopped) => Deny(Reason::NotRunning),

        (Request::Checkpoint, Running | Paused) => Do,
        (Request::Checkpoint, Creating | Created | Stopped) => Deny(Reason::CheckpointIn(status)),

        (Request::Delete { force: true }, Creating | Created | Running | Paused | Stopped) => Do,
        (Request::Delete { force: false }, Created | Stopped) => Do,
        (Request::Delete { force: false }, Creating | Running | Paused) => {
            Deny(Reason::DeleteUnstopped(status))
        }

        (Request::Events, Created | Running | Paused) => Do,
        (Request::Events, Creating | Stopped) => Deny(Reason::NoEvents),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_and_request() {
        use Decision::{AlreadyDone as Done, Deny, Do};
        use Status::{Created, Creating, Paused, Running, Stopped};
        // In the order of Status::ALL: creating, created, running, paused, stopped.
        let table: &[(Request, [Decision; 5])] = &[
            (
                Request::Start,
                [
                    Deny(Reason::StartIn(Creating)),
                    Do,
                    Deny(Reason::StartRunning),
                    Deny(Reason::StartIn(Paused)),
                    Deny(Reason::StartStopped),
                ],
            ),
            (
                Request::Exec {
                    ignore_paused: false,
                },
                [
                    Deny(Reason::ExecCreating),
                    Do,
                    Do,
                    Deny(Reason::ExecPaused),
                    Deny(Reason::ExecStopped),
                ],
            ),
            (
                Request::Exec {
                    ignore_paused: true,
                },
                [
                    Deny(Reason::ExecCreating),
                    Do,
                    Do,
                    Do,
                    Deny(Reason::ExecStopped),
                ],
            ),
            (
                Request::Kill { all: false },
                [
                    Deny(Reason::NotRunning),
                    Do,
                    Do,
                    Do,
                    Deny(Reason::NotRunning),
                ],
            ),
            (
                Request::Kill { all: true },
                [Deny(Reason::NotRunning), Do, Do, Do, Done],
            ),
            (
                Request::Pause,
                [
                    Deny(Reason::NotRunning),
                    Do,
                    Do,
                    Deny(Reason::NotRunning),
                    Deny(Reason::NotRunning),
                ],
            ),
            (
                Request::Resume,
                [
                    Deny(Reason::NotPaused),
                    Deny(Reason::NotPaused),
                    Deny(Reason::NotPaused),
                    Do,
                    Deny(Reason::NotPaused),
                ],
            ),
            (
                Request::Update,
                [
                    Deny(Reason::NotRunning),
                    Do,
                    Do,
                    Do,
                    Deny(Reason::NotRunning),
                ],
            ),
            (
                Request::Checkpoint,
                [
                    Deny(Reason::CheckpointIn(Creating)),
                    Deny(Reason::CheckpointIn(Created)),
                    Do,
                    Do,
                    Deny(Reason::CheckpointIn(Stopped)),
                ],
            ),
            (Request::Delete { force: true }, [Do; 5]),
            (
                Request::Delete { force: false },
                [
                    Deny(Reason::DeleteUnstopped(Creating)),
                    Do,
                    Deny(Reason::DeleteUnstopped(Running)),
                    Deny(Reason::DeleteUnstopped(Paused)),
                    Do,
                ],
            ),
            (
                Request::Events,
                [Deny(Reason::NoEvents), Do, Do, Do, Deny(Reason::NoEvents)],
            ),
        ];
        assert_eq!(Status::ALL, [Creating, Created, Running, Paused, Stopped]);
        for (request, decisions) in table {
            for (status, want) in Status::ALL.into_iter().zip(decisions) {
                assert_eq!(decide(status, *request), *want, "{request:?} {status}");
            }
        }
    }

    #[test]
    fn texts_are_runcs() {
        let id = ContainerId::parse("c1").unwrap();
        let cases = [
            (Reason::NotRunning, "container not running"),
            (Reason::NotPaused, "container not paused"),
            (
                Reason::StartStopped,
                "cannot start a container that has stopped",
            ),
            (
                Reason::StartIn(Status::Paused),
                "cannot start a container in the paused state",
            ),
            (
                Reason::DeleteUnstopped(Status::Running),
                "cannot delete container c1 that is not stopped: running",
            ),
        ];
        for (reason, want) in cases {
            assert_eq!(reason.error(&id).to_string(), want);
        }
    }
}
