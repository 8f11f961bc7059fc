//! A few hundred command lines, given to Debian's runc and to coracle side by side, with
//! containers in each status: the same exit code, the same answer and the same words, or an entry
//! in the table of differences that says why not. An entry that is no difference fails, too.
//!
//! runc here is 1.1; where 1.5 changed its answer, coracle follows 1.5 and the table says so.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::need_root;

const COMMANDS: &[&str] = &[
    "create", "delete", "events", "exec", "features", "kill", "list", "pause", "ps", "resume",
    "run", "spec", "start", "state", "update",
];

/// The containers by their status, and one that there is not.
const IDS: &[&str] = &["run", "made", "gone", "cold", "nope"];

/// Lines that answer differently, and why; `ID` stands for a container in any status.
const DIFFERENT: &[(&str, &str)] = &[
    ("features", "each tells of itself, and 1.5 of more"),
    ("exec ID", "1.5: the words for an empty command"),
    ("exec ID /tmp", "1.5: a directory is called one"),
    ("exec ID /etc", "1.5: a directory is called one"),
    (
        "exec --user x ID /bin/probe exit 0",
        "1.5: the words for a bad uid",
    ),
    (
        "exec --user 1:x ID /bin/probe exit 0",
        "1.5: the words for a bad gid",
    ),
    (
        "exec -p {dir}/bad.json ID",
        "the parser's words, which say where",
    ),
    (
        "update -r {dir}/bad.json ID",
        "the parser's words, which say where",
    ),
    (
        "exec --preserve-fds 40 ID /bin/probe exit 0",
        "looked at before anything is opened: Go's runtime has files of its own in between",
    ),
    (
        "create --preserve-fds 40 -b {bundle} c",
        "looked at before anything is opened: Go's runtime has files of its own in between",
    ),
    (
        "run -b {bundle} --preserve-fds 40 c",
        "looked at before anything is opened: Go's runtime has files of its own in between",
    ),
    (
        "exec --tty=false ID -- /bin/probe exit 9",
        "1.5: -- ends the flags and is no command",
    ),
    ("delete ID --nope", "1.5: flags may follow the id"),
    ("nope -h", "1.5: another exit code"),
    ("--root", "1.5: the flag as it was written"),
    (
        "--rootless maybe create -b {bundle} c",
        "refused by every command, so without the name of one",
    ),
    ("create -b {dir}/empty c", "coracle says where"),
    ("create --bundle={dir}/empty c", "coracle says where"),
    ("create -bundle {dir}/empty c", "coracle says where"),
    ("create c -b {dir}/empty", "coracle says where"),
    ("run -b {dir}/empty c", "coracle says where"),
    ("exec -g x a b", "the flag by its long name"),
];

/// One runtime with its containers.
struct Side {
    runtime: Runtime,
    bundle: PathBuf,
    dir: PathBuf,
}

