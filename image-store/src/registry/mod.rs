//! Owns the conversation of one pull with its registry: which host to ask, what for, and whether
//! what came back is what its digest says. Never touches the store.
//!
//! `hosts` (whom) -> `transport` (HTTP, redirects, retries) with `auth` -> `document` (meaning).

pub(crate) mod auth;
pub(crate) mod document;
pub(crate) mod hosts;
pub(crate) mod transport;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE};
use tokio::sync::mpsc;

use crate::api::Auth;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::reference::Reference;
use auth::Credentials;
use document::{CONFIG_MAX, Descriptor, Document, MANIFEST_MAX, Manifest, Refusal, Target};
use transport::{Endpoint, Get, backoff};

/// Indexes inside indexes are followed this deep.
const INDEX_DEPTH_MAX: usize = 3;
/// How often one blob may be resumed after a broken connection.
const RESUMES_MAX: u32 = 8;
/// How many of those in a row may bring nothing new.
const STALLS_MAX: u32 = 2;

/// The registry as one pull sees it.
pub(crate) struct Registry {
    reference: Reference,
    endpoints: Vec<Endpoint>,
}

/// A manifest for this machine and how it was found.
pub(crate) struct Resolved {
    /// Digest of what the reference itself names: the index, if there is one.
    pub(crate) digest: Digest,
    pub(crate) manifest: Manifest,
    /// Bytes of the manifest.
    pub(crate) size: u64,
    /// The endpoint that served it, asked first for blobs.
    pub(crate) endpoint: usize,
}

/// What one blob's transfer cost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Transfer {
    pub(crate) waited_for_network: Duration,
    pub(crate) waited_for_consumer: Duration,
}

struct Fetched {
    body: Vec<u8>,
    content_type: Option<String>,
}

impl Registry {
    /// Reads the configuration afresh: an edit of hosts.toml holds from the next pull on.
    pub(crate) fn open(
        dirs: &[PathBuf],
        reference: &Reference,
        auth: Option<&Auth>,
        progress: Duration,
    ) -> Result<Self> {
        let credentials = match auth {
            Some(auth) => Credentials::parse(auth)?,
            None => None,
        };
        let endpoints = hosts::load(dirs, reference.registry())?
            .into_iter()
            .map(|host| Endpoint::new(host, reference.repository(), credentials.clone(), progress))
            .collect();
        Ok(Registry {
            reference: reference.clone(),
            endpoints,
        })
    }

    pub(crate) fn has_mirrors(&self) -> bool {
        self.endpoints.len() > 1
    }

    /// Fetches and checks the manifest that the reference means on this machine.
    pub(crate) async fn resolve(&self) -> Result<Resolved> {
        let locator = self.reference.locator();
        let pinned = self.reference.digest().cloned();
        let (endpoint, top) = self
            .try_each(self.order(0), |endpoint| {
                let usable = endpoint.host.resolve || (pinned.is_some() && endpoint.host.pull);
                let (locator, pinned) = (&locator, &pinned);
                usable.then_some(async move {
                    let fetched = self.fetch_manifest(endpoint, locator).await?;
                    let digest = match pinned {
                        Some(pinned) => self.verify(endpoint, &fetched.body, pinned)?,
                        None => Digest::sha256(&fetched.body),
                    };
                    let document = self.parse(endpoint, &fetched)?;
                    Ok((digest, document, fetched.body.len() as u64))
                })
            })
            .await?;
        let (digest, document, size) = top;
        let (manifest, size) = match document {
            Document::Manifest(manifest) => (manifest, size),
            Document::Index(entries) => self.descend(endpoint, entries).await?,
        };
        Ok(Resolved {
            digest,
            manifest,
            size,
            endpoint,
        })
    }

    async fn descend(
        &self,
        endpoint: usize,
        mut entries: Vec<document::IndexEntry>,
    ) -> Result<(Manifest, u64)> {
        let target = Target::of_this_machine();
        for _ in 0..INDEX_DEPTH_MAX {
            let chosen = target
                .choose(&entries)
                .map_err(|refusal| self.refuse(&self.endpoints[endpoint], refusal))?
                .clone();
            let (_, (document, size)) = self
                .try_each(self.order(endpoint), |endpoint| {
                    let chosen = &chosen;
                    endpoint.host.pull.then_some(async move {
                        let locator = chosen.digest.to_string();
                        let fetched = self.fetch_manifest(endpoint, &locator).await?;
                        self.verify(endpoint, &fetched.body, &chosen.digest)?;
                        let document = self.parse(endpoint, &fetched)?;
                        Ok((document, fetched.body.len() as u64))
                    })
                })
                .await?;
            match document {
                Document::Manifest(manifest) => return Ok((manifest, size)),
                Document::Index(deeper) => entries = deeper,
            }
        }
        Err(self.endpoints[endpoint].error(
            ErrorKind::Unsupported,
            format!("indexes nested deeper than {INDEX_DEPTH_MAX}"),
        ))
    }

