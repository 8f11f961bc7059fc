//! The sandbox service (containerd 2.x, `sandboxer = "shim"`): a pod whose namespaces we make.
//!
//! A sandbox is a task like others with two differences: its process is this very binary (see
//! `pause`), and the daemon knows it by this service only, so that no task event tells of it.
//! `config` describes its container, `files` are what the pod's containers share.
//!
//! ```text
//! CreateSandbox -> files, config.json, runtime create     StartSandbox -> runtime start
//! StopSandbox   -> every process of the pod is killed     ShutdownSandbox -> runtime delete, end
//! ```
//! Owns: the sandbox of this shim, at most one, and the translation of the service's requests.

pub mod config;
pub mod files;
pub mod pause;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::Any;

use crate::error::{Error, Kind, Result, not_found};
use crate::options::message_name;
use crate::process::{ProcessId, now_nanos, timestamp};
use crate::proto::containerd::runtime::sandbox::v1 as wire;
use crate::proto::containerd::task::v2 as task;
use crate::proto::containerd::types;
use crate::proto::runtime::v1::PodSandboxConfig;
use crate::service::{Reply, Request, SandboxRequest};
use crate::supervisor::{Supervisor, empty, encoded};
use crate::task::state::State;

/// What `start` was given on its stdin, for the container that the daemon never describes.
pub const OPTIONS: &str = "sandbox-options";

pub struct Sandbox {
    pub id: String,
    bundle: PathBuf,
    created_nanos: u64,
    /// The pod has a cgroup of its own above the sandbox's.
    has_parent_cgroup: bool,
    /// config.json names it by its number in this process.
    _userns: Option<OwnedFd>,
}

