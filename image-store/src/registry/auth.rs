//! Owns what a pull knows about proving who it is: credentials, challenges and tokens. Nothing here
//! outlives the pull, so one tenant's token never serves another.
//!
//! Facts: RFC 7235 challenges; docs.docker.com "token authentication"; the OAuth2 POST form for
//! identity tokens.

use base64::Engine as _;
use reqwest::Url;
use serde::Deserialize;

use crate::api::Auth;
use crate::error::{Error, ErrorKind, Result};
use crate::registry::hosts::authority;

/// The secret a pull was given, in the one form it will be used.
#[derive(Clone)]
pub(crate) enum Secret {
    Password { username: String, password: String },
    IdentityToken(String),
    RegistryToken(String),
}

/// A secret and the host it is for.
#[derive(Clone)]
pub(crate) struct Credentials {
    secret: Secret,
    /// `None`: any host that this pull asks.
    server: Option<String>,
}

impl Credentials {
    /// Reads CRI's form. `None` when every field is empty.
    pub(crate) fn parse(auth: &Auth) -> Result<Option<Self>> {
        let server = server_host(&auth.server_address);
        let secret = if !auth.registry_token.is_empty() {
            Secret::RegistryToken(auth.registry_token.clone())
        } else if !auth.identity_token.is_empty() {
            Secret::IdentityToken(auth.identity_token.clone())
        } else if !auth.username.is_empty() {
            password(auth.username.clone(), auth.password.clone())
        } else if !auth.auth.is_empty() {
            let (username, password_text) = decode(&auth.auth)?;
            password(username, password_text)
        } else {
            return Ok(None);
        };
        Ok(Some(Credentials { secret, server }))
    }

    /// The secret, if it may be sent to `host` (as in a URL's authority).
    pub(crate) fn secret_for(&self, host: &str) -> Option<&Secret> {
        match &self.server {
            None => Some(&self.secret),
            Some(server) => (canonical(server) == canonical(host)).then_some(&self.secret),
        }
    }
}

fn password(username: String, password: String) -> Secret {
    // docker login stores an identity token under this name.
    if username == "<token>" {
        Secret::IdentityToken(password)
    } else {
        Secret::Password { username, password }
    }
}

fn decode(text: &str) -> Result<(String, String)> {
    let bad = || {
        Error::new(ErrorKind::Unauthenticated, "read credentials", "")
            .because("\"auth\" is not base64 of user:password")
    };
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .map_err(|_| bad())?;
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    let (username, password) = text.split_once(':').ok_or_else(bad)?;
    Ok((
        username.to_owned(),
        password.trim_end_matches('\0').to_owned(),
    ))
}

/// The host of `https://index.docker.io/v1/` or `registry:5000`.
fn server_host(address: &str) -> Option<String> {
    if address.is_empty() {
        return None;
    }
    let url = if address.contains("://") {
        Url::parse(address)
    } else {
        Url::parse(&format!("https://{address}"))
    };
    Some(url.map_or_else(|_| address.to_owned(), |url| authority(&url)))
}

/// Docker Hub has three names.
fn canonical(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other.strip_suffix(":443").unwrap_or(other),
    }
}

/// One challenge of a `WWW-Authenticate` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// All challenges of all headers, those we cannot meet left out. Bearer first.
pub(crate) fn parse_challenges<'a>(headers: impl Iterator<Item = &'a str>) -> Vec<Challenge> {
    let mut found = Vec::new();
    for header in headers {
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let end = rest.find([' ', ',']).unwrap_or(rest.len());
            let scheme = &rest[..end];
            let (parameters, after) = parameters(rest[end..].trim_start());
            rest = after;
            let value = |name: &str| {
                parameters
                    .iter()
                    .find(|(n, _)| n.eq_ignore_ascii_case(name))
                    .map(|(_, v)| v.clone())
            };
            if scheme.eq_ignore_ascii_case("basic") {
                found.push(Challenge::Basic);
            } else if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = value("realm")
            {
                found.push(Challenge::Bearer {
                    realm,
                    service: value("service"),
                    scope: value("scope"),
                });
            }
        }
    }
    found.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
    found
}

