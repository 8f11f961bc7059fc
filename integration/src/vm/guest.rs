//! One running guest: qemu under software emulation, its console in a file, its agent's ports as
//! sockets in a directory of its own. The disk is never written: each guest starts from the image.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::client::{self, Sink};
use super::image::Image;
use super::wire::{self, Ended, Request};
use crate::process::tail;

/// A host directory that the guest sees.
pub struct Share {
    pub host: PathBuf,
    pub guest: String,
    pub writable: bool,
}

pub struct Machine {
    pub cpus: u32,
    pub memory_mib: u32,
    pub shares: Vec<Share>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory_mib: 1024,
            shares: Vec::new(),
        }
    }
}

/// A guest that ends with the value, and with this process however that ends.
pub struct Guest {
    dir: PathBuf,
    qemu: Child,
}

impl Guest {
    pub fn start(image: &Image, machine: &Machine, dir: &Path) -> Result<Self> {
        prepare(dir)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "SIGKILL", "qemu-system-x86_64"]);
        arguments(&mut command, image, machine, dir)?;
        let log = File::create(dir.join("qemu.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let qemu = command.spawn().context("start qemu")?;
        Ok(Self {
            dir: dir.to_owned(),
            qemu,
        })
    }

    /// Runs a command in the guest. The error says how the guest's console ended when it died.
    pub fn exec(&mut self, request: Request, limit: Duration, sink: Sink<'_>) -> Result<Ended> {
        wait_for_sockets(&self.dir)?;
        client::exec(&self.dir, request, limit, sink).map_err(|error| {
            std::thread::sleep(Duration::from_millis(200));
            let died = match self.qemu.try_wait() {
                Ok(Some(status)) => format!("; qemu ended: {status}"),
                _ => String::new(),
            };
            error.context(format!("guest{died}; its console:\n{}", self.console()))
        })
    }

    pub fn console(&self) -> String {
        let log = tail(&self.dir.join("qemu.log"));
        format!("{log}{}", tail(&self.dir.join("console")))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Starts a guest that outlives this process, until `stop`.
pub fn start_detached(image: &Image, machine: &Machine, dir: &Path) -> Result<()> {
    ensure!(!running(dir), "a guest runs in {} already", dir.display());
    prepare(dir)?;
    let mut command = Command::new("qemu-system-x86_64");
    arguments(&mut command, image, machine, dir)?;
    let output = command.arg("-daemonize").output().context("start qemu")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "qemu: {}: {said}", output.status);
    Ok(())
}

pub fn running(dir: &Path) -> bool {
    UnixStream::connect(dir.join("monitor")).is_ok()
}

/// Ends a detached guest at once, as a power cut would.
pub fn stop(dir: &Path) -> Result<()> {
    let monitor = dir.join("monitor");
    let mut stream = UnixStream::connect(&monitor)
        .with_context(|| format!("no guest runs in {}", dir.display()))?;
    stream.write_all(b"quit\n")?;
    let end = Instant::now() + Duration::from_secs(10);
    while running(dir) {
        ensure!(Instant::now() < end, "qemu does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::remove_dir_all(dir)?;
    Ok(())
}

fn wait_for_sockets(dir: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !client::socket(dir, wire::PORTS - 1).exists() {
        ensure!(
            Instant::now() < end,
            "qemu did not start: {}",
            tail(&dir.join("qemu.log"))
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// An empty directory with the agent in it: this very program, which is static.
fn prepare(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    let tools = dir.join("tools");
    fs::create_dir_all(&tools)?;
    let ours = std::env::current_exe()?;
    fs::copy(&ours, tools.join("vm"))?;
    Ok(())
}

fn arguments(command: &mut Command, image: &Image, machine: &Machine, dir: &Path) -> Result<()> {
    let mut append = String::from(
        "console=ttyS0 root=/dev/vda rw quiet panic=-1 mitigations=off nokaslr \
         rcupdate.rcu_expedited=1 nowatchdog \
         systemd.show_status=0 apparmor=1 security=apparmor",
    );
    // One thread for all processors: with one for each, qemu 7.2 now and then runs code that the
    // guest's kernel has patched meanwhile (a static key), and the guest dies of a stray int3.
    command
        .args(["-accel", "tcg,thread=single", "-machine", "pc,usb=off"])
        // Five-level page tables cost time; without SVM no module for it is loaded.
        .args(["-cpu", "max,la57=off,svm=off"])
        .args(["-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.memory_mib.to_string()])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci,max_ports=16"]);
    command
        .arg("-serial")
        .arg(format!("file:{}", word(&dir.join("console"))?));
    command
        .arg("-monitor")
        .arg(socket_option("unix:", &dir.join("monitor"))?);
    command.arg("-drive").arg(format!(
        "file={},format=raw,if=virtio,snapshot=on,cache=unsafe",
        word(&image.disk)?
    ));
    for index in 0..wire::PORTS {
        let path = client::socket(dir, index);
        let socket = socket_option(&format!("socket,id=port{index},path="), &path)?;
        let name = wire::port_name(index);
        command.arg("-chardev").arg(socket);
        command
            .arg("-device")
            .arg(format!("virtserialport,chardev=port{index},name={name}"));
    }
    share(command, &dir.join("tools"), "tools", false)?;
    for (index, wanted) in machine.shares.iter().enumerate() {
        let tag = format!("share{index}");
        share(command, &wanted.host, &tag, wanted.writable)?;
        let access = if wanted.writable { "rw" } else { "ro" };
        append.push_str(&format!(" coracle.share={tag}:{}:{access}", wanted.guest));
    }
    command.arg("-kernel").arg(&image.kernel);
    command.arg("-initrd").arg(&image.initrd);
    command.args(["-append", &append]);
    Ok(())
}

fn share(command: &mut Command, host: &Path, tag: &str, writable: bool) -> Result<()> {
    let readonly = if writable { "" } else { ",readonly=on" };
    command.arg("-virtfs").arg(format!(
        "local,path={},mount_tag={tag},security_model=none,multidevs=remap{readonly}",
        word(host)?
    ));
    Ok(())
}

fn socket_option(head: &str, path: &Path) -> Result<String> {
    Ok(format!("{head}{},server=on,wait=off", word(path)?))
}

/// A path as qemu's option lists take it.
fn word(path: &Path) -> Result<String> {
    let text = path.to_str().context("a path that is not UTF-8")?;
    if text.contains([',', ' ']) {
        bail!("{text}: qemu takes no comma or space here");
    }
    Ok(text.to_owned())
}