/// What a line came to, without what must differ.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Side {
    /// The numbers make paths of one length: columns are compared, too.
    fn new(bench: &Bench, number: u8, runtime: Runtime) -> Result<Self> {
        let name = number.to_string();
        let id = format!("{name}-bundle");
        let bundle = bench.bundle(&id, &bench.config(&id, &["sleep", "600"]))?;
        let dir = bench.dir.join(format!("{name}-dir"));
        std::fs::create_dir_all(dir.join("empty"))?;
        std::fs::write(dir.join("bad.json"), "{")?;
        let process = r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["/bin/probe","exit","7"]}"#;
        std::fs::write(dir.join("process.json"), process)?;
        let side = Self {
            runtime,
            bundle,
            dir,
        };
        for (id, args) in [
            ("run", &["sleep", "600"][..]),
            ("made", &["sleep", "600"]),
            ("gone", &["exit", "0"]),
            ("cold", &["sleep", "600"]),
        ] {
            let bundle = bench.bundle(
                &format!("{name}-{id}"),
                &bench.config(&format!("{name}-{id}"), args),
            )?;
            let log = side.dir.join(format!("{id}.log"));
            let bundle = bundle.display().to_string();
            side.runtime
                .detached(&["create", "-b", &bundle, id], &log)?;
            if id != "made" {
                side.runtime.run(&["start", id])?;
            }
        }
        side.runtime.wait_status("gone", "stopped")?;
        side.runtime.run(&["pause", "cold"])?;
        Ok(side)
    }

    fn answer(&self, line: &str) -> Result<Answer> {
        let paths = [
            ("{bundle}", self.bundle.as_path()),
            ("{dir}", &self.dir),
            ("{root}", &self.runtime.root),
        ];
        let words: Vec<String> = line
            .split(' ')
            .filter(|word| !word.is_empty())
            .map(|word| {
                paths
                    .iter()
                    .fold(word.replace("''", ""), |word, (name, path)| {
                        word.replace(name, &path.display().to_string())
                    })
            })
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        // Files: what stays behind in a container keeps a pipe open.
        let file = |name: &str| self.dir.join(name);
        let status = self
            .runtime
            .command(&words)
            .current_dir(&self.dir)
            .stdout(std::fs::File::create(file("stdout"))?)
            .stderr(std::fs::File::create(file("stderr"))?)
            .status()
            .with_context(|| line.to_owned())?;
        let read = |name: &str| -> Result<String> {
            Ok(String::from_utf8_lossy(&std::fs::read(file(name))?).into_owned())
        };
        let stdout = self.without_names(&read("stdout")?);
        let stderr = read("stderr")?;
        let stderr: Vec<String> = stderr
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with("Incorrect Usage"))
            .map(|line| self.without_names(&message(line)))
            .collect();
        Ok(Answer {
            code: status.code(),
            // What a refusal tells of the right use is help, and has tests of its own.
            stdout: match stdout.starts_with("Incorrect Usage") || stdout.starts_with("NAME:") {
                true if status.success() => help_of(&stdout),
                true => String::new(),
                false => stdout,
            },
            stderr: stderr.join("\n"),
        })
    }

    /// The names of the runtime, its directories, processes and times.
    fn without_names(&self, text: &str) -> String {
        let program = self.runtime.words(&[]).remove(0);
        let dir = self.dir.display().to_string();
        let numbered = dir.strip_suffix("-dir").unwrap_or(&dir);
        let text = text
            .replace(&program, "PROGRAM")
            .replace(&self.runtime.root.display().to_string(), "ROOT")
            .replace(&dir, "DIR")
            .replace(numbered, "N")
            .replace("coracle", "RUNTIME")
            .replace("runc", "RUNTIME");
        without_times(&without_pids(&without_version(&text)))
    }

    fn finish(&self) -> Result<()> {
        for id in self.runtime.run(&["list", "-q"])?.lines() {
            self.runtime.run(&["delete", "--force", id])?;
        }
        Ok(())
    }
}

/// The message of a record of the log, or the line.
fn message(line: &str) -> String {
    match line.split_once(" msg=") {
        Some((head, text)) if head.starts_with("time=") => {
            let level = head.split_once("level=").map_or("", |(_, level)| level);
            let text = text.trim_matches('"').replace("\\\"", "\"");
            // runc ends some with a newline of their own.
            format!("{level}: {}", of_now(text.trim_end_matches("\\n")))
        }
        _ => line.to_owned(),
    }
}

/// What 1.5 says of a wrong value, without what the two libraries for flags add.
fn of_now(text: &str) -> String {
    let text = text.replace("invalid boolean value", "invalid value");
    match text.split_once(" for ") {
        Some((head, flag)) if head.starts_with("invalid value") => {
            let flag = flag.trim_start_matches("flag ");
            let end = flag.find(':').unwrap_or(flag.len());
            format!("{head} for {}", &flag[..end])
        }
        _ => text,
    }
}

/// Flags that one of the two versions does not have, or does not list with a command.
const UNLISTED: &[&str] = &[
    "--all",
    "--cpu-burst",
    "--cpu-idle",
    "--criu",
    "--debug",
    "--help",
    "--log",
    "--log-format",
    "--pidfd-socket",
    "--root",
    "--rootless",
    "--systemd-cgroup",
];

/// Only which commands and flags a help names: the sentences are each runtime's own.
fn help_of(text: &str) -> String {
    let mut words: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| word.starts_with("--") || COMMANDS.contains(word))
        .map(|word| word.trim_end_matches(','))
        .filter(|word| !UNLISTED.contains(word))
        .collect();
    words.sort_unstable();
    words.dedup();
    words.join(" ")
}

/// Numbers of four digits and more are processes' or sizes that move.
fn without_pids(text: &str) -> String {
    let mut plain = String::new();
    let mut digits = String::new();
    for c in text.chars().chain(['\0']) {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        match digits.len() {
            3.. => plain.push('N'),
            _ => plain.push_str(&digits),
        }
        digits.clear();
        if c != '\0' {
            plain.push(c);
        }
    }
    plain
}

