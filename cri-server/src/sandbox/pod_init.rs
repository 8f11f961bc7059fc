//! Owns the init of a pid namespace that a pod's containers share: the runtime's own binary as
//! PID 1, which reaps and does nothing else. Made when the first container asks for the mode.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use super::Sandbox;
use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::shim_client::{NewTask, STATUS_STOPPED, ShimClient, ShimError};
use crate::spec_builder::document::{
    Capabilities, Linux, LinuxResources, Mount, Namespace, Process, Root, Spec,
};
use crate::spec_builder::seccomp;

/// How long a killed process, or shim, may take to end.
const AFTER_KILL: Duration = Duration::from_secs(5);

impl Daemon {
    /// Pid of the init of the sandbox's shared pid namespace; made if there is none.
    pub async fn pod_init(&self, sandbox: &Sandbox) -> Result<u32> {
        let _step = sandbox.init_step.lock().await;
        let shim = self.shim(sandbox).await?;
        if let Some(pid) = sandbox.live().pod_init {
            match shim.status(sandbox.id(), "").await {
                Ok(status) if status.status != STATUS_STOPPED => return Ok(pid),
                // Killed by somebody, and every container of the namespace with it.
                _ => shim.delete(sandbox.id(), "").await?,
            }
        }
        let handler = self.handler(&sandbox.fixed.handler)?;
        let bundle = sandbox.fixed.dir.join("init");
        let spec = spec(sandbox, &self.init_binary)?;
        let dir = bundle.clone();
        blocking(move || write_bundle(&dir, &spec)).await?;
        let task = NewTask {
            id: sandbox.id().to_owned(),
            bundle,
            rootfs: Vec::new(),
            terminal: false,
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
            runtime: handler.runtime.clone(),
            runtime_root: handler.runtime_root.clone(),
        };
        let failed = |e: Error| e.within("start the init of pod", sandbox.id());
        if let Err(e) = shim.create(&task).await {
            // It may be under way still, if only the answer did not come.
            let _ = shim.delete(sandbox.id(), "").await;
            return Err(failed(e.into()));
        }
        let pid = match shim.start(sandbox.id(), "").await {
            Ok(pid) => pid,
            Err(e) => {
                let _ = shim.delete(sandbox.id(), "").await;
                return Err(failed(e.into()));
            }
        };
        sandbox.change(&self.records, |live| live.pod_init = Some(pid))?;
        Ok(pid)
    }

    /// Ends the init. Idempotent; a shim that is gone has taken it along.
    pub async fn stop_pod_init(&self, sandbox: &Sandbox) -> Result<()> {
        if sandbox.live().pod_init.is_none() {
            return Ok(());
        }
        let in_shim = match self.running_shim(sandbox).await {
            Some(shim) => match end_in_shim(sandbox, &shim).await {
                Ok(()) => true,
                Err(ShimError::Timeout { .. }) => {
                    self.kill_shim(sandbox);
                    let _ = tokio::time::timeout(AFTER_KILL, shim.gone()).await;
                    false
                }
                Err(e) => return Err(e.into()),
            },
            None => false,
        };
        if !in_shim {
            let handler = self.handler(&sandbox.fixed.handler)?;
            self.host.cgroups.kill(&cgroups_path(sandbox));
            let bundle = sandbox.fixed.dir.join("init");
            crate::shim_client::delete_leftovers(&handler.shim, sandbox.id(), &bundle).await?;
        }
        sandbox.change(&self.records, |live| live.pod_init = None)
    }
}

async fn end_in_shim(sandbox: &Sandbox, shim: &ShimClient) -> std::result::Result<(), ShimError> {
    match shim.kill(sandbox.id(), "", 9, false).await {
        Ok(()) => {
            let wait = shim.wait(sandbox.id(), "");
            let _ = tokio::time::timeout(AFTER_KILL, wait).await;
        }
        Err(e) if e.is_not_found() => {}
        Err(e) => return Err(e),
    }
    shim.delete(sandbox.id(), "").await
}

fn cgroups_path(sandbox: &Sandbox) -> String {
    format!(
        "{}/{}",
        sandbox.fixed.cgroup_parent.trim_end_matches('/'),
        sandbox.id()
    )
}

fn spec(sandbox: &Sandbox, binary: &Path) -> Result<Spec> {
    let fixed = &sandbox.fixed;
    let join = |kind: &str, path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| Namespace {
            kind: kind.to_owned(),
            path: path.display().to_string(),
        })
    };
    let fresh = |kind: &str| Namespace {
        kind: kind.to_owned(),
        path: String::new(),
    };
    let mut namespaces = vec![fresh("pid"), fresh("mount")];
    namespaces.extend(join("network", &fixed.netns));
    namespaces.extend(join("ipc", &fixed.ipc));
    namespaces.extend(join("uts", &fixed.uts));
    let options = |list: &[&str]| list.iter().map(|o| (*o).to_owned()).collect();
    // With a terminating signal as its only duty it needs no capability at all: in its own pid
    // namespace every process is its child.
    let none = Capabilities::default();
    Ok(Spec {
        oci_version: "1.2.0".to_owned(),
        process: Process {
            args: vec!["/coracle".to_owned(), "pod-init".to_owned()],
            cwd: "/".to_owned(),
            capabilities: none,
            no_new_privileges: true,
            oom_score_adj: None,
            ..Process::default()
        },
        root: Root {
            path: "rootfs".to_owned(),
            readonly: true,
        },
        hostname: String::new(),
        mounts: vec![
            Mount {
                destination: "/proc".to_owned(),
                kind: "proc".to_owned(),
                source: "proc".to_owned(),
                options: options(&["nosuid", "noexec", "nodev"]),
            },
            Mount {
                destination: "/coracle".to_owned(),
                kind: "bind".to_owned(),
                source: binary.display().to_string(),
                options: options(&["bind", "rprivate", "ro", "nosuid", "nodev"]),
            },
        ],
        annotations: std::collections::BTreeMap::new(),
        linux: Linux {
            namespaces,
            cgroups_path: cgroups_path(sandbox),
            resources: LinuxResources {
                devices: vec![crate::spec_builder::document::DeviceRule {
                    allow: false,
                    access: "rwm".to_owned(),
                    ..Default::default()
                }],
                ..LinuxResources::default()
            },
            seccomp: seccomp::profile(fixed.config.seccomp.as_ref(), fixed.config.privileged, &[])?,
            ..Linux::default()
        },
    })
}

fn write_bundle(bundle: &Path, spec: &Spec) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    let failed = |e: std::io::Error| Error::io("write bundle", bundle.display(), e);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(bundle)
        .map_err(failed)?;
    for dir in ["", "proc", "dev", "sys"] {
        fs::create_dir_all(rootfs.join(dir)).map_err(failed)?;
    }
    fs::write(rootfs.join("coracle"), "").map_err(failed)?;
    let json = serde_json::to_vec(spec).map_err(|e| failed(e.into()))?;
    fs::write(bundle.join("config.json"), json).map_err(failed)
}
