//! Pod start of coracled and of Debian's containerd: RunPodSandbox + CreateContainer +
//! StartContainer, by one gRPC client, both daemons up at the same time and asked in turn.
//!
//! Everything runs in a network and mount namespace of its own, so that no bridge, rule or mount
//! outlives the run.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use coracle_integration::leak;

use crate::cri::{Client, Net, PARENT_CGROUP, Start};
use crate::runtime::{our, which};
use crate::series::{Comparison, MILLISECONDS, Series};

const CLOCK: &str = "Clock: the three calls RunPodSandbox, CreateContainer, StartContainer as one \
    gRPC client sees them; pids of the container's own. Both with default settings and cgroupfs. \
    containerd runs its pause image and the CNI plugins bridge, host-local and portmap; coracled \
    its built-in bridge. Left out: pulling the image, stopping and removing the pod.";

/// A program that is killed and reaped with the value.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the comparison in namespaces of its own and reads its result.
pub fn compare(rounds: usize) -> Result<Vec<Comparison>> {
    let script = "ip link set lo up && mount -t tmpfs none /run/netns 2>/dev/null || \
                  { mkdir -p /run/netns && mount -t tmpfs none /run/netns; } && exec \"$@\"";
    // Out here: making the images for the first time takes Debian's packages.
    let storage = Command::new(our("fixtures")?)
        .arg("storage")
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        storage.status.success(),
        "fixtures storage: {}",
        storage.status
    );
    let storage = String::from_utf8(storage.stdout)?;
    let output = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(std::env::current_exe()?)
        .args(["inner-pods", &rounds.to_string(), storage.trim()])
        .stderr(Stdio::inherit())
        .output()
        .context("unshare")?;
    ensure!(
        output.status.success(),
        "the pods' namespaces: {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the comparison of pods")
}

/// The part that runs inside: prints its comparisons as JSON.
pub fn inner(rounds: usize, storage: &str) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("coracle-bench").tempdir()?;
    // Gone last: after the daemons, which are declared after it.
    let _parent = ParentCgroup;
    let (registry, _registry) = registry(dir.path(), storage)?;
    let image = format!("{registry}/coracle/tools:latest");
    let pause = format!("{registry}/pause:3.9");
    let (ours, coracled) = coracled(dir.path())?;
    let (peer, containerd) = containerd(dir.path(), &pause)?;
    let names = [
        "coracled".to_owned(),
        version(&which("containerd").context("containerd")?)?,
    ];
    let mut clients = [Client::connect(&ours)?, Client::connect(&peer)?];
    for client in &mut clients {
        client.pull(&image)?;
    }
    let mut comparisons = Vec::new();
    for (what, net) in [
        ("pod start", Net::Pod),
        ("pod start, hostNetwork", Net::Host),
    ] {
        comparisons.extend(one(&mut clients, &names, what, net, &image, rounds)?);
    }
    let parts = [
        (coracled.0.id(), our("containerd-shim-coracle-v2")?),
        (
            containerd.0.id(),
            which("containerd-shim-runc-v2").context("containerd's shim")?,
        ),
    ];
    comparisons.extend(logs(&mut clients, &names, &parts, &image, dir.path())?);
    println!("{}", serde_json::to_string(&comparisons)?);
    Ok(())
}

/// Lines of 100 bytes, and how many.
const LINES: u64 = 1_000_000;
const LOG_ROUNDS: usize = 3;

/// A container that writes lines as fast as it can, into the log that a kubelet would read.
fn logs(
    clients: &mut [Client; 2],
    names: &[String; 2],
    parts: &[(u32, PathBuf); 2],
    image: &str,
    dir: &Path,
) -> Result<Vec<Comparison>> {
    let clock = "Clock: from StartContainer to the last line in the CRI log. `cat` writes.";
    let what = format!("{LINES} lines of 100 bytes into a CRI log");
    // The writer is not what is measured: it copies a file of a hundredth of the lines.
    let script = format!(
        "yes {} | head -n {} >/lines; for i in $(seq 100); do cat /lines; done; echo done",
        "x".repeat(99),
        LINES / 100
    );
    let labels = [names[0].as_str(), names[1].as_str()];
    let mut cpu: Vec<Vec<f64>> = vec![Vec::new(), Vec::new()];
    let wall = Comparison::take(&what, clock, &labels, LOG_ROUNDS, |program, round| {
        let folder = dir.join(format!("logs-{program}-{round}"));
        fs::create_dir(&folder)?;
        let log = folder.join("main.log");
        let name = format!("log-{program}-{round}");
        let (took, used) = clients[program].logged((&name, image, &script), &log, || {
            cpu_of(parts[program].0, &parts[program].1)
        })?;
        fs::remove_dir_all(&folder)?;
        if round > 0 {
            cpu[program].push(used.as_secs_f64() * 1e3);
        }
        Ok(took)
    })?;
    let used = Comparison {
        what: format!("{what}: CPU of daemon and shim"),
        clock: "schedstat of every thread, over the above and the container's creation.".to_owned(),
        unit: MILLISECONDS.to_owned(),
        series: (0..2)
            .map(|program| Series {
                program: names[program].clone(),
                samples: cpu[program].clone(),
            })
            .collect(),
        goals: Vec::new(),
    };
    Ok(vec![wall.goal(&names[1], 0.5), used.goal(&names[1], 0.5)])
}

