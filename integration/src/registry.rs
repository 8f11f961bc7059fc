//! Registries on loopback: Debian's docker-registry over the fixtures' storage, and one that
//! answers whatever a test wants.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::binaries;
use crate::process::Process;

/// Hosts whose images the loopback registry stands for.
pub const MIRRORED: &[&str] = &[
    "docker.io",
    "registry.k8s.io",
    "k8s.gcr.io",
    "gcr.io",
    "public.ecr.aws",
];

pub struct Registry {
    process: Process,
    address: String,
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Storage with every fixture, built into the cache when it is not there.
pub fn storage() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CORACLE_FIXTURES").filter(|d| !d.is_empty()) {
        return Ok(dir.into());
    }
    let output = Command::new(binaries::fixtures()?)
        .arg("storage")
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

impl Registry {
    pub fn start(dir: &Path) -> Result<Self> {
        let Some(program) = binaries::installed("docker-registry") else {
            bail!("docker-registry is missing: run make deps");
        };
        let address = format!("127.0.0.1:{}", free_port()?);
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\n  maintenance:\n    \
             readonly: {{enabled: true}}\nhttp: {{addr: {address}}}\n",
            storage()?.display()
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none");
        let mut process = Process::start_in_own_group(&mut command, &dir.join("registry.log"))?;
        crate::wait_for("the registry", Duration::from_secs(10), || {
            if let Some(status) = process.ended()? {
                bail!("docker-registry: {status}\n{}", process.log_tail());
            }
            Ok(TcpStream::connect(&address).ok())
        })?;
        Ok(Self { process, address })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// Writes hosts.toml for the mirrored hosts, as containerd documents it.
pub fn write_hosts(certs: &Path, registry: &str) -> Result<()> {
    for host in MIRRORED {
        write_host(certs, host, registry)?;
    }
    Ok(())
}

pub fn write_host(certs: &Path, host: &str, registry: &str) -> Result<()> {
    let dir = certs.join(host);
    std::fs::create_dir_all(&dir)?;
    let text = format!(
        "server = \"http://{registry}\"\n\n[host.\"http://{registry}\"]\n  \
         capabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(dir.join("hosts.toml"), text)?;
    Ok(())
}

/// What came in, as far as the answers here need it.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub authorization: Option<String>,
}

pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A registry made of one function. Its thread ends with the process that runs the test.
pub struct FakeRegistry {
    address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl FakeRegistry {
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &log, &*answer));
            }
        });
        Ok(Self { address, seen })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen
            .lock()
            .map(|seen| seen.clone())
            .unwrap_or_default()
    }
}

fn serve(
    stream: TcpStream,
    log: &Mutex<Vec<Request>>,
    answer: &dyn Fn(&Request) -> Answer,
) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut out = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let method = words.next().context("method")?.to_owned();
        let path = words.next().context("path")?.to_owned();
        let mut authorization = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(':') else {
                break;
            };
            if name.eq_ignore_ascii_case("authorization") {
                authorization = Some(value.trim().to_owned());
            }
        }
        let request = Request {
            method,
            path,
            authorization,
        };
        if let Ok(mut log) = log.lock() {
            log.push(request.clone());
        }
        let answer = answer(&request);
        let mut head = format!(
            "HTTP/1.1 {} X\r\nContent-Length: {}\r\n",
            answer.status,
            answer.body.len()
        );
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        out.write_all(head.as_bytes())?;
        out.write_all(b"\r\n")?;
        if request.method != "HEAD" {
            out.write_all(&answer.body)?;
        }
        out.flush()?;
    }
}
