//! Owns the reading of manifests, indexes and image configs, and the choice of a platform. Pure:
//! bytes in, checked types out. Everything here comes from a stranger.

use std::collections::BTreeMap;

use oci_client::manifest as media;
use serde::Deserialize;

use crate::api::ImageConfig;
use crate::digest::Digest;

/// Largest manifest or index read (distribution-spec: registries should accept at least this).
pub(crate) const MANIFEST_MAX: u64 = 4 << 20;
/// Largest image config read.
pub(crate) const CONFIG_MAX: u64 = 8 << 20;
/// overlayfs stacks at most this many lower directories (fs/overlayfs/params.h OVL_MAX_STACK).
const LAYERS_MAX: usize = 500;
const SCHEMA1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// What a client says it can read.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, */*;q=0.1";

/// Why a document was refused; the caller adds host and image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not what it claims to be.
    Corrupt(String),
    /// Understood and not supported.
    Unsupported(String),
    /// Fine, but nothing in it is for this machine.
    NotFound(String),
}

fn corrupt(text: impl Into<String>) -> Refusal {
    Refusal::Corrupt(text.into())
}

/// A reference to content, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// An image manifest, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// One entry of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) descriptor: Descriptor,
    pub(crate) platform: Option<Platform>,
}

/// What a `/manifests/` URL answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<IndexEntry>),
}

/// An image config, checked.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) config: ImageConfig,
    pub(crate) created: Option<String>,
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Platform {
    fn show(&self) -> String {
        match self.variant.as_deref() {
            Some(variant) if !variant.is_empty() => {
                format!("{}/{}/{variant}", self.os, self.architecture)
            }
            _ => format!("{}/{}", self.os, self.architecture),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u64,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: i64,
    platform: Option<Platform>,
}

impl RawDescriptor {
    fn check(self) -> Result<Descriptor, Refusal> {
        let digest = Digest::parse(&self.digest).map_err(|error| corrupt(error.to_string()))?;
        let size = u64::try_from(self.size)
            .map_err(|_| corrupt(format!("the size of {digest} is negative")))?;
        Ok(Descriptor {
            media_type: self.media_type,
            digest,
            size,
        })
    }
}

/// Parses what a `/manifests/` URL answered.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Document, Refusal> {
    let content_type = content_type.map(|value| value.split(';').next().unwrap_or("").trim());
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| {
        corrupt(format!(
            "not a manifest ({}, {}): {error}",
            content_type.unwrap_or("no content type"),
            beginning(bytes)
        ))
    })?;
    let media_type = raw.media_type.as_deref().or(content_type).unwrap_or("");
    if raw.schema_version == 1 || raw.fs_layers.is_some() || SCHEMA1.contains(&media_type) {
        return Err(Refusal::Unsupported(
            "it is a docker schema 1 image, a format withdrawn by its makers; push it again with \
             a current tool"
                .to_owned(),
        ));
    }
    if raw.schema_version != 2 {
        return Err(corrupt(format!(
            "schemaVersion is {}, not 2",
            raw.schema_version
        )));
    }
    // One text read as two documents is how CVE-2021-41190 worked.
    if raw.manifests.is_some() && (raw.layers.is_some() || raw.config.is_some()) {
        return Err(corrupt(
            "it has both \"manifests\" and \"layers\" or \"config\"",
        ));
    }
    let is_index = raw.manifests.is_some();
    for claimed in [raw.media_type.as_deref(), content_type]
        .into_iter()
        .flatten()
    {
        if kind_of(claimed).is_some_and(|claims_index| claims_index != is_index) {
            return Err(corrupt(format!(
                "its media type {claimed} does not fit its content"
            )));
        }
    }
    if let Some(entries) = raw.manifests {
        let entries = entries
            .into_iter()
            .map(|mut entry| {
                let platform = entry.platform.take();
                Ok(IndexEntry {
                    descriptor: entry.check()?,
                    platform,
                })
            })
            .collect::<Result<_, Refusal>>()?;
        return Ok(Document::Index(entries));
    }
    manifest(raw).map(Document::Manifest)
}

/// Whether a known media type means an index.
fn kind_of(media_type: &str) -> Option<bool> {
    match media_type {
        media::OCI_IMAGE_INDEX_MEDIA_TYPE | media::IMAGE_MANIFEST_LIST_MEDIA_TYPE => Some(true),
        media::OCI_IMAGE_MEDIA_TYPE | media::IMAGE_MANIFEST_MEDIA_TYPE => Some(false),
        _ => None,
    }
}

