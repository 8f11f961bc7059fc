//! Builds images in memory and serves them: from Debian's docker-registry, or from an HTTP server
//! of our own that can misbehave.

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coracle_image_store::{Auth, Digest, Error, Image, ImageStore, PullRequest, StoreConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Prints why a test does not run, in a form that can be counted.
#[macro_export]
macro_rules! skip {
    ($test:expr, $why:expr) => {{
        use std::io::Write as _;
        // Past libtest's capture, in the form that .ci/totals counts.
        let _ = write!(std::io::stdout(), "\nSKIP {}: {}\n", $test, $why);
        return;
    }};
}

/// One tar entry to write.
#[derive(Clone)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: tar::EntryType,
    pub link: Vec<u8>,
    pub mode: u32,
    pub data: Vec<u8>,
    pub device: (u32, u32),
    pub xattrs: Vec<(&'static str, Vec<u8>)>,
}

pub fn file(path: &str, data: &str) -> Entry {
    Entry {
        path: path.into(),
        kind: tar::EntryType::Regular,
        link: Vec::new(),
        mode: 0o644,
        data: data.into(),
        device: (0, 0),
        xattrs: Vec::new(),
    }
}

pub fn dir(path: &str, mode: u32) -> Entry {
    Entry {
        kind: tar::EntryType::Directory,
        mode,
        ..file(path, "")
    }
}

pub fn symlink(path: &str, target: &str) -> Entry {
    Entry {
        kind: tar::EntryType::Symlink,
        link: target.into(),
        mode: 0o777,
        ..file(path, "")
    }
}

pub fn hardlink(path: &str, target: &str) -> Entry {
    Entry {
        kind: tar::EntryType::Link,
        link: target.into(),
        ..file(path, "")
    }
}

pub fn device(path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Entry {
    Entry {
        kind,
        device: (major, minor),
        ..file(path, "")
    }
}

/// Writes raw headers: no library would write what hostile tests need.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        let mut records = Vec::new();
        for (name, value) in &entry.xattrs {
            pax_record(&mut records, &format!("SCHILY.xattr.{name}"), value);
        }
        if entry.path.len() > 100 {
            pax_record(&mut records, "path", &entry.path);
        }
        if !records.is_empty() {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::XHeader);
            header.set_size(records.len() as u64);
            header.set_cksum();
            push(&mut bytes, &header, &records);
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(entry.data.len() as u64);
        header.set_device_major(entry.device.0).expect("ustar");
        header.set_device_minor(entry.device.1).expect("ustar");
        let name = &entry.path[..entry.path.len().min(100)];
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.as_mut_bytes()[157..157 + entry.link.len()].copy_from_slice(&entry.link);
        header.set_cksum();
        push(&mut bytes, &header, &entry.data);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn push(bytes: &mut Vec<u8>, header: &tar::Header, data: &[u8]) {
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

fn pax_record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("gzip");
    encoder.finish().expect("gzip")
}

/// A layer as it is pushed.
#[derive(Clone)]
pub struct Layer {
    pub diff_id: Digest,
    pub blob: Vec<u8>,
    pub media_type: &'static str,
}

pub fn layer(entries: &[Entry]) -> Layer {
    layer_of(&tar(entries))
}

pub fn layer_of(tar: &[u8]) -> Layer {
    Layer {
        diff_id: Digest::sha256(tar),
        blob: gzip(tar),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
    }
}

/// An image as it is pushed.
#[derive(Clone)]
pub struct TestImage {
    pub layers: Vec<Layer>,
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
    pub media_type: String,
}

impl TestImage {
    pub fn new(layers: Vec<Layer>) -> Self {
        TestImage::with_config(
            layers,
            serde_json::json!({"Cmd": ["/bin/sh"], "Env": ["A=b"]}),
        )
    }

    pub fn with_config(layers: Vec<Layer>, container: serde_json::Value) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|l| l.diff_id.to_string()).collect();
        let config = serde_json::json!({
            "created": "2024-01-02T03:04:05Z", "os": "linux", "architecture": "amd64",
            "config": container, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        TestImage::assemble(layers, config.to_string().into_bytes())
    }

    pub fn assemble(layers: Vec<Layer>, config: Vec<u8>) -> Self {
        let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|l| {
                serde_json::json!({"mediaType": l.media_type, "size": l.blob.len(),
                    "digest": Digest::sha256(&l.blob).to_string()})
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media_type,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "size": config.len(), "digest": Digest::sha256(&config).to_string()},
            "layers": descriptors,
        });
        TestImage {
            layers,
            config,
            manifest: manifest.to_string().into_bytes(),
            media_type,
        }
    }

    pub fn id(&self) -> String {
        Digest::sha256(&self.config).to_string()
    }

    pub fn manifest_digest(&self) -> String {
        Digest::sha256(&self.manifest).to_string()
    }

    pub fn blobs(&self) -> Vec<Vec<u8>> {
        let mut blobs: Vec<Vec<u8>> = self.layers.iter().map(|l| l.blob.clone()).collect();
        blobs.push(self.config.clone());
        blobs
    }
}

