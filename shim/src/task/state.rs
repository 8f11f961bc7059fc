//! What may be done with a process in which state. Pure: no clock, no I/O.
//!
//! Init process:
//! ```text
//! Creating -> Created -> Starting -> Running <-> Pausing/Paused/Resuming
//!                |           |          |
//!                +-----------+----------+--> Exited -> Stopped -> Deleting -> (gone)
//! ```
//! Exec: `Created` (added) -> `Starting` -> `Running` -> `Exited` -> `Stopped` -> (gone).
//!
//! `Exited` is dead but not told yet: its output is still being delivered, or execs of the
//! container must be told first. `Stopped` has been told to everyone who waits.

use crate::process::Exit;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Creating,
    /// An exec that was only added has no pid.
    Created {
        pid: Option<i32>,
    },
    /// `early`: it died before the runtime's call had ended.
    Starting {
        pid: Option<i32>,
        early: Option<Exit>,
    },
    Running {
        pid: i32,
    },
    Pausing {
        pid: i32,
    },
    Paused {
        pid: i32,
    },
    Resuming {
        pid: i32,
    },
    Exited {
        exit: Exit,
    },
    Stopped {
        exit: Exit,
    },
    Deleting {
        exit: Exit,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Report,
    Start,
    Delete,
    Pids,
    Pause,
    Resume,
    Checkpoint,
    Kill,
    AddExec,
    Resize,
    CloseIo,
    Update,
    Wait,
    Stats,
    Attach,
    ReopenLog,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Do what was asked.
    Do,
    /// Delete of what never ran: it is killed first.
    KillThenDelete,
    /// The state asked for is the present one.
    AlreadyDone,
    /// Ask again when the transition that runs has ended.
    Later,
    Deny(Reason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    NotCreated,
    NotStarted,
    AlreadyStarted,
    NotRunning,
    NotPaused,
    Paused,
    StillRunning,
    AlreadyFinished,
    Deleting,
}

impl Reason {
    pub fn text(self) -> &'static str {
        match self {
            Reason::NotCreated => "process not created",
            Reason::NotStarted => "process not started",
            Reason::AlreadyStarted => "process already started",
            Reason::NotRunning => "process not running",
            Reason::NotPaused => "process not paused",
            Reason::Paused => "process is paused",
            Reason::StillRunning => "process still running",
            Reason::AlreadyFinished => "process already finished",
            Reason::Deleting => "process is being deleted",
        }
    }
}

pub fn decide(state: &State, asked: Asked) -> Decision {
    use Asked as A;
    use Decision::{AlreadyDone, Deny, Do, KillThenDelete, Later};
    match state {
        State::Creating => match asked {
            // No process yet: a restarted containerd clears such a task away by that answer.
            A::Report | A::Wait | A::Pids => Do,
            A::Start
            | A::Delete
            | A::Pause
            | A::Resume
            | A::Checkpoint
            | A::Kill
            | A::AddExec
            | A::Resize
            | A::CloseIo
            | A::Update
            | A::Stats
            | A::Attach
            | A::ReopenLog => Later,
        },
        State::Created { pid } => match asked {
            A::Report
            | A::AddExec
            | A::Start
            | A::Wait
            | A::Pids
            | A::Update
            | A::Stats
            | A::Attach
            | A::ReopenLog
            | A::CloseIo => Do,
            A::Resize | A::Kill if pid.is_some() => Do,
            A::Resize => AlreadyDone,
            A::Kill => Deny(Reason::NotCreated),
            A::Delete => KillThenDelete,
            A::Pause | A::Resume | A::Checkpoint => Deny(Reason::NotStarted),
        },
        State::Starting { .. } => match asked {
            A::Report | A::Wait | A::Pids | A::Stats | A::Attach | A::ReopenLog | A::CloseIo => Do,
            A::Start => Deny(Reason::AlreadyStarted),
            A::Delete
            | A::Pause
            | A::Resume
            | A::Checkpoint
            | A::Kill
            | A::AddExec
            | A::Resize
            | A::Update => Later,
        },
        State::Running { .. } => match asked {
            A::Report
            | A::Wait
            | A::Pids
            | A::Stats
            | A::Attach
            | A::ReopenLog
            | A::CloseIo
            | A::Pause
            | A::Checkpoint
            | A::Kill
            | A::AddExec
            | A::Resize
            | A::Update => Do,
            A::Start => Deny(Reason::AlreadyStarted),
            A::Resume => Deny(Reason::NotPaused),
            A::Delete => Deny(Reason::StillRunning),
        },
        State::Pausing { .. } | State::Resuming { .. } => match asked {
            A::Report
            | A::Wait
            | A::Pids
            | A::Stats
            | A::Attach
            | A::ReopenLog
            | A::CloseIo
            | A::Resize => Do,
            A::Start => Deny(Reason::AlreadyStarted),
            A::Pause | A::Resume | A::Checkpoint | A::Kill | A::AddExec | A::Update => Later,
            A::Delete => Deny(Reason::StillRunning),
        },
        State::Paused { .. } => match asked {
            A::Report
            | A::Wait
            | A::Pids
            | A::Stats
            | A::Attach
            | A::ReopenLog
            | A::CloseIo
            | A::Resize
            | A::Resume
            | A::Kill
            | A::Update
            | A::Checkpoint => Do,
            A::Pause => AlreadyDone,
            A::Start => Deny(Reason::AlreadyStarted),
            A::AddExec => Deny(Reason::Paused),
            A::Delete => Deny(Reason::StillRunning),
        },
        State::Exited { .. } => match asked {
            A::Report | A::Wait | A::Pids | A::ReopenLog | A::Attach => Do,
            A::CloseIo => AlreadyDone,
            A::Kill | A::Resize => Deny(Reason::AlreadyFinished),
            A::Start => Deny(Reason::AlreadyFinished),
            A::Pause | A::Resume | A::Checkpoint | A::AddExec | A::Update | A::Stats => {
                Deny(Reason::NotRunning)
            }
            A::Delete => Later,
        },
        State::Stopped { .. } => match asked {
            A::Report | A::Wait | A::Pids | A::Delete | A::ReopenLog | A::Attach | A::Stats => Do,
            A::CloseIo => AlreadyDone,
            A::Kill | A::Resize | A::Start => Deny(Reason::AlreadyFinished),
            A::Pause | A::Resume | A::Checkpoint | A::AddExec | A::Update => {
                Deny(Reason::NotRunning)
            }
        },
        State::Deleting { .. } => match asked {
            A::Report | A::Wait => Do,
            A::CloseIo => AlreadyDone,
            A::Delete => Later,
            A::Kill | A::Resize => Deny(Reason::AlreadyFinished),
            A::Start
            | A::Pids
            | A::Pause
            | A::Resume
            | A::Checkpoint
            | A::AddExec
            | A::Update
            | A::Stats
            | A::Attach
            | A::ReopenLog => Deny(Reason::Deleting),
        },
    }
}