/// Reads `name=value, name="value"` up to the next scheme.
fn parameters(mut rest: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', ',', '\t']);
        let Some(equals) = rest.find('=') else {
            return (found, "");
        };
        let name = rest[..equals].trim_end();
        if name.contains([' ', ',']) {
            // The next scheme: `Basic realm=...`, or a scheme without parameters before a comma.
            return (found, rest);
        }
        let after = rest[equals + 1..].trim_start();
        if let Some(quoted) = after.strip_prefix('"') {
            let mut value = String::new();
            let mut escaped = false;
            let mut end = quoted.len();
            for (at, c) in quoted.char_indices() {
                match c {
                    _ if escaped => {
                        value.push(c);
                        escaped = false;
                    }
                    '\\' => escaped = true,
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    _ => value.push(c),
                }
            }
            found.push((name.to_owned(), value));
            rest = &quoted[end..];
        } else {
            let end = after.find([',', ' ']).unwrap_or(after.len());
            found.push((name.to_owned(), after[..end].to_owned()));
            rest = &after[end..];
        }
    }
}

/// How to ask a token server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TokenRequest {
    Get {
        url: Url,
        basic: Option<(String, String)>,
    },
    Post {
        url: Url,
        form: String,
    },
}

/// Plans the request for a bearer challenge. The realm may not be less protected than the
/// registry: a mirror must not be able to ask for a password in clear text.
pub(crate) fn plan_token_request(
    registry: &Url,
    challenge: (&str, Option<&str>, Option<&str>),
    default_scope: &str,
    secret: Option<&Secret>,
) -> Result<TokenRequest> {
    let (realm, service, scope) = challenge;
    let refuse = |why: &str| {
        Error::new(
            ErrorKind::Unauthenticated,
            "use the token server named by",
            authority(registry),
        )
        .because(why.to_owned())
    };
    let mut url = Url::parse(realm).map_err(|_| refuse("its realm is not a URL"))?;
    match (registry.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(refuse("its realm is plain http")),
        _ => return Err(refuse("its realm is neither http nor https")),
    }
    let scope = scope.unwrap_or(default_scope);
    if let Some(Secret::IdentityToken(token)) = secret {
        let mut form = url::form(&[
            ("grant_type", "refresh_token"),
            ("client_id", "coracle"),
            ("scope", scope),
            ("refresh_token", token),
        ]);
        if let Some(service) = service {
            form.push('&');
            form.push_str(&url::form(&[("service", service)]));
        }
        return Ok(TokenRequest::Post { url, form });
    }
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        for one in scope.split(' ').filter(|one| !one.is_empty()) {
            query.append_pair("scope", one);
        }
    }
    let basic = match secret {
        Some(Secret::Password { username, password }) => {
            url.query_pairs_mut().append_pair("account", username);
            Some((username.clone(), password.clone()))
        }
        _ => None,
    };
    Ok(TokenRequest::Get { url, basic })
}

