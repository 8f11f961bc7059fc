//! Owns the list of hosts a pull may ask, in order: mirrors of containerd's `hosts.toml`, then the
//! registry itself. Reads configuration files, never talks to a host.
//!
//! Facts: containerd docs/hosts.md. Directories are searched as `<host>_<port>_`, `<host>:<port>`,
//! `_default`; keys at the top level belong to `server`, which is asked last.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use crate::error::{Error, ErrorKind, Result};

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How to verify a host and how to present ourselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tls {
    pub(crate) skip_verify: bool,
    /// PEM files of certificate authorities, on top of the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// Client certificate and key; one file when there is no key path.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
}

/// One host to ask.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Ends with `/`: `https://mirror:5000/v2/`.
    pub(crate) base: Url,
    pub(crate) resolve: bool,
    pub(crate) pull: bool,
    pub(crate) tls: Tls,
    pub(crate) headers: HeaderMap,
    pub(crate) dial_timeout: Duration,
    /// Not the registry of the reference: requests carry `?ns=`.
    pub(crate) is_mirror: bool,
}

impl Host {
    /// `host:port` as errors show it.
    pub(crate) fn name(&self) -> String {
        authority(&self.base)
    }
}

pub(crate) fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.to_string(),
    }
}

/// `localhost` and loopback literals: plain HTTP by default, never through a proxy.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost"
        || bare.ends_with(".localhost")
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// All hosts for `registry`, in the order they are to be asked. Never empty.
pub(crate) fn load(dirs: &[PathBuf], registry: &str) -> Result<Vec<Host>> {
    for dir in dirs {
        for name in directory_names(registry) {
            let candidate = dir.join(name);
            let file = candidate.join("hosts.toml");
            match std::fs::read_to_string(&file) {
                Ok(text) => return parse(&text, &file, registry),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => continue,
                Err(error) => {
                    return Err(Error::io("read", file.display().to_string(), error));
                }
            }
            if candidate.is_dir() {
                return Ok(vec![docker_certs_layout(&candidate, registry)?]);
            }
        }
    }
    Ok(vec![default_host(registry)?])
}

fn directory_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
            names.push(format!("{host}_{port}_"));
            names.push(registry.to_owned());
        }
        _ => names.push(registry.to_owned()),
    }
    names.push("_default".to_owned());
    names
}

fn default_host(registry: &str) -> Result<Host> {
    let endpoint = if registry == "docker.io" {
        "registry-1.docker.io"
    } else {
        registry
    };
    let (host, port) = match endpoint.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (host, Some(port)),
        _ => (endpoint, None),
    };
    let scheme = if is_loopback(host) && port != Some("443") {
        "http"
    } else {
        "https"
    };
    let base = Url::parse(&format!("{scheme}://{endpoint}/v2/")).map_err(|error| {
        Error::new(ErrorKind::InvalidReference, "use as a registry", registry).because(error)
    })?;
    Ok(Host {
        base,
        resolve: true,
        pull: true,
        tls: Tls::default(),
        headers: HeaderMap::new(),
        dial_timeout: DIAL_TIMEOUT,
        is_mirror: false,
    })
}

/// `/etc/docker/certs.d`: `*.crt` are authorities, `*.cert` + `*.key` a client certificate.
fn docker_certs_layout(dir: &Path, registry: &str) -> Result<Host> {
    let mut host = default_host(registry)?;
    let entries = std::fs::read_dir(dir)
        .map_err(|error| Error::io("read directory", dir.display().to_string(), error))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => host.tls.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                host.tls.client.push((path, Some(key)));
            }
            _ => {}
        }
    }
    if !host.tls.ca.is_empty() || !host.tls.client.is_empty() {
        // Certificates for a loopback registry mean that it speaks TLS.
        host.base
            .set_scheme("https")
            .map_err(|()| Error::new(ErrorKind::Internal, "set scheme https for", registry))?;
    }
    Ok(host)
}

