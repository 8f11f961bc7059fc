//! What runtimes make of the same bundle, in a form that can be compared: what the container
//! saw of itself, what was left in its root, what hooks were told, and how it ended. What differs
//! from run to run (inode numbers, pids of the host) is taken out; nothing else is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::bundle::Runtime;
use crate::generated::{Case, Places};
use crate::process::Process;
use crate::{binaries, terminal};

/// One worker's directories and the process whose namespaces are joined.
pub struct Ground {
    pub places: Places,
    bundle: PathBuf,
    probe: PathBuf,
    /// An empty file.
    input: PathBuf,
    neighbour: Process,
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n";

impl Ground {
    /// `dir` is the worker's own; what it mounts there goes with the mount namespace.
    pub fn prepare(dir: &Path, mark: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let source = dir.join("source");
        for part in ["tree/inside", "tree/mounted", "lower", "dev"] {
            fs::create_dir_all(source.join(part))?;
        }
        fs::write(source.join("file"), "a file\n")?;
        let (probe, input) = (dir.join("probe"), dir.join("input"));
        fs::write(&input, "")?;
        fs::copy(binaries::probe()?, &probe)?;
        fs::write(source.join("lower/below"), "below\n")?;
        let flags = nix::mount::MsFlags::MS_NOSUID
            | nix::mount::MsFlags::MS_NODEV
            | nix::mount::MsFlags::MS_NOEXEC;
        let tmpfs = |at: &Path, flags| {
            nix::mount::mount(
                Some("tmpfs"),
                at,
                Some("tmpfs"),
                flags,
                Some("mode=755,size=1m"),
            )
        };
        tmpfs(&source.join("tree/mounted"), flags)?;
        fs::write(source.join("tree/mounted/file"), "mounted\n")?;
        tmpfs(&source.join("dev"), nix::mount::MsFlags::empty())?;
        for (name, minor) in [("null", 3), ("zero", 5), ("full", 7)] {
            let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
            let kind = nix::sys::stat::SFlag::S_IFCHR;
            let path = source.join("dev").join(name);
            nix::sys::stat::mknod(&path, kind, mode, nix::sys::stat::makedev(1, minor))?;
        }
        let mut command = std::process::Command::new("unshare");
        command.args(["--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]);
        command.args(["sleep", "3600"]).current_dir(dir);
        let neighbour = Process::start(&mut command, &dir.join("neighbour.log"))?;
        let own = fs::read_link("/proc/thread-self/ns/pid")?;
        // Its namespaces are there when its child is.
        crate::wait_for("the neighbour", std::time::Duration::from_secs(5), || {
            let link = fs::read_link(format!("/proc/{}/ns/pid_for_children", neighbour.pid()));
            Ok(link.is_ok_and(|l| l != own).then_some(()))
        })?;
        Ok(Self {
            places: Places {
                mark: mark.to_owned(),
                source: source.display().to_string(),
                neighbour: neighbour.pid(),
                hook_log: dir.join("hooks.log").display().to_string(),
            },
            bundle: dir.join("bundle"),
            probe,
            input,
            neighbour,
        })
    }

    pub fn close(self) -> Result<()> {
        for mount in ["tree/mounted", "dev"] {
            nix::mount::umount(&Path::new(&self.places.source).join(mount))?;
        }
        // Its child, the first of its pids, goes with it.
        self.neighbour.crash()
    }

    /// A new root each time: what a runtime creates in it is part of what is compared.
    fn fresh(&self, config: &crate::crictl::Config) -> Result<PathBuf> {
        let rootfs = self.bundle.join("rootfs");
        if self.bundle.exists() {
            fs::remove_dir_all(&self.bundle)?;
        }
        for dir in [
            "bin", "dev", "etc", "proc", "sys", "tmp", "app/sub", "home/app", "root",
        ] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        fs::hard_link(&self.probe, rootfs.join("bin/probe"))?;
        fs::write(rootfs.join("etc/passwd"), PASSWD)?;
        fs::write(rootfs.join("etc/group"), "root:x:0:\napp:x:1000:\n")?;
        std::os::unix::fs::symlink("/app", rootfs.join("link"))?;
        for (name, text) in [("bin/script", "no interpreter\n"), ("bin/empty", "")] {
            fs::write(rootfs.join(name), text)?;
            fs::set_permissions(rootfs.join(name), fs::Permissions::from_mode(0o755))?;
        }
        let _ = fs::remove_file(&self.places.hook_log);
        config.write(&self.bundle.join("config.json"))?;
        Ok(self.bundle.clone())
    }

    /// `run` of a case under one runtime.
    pub fn run(&self, runtime: &Runtime, case: &Case, id: &str) -> Result<Value> {
        let bundle = self.fresh(&case.config)?.display().to_string();
        let mut command = runtime.command(&["run", "-b", &bundle, id]);
        let output = if case.terminal {
            terminal::run(command, 24, 80)?
        } else {
            // Not /dev/null: crun would give the host's node to the container's user.
            command.stdin(fs::File::open(&self.input)?).output()?
        };
        let mut seen = self.outcome(&output)?;
        seen["hooks"] =
            fs::read_to_string(&self.places.hook_log).map_or(Value::Null, |t| t.lines().collect());
        // A container that never was may have left half of its root.
        if output.status.success() {
            seen["left in the root"] = self.tree(&self.bundle.join("rootfs"))?;
        }
        Ok(seen)
    }

    /// `create` to `delete` of a case: what each command ended with and what it printed.
    pub fn live(&self, runtime: &Runtime, case: &Case, id: &str) -> Result<Value> {
        let config = case
            .config
            .clone()
            .set("/process/args", json!(["/bin/probe", "sleep", "1000"]));
        let bundle = self.fresh(&config)?.display().to_string();
        let log = self.bundle.join("log");
        let mut seen = serde_json::Map::new();
        let mut step = |name: &str, value: Value| seen.insert(name.to_owned(), value);
        let code =
            |args: &[&str]| -> Result<Value> { Ok(json!(runtime.try_run(args)?.status.code())) };
        let file = fs::File::create(&log)?;
        let status = runtime
            .command(&["create", "-b", &bundle, id])
            .stdin(fs::File::open(&self.input)?)
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()?;
        step("create", json!(status.code()));
        step("", json!(fs::read_to_string(&log)?.trim()));
        step("state when created", state(runtime, id)?);
        if status.success() {
            step("create again", code(&["create", "-b", &bundle, id])?);
            step("pause when created", code(&["pause", id])?);
            step("resume when paused", code(&["resume", id])?);
            let started = code(&["start", id])?;
            step("start", started.clone());
            if started != 0 {
                // Whether the container is gone by itself then is another matter.
                runtime.try_run(&["delete", "--force", id])?;
                return Ok(seen.into());
            }
            step("start again", code(&["start", id])?);
            step("state when running", state(runtime, id)?);
            let mut exec: Vec<&str> = vec!["exec"];
            exec.extend(case.exec.iter().map(String::as_str));
            exec.extend([id, "/bin/probe", "show"]);
            let output = runtime
                .command(&exec)
                .stdin(fs::File::open(&self.input)?)
                .output()?;
            let mut view = self.outcome(&output)?;
            view["flags"] = json!(case.exec);
            step("exec", view);
            step("exec exit", code(&["exec", id, "/bin/probe", "exit", "7"])?);
            step("exec of nothing", code(&["exec", id, "/no/such"])?);
            step("delete when running", code(&["delete", id])?);
            step("kill", code(&["kill", id, "KILL"])?);
            crate::wait_for("the end", std::time::Duration::from_secs(10), || {
                Ok((state(runtime, id)?["status"] == "stopped").then_some(()))
            })?;
            step("state when stopped", state(runtime, id)?);
            step("start when stopped", code(&["start", id])?);
            step(
                "exec when stopped",
                code(&["exec", id, "/bin/probe", "true"])?,
            );
            step("delete", code(&["delete", id])?);
        }
        step("state when gone", code(&["state", id])?);
        step("delete when gone", code(&["delete", id])?);
        step(
            "delete by force when gone",
            code(&["delete", "--force", id])?,
        );
        step("kill when gone", code(&["kill", id, "KILL"])?);
        Ok(seen.into())
    }

    /// Success or not, and with which code.
    pub fn refusal(
        &self,
        runtime: &Runtime,
        config: &crate::crictl::Config,
        id: &str,
    ) -> Result<Value> {
        let bundle = self.fresh(config)?.display().to_string();
        let mut command = runtime.command(&["run", "-b", &bundle, id]);
        let output = command.stdin(fs::File::open(&self.input)?).output()?;
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok(json!({"code": output.status.code(), "": text}))
    }

    fn outcome(&self, output: &Output) -> Result<Value> {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code();
        // On a terminal crun may put its own words around it.
        let document = match (text.find('{'), text.rfind('}')) {
            (Some(from), Some(to)) if from < to => &text[from..=to],
            _ => &text,
        };
        if let Ok(mut view) = serde_json::from_str::<Value>(document) {
            self.normalise(&mut view)?;
            return Ok(json!({"code": code, "sees": view, "": error.trim()}));
        }
        // On a terminal both are one, with the colours of some.
        if code != Some(0) && error.is_empty() {
            return Ok(json!({"code": code, "": text.trim()}));
        }
        Ok(json!({"code": code, "output": text, "error": class(&error), "": error.trim()}))
    }

    fn normalise(&self, view: &mut Value) -> Result<()> {
        let map = view.as_object_mut().context("an object")?;
        let mut own_pids = false;
        if let Some(namespaces) = map.get_mut("namespaces").and_then(Value::as_object_mut) {
            for (kind, inode) in namespaces.iter_mut() {
                let link = |path: String| fs::read_link(path).ok();
                let host = link(format!("/proc/thread-self/ns/{kind}"));
                let theirs = link(format!("/proc/{}/ns/{kind}", self.places.neighbour));
                let seen = inode.as_str().map(PathBuf::from);
                *inode = match () {
                    () if seen.is_none() => Value::Null,
                    () if seen == host => json!("the host's"),
                    () if seen == theirs => json!("the neighbour's"),
                    () => json!("its own"),
                };
                own_pids |= kind == "pid" && *inode == "its own";
            }
        }
        if !own_pids || map.get("pid") != Some(&json!(1)) {
            let leads = |key: &str| json!(map.get(key) == map.get("pid"));
            let (session, group) = (leads("session"), leads("processGroup"));
            map.insert("session".to_owned(), session);
            map.insert("processGroup".to_owned(), group);
            for key in ["pid", "ppid", "nsPid"] {
                map.remove(key);
            }
        }
        if let Some(mounts) = map.get_mut("mounts").and_then(Value::as_array_mut) {
            for mount in mounts {
                *mount = comparable(mount);
            }
        }
        // Signals 32 and 33 are the C library's; a Go program takes them back from its caller.
        if let Some(ignored) = map.get_mut("signals").and_then(|s| s.get_mut("ignored")) {
            let bits = u64::from_str_radix(ignored.as_str().unwrap_or_default(), 16)?;
            *ignored = json!(format!("{:x}", bits & !(0b11 << 31)));
        }
        // Which descriptors are open; a runtime may pass its own stdio on or copy it.
        if let Some(fds) = map.get_mut("fds").and_then(Value::as_object_mut) {
            for target in fds.values_mut() {
                let text = target.as_str().unwrap_or_default();
                *target = json!(text.starts_with("/dev/pts") || text == "/dev/console");
            }
        }
        // The size comes from the caller's terminal a moment after the start, under runc.
        if let Some(terminal) = map.get_mut("terminal") {
            *terminal = json!(terminal != "not a tty");
        }
        // What /proc says changes by the moment.
        if let Some(paths) = map.get_mut("paths").and_then(Value::as_object_mut) {
            for (path, seen) in paths.iter_mut().filter(|(p, _)| p.starts_with("/proc")) {
                let text = seen["text"]
                    .as_str()
                    .map(|t| if t.is_empty() { "" } else { "some" });
                seen["text"] = json!(text);
                if path == "/proc" {
                    seen["entries"] = Value::Null;
                }
            }
        }
        Ok(())
    }

    /// Every path below `root`, with kind, mode and owner.
    fn tree(&self, root: &Path) -> Result<Value> {
        let mut found = BTreeMap::new();
        let mut queue = vec![root.to_owned()];
        while let Some(dir) = queue.pop() {
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                let meta = entry.metadata()?;
                let path = entry.path();
                let name = path.strip_prefix(root)?.display().to_string();
                if meta.is_dir() {
                    queue.push(path);
                }
                let what = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
                found.insert(name, what);
            }
        }
        Ok(json!(found))
    }
}

fn state(runtime: &Runtime, id: &str) -> Result<Value> {
    let output = runtime.try_run(&["state", id])?;
    let Ok(mut state) = serde_json::from_slice::<Value>(&output.stdout) else {
        return Ok(json!({"code": output.status.code()}));
    };
    if let Some(map) = state.as_object_mut() {
        map.retain(|key, _| {
            ["id", "status", "bundle", "annotations", "pid"].contains(&key.as_str())
        });
        let pid = map.get("pid").and_then(Value::as_i64).unwrap_or(0);
        map.insert("pid".to_owned(), json!(pid > 0));
        // Absent and empty are the same.
        if map
            .get("annotations")
            .is_none_or(|a| a.as_object().is_none_or(serde_json::Map::is_empty))
        {
            map.remove("annotations");
        }
    }
    Ok(state)
}

/// What engines look for in the message; the rest of the words are each runtime's own.
fn class(error: &str) -> &'static str {
    let error = error.to_lowercase();
    let any = |words: &[&str]| words.iter().any(|w| error.contains(w));
    match () {
        () if any(&["not found", "no such file"]) => "not found",
        () if any(&["permission denied"]) => "permission denied",
        () if any(&["is a directory"]) => "is a directory",
        () if any(&["exec format"]) => "exec format",
        () if error.trim().is_empty() => "none",
        () => "another",
    }
}

/// Of a mount, what a process in the container can tell: where, what kind, and what it forbids.
/// Read-only may be the mount's or the file system's. Sources are names without a meaning.
pub fn comparable(mount: &Value) -> Value {
    let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
    let target = text("target");
    // A masked file is some null device, from wherever the runtime took it.
    if target.starts_with("/proc/") && text("type").ends_with("tmpfs") {
        return json!({"masked": target});
    }
    let read_only = |key: &str| text(key).split(',').any(|o| o == "ro");
    let mut flags: Vec<String> = text("flags")
        .split(',')
        .filter(|f| !matches!(*f, "ro" | "rw" | "relatime"))
        .map(str::to_owned)
        .collect();
    flags.sort();
    let size = text("options")
        .split(',')
        .find(|o| o.starts_with("size="))
        .map(str::to_owned);
    json!({
        "target": target,
        "type": text("type"),
        "readOnly": read_only("flags") || read_only("options"),
        "flags": flags,
        "size": size.filter(|_| target != "/" && !target.starts_with("/sys/firmware")),
        "propagation": text("propagation").split(':').next().unwrap_or_default(),
    })
}

/// Where two outcomes differ, a line each: `sees/capabilities/bounding: ours .., theirs ..`.
/// Lists are compared as sets, because the order of mounts in the kernel's table means nothing.
pub fn differences(ours: &Value, theirs: &Value) -> Vec<String> {
    let text = |side: &Value, key: &str| side[key].as_str().unwrap_or_default().to_owned();
    // Where they end differently, nothing else is worth a word.
    for step in ["code", "create"] {
        let (left, right) = (&ours[step], &theirs[step]);
        if left != right {
            return vec![format!(
                "/{step}: ours {left}, theirs {right} (ours: {}) (theirs: {})",
                text(ours, ""),
                text(theirs, "")
            )];
        }
    }
    // Both failed: each says it in its own words, but for those that engines look for.
    if ours["code"].is_number()
        && ours["code"] != 0
        && ours["sees"].is_null()
        && theirs["sees"].is_null()
    {
        let (left, right) = (text(ours, "error"), text(theirs, "error"));
        let mut found = Vec::new();
        walk("/hooks", &ours["hooks"], &theirs["hooks"], &mut found);
        if left != right && left != "another" && right != "another" {
            found.push(format!("/error: ours {left}, theirs {right}"));
        }
        return found;
    }
    let mut found = Vec::new();
    walk("", ours, theirs, &mut found);
    found
}

fn walk(at: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        _ if ours == theirs => {}
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
                // Error texts: for the reader of a failure, not to be compared.
                if key.is_empty() {
                    continue;
                }
                let at = format!("{at}/{key}");
                let side = |map: &serde_json::Map<String, Value>| {
                    map.get(key).cloned().unwrap_or(Value::Null)
                };
                walk(&at, &side(a), &side(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            // As often as they occur: a mount that is there twice is not one that is there once.
            let only = |here: &[Value], there: &[Value]| -> Vec<String> {
                let mut rest = there.to_vec();
                here.iter()
                    .filter(|i| match rest.iter().position(|r| r == *i) {
                        Some(at) => {
                            rest.remove(at);
                            false
                        }
                        None => true,
                    })
                    .map(Value::to_string)
                    .collect()
            };
            found.extend(only(a, b).iter().map(|i| format!("{at}: only ours {i}")));
            found.extend(only(b, a).iter().map(|i| format!("{at}: only theirs {i}")));
        }
        _ => {
            let short = |v: &Value| v.to_string().chars().take(300).collect::<String>();
            found.push(format!(
                "{at}: ours {}, theirs {}",
                short(ours),
                short(theirs)
            ));
        }
    }
}
