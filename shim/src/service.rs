//! The wire's requests as one enum, and answers as bytes.
//!
//! Owns: service and method names. containerd.task.v2.Task and containerd.task.v3.Task differ in
//! nothing but the name. Never acts on a request.

use prost::Message;

use crate::error::{Error, Kind, Result};
use crate::process::ProcessId;
use crate::proto::containerd::runtime::sandbox::v1 as sandbox;
use crate::proto::containerd::task::v2 as task;
use crate::proto::coracle::shim::v1 as shim;
use crate::proto::ttrpc;
use crate::task::state::Asked;

/// Where an answer goes.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    pub connection: u32,
    pub stream: u32,
}

pub enum Request {
    Create(task::CreateTaskRequest),
    Connect(task::ConnectRequest),
    Shutdown(task::ShutdownRequest),
    State(task::StateRequest),
    Start(task::StartRequest),
    Delete(task::DeleteRequest),
    Pids(task::PidsRequest),
    Pause(task::PauseRequest),
    Resume(task::ResumeRequest),
    Checkpoint(task::CheckpointTaskRequest),
    Kill(task::KillRequest),
    Exec(task::ExecProcessRequest),
    ResizePty(task::ResizePtyRequest),
    CloseIo(task::CloseIoRequest),
    Update(task::UpdateTaskRequest),
    Wait(task::WaitRequest),
    Stats(task::StatsRequest),
    Status(shim::StatusRequest),
    Attach(shim::AttachRequest),
    ReopenLog(shim::ReopenLogRequest),
    Sandbox(SandboxRequest),
}

pub enum SandboxRequest {
    Create(sandbox::CreateSandboxRequest),
    Start(sandbox::StartSandboxRequest),
    Platform(sandbox::PlatformRequest),
    Stop(sandbox::StopSandboxRequest),
    Wait(sandbox::WaitSandboxRequest),
    Status(sandbox::SandboxStatusRequest),
    Ping(sandbox::PingRequest),
    Shutdown(sandbox::ShutdownSandboxRequest),
    Metrics(sandbox::SandboxMetricsRequest),
}

impl SandboxRequest {
    pub fn id(&self) -> &str {
        match self {
            SandboxRequest::Create(r) => &r.sandbox_id,
            SandboxRequest::Start(r) => &r.sandbox_id,
            SandboxRequest::Platform(r) => &r.sandbox_id,
            SandboxRequest::Stop(r) => &r.sandbox_id,
            SandboxRequest::Wait(r) => &r.sandbox_id,
            SandboxRequest::Status(r) => &r.sandbox_id,
            SandboxRequest::Ping(r) => &r.sandbox_id,
            SandboxRequest::Shutdown(r) => &r.sandbox_id,
            SandboxRequest::Metrics(r) => &r.sandbox_id,
        }
    }
}

pub fn decode(request: &ttrpc::Request) -> Result<Request> {
    fn of<M: Message + Default>(body: &[u8]) -> Result<M> {
        M::decode(body).map_err(|e| Error::new(Kind::Invalid, "decode", "request").source(e))
    }
    let body = request.payload.as_slice();
    let name = (request.service.as_str(), request.method.as_str());
    Ok(match name {
        ("containerd.task.v2.Task" | "containerd.task.v3.Task", method) => match method {
            "State" => Request::State(of(body)?),
            "Create" => Request::Create(of(body)?),
            "Start" => Request::Start(of(body)?),
            "Delete" => Request::Delete(of(body)?),
            "Pids" => Request::Pids(of(body)?),
            "Pause" => Request::Pause(of(body)?),
            "Resume" => Request::Resume(of(body)?),
            "Checkpoint" => Request::Checkpoint(of(body)?),
            "Kill" => Request::Kill(of(body)?),
            "Exec" => Request::Exec(of(body)?),
            "ResizePty" => Request::ResizePty(of(body)?),
            "CloseIO" => Request::CloseIo(of(body)?),
            "Update" => Request::Update(of(body)?),
            "Wait" => Request::Wait(of(body)?),
            "Stats" => Request::Stats(of(body)?),
            "Connect" => Request::Connect(of(body)?),
            "Shutdown" => Request::Shutdown(of(body)?),
            _ => return Err(unknown(request)),
        },
        ("containerd.runtime.sandbox.v1.Sandbox", method) => Request::Sandbox(match method {
            "CreateSandbox" => SandboxRequest::Create(of(body)?),
            "StartSandbox" => SandboxRequest::Start(of(body)?),
            "Platform" => SandboxRequest::Platform(of(body)?),
            "StopSandbox" => SandboxRequest::Stop(of(body)?),
            "WaitSandbox" => SandboxRequest::Wait(of(body)?),
            "SandboxStatus" => SandboxRequest::Status(of(body)?),
            "PingSandbox" => SandboxRequest::Ping(of(body)?),
            "ShutdownSandbox" => SandboxRequest::Shutdown(of(body)?),
            "SandboxMetrics" => SandboxRequest::Metrics(of(body)?),
            _ => return Err(unknown(request)),
        }),
        ("coracle.shim.v1.Shim", "Status") => Request::Status(of(body)?),
        ("coracle.shim.v1.Shim", "Attach") => Request::Attach(of(body)?),
        ("coracle.shim.v1.Shim", "ReopenLog") => Request::ReopenLog(of(body)?),
        _ => return Err(unknown(request)),
    })
}