/// A small base image: a root entry, /etc, /tmp 1777.
pub fn base_layer() -> Layer {
    layer(&[
        dir("./", 0o755),
        dir("etc/", 0o755),
        file("etc/os-release", "ID=test\n"),
        dir("tmp/", 0o1777),
        dir("bin/", 0o755),
        Entry {
            mode: 0o4755,
            ..file("bin/sh", "#!")
        },
    ])
}

/// A store in a directory of its own.
pub struct TestStore {
    pub store: ImageStore,
    pub dir: tempfile::TempDir,
}

pub fn store() -> TestStore {
    store_with(&[], Duration::from_secs(20))
}

pub fn store_with(hosts: &[PathBuf], progress: Duration) -> TestStore {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = ImageStore::open(config(dir.path(), hosts, progress)).expect("open store");
    TestStore { store, dir }
}

pub fn config(dir: &Path, hosts: &[PathBuf], progress: Duration) -> StoreConfig {
    let mut config = StoreConfig::new(dir.join("store"));
    config.registry_config_dirs = hosts.to_vec();
    config.pull_progress_timeout = progress;
    config
}

impl TestStore {
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub async fn pull(&self, reference: &str) -> Result<Image, Error> {
        self.store
            .pull(PullRequest {
                reference: reference.to_owned(),
                auth: None,
            })
            .await
    }

    pub async fn pull_as(&self, reference: &str, auth: Auth) -> Result<Image, Error> {
        self.store
            .pull(PullRequest {
                reference: reference.to_owned(),
                auth: Some(auth),
            })
            .await
    }

    /// Names below a directory of the root.
    pub fn names(&self, directory: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.root().join(directory))
            .expect("list")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    /// Nothing of any pull is left.
    #[track_caller]
    pub fn assert_empty(&self) {
        self.store.settle();
        for directory in ["staging", "layers", "images", "snapshots", "gc"] {
            assert_eq!(
                self.names(directory),
                Vec::<String>::new(),
                "left in {directory}"
            );
        }
        let info = self.store.fs_info();
        assert_eq!((info.bytes, info.inodes), (0, 0));
    }

    /// The path of a file in the layers of an image, topmost first.
    pub fn path(&self, image: &Image, path: &str) -> PathBuf {
        let layers = self.store.layer_dirs(&image.id).expect("layers");
        layers
            .iter()
            .map(|layer| layer.join(path))
            .find(|path| path.symlink_metadata().is_ok())
            .unwrap_or_else(|| panic!("{path} is in no layer"))
    }
}

/// Debian's docker-registry on a loopback port, with its own directory.
pub struct DockerRegistry {
    child: Child,
    pub address: String,
    dir: tempfile::TempDir,
}

impl DockerRegistry {
    /// `None` when the program is missing.
    pub async fn start() -> Option<Self> {
        DockerRegistry::start_with("", None).await
    }

    /// `http` is added to the `http:` section of its configuration.
    pub async fn start_with(http: &str, data: Option<PathBuf>) -> Option<Self> {
        let program = "docker-registry";
        Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .ok()?;
        let dir = tempfile::tempdir().expect("temp dir");
        let port = {
            let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
            probe.local_addr().expect("address").port()
        };
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  \
             filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  \
             addr: 127.0.0.1:{port}\n{http}",
            data.unwrap_or_else(|| dir.path().join("data")).display()
        );
        std::fs::write(&config, text).expect("write config");
        let child = Command::new(program)
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("spawn docker-registry");
        let registry = DockerRegistry {
            child,
            address: format!("127.0.0.1:{port}"),
            dir,
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&registry.address).await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Some(registry)
    }

    pub fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    /// Where it keeps its content: another one may serve the same.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.blobs() {
            self.push_blob(repository, &blob).await;
        }
        self.push_manifest(repository, tag, &image.manifest, &image.media_type)
            .await;
    }

    async fn push_blob(&self, repository: &str, blob: &[u8]) {
        let client = client();
        let start = format!("http://{}/v2/{repository}/blobs/uploads/", self.address);
        let response = client.post(&start).send().await.expect("start upload");
        assert_eq!(response.status().as_u16(), 202);
        let location = response.headers()["location"]
            .to_str()
            .expect("location")
            .to_owned();
        let mut url = reqwest::Url::parse(&start)
            .expect("url")
            .join(&location)
            .expect("location");
        url.query_pairs_mut()
            .append_pair("digest", &Digest::sha256(blob).to_string());
        let response = client
            .put(url)
            .header("content-type", "application/octet-stream")
            .body(blob.to_vec())
            .send()
            .await
            .expect("upload");
        assert_eq!(response.status().as_u16(), 201);
    }

    pub async fn push_manifest(&self, repository: &str, tag: &str, body: &[u8], kind: &str) {
        let response = client()
            .put(format!(
                "http://{}/v2/{repository}/manifests/{tag}",
                self.address
            ))
            .header("content-type", kind)
            .body(body.to_vec())
            .send()
            .await
            .expect("push manifest");
        let status = response.status().as_u16();
        assert_eq!(status, 201, "{}", response.text().await.unwrap_or_default());
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client() -> reqwest::Client {
    // The store does this at its first open, which may come later.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .expect("client")
}

/// A request as the fault registry saw it.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

/// What to answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub cut: Option<usize>,
    /// Wait before answering.
    pub delay: Duration,
    /// Wait in the middle of the body.
    pub stall: Duration,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Answer {
            status,
            ..Answer::default()
        }
    }

    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Answer {
            status: 200,
            body: body.into(),
            ..Answer::default()
        }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Behaviour = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