    /// Fetches the image config; its digest is the image's id.
    pub(crate) async fn config(&self, descriptor: &Descriptor, first: usize) -> Result<Vec<u8>> {
        let (_, body) = self
            .try_each(self.order(first), |endpoint| {
                endpoint.host.pull.then_some(async move {
                    let what = format!("config {}", descriptor.digest);
                    let get = self.blob_get(endpoint, &descriptor.digest, 0, what.clone());
                    let response = endpoint.get(&get).await?;
                    let body = endpoint.read_bounded(response, CONFIG_MAX, &what).await?;
                    if body.len() as u64 != descriptor.size {
                        return Err(endpoint.error(
                            ErrorKind::Corrupt,
                            format!(
                                "{what}: {} bytes, the manifest says {}",
                                body.len(),
                                descriptor.size
                            ),
                        ));
                    }
                    self.verify(endpoint, &body, &descriptor.digest)?;
                    Ok(body)
                })
            })
            .await?;
        Ok(body)
    }

    /// Streams a blob into `sink`, resuming after broken connections and falling back to other
    /// hosts. Sends at most `descriptor.size` bytes; the receiver checks the digest. Ends early
    /// without an error when the receiver is gone.
    pub(crate) async fn stream(
        &self,
        descriptor: &Descriptor,
        first: usize,
        sink: &mpsc::Sender<Result<Bytes>>,
    ) -> Result<Transfer> {
        let mut transfer = Transfer::default();
        let mut offset = 0;
        let mut failures = Vec::new();
        for index in self.order(first) {
            let endpoint = &self.endpoints[index];
            if !endpoint.host.pull {
                continue;
            }
            let (mut resumes, mut stalls) = (0, 0);
            loop {
                let before = offset;
                let copied = self
                    .copy(endpoint, descriptor, &mut offset, sink, &mut transfer)
                    .await;
                let error = match copied {
                    Ok(()) => return Ok(transfer),
                    Err(error) => error,
                };
                resumes += 1;
                stalls = if offset > before { 0 } else { stalls + 1 };
                let worth_it = match error.kind() {
                    ErrorKind::RegistryUnavailable => offset > 0 && stalls <= STALLS_MAX,
                    ErrorKind::DeadlineExceeded => offset > before,
                    _ => false,
                };
                if !worth_it || resumes > RESUMES_MAX {
                    failures.push((index, error));
                    break;
                }
                tracing::debug!(%error, offset, "resuming blob");
                tokio::time::sleep(backoff(resumes)).await;
            }
        }
        Err(self.join(failures))
    }

