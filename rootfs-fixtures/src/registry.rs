//! From a layout to a registry: by a push over plain HTTP, as a client would, or by writing the
//! files that docker-registry keeps (its `filesystem` driver), which takes no time and no server.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::layout::{self, Named};

/// Repository and tag of an image name: the registry's host is left off, as a mirror sees it.
fn repository(name: &str) -> Result<(&str, &str)> {
    let (_, path) = name
        .split_once('/')
        .with_context(|| format!("{name} has no host"))?;
    path.rsplit_once(':')
        .with_context(|| format!("{name} has no tag"))
}

/// Manifests and blobs that an image needs, the image's own manifest last.
fn closure(blobs: &Path, named: &Named) -> Result<(Vec<String>, Vec<String>)> {
    let mut manifests = Vec::new();
    let mut leaves = BTreeSet::new();
    let mut queue = vec![named.digest.clone()];
    while let Some(digest) = queue.pop() {
        let document = fs::read(blobs.join(&digest))?;
        let (children, parts) = layout::references(&document)?;
        queue.extend(children);
        leaves.extend(parts);
        manifests.insert(0, digest);
    }
    Ok((manifests, leaves.into_iter().collect()))
}

/// Writes `<storage>/docker/registry/v2`, blobs as hard links where the file system allows.
pub fn export(layout: &Path, storage: &Path) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    let root = storage.join("docker/registry/v2");
    for named in layout::read_index(layout)? {
        let (repository, tag) = repository(&named.name)?;
        let repository = root.join("repositories").join(repository);
        let (manifests, leaves) = closure(&blobs, &named)?;
        for digest in manifests.iter().chain(&leaves) {
            let data = root
                .join("blobs/sha256")
                .join(&digest[..2])
                .join(digest)
                .join("data");
            if !data.exists() {
                fs::create_dir_all(data.parent().context("a blob path has a parent")?)?;
                let from = blobs.join(digest);
                if fs::hard_link(&from, &data).is_err() {
                    fs::copy(&from, &data)?;
                }
            }
        }
        for digest in &leaves {
            link(&repository.join("_layers/sha256").join(digest), digest)?;
        }
        for digest in &manifests {
            link(
                &repository.join("_manifests/revisions/sha256").join(digest),
                digest,
            )?;
        }
        let tag = repository.join("_manifests/tags").join(tag);
        link(&tag.join("current"), &named.digest)?;
        link(&tag.join("index/sha256").join(&named.digest), &named.digest)?;
    }
    Ok(())
}

fn link(dir: &Path, digest: &str) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("link"), format!("sha256:{digest}"))?;
    Ok(())
}

/// Pushes every image of the layout; blobs that the registry has are not sent again.
pub fn push(layout: &Path, registry: &str) -> Result<usize> {
    let blobs = layout.join("blobs/sha256");
    let names = layout::read_index(layout)?;
    for named in &names {
        push_image(&blobs, named, registry).with_context(|| format!("push {}", named.name))?;
    }
    Ok(names.len())
}

fn push_image(blobs: &Path, named: &Named, registry: &str) -> Result<()> {
    let (repository, tag) = repository(&named.name)?;
    let (manifests, leaves) = closure(blobs, named)?;
    for digest in &leaves {
        let url = format!("/v2/{repository}/blobs/sha256:{digest}");
        if request(registry, "HEAD", &url, &[], None)?.status == 200 {
            continue;
        }
        let start = request(
            registry,
            "POST",
            &format!("/v2/{repository}/blobs/uploads/"),
            &[],
            None,
        )?;
        let location = start
            .header("location")
            .context("upload without a Location")?;
        // Absolute or not, the registry is the one that was asked.
        let path = location.find("/v2/").map_or(location, |at| &location[at..]);
        let join = if path.contains('?') { '&' } else { '?' };
        let url = format!("{path}{join}digest=sha256:{digest}");
        let body = File::open(blobs.join(digest))?;
        let answer = request(
            registry,
            "PUT",
            &url,
            &["Content-Type: application/octet-stream"],
            Some(body),
        )?;
        answer.expect(201, "PUT blob", digest)?;
    }
    for digest in &manifests {
        let file = blobs.join(digest);
        let document: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
        let media_type = document["mediaType"].as_str().unwrap_or(&named.media_type);
        let mut references = vec![format!("sha256:{digest}")];
        if *digest == named.digest {
            references.push(tag.to_owned());
        }
        for reference in references {
            let url = format!("/v2/{repository}/manifests/{reference}");
            let header = format!("Content-Type: {media_type}");
            let answer = request(registry, "PUT", &url, &[&header], Some(File::open(&file)?))?;
            answer.expect(201, "PUT manifest", &reference)?;
        }
    }
    Ok(())
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_str())
    }

    fn expect(&self, status: u16, what: &str, subject: &str) -> Result<()> {
        if self.status != status {
            bail!(
                "{what} {subject}: status {}: {}",
                self.status,
                self.body.trim()
            );
        }
        Ok(())
    }
}

/// One request on a connection of its own, which is all that a loopback registry needs.
fn request(
    host: &str,
    method: &str,
    path: &str,
    headers: &[&str],
    body: Option<File>,
) -> Result<Answer> {
    let mut stream = TcpStream::connect(host).with_context(|| format!("connect to {host}"))?;
    let length = body
        .as_ref()
        .map_or(Ok(0), |f| f.metadata().map(|m| m.len()))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for header in headers {
        head.push_str(&format!("{header}\r\n"));
    }
    write!(stream, "{head}Content-Length: {length}\r\n\r\n")?;
    if let Some(mut body) = body {
        std::io::copy(&mut body, &mut stream)?;
    }
    stream.flush()?;

    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("{method} {path}: no HTTP status in {line:?}"))?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((key, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((key.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut body = Vec::new();
    if method != "HEAD" {
        reader.take(1 << 16).read_to_end(&mut body)?;
    }
    Ok(Answer {
        status,
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_drops_the_host() {
        assert_eq!(
            repository("registry.k8s.io/e2e-test-images/busybox:1.29-2").unwrap(),
            ("e2e-test-images/busybox", "1.29-2")
        );
        assert!(repository("busybox").is_err());
        assert!(repository("docker.io/library/busybox").is_err());
    }
}
