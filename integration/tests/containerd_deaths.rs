//! Debian's containerd over our shim, when either of them dies.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::process::Process;
use coracle_integration::shim::Shim;
use coracle_integration::shim::stand::{alive, hanging_runtime};
use coracle_integration::stage::{Stage, success};
use coracle_integration::{binaries, leak, need_root, skip, wait_for};

struct Containerd {
    stage: Stage,
    image: String,
    runtime: PathBuf,
    process: Option<Process>,
}

impl Containerd {
    /// None when Debian's containerd is not installed.
    fn start() -> Result<Option<Self>> {
        if ["containerd", "ctr"]
            .iter()
            .any(|p| binaries::installed(p).is_none())
        {
            return Ok(None);
        }
        let stage = Stage::set()?;
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/containerd.sock\"\n\
             [ttrpc]\naddress = \"{0}/containerd.sock.ttrpc\"\n",
            stage.dir.display()
        );
        fs::write(stage.dir.join("containerd.toml"), text)?;
        // Under the name of runc's, because ctr passes a runtime's binary on to that one alone.
        let programs = stage.dir.join("bin");
        fs::create_dir(&programs)?;
        symlink(binaries::shim()?, programs.join("containerd-shim-runc-v2"))?;
        let runtime = hanging_runtime(&stage.dir, &binaries::coracle()?)?;
        let mut containerd = Self {
            image: stage.tools(),
            stage,
            runtime,
            process: None,
        };
        containerd.launch()?;
        containerd.ctr(&["image", "pull", "--plain-http", &containerd.image])?;
        Ok(Some(containerd))
    }

    fn launch(&mut self) -> Result<()> {
        let dir = &self.stage.dir;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(dir.join("containerd.toml"))
            .env("PATH", format!("{}:{path}", dir.join("bin").display()));
        let mut process = Process::start(&mut command, &dir.join("containerd.log"))?;
        wait_for("containerd", Duration::from_secs(15), || {
            if let Some(status) = process.ended()? {
                bail!("containerd: {status}\n{}", process.log_tail());
            }
            let output = self.command(&["version"]).output()?;
            Ok(output.status.success().then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// kill -9.
    fn crash(&mut self) -> Result<()> {
        self.process.take().context("containerd")?.crash()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.stage.dir.join("containerd.sock"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        success(self.command(args))
    }

    fn run(&self, flags: &[&str], id: &str, words: &[&str]) -> Command {
        let cgroup = format!("/{}/{id}", self.stage.mark);
        let binary = self.runtime.display().to_string();
        let root = self.stage.dir.join("runtime-root").display().to_string();
        let head = [
            "run",
            "--runtime=io.containerd.runc.v2",
            "--runc-binary",
            &binary,
            "--runc-root",
            &root,
            "--cgroup",
            &cgroup,
        ];
        self.command(&[&head, flags, &[&self.image, id], words].concat())
    }

    fn run_detached(&self, id: &str, words: &[&str]) -> Result<()> {
        let volume = self.stage.dir.join("volume");
        fs::create_dir_all(&volume)?;
        let mount = format!(
            "type=bind,src={},dst=/volume,options=rbind:rw",
            volume.display()
        );
        let log = format!("file://{}/{id}.log", self.stage.dir.display());
        success(self.run(&["-d", "--log-uri", &log, "--mount", &mount], id, words))?;
        Ok(())
    }

    /// Starts ctr with its output in a file of this name.
    fn begin(&self, mut command: Command, name: &str) -> Result<Child> {
        let file = fs::File::create(self.stage.dir.join(name))?;
        Ok(command.stdout(file).stderr(Stdio::null()).spawn()?)
    }

    fn read(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.stage.dir.join(name))?)
    }

    /// Pid and status of a task, if there is one.
    fn task(&self, id: &str) -> Result<Option<(i32, String)>> {
        let list = self.ctr(&["task", "list"])?;
        let mut lines = list
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>());
        let Some(words) = lines.find(|words| words.first() == Some(&id)) else {
            return Ok(None);
        };
        let pid = words.get(1).context("a pid")?.parse()?;
        Ok(Some((pid, words.get(2).unwrap_or(&"").to_string())))
    }

    fn wait_status(&self, id: &str, status: &str) -> Result<()> {
        wait_for(
            &format!("{id} to be {status}"),
            Duration::from_secs(15),
            || {
                Ok(self
                    .task(id)?
                    .is_some_and(|(_, s)| s == status)
                    .then_some(()))
            },
        )
    }

    /// The shim of a task.
    fn shim(&self, id: &str) -> Result<Shim> {
        let bundle = self
            .stage
            .dir
            .join("state/io.containerd.runtime.v2.task/default");
        Shim::at(&fs::read_to_string(bundle.join(id).join("address"))?)
    }

    fn finish(mut self) -> Result<()> {
        let tasks = self.ctr(&["task", "list"])?;
        ensure!(tasks.lines().count() == 1, "tasks are left: {tasks}");
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(10))?;
        }
        wait_for("the shims' end", Duration::from_secs(10), || {
            let registry = format!("{} ", self.stage.registry.pid());
            let left = leak::processes(&self.stage.mark);
            Ok((!left.iter().any(|p| !p.starts_with(&registry))).then_some(()))
        })?;
        self.stage.strike()
    }
}

