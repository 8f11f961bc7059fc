//! Who is being worked on: one call at a time per sandbox, and what gc must leave alone.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

#[derive(Default)]
pub(super) struct Activity {
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Attached by this process and not detached since.
    owned: Mutex<HashSet<String>>,
}

/// The right to work on a sandbox; passed on when dropped.
pub(super) struct Turn {
    activity: Arc<Activity>,
    id: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Activity {
    pub(super) async fn turn(self: &Arc<Self>, id: &str) -> Turn {
        let turn = Arc::clone(lock(&self.turns).entry(id.to_owned()).or_default());
        let held = Some(turn.lock_owned().await);
        Turn {
            activity: Arc::clone(self),
            id: id.to_owned(),
            held,
        }
    }

    pub(super) fn own(&self, id: &str) {
        lock(&self.owned).insert(id.to_owned());
    }

    pub(super) fn disown(&self, id: &str) {
        lock(&self.owned).remove(id);
    }

    pub(super) fn knows(&self, id: &str) -> bool {
        // In this order: a sandbox gets owned before its turn ends.
        lock(&self.turns).contains_key(id) || lock(&self.owned).contains(id)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Turn {
    fn drop(&mut self) {
        drop(self.held.take());
        let mut turns = lock(&self.activity.turns);
        // The map's own reference is the last one: nobody waits.
        if turns
            .get(&self.id)
            .is_some_and(|turn| Arc::strong_count(turn) == 1)
        {
            turns.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_one_after_another_and_leave_nothing() {
        let activity = Arc::new(Activity::default());
        let first = activity.turn("a").await;
        let other = activity.turn("b").await;
        let second = {
            let activity = Arc::clone(&activity);
            tokio::spawn(async move { drop(activity.turn("a").await) })
        };
        tokio::task::yield_now().await;
        assert!(!second.is_finished() && activity.knows("a"));
        drop((first, other));
        second.await.unwrap();
        assert!(!activity.knows("a") && lock(&activity.turns).is_empty());
        activity.own("a");
        assert!(activity.knows("a"));
        activity.disown("a");
        assert!(!activity.knows("a"));
    }
}
