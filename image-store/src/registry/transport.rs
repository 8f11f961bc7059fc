//! Owns one host of a pull: its HTTP client, its token, redirects and retries. Turns whatever a
//! host does into an `Error` that names it. Never interprets content.

use std::time::Duration;

use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use tokio::sync::{Mutex, OnceCell};

use crate::error::{Error, ErrorKind, Result};
use crate::registry::auth::{
    Challenge, Credentials, Secret, TokenRequest, parse_challenges, parse_token, plan_token_request,
};
use crate::registry::document::beginning;
use crate::registry::hosts::{Host, authority, is_loopback};

const REDIRECTS_MAX: usize = 10;
const ATTEMPTS: u32 = 3;
const ERROR_BODY_MAX: u64 = 64 << 10;
const TOKEN_MAX: u64 = 1 << 20;
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

/// One host and everything a single pull has agreed with it.
pub(crate) struct Endpoint {
    pub(crate) host: Host,
    name: String,
    /// Scope asked for when the challenge names none.
    scope: String,
    credentials: Option<Credentials>,
    progress: Duration,
    plain: OnceCell<Client>,
    tls: OnceCell<Client>,
    /// The `Authorization` value in use, and how often it was replaced.
    authorization: Mutex<(u64, Option<HeaderValue>)>,
}

/// A GET as the caller sees it.
pub(crate) struct Get<'a> {
    pub(crate) path: String,
    pub(crate) query: Option<(&'a str, &'a str)>,
    pub(crate) accept: Option<&'static str>,
    pub(crate) offset: u64,
    /// What is asked for, for error texts: `manifest of ...`, `blob sha256:...`.
    pub(crate) what: String,
    /// Server errors are retried only when no other host is left to ask.
    pub(crate) retry: bool,
}

impl Endpoint {
    pub(crate) fn new(
        host: Host,
        repository: &str,
        credentials: Option<Credentials>,
        progress: Duration,
    ) -> Self {
        Endpoint {
            name: host.name(),
            host,
            scope: format!("repository:{repository}:pull"),
            credentials,
            progress,
            plain: OnceCell::new(),
            tls: OnceCell::new(),
            authorization: Mutex::new((0, None)),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn error(
        &self,
        kind: ErrorKind,
        why: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error::new(kind, "registry", self.name.clone()).because(why)
    }

    /// Sends a GET, authorising once and retrying server errors a few times.
    pub(crate) async fn get(&self, request: &Get<'_>) -> Result<Response> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let response = self.get_authorized(request).await?;
            let status = response.status();
            if status == StatusCode::OK
                || (status == StatusCode::PARTIAL_CONTENT && request.offset > 0)
            {
                return Ok(response);
            }
            let transient = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
            if !(transient && request.retry && attempt < ATTEMPTS) {
                return Err(self.refusal(response, &request.what).await);
            }
            let wait = retry_after(response.headers()).unwrap_or_else(|| backoff(attempt));
            tracing::debug!(host = self.name, %status, ?wait, "registry busy, retrying");
            drop(response);
            tokio::time::sleep(wait).await;
        }
    }

    async fn get_authorized(&self, request: &Get<'_>) -> Result<Response> {
        let mut url = self.host.base.join(&request.path).map_err(|error| {
            self.error(
                ErrorKind::Internal,
                format!("bad path {}: {error}", request.path),
            )
        })?;
        if let Some((key, value)) = request.query {
            url.query_pairs_mut().append_pair(key, value);
        }
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(accept) = request.accept {
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
        }
        if request.offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", request.offset))
        {
            headers.insert(RANGE, range);
        }
        let (mut generation, mut value) = self.authorization.lock().await.clone();
        let mut refreshed = false;
        loop {
            let response = self
                .follow(url.clone(), headers.clone(), value.as_ref(), &request.what)
                .await?;
            if response.status() != StatusCode::UNAUTHORIZED || refreshed {
                return Ok(response);
            }
            refreshed = true;
            let mut current = self.authorization.lock().await;
            if current.0 == generation {
                let fresh = self.authorize(&response, &request.what).await?;
                *current = (generation + 1, Some(fresh));
            }
            (generation, value) = current.clone();
        }
    }

    /// Sends a GET and follows redirects. Authorization and configured headers stay at the host
    /// they are for (CVE-2020-15157 and its many relatives).
    async fn follow(
        &self,
        mut url: Url,
        headers: HeaderMap,
        authorization: Option<&HeaderValue>,
        what: &str,
    ) -> Result<Response> {
        let mut at_home = true;
        for _ in 0..=REDIRECTS_MAX {
            at_home &= url.origin() == self.host.base.origin();
            let mut sent = headers.clone();
            if at_home {
                for (name, value) in &self.host.headers {
                    sent.append(name.clone(), value.clone());
                }
                if let Some(value) = authorization {
                    sent.insert(AUTHORIZATION, value.clone());
                }
            }
            let response = self.send(Method::GET, url.clone(), sent, None).await?;
            let code = response.status().as_u16();
            if !matches!(code, 301 | 302 | 303 | 307 | 308) {
                if !at_home && code == 401 {
                    // Our credentials are for the registry; there is nothing to tell this host.
                    return Err(self.error(
                        ErrorKind::Unauthenticated,
                        format!(
                            "{what}: redirected to {}, which answered 401",
                            authority(&url)
                        ),
                    ));
                }
                return Ok(response);
            }
            let target = response
                .headers()
                .get(LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|text| url.join(text).ok())
                .filter(|target| matches!(target.scheme(), "http" | "https"))
                .ok_or_else(|| {
                    self.error(
                        ErrorKind::Corrupt,
                        format!("{what}: redirect {code} without a usable location"),
                    )
                })?;
            if url.scheme() == "https" && target.scheme() == "http" {
                return Err(self.error(
                    ErrorKind::Corrupt,
                    format!(
                        "{what}: redirect from https to plain http at {}",
                        authority(&target)
                    ),
                ));
            }
            url = target;
        }
        Err(self.error(
            ErrorKind::RegistryUnavailable,
            format!("{what}: more than {REDIRECTS_MAX} redirects"),
        ))
    }

    async fn send(
        &self,
        method: Method,
        url: Url,
        headers: HeaderMap,
        body: Option<String>,
    ) -> Result<Response> {
        let client = self.client(url.scheme() == "https").await?;
        let mut request = client.request(method, url.clone()).headers(headers);
        if let Some(body) = body {
            request = request
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(body);
        }
        match tokio::time::timeout(self.progress, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.transport_error(&url, error)),
            Err(_) => Err(self.error(
                ErrorKind::DeadlineExceeded,
                format!(
                    "no answer from {} within {:?}",
                    authority(&url),
                    self.progress
                ),
            )),
        }
    }