/// runc says which spec it knows, coracle which the config was written for; and runc's `state`
/// leaves the owner out, which its `list` knows.
fn without_version(text: &str) -> String {
    let mut text = text
        .replace("\"owner\": \"\"", "\"owner\": \"root\"")
        .replace("1.0.2-dev", "1.0.2");
    for version in ["1.0.2", "1.3.0"] {
        text = text.replace(version, "VERSION");
    }
    text
}

fn without_times(text: &str) -> String {
    let words: Vec<String> = text
        .split_inclusive(['"', ' ', '\n'])
        .map(|word| match word.starts_with("N-") && word.contains("Z") {
            true => format!("T{}", &word[word.len() - 1..]),
            false => word.to_owned(),
        })
        .collect();
    // Fractions of a second have as many digits as they need.
    let mut text = words.concat();
    while text.contains("T    ") {
        text = text.replace("T    ", "T   ");
    }
    text
}

/// The lines that every command gets, and those that a command is made for.
fn lines() -> Vec<String> {
    let mut lines = Vec::new();
    for command in COMMANDS {
        for rest in ["", "a b c d", "--nope", "-x", "--help", "-h", "--help=x"] {
            lines.push(format!("{command} {rest}"));
        }
        lines.push(format!("help {command}"));
        lines.push(format!("h {command}"));
        if !matches!(
            *command,
            "create" | "exec" | "features" | "list" | "run" | "spec"
        ) {
            for id in ["nope", "''", "a/b", "..", "-", "."] {
                lines.push(format!("{command} {id}"));
            }
        }
    }
    for id in IDS {
        for line in [
            "state ID",
            "state -- ID",
            "ps -f json ID",
            "ps --format=xml ID",
            "ps ID -o pid=",
            "ps ID --nope",
            "start ID",
            "pause ID",
            "resume ID",
            "kill ID 0",
            "kill ID NOSIG",
            "kill ID SIGNOPE",
            "kill --all ID 0",
            "kill ID ''",
            "exec ID",
            "exec ID ''",
            "exec ID /bin/probe exit 3",
            "exec ID nope",
            "exec ID /nope",
            "exec ID /tmp",
            "exec ID /etc",
            "exec --cwd /nope ID /bin/probe exit 0",
            "exec --cwd rel ID /bin/probe exit 0",
            "exec --user x ID /bin/probe exit 0",
            "exec --user 1:x ID /bin/probe exit 0",
            "exec --user 1000:1000 ID /bin/probe exit 4",
            "exec -u 1 -g 5 -g 6 ID /bin/probe exit 5",
            "exec --cap CAP_NOPE ID /bin/probe exit 0",
            "exec --cap CAP_KILL -e A=b --no-new-privs ID /bin/probe exit 6",
            "exec --process {dir}/process.json ID",
            "exec -p {dir}/bad.json ID",
            "exec -p {dir}/none.json ID",
            "exec --process-label x ID /bin/probe exit 0",
            "exec --console-socket {dir}/none -t -d ID /bin/probe exit 0",
            "exec --console-socket {dir}/none ID /bin/probe exit 0",
            "exec -t -d ID /bin/probe exit 0",
            "exec --preserve-fds 40 ID /bin/probe exit 0",
            "exec --ignore-paused=false ID /bin/probe exit 8",
            "exec --tty=false ID -- /bin/probe exit 9",
            "update -r {dir}/none.json ID",
            "update -r {dir}/bad.json ID",
            "update --memory x ID",
            "update --cpu-quota x ID",
            "events --stats --interval 0 ID",
            "events --interval x ID",
            "delete ID --nope",
            "create -b {bundle} ID",
            "run -b {bundle} ID",
        ] {
            // A process in a paused container would wait, and a new one would stay.
            let starts = line.starts_with("create") || line.starts_with("run");
            if *id == "nope" && starts {
                continue;
            }
            lines.push(line.replace("ID", id));
        }
    }
    for line in [
        "",
        "''",
        "nope",
        "nope -h",
        "help nope",
        "-h",
        "--help",
        "h",
        "help",
        "--nope",
        "-nope",
        "--root",
        "--log-format xml list",
        "--log-format= list",
        "--log {dir}/no/log list",
        "--debug=maybe list",
        "--debug=false list",
        "-debug=0 list",
        "--systemd-cgroup=x list",
        "--rootless auto list",
        "--rootless=false list",
        "--rootless maybe create -b {bundle} c",
        "list",
        "list -q",
        "list --quiet",
        "list -quiet",
        "list --quiet=true",
        "list --quiet=false",
        "list --quiet=x",
        "list -f json",
        "list --format json",
        "list -format=json",
        "list --format=",
        "list -f xml",
        "list -f",
        "list -qf json",
        "list -q -q",
        "list -f xml -f json",
        "list --",
        "list -- -q",
        "list x",
        "list help",
        "features x",
        "spec x",
        "spec -b {dir}/none",
        "create -b {dir}/none c",
        "create -b {dir}/empty c",
        "create --bundle={dir}/empty c",
        "create -bundle {dir}/empty c",
        "create c -b {dir}/empty",
        "create -b {bundle} a/b",
        "create -b {bundle} ..",
        "create -b {bundle} ''",
        "create --preserve-fds x c",
        "create --preserve-fds 40 -b {bundle} c",
        "create --console-socket {dir}/none -b {bundle} c",
        "create --no-pivot=x c",
        "run --detach=x c",
        "run -b {bundle} --console-socket {dir}/none c",
        "run -b {bundle} --preserve-fds 40 c",
        "run -b {dir}/empty c",
        "delete -f nope",
        "delete --force nope",
        "delete --force=true nope",
        "delete -f=x nope",
        "delete -force nope",
        "delete nope -f",
        "delete run",
        "delete cold",
        "kill run 99",
        "kill run -5",
        "ps nope -ef",
        "exec --nope x y",
        "exec -g x a b",
        "exec --additional-gids=x a b",
        "exec --preserve-fds x a b",
        "events --interval 5 run",
        "update --blkio-weight x run",
        "update --pids-limit x run",
    ] {
        lines.push(line.to_owned());
    }
    lines
}