fn manifest(raw: RawDocument) -> Result<Manifest, Refusal> {
    let config = raw
        .config
        .ok_or_else(|| corrupt("it has neither \"manifests\" nor \"config\""))?;
    let config = config.check()?;
    let layers = raw.layers.ok_or_else(|| corrupt("it has no \"layers\""))?;
    let accepted = [
        media::IMAGE_CONFIG_MEDIA_TYPE,
        media::IMAGE_DOCKER_CONFIG_MEDIA_TYPE,
        "application/octet-stream",
        "",
    ];
    if !accepted.contains(&config.media_type.as_str()) {
        let what = raw
            .artifact_type
            .unwrap_or_else(|| config.media_type.clone());
        return Err(Refusal::Unsupported(format!(
            "it is an artifact ({what}), not an image"
        )));
    }
    if config.size > CONFIG_MAX {
        return Err(corrupt(format!(
            "its config has {} bytes, over {CONFIG_MAX}",
            config.size
        )));
    }
    if layers.len() > LAYERS_MAX {
        return Err(Refusal::Unsupported(format!(
            "it has {} layers, overlayfs takes {LAYERS_MAX}",
            layers.len()
        )));
    }
    let layers = layers
        .into_iter()
        .map(RawDescriptor::check)
        .collect::<Result<Vec<_>, Refusal>>()?;
    for layer in &layers {
        if !is_layer(&layer.media_type) {
            return Err(Refusal::Unsupported(format!(
                "layer {} has media type {}",
                layer.digest, layer.media_type
            )));
        }
    }
    Ok(Manifest { config, layers })
}

/// A tar, as it is or compressed in a way that its magic bytes will tell.
fn is_layer(media_type: &str) -> bool {
    let Some(rest) = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| {
            media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar")
        })
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"))
        .or_else(|| {
            media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff.tar")
        })
    else {
        return false;
    };
    matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd")
}

/// The first bytes of an answer, fit for an error text.
pub(crate) fn beginning(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "empty".to_owned();
    }
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
    let shown: String = start.chars().flat_map(char::escape_debug).collect();
    format!("begins \"{shown}\"")
}

/// The platform images are chosen for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    architecture: &'static str,
    /// Highest variant the machine runs: 8 for arm64, 1 to 4 for amd64.
    level: u8,
}

impl Target {
    pub(crate) fn of_this_machine() -> Self {
        let (architecture, level) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", amd64_level()),
            "aarch64" => ("arm64", 8),
            "arm" => ("arm", 7),
            "x86" => ("386", 0),
            "powerpc64" => ("ppc64le", 0),
            other => (other, 0),
        };
        Target {
            architecture,
            level,
        }
    }

    fn show(&self) -> String {
        format!("linux/{}", self.architecture)
    }

    /// Smaller is better; `None` does not run here.
    fn rank(&self, platform: &Platform) -> Option<u32> {
        if platform.os != "linux" {
            return None;
        }
        let variant = platform.variant.as_deref().unwrap_or("");
        let level: u8 = if variant.is_empty() {
            match platform.architecture.as_str() {
                "arm64" => 8,
                "arm" => 7,
                _ => 1,
            }
        } else {
            variant.strip_prefix('v')?.parse().ok()?
        };
        match (self.architecture, platform.architecture.as_str()) {
            // amd64 v1 first: it is what every other runtime picks; higher levels in descending
            // order only where there is no plain one.
            ("amd64", "amd64") if level == 1 => Some(0),
            (own, other) if own == other => {
                (level <= self.level.max(1)).then(|| 1 + u32::from(u8::MAX - level))
            }
            ("amd64", "386") => Some(1000),
            ("arm64", "arm") if level <= 8 => Some(1000 + u32::from(u8::MAX - level)),
            _ => None,
        }
    }

    /// The entry for this machine.
    pub(crate) fn choose<'a>(&self, entries: &'a [IndexEntry]) -> Result<&'a Descriptor, Refusal> {
        let mut best: Option<(u32, &IndexEntry)> = None;
        for entry in entries {
            let rank = match &entry.platform {
                Some(platform) => self.rank(platform),
                // No platform: an image made by a tool that knows only one.
                None => Some(5000),
            };
            if let Some(rank) = rank
                && best.is_none_or(|(other, _)| rank < other)
            {
                best = Some((rank, entry));
            }
        }
        if let Some((_, entry)) = best {
            return Ok(&entry.descriptor);
        }
        let mut there: Vec<String> = entries
            .iter()
            .filter_map(|e| e.platform.as_ref())
            .map(Platform::show)
            .collect();
        there.sort();
        there.dedup();
        there.truncate(20);
        Err(Refusal::NotFound(format!(
            "no image for platform {} in it (it has: {})",
            self.show(),
            if there.is_empty() {
                "nothing".to_owned()
            } else {
                there.join(", ")
            }
        )))
    }
}