    async fn client(&self, tls: bool) -> Result<&Client> {
        let cell = if tls { &self.tls } else { &self.plain };
        cell.get_or_try_init(|| async { self.build_client(tls) })
            .await
    }

    fn build_client(&self, tls: bool) -> Result<Client> {
        let mut builder = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .user_agent(concat!("coracle/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.host.dial_timeout)
            .tcp_nodelay(true)
            // The resolver of a static binary need not know this name.
            .resolve_to_addrs(
                "localhost",
                &[
                    ([127, 0, 0, 1], 0).into(),
                    ([0, 0, 0, 0, 0, 0, 0, 1], 0).into(),
                ],
            );
        if self.host.base.host_str().is_some_and(is_loopback) {
            builder = builder.no_proxy();
        }
        if !tls {
            builder = builder.tls_certs_only([]);
        } else if self.host.tls.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if tls {
            let mut authorities = Vec::new();
            for path in &self.host.tls.ca {
                let pem = self.read_pem(path)?;
                let parsed = reqwest::Certificate::from_pem_bundle(&pem)
                    .map_err(|error| self.bad_pem(path, &error))?;
                authorities.extend(parsed);
            }
            if !authorities.is_empty() {
                builder = builder.tls_certs_merge(authorities);
            }
            if let Some((certificate, key)) = self.host.tls.client.first() {
                let mut pem = self.read_pem(certificate)?;
                if let Some(key) = key {
                    pem.push(b'\n');
                    pem.extend(self.read_pem(key)?);
                }
                let identity = reqwest::Identity::from_pem(&pem)
                    .map_err(|error| self.bad_pem(certificate, &error))?;
                builder = builder.identity(identity);
            }
        }
        builder.build().map_err(|error| {
            self.error(
                ErrorKind::Io,
                format!("make an http client: {}", root_cause(&error)),
            )
        })
    }

    fn read_pem(&self, path: &std::path::Path) -> Result<Vec<u8>> {
        std::fs::read(path).map_err(|error| {
            Error::io("read certificate", path.display().to_string(), error)
                .within("registry", self.name.clone())
        })
    }

    fn bad_pem(&self, path: &std::path::Path, error: &reqwest::Error) -> Error {
        self.error(
            ErrorKind::Io,
            format!("certificate {}: {}", path.display(), root_cause(error)),
        )
    }

    /// Answers a 401 with the `Authorization` value for the next try.
    async fn authorize(&self, response: &Response, what: &str) -> Result<HeaderValue> {
        let headers: Vec<&str> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let secret = self
            .credentials
            .as_ref()
            .and_then(|c| c.secret_for(&self.name));
        let challenges = parse_challenges(headers.into_iter());
        for challenge in &challenges {
            match (challenge, secret) {
                (Challenge::Basic, Some(Secret::Password { username, password })) => {
                    return self.basic(username, password);
                }
                (Challenge::Basic, _) => {}
                (Challenge::Bearer { .. }, Some(Secret::RegistryToken(token))) => {
                    return self.bearer(token);
                }
                (
                    Challenge::Bearer {
                        realm,
                        service,
                        scope,
                    },
                    secret,
                ) => {
                    let challenge = (realm.as_str(), service.as_deref(), scope.as_deref());
                    let request =
                        plan_token_request(&self.host.base, challenge, &self.scope, secret)?;
                    let token = self.fetch_token(request).await?;
                    return self.bearer(&token);
                }
            }
        }
        let why = match (challenges.is_empty(), secret.is_some()) {
            (true, _) => "401 without a challenge that can be met",
            (false, false) => "401: it wants credentials, none were given for it",
            (false, true) => "401: it wants a user name and password, the credentials are a token",
        };
        Err(self.error(ErrorKind::Unauthenticated, format!("{what}: {why}")))
    }

    fn basic(&self, username: &str, password: &str) -> Result<HeaderValue> {
        use base64::Engine as _;
        let pair = format!("{username}:{password}");
        self.secret_header(format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(pair)
        ))
    }

    fn bearer(&self, token: &str) -> Result<HeaderValue> {
        self.secret_header(format!("Bearer {token}"))
    }

    fn secret_header(&self, text: String) -> Result<HeaderValue> {
        let mut value = HeaderValue::from_str(&text).map_err(|_| {
            self.error(
                ErrorKind::Unauthenticated,
                "a token that cannot be sent in a header",
            )
        })?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn fetch_token(&self, request: TokenRequest) -> Result<String> {
        let mut headers = HeaderMap::new();
        let (method, url, form) = match request {
            TokenRequest::Get { url, basic } => {
                if let Some((username, password)) = basic {
                    headers.insert(AUTHORIZATION, self.basic(&username, &password)?);
                }
                (Method::GET, url, None)
            }
            TokenRequest::Post { url, form } => (Method::POST, url, Some(form)),
        };
        let server = authority(&url);
        let response = self.send(method, url, headers, form).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let kind = match status.as_u16() {
                429 | 500..=599 => ErrorKind::RegistryUnavailable,
                _ => ErrorKind::Unauthenticated,
            };
            return Err(self.error(kind, format!("token server {server} answered {status}")));
        }
        let body = self.read_bounded(response, TOKEN_MAX, "token").await?;
        parse_token(&body).ok_or_else(|| {
            self.error(
                ErrorKind::Corrupt,
                format!("token server {server} answered something that is not a token"),
            )
        })
    }

    /// Reads a whole body of at most `limit` bytes.
    pub(crate) async fn read_bounded(
        &self,
        mut response: Response,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>> {
        let too_long = || {
            self.error(
                ErrorKind::Corrupt,
                format!("{what}: more than {limit} bytes"),
            )
        };
        if response
            .content_length()
            .is_some_and(|length| length > limit)
        {
            return Err(too_long());
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(&mut response, what).await? {
            if body.len() as u64 + chunk.len() as u64 > limit {
                return Err(too_long());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// The next piece of a body, under the progress timeout.
    pub(crate) async fn chunk(
        &self,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<bytes::Bytes>> {
        match tokio::time::timeout(self.progress, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.error(
                ErrorKind::RegistryUnavailable,
                format!("{what}: the connection broke: {}", root_cause(&error)),
            )),
            Err(_) => Err(self.error(
                ErrorKind::DeadlineExceeded,
                format!("{what}: nothing received for {:?}", self.progress),
            )),
        }
    }

    /// The error for an answer other than success, with what the body says about it.
    async fn refusal(&self, response: Response, what: &str) -> Error {
        let status = response.status();
        let kind = match status.as_u16() {
            401 => ErrorKind::Unauthenticated,
            403 => ErrorKind::PermissionDenied,
            404 => ErrorKind::NotFound,
            code if code < 400 => ErrorKind::Corrupt,
            _ => ErrorKind::RegistryUnavailable,
        };
        let body = self
            .read_bounded(response, ERROR_BODY_MAX, what)
            .await
            .unwrap_or_default();
        let detail = error_detail(&body);
        let refused = match (status, self.credentials.is_some()) {
            (StatusCode::UNAUTHORIZED, true) => " (the credentials were refused)",
            _ => "",
        };
        self.error(kind, format!("{what}: {status}{refused}{detail}"))
    }

    fn transport_error(&self, url: &Url, error: reqwest::Error) -> Error {
        let at = authority(url);
        let cause = root_cause(&error);
        let text = match find_tls_error(&error) {
            Some(rustls::Error::InvalidMessage(_)) if error.is_connect() => format!(
                "{at}: server gave HTTP response to HTTPS client (for a plain HTTP registry put \
                 server = \"http://{at}\" into its hosts.toml)"
            ),
            Some(tls) => format!("{at}: tls: {tls}"),
            None if error.is_timeout() => format!("dial {at}: timed out"),
            None if error.is_connect() => format!("dial {at}: {cause}"),
            None => format!("{at}: {cause}"),
        };
        let kind = if error.is_timeout() {
            ErrorKind::DeadlineExceeded
        } else {
            ErrorKind::RegistryUnavailable
        };
        self.error(kind, text)
    }
}

/// `: CODE: message` of a registry's error envelope, cut and escaped; else how the body begins.
fn error_detail(body: &[u8]) -> String {
    let clean = |text: &str| -> String {
        text.chars()
            .take(200)
            .flat_map(char::escape_debug)
            .collect()
    };
    let Ok(envelope) = serde_json::from_slice::<serde_json::Value>(body) else {
        return if body.is_empty() {
            String::new()
        } else {
            format!(": {}", beginning(body))
        };
    };
    let first = envelope.get("errors").and_then(|errors| errors.get(0));
    let field = |name: &str| first.and_then(|e| e.get(name)).and_then(|v| v.as_str());
    match (field("code"), field("message")) {
        (Some(code), Some(message)) => format!(": {}: {}", clean(code), clean(message)),
        (Some(one), None) | (None, Some(one)) => format!(": {}", clean(one)),
        (None, None) => String::new(),
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

/// 250 ms, 500 ms, ... with half of it random, so that a fleet does not return in step.
pub(crate) fn backoff(attempt: u32) -> Duration {
    let full = Duration::from_millis(250) * 2u32.saturating_pow(attempt.saturating_sub(1).min(5));
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    full / 2 + full / 2 * (nanos % 1000) / 1000
}

/// The innermost error, without URLs: redirect targets carry signatures in their query.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &(dyn std::error::Error + 'static) = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    match cause.downcast_ref::<reqwest::Error>() {
        Some(own) if own.is_builder() => "cannot build the request".to_owned(),
        Some(_) => "request failed".to_owned(),
        None => cause.to_string(),
    }
}

fn find_tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        if let Some(found) = one.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // io::Error::source() skips the error it wraps.
        cause = match one
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref)
        {
            Some(wrapped) => Some(wrapped),
            None => one.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_detail_table() {
        for (body, wanted) in [
            (
                r#"{"errors":[{"code":"X","message":"m\nn"}]}"#,
                ": X: m\\nn",
            ),
            (r#"{"errors":[{"code":"X"}]}"#, ": X"),
            (r#"{"errors":[]}"#, ""),
            ("", ""),
            ("<html>", ": begins \"<html>\""),
        ] {
            assert_eq!(error_detail(body.as_bytes()), wanted);
        }
    }

    #[test]
    fn retry_after_is_bounded() {
        let mut headers = HeaderMap::new();
        assert_eq!(retry_after(&headers), None);
        headers.insert(RETRY_AFTER, HeaderValue::from_static("2"));
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(2)));
        headers.insert(RETRY_AFTER, HeaderValue::from_static("99999"));
        assert_eq!(retry_after(&headers), Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn backoff_grows_and_stays_bounded() {
        assert!(backoff(1) <= Duration::from_millis(250));
        assert!(backoff(2) >= Duration::from_millis(250));
        assert!(backoff(1000) <= Duration::from_secs(8));
    }
}
