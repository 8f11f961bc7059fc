//! coracled with roots, sockets and a bridge of its own. It can be killed and started again over
//! the same files, as an upgrade or a crash would.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::binaries;
use crate::process::Process;

pub struct Daemon {
    dir: PathBuf,
    process: Option<Process>,
}

impl Daemon {
    /// Writes the configuration below `dir`; `extra` is TOML over it. Starts nothing yet.
    pub fn configure(dir: &Path, certs: &Path, extra: &str) -> Result<Self> {
        let at = |name: &str| dir.join(name).display().to_string();
        let text = format!(
            r#"root = "{root}"
state = "{state}"
socket = "{socket}"

[log]
level = "info"

[image]
registry_config_dirs = ["{certs}"]

[network]
mode = "auto"
cni_conf_dir = "{cni}"
cni_cache_dir = "{cni_cache}"
state_dir = "{network}"
"#,
            root = at("root"),
            state = at("state"),
            socket = at("coracle.sock"),
            certs = certs.display(),
            cni = at("net.d"),
            cni_cache = at("cni-cache"),
            network = at("state/network"),
        );
        std::fs::create_dir_all(dir.join("net.d"))?;
        std::fs::write(dir.join("config.toml"), text + extra)?;
        Ok(Self {
            dir: dir.to_owned(),
            process: None,
        })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("coracle.sock")
    }

    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("coracled.log")
    }

    pub fn pid(&self) -> Result<u32> {
        Ok(self
            .process
            .as_ref()
            .context("coracled is not running")?
            .pid())
    }

    /// Returns when the socket takes connections.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "coracled runs already");
        let mut command = Command::new(binaries::coracled()?);
        command
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env_remove("NOTIFY_SOCKET");
        let mut process = Process::start_in_own_group(&mut command, &self.log())?;
        let socket = self.socket();
        crate::wait_for("coracled's socket", Duration::from_secs(15), || {
            if let Some(status) = process.ended()? {
                bail!("coracled: {status}\n{}", process.log_tail());
            }
            Ok(UnixStream::connect(&socket).ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// kill -9.
    pub fn crash(&mut self) -> Result<()> {
        self.process
            .take()
            .context("coracled is not running")?
            .crash()
    }

    /// SIGTERM, to which it must end by itself and with code 0.
    pub fn stop(&mut self) -> Result<()> {
        let process = self.process.take().context("coracled is not running")?;
        match process.stop(Duration::from_secs(10))? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("coracled ended with {status} on SIGTERM"),
            None => bail!("coracled did not end within 10 s of SIGTERM"),
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.process
            .as_mut()
            .is_some_and(|p| matches!(p.ended(), Ok(None)))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process
            .as_ref()
            .context("coracled is not running")?
            .signal(signal)
    }

    pub fn log_tail(&self) -> String {
        crate::process::tail(&self.log())
    }
}
