//! Owns image references: docker's normalisation of what a person types into registry, repository,
//! tag and digest. Never looks anything up.
//!
//! The grammar is oci-client's `Reference`; what it lacks (a text for upper-case repositories,
//! IPv6 literals, the 64-hex rule) is checked here, see docs/decisions/0002.

use std::fmt;
use std::net::Ipv6Addr;

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// Longest text that can be a reference: host, port, repository of 255, tag of 128, sha512 digest.
const LENGTH_MAX: usize = 1024;
/// Stands in for a bracketed IPv6 literal while oci-client parses the rest.
const IPV6_STAND_IN: &str = "ipv6-literal.invalid";

/// A normalised reference. At least one of tag and digest is set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| {
            let shown: String = text
                .chars()
                .take(256)
                .flat_map(char::escape_debug)
                .collect();
            Error::new(
                ErrorKind::InvalidReference,
                "invalid image reference",
                format!("\"{shown}\""),
            )
            .because(why)
        };
        if text.is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        if text.len() > LENGTH_MAX {
            return Err(bad(format!("it is longer than {LENGTH_MAX} bytes")));
        }
        let bare_hex = text.len() == 64
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if bare_hex {
            return Err(bad(
                "64 hex digits are an image id, not a repository name".to_owned()
            ));
        }
        if let Some(repository) = uppercase_repository(text) {
            return Err(bad(format!(
                "repository name {repository} must be lowercase"
            )));
        }
        let (ipv6_host, plain) = replace_ipv6_host(text).map_err(bad)?;
        let parsed = oci_client::Reference::try_from(plain.as_str())
            .map_err(|error| bad(error.to_string()))?;
        let digest = match parsed.digest() {
            Some(digest) => Some(Digest::parse(digest).map_err(|e| bad(e.to_string()))?),
            None => None,
        };
        let registry = match ipv6_host {
            Some(host) => parsed.registry().replacen(IPV6_STAND_IN, &host, 1),
            None => parsed.registry().to_owned(),
        };
        Ok(Reference {
            registry,
            repository: parsed.repository().to_owned(),
            tag: parsed.tag().map(str::to_owned),
            digest,
        })
    }

    /// Host and optional port, `docker.io` for Docker Hub.
    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    pub(crate) fn repository(&self) -> &str {
        &self.repository
    }

    pub(crate) fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What goes into the `/manifests/` URL: the digest wins over the tag.
    pub(crate) fn locator(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// `registry/repository:tag`, when this reference names a tag and no digest.
    pub(crate) fn tag_name(&self) -> Option<String> {
        match (&self.digest, &self.tag) {
            (None, Some(tag)) => Some(format!("{}/{}:{tag}", self.registry, self.repository)),
            _ => None,
        }
    }

    /// `registry/repository@digest`.
    pub(crate) fn digest_name(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The repository part of `text` when it has an upper-case letter.
fn uppercase_repository(text: &str) -> Option<&str> {
    let name = text.split('@').next().unwrap_or(text);
    let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost";
    let rest = match name.split_once('/') {
        Some((host, rest)) if is_host(host) => rest,
        _ => name,
    };
    let last_slash = rest.rfind('/').map_or(0, |at| at + 1);
    let repository = match rest[last_slash..].find(':') {
        Some(colon) => &rest[..last_slash + colon],
        None => rest,
    };
    repository
        .bytes()
        .any(|b| b.is_ascii_uppercase())
        .then_some(repository)
}

/// Splits `[::1]:5000/x` into the literal and a text oci-client can parse.
fn replace_ipv6_host(text: &str) -> std::result::Result<(Option<String>, String), String> {
    let Some(inside) = text.strip_prefix('[') else {
        return Ok((None, text.to_owned()));
    };
    let (literal, rest) = inside
        .split_once(']')
        .ok_or_else(|| "the bracket of the host is not closed".to_owned())?;
    let address: Ipv6Addr = literal
        .parse()
        .map_err(|_| format!("[{literal}] is no IPv6 address"))?;
    Ok((
        Some(format!("[{address}]")),
        format!("{IPV6_STAND_IN}{rest}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    #[test]
    fn parse_normalises_like_docker() {
        let digest = format!("sha256:{HEX}");
        for (text, whole, registry, repository) in [
            (
                "busybox",
                "docker.io/library/busybox:latest",
                "docker.io",
                "library/busybox",
            ),
            (
                "busybox:1.36",
                "docker.io/library/busybox:1.36",
                "docker.io",
                "library/busybox",
            ),
            (
                "user/app",
                "docker.io/user/app:latest",
                "docker.io",
                "user/app",
            ),
            (
                "docker.io/busybox",
                "docker.io/library/busybox:latest",
                "docker.io",
                "library/busybox",
            ),
            (
                "index.docker.io/a/b",
                "docker.io/a/b:latest",
                "docker.io",
                "a/b",
            ),
            ("localhost/x", "localhost/x:latest", "localhost", "x"),
            (
                "localhost:5000/x/y:Z1",
                "localhost:5000/x/y:Z1",
                "localhost:5000",
                "x/y",
            ),
            (
                "127.0.0.1:5000/a",
                "127.0.0.1:5000/a:latest",
                "127.0.0.1:5000",
                "a",
            ),
            ("[::1]:5000/a:b", "[::1]:5000/a:b", "[::1]:5000", "a"),
            (
                "quay.io/a/b/c/d",
                "quay.io/a/b/c/d:latest",
                "quay.io",
                "a/b/c/d",
            ),
            ("EXAMPLE.com/a", "EXAMPLE.com/a:latest", "EXAMPLE.com", "a"),
        ] {
            let parsed = Reference::parse(text).expect(text);
            assert_eq!(parsed.to_string(), whole);
            assert_eq!(
                (parsed.registry(), parsed.repository()),
                (registry, repository)
            );
            assert_eq!(parsed.tag_name().as_deref(), Some(whole));
        }
        let both = Reference::parse(&format!("h.io/a:t@{digest}")).expect("tag and digest");
        assert_eq!(both.locator(), digest);
        assert_eq!(both.tag_name(), None);
        assert_eq!(both.digest().map(Digest::to_string), Some(digest.clone()));
        let only = Reference::parse(&format!("h.io/a@{digest}")).expect("digest");
        assert_eq!(only.to_string(), format!("h.io/a@{digest}"));
    }

    #[test]
    fn parse_refuses_with_a_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("BusyBox", "repository name BusyBox must be lowercase"),
            (
                "localhost:5000/Foo/bar:x",
                "repository name Foo/bar must be lowercase",
            ),
            ("a b", "invalid reference format"),
            ("a:", "invalid reference format"),
            ("a@sha256:12", "invalid"),
            ("-a", "invalid reference format"),
            ("a/../b", "invalid reference format"),
            ("http://a/b", "invalid reference format"),
            ("[::1/a", "not closed"),
            ("[zz]/a", "no IPv6"),
            (HEX, "image id"),
            ("a\nb", "invalid reference format"),
        ] {
            let error = Reference::parse(text).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidReference, "{text}");
            let shown = error.to_string();
            assert!(shown.contains(reason), "{shown}");
            assert!(!shown.contains('\n'), "{shown:?}");
        }
        let long = format!("h.io/{}", "a".repeat(2000));
        assert!(Reference::parse(&long).is_err());
    }
}