macro_rules! containerd {
    () => {{
        need_root!();
        match Containerd::start()? {
            Some(containerd) => containerd,
            None => skip!("containerd is not installed"),
        }
    }};
}

#[test]
fn containerd_and_its_reader_killed_lose_no_line_that_they_had_not_read() -> Result<()> {
    let mut containerd = containerd!();
    let words = ["probe", "lines", "0", "300"];
    let mut reader = containerd.begin(containerd.run(&[], "w", &words), "first")?;
    let size = |name: &str| fs::metadata(containerd.stage.dir.join(name)).map_or(0, |m| m.len());
    wait_for("output", Duration::from_secs(15), || {
        Ok((size("first") > 5000).then_some(()))
    })?;
    let (pid, _) = containerd.task("w")?.context("the task")?;
    containerd.crash()?;
    reader.kill()?;
    reader.wait()?;
    // Longer than it takes to fill the FIFO: the writer waits, and is not killed by SIGPIPE.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(alive(pid), "the container died with its reader");
    containerd.launch()?;
    containerd.wait_status("w", "RUNNING")?;
    ensure!(containerd.task("w")?.context("the task")?.0 == pid);
    let mut reader = containerd.begin(containerd.command(&["task", "attach", "w"]), "second")?;
    let size = |name: &str| fs::metadata(containerd.stage.dir.join(name)).map_or(0, |m| m.len());
    wait_for("output", Duration::from_secs(15), || {
        Ok((size("second") > 100_000).then_some(()))
    })?;
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "w"])?;
    reader.wait()?;
    let text = containerd.read("first")? + &containerd.read("second")?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let numbers: Vec<u64> = whole
        .lines()
        .filter_map(|line| line.strip_prefix("line ")?.parse().ok())
        .collect();
    // ctr copies 32 KiB at a time: so much may have been read and not yet written when it was
    // killed, and the line at either end of that is torn.
    let steps = numbers.windows(2).map(|n| n[1].wrapping_sub(n[0]));
    let gaps: Vec<u64> = steps.filter(|step| *step != 1).collect();
    ensure!(gaps.len() <= 1, "lines are missing: {gaps:?}");
    ensure!(
        gaps.iter().all(|gap| *gap < (32 << 10) / 8),
        "{gaps:?} lines are missing"
    );
    ensure!(numbers.len() > 5000, "{} lines", numbers.len());
    containerd.command(&["task", "rm", "-f", "w"]).output()?;
    containerd.ctr(&["container", "rm", "w"])?;
    containerd.finish()
}

