//! A place for tests of the shim alone: bundles over one image with the host's programs, a socket
//! directory, a runtime, and the check that nothing is left.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Launcher, NewTask, Shim, wire};
use crate::bundle::Bench;
use crate::crictl::parse_log;
use crate::{binaries, leak, wait_for};

pub struct Stand {
    pub bench: Bench,
    pub launcher: Launcher,
    /// What shims are told to run; tests put programs of their own in its place.
    pub runtime: PathBuf,
}

impl Stand {
    pub fn new() -> Result<Self> {
        Self::over(Bench::new()?)
    }

    /// Where cgroup v2 is all there is.
    pub fn unified() -> Result<Self> {
        Self::over(Bench::unified()?)
    }

    fn over(bench: Bench) -> Result<Self> {
        let image = bench.dir.join("image");
        for dir in ["usr", "dev", "etc", "proc", "sys", "tmp", "volume"] {
            fs::create_dir_all(image.join(dir))?;
        }
        for name in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), image.join(name))?;
        }
        let probe = image.join("probe");
        fs::copy(binaries::probe()?, &probe)?;
        fs::set_permissions(&probe, fs::Permissions::from_mode(0o755))?;
        let volume = bench.dir.join("volume");
        fs::create_dir_all(&volume)?;
        Ok(Self {
            launcher: Launcher::new(&bench.dir),
            runtime: binaries::coracle()?,
            bench,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.bench.dir
    }

    /// A directory that containers see as /volume.
    pub fn volume(&self) -> PathBuf {
        self.dir().join("volume")
    }

    pub fn root(&self) -> PathBuf {
        self.dir().join("runtime-root")
    }

    pub fn log(&self, id: &str) -> PathBuf {
        self.dir().join(format!("{id}.log"))
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir().join("bundles").join(id)
    }

    /// Writes the bundle of a container of this group that runs a script.
    pub fn write(&self, group: &str, id: &str, script: &str) -> Result<PathBuf> {
        let bind = |from: &Path, to: &str, mode: &str| {
            json!({"destination": to, "type": "bind", "source": from.display().to_string(),
                   "options": ["bind", mode]})
        };
        let mut config = self.bench.config(id, &[]);
        config = config
            .set("/process/args", vec!["/usr/bin/sh", "-c", script])
            .set(
                "/annotations",
                json!({"io.kubernetes.cri.sandbox-id": group}),
            )
            .push("/mounts", bind(Path::new("/usr"), "/usr", "ro"))
            .push("/mounts", bind(&self.volume(), "/volume", "rw"));
        let bundle = self.bundle(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        config.write(&bundle.join("config.json"))?;
        Ok(bundle)
    }

    /// The rootfs is a mount of the shim's, the output a CRI log.
    pub fn task(&self, id: &str) -> NewTask {
        NewTask::new(id, &self.bundle(id), &self.runtime, &self.root())
            .log(&self.log(id))
            .rootfs(wire::Mount {
                kind: "bind".into(),
                source: self.dir().join("image").display().to_string(),
                target: String::new(),
                options: vec!["rbind".into(), "rw".into()],
            })
    }

    /// The group's shim, with this container created in it; its pid.
    pub fn create(&self, group: &str, id: &str, script: &str) -> Result<(Shim, i32)> {
        let bundle = self.write(group, id, script)?;
        let shim = self.launcher.start(&bundle, id)?;
        let pid = shim.create(&self.task(id))?;
        Ok((shim, pid))
    }

    pub fn run(&self, group: &str, id: &str, script: &str) -> Result<(Shim, i32)> {
        let (shim, pid) = self.create(group, id, script)?;
        shim.start(id, "")?;
        Ok((shim, pid))
    }

    /// What the process of a container wrote to its log.
    pub fn lines(&self, id: &str) -> Result<Vec<String>> {
        let path = self.log(id);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        Ok(parse_log(whole)?.into_iter().map(|l| l.text).collect())
    }

    pub fn wait_line(&self, id: &str, text: &str) -> Result<()> {
        wait_for(
            &format!("{text:?} of {id}"),
            Duration::from_secs(10),
            || {
                let lines = self.lines(id).unwrap_or_default();
                Ok(lines.iter().any(|l| l == text).then_some(()))
            },
        )
    }

    /// Directories of a container's cgroup: one for each hierarchy.
    pub fn cgroups(&self, id: &str) -> Vec<PathBuf> {
        let mut all = leak::cgroups(&self.bench.mark);
        all.retain(|path| path.ends_with(format!("{}/{id}", self.bench.mark)));
        all
    }

    /// What is left of tasks; shims that have nothing to do may be there.
    pub fn left_of_tasks(&self) -> Result<Vec<String>> {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
        let here = self.dir().display().to_string();
        let mut left: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(&here))
            .map(|line| format!("mount {line}"))
            .collect();
        let containers = leak::processes(&self.bench.mark).into_iter();
        left.extend(
            containers
                .filter(|p| !p.contains("containerd-shim-coracle-v2"))
                .map(|p| format!("process {p}")),
        );
        let records = leak::files_named(&self.root(), &["state.json".into(), "intent.json".into()]);
        left.extend(records.iter().map(|p| format!("file {}", p.display())));
        let cgroups = leak::cgroups(&self.bench.mark);
        let common = |path: &Path| path.ends_with(&self.bench.mark);
        left.extend(
            cgroups
                .iter()
                .filter(|path| !common(path))
                .map(|path| format!("cgroup {}", path.display())),
        );
        Ok(left)
    }

    /// No task is left, and no shim: they were shut down, or died and were cleared up.
    pub fn finish(self) -> Result<()> {
        let mut left = Vec::new();
        for _ in 0..100 {
            left = self.left_of_tasks()?;
            left.extend(self.launcher.left().iter().map(|s| format!("socket {s}")));
            let shims = leak::processes(&self.bench.mark).into_iter();
            left.extend(shims.map(|p| format!("process {p}")));
            if left.is_empty() {
                return self.bench.finish();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok(())
    }
}

/// Whether this is the process that a confined shim has beside it.
pub fn are_hands(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim() == "shim-hands"
}

/// Runs and is no zombie.
pub fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A runtime that hangs in every command for which there is a file `hang-<command>` in `dir`, and
/// else is the one at `real`.
pub fn hanging_runtime(dir: &Path, real: &Path) -> Result<PathBuf> {
    let path = dir.join("hanging-runtime");
    let script = format!(
        "#!/bin/sh\nfor word; do\n  case $word in\n    create|start|exec|delete|pause|kill)\n      \
         if [ -e '{dir}/hang-'$word ]; then touch '{dir}/hung'; sleep 3600; fi\n      \
         break;;\n  esac\ndone\nexec '{real}' \"$@\"\n",
        dir = dir.display(),
        real = real.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
