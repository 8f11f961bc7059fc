//! Owns keyed jobs: long work that runs outside the request that asked for it, one at a time for
//! each key. A request whose key is being worked on joins that work; one that comes after it with
//! a result that nobody received gets that result. So a client that gave up and retries never
//! hears that the name is taken by its own first attempt.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};

struct Job<V> {
    /// Same key and same fingerprint: the same request.
    fingerprint: String,
    outcome: watch::Receiver<Option<Result<V>>>,
    /// Somebody was told the outcome.
    delivered: bool,
}

/// Jobs by key. `V` is what a finished job leaves, such as an id.
pub struct Jobs<K, V> {
    jobs: Arc<Mutex<HashMap<K, Job<V>>>>,
}

impl<K, V> Default for Jobs<K, V> {
    fn default() -> Self {
        Jobs {
            jobs: Arc::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K, V> Jobs<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Runs `work` for `key`, or joins the run that is under way, or takes its result over.
    ///
    /// `taken` makes the error of a key whose result somebody already has.
    pub async fn run<F>(
        &self,
        key: K,
        fingerprint: String,
        work: F,
        taken: impl Fn(&V) -> Error,
    ) -> Result<V>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let mut outcome = self.join_or_start(&key, &fingerprint, work, taken)?;
        let answer = match outcome.wait_for(Option::is_some).await {
            Ok(value) => value.clone(),
            // The task panicked: its sender is gone without a value.
            Err(_) => None,
        };
        // No await between here and the return: the caller gets what is marked as delivered.
        let mut jobs = lock(&self.jobs);
        match answer {
            Some(Ok(value)) => {
                if let Some(job) = jobs.get_mut(&key) {
                    job.delivered = true;
                }
                Ok(value)
            }
            Some(Err(error)) => Err(error),
            None => {
                jobs.remove(&key);
                Err(Error::new(
                    Kind::Internal,
                    "the job ended without a result",
                    "",
                ))
            }
        }
    }

    fn join_or_start<F>(
        &self,
        key: &K,
        fingerprint: &str,
        work: F,
        taken: impl Fn(&V) -> Error,
    ) -> Result<watch::Receiver<Option<Result<V>>>>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let mut jobs = lock(&self.jobs);
        if let Some(job) = jobs.get(key) {
            let same = job.fingerprint == fingerprint;
            match (&*job.outcome.borrow(), same) {
                (None, true) => return Ok(job.outcome.clone()),
                (None, false) => {
                    let text = "another request with this name is under way";
                    return Err(Error::new(Kind::AlreadyExists, text, ""));
                }
                (Some(Ok(_)), true) if !job.delivered => return Ok(job.outcome.clone()),
                (Some(Ok(value)), _) => return Err(taken(value)),
                // Failed jobs take themselves away; this one is about to.
                (Some(Err(_)), _) => {}
            }
        }
        let (sender, receiver) = watch::channel(None);
        let job = Job {
            fingerprint: fingerprint.to_owned(),
            outcome: receiver.clone(),
            delivered: false,
        };
        jobs.insert(key.clone(), job);
        let (all, key) = (self.jobs.clone(), key.clone());
        tokio::spawn(async move {
            let answer = work.await;
            if answer.is_err() {
                lock(&all).remove(&key);
            }
            sender.send_replace(Some(answer));
        });
        Ok(receiver)
    }

    /// Takes a name that a record on disk holds.
    pub fn restore(&self, key: K, value: V) {
        let (_, outcome) = watch::channel(Some(Ok(value)));
        let job = Job {
            fingerprint: String::new(),
            outcome,
            delivered: true,
        };
        lock(&self.jobs).insert(key, job);
    }

    /// Frees a name.
    pub fn release(&self, key: &K) {
        lock(&self.jobs).remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn taken(id: &u32) -> Error {
        Error::new(Kind::AlreadyExists, "taken by", id.to_string())
    }

    async fn after(ms: u64, value: Result<u32>) -> Result<u32> {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        value
    }

    #[tokio::test]
    async fn retry_of_a_cancelled_request_joins_its_job() {
        let jobs = Jobs::default();
        let first = jobs.run("k", "f".into(), after(50, Ok(1)), taken);
        assert!(
            tokio::time::timeout(Duration::from_millis(5), first)
                .await
                .is_err()
        );
        let retry = jobs.run("k", "f".into(), after(0, Ok(2)), taken).await;
        assert_eq!(retry.unwrap(), 1);
        let third = jobs.run("k", "f".into(), after(0, Ok(3)), taken).await;
        assert_eq!(third.unwrap_err().to_string(), "taken by: 1");
    }

    #[tokio::test]
    async fn undelivered_result_goes_to_the_retry() {
        let jobs = Jobs::default();
        let first = jobs.run("k", "f".into(), after(10, Ok(1)), taken);
        assert!(
            tokio::time::timeout(Duration::from_millis(2), first)
                .await
                .is_err()
        );
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert_eq!(
            jobs.run("k", "f".into(), after(0, Ok(2)), taken)
                .await
                .unwrap(),
            1
        );
    }

    #[tokio::test]
    async fn another_request_with_the_same_name_is_refused() {
        let jobs = Jobs::default();
        let first = jobs.run("k", "f".into(), after(50, Ok(1)), taken);
        let other = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            jobs.run("k", "g".into(), after(0, Ok(2)), taken).await
        };
        let (first, other) = tokio::join!(first, other);
        assert_eq!(first.unwrap(), 1);
        assert_eq!(other.unwrap_err().kind(), Kind::AlreadyExists);
    }

    #[tokio::test]
    async fn failure_frees_the_name() {
        let jobs = Jobs::default();
        let failure = Err(Error::new(Kind::Internal, "no", ""));
        assert!(
            jobs.run("k", "f".into(), after(0, failure), taken)
                .await
                .is_err()
        );
        assert_eq!(
            jobs.run("k", "f".into(), after(0, Ok(2)), taken)
                .await
                .unwrap(),
            2
        );
        jobs.release(&"k");
        assert_eq!(
            jobs.run("k", "f".into(), after(0, Ok(3)), taken)
                .await
                .unwrap(),
            3
        );
    }
}