/// Parses one hosts.toml. Unknown keys are warned about, bad values are errors.
fn parse(text: &str, file: &Path, registry: &str) -> Result<Vec<Host>> {
    let mut reader = Reader { file, registry };
    let mut table: toml::Table =
        toml::from_str(text).map_err(|error| reader.error("", error.to_string()))?;
    let mut hosts = Vec::new();
    if let Some(value) = table.remove("host") {
        let toml::Value::Table(entries) = value else {
            return Err(reader.error("host", "is not a table"));
        };
        for (address, value) in entries {
            let toml::Value::Table(entry) = value else {
                return Err(reader.error(&address, "is not a table"));
            };
            let base = reader.base_url(&address, &entry)?;
            hosts.push(reader.host(&address, base, entry)?);
        }
    }
    let upstream = default_host(registry)?;
    let server = match table.remove("server") {
        Some(toml::Value::String(server)) => reader.base_url(&server, &table)?,
        Some(_) => return Err(reader.error("server", "is not a string")),
        None => upstream.base.clone(),
    };
    let mut last = reader.host("server", server, table)?;
    last.is_mirror = authority(&last.base) != authority(&upstream.base);
    hosts.push(last);
    for host in &mut hosts {
        host.is_mirror = authority(&host.base) != authority(&upstream.base);
    }
    Ok(hosts)
}

struct Reader<'a> {
    file: &'a Path,
    registry: &'a str,
}