impl State {
    pub fn pid(&self) -> Option<i32> {
        match self {
            State::Creating => None,
            State::Created { pid } | State::Starting { pid, .. } => *pid,
            State::Running { pid }
            | State::Pausing { pid }
            | State::Paused { pid }
            | State::Resuming { pid } => Some(*pid),
            State::Exited { exit } | State::Stopped { exit } | State::Deleting { exit } => {
                Some(exit.pid)
            }
        }
    }

    pub fn exit(&self) -> Option<Exit> {
        match self {
            State::Exited { exit } | State::Stopped { exit } | State::Deleting { exit } => {
                Some(*exit)
            }
            State::Creating
            | State::Created { .. }
            | State::Starting { .. }
            | State::Running { .. }
            | State::Pausing { .. }
            | State::Paused { .. }
            | State::Resuming { .. } => None,
        }
    }

    /// A process of ours exists that the reaper has not seen yet.
    pub fn alive(&self) -> bool {
        match self {
            State::Created { pid } => pid.is_some(),
            State::Starting { early, .. } => early.is_none(),
            State::Running { .. }
            | State::Pausing { .. }
            | State::Paused { .. }
            | State::Resuming { .. } => true,
            State::Creating
            | State::Exited { .. }
            | State::Stopped { .. }
            | State::Deleting { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        pid: 7,
        status: 0,
        at_nanos: 1,
    };
    const ASKED: [Asked; 16] = [
        Asked::Report,
        Asked::Start,
        Asked::Delete,
        Asked::Pids,
        Asked::Pause,
        Asked::Resume,
        Asked::Checkpoint,
        Asked::Kill,
        Asked::AddExec,
        Asked::Resize,
        Asked::CloseIo,
        Asked::Update,
        Asked::Wait,
        Asked::Stats,
        Asked::Attach,
        Asked::ReopenLog,
    ];

    /// One letter per request, in the order of `ASKED`: d does, a already done, l later,
    /// k kill then delete, and the denials by number.
    fn row(state: State) -> String {
        ASKED
            .iter()
            .map(|asked| match decide(&state, *asked) {
                Decision::Do => 'd',
                Decision::AlreadyDone => 'a',
                Decision::Later => 'l',
                Decision::KillThenDelete => 'k',
                Decision::Deny(Reason::NotCreated) => '0',
                Decision::Deny(Reason::NotStarted) => '1',
                Decision::Deny(Reason::AlreadyStarted) => '2',
                Decision::Deny(Reason::NotRunning) => '3',
                Decision::Deny(Reason::NotPaused) => '4',
                Decision::Deny(Reason::Paused) => '5',
                Decision::Deny(Reason::StillRunning) => '6',
                Decision::Deny(Reason::AlreadyFinished) => '7',
                Decision::Deny(Reason::Deleting) => '8',
            })
            .collect()
    }

    #[test]
    fn every_state_and_request() {
        let table = [
            (State::Creating, "dlldlllllllldlll"),
            (State::Created { pid: Some(7) }, "ddkd111ddddddddd"),
            (State::Created { pid: None }, "ddkd1110dadddddd"),
            (
                State::Starting {
                    pid: Some(7),
                    early: None,
                },
                "d2ldlllllldldddd",
            ),
            (State::Running { pid: 7 }, "d26dd4dddddddddd"),
            (State::Pausing { pid: 7 }, "d26dlllllddldddd"),
            (State::Resuming { pid: 7 }, "d26dlllllddldddd"),
            (State::Paused { pid: 7 }, "d26daddd5ddddddd"),
            (State::Exited { exit: EXIT }, "d7ld333737a3d3dd"),
            (State::Stopped { exit: EXIT }, "d7dd333737a3dddd"),
            (State::Deleting { exit: EXIT }, "d8l8888787a8d888"),
        ];
        for (state, want) in table {
            assert_eq!(row(state), want, "{state:?}");
        }
    }

    #[test]
    fn what_lives_has_a_pid_and_no_exit() {
        let running = State::Running { pid: 7 };
        assert!(running.alive() && running.exit().is_none() && running.pid() == Some(7));
        let stopped = State::Stopped { exit: EXIT };
        assert!(!stopped.alive() && stopped.exit() == Some(EXIT) && stopped.pid() == Some(7));
        assert!(!State::Created { pid: None }.alive());
    }
}