    async fn copy(
        &self,
        endpoint: &Endpoint,
        descriptor: &Descriptor,
        offset: &mut u64,
        sink: &mpsc::Sender<Result<Bytes>>,
        transfer: &mut Transfer,
    ) -> Result<()> {
        let what = format!("blob {}", descriptor.digest);
        let get = self.blob_get(endpoint, &descriptor.digest, *offset, what.clone());
        let started = Instant::now();
        let mut response = endpoint.get(&get).await?;
        let mut skip = 0;
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|v| v.to_str().ok());
            if range.and_then(range_start) != Some(*offset) {
                return Err(endpoint.error(
                    ErrorKind::Corrupt,
                    format!("{what}: asked for bytes from {offset}, was sent another range"),
                ));
            }
        } else {
            // The range was ignored: the same bytes come again.
            skip = *offset;
        }
        let longer = || {
            endpoint.error(
                ErrorKind::Corrupt,
                format!(
                    "{what}: longer than the {} bytes of its descriptor",
                    descriptor.size
                ),
            )
        };
        if response
            .content_length()
            .is_some_and(|n| *offset - skip + n > descriptor.size)
        {
            return Err(longer());
        }
        transfer.waited_for_network += started.elapsed();
        loop {
            let started = Instant::now();
            let chunk = endpoint.chunk(&mut response, &what).await?;
            transfer.waited_for_network += started.elapsed();
            let Some(mut chunk) = chunk else { break };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            // Bounded by the chunk's length just above.
            drop(chunk.split_to(usize::try_from(skipped).unwrap_or(chunk.len())));
            if chunk.is_empty() {
                continue;
            }
            *offset += chunk.len() as u64;
            if *offset > descriptor.size {
                return Err(longer());
            }
            let started = Instant::now();
            if sink.send(Ok(chunk)).await.is_err() {
                return Ok(());
            }
            transfer.waited_for_consumer += started.elapsed();
        }
        if *offset < descriptor.size {
            return Err(endpoint.error(
                ErrorKind::RegistryUnavailable,
                format!("{what}: ended after {offset} of {} bytes", descriptor.size),
            ));
        }
        Ok(())
    }

    fn blob_get(&self, endpoint: &Endpoint, digest: &Digest, offset: u64, what: String) -> Get<'_> {
        Get {
            path: format!("{}/blobs/{digest}", self.reference.repository()),
            query: self.namespace(endpoint),
            accept: None,
            offset,
            what,
            retry: self.is_last(endpoint),
        }
    }

    async fn fetch_manifest(&self, endpoint: &Endpoint, locator: &str) -> Result<Fetched> {
        let separator = if locator.contains(':') { '@' } else { ':' };
        let what = format!(
            "manifest {}{separator}{locator}",
            self.reference.repository()
        );
        let response = endpoint
            .get(&Get {
                path: format!("{}/manifests/{locator}", self.reference.repository()),
                query: self.namespace(endpoint),
                accept: Some(document::ACCEPT),
                offset: 0,
                what: what.clone(),
                retry: self.is_last(endpoint),
            })
            .await?;
        let content_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let body = endpoint.read_bounded(response, MANIFEST_MAX, &what).await?;
        Ok(Fetched { body, content_type })
    }

    fn verify(&self, endpoint: &Endpoint, body: &[u8], wanted: &Digest) -> Result<Digest> {
        let mut hasher = crate::digest::Hasher::new(wanted.algorithm());
        hasher.update(body);
        let found = hasher.finish();
        if found == *wanted {
            return Ok(found);
        }
        Err(endpoint.error(
            ErrorKind::Corrupt,
            format!("asked for {wanted}, was sent content with digest {found}"),
        ))
    }

    fn parse(&self, endpoint: &Endpoint, fetched: &Fetched) -> Result<Document> {
        document::parse(&fetched.body, fetched.content_type.as_deref())
            .map_err(|refusal| self.refuse(endpoint, refusal))
    }

    fn refuse(&self, endpoint: &Endpoint, refusal: Refusal) -> Error {
        let (kind, why) = match refusal {
            Refusal::Corrupt(why) => (ErrorKind::Corrupt, why),
            Refusal::Unsupported(why) => (ErrorKind::Unsupported, why),
            Refusal::NotFound(why) => (ErrorKind::NotFound, why),
        };
        endpoint.error(kind, format!("manifest of {}: {why}", self.reference))
    }

    /// Parses a config that `config` fetched.
    pub(crate) fn parse_config(
        &self,
        body: &[u8],
        resolved: &Resolved,
    ) -> Result<document::Config> {
        document::parse_config(body, resolved.manifest.layers.len())
            .map_err(|refusal| self.refuse(&self.endpoints[resolved.endpoint], refusal))
    }

    /// Index of the host that a layer is fetched from once the others served rubbish.
    pub(crate) fn authoritative(&self) -> usize {
        self.endpoints.len() - 1
    }

    pub(crate) fn endpoint_name(&self, index: usize) -> &str {
        self.endpoints[index].name()
    }

    /// `?ns=` tells a mirror whose content is meant.
    fn namespace(&self, endpoint: &Endpoint) -> Option<(&'static str, &str)> {
        endpoint
            .host
            .is_mirror
            .then(|| ("ns", self.reference.registry()))
    }

    fn is_last(&self, endpoint: &Endpoint) -> bool {
        self.endpoints
            .last()
            .is_some_and(|last| std::ptr::eq(last, endpoint))
    }

    /// All hosts, `first` before the rest.
    fn order(&self, first: usize) -> Vec<usize> {
        let mut order = vec![first];
        order.extend((0..self.endpoints.len()).filter(|index| *index != first));
        order
    }

    /// Asks hosts in turn until one succeeds. `attempt` gives `None` for a host that is not meant
    /// for this kind of request.
    async fn try_each<'a, T, F, Fut>(&'a self, order: Vec<usize>, attempt: F) -> Result<(usize, T)>
    where
        F: Fn(&'a Endpoint) -> Option<Fut>,
        Fut: Future<Output = Result<T>>,
    {
        let mut failures = Vec::new();
        for index in order {
            let Some(future) = attempt(&self.endpoints[index]) else {
                continue;
            };
            match future.await {
                Ok(value) => return Ok((index, value)),
                Err(error) => {
                    tracing::debug!(%error, "registry host failed");
                    failures.push((index, error));
                }
            }
        }
        Err(self.join(failures))
    }

    /// One error of many hosts' errors. The kind is that of the registry itself, if it was asked:
    /// only the registry knows what does not exist.
    fn join(&self, mut failures: Vec<(usize, Error)>) -> Error {
        failures.sort_by_key(|(index, _)| *index);
        let Some((_, last)) = failures.pop() else {
            return Error::new(
                ErrorKind::RegistryUnavailable,
                "registry",
                self.reference.registry(),
            )
            .because("its configuration has no host with the needed capability");
        };
        if failures.is_empty() {
            return last;
        }
        let mirrors: Vec<String> = failures
            .iter()
            .map(|(_, error)| error.to_string())
            .collect();
        Error::new(last.kind(), "", last.to_string())
            .because(format!("(mirrors: {})", mirrors.join("; ")))
    }
}

/// The start of `bytes 5-9/10`.
fn range_start(header: &str) -> Option<u64> {
    header
        .trim()
        .strip_prefix("bytes")?
        .trim()
        .split('-')
        .next()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_start_table() {
        for (header, wanted) in [
            ("bytes 5-9/10", Some(5)),
            ("bytes 0-9/*", Some(0)),
            ("bytes */10", None),
            ("items 5-9/10", None),
            ("", None),
        ] {
            assert_eq!(range_start(header), wanted, "{header}");
        }
    }
}