impl Reader<'_> {
    fn error(&self, key: &str, why: impl Into<String>) -> Error {
        let subject = if key.is_empty() {
            self.file.display().to_string()
        } else {
            format!("{} at key {key}", self.file.display())
        };
        let why: String = why.into();
        Error::new(ErrorKind::Io, "read registry configuration", subject)
            .because(why.trim_end().replace('\n', " "))
    }

    /// Adds the scheme when there is none and `/v2/` unless the path is to be taken as it is.
    fn base_url(&self, address: &str, entry: &toml::Table) -> Result<Url> {
        let with_scheme = if address.contains("://") {
            address.to_owned()
        } else {
            format!("https://{address}")
        };
        let mut url =
            Url::parse(&with_scheme).map_err(|error| self.error(address, error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(self.error(address, "the scheme is neither http nor https"));
        }
        if url.host_str().is_none() {
            return Err(self.error(address, "it names no host"));
        }
        let override_path = matches!(entry.get("override_path"), Some(toml::Value::Boolean(true)));
        let mut path = url.path().trim_end_matches('/').to_owned();
        if !override_path && !path.ends_with("/v2") {
            path.push_str("/v2");
        }
        path.push('/');
        url.set_path(&path);
        url.set_query(None);
        url.set_fragment(None);
        Ok(url)
    }

    fn host(&mut self, name: &str, base: Url, entry: toml::Table) -> Result<Host> {
        let mut host = Host {
            base,
            resolve: true,
            pull: true,
            tls: Tls::default(),
            headers: HeaderMap::new(),
            dial_timeout: DIAL_TIMEOUT,
            is_mirror: true,
        };
        for (key, value) in entry {
            let at = format!("{name}.{key}");
            match key.as_str() {
                "capabilities" => {
                    let names = self.strings(&at, value)?;
                    host.resolve = names.iter().any(|n| n == "resolve");
                    host.pull = names.iter().any(|n| n == "pull");
                }
                "skip_verify" => host.tls.skip_verify = self.boolean(&at, value)?,
                "override_path" => drop(self.boolean(&at, value)?),
                "ca" => {
                    host.tls.ca = self
                        .strings(&at, value)?
                        .iter()
                        .map(|p| self.path(p))
                        .collect();
                }
                "client" => host.tls.client = self.client(&at, value)?,
                "dial_timeout" => host.dial_timeout = self.duration(&at, value)?,
                "header" => host.headers = self.headers(&at, value)?,
                _ => tracing::warn!(
                    file = %self.file.display(), registry = self.registry, key = at,
                    "unknown key in registry configuration"
                ),
            }
        }
        Ok(host)
    }

    fn path(&self, text: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join(text)
    }

    fn boolean(&self, key: &str, value: toml::Value) -> Result<bool> {
        value
            .as_bool()
            .ok_or_else(|| self.error(key, "is not true or false"))
    }

    fn strings(&self, key: &str, value: toml::Value) -> Result<Vec<String>> {
        match value {
            toml::Value::String(one) => Ok(vec![one]),
            toml::Value::Array(many) => many
                .into_iter()
                .map(|item| match item {
                    toml::Value::String(text) => Ok(text),
                    _ => Err(self.error(key, "is not a list of strings")),
                })
                .collect(),
            _ => Err(self.error(key, "is neither a string nor a list of strings")),
        }
    }

    /// A path, a list of paths (each holding certificate and key), or a list of pairs.
    fn client(&self, key: &str, value: toml::Value) -> Result<Vec<(PathBuf, Option<PathBuf>)>> {
        let toml::Value::Array(items) = value else {
            let one = self.strings(key, value)?;
            return Ok(one.iter().map(|p| (self.path(p), None)).collect());
        };
        items
            .into_iter()
            .map(|item| {
                let pair = self.strings(key, item)?;
                match pair.as_slice() {
                    [both] => Ok((self.path(both), None)),
                    [cert, empty] if empty.is_empty() => Ok((self.path(cert), None)),
                    [cert, private] => Ok((self.path(cert), Some(self.path(private)))),
                    _ => Err(self.error(key, "wants a certificate and a key")),
                }
            })
            .collect()
    }

    fn headers(&self, key: &str, value: toml::Value) -> Result<HeaderMap> {
        let toml::Value::Table(table) = value else {
            return Err(self.error(key, "is not a table"));
        };
        let mut headers = HeaderMap::new();
        for (name, value) in table {
            let at = format!("{key}.{name}");
            let header: HeaderName = name
                .parse()
                .map_err(|_| self.error(&at, "is no header name"))?;
            for text in self.strings(&at, value)? {
                let mut value = HeaderValue::from_str(&text)
                    .map_err(|_| self.error(&at, "has a value that cannot be sent"))?;
                value.set_sensitive(true);
                headers.append(header.clone(), value);
            }
        }
        Ok(headers)
    }

    /// Go's duration syntax, as far as a dial timeout needs it: `1m30s`, `500ms`, `2s`.
    fn duration(&self, key: &str, value: toml::Value) -> Result<Duration> {
        let text = match value {
            toml::Value::String(text) => text,
            _ => return Err(self.error(key, "is not a duration such as \"5s\"")),
        };
        let bad = || self.error(key, format!("\"{text}\" is not a duration such as \"5s\""));
        let mut rest = text.as_str();
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(bad)?;
            let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            let unit_end = rest
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(rest.len());
            let scale = match &rest[..unit_end] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(bad()),
            };
            rest = &rest[unit_end..];
            let part = Duration::try_from_secs_f64(number * scale).map_err(|_| bad())?;
            total = total.checked_add(part).ok_or_else(bad)?;
        }
        if total.is_zero() {
            Err(bad())
        } else {
            Ok(total)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn default_scheme_follows_loopback() {
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2/"),
            ("quay.io", "https://quay.io/v2/"),
            ("localhost", "http://localhost/v2/"),
            ("localhost:5000", "http://localhost:5000/v2/"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/"),
            ("127.9.9.9", "http://127.9.9.9/v2/"),
            ("[::1]:5000", "http://[::1]:5000/v2/"),
            ("localhost:443", "https://localhost:443/v2/"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2/"),
        ] {
            let host = default_host(registry).expect(registry);
            let wanted = Url::parse(base).expect(base);
            assert_eq!(host.base, wanted, "{registry}");
        }
    }

    #[test]
    fn hosts_toml_keeps_file_order_and_puts_server_last() {
        let text = r#"
            server = "https://up.example"
            skip_verify = true
            [host."https://zebra.example"]
              capabilities = ["pull"]
              ca = "ca.pem"
              client = [["a.cert", "a.key"], ["b.pem", ""]]
              dial_timeout = "1m1.5s"
              surprising = 1
            [host."http://alpha.example:81/prefix"]
              override_path = true
              ca = ["/abs/one.pem", "two.pem"]
            [host."http://alpha.example:81/prefix".header]
              x-one = "1"
              x-two = ["2", "3"]
            [host."mid.example/v2"]
        "#;
        let hosts = parse(
            text,
            Path::new("/etc/certs.d/up.example/hosts.toml"),
            "up.example",
        )
        .expect("ok");
        assert_eq!(
            bases(&hosts),
            [
                "https://zebra.example/v2/",
                "http://alpha.example:81/prefix/",
                "https://mid.example/v2/",
                "https://up.example/v2/"
            ]
        );
        assert_eq!((hosts[0].pull, hosts[0].resolve), (true, false));
        assert_eq!(
            hosts[0].tls.ca,
            [PathBuf::from("/etc/certs.d/up.example/ca.pem")]
        );
        assert_eq!(hosts[0].tls.client.len(), 2);
        assert_eq!(hosts[0].tls.client[1].1, None);
        assert_eq!(hosts[0].dial_timeout, Duration::from_millis(61_500));
        assert_eq!(hosts[1].headers.get_all("x-two").iter().count(), 2);
        assert!(hosts[3].tls.skip_verify && !hosts[3].is_mirror && hosts[0].is_mirror);
    }

    #[test]
    fn hosts_toml_without_server_falls_back_to_the_registry() {
        let hosts = parse(
            "[host.\"http://m:1\"]",
            Path::new("/c/hosts.toml"),
            "docker.io",
        );
        assert_eq!(
            bases(&hosts.expect("ok")),
            ["http://m:1/v2/", "https://registry-1.docker.io/v2/"]
        );
    }

    #[test]
    fn hosts_toml_errors_name_file_and_key() {
        for (text, needle) in [
            ("server = 1", "server"),
            ("skip_verify = \"yes\"", "skip_verify"),
            ("[host.\"ftp://x\"]", "ftp://x"),
            (
                "[host.\"http://x\"]\ndial_timeout = \"soon\"",
                "dial_timeout",
            ),
            ("[host.\"http://x\".header]\n\"a b\" = \"c\"", "a b"),
            ("= broken", "hosts.toml"),
        ] {
            let error = parse(text, Path::new("/c/hosts.toml"), "x").expect_err(text);
            let shown = error.to_string();
            assert!(
                shown.contains("/c/hosts.toml") && shown.contains(needle),
                "{shown}"
            );
        }
    }

    #[test]
    fn load_searches_directories_in_containerds_order() {
        let dir = tempfile::tempdir().expect("temp dir");
        let put = |name: &str, server: &str| {
            let at = dir.path().join(name);
            std::fs::create_dir_all(&at).expect("mkdir");
            std::fs::write(at.join("hosts.toml"), format!("server = \"{server}\"")).expect("write");
        };
        let first = |registry: &str| {
            bases(&load(&[dir.path().to_owned()], registry).expect("load"))[0].clone()
        };
        assert_eq!(first("h:1"), "https://h:1/v2/");
        put("_default", "http://third");
        assert_eq!(first("h:1"), "http://third/v2/");
        put("h:1", "http://second");
        assert_eq!(first("h:1"), "http://second/v2/");
        put("h_1_", "http://first");
        assert_eq!(first("h:1"), "http://first/v2/");
        assert_eq!(first("other.example"), "http://third/v2/");
    }

    #[test]
    fn load_reads_dockers_certificate_layout() {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = dir.path().join("127.0.0.1:5443");
        std::fs::create_dir_all(&at).expect("mkdir");
        for name in ["ca.crt", "me.cert", "me.key"] {
            std::fs::write(at.join(name), "").expect("write");
        }
        let hosts = load(&[dir.path().to_owned()], "127.0.0.1:5443").expect("load");
        assert_eq!(bases(&hosts), ["https://127.0.0.1:5443/v2/"]);
        assert_eq!((hosts[0].tls.ca.len(), hosts[0].tls.client.len()), (1, 1));
    }
}
