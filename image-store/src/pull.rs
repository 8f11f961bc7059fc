//! Owns one pull from request to answer, and the joining of pulls that want the same.
//!
//! ```text
//! join -> [detached] resolve -> config -> layers (layer.rs) -> adopt, sync, rename, record (commit.rs)
//! ```
//! Identical pulls (same reference, same credentials) share one task. A waiter that goes away
//! changes nothing for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use crate::api::{Auth, Image, PullRequest, PullTimes};
use crate::commit::Commit;
use crate::digest::ImageId;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{Pins, fetch_layers};
use crate::reference::Reference;
use crate::registry::Registry;
use crate::store::Shared;

type Answer = Result<(Image, PullTimes)>;
type PullKey = (String, Option<Auth>);

/// Pulls under way.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<HashMap<PullKey, watch::Receiver<Option<Answer>>>>);

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, HashMap<PullKey, watch::Receiver<Option<Answer>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a pull or joins the one under way, and waits for its answer.
pub(crate) async fn join(shared: &Arc<Shared>, request: PullRequest) -> Answer {
    let reference = Reference::parse(&request.reference)?;
    let auth = request.auth.filter(|auth| *auth != Auth::default());
    let key = (reference.to_string(), auth.clone());
    let mut receiver = {
        let mut pulls = shared.pulls.lock();
        match pulls.get(&key) {
            Some(receiver) => receiver.clone(),
            None => {
                let (sender, receiver) = watch::channel(None);
                pulls.insert(key.clone(), receiver.clone());
                let task = Task {
                    shared: Some(Arc::clone(shared)),
                    key,
                    sender,
                };
                tokio::spawn(task.run(reference, auth));
                receiver
            }
        }
    };
    let lost = || {
        Error::new(ErrorKind::Internal, "pull image", &request.reference).because("its task ended")
    };
    let answer = receiver
        .wait_for(Option::is_some)
        .await
        .map_err(|_| lost())?;
    answer.clone().unwrap_or_else(|| Err(lost()))
}

/// The detached work. Leaves the table however it ends.
struct Task {
    /// Given up before the answer is sent: whoever waits may close the store at once.
    shared: Option<Arc<Shared>>,
    key: PullKey,
    sender: watch::Sender<Option<Answer>>,
}

impl Task {
    async fn run(mut self, reference: Reference, auth: Option<Auth>) {
        let started = Instant::now();
        let Some(shared) = self.shared.clone() else {
            return;
        };
        let answer = pull(&shared, &reference, auth.as_ref())
            .await
            .map(|(image, mut times)| {
                times.total = started.elapsed();
                (image, times)
            });
        match &answer {
            Ok((image, times)) => tracing::info!(
                reference = %reference, image = %image.id, total = ?times.total,
                resolve = ?times.resolve, layers = ?times.layers, network = ?times.network,
                inflate = ?times.inflate, extract = ?times.extract, commit = ?times.commit,
                fetched = times.fetched, bytes = times.bytes, "image pulled"
            ),
            Err(error) => tracing::debug!(%reference, %error, "pull failed"),
        }
        let answer = answer.map_err(|error| error.within("pull image", reference.to_string()));
        drop(shared);
        self.forget();
        // Without waiters there is nobody to tell.
        let _ = self.sender.send(Some(answer));
    }

    fn forget(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.pulls.lock().remove(&self.key);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // Does something only when the runtime went away in mid-pull.
        self.forget();
    }
}

async fn pull(
    shared: &Arc<Shared>,
    reference: &Reference,
    auth: Option<&Auth>,
) -> Result<(Image, PullTimes)> {
    let started = Instant::now();
    let mut times = PullTimes::default();
    let config = &shared.config;
    let registry = Registry::open(
        &config.registry_config_dirs,
        reference,
        auth,
        config.pull_progress_timeout,
    )?;
    let resolved = registry.resolve().await?;
    let config_digest = resolved.manifest.config.digest.clone();
    let id = ImageId::from_config_digest(config_digest)?;
    let body = registry
        .config(&resolved.manifest.config, resolved.endpoint)
        .await?;
    let image_config = registry.parse_config(&body, &resolved)?;
    times.resolve = started.elapsed();

    let pins = Arc::new(Pins::new(shared));
    let layers_started = Instant::now();
    let registry = Arc::new(registry);
    let layers = fetch_layers(&pins, &registry, &resolved, &image_config).await?;
    times.layers = layers_started.elapsed();
    layers.iter().for_each(|layer| layer.account(&mut times));

    let commit_started = Instant::now();
    let commit = Commit {
        shared: Arc::clone(shared),
        reference: reference.clone(),
        id,
        resolved,
        config: image_config,
        layers,
        _pins: pins,
    };
    let image = tokio::task::spawn_blocking(move || commit.run())
        .await
        .map_err(|error| {
            Error::new(ErrorKind::Internal, "commit image", reference.to_string()).because(error)
        })??;
    times.commit = commit_started.elapsed();
    Ok((image, times))
}