/// What each does to the containers in turn: status and answer stay the same on both sides.
const LIFE: &[&str] = &[
    "start made",
    "start made",
    "state made",
    "pause made",
    "pause made",
    "list",
    "exec made /bin/probe exit 0",
    "resume made",
    "resume made",
    "kill made TERM",
    "kill made KILL",
    "delete --force made",
    "state made",
    "delete gone",
    "delete gone",
    "resume cold",
    "kill cold 9",
    "delete -f cold",
    "list -q",
    "spec",
    "spec",
    "spec --rootless",
    "spec -b {dir}/empty",
    "spec --bundle {dir}/empty",
    "run -b {bundle} --detach=true --pid-file {dir}/pid c",
    "state c",
    "delete c",
    "delete --force c",
    "list -f json",
];

fn reason(line: &str) -> Option<&'static (&'static str, &'static str)> {
    let words = line.split(' ').enumerate();
    let words = words.map(|(at, word)| match IDS.contains(&word) && at > 0 {
        true => "ID",
        false => word,
    });
    let any = words.collect::<Vec<_>>().join(" ");
    DIFFERENT
        .iter()
        .find(|(known, _)| *known == line || *known == any)
}

#[test]
fn command_lines_get_runcs_answers() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let runc = bench.peer("runc")?.context("runc: see .ci/deps")?;
    let sides = [
        Side::new(&bench, 1, runc)?,
        Side::new(&bench, 2, bench.coracle()?)?,
    ];
    let mut lines = lines();
    lines.extend(LIFE.iter().map(|line| (*line).to_owned()));
    ensure!(lines.len() > 400, "{} lines", lines.len());
    let mut wrong = Vec::new();
    let mut used: BTreeMap<&str, bool> = BTreeMap::new();
    for line in &lines {
        let line = line.trim_end();
        let [runc, coracle] = [sides[0].answer(line)?, sides[1].answer(line)?];
        let same = runc == coracle;
        match reason(line) {
            Some((known, _)) => *used.entry(known).or_default() |= !same,
            None if same => {}
            None => wrong.push(format!("{line}\n  runc    {runc:?}\n  coracle {coracle:?}")),
        }
    }
    for side in &sides {
        side.finish()?;
    }
    for (known, why) in DIFFERENT {
        if !used.get(known).copied().unwrap_or_default() {
            wrong.push(format!("no difference any more: {known} ({why})"));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {} lines:\n{}",
        wrong.len(),
        lines.len(),
        wrong.join("\n")
    );
    bench.finish()
}

