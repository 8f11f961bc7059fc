//! One case of the sweep: what is set up, what is run, and how it is judged.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::left::Places;
use super::{Calls, Fault, Point, Reach, Verb, hierarchies};
use crate::bundle::{Bench, Runtime};
use crate::crictl::Config;
use crate::process::{Ended, run_within};

/// A command that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// What became of a case.
#[derive(Debug)]
pub struct Verdict {
    pub end: &'static str,
    /// Left after the command failed, and taken away by `delete -f`.
    pub late: Vec<String>,
    pub wrong: Vec<String>,
}

/// One worker: a bundle and a state root of its own, and an id for each case.
pub struct Case {
    runtime: Runtime,
    verb: Verb,
    places: Places,
    config: Config,
    worker: usize,
    next: usize,
    id: String,
    dir: PathBuf,
    /// What a container sees that was started without a fault.
    seen: Option<Value>,
}

impl Case {
    pub fn new(bench: &Bench, runtime: &Runtime, verb: Verb, worker: usize) -> Result<Self> {
        let args: &[&str] = match verb {
            Verb::Run => &["show"],
            _ => &["sleep", "600"],
        };
        let name = format!("sweep-{worker}");
        let config = bench.config("x", args).set(
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["kexec_load"], "action": "SCMP_ACT_ERRNO"}]}),
        );
        let bundle = bench.bundle(&name, &config)?;
        let dir = bench.dir.join(format!("work-{worker}"));
        let root = dir.join("root");
        std::fs::create_dir_all(&root)?;
        let places = Places {
            cgroups: hierarchies()
                .iter()
                .map(|top| top.join(&bench.mark))
                .collect(),
            root: root.clone(),
            dir: bundle.clone(),
            bundle,
        };
        Ok(Self {
            runtime: runtime.with_root(root),
            verb,
            places,
            config,
            worker,
            next: 0,
            id: String::new(),
            dir,
            seen: None,
        })
    }

    /// Each case has an id of its own, in all that it makes: what is left of one is not taken for
    /// another's.
    fn begin(&mut self) -> Result<()> {
        self.next += 1;
        self.id = format!("case-{}-{}x", self.worker, self.next);
        let path = self.config.0["linux"]["cgroupsPath"].clone();
        let parent = path.as_str().and_then(|p| p.rsplit_once('/'));
        let parent = parent.context("cgroupsPath")?.0.to_owned();
        let mut config = self.config.clone();
        config = config
            .set("/linux/cgroupsPath", format!("{parent}/{}", self.id))
            .set(
                "/process/env",
                json!(["PATH=/bin", format!("CASE={}", self.id)]),
            );
        config.write(&self.places.bundle.join("config.json"))?;
        if self.verb == Verb::Create {
            // Without what earlier cases have left in the cache of compiled filters.
            std::fs::remove_dir_all(&self.places.root)?;
            std::fs::create_dir(&self.places.root)?;
        }
        if self.verb.needs_container() {
            let bundle = self.places.bundle.display().to_string();
            let id = self.id.clone();
            let ended = self.command(&["run", "-d", "-b", &bundle, &id], None)?;
            ensure!(
                ended.status.is_some_and(|s| s.success()),
                "set-up: {}",
                ended.error
            );
        }
        Ok(())
    }

    fn line(&self) -> Vec<String> {
        let bundle = self.places.bundle.display().to_string();
        let id = self.id.as_str();
        let words: Vec<&str> = match self.verb {
            Verb::Create => vec!["create", "-b", &bundle, id],
            Verb::Run => vec!["run", "-b", &bundle, id],
            Verb::Exec => vec!["exec", id, "/bin/probe", "true"],
            Verb::Delete => vec!["delete", "-f", id],
            Verb::Update => vec!["update", "--pids-limit", "77", "--cpu-share", "512", id],
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// How many calls the command makes without a fault, and what its container sees.
    pub fn count(&mut self) -> Result<Calls> {
        self.look()?;
        self.begin()?;
        let log = self.dir.join("calls");
        let line = self.line();
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let tracer = format!("-DDD -qq -f -o {}", log.display());
        let ended = self.command(&words, Some(&tracer))?;
        ensure!(
            ended.status.is_some_and(|s| s.success()),
            "{}: {}",
            words.join(" "),
            ended.error
        );
        let id = self.id.clone();
        self.command(&["delete", "-f", &id], None)?;
        ensure!(self.places.left(&id).is_empty(), "left without a fault");
        // strace may write its last lines after the traced has ended.
        std::thread::sleep(Duration::from_millis(300));
        Calls::read(&log)
    }

    /// Notes what a container sees that was started without a fault.
    fn look(&mut self) -> Result<()> {
        if self.verb != Verb::Run || self.seen.is_some() {
            return Ok(());
        }
        self.begin()?;
        let line = self.line();
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let ended = self.command(&words, None)?;
        self.seen = Some(view(&ended.out).with_context(|| tell(&ended))?);
        Ok(())
    }

    /// Runs one case and judges it.
    pub fn run(&mut self, fault: Fault, point: &Point, reach: Reach) -> Result<Verdict> {
        self.look()?;
        self.begin()?;
        let line = self.line();
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let follow = if reach == Reach::Everyone { "-f " } else { "" };
        let log = self.dir.join("faults");
        let tracer = format!(
            "-DDD -qq {follow}-o {} -e trace={},execve -e {}",
            log.display(),
            point.call,
            fault.inject(point)
        );
        let ended = self.command(&words, Some(&tracer))?;
        let mut wrong = Vec::new();
        let succeeded = ended.status.is_some_and(|status| status.success());
        let excused = match hits(&log)? {
            Hits::Runtime => false,
            // What the program makes of its own fault is not the runtime's doing.
            Hits::Both => succeeded,
            Hits::Program => ended.status.is_some(),
        };
        let end = if excused {
            "program hit"
        } else {
            self.judge(&ended, fault, point, &mut wrong)?
        };
        let id = self.id.clone();
        let early = match (fault, end) {
            (Fault::Error(_), "failed") if !self.verb.needs_container() => self.places.left(&id),
            _ => Vec::new(),
        };
        let deleted = self.command(&["delete", "-f", &id], None)?;
        if !deleted.status.is_some_and(|s| s.success()) {
            wrong.push(format!("delete -f: {}", tell(&deleted)));
        }
        let left = self.places.left(&id);
        if !left.is_empty() {
            wrong.push(format!("left: {}", left.join("; ")));
            self.places.sweep(&id);
        }
        Ok(Verdict {
            end,
            late: early,
            wrong,
        })
    }

    fn judge(
        &mut self,
        ended: &Ended,
        fault: Fault,
        point: &Point,
        wrong: &mut Vec<String>,
    ) -> Result<&'static str> {
        let Some(status) = ended.status else {
            wrong.push("does not end".to_owned());
            return Ok("hung");
        };
        if ended.error.contains("panicked") && !point.start_up {
            wrong.push(format!("panic: {}", ended.error));
        }
        if status.success() {
            if let Err(error) = self.check_success(ended) {
                wrong.push(format!("said to have succeeded: {error:#}"));
            }
            return Ok("succeeded");
        }
        use std::os::unix::process::ExitStatusExt as _;
        match (fault, status.signal()) {
            (Fault::Kill, Some(9)) => return Ok("killed"),
            // The container's program, which makes calls of the same name.
            (Fault::Kill, None) if status.code() == Some(137) => return Ok("program killed"),
            (Fault::Error(_), Some(signal)) if !point.start_up => {
                wrong.push(format!("died of signal {signal}: {}", ended.error));
            }
            _ => {}
        }
        // A write that fails may be that of the message.
        let silent = ended.error.trim().is_empty() && !point.start_up;
        if silent && !(point.call == "write" && fault != Fault::Kill) {
            wrong.push(format!("{status} without a word"));
        }
        Ok("failed")
    }

    /// A fault that did no harm must not have cost the container anything either.
    fn check_success(&self, ended: &Ended) -> Result<()> {
        let status = |want: &str| -> Result<()> {
            let state = self.command(&["state", &self.id], None)?;
            let state: Value = serde_json::from_str(&state.out)
                .with_context(|| format!("state: {} {}", state.out, state.error))?;
            ensure!(state["status"] == want, "status is {}", state["status"]);
            Ok(())
        };
        match self.verb {
            Verb::Create => status("created"),
            Verb::Exec | Verb::Update => status("running"),
            Verb::Delete => {
                let left = self.places.left(&self.id);
                ensure!(left.is_empty(), "left: {}", left.join("; "));
                Ok(())
            }
            Verb::Run => {
                let seen = view(&ended.out)?;
                let want = self.seen.as_ref().context("no view to compare with")?;
                compare(want, &seen)
            }
        }
    }

    /// Runs the runtime, under strace if told so.
    fn command(&self, args: &[&str], tracer: Option<&str>) -> Result<Ended> {
        let words = self.runtime.words(args);
        let mut command = match tracer {
            None => Command::new(&words[0]),
            Some(options) => {
                let mut command = Command::new("strace");
                command.args(options.split(' ')).arg(&words[0]);
                command
            }
        };
        run_within(command.args(&words[1..]), LIMIT)
    }
}

