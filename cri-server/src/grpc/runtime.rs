//! Owns RuntimeService: each call is parsed, handed to the daemon outside the request's own
//! lifetime, and answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use super::{Batches, Served, batches, convert, present, traced};
use crate::container::Container;
use crate::daemon::{Daemon, blocking, detached, now_ns};
use crate::error::{Error, Kind, Result, to_status};
use crate::events::{Event, EventKind};
use crate::proto::cri;
use crate::proto::cri::runtime_service_server::RuntimeService;
use crate::sandbox::Sandbox;
use crate::streaming::{
    AttachSession, ExecSession, PortForwardSession, StreamingError, StreamingServer,
};

/// RuntimeService over the daemon.
pub struct Runtime(pub Arc<Daemon>);

impl From<StreamingError> for Error {
    fn from(error: StreamingError) -> Self {
        let kind = match &error {
            StreamingError::Invalid(_) => Kind::InvalidArgument,
            StreamingError::TooManyPending => Kind::ResourceExhausted,
            StreamingError::Io { .. } => Kind::Internal,
        };
        Error::new(kind, error.to_string(), "")
    }
}

impl Runtime {
    pub(super) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        self.0.registry.sandboxes.find(id)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.0.registry.containers.find(id)
    }

    fn streaming(&self) -> Result<&StreamingServer> {
        self.0.streaming.get().ok_or_else(|| {
            Error::new(
                Kind::Unavailable,
                "streaming server",
                "is not listening yet",
            )
        })
    }
}

fn seconds(field: &str, value: i64) -> Result<Duration> {
    let seconds =
        u64::try_from(value).map_err(|_| Error::invalid(field, format!("{value} is negative")))?;
    Ok(Duration::from_secs(seconds))
}