fn unknown(request: &ttrpc::Request) -> Error {
    let name = format!("/{}/{}", request.service, request.method);
    Error::new(Kind::Unsupported, "unknown method", name)
}

impl Request {
    /// Whoever asks for this wants an end of it, whatever it is doing.
    pub fn ends_its_process(&self) -> bool {
        match self {
            Request::Delete(_) => true,
            Request::Kill(r) => r.signal == 9,
            Request::Sandbox(r) => {
                matches!(r, SandboxRequest::Stop(_) | SandboxRequest::Shutdown(_))
            }
            _ => false,
        }
    }

    /// The process whose state decides, and what is asked of it. Create, Connect, Shutdown and
    /// what concerns the sandbox are not about a process that must exist.
    pub fn subject(&self) -> Option<(ProcessId, Asked)> {
        let of = |id: &str, exec: &str, asked| Some((ProcessId::new(id, exec), asked));
        match self {
            Request::Create(_)
            | Request::Connect(_)
            | Request::Shutdown(_)
            | Request::Sandbox(_) => None,
            Request::State(r) => of(&r.id, &r.exec_id, Asked::Report),
            Request::Start(r) => of(&r.id, &r.exec_id, Asked::Start),
            Request::Delete(r) => of(&r.id, &r.exec_id, Asked::Delete),
            Request::Pids(r) => of(&r.id, "", Asked::Pids),
            Request::Pause(r) => of(&r.id, "", Asked::Pause),
            Request::Resume(r) => of(&r.id, "", Asked::Resume),
            Request::Checkpoint(r) => of(&r.id, "", Asked::Checkpoint),
            Request::Kill(r) => of(&r.id, &r.exec_id, Asked::Kill),
            Request::Exec(r) => of(&r.id, "", Asked::AddExec),
            Request::ResizePty(r) => of(&r.id, &r.exec_id, Asked::Resize),
            Request::CloseIo(r) => of(&r.id, &r.exec_id, Asked::CloseIo),
            Request::Update(r) => of(&r.id, "", Asked::Update),
            Request::Wait(r) => of(&r.id, &r.exec_id, Asked::Wait),
            Request::Stats(r) => of(&r.id, "", Asked::Stats),
            Request::Status(r) => of(&r.id, &r.exec_id, Asked::Report),
            Request::Attach(r) => of(&r.id, "", Asked::Attach),
            Request::ReopenLog(r) => of(&r.id, "", Asked::ReopenLog),
        }
    }
}

/// The answer's frame body.
pub fn response(result: Result<Vec<u8>>) -> ttrpc::Response {
    match result {
        Ok(payload) => ttrpc::Response {
            status: None,
            payload,
        },
        Err(e) => {
            let status = ttrpc::Status {
                code: e.kind().code(),
                message: e.to_string(),
                details: Vec::new(),
            };
            ttrpc::Response {
                status: Some(status),
                payload: Vec::new(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(service: &str, method: &str) -> ttrpc::Request {
        ttrpc::Request {
            service: service.into(),
            method: method.into(),
            ..Default::default()
        }
    }

    #[test]
    fn both_task_services_are_served() {
        for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
            for method in [
                "State",
                "Create",
                "Start",
                "Delete",
                "Pids",
                "Pause",
                "Resume",
                "Checkpoint",
                "Kill",
                "Exec",
                "ResizePty",
                "CloseIO",
                "Update",
                "Wait",
                "Stats",
                "Connect",
                "Shutdown",
            ] {
                assert!(
                    decode(&request(service, method)).is_ok(),
                    "{service}/{method}"
                );
            }
        }
    }

    #[test]
    fn unknown_calls_are_unimplemented_and_named() {
        for (service, method) in [
            ("containerd.task.v2.Task", "Fly"),
            ("containerd.task.v4.Task", "State"),
            ("coracle.shim.v1.Shim", ""),
        ] {
            let error = decode(&request(service, method)).err().unwrap();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains(&format!("/{service}/{method}")));
        }
    }

    #[test]
    fn a_bad_body_is_invalid() {
        let mut bad = request("containerd.task.v2.Task", "State");
        bad.payload = vec![0xff; 3];
        assert_eq!(decode(&bad).err().unwrap().kind(), Kind::Invalid);
    }
}
