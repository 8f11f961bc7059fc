//! How long an exit waits for the readers of FIFOs.
//!
//! containerd's client closes its end of a FIFO as soon as it knows of the exit (`cancel` of
//! pkg/cio, every release): what it has not read by then is lost. So an exit is told when the
//! reader has taken what is there, or has stopped taking.
//! Owns: the bounds. Never reads or writes a byte.

use std::time::{Duration, Instant};

/// A reader that takes nothing for so long does not get more time.
const STUCK: Duration = Duration::from_secs(1);
/// Another process may write for ever.
const LONGEST: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default)]
pub enum Hold {
    #[default]
    Idle,
    Waiting {
        since: Instant,
        moved: Instant,
        unread: usize,
    },
    Over,
}

impl Hold {
    pub fn over(self) -> bool {
        matches!(self, Hold::Over)
    }

    pub fn waiting(self) -> bool {
        matches!(self, Hold::Waiting { .. })
    }

    /// One look at what is unread: when to look again, None when there is no reason to wait.
    pub fn look(&mut self, unread: usize, now: Instant) -> Option<Duration> {
        let (since, moved) = match *self {
            _ if unread == 0 => (now, now),
            Hold::Over => return None,
            Hold::Idle => (now, now),
            Hold::Waiting {
                since,
                unread: last,
                ..
            } if unread != last => (since, now),
            Hold::Waiting { since, moved, .. } => (since, moved),
        };
        if unread == 0 || now - moved >= STUCK || now - since >= LONGEST {
            *self = Hold::Over;
            return None;
        }
        *self = Hold::Waiting {
            since,
            moved,
            unread,
        };
        let early = now - since < Duration::from_millis(20);
        Some(Duration::from_millis(if early { 1 } else { 10 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hold_ends_when_all_is_read_or_nothing_moves() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut hold = Hold::default();
        assert!(hold.look(0, start).is_none() && hold.over());
        let mut hold = Hold::default();
        assert!(hold.look(9, start).is_some() && hold.waiting());
        assert!(hold.look(9, at(900)).is_some());
        assert!(hold.look(8, at(950)).is_some());
        assert!(hold.look(8, at(1900)).is_some());
        assert!(hold.look(8, at(1951)).is_none() && hold.over());
        let mut hold = Hold::default();
        let looks = (0..20u64).map(|n| hold.look(n as usize + 1, at(n * 400)).is_some());
        assert_eq!(looks.take_while(|more| *more).count(), 13);
    }
}