#[cfg(target_arch = "x86_64")]
fn amd64_level() -> u8 {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("sse4.2") && has!("ssse3") && has!("popcnt")) {
        1
    } else if !(has!("avx2") && has!("bmi1") && has!("bmi2") && has!("fma") && has!("lzcnt")) {
        2
    } else if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
        3
    } else {
        4
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> u8 {
    1
}

#[derive(Deserialize)]
struct RawConfig {
    created: Option<String>,
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
    config: Option<RawContainerConfig>,
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type")]
    kind: Option<String>,
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawContainerConfig {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, Option<String>>>,
    stop_signal: Option<String>,
}

/// Parses an image config and checks that it fits the manifest.
pub(crate) fn parse_config(bytes: &[u8], layers: usize) -> Result<Config, Refusal> {
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|error| {
        corrupt(format!(
            "not an image config ({}): {error}",
            beginning(bytes)
        ))
    })?;
    let rootfs = raw
        .rootfs
        .ok_or_else(|| corrupt("the config has no \"rootfs\""))?;
    if let Some(kind) = rootfs.kind
        && kind != "layers"
    {
        return Err(corrupt(format!(
            "the config's rootfs type is \"{kind}\", not \"layers\""
        )));
    }
    let diff_ids = rootfs
        .diff_ids
        .unwrap_or_default()
        .iter()
        .map(|text| Digest::parse(text).map_err(|error| corrupt(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    if diff_ids.len() != layers {
        return Err(corrupt(format!(
            "the config names {} layers, the manifest {layers}",
            diff_ids.len()
        )));
    }
    let container = raw.config.unwrap_or_default();
    Ok(Config {
        config: ImageConfig {
            entrypoint: container.entrypoint.unwrap_or_default(),
            cmd: container.cmd.unwrap_or_default(),
            env: container.env.unwrap_or_default(),
            working_dir: container.working_dir.unwrap_or_default(),
            user: container.user.unwrap_or_default(),
            volumes: container.volumes.unwrap_or_default().into_keys().collect(),
            labels: container
                .labels
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
            stop_signal: container.stop_signal.filter(|signal| !signal.is_empty()),
            exposed_ports: container
                .exposed_ports
                .unwrap_or_default()
                .into_keys()
                .collect(),
            os: raw.os.unwrap_or_default(),
            architecture: raw.architecture.unwrap_or_default(),
            variant: raw.variant.unwrap_or_default(),
        },
        created: raw.created.filter(|text| !text.is_empty()),
        diff_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(seed: u8) -> String {
        Digest::sha256(&[seed]).to_string()
    }

    fn entry(os: &str, arch: &str, variant: Option<&str>, seed: u8) -> IndexEntry {
        IndexEntry {
            descriptor: Descriptor {
                media_type: String::new(),
                digest: Digest::sha256(&[seed]),
                size: 1,
            },
            platform: Some(Platform {
                os: os.to_owned(),
                architecture: arch.to_owned(),
                variant: variant.map(str::to_owned),
            }),
        }
    }

    #[test]
    fn parse_accepts_oci_and_docker() {
        let config = media::IMAGE_DOCKER_CONFIG_MEDIA_TYPE;
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{}","size":3}},
            "layers":[{{"mediaType":"{}","digest":"{}","size":9,"urls":null}}],"x":[1]}}"#,
            digest(1),
            media::IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE,
            digest(2)
        );
        let Document::Manifest(manifest) =
            parse(text.as_bytes(), Some("text/plain; charset=utf-8")).expect("manifest")
        else {
            panic!("not a manifest")
        };
        assert_eq!((manifest.layers.len(), manifest.layers[0].size), (1, 9));
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{{"digest":"{}","size":3}}]}}"#,
            media::OCI_IMAGE_INDEX_MEDIA_TYPE,
            digest(1)
        );
        assert!(matches!(parse(text.as_bytes(), None), Ok(Document::Index(e)) if e.len() == 1));
    }

    #[test]
    fn parse_refusals() {
        let one = digest(1);
        let config = format!(r#""config":{{"digest":"{one}","size":3}}"#);
        let cases: Vec<(String, Option<&str>, bool, &str)> = vec![
            (
                "<html>".into(),
                Some("text/html"),
                true,
                "begins \"<html>\"",
            ),
            (String::new(), None, true, "empty"),
            ("[]".into(), None, true, "not a manifest"),
            (
                r#"{"schemaVersion":1,"fsLayers":[]}"#.into(),
                None,
                false,
                "schema 1",
            ),
            (
                r#"{"schemaVersion":3}"#.into(),
                None,
                true,
                "schemaVersion is 3",
            ),
            (
                format!(r#"{{"schemaVersion":2,{config},"layers":[],"manifests":[]}}"#),
                None,
                true,
                "both",
            ),
            (r#"{"schemaVersion":2}"#.into(), None, true, "neither"),
            (
                format!(r#"{{"schemaVersion":2,{config}}}"#),
                None,
                true,
                "no \"layers\"",
            ),
            (
                format!(r#"{{"schemaVersion":2,{config},"layers":[]}}"#),
                Some(media::OCI_IMAGE_INDEX_MEDIA_TYPE),
                true,
                "does not fit",
            ),
            (
                r#"{"schemaVersion":2,"config":{"digest":"sha256:..","size":1},"layers":[]}"#
                    .into(),
                None,
                true,
                "parse digest",
            ),
            (
                format!(
                    r#"{{"schemaVersion":2,"config":{{"digest":"{one}","size":-1}},"layers":[]}}"#
                ),
                None,
                true,
                "negative",
            ),
            (
                format!(
                    r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{one}","size":2}},"layers":[]}}"#
                ),
                None,
                false,
                "artifact",
            ),
            (
                format!(
                    r#"{{"schemaVersion":2,{config},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip+encrypted","digest":"{one}","size":2}}]}}"#
                ),
                None,
                false,
                "encrypted",
            ),
        ];
        for (text, content_type, is_corrupt, needle) in cases {
            match parse(text.as_bytes(), content_type) {
                Err(Refusal::Corrupt(why)) => {
                    assert!(is_corrupt && why.contains(needle), "{text}: {why}");
                }
                Err(Refusal::Unsupported(why)) => {
                    assert!(!is_corrupt && why.contains(needle), "{text}: {why}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn platform_choice_table() {
        let amd = Target {
            architecture: "amd64",
            level: 3,
        };
        let arm = Target {
            architecture: "arm64",
            level: 8,
        };
        let all = [
            entry("windows", "amd64", None, 0),
            entry("unknown", "unknown", None, 1),
            entry("linux", "amd64", Some("v3"), 2),
            entry("linux", "amd64", None, 3),
            entry("linux", "arm", Some("v6"), 4),
            entry("linux", "arm", Some("v7"), 5),
            entry("linux", "arm64", Some("v8"), 6),
            entry("linux", "amd64", Some("v4"), 7),
            entry("linux", "386", None, 8),
        ];
        let chosen = |target: &Target, entries: &[IndexEntry]| {
            target
                .choose(entries)
                .map(|descriptor| descriptor.digest.clone())
        };
        assert_eq!(chosen(&amd, &all), Ok(Digest::sha256(&[3])));
        assert_eq!(chosen(&amd, &all[..3]), Ok(Digest::sha256(&[2])));
        assert_eq!(chosen(&amd, &all[8..]), Ok(Digest::sha256(&[8])));
        assert_eq!(chosen(&arm, &all), Ok(Digest::sha256(&[6])));
        assert_eq!(chosen(&arm, &all[4..6]), Ok(Digest::sha256(&[5])));
        let Err(Refusal::NotFound(why)) = chosen(&amd, &all[4..8]) else {
            panic!("chosen")
        };
        assert_eq!(
            why,
            "no image for platform linux/amd64 in it (it has: linux/amd64/v4, linux/arm/v6, \
             linux/arm/v7, linux/arm64/v8)"
        );
    }

    #[test]
    fn config_is_read_and_checked_against_the_manifest() {
        let one = digest(1);
        let text = format!(
            r#"{{"created":"2020-01-01T00:00:00Z","os":"linux","architecture":"amd64",
            "config":{{"User":"u","Env":["A=b"],"Cmd":null,"Entrypoint":["/x"],"WorkingDir":"/w",
            "Labels":{{"k":"v","n":null}},"Volumes":{{"/v":{{}}}},"ExposedPorts":{{"80/tcp":{{}}}},
            "StopSignal":"SIGINT"}},"rootfs":{{"type":"layers","diff_ids":["{one}"]}}}}"#
        );
        let parsed = parse_config(text.as_bytes(), 1).expect("config");
        assert_eq!(parsed.config.volumes, ["/v"]);
        assert_eq!(parsed.config.exposed_ports, ["80/tcp"]);
        assert_eq!(parsed.config.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(parsed.config.labels.len(), 2);
        assert!(matches!(
            parse_config(text.as_bytes(), 2),
            Err(Refusal::Corrupt(_))
        ));
        assert!(matches!(parse_config(b"{}", 0), Err(Refusal::Corrupt(_))));
        assert!(matches!(
            parse_config(b"\x1f\x8b", 0),
            Err(Refusal::Corrupt(_))
        ));
    }
}
