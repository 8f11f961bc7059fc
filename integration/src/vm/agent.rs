//! The guest's end: one thread a port, each runs one command at a time in a cgroup of its own.
//! When the host lets go of the connection, or the time is up, all that is in that cgroup is
//! killed. Never runs on the host.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::OFlags;

use super::wire::{self, Ended, Kind, Request};

/// How long a command's outputs are read on after its end: what it left running may hold them.
const AFTERMATH: Duration = Duration::from_millis(150);

/// How often a port is looked at that no host is connected to.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Serves every port; returns only when something is wrong.
pub fn serve() -> Result<()> {
    mount_shares(&fs::read_to_string("/proc/cmdline")?)?;
    let cgroup = own_cgroup()?;
    // Processes are in leaves only: this one moves out of the way of those of commands.
    fs::create_dir_all(cgroup.join("agent"))?;
    fs::write(cgroup.join("agent/cgroup.procs"), "0")?;
    let mut threads = Vec::new();
    for index in 0..wire::PORTS {
        let device = device_of(&wire::port_name(index))?;
        let cgroup = cgroup.clone();
        threads.push(std::thread::spawn(move || {
            let error = serve_port(&device, index, &cgroup);
            eprintln!("port {index}: {error:?}");
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
    bail!("no port is left")
}

/// `coracle.share=TAG:PATH:ro` on the kernel's command line.
fn mount_shares(cmdline: &str) -> Result<()> {
    for share in cmdline.split_ascii_whitespace() {
        let Some(share) = share.strip_prefix("coracle.share=") else {
            continue;
        };
        let parts: Vec<&str> = share.split(':').collect();
        let [tag, path, access] = parts[..] else {
            bail!("{share}: not TAG:PATH:ACCESS");
        };
        // What only the guest reads never changes below it; what is shared may.
        let cache = if access == "ro" { "loose" } else { "none" };
        fs::create_dir_all(path)?;
        let options = format!("trans=virtio,version=9p2000.L,msize=512000,cache={cache},{access}");
        let mount = Command::new("mount")
            .args(["-t", "9p", "-o", &options, tag, path])
            .output()?;
        let why = String::from_utf8_lossy(&mount.stderr).into_owned();
        ensure!(mount.status.success(), "mount {share}: {why}");
    }
    Ok(())
}

fn own_cgroup() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text.trim().strip_prefix("0::/").context("no cgroup v2")?;
    let path = path.strip_suffix("/agent").unwrap_or(path);
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

fn device_of(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == name) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio port is named {name}")
}

struct Port {
    file: File,
    unread: Vec<u8>,
}

/// What the host did.
enum Heard {
    Nothing,
    Request(Request),
    /// The connection is gone.
    Gone,
}

fn serve_port(device: &Path, index: usize, parent: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(OFlags::NONBLOCK.bits())?)
        .open(device)
        .with_context(|| format!("open {}", device.display()))?;
    let mut port = Port {
        file,
        unread: Vec::new(),
    };
    let mut next = None;
    let mut count = 0_u64;
    loop {
        let request = match next.take() {
            Some(request) => request,
            None => port.wait_for_request()?,
        };
        count += 1;
        let cgroup = parent.join(format!("run-{index}-{count}"));
        next = run(&mut port, &request, &cgroup)?;
        // Fails while a daemon of the command is still there, which is fine.
        let _ = fs::remove_dir(&cgroup);
    }
}

impl Port {
    fn wait_for_request(&mut self) -> Result<Request> {
        let idle_since = Instant::now();
        loop {
            match self.listen(1000)? {
                Heard::Request(request) => return Ok(request),
                Heard::Nothing => {}
                // Nothing wakes us when the host comes back: a port without a host is always
                // ready to say so. The longer it was away, the less often we look.
                Heard::Gone => {
                    let pause = idle_since.elapsed() / 20;
                    std::thread::sleep(pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE));
                }
            }
        }
    }

    /// What came in within some milliseconds.
    fn listen(&mut self, milliseconds: u16) -> Result<Heard> {
        let mut polled = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::from(milliseconds))?;
        let events = polled[0].revents().unwrap_or(PollFlags::empty());
        self.take_in(events)
    }

    fn take_in(&mut self, events: PollFlags) -> Result<Heard> {
        if events.contains(PollFlags::POLLIN) {
            let mut buffer = [0; 4096];
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(self.gone()),
                Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("read from the port"),
            }
            return Ok(self.request());
        }
        if events.contains(PollFlags::POLLHUP) {
            return Ok(self.gone());
        }
        Ok(Heard::Nothing)
    }

    fn gone(&mut self) -> Heard {
        self.unread.clear();
        Heard::Gone
    }

    /// The last whole line that is a request; a line that an earlier connection cut off is none.
    fn request(&mut self) -> Heard {
        let Some(end) = self.unread.iter().rposition(|b| *b == b'\n') else {
            return Heard::Nothing;
        };
        let lines: Vec<u8> = self.unread.drain(..=end).collect();
        lines
            .split(|b| *b == b'\n')
            .rev()
            .find_map(|line| serde_json::from_slice(line).ok())
            .map_or(Heard::Nothing, Heard::Request)
    }

    /// False when the host is gone.
    fn send(&mut self, session: u64, kind: Kind, payload: &[u8]) -> Result<bool> {
        let frame = wire::frame(session, kind, payload);
        let mut left = &frame[..];
        while !left.is_empty() {
            match self.file.write(left) {
                Ok(length) => left = &left[length..],
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut polled = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut polled, PollTimeout::from(1000_u16))?;
                    let events = polled[0].revents().unwrap_or(PollFlags::empty());
                    if events.contains(PollFlags::POLLHUP) {
                        return Ok(false);
                    }
                }
                Err(e) => return Err(e).context("write to the port"),
            }
        }
        Ok(true)
    }
}

