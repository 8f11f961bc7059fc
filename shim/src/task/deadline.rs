//! How long a runtime call may take.
//!
//! A runtime may hang: on a hook, on a file system that does not answer, on a lock. Nothing else
//! waits for it in the shim, but whoever asked does. Past its time a call is killed with its
//! process group, and its caller gets an error that says so.
//! Owns: the limits, and when they are shortened. What a killed call leaves is taken back where
//! calls end.

use std::time::{Duration, Instant};

use super::call::{Job, Running};
use crate::process::ProcessId;
use crate::supervisor::Supervisor;

/// The kubelet's own patience with a runtime service (runtimeRequestTimeout).
const LIMIT: Duration = Duration::from_secs(120);
/// A dump or a restore moves all of a container's memory.
const IMAGES: u32 = 30;
/// What is left to a call once its container is to end.
const HURRY: Duration = Duration::from_secs(3);
const VARIABLE: &str = "CORACLE_SHIM_CALL_SECONDS";

/// The time that a call has, unless the environment names another.
pub fn limit() -> Duration {
    seconds(std::env::var(VARIABLE).ok().as_deref())
}

fn seconds(text: Option<&str>) -> Duration {
    match text.and_then(|t| t.parse().ok()) {
        Some(n @ 1..=86_400) => Duration::from_secs(n),
        _ => LIMIT,
    }
}

/// When a call is late, and whether it has been killed for that.
#[derive(Debug)]
pub struct Deadline {
    at: Instant,
    given: Duration,
    killed: bool,
}

impl Deadline {
    pub fn new(job: &Job, limit: Duration, now: Instant) -> Deadline {
        let given = match job {
            Job::Checkpoint { .. } | Job::Restore { .. } => limit * IMAGES,
            _ => limit,
        };
        Deadline {
            at: now + given,
            given,
            killed: false,
        }
    }

    fn shorten(&mut self, now: Instant) {
        if self.at > now + HURRY {
            self.at = now + HURRY;
            self.given = HURRY;
        }
    }

    /// The end of a call that was killed, in words.
    pub fn failure(&self) -> Option<String> {
        self.killed.then(|| {
            let given = self.given.as_secs();
            match self.given == HURRY {
                true => format!(
                    "the runtime did not end within {given} s of the request to end its \
                     container, and was killed"
                ),
                false => format!("the runtime did not end within {given} s and was killed"),
            }
        })
    }
}

impl Supervisor {
    pub fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.calls.values().filter(|call| !call.deadline.killed);
        waiting.map(|call| call.deadline.at).min()
    }

    pub fn kill_late_calls(&mut self, now: Instant) {
        let late = |call: &&mut Running| !call.deadline.killed && call.deadline.at <= now;
        for call in self.calls.values_mut().filter(late) {
            call.deadline.killed = true;
            self.journal.warn(&format!(
                "a runtime call for {} is killed: no end within {} s",
                call.id.task,
                call.deadline.given.as_secs()
            ));
            // Not reaped yet: pid and group are the call's own.
            let _ = coracle_sys::spawn::kill_group(call.pid(), 9);
        }
    }

    /// The process is to end, or its container has: what is still being done for it has little
    /// time left. What removes it keeps its own.
    pub fn hurry(&mut self, id: &ProcessId) {
        let now = Instant::now();
        for call in self.calls.values_mut() {
            let of_it = call.id == *id || (id.is_init() && call.id.task == id.task);
            if of_it && !matches!(call.job, Job::Delete { .. } | Job::CleanUp { .. }) {
                call.deadline.shorten(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_what_the_environment_says_within_reason() {
        for (text, want) in [
            (None, 120),
            (Some("7"), 7),
            (Some("0"), 120),
            (Some("-1"), 120),
            (Some("1000000"), 120),
            (Some("soon"), 120),
        ] {
            assert_eq!(seconds(text).as_secs(), want, "{text:?}");
        }
    }

    #[test]
    fn a_hurried_call_says_so_and_is_never_given_more() {
        let now = Instant::now();
        let mut deadline = Deadline::new(&Job::Start, LIMIT, now);
        assert_eq!(deadline.failure(), None);
        deadline.shorten(now);
        assert_eq!(deadline.at, now + HURRY);
        deadline.killed = true;
        assert!(
            deadline
                .failure()
                .unwrap()
                .contains("within 3 s of the request")
        );
        let mut short = Deadline::new(&Job::Start, Duration::from_secs(1), now);
        short.shorten(now);
        assert_eq!(short.at, now + Duration::from_secs(1));
        short.killed = true;
        assert!(
            short
                .failure()
                .unwrap()
                .contains("within 1 s and was killed")
        );
    }
}
