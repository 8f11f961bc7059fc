//! Owns the life cycle of a sandbox and the one function that decides what a request may do.
//!
//! ```text
//! Creating -> Ready -> Stopping -> NotReady -> Removing -> (gone)
//!     |         |         ^            |
//!     +-> gone  +---------+ (Remove stops first)
//! ```

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// Being made; nobody has been told its id.
    Creating,
    /// Containers may be made in it.
    Ready,
    /// Being stopped; a stop that failed stays here and is tried again.
    Stopping,
    /// Stopped: nothing runs, no address is held.
    NotReady,
    /// Being removed.
    Removing,
}

/// What is asked of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Make a container in it.
    CreateContainer,
    /// Forward a port to it.
    PortForward,
    /// Stop it.
    Stop,
    /// Remove it.
    Remove,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on with it.
    Proceed,
    /// Stop it first, then remove it.
    StopFirst,
    /// Nothing is left to do.
    AlreadyDone,
    /// No; the reason completes "sandbox is ...".
    Deny(&'static str),
}

/// Decides; looks at nothing but its arguments.
pub fn decide(state: SandboxState, request: Request) -> Decision {
    use Decision::{AlreadyDone, Deny, Proceed, StopFirst};
    use SandboxState::{Creating, NotReady, Ready, Removing, Stopping};
    match (request, state) {
        (Request::CreateContainer | Request::PortForward, Ready) => Proceed,
        (Request::CreateContainer | Request::PortForward, Creating) => Deny("not ready yet"),
        (Request::CreateContainer | Request::PortForward, Stopping | NotReady) => {
            Deny("not ready: it was stopped")
        }
        (Request::CreateContainer | Request::PortForward, Removing) => Deny("being removed"),
        (Request::Stop, Ready | Stopping | Creating) => Proceed,
        (Request::Stop, NotReady | Removing) => AlreadyDone,
        (Request::Remove, Creating | Ready | Stopping) => StopFirst,
        (Request::Remove, NotReady | Removing) => Proceed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decide_over_every_state_and_request() {
        use Decision::{AlreadyDone, Deny, Proceed, StopFirst};
        use SandboxState::{Creating, NotReady, Ready, Removing, Stopping};
        let stopped = Deny("not ready: it was stopped");
        let removing = Deny("being removed");
        let early = Deny("not ready yet");
        for (state, expected) in [
            (Creating, [early, early, Proceed, StopFirst]),
            (Ready, [Proceed, Proceed, Proceed, StopFirst]),
            (Stopping, [stopped, stopped, Proceed, StopFirst]),
            (NotReady, [stopped, stopped, AlreadyDone, Proceed]),
            (Removing, [removing, removing, AlreadyDone, Proceed]),
        ] {
            let requests = [
                Request::CreateContainer,
                Request::PortForward,
                Request::Stop,
                Request::Remove,
            ];
            let decided = requests.map(|request| decide(state, request));
            assert_eq!(decided, expected, "{state:?}");
        }
    }
}