/// Runs one command to its end; returns the request that came instead of it, if one did.
fn run(port: &mut Port, request: &Request, cgroup: &Path) -> Result<Option<Request>> {
    let session = request.session;
    let mut child = match start(request, cgroup) {
        Ok(child) => child,
        Err(error) => {
            let ended = Ended::NotStarted(format!("{error:#}"));
            port.send(session, Kind::End, &serde_json::to_vec(&ended)?)?;
            return Ok(None);
        }
    };
    let mut outputs = Outputs::of(&mut child)?;
    let deadline = request
        .seconds
        .map(|s| Instant::now() + Duration::from_secs(s));
    let mut timed_out = false;
    let mut ended: Option<(Ended, Instant)> = None;
    loop {
        let mut heard = Heard::Nothing;
        let reached = outputs.pump(port, session, &mut heard)?;
        let instead = match heard {
            Heard::Nothing if reached => None,
            Heard::Request(other) => Some(Some(other)),
            Heard::Nothing | Heard::Gone => Some(None),
        };
        if let Some(next) = instead {
            kill_all(cgroup);
            child.wait()?;
            return Ok(next);
        }
        if ended.is_none() {
            if deadline.is_some_and(|d| Instant::now() > d) {
                timed_out = true;
                kill_all(cgroup);
            }
            if let Some(status) = child.try_wait()? {
                let how = match (timed_out, status.code(), status.signal()) {
                    (true, _, _) => Ended::TimedOut,
                    (_, Some(code), _) => Ended::Code(code),
                    (_, None, signal) => Ended::Signal(signal.unwrap_or(0)),
                };
                ended = Some((how, Instant::now() + AFTERMATH));
            }
        }
        if let Some((how, until)) = &ended
            && (outputs.at_end() || Instant::now() > *until)
        {
            port.send(session, Kind::End, &serde_json::to_vec(how)?)?;
            return Ok(None);
        }
    }
}

/// Starts this program once more, which goes into the cgroup and becomes the command.
fn start(request: &Request, cgroup: &Path) -> Result<Child> {
    fs::create_dir(cgroup).with_context(|| format!("make {}", cgroup.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("into").arg(cgroup).args(&request.argv);
    command
        .env_clear()
        .envs([
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            ("HOME", "/root"),
            ("USER", "root"),
            ("LANG", "C.UTF-8"),
        ])
        .envs(request.env.iter().map(|(k, v)| (k, v)))
        .current_dir(request.cwd.as_deref().unwrap_or("/root"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command.spawn().context("spawn")
}

/// `vm into CGROUP COMMAND...`
pub fn enter_and_exec(cgroup: &Path, argv: &[String]) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").context("enter the cgroup")?;
    let (program, args) = argv.split_first().context("no command")?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("exec {program}"))
}

fn kill_all(cgroup: &Path) {
    if let Err(error) = fs::write(cgroup.join("cgroup.kill"), "1") {
        eprintln!("kill {}: {error}", cgroup.display());
    }
}

struct Outputs {
    pipes: Vec<(Kind, Option<File>)>,
}

impl Outputs {
    fn of(child: &mut Child) -> Result<Self> {
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let pipes = vec![
            (
                Kind::Stdout,
                Some(File::from(std::os::fd::OwnedFd::from(stdout))),
            ),
            (
                Kind::Stderr,
                Some(File::from(std::os::fd::OwnedFd::from(stderr))),
            ),
        ];
        Ok(Self { pipes })
    }

    fn at_end(&self) -> bool {
        self.pipes.iter().all(|(_, pipe)| pipe.is_none())
    }

    /// Waits a little for output and sends it on; false when the host is gone.
    fn pump(&mut self, port: &mut Port, session: u64, heard: &mut Heard) -> Result<bool> {
        let mut polled = vec![PollFd::new(port.file.as_fd(), PollFlags::POLLIN)];
        for (_, pipe) in &self.pipes {
            if let Some(pipe) = pipe {
                polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
            }
        }
        poll(&mut polled, PollTimeout::from(20_u16))?;
        let events: Vec<PollFlags> = polled
            .iter()
            .map(|p| p.revents().unwrap_or(PollFlags::empty()))
            .collect();
        *heard = port.take_in(events[0])?;
        let mut ready = events[1..].iter();
        let mut buffer = vec![0; 64 * 1024];
        for (kind, slot) in &mut self.pipes {
            let Some(pipe) = slot else { continue };
            if ready.next().is_none_or(|e| e.is_empty()) {
                continue;
            }
            match pipe.read(&mut buffer)? {
                0 => *slot = None,
                length if !port.send(session, *kind, &buffer[..length])? => return Ok(false),
                _ => {}
            }
        }
        Ok(true)
    }
}