#[test]
fn logs_are_runcs() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let runc = bench.peer("runc")?.context("runc: see .ci/deps")?;
    let coracle = bench.coracle()?;
    let log = bench.dir.join("log");
    let path = log.display().to_string();
    for format in ["text", "json"] {
        let flags = ["--log", &path, "--log-format", format];
        let told = |runtime: &Runtime| -> Result<(String, String)> {
            let mut stderr = String::new();
            for line in [&["state", "a\"b"][..], &["exec", "nope", "x"]] {
                stderr += &runtime.refused(&[&flags, line].concat())?;
            }
            let text = std::fs::read_to_string(&log)?;
            std::fs::remove_file(&log)?;
            Ok((without_times(&without_pids(&text)), stderr))
        };
        let (runc, coracle) = (told(&runc)?, told(&coracle)?);
        ensure!(runc == coracle, "{format}:\n{runc:?}\n{coracle:?}");
        ensure!(coracle.0.lines().count() == 2, "{coracle:?}");
    }
    // What a command does is told only when asked.
    let id = format!("{}-debug", bench.mark);
    let bundle = bench.bundle("b", &bench.config(&id, &["true"]))?;
    let bundle = bundle.display().to_string();
    for (flag, some) in [("--debug=false", false), ("--debug", true)] {
        let flags = ["--log", &path, "--log-format", "json", flag];
        coracle.run(&[&flags[..], &["run", "-b", &bundle, &id]].concat())?;
        let text = std::fs::read_to_string(&log)?;
        std::fs::remove_file(&log)?;
        ensure!(
            text.contains("{\"level\":\"debug\",") == some,
            "{flag}: {text}"
        );
    }
    bench.finish()
}

#[test]
fn spec_is_runcs_but_for_its_names() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let runc = bench.peer("runc")?.context("runc: see .ci/deps")?;
    let coracle = bench.coracle()?;
    for flags in [&[][..], &["--rootless"]] {
        let written = |runtime: &Runtime| -> Result<serde_json::Value> {
            let dir = bench.dir.join("spec");
            std::fs::create_dir(&dir)?;
            let bundle = dir.display().to_string();
            runtime.run(&[&["spec", "--bundle", &bundle], flags].concat())?;
            let text = std::fs::read(dir.join("config.json"))?;
            std::fs::remove_dir_all(&dir)?;
            Ok(serde_json::from_slice(&text)?)
        };
        let (mut want, mut have) = (written(&runc)?, written(&coracle)?);
        for (pointer, runcs, ours) in [
            ("/hostname", "runc", "coracle"),
            // The newest spec that each understands.
            ("/ociVersion", "1.0.2-dev", "1.3.0"),
        ] {
            let value = |config: &mut serde_json::Value| {
                config.pointer_mut(pointer).map(serde_json::Value::take)
            };
            ensure!(value(&mut want) == Some(runcs.into()), "{pointer}");
            ensure!(value(&mut have) == Some(ours.into()), "{pointer}");
        }
        // 1.1 asked for ambient capabilities that need inheritable ones, which it did not give.
        let sets = want.pointer_mut("/process/capabilities");
        let sets = sets.and_then(|sets| sets.as_object_mut());
        ensure!(sets.is_some_and(|sets| sets.remove("ambient").is_some()));
        ensure!(want == have, "{flags:?}:\n{want:#}\n{have:#}");
    }
    bench.finish()
}

/// A user's containers are under $XDG_RUNTIME_DIR, in a directory that cleaners leave alone.
#[test]
fn users_root_is_made_in_the_runtime_directory() -> Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown};
    need_root!();
    let bench = Bench::new()?;
    std::fs::set_permissions(&bench.dir, PermissionsExt::from_mode(0o755))?;
    let runtime_dir = bench.dir.join("run");
    std::fs::create_dir(&runtime_dir)?;
    chown(&runtime_dir, Some(1234), Some(1234))?;
    let program = bench.dir.join("coracle");
    std::fs::copy(coracle_integration::binaries::coracle()?, &program)?;
    let list = |args: &[&str], runtime_dir: &std::path::Path| {
        std::process::Command::new("setpriv")
            .args(["--reuid=1234", "--regid=1234", "--clear-groups"])
            .arg(&program)
            .args(args)
            .arg("list")
            .env("XDG_RUNTIME_DIR", runtime_dir)
            .current_dir("/")
            .output()
    };
    let output = list(&[], &runtime_dir)?;
    ensure!(output.status.success(), "{output:?}");
    let root = std::fs::metadata(runtime_dir.join("coracle"))?;
    ensure!(root.mode() & 0o7777 == 0o1700 && root.uid() == 1234);
    // One that was asked for is the caller's to make.
    let other = bench.dir.join("other").display().to_string();
    let output = list(&["--root", &other], &runtime_dir)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    for root in ["/", "..", "/a/.."] {
        let output = list(&["--root", root], &runtime_dir)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{output:?}");
        let want = "Option --root argument should not be set to /";
        ensure!(text.contains(want), "{root}: {text}");
    }
    bench.finish()
}