/// Whom the faults of one case have hit: each traced process counts its calls for itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hits {
    Runtime,
    Both,
    Program,
}

fn hits(log: &std::path::Path) -> Result<Hits> {
    let text = String::from_utf8_lossy(&std::fs::read(log)?).into_owned();
    let mut programs = Vec::new();
    let (mut runtime, mut program) = (false, false);
    for line in text.lines() {
        let pid = line.split(' ').next().unwrap_or_default();
        if line.contains("execve(\"/bin/probe\"") {
            programs.push(pid);
        }
        if line.contains("(INJECTED)") {
            match programs.contains(&pid) {
                true => program = true,
                false => runtime = true,
            }
        }
    }
    Ok(match (runtime, program) {
        (true, true) => Hits::Both,
        (false, true) => Hits::Program,
        _ => Hits::Runtime,
    })
}

fn tell(ended: &Ended) -> String {
    match ended.status {
        None => "does not end".to_owned(),
        Some(status) => format!("{status}: {}", ended.error.trim()),
    }
}

/// What the probe has seen, without what differs from run to run.
fn view(text: &str) -> Result<Value> {
    let mut seen: Value =
        serde_json::from_str(text).with_context(|| format!("the probe said {text:?}"))?;
    let Some(map) = seen.as_object_mut() else {
        bail!("the probe said {text:?}");
    };
    for differs in ["namespaces", "cgroup", "env", "session", "processGroup"] {
        map.remove(differs);
    }
    if let Some(status) = map.get_mut("status").and_then(Value::as_object_mut) {
        status.retain(|key, _| {
            key.starts_with("Cap")
                || key.starts_with("Seccomp")
                || key.starts_with("Sig")
                || key == "NoNewPrivs"
                || key == "Uid"
                || key == "Gid"
                || key == "Groups"
        });
    }
    // A node that mknod(2) is refused is bound from the host's /dev: the same device.
    if let Some(mounts) = map.get_mut("mounts").and_then(Value::as_array_mut) {
        let nodes = ["null", "zero", "full", "random", "urandom", "tty"];
        mounts.retain(|mount| {
            let target = mount["target"].as_str().unwrap_or_default();
            let node = target.strip_prefix("/dev/");
            !node.is_some_and(|node| nodes.contains(&node) && mount["root"] == format!("/{node}"))
        });
    }
    // Which there are, not where they lead: the outputs are other files each time.
    if let Some(fds) = map.get_mut("fds").and_then(Value::as_object_mut) {
        fds.values_mut().for_each(|fd| *fd = Value::Null);
    }
    Ok(seen)
}

fn compare(want: &Value, seen: &Value) -> Result<()> {
    let (Some(want), Some(seen)) = (want.as_object(), seen.as_object()) else {
        bail!("no objects");
    };
    for (key, value) in want {
        let other = seen.get(key).unwrap_or(&Value::Null);
        ensure!(
            strip(value) == strip(other),
            "{key} is {other}, without a fault it is {value}"
        );
    }
    Ok(())
}

/// The case's own number stands in paths of mounts.
fn strip(value: &Value) -> String {
    let text = value.to_string();
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((head, tail)) = rest.split_once("case-") {
        out.push_str(head);
        rest = tail.split_once('x').map_or("", |(_, tail)| tail);
    }
    out.push_str(rest);
    out
}
