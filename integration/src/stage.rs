//! What a container engine of somebody else is run on: namespaces of the test's own, a private
//! /sys/fs/cgroup directory, a registry with the fixtures, and the check that nothing is left.
//! The engines themselves are the tests' business.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount, umount};

use crate::isolation::Isolation;
use crate::leak::{self, Snapshot};
use crate::registry::Registry;
use crate::world::unique_mark;

const CGROUP: &str = "/sys/fs/cgroup";

pub struct Stage {
    pub dir: PathBuf,
    /// In every path of the test, its cgroups included.
    pub mark: String,
    pub registry: Registry,
    before: Snapshot,
    finished: bool,
    _isolation: Isolation,
}

impl Stage {
    pub fn set() -> Result<Self> {
        let isolation = Isolation::enter()?;
        let mark = unique_mark();
        let dir = std::env::temp_dir().join(&mark);
        fs::create_dir_all(&dir)?;
        own_cgroup_directory(&dir)?;
        let registry = Registry::start(&dir)?;
        let before = Snapshot::take(&mark)?;
        Ok(Self {
            dir,
            mark,
            registry,
            before,
            finished: false,
            _isolation: isolation,
        })
    }

    /// An image with a shell and the probe.
    pub fn tools(&self) -> String {
        format!("{}/coracle/tools:latest", self.registry.address())
    }

    /// Fails on anything left; the engine must have ended.
    pub fn strike(mut self) -> Result<()> {
        leak::remove_cgroups(&self.mark);
        let registry = format!("process {} ", self.registry.pid());
        let mut left = Snapshot::take(&self.mark)?.since(&self.before);
        left.retain(|t| !t.starts_with(&registry));
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        self.finished = true;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.finished {
            leak::sweep(&self.mark, &self.dir);
        }
        if std::env::var_os("CORACLE_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// The same hierarchies in a tmpfs of this mount namespace. Engines make directories there for
/// controllers that are not mounted, and the machine's own must not fill with them.
fn own_cgroup_directory(dir: &Path) -> Result<()> {
    let new = dir.join("cgroup");
    fs::create_dir(&new)?;
    let none: Option<&str> = None;
    let own_mount = |path: &Path| -> Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let above = path.parent().context("a parent")?;
        Ok(fs::metadata(path)?.dev() != fs::metadata(above)?.dev())
    };
    // A pure cgroup2 host has one file system there and nothing to fill.
    if fs::metadata(Path::new(CGROUP).join("cgroup.controllers")).is_ok() {
        return Ok(fs::remove_dir(&new)?);
    }
    mount(
        Some("tmpfs"),
        &new,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .context("mount tmpfs for the hierarchies")?;
    for entry in fs::read_dir(CGROUP)? {
        let entry = entry?;
        let (old, new) = (entry.path(), new.join(entry.file_name()));
        if entry.file_type()?.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&old)?, &new)?;
        } else if own_mount(&old)? {
            fs::create_dir(&new)?;
            mount(Some(&old), &new, none, MsFlags::MS_MOVE, none)
                .with_context(|| format!("move {}", old.display()))?;
        }
    }
    umount(CGROUP).context("unmount the old directory of hierarchies")?;
    mount(Some(&new), CGROUP, none, MsFlags::MS_MOVE, none).context("move the new one there")?;
    Ok(fs::remove_dir(&new)?)
}

/// Stdout of a command that must succeed.
pub fn success(command: Command) -> Result<String> {
    Ok(text(&ended(command, 0)?.stdout))
}

/// Stderr of a command that must end with `code`.
pub fn failure(command: Command, code: i32) -> Result<String> {
    Ok(text(&ended(command, code)?.stderr))
}

fn ended(mut command: Command, code: i32) -> Result<Output> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    ensure!(
        output.status.code() == Some(code),
        "{}, not exit code {code}: {}{}\nof {}",
        output.status,
        text(&output.stdout),
        text(&output.stderr),
        words.join(" ")
    );
    Ok(output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