/// An HTTP server that serves images unless its behaviour says otherwise.
pub struct FaultRegistry {
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

impl FaultRegistry {
    /// Serves `image` as `app:v1`; `behaviour` is asked first.
    pub async fn start(
        image: &TestImage,
        behaviour: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address: SocketAddr = listener.local_addr().expect("address");
        let content = Arc::new(content(image));
        let behaviour: Arc<Behaviour> = Arc::new(behaviour);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (content, behaviour) = (Arc::clone(&content), Arc::clone(&behaviour));
                let seen = Arc::clone(&seen);
                tokio::spawn(async move {
                    // A client that went away is part of the tests.
                    let _ = serve(stream, &content, &*behaviour, &seen).await;
                });
            }
        });
        FaultRegistry {
            address: address.to_string(),
            requests,
            task,
        }
    }

    pub fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("requests").clone()
    }
}

impl Drop for FaultRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn content(image: &TestImage) -> HashMap<String, (String, Vec<u8>)> {
    let mut content = HashMap::new();
    for locator in ["v1".to_owned(), image.manifest_digest()] {
        content.insert(
            format!("/v2/app/manifests/{locator}"),
            (image.media_type.clone(), image.manifest.clone()),
        );
    }
    for blob in image.blobs() {
        content.insert(
            format!("/v2/app/blobs/{}", Digest::sha256(&blob)),
            ("application/octet-stream".to_owned(), blob),
        );
    }
    content
}

async fn serve(
    mut stream: TcpStream,
    content: &HashMap<String, (String, Vec<u8>)>,
    behaviour: &Behaviour,
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let head_end = loop {
        let mut piece = [0; 4096];
        let length = stream.read(&mut piece).await?;
        if length == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&piece[..length]);
        if bytes[0] == 0x16 {
            // A TLS handshake; every HTTP server says so in plain text.
            return stream
                .write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nplain HTTP here\n")
                .await;
        }
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if bytes.len() > 1 << 20 {
            return Ok(());
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap_or_default().split(' ');
    let method = first.next().unwrap_or_default().to_owned();
    let target = first.next().unwrap_or_default().to_owned();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers
        .get("content-length")
        .and_then(|v| v.parse().ok())
        .unwrap_or(0);
    while bytes.len() < head_end + length {
        let mut piece = [0; 4096];
        let read = stream.read(&mut piece).await?;
        if read == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&piece[..read]);
    }
    let request = Request {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body: String::from_utf8_lossy(&bytes[head_end..]).into_owned(),
    };
    seen.lock().expect("requests").push(request.clone());
    let answer = behaviour(&request).unwrap_or_else(|| match content.get(&request.path) {
        Some((kind, body)) => Answer::ok(body.clone()).header("content-type", kind.clone()),
        None => Answer::status(404),
    });
    tokio::time::sleep(answer.delay).await;
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", answer.status);
    let has_length = answer
        .headers
        .iter()
        .any(|(n, _)| n.eq_ignore_ascii_case("content-length"));
    if !has_length {
        head.push_str(&format!("content-length: {}\r\n", answer.body.len()));
    }
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    let body = &answer.body[..answer
        .cut
        .unwrap_or(answer.body.len())
        .min(answer.body.len())];
    if answer.stall.is_zero() {
        stream.write_all(body).await?;
    } else {
        let (one, other) = body.split_at(body.len() / 2);
        stream.write_all(one).await?;
        stream.flush().await?;
        tokio::time::sleep(answer.stall).await;
        stream.write_all(other).await?;
    }
    stream.shutdown().await
}
