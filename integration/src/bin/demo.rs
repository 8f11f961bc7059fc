//! `make run`: a registry on loopback, coracled, and one pod through all that a user does with
//! it, each step shown as the command that does it. With `--once` it ends there, after a check
//! that nothing was left; without, it stays up until Ctrl-C and says what to try.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::crictl::{self, Crictl};
use coracle_integration::daemon::Daemon;
use coracle_integration::leak::{self, Snapshot};
use coracle_integration::registry::{self, Registry};
use coracle_integration::world::http_get_soon;
use nix::sys::signal::{SigSet, Signal};

const IMAGE: &str = "docker.io/coracle/tools:latest";
const BRIDGE: &str = "coracle0";
const TABLE: &str = "coracle";

/// What `crictl stats` starts with.
const CLEAR_SCREEN: &str = "\x1b[2J\x1b[H";

struct Demo {
    dir: PathBuf,
    mark: String,
    crictl: Crictl,
    daemon: Daemon,
    registry: Registry,
    before: Snapshot,
    had_bridge: bool,
    ids: Vec<String>,
}

fn main() -> ExitCode {
    let once = std::env::args().any(|a| a == "--once");
    // Taken by `wait` below.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    if let Err(error) = signals.thread_block() {
        eprintln!("demo: {error}");
        return ExitCode::FAILURE;
    }
    match run(once, &signals) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(once: bool, signals: &SigSet) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "make run needs root");
    let mut demo = Demo::start()?;
    let result = demo.tour();
    if result.is_ok() && !once {
        demo.invite()?;
        signals.wait()?;
        say("Ctrl-C: removing everything");
    }
    let log = demo.daemon.log_tail();
    let end = demo.end();
    if result.is_err() || end.is_err() {
        eprintln!("--- coracled's log ---\n{log}\n---");
    }
    result.and(end)
}

fn say(text: &str) {
    println!("\n==> {text}");
}

impl Demo {
    fn start() -> Result<Self> {
        let mark = format!("coracle-run-{}", std::process::id());
        let dir = std::env::temp_dir().join(&mark);
        std::fs::create_dir_all(dir.join("logs"))?;
        say("a registry on loopback, with the test images");
        let registry = Registry::start(&dir)?;
        println!("docker-registry on {}", registry.address());
        let certs = dir.join("certs.d");
        registry::write_hosts(&certs, registry.address())?;
        let before = Snapshot::take_own(&mark, &[], BRIDGE)?;
        let had_bridge = Path::new("/sys/class/net").join(BRIDGE).exists();

        say("coracled");
        let mut daemon = Daemon::configure(&dir, &certs, "")?;
        let crictl = Crictl::new(&dir, &daemon.socket())?;
        daemon.start()?;
        println!("coracled on unix://{}", daemon.socket().display());
        Ok(Self {
            dir,
            mark,
            crictl,
            daemon,
            registry,
            before,
            had_bridge,
            ids: Vec::new(),
        })
    }

    /// Shows the command as a user would type it, and its output.
    fn show(&self, args: &[&str]) -> Result<String> {
        println!("\n$ crictl {}", args.join(" "));
        let output = self.crictl.run(args)?;
        println!("{}", output.trim_start_matches(CLEAR_SCREEN));
        Ok(output)
    }

    fn write(&self, name: &str, config: &crictl::Config) -> Result<String> {
        let path = self.dir.join(name);
        config.write(&path)?;
        Ok(path.display().to_string())
    }