#[test]
fn exit_while_containerd_is_down_is_told_with_its_code_and_time() -> Result<()> {
    let mut containerd = containerd!();
    let script = "while [ ! -e /volume/go ]; do sleep 0.05; done; date +%s > /volume/time; exit 23";
    containerd.run_detached("c", &["sh", "-c", script])?;
    containerd.crash()?;
    let volume = containerd.stage.dir.join("volume");
    fs::write(volume.join("go"), "")?;
    wait_for("the exit", Duration::from_secs(10), || {
        Ok(volume.join("time").exists().then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(3));
    containerd.launch()?;
    containerd.wait_status("c", "STOPPED")?;
    let said: i64 = fs::read_to_string(volume.join("time"))?.trim().parse()?;
    // What the shim tells whoever asks, and so containerd.
    let exit = containerd.shim("c")?.wait("c", "")?;
    let shown = exit.exited_at.context("exited_at")?.seconds;
    ensure!(
        exit.exit_status == 23 && (shown - said).abs() <= 1,
        "it ended at {said} with 23, and was told as {shown} with {}",
        exit.exit_status
    );
    let output = containerd.command(&["task", "rm", "c"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("exit code 23"), "{said}");
    containerd.ctr(&["container", "rm", "c"])?;
    containerd.finish()
}

#[test]
fn shim_killed_under_containerd_is_told_once_and_leaves_nothing() -> Result<()> {
    let containerd = containerd!();
    let script = "sleep 1000 & sleep 1001";
    let mut pids = Vec::new();
    let mut shims = Vec::new();
    for id in ["running", "paused", "busy"] {
        containerd.run_detached(id, &["sh", "-c", script])?;
        pids.push(containerd.task(id)?.context("the task")?.0);
        shims.push(containerd.shim(id)?);
    }
    containerd.ctr(&["task", "pause", "paused"])?;
    let before = containerd.ctr(&["task", "ps", "busy"])?.lines().count();
    let exec = ["task", "exec", "--exec-id", "e", "busy", "sleep", "1002"];
    let mut exec = containerd.begin(containerd.command(&exec), "exec")?;
    wait_for("the exec", Duration::from_secs(5), || {
        let list = containerd.ctr(&["task", "ps", "busy"])?;
        Ok((list.lines().count() > before).then_some(()))
    })?;
    let mut events = containerd.begin(containerd.command(&["events"]), "events")?;
    std::thread::sleep(Duration::from_millis(500));
    for shim in &shims {
        shim.crash()?;
    }
    wait_for("the tasks' end", Duration::from_secs(10), || {
        Ok((containerd.ctr(&["task", "list"])?.lines().count() == 1).then_some(()))
    })?;
    wait_for("the exec's end", Duration::from_secs(10), || {
        Ok(exec.try_wait()?)
    })?;
    let ids = ["running", "paused", "busy"];
    let told = |id: &str| -> Result<Vec<String>> {
        let of_it = format!("\"container_id\":\"{id}\"");
        let text = containerd.read("events")?;
        let lines = text
            .lines()
            .filter(|l| l.contains("/tasks/exit") && l.contains(&of_it));
        Ok(lines.map(str::to_owned).collect())
    };
    wait_for("news of every end", Duration::from_secs(10), || {
        for id in ids {
            if told(id)?.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })?;
    // Whatever comes late would be one too many.
    std::thread::sleep(Duration::from_secs(1));
    events.kill()?;
    events.wait()?;
    for (n, id) in ids.iter().enumerate() {
        ensure!(!alive(pids[n]), "{id} lives on");
        let told = told(id)?;
        let socket = &shims[n].socket;
        ensure!(
            !socket.exists(),
            "{} of {id} is left: {told:?}",
            socket.display()
        );
        ensure!(
            told.len() == 1 && told[0].contains("\"exit_status\":137"),
            "{id}: {told:?}"
        );
        containerd.ctr(&["container", "rm", id])?;
    }
    let left = leak::cgroups(&containerd.stage.mark);
    ensure!(
        left.iter().all(|c| c.ends_with(&containerd.stage.mark)),
        "{left:?}"
    );
    containerd.finish()
}

#[test]
fn containerd_killed_while_the_runtime_creates_leaves_nothing_and_a_retry_works() -> Result<()> {
    let mut containerd = containerd!();
    let hang = containerd.stage.dir.join("hang-create");
    let hung = containerd.stage.dir.join("hung");
    fs::write(&hang, "")?;
    let mut run = containerd.begin(
        containerd.run(&["-d", "--null-io"], "c", &["sleep", "1000"]),
        "run",
    )?;
    wait_for("the runtime to hang", Duration::from_secs(15), || {
        Ok(hung.exists().then_some(()))
    })?;
    let shim = containerd.shim("c")?;
    let pid = shim.pid()?;
    containerd.crash()?;
    run.kill()?;
    run.wait()?;
    fs::remove_file(&hang)?;
    containerd.launch()?;
    // It found the shim, whose create still hangs; an operator removes what did not come to be.
    // The answer is that there was no such task, once it has been taken back.
    containerd.command(&["task", "rm", "-f", "c"]).output()?;
    wait_for("the task's end", Duration::from_secs(10), || {
        Ok(containerd.task("c")?.is_none().then_some(()))
    })?;
    let hanging = |p: &String| p.contains("hanging-runtime");
    ensure!(!leak::processes(&containerd.stage.mark).iter().any(hanging));
    containerd.ctr(&["container", "rm", "c"])?;
    // A shim that was never told to go may serve the next one, or have gone.
    containerd.run_detached("c", &["sleep", "1000"])?;
    containerd.wait_status("c", "RUNNING")?;
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    containerd.wait_status("c", "STOPPED")?;
    containerd.command(&["task", "rm", "c"]).output()?;
    containerd.ctr(&["container", "rm", "c"])?;
    wait_for("the first shim's end", Duration::from_secs(5), || {
        Ok((!alive(pid)).then_some(()))
    })?;
    containerd.finish()
}