mod url {
    /// `application/x-www-form-urlencoded`.
    pub(super) fn form(pairs: &[(&str, &str)]) -> String {
        // The query of a URL is written in just this encoding.
        let mut scratch = super::Url::parse("http://form.invalid/").ok();
        if let Some(url) = scratch.as_mut() {
            url.query_pairs_mut().extend_pairs(pairs);
        }
        scratch
            .and_then(|url| url.query().map(str::to_owned))
            .unwrap_or_default()
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The token in a token server's answer.
pub(crate) fn parse_token(bytes: &[u8]) -> Option<String> {
    let answer: TokenAnswer = serde_json::from_slice(bytes).ok()?;
    answer
        .token
        .or(answer.access_token)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenge_table() {
        for (header, wanted) in [
            (r#"Basic realm="x""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://a/t",service="s, t",scope="repository:a/b:pull,push""#,
                vec![bearer(
                    "https://a/t",
                    Some("s, t"),
                    Some("repository:a/b:pull,push"),
                )],
            ),
            (
                r#"basic realm="x", BEARER realm="https://a/t""#,
                vec![bearer("https://a/t", None, None), Challenge::Basic],
            ),
            (
                r#"Bearer realm=https://a/t, service=s"#,
                vec![bearer("https://a/t", Some("s"), None)],
            ),
            (r#"Bearer realm="a\"b""#, vec![bearer("a\"b", None, None)]),
            (r#"Negotiate, Basic realm="x""#, vec![Challenge::Basic]),
            ("Bearer", vec![]),
            (
                r#"Bearer realm="unclosed"#,
                vec![bearer("unclosed", None, None)],
            ),
            ("", vec![]),
        ] {
            assert_eq!(parse_challenges([header].into_iter()), wanted, "{header}");
        }
    }

    #[test]
    fn credentials_are_scoped_by_server_address() {
        let auth = |server: &str| Auth {
            username: "u".into(),
            password: "p".into(),
            server_address: server.into(),
            ..Auth::default()
        };
        for (server, host, sent) in [
            ("", "anything:5000", true),
            ("https://index.docker.io/v1/", "registry-1.docker.io", true),
            ("docker.io", "registry-1.docker.io", true),
            ("https://reg:5000", "reg:5000", true),
            ("reg:5000", "reg:5000", true),
            ("reg:5000", "reg:5001", false),
            ("reg", "evil", false),
        ] {
            let credentials = Credentials::parse(&auth(server))
                .expect("ok")
                .expect("some");
            assert_eq!(
                credentials.secret_for(host).is_some(),
                sent,
                "{server} {host}"
            );
        }
    }

    #[test]
    fn credentials_forms() {
        let parse = |auth: Auth| Credentials::parse(&auth).map(|c| c.map(|c| c.secret));
        assert!(matches!(parse(Auth::default()), Ok(None)));
        let encoded = Auth {
            auth: "dTpwOnE=".into(),
            ..Auth::default()
        };
        assert!(
            matches!(parse(encoded), Ok(Some(Secret::Password { username, password }))
            if username == "u" && password == "p:q")
        );
        let broken = Auth {
            auth: "%%%".into(),
            ..Auth::default()
        };
        assert!(matches!(parse(broken), Err(e) if !e.to_string().contains("%%%")));
        let token = Auth {
            username: "<token>".into(),
            password: "t".into(),
            ..Auth::default()
        };
        assert!(matches!(parse(token), Ok(Some(Secret::IdentityToken(t))) if t == "t"));
        let registry = Auth {
            registry_token: "r".into(),
            username: "u".into(),
            ..Auth::default()
        };
        assert!(matches!(parse(registry), Ok(Some(Secret::RegistryToken(t))) if t == "r"));
        let shown = format!(
            "{:?}",
            Auth {
                password: "hunter2".into(),
                ..Auth::default()
            }
        );
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn token_request_never_leaves_tls() {
        let https = Url::parse("https://r/v2/").expect("url");
        let http = Url::parse("http://r/v2/").expect("url");
        let plan = |registry: &Url, realm: &str, secret: Option<&Secret>| {
            plan_token_request(
                registry,
                (realm, Some("s"), None),
                "repository:a:pull",
                secret,
            )
        };
        assert!(plan(&https, "http://t/x", None).is_err());
        assert!(plan(&http, "http://t/x", None).is_ok());
        assert!(plan(&http, "file:///etc", None).is_err());
        let secret = Secret::Password {
            username: "u".into(),
            password: "p".into(),
        };
        let Ok(TokenRequest::Get { url, basic }) = plan(&https, "https://t/x", Some(&secret))
        else {
            panic!("not a GET")
        };
        assert_eq!(
            url.as_str(),
            "https://t/x?service=s&scope=repository%3Aa%3Apull&account=u"
        );
        assert_eq!(basic, Some(("u".into(), "p".into())));
        let secret = Secret::IdentityToken("a&b".into());
        let Ok(TokenRequest::Post { form, .. }) = plan(&https, "https://t/x", Some(&secret)) else {
            panic!("not a POST")
        };
        assert!(
            form.contains("refresh_token=a%26b") && form.ends_with("&service=s"),
            "{form}"
        );
    }

    #[test]
    fn token_answers() {
        assert_eq!(parse_token(br#"{"token":"a"}"#).as_deref(), Some("a"));
        assert_eq!(
            parse_token(br#"{"access_token":"b"}"#).as_deref(),
            Some("b")
        );
        assert_eq!(parse_token(br#"{"token":""}"#), None);
        assert_eq!(parse_token(b"<html>"), None);
    }
}