/// CPU time of a daemon and of every process that runs its shim.
fn cpu_of(daemon: u32, shim: &Path) -> Result<Duration> {
    let shim = fs::canonicalize(shim)?;
    let mut nanos = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Ok(pid) = name.to_string_lossy().parse::<u32>() else {
            continue;
        };
        let runs_shim = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == shim);
        if pid != daemon && !runs_shim {
            continue;
        }
        for task in fs::read_dir(entry.path().join("task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let first = text
                .split_whitespace()
                .next()
                .and_then(|word| word.parse::<u64>().ok());
            nanos += first.unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(nanos))
}

/// The pods' parent cgroup is the client's to make and to remove, as the kubelet does.
struct ParentCgroup;

impl Drop for ParentCgroup {
    fn drop(&mut self) {
        // Children come after their parents in the list.
        for dir in leak::cgroups(PARENT_CGROUP).into_iter().rev() {
            if let Err(error) = fs::remove_dir(&dir) {
                eprintln!("{}: {error}", dir.display());
            }
        }
    }
}

/// One way to start pods: the whole, and each call on its own.
fn one(
    clients: &mut [Client; 2],
    names: &[String; 2],
    what: &str,
    net: Net,
    image: &str,
    rounds: usize,
) -> Result<Vec<Comparison>> {
    let mut steps: Vec<Vec<Start>> = vec![Vec::new(), Vec::new()];
    let labels = [names[0].as_str(), names[1].as_str()];
    let whole = Comparison::take(what, CLOCK, &labels, rounds, |program, round| {
        let name = format!("bench-{net:?}-{round}").to_lowercase();
        let start = clients[program].pod(&name, image, net)?;
        let took = start.all();
        if round > 0 {
            steps[program].push(start);
        }
        Ok(took)
    })?;
    let part = |call: &str, of: fn(&Start) -> Duration| Comparison {
        what: format!("{what}: {call}"),
        clock: "One call of the above.".to_owned(),
        series: (0..2)
            .map(|program| Series {
                program: names[program].clone(),
                samples: steps[program]
                    .iter()
                    .map(|s| of(s).as_secs_f64() * 1e3)
                    .collect(),
            })
            .collect(),
        unit: MILLISECONDS.to_owned(),
        goals: Vec::new(),
    };
    let parts = [
        part("RunPodSandbox", |s| s.sandbox),
        part("CreateContainer", |s| s.create),
        part("StartContainer", |s| s.start),
    ];
    Ok(std::iter::once(whole.goal(&names[1], 0.25))
        .chain(parts)
        .collect())
}

/// A registry on loopback that serves the test images, and its address.
fn registry(dir: &Path, storage: &str) -> Result<(String, Daemon)> {
    let address = "127.0.0.1:5000";
    let config = dir.join("registry.yml");
    fs::write(
        &config,
        format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, \
             maintenance: {{readonly: {{enabled: true}}}}}}\nhttp: {{addr: {address}}}\n",
            storage
        ),
    )?;
    let daemon = spawn(
        Command::new("docker-registry").arg("serve").arg(&config),
        &dir.join("registry.log"),
    )?;
    Ok((address.to_owned(), daemon))
}

fn coracled(dir: &Path) -> Result<(PathBuf, Daemon)> {
    let socket = dir.join("coracled.sock");
    let config = dir.join("coracled.toml");
    fs::write(&config, "[network.bridge]\nenable_forwarding = true\n")?;
    let daemon = spawn(
        Command::new(our("coracled")?)
            .arg("--config")
            .arg(&config)
            .arg("--root")
            .arg(dir.join("coracled-root"))
            .arg("--state")
            .arg(dir.join("coracled-state"))
            .arg("--socket")
            .arg(&socket),
        &dir.join("coracled.log"),
    )?;
    Ok((socket, daemon))
}

fn containerd(dir: &Path, pause: &str) -> Result<(PathBuf, Daemon)> {
    let socket = dir.join("containerd.sock");
    let nets = dir.join("net.d");
    fs::create_dir(&nets)?;
    fs::write(
        nets.join("10-bench.conflist"),
        r#"{"cniVersion":"1.0.0","name":"bench","plugins":[
            {"type":"bridge","bridge":"bench0","isGateway":true,"ipMasq":true,
             "ipam":{"type":"host-local","ranges":[[{"subnet":"10.99.0.0/16"}]],
                     "routes":[{"dst":"0.0.0.0/0"}],"dataDir":"DIR/ipam"}},
            {"type":"portmap","capabilities":{"portMappings":true}}]}"#
            .replace("DIR", &dir.display().to_string()),
    )?;
    let config = dir.join("containerd.toml");
    let text = format!(
        "version = 2\nroot = '{dir}/containerd-root'\nstate = '{dir}/containerd-state'\n\
         [grpc]\naddress = '{socket}'\n[ttrpc]\naddress = '{socket}.ttrpc'\n\
         [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{pause}'\n\
         restrict_oom_score_adj = true\n\
         [plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/usr/lib/cni'\nconf_dir = '{nets}'\n",
        dir = dir.display(),
        socket = socket.display(),
        nets = nets.display(),
    );
    fs::write(&config, text)?;
    let daemon = spawn(
        Command::new("containerd").arg("--config").arg(&config),
        &dir.join("containerd.log"),
    )?;
    Ok((socket, daemon))
}

fn spawn(command: &mut Command, log: &Path) -> Result<Daemon> {
    let log = File::create(log)?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    Ok(Daemon(child))
}

fn version(path: &Path) -> Result<String> {
    let output = Command::new(path).arg("--version").output()?;
    let line = BufReader::new(&output.stdout[..]).lines().next();
    let Some(line) = line.transpose()? else {
        bail!("{}: no version", path.display())
    };
    Ok(format!(
        "containerd {}",
        line.split_whitespace().nth(2).unwrap_or("?")
    ))
}
