//! Owns the feed of container events (CRI's GetContainerEvents). A listener that is too slow is
//! cut off, so that it lists everything afresh instead of missing an event.

use tokio::sync::broadcast;

use crate::daemon::now_ns;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Made.
    Created,
    /// Started.
    Started,
    /// Ended.
    Stopped,
    /// Removed.
    Deleted,
}

/// Something that happened to a container.
#[derive(Debug, Clone)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// To which container; a sandbox's own events carry the sandbox's id here.
    pub container_id: String,
    /// In which sandbox.
    pub sandbox_id: String,
    /// When.
    pub at_ns: i64,
}

/// The feed.
pub struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Events(broadcast::Sender::new(4096))
    }
}

impl Events {
    /// Tells everyone who listens.
    pub fn publish(&self, kind: EventKind, container_id: &str, sandbox_id: &str) {
        // An error only means that nobody listens.
        let _ = self.0.send(Event {
            kind,
            container_id: container_id.to_owned(),
            sandbox_id: sandbox_id.to_owned(),
            at_ns: now_ns(),
        });
    }

    /// Listens from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}