fn unserved<T>(rpc: &'static str) -> Served<T> {
    debug_assert!(super::UNSERVED.contains(&rpc));
    let error = Error::unsupported(rpc, "is not served yet");
    Err(to_status(&error))
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _request: Request<cri::VersionRequest>,
    ) -> Served<cri::VersionResponse> {
        traced("Version", "", async {
            Ok(cri::VersionResponse {
                version: "0.1.0".to_owned(),
                runtime_name: "coracle".to_owned(),
                runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
                runtime_api_version: "v1".to_owned(),
            })
        })
        .await
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Served<cri::StatusResponse> {
        let verbose = request.into_inner().verbose;
        traced("Status", "", async {
            Ok(cri::StatusResponse {
                status: Some(cri::RuntimeStatus {
                    conditions: self.status_conditions(),
                }),
                info: match verbose {
                    true => self.status_info(),
                    false => BTreeMap::new(),
                },
                runtime_handlers: self.runtime_handlers(),
                features: Some(cri::RuntimeFeatures {
                    supplemental_groups_policy: true,
                    user_namespaces_host_network: false,
                    mount_options: false,
                }),
            })
        })
        .await
    }

    async fn runtime_config(
        &self,
        _request: Request<cri::RuntimeConfigRequest>,
    ) -> Served<cri::RuntimeConfigResponse> {
        traced("RuntimeConfig", "", async {
            Ok(cri::RuntimeConfigResponse {
                linux: Some(cri::LinuxRuntimeConfiguration {
                    cgroup_driver: cri::CgroupDriver::Cgroupfs as i32,
                }),
            })
        })
        .await
    }

    /// The pod CIDR is the business of the CNI configuration; as with other runtimes the call
    /// succeeds and changes nothing.
    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Served<cri::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.unwrap_or_default();
        let cidr = config.network_config.unwrap_or_default().pod_cidr;
        traced("UpdateRuntimeConfig", &cidr, async {
            Ok(cri::UpdateRuntimeConfigResponse {})
        })
        .await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Served<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let name = pod_name(request.config.as_ref());
        traced("RunPodSandbox", &name, async {
            let config = convert::sandbox_config(request.config)?;
            let id = self.0.run_sandbox(config, request.runtime_handler).await?;
            Ok(cri::RunPodSandboxResponse {
                pod_sandbox_id: id.to_string(),
            })
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Served<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        traced("StopPodSandbox", &id, async {
            if let Some(sandbox) = self.0.registry.sandboxes.find_optional(&id)? {
                let daemon = self.0.clone();
                detached(async move { daemon.stop_sandbox(&sandbox).await }).await?;
            }
            Ok(cri::StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Served<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        traced("RemovePodSandbox", &id, async {
            if let Some(sandbox) = self.0.registry.sandboxes.find_optional(&id)? {
                let daemon = self.0.clone();
                detached(async move { daemon.remove_sandbox(&sandbox).await }).await?;
            }
            Ok(cri::RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Served<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        traced("PodSandboxStatus", &request.pod_sandbox_id, async {
            let sandbox = self.sandbox(&request.pod_sandbox_id)?;
            let containers = self.0.registry.containers_of(sandbox.id());
            Ok(cri::PodSandboxStatusResponse {
                status: Some(present::sandbox_status(&sandbox)),
                info: match request.verbose {
                    true => present::sandbox_info(&sandbox),
                    false => BTreeMap::new(),
                },
                containers_statuses: containers
                    .iter()
                    .map(|c| present::container_status(&self.0, c))
                    .collect(),
                timestamp: now_ns(),
            })
        })
        .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Served<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter;
        traced("ListPodSandbox", "", async {
            Ok(cri::ListPodSandboxResponse {
                items: self.sandboxes(filter),
            })
        })
        .await
    }

    type StreamPodSandboxesStream = Batches<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Served<Self::StreamPodSandboxesStream> {
        let items = self.sandboxes(request.into_inner().filter);
        Ok(batches(items, |pod_sandboxes| {
            cri::StreamPodSandboxesResponse { pod_sandboxes }
        }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Served<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let subject = format!(
            "{} {}",
            request.pod_sandbox_id,
            name_of(request.config.as_ref())
        );
        traced("CreateContainer", &subject, async {
            let config = convert::container_config(request.config)?;
            let sandbox = self.sandbox(&request.pod_sandbox_id)?;
            let id = self.0.create_container(sandbox, config).await?;
            Ok(cri::CreateContainerResponse {
                container_id: id.to_string(),
            })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Served<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        traced("StartContainer", &id, async {
            let (daemon, container) = (self.0.clone(), self.container(&id)?);
            detached(async move { daemon.start_container(&container).await }).await?;
            Ok(cri::StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Served<cri::StopContainerResponse> {
        let request = request.into_inner();
        traced("StopContainer", &request.container_id, async {
            let grace = seconds("timeout", request.timeout.max(0))?;
            let found = self
                .0
                .registry
                .containers
                .find_optional(&request.container_id)?;
            if let Some(container) = found {
                let daemon = self.0.clone();
                detached(async move { daemon.stop_container(&container, grace).await }).await?;
            }
            Ok(cri::StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Served<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        traced("RemoveContainer", &id, async {
            if let Some(container) = self.0.registry.containers.find_optional(&id)? {
                let daemon = self.0.clone();
                detached(async move { daemon.remove_container(&container).await }).await?;
            }
            Ok(cri::RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Served<cri::ListContainersResponse> {
        let filter = request.into_inner().filter;
        traced("ListContainers", "", async {
            Ok(cri::ListContainersResponse {
                containers: self.containers(filter),
            })
        })
        .await
    }

    type StreamContainersStream = Batches<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Served<Self::StreamContainersStream> {
        let items = self.containers(request.into_inner().filter);
        Ok(batches(items, |containers| cri::StreamContainersResponse {
            containers,
        }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Served<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        traced("ContainerStatus", &request.container_id, async {
            let container = self.container(&request.container_id)?;
            Ok(cri::ContainerStatusResponse {
                status: Some(present::container_status(&self.0, &container)),
                info: match request.verbose {
                    true => present::container_info(&container),
                    false => BTreeMap::new(),
                },
            })
        })
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Served<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        traced("UpdateContainerResources", &request.container_id, async {
            if request.windows.is_some() {
                return Err(Error::unsupported("windows", "this is Linux"));
            }
            // Annotations are hints to plugins of other runtimes; the kubelet sends none.
            if let Some(key) = request.annotations.keys().next() {
                return Err(Error::unsupported(
                    "annotations",
                    format!("{key:?} has no meaning"),
                ));
            }
            let container = self.container(&request.container_id)?;
            let update = convert::resources(request.linux.unwrap_or_default())?;
            let daemon = self.0.clone();
            detached(async move { daemon.update_container(&container, update).await }).await?;
            Ok(cri::UpdateContainerResourcesResponse {})
        })
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Served<cri::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        traced("ReopenContainerLog", &id, async {
            self.0.reopen_log(&*self.container(&id)?).await?;
            Ok(cri::ReopenContainerLogResponse {})
        })
        .await
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Served<cri::ExecSyncResponse> {
        let request = request.into_inner();
        traced("ExecSync", &request.container_id, async {
            let timeout = seconds("timeout", request.timeout)?;
            let (daemon, container) = (self.0.clone(), self.container(&request.container_id)?);
            let outcome =
                detached(async move { daemon.exec_sync(&container, request.cmd, timeout).await })
                    .await?;
            Ok(cri::ExecSyncResponse {
                stdout: outcome.stdout,
                stderr: outcome.stderr,
                exit_code: outcome.exit_code,
            })
        })
        .await
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Served<cri::ExecResponse> {
        let request = request.into_inner();
        traced("Exec", &request.container_id, async {
            let container = self.container(&request.container_id)?;
            reachable(&container)?;
            let url = self.streaming()?.exec_url(ExecSession {
                container_id: container.id().to_owned(),
                cmd: request.cmd,
                tty: request.tty,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            })?;
            Ok(cri::ExecResponse { url })
        })
        .await
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Served<cri::AttachResponse> {
        let request = request.into_inner();
        traced("Attach", &request.container_id, async {
            let container = self.container(&request.container_id)?;
            reachable(&container)?;
            let url = self.streaming()?.attach_url(AttachSession {
                container_id: container.id().to_owned(),
                tty: request.tty,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            })?;
            Ok(cri::AttachResponse { url })
        })
        .await
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Served<cri::PortForwardResponse> {
        let request = request.into_inner();
        traced("PortForward", &request.pod_sandbox_id, async {
            let sandbox = self.sandbox(&request.pod_sandbox_id)?;
            crate::container::create::require_ready(&sandbox)?;
            let url = self.streaming()?.portforward_url(PortForwardSession {
                sandbox_id: sandbox.id().to_owned(),
            })?;
            Ok(cri::PortForwardResponse { url })
        })
        .await
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Served<cri::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        traced("ContainerStats", &id, async {
            let (daemon, container) = (self.0.clone(), self.container(&id)?);
            let stats = blocking(move || {
                let numbers = daemon.container_stats(&container);
                Ok(present::container_stats(&daemon, &container, &numbers))
            });
            Ok(cri::ContainerStatsResponse {
                stats: Some(stats.await?),
            })
        })
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Served<cri::ListContainerStatsResponse> {
        let filter = request.into_inner().filter;
        traced("ListContainerStats", "", async {
            Ok(cri::ListContainerStatsResponse {
                stats: self.all_container_stats(filter).await?,
            })
        })
        .await
    }

    type StreamContainerStatsStream = Batches<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Served<Self::StreamContainerStatsStream> {
        let stats = self.all_container_stats(request.into_inner().filter).await;
        let stats = stats.map_err(|e| to_status(&e))?;
        Ok(batches(stats, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Served<cri::PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        traced("PodSandboxStats", &id, async {
            let (daemon, sandbox) = (self.0.clone(), self.sandbox(&id)?);
            let stats = blocking(move || {
                let numbers = daemon.pod_stats(&sandbox);
                Ok(present::pod_stats(&daemon, &sandbox, &numbers))
            });
            Ok(cri::PodSandboxStatsResponse {
                stats: Some(stats.await?),
            })
        })
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Served<cri::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter;
        traced("ListPodSandboxStats", "", async {
            Ok(cri::ListPodSandboxStatsResponse {
                stats: self.all_pod_stats(filter).await?,
            })
        })
        .await
    }

    type StreamPodSandboxStatsStream = Batches<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Served<Self::StreamPodSandboxStatsStream> {
        let stats = self.all_pod_stats(request.into_inner().filter).await;
        let stats = stats.map_err(|e| to_status(&e))?;
        Ok(batches(stats, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    type GetContainerEventsStream = Batches<cri::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Served<Self::GetContainerEventsStream> {
        let mut events = self.0.events.subscribe();
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        let daemon = self.0.clone();
        tokio::spawn(async move {
            let mut stopping = daemon.stopping.subscribe();
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    _ = stopping.wait_for(|stopping| *stopping) => return,
                    () = sender.closed() => return,
                };
                let answer = match event {
                    Ok(event) => Ok(event_response(&daemon, &event)),
                    Err(RecvError::Lagged(_)) => {
                        Err(Status::resource_exhausted("events were lost: list again"))
                    }
                    Err(RecvError::Closed) => return,
                };
                let over = answer.is_err();
                if sender.send(answer).await.is_err() || over {
                    return;
                }
            }
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn checkpoint_container(
        &self,
        _request: Request<cri::CheckpointContainerRequest>,
    ) -> Served<cri::CheckpointContainerResponse> {
        unserved("CheckpointContainer")
    }

    async fn checkpoint_pod(
        &self,
        _request: Request<cri::CheckpointPodRequest>,
    ) -> Served<cri::CheckpointPodResponse> {
        unserved("CheckpointPod")
    }

    async fn restore_pod(
        &self,
        _request: Request<cri::RestorePodRequest>,
    ) -> Served<cri::RestorePodResponse> {
        unserved("RestorePod")
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Served<cri::ListMetricDescriptorsResponse> {
        unserved("ListMetricDescriptors")
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Served<cri::ListPodSandboxMetricsResponse> {
        unserved("ListPodSandboxMetrics")
    }

    type StreamPodSandboxMetricsStream = Batches<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Served<Self::StreamPodSandboxMetricsStream> {
        unserved("StreamPodSandboxMetrics")
    }

    async fn update_pod_sandbox_resources(
        &self,
        _request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Served<cri::UpdatePodSandboxResourcesResponse> {
        unserved("UpdatePodSandboxResources")
    }
}

fn reachable(container: &Container) -> Result<()> {
    crate::container::create::require(container, crate::container::state::Request::Reach)
}

fn pod_name(config: Option<&cri::PodSandboxConfig>) -> String {
    let metadata = config.and_then(|config| config.metadata.as_ref());
    metadata.map_or_else(String::new, |m| format!("{}/{}", m.namespace, m.name))
}

fn name_of(config: Option<&cri::ContainerConfig>) -> String {
    let metadata = config.and_then(|config| config.metadata.as_ref());
    metadata.map_or_else(String::new, |m| m.name.clone())
}

fn event_response(daemon: &Daemon, event: &Event) -> cri::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => cri::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    let sandbox = daemon.registry.sandboxes.find(&event.sandbox_id).ok();
    let containers = daemon.registry.containers_of(&event.sandbox_id);
    cri::ContainerEventResponse {
        container_id: event.container_id.clone(),
        container_event_type: kind as i32,
        created_at: event.at_ns,
        pod_sandbox_status: sandbox.map(|sandbox| present::sandbox_status(&sandbox)),
        containers_statuses: containers
            .iter()
            .map(|c| present::container_status(daemon, c))
            .collect(),
    }
}
