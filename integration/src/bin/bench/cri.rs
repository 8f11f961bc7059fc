//! A CRI client for timing: the same calls, over the same kind of socket, to us and to the peer.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

#[allow(clippy::all, rust_2018_idioms)]
mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::image_service_client::ImageServiceClient;
use v1::runtime_service_client::RuntimeServiceClient;

/// Parent cgroup of every pod.
pub const PARENT_CGROUP: &str = "coracle-bench";

const DEADLINE: Duration = Duration::from_secs(120);

/// Where the pods of a comparison live.
#[derive(Debug, Clone, Copy)]
pub enum Net {
    Pod,
    Host,
}

pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    tokio: Runtime,
}

/// The three calls of a pod start, each timed.
pub struct Start {
    pub sandbox: Duration,
    pub create: Duration,
    pub start: Duration,
}

impl Start {
    pub fn all(&self) -> Duration {
        self.sandbox + self.create + self.start
    }
}

impl Client {
    /// Connects, and waits until the runtime says that it and its network are ready.
    pub fn connect(socket: &Path) -> Result<Client> {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let until = Instant::now() + DEADLINE;
        let channel = loop {
            match tokio.block_on(endpoint.connect()) {
                Ok(channel) => break channel,
                Err(error) if Instant::now() > until => {
                    return Err(error).with_context(|| socket.display().to_string());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let mut client = Client {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            tokio,
        };
        while !client.ready().unwrap_or(false) {
            anyhow::ensure!(Instant::now() < until, "{}: never ready", socket.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(client)
    }

    fn ready(&mut self) -> Result<bool> {
        let answer = self
            .tokio
            .block_on(self.runtime.status(v1::StatusRequest { verbose: false }))?;
        let status = answer.into_inner().status.unwrap_or_default();
        Ok(!status.conditions.is_empty() && status.conditions.iter().all(|c| c.status))
    }

    pub fn pull(&mut self, image: &str) -> Result<()> {
        let request = v1::PullImageRequest {
            image: Some(image_spec(image)),
            ..Default::default()
        };
        self.tokio
            .block_on(self.images.pull_image(request))
            .with_context(|| format!("pull {image}"))?;
        Ok(())
    }

    /// Starts a pod with one container, timed, and removes it, not timed.
    pub fn pod(&mut self, name: &str, image: &str, net: Net) -> Result<Start> {
        let namespaces = v1::NamespaceOption {
            network: match net {
                Net::Pod => v1::NamespaceMode::Pod,
                Net::Host => v1::NamespaceMode::Node,
            } as i32,
            pid: v1::NamespaceMode::Container as i32,
            ..Default::default()
        };
        let mut sandbox_config = sandbox_config(name, namespaces.clone());
        if let Net::Pod = net {
            // A pod on the host's network has no name of its own: containerd refuses one.
            sandbox_config.hostname = "bench".to_owned();
        }
        let config = container_config(image, namespaces);

        let clock = Instant::now();
        let pod = self
            .tokio
            .block_on(self.runtime.run_pod_sandbox(v1::RunPodSandboxRequest {
                config: Some(sandbox_config.clone()),
                ..Default::default()
            }))
            .with_context(|| format!("run pod {name}"))?
            .into_inner()
            .pod_sandbox_id;
        let sandbox = clock.elapsed();
        let outcome = self.container(&pod, sandbox_config, config);
        // Removed also when the container failed, so that nothing of it stays.
        self.remove(&pod)?;
        let (create, start) = outcome.with_context(|| format!("container of {name}"))?;
        Ok(Start {
            sandbox,
            create,
            start,
        })
    }

    /// Runs a script in a pod on the host's network, with a log, until the log ends with the line "done":
    /// how long from StartContainer on, and what `used` grew by meanwhile.
    pub fn logged(
        &mut self,
        (name, image, script): (&str, &str, &str),
        log: &Path,
        used: impl Fn() -> Result<Duration>,
    ) -> Result<(Duration, Duration)> {
        let namespaces = v1::NamespaceOption {
            network: v1::NamespaceMode::Node as i32,
            pid: v1::NamespaceMode::Container as i32,
            ..Default::default()
        };
        let mut sandbox_config = sandbox_config(name, namespaces.clone());
        let directory = log.parent().context("a log in a folder")?;
        sandbox_config.log_directory = directory.display().to_string();
        let mut config = container_config(image, namespaces);
        config.command = ["sh", "-c", script].map(str::to_owned).to_vec();
        config.log_path = log.file_name().unwrap_or_default().display().to_string();
        let request = v1::RunPodSandboxRequest {
            config: Some(sandbox_config.clone()),
            ..Default::default()
        };
        let answer = self.tokio.block_on(self.runtime.run_pod_sandbox(request))?;
        let pod = answer.into_inner().pod_sandbox_id;
        let outcome = self.fill_log(&pod, sandbox_config, config, log, used);
        self.remove(&pod)?;
        outcome
    }

    fn fill_log(
        &mut self,
        pod: &str,
        sandbox_config: v1::PodSandboxConfig,
        config: v1::ContainerConfig,
        log: &Path,
        used: impl Fn() -> Result<Duration>,
    ) -> Result<(Duration, Duration)> {
        let before = used()?;
        let clock = Instant::now();
        let (create, _) = self.container(pod, sandbox_config, config)?;
        while !ends_with(log, b" done\n") {
            anyhow::ensure!(clock.elapsed() < DEADLINE, "{}: no end", log.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok((
            clock.elapsed().saturating_sub(create),
            used()?.saturating_sub(before),
        ))
    }

    fn container(
        &mut self,
        pod: &str,
        sandbox_config: v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<(Duration, Duration)> {
        let clock = Instant::now();
        let container_id = self
            .tokio
            .block_on(self.runtime.create_container(v1::CreateContainerRequest {
                pod_sandbox_id: pod.to_owned(),
                config: Some(config),
                sandbox_config: Some(sandbox_config),
            }))?
            .into_inner()
            .container_id;
        let create = clock.elapsed();
        let clock = Instant::now();
        let request = v1::StartContainerRequest { container_id };
        self.tokio.block_on(self.runtime.start_container(request))?;
        Ok((create, clock.elapsed()))
    }

    fn remove(&mut self, pod: &str) -> Result<()> {
        let stop = v1::StopPodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        self.tokio
            .block_on(self.runtime.stop_pod_sandbox(stop))
            .context("stop pod")?;
        let remove = v1::RemovePodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        self.tokio
            .block_on(self.runtime.remove_pod_sandbox(remove))
            .context("remove pod")?;
        Ok(())
    }
}

fn ends_with(file: &Path, end: &[u8]) -> bool {
    let read = || {
        let file = std::fs::File::open(file)?;
        let mut last = vec![0; end.len()];
        let at = file.metadata()?.len().saturating_sub(end.len() as u64);
        file.read_exact_at(&mut last, at)?;
        std::io::Result::Ok(last == end)
    };
    read().unwrap_or(false)
}

fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

fn sandbox_config(name: &str, namespaces: v1::NamespaceOption) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "bench".to_owned(),
            attempt: 0,
        }),
        log_directory: String::new(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("/{PARENT_CGROUP}"),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(image: &str, namespaces: v1::NamespaceOption) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: "main".to_owned(),
            attempt: 0,
        }),
        image: Some(image_spec(image)),
        command: ["sleep", "1000"].map(str::to_owned).to_vec(),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}