    fn tour(&mut self) -> Result<()> {
        let logs = self.dir.join("logs").display().to_string();
        // As the kubelet labels them: `crictl ps` shows the pod's name by these.
        let labels = serde_json::json!({
            "io.kubernetes.pod.name": "web",
            "io.kubernetes.pod.namespace": "default",
            "io.kubernetes.pod.uid": "uid-web",
        });
        let pod_config = crictl::pod("web")
            .set("/hostname", "web")
            .set("/labels", labels.clone())
            .set("/log_directory", logs)
            .set("/linux/cgroup_parent", format!("/{}", self.mark));
        let pod_config = self.write("pod.json", &pod_config)?;
        let script = "echo started in $(hostname); exec probe serve 8080 'hello from a pod'";
        let config =
            crictl::container("server", IMAGE, &["sh", "-c", script]).set("/labels", labels);
        let config = self.write("container.json", &config)?;

        say("pull, run, look");
        self.show(&["version"])?;
        self.show(&["pull", IMAGE])?;
        self.show(&["images"])?;
        let pod = self.show(&["runp", &pod_config])?;
        self.ids.push(pod.clone());
        let container = self.show(&["create", "--no-pull", &pod, &config, &pod_config])?;
        self.ids.push(container.clone());
        self.show(&["start", &container])?;
        let pods = self.show(&["pods"])?;
        ensure!(pods.contains("Ready"), "the pod is not ready");
        let status = self.crictl.json(&["inspectp", "-o", "json", &pod])?;
        let state = status["status"]["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(state == "SANDBOX_READY", "the pod is {state}");
        let ip = status["status"]["network"]["ip"]
            .as_str()
            .context("the pod has no IP")?
            .to_owned();
        println!("\n{state} with the IP {ip}");
        self.show(&["ps"])?;

        let address = format!("{ip}:8080");
        http_get_soon(&address, "/")?;
        println!("\n$ curl http://{address}/");
        let body = curl(&format!("http://{address}/"))?;
        println!("{body}");
        ensure!(body == "hello from a pod", "curl answered {body:?}");
        let lines = self.show(&["logs", &container])?;
        ensure!(
            lines.contains("serving on 8080"),
            "the log has no such line"
        );
        let output = self.show(&["exec", &container, "sh", "-c", "id; ip -o -4 address"])?;
        ensure!(output.contains("uid=0"), "exec gave {output:?}");
        self.show(&["stats", &container])?;
        Ok(())
    }

    fn invite(&self) -> Result<()> {
        let socket = format!("unix://{}", self.daemon.socket().display());
        let (pod, container) = (&self.ids[0], &self.ids[1]);
        let program = coracle_integration::binaries::crictl()?;
        say("everything is up; try, in another terminal:");
        println!("export CONTAINER_RUNTIME_ENDPOINT={socket}");
        println!(
            "export PATH={}:$PATH",
            program.parent().context("a directory")?.display()
        );
        println!();
        println!("crictl pods && crictl ps");
        println!("crictl exec -it {} sh", &container[..13]);
        println!("crictl logs -f {}", &container[..13]);
        println!(
            "crictl port-forward {} 8080:8080   # then: curl http://127.0.0.1:8080/",
            &pod[..13]
        );
        println!("crictl pull nginx && crictl images");
        say(&format!(
            "logs in {}; Ctrl-C ends and cleans up",
            self.dir.display()
        ));
        Ok(())
    }

    /// Removes every pod, checks for leaks, ends the daemons.
    fn end(mut self) -> Result<()> {
        let result = self.remove_and_check();
        let stopped = self.daemon.stop();
        if result.is_err() || stopped.is_err() {
            leak::sweep(&self.mark, &self.dir);
        }
        leak::remove_cgroups(&self.mark);
        if !self.had_bridge {
            // Made by this run and used by nobody else.
            for (program, args) in [
                ("ip", &["link", "delete", BRIDGE][..]),
                ("nft", &["delete", "table", "ip", TABLE]),
            ] {
                let _ = Command::new(program).args(args).output();
            }
        }
        drop(self.registry);
        std::fs::remove_dir_all(&self.dir)?;
        result.and(stopped)?;
        println!("\nOK");
        Ok(())
    }

    fn remove_and_check(&mut self) -> Result<()> {
        say("remove everything");
        for id in self.crictl.ids(&["pods", "-q", "--no-trunc"])? {
            self.ids.push(id.clone());
            self.show(&["stopp", &id])?;
            self.show(&["rmp", &id])?;
        }
        for id in self.crictl.ids(&["images", "-q"])? {
            self.crictl.run(&["rmi", &id])?;
        }
        for args in [&["pods", "-q"][..], &["ps", "-aq"], &["images", "-q"]] {
            let left = self.crictl.run(args)?;
            ensure!(
                left.is_empty(),
                "crictl {} still lists {left}",
                args.join(" ")
            );
        }

        say("leak check: mounts, cgroups, network namespaces, links, rules, processes, files");
        let daemon = format!("process {} ", self.daemon.pid()?);
        let registry = format!("process {} ", self.registry.pid());
        let mut left = Vec::new();
        for _ in 0..40 {
            let now = Snapshot::take_own(&self.mark, &self.ids, BRIDGE)?;
            left = now.since(&self.before);
            left.retain(|t| {
                !t.starts_with(&daemon) && !t.starts_with(&registry) && !t.ends_with(&self.mark)
            });
            for dir in [self.daemon.root(), self.daemon.state()] {
                let files = leak::files_named(&dir, &self.ids);
                left.extend(files.iter().map(|f| format!("file {}", f.display())));
            }
            if left.is_empty() {
                println!("clean");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("left behind:\n  {}", left.join("\n  "))
    }
}

fn curl(url: &str) -> Result<String> {
    let output = Command::new("curl")
        .args(["-sS", "--max-time", "5", url])
        .output()?;
    ensure!(
        output.status.success(),
        "curl {url}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned())
}