/// The pod's description. Without one there is the runtime spec that a client may have given.
fn described(options: Option<&Any>) -> Result<Option<PodSandboxConfig>> {
    let Some(any) = options.filter(|a| !a.type_url.is_empty() || !a.value.is_empty()) else {
        return Ok(None);
    };
    match message_name(any) {
        "runtime.v1.PodSandboxConfig" => PodSandboxConfig::decode(any.value.as_slice())
            .map(Some)
            .map_err(|e| Error::new(Kind::Invalid, "sandbox options", &any.type_url).source(e)),
        _ => Err(Error::new(
            Kind::Invalid,
            "sandbox options of unknown type",
            &any.type_url,
        )),
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

impl Supervisor {
    pub fn is_sandbox(&self, id: &str) -> bool {
        self.sandbox.as_ref().is_some_and(|s| s.id == id)
    }

    pub fn sandbox_request(&mut self, request: SandboxRequest, reply: Reply) {
        let id = match &request {
            SandboxRequest::Create(r) => return self.create_sandbox(r, reply),
            SandboxRequest::Shutdown(r) if !self.is_sandbox(&r.sandbox_id) => {
                return self.shutdown_nothing(reply);
            }
            other => other.id().to_owned(),
        };
        if !self.is_sandbox(&id) {
            return self.answer(reply, Err(not_found("sandbox", &id)));
        }
        let done = match request {
            SandboxRequest::Start(_) => {
                let exec_id = String::new();
                let start = Request::Start(task::StartRequest { id, exec_id });
                return self.dispatch(start, Vec::new(), reply);
            }
            SandboxRequest::Wait(_) => {
                // WaitResponse and WaitSandboxResponse are the same on the wire.
                let exec_id = String::new();
                let wait = Request::Wait(task::WaitRequest { id, exec_id });
                return self.dispatch(wait, Vec::new(), reply);
            }
            SandboxRequest::Stop(_) | SandboxRequest::Shutdown(_) => {
                return self.end_sandbox(request, &id, reply);
            }
            SandboxRequest::Status(r) => self.sandbox_status(&id, r.verbose),
            SandboxRequest::Metrics(_) => self.sandbox_metrics(&id),
            SandboxRequest::Platform(_) => encoded(&wire::PlatformResponse {
                platform: Some(types::Platform {
                    os: "linux".to_owned(),
                    architecture: architecture().to_owned(),
                    ..Default::default()
                }),
            }),
            SandboxRequest::Ping(_) | SandboxRequest::Create(_) => empty(),
        };
        self.answer(reply, done);
    }

    fn create_sandbox(&mut self, r: &wire::CreateSandboxRequest, reply: Reply) {
        if let Err(e) = self.try_create_sandbox(r, reply) {
            if self.is_sandbox(&r.sandbox_id) && !self.tasks.contains_key(&r.sandbox_id) {
                self.forget_sandbox();
            }
            self.answer(reply, Err(e));
        }
    }

    fn try_create_sandbox(&mut self, r: &wire::CreateSandboxRequest, reply: Reply) -> Result<()> {
        crate::task::create::check_id(&r.sandbox_id)?;
        if let Some(sandbox) = &self.sandbox {
            let text = format!("{}: this shim has sandbox {}", r.sandbox_id, sandbox.id);
            return Err(Error::new(Kind::AlreadyExists, "sandbox", text));
        }
        if !r.rootfs.is_empty() {
            return Err(Error::new(Kind::Unsupported, "sandbox", &r.sandbox_id)
                .source("its process needs no root filesystem"));
        }
        let bundle = PathBuf::from(&r.bundle_path);
        if !bundle.is_absolute() {
            return Err(Error::new(Kind::Invalid, "bundle", &r.bundle_path).source("not absolute"));
        }
        let pod = described(r.options.as_ref())?;
        let made = config::make(
            &config::Wanted {
                id: &r.sandbox_id,
                namespace: &self.config.namespace,
                netns: &r.netns_path,
                annotations: &r.annotations,
                pod: pod.as_ref(),
            },
            &bundle,
        )?;
        let failed = |e| Error::io("write config.json in", bundle.display().to_string(), e);
        let text = serde_json::to_vec(&made.spec).map_err(|e| failed(e.into()))?;
        crate::records::write(&bundle.join("config.json"), &text).map_err(failed)?;
        self.sandbox = Some(Sandbox {
            id: r.sandbox_id.clone(),
            bundle: bundle.clone(),
            created_nanos: now_nanos(),
            has_parent_cgroup: made.has_parent_cgroup,
            _userns: made.userns,
        });
        files::make(&bundle, pod.as_ref())?;
        let request = task::CreateTaskRequest {
            id: r.sandbox_id.clone(),
            bundle: r.bundle_path.clone(),
            rootfs: vec![made.rootfs],
            options: stored_options(&bundle)?,
            ..Default::default()
        };
        self.prepare(&request, Vec::new(), reply)
    }

    /// The task of the sandbox is gone, or has never come to be.
    pub fn forget_sandbox(&mut self) {
        if let Some(sandbox) = self.sandbox.take()
            && let Err(e) = files::remove(&sandbox.bundle)
        {
            self.journal.warn(&e.to_string());
        }
    }

    /// The answer to the end of a runtime's create.
    pub fn created_answer(&self, id: &ProcessId, pid: i32) -> Result<Vec<u8>> {
        match self.is_sandbox(&id.task) {
            true => encoded(&wire::CreateSandboxResponse {}),
            false => encoded(&task::CreateTaskResponse { pid: pid as u32 }),
        }
    }

    pub fn started_answer(&self, id: &ProcessId, pid: i32) -> Result<Vec<u8>> {
        match &self.sandbox {
            Some(sandbox) if sandbox.id == id.task => encoded(&wire::StartSandboxResponse {
                pid: pid as u32,
                created_at: Some(timestamp(sandbox.created_nanos)),
                spec: None,
            }),
            _ => encoded(&task::StartResponse { pid: pid as u32 }),
        }
    }

    /// Stop and Shutdown come again from where they wait when the sandbox's state has changed.
    fn end_sandbox(&mut self, request: SandboxRequest, id: &str, reply: Reply) {
        let shutdown = matches!(request, SandboxRequest::Shutdown(_));
        let process = ProcessId::new(id, "");
        let state = self.process(&process).map(|p| p.state);
        match state {
            Ok(State::Stopped { .. }) if shutdown => return self.delete(&process, reply),
            Ok(State::Stopped { .. }) => return self.answer(reply, empty()),
            Err(_) => return self.shutdown_nothing(reply),
            Ok(State::Creating | State::Exited { .. } | State::Deleting { .. }) => {}
            Ok(
                State::Created { .. }
                | State::Starting { .. }
                | State::Running { .. }
                | State::Pausing { .. }
                | State::Paused { .. }
                | State::Resuming { .. },
            ) => self.kill_pod(),
        }
        if let Some(task) = self.tasks.get_mut(id) {
            let request = Request::Sandbox(request);
            task.init.parked.push((request, Vec::new(), reply));
        }
    }

    /// Nobody of a pod outlives its sandbox.
    fn kill_pod(&mut self) {
        for task in self.tasks.values() {
            if let Some(pid) = task.init.state.pid()
                && task.init.state.alive()
            {
                // Not reaped yet, so the pid is its own.
                let _ = coracle_sys::spawn::kill(pid, 9);
                // A frozen process would keep the signal.
                task.cgroup.thaw();
            }
        }
    }

    /// Also after a CreateSandbox that failed: the daemon waits for us to go.
    fn shutdown_nothing(&mut self, reply: Reply) {
        self.answer(reply, empty());
        if self.tasks.is_empty() {
            self.end();
        }
    }

    fn sandbox_status(&self, id: &str, verbose: bool) -> Result<Vec<u8>> {
        let process = self.process(&ProcessId::new(id, ""))?;
        let pid = process.state.pid().filter(|_| process.state.alive());
        let ready = matches!(process.state, State::Running { .. });
        let exit = process.state.exit();
        let mut answer = wire::SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            pid: pid.unwrap_or(0) as u32,
            state: if ready {
                "SANDBOX_READY"
            } else {
                "SANDBOX_NOTREADY"
            }
            .to_owned(),
            created_at: self.sandbox.as_ref().map(|s| timestamp(s.created_nanos)),
            exited_at: exit.map(|e| e.timestamp()),
            ..Default::default()
        };
        if verbose {
            // The fields that crictl's `inspectp` reads of the CRI plugin's own sandboxes.
            let status = if ready { "running" } else { "stopped" };
            let info = serde_json::json!({"pid": answer.pid, "processStatus": status});
            answer.info.insert("info".to_owned(), info.to_string());
        }
        encoded(&answer)
    }

    fn sandbox_metrics(&self, id: &str) -> Result<Vec<u8>> {
        let cgroup = &self.task(&ProcessId::new(id, ""))?.cgroup;
        let whole = self.sandbox.as_ref().is_some_and(|s| s.has_parent_cgroup);
        let data = match whole {
            true => crate::stats::read(&cgroup.parent()),
            false => crate::stats::read(cgroup),
        };
        encoded(&wire::SandboxMetricsResponse {
            metrics: Some(types::Metric {
                timestamp: Some(timestamp(now_nanos())),
                id: id.to_owned(),
                data: Some(data),
            }),
        })
    }

    /// What a container of the pod shares with the others and the daemon has left to us.
    pub fn share_with(&self, bundle: &Path) -> Result<()> {
        match &self.sandbox {
            Some(sandbox) if sandbox.bundle != bundle => files::share(&sandbox.bundle, bundle),
            _ => Ok(()),
        }
    }
}

fn stored_options(bundle: &Path) -> Result<Option<Any>> {
    let path = bundle.join(OPTIONS);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", path.display().to_string(), e)),
    };
    let any = Any::decode(bytes.as_slice())
        .map_err(|e| Error::new(Kind::Internal, "decode", path.display().to_string()).source(e))?;
    Ok(Some(any))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_description_is_refused_by_name() {
        assert!(described(None).unwrap().is_none());
        assert!(described(Some(&Any::default())).unwrap().is_none());
        let any = Any {
            type_url: "x.Y".into(),
            value: vec![],
        };
        let error = described(Some(&any)).unwrap_err();
        assert_eq!(error.to_string(), "sandbox options of unknown type x.Y");
        let pod = PodSandboxConfig {
            hostname: "h".into(),
            ..Default::default()
        };
        let any = Any {
            type_url: "types.example/runtime.v1.PodSandboxConfig".into(),
            value: pod.encode_to_vec(),
        };
        assert_eq!(described(Some(&any)).unwrap().unwrap().hostname, "h");
    }
}
