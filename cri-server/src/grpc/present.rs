//! Owns the way from our types to CRI answers.

use std::collections::BTreeMap;

use coracle_image_store::Image;

use crate::cgroup::{Psi, PsiLine, Sample};
use crate::container::config::{ContainerConfig, Propagation, Resources};
use crate::container::state::ContainerState;
use crate::container::stats::Stats;
use crate::container::{self, Container};
use crate::daemon::Daemon;
use crate::netns::InterfaceStats;
use crate::proto::cri;
use crate::sandbox::config::{NamespaceMode, SandboxName};
use crate::sandbox::state::SandboxState;
use crate::sandbox::stats::PodStats;
use crate::sandbox::{self, Sandbox};
use crate::signal;

fn sandbox_metadata(name: &SandboxName) -> cri::PodSandboxMetadata {
    cri::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

/// CRI knows two states.
pub fn sandbox_state(state: SandboxState) -> cri::PodSandboxState {
    match state {
        SandboxState::Ready => cri::PodSandboxState::SandboxReady,
        SandboxState::Creating
        | SandboxState::Stopping
        | SandboxState::NotReady
        | SandboxState::Removing => cri::PodSandboxState::SandboxNotready,
    }
}

/// An item of ListPodSandbox.
pub fn sandbox(sandbox: &Sandbox) -> cri::PodSandbox {
    let config = &sandbox.fixed.config;
    cri::PodSandbox {
        id: sandbox.id().to_owned(),
        metadata: Some(sandbox_metadata(&config.name)),
        state: sandbox_state(sandbox.state()) as i32,
        created_at: sandbox.fixed.created_at_ns,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: sandbox.fixed.handler.clone(),
    }
}

fn mode(mode: NamespaceMode) -> i32 {
    let mode = match mode {
        NamespaceMode::Pod => cri::NamespaceMode::Pod,
        NamespaceMode::Container => cri::NamespaceMode::Container,
        NamespaceMode::Node => cri::NamespaceMode::Node,
        NamespaceMode::Target => cri::NamespaceMode::Target,
    };
    mode as i32
}

fn network(live: &sandbox::Live) -> Option<cri::PodSandboxNetworkStatus> {
    // A stopped sandbox has given its addresses back.
    let attached = live.attached.as_ref().filter(|_| live.network_held)?;
    let mut ips = attached.ips.iter().map(ToString::to_string);
    Some(cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    })
}

/// The status of a sandbox.
pub fn sandbox_status(sandbox: &Sandbox) -> cri::PodSandboxStatus {
    let live = sandbox.live();
    let config = &sandbox.fixed.config;
    let modes = &config.namespaces;
    let options = cri::NamespaceOption {
        network: mode(modes.network),
        pid: mode(modes.pid),
        ipc: mode(modes.ipc),
        target_id: modes.target_id.clone(),
        userns_options: None,
    };
    cri::PodSandboxStatus {
        id: sandbox.id().to_owned(),
        metadata: Some(sandbox_metadata(&config.name)),
        state: sandbox_state(live.state) as i32,
        created_at: sandbox.fixed.created_at_ns,
        network: Some(network(&live).unwrap_or_default()),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options),
            }),
        }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: sandbox.fixed.handler.clone(),
    }
}

/// The `info` of a verbose sandbox status.
pub fn sandbox_info(sandbox: &Sandbox) -> BTreeMap<String, String> {
    let live = sandbox.live();
    let info = serde_json::json!({
        "pid": live.pod_init.unwrap_or(0),
        "runtimeHandler": sandbox.fixed.handler,
        "netns": sandbox.fixed.netns,
        "shim": live.shim,
        "config": sandbox.fixed.config,
        "cniResult": live.attached,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

fn container_metadata(config: &ContainerConfig) -> cri::ContainerMetadata {
    cri::ContainerMetadata {
        name: config.name.name.clone(),
        attempt: config.name.attempt,
    }
}

/// CRI knows four states, of which the last is for those that lost theirs.
pub fn container_state(state: &ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating | ContainerState::Created | ContainerState::Starting => {
            cri::ContainerState::ContainerCreated
        }
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } | ContainerState::Removing { .. } => {
            cri::ContainerState::ContainerExited
        }
    }
}

fn image_spec(config: &ContainerConfig) -> cri::ImageSpec {
    let image = &config.image;
    cri::ImageSpec {
        image: image.image.clone(),
        annotations: image.annotations.clone(),
        user_specified_image: image.user_specified_image.clone(),
        runtime_handler: image.runtime_handler.clone(),
        image_ref: String::new(),
    }
}

/// An item of ListContainers.
pub fn container(container: &Container) -> cri::Container {
    let fixed = &container.fixed;
    cri::Container {
        id: container.id().to_owned(),
        pod_sandbox_id: fixed.sandbox_id.to_string(),
        metadata: Some(container_metadata(&fixed.config)),
        image: Some(image_spec(&fixed.config)),
        image_ref: fixed.image_ref.clone(),
        state: container_state(&container.state()) as i32,
        created_at: fixed.created_at_ns,
        labels: fixed.config.labels.clone(),
        annotations: fixed.config.annotations.clone(),
        image_id: fixed.image_id.clone(),
    }
}

struct Times {
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
    reason: String,
    message: String,
}

fn times(state: &ContainerState) -> Times {
    match state {
        ContainerState::Exited { exit } | ContainerState::Removing { exit } => Times {
            started_at: exit.started_at_ns,
            finished_at: exit.finished_at_ns,
            exit_code: exit.code,
            reason: exit.reason.clone(),
            message: exit.message.clone(),
        },
        ContainerState::Running { started_at_ns, .. } => Times {
            started_at: *started_at_ns,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
        },
        ContainerState::Creating | ContainerState::Created | ContainerState::Starting => Times {
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
        },
    }
}

/// The status of a container. `image` names it as the store knows it now.
pub fn container_status(daemon: &Daemon, container: &Container) -> cri::ContainerStatus {
    let (fixed, live) = (&container.fixed, container.live());
    let times = times(&live.state);
    let mut image = image_spec(&fixed.config);
    // The tag, where the request named an id: that is what people recognise.
    if let Some(found) = daemon.images.resolve(&fixed.image_id)
        && let Some(tag) = found.repo_tags.first()
        && is_id(&image.image)
    {
        image.image.clone_from(tag);
    }
    cri::ContainerStatus {
        id: container.id().to_owned(),
        metadata: Some(container_metadata(&fixed.config)),
        state: container_state(&live.state) as i32,
        created_at: fixed.created_at_ns,
        started_at: times.started_at,
        finished_at: times.finished_at,
        exit_code: times.exit_code,
        image: Some(image),
        image_ref: fixed.image_ref.clone(),
        reason: times.reason,
        message: times.message,
        labels: fixed.config.labels.clone(),
        annotations: fixed.config.annotations.clone(),
        mounts: fixed.config.mounts.iter().map(mount).collect(),
        log_path: log_path(fixed),
        resources: live.resources.as_ref().map(resources),
        image_id: fixed.image_id.clone(),
        user: Some(user(fixed)),
        stop_signal: signal::to_cri(fixed.stop_signal),
    }
}

fn is_id(name: &str) -> bool {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    hex.len() >= 12 && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

fn log_path(fixed: &container::Fixed) -> String {
    fixed
        .log_path
        .as_ref()
        .map(|path| path.display().to_string())
        .unwrap_or_default()
}

fn user(fixed: &container::Fixed) -> cri::ContainerUser {
    let user = &fixed.user;
    cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: i64::from(user.uid),
            gid: i64::from(user.gid),
            supplemental_groups: user.additional_gids.iter().map(|g| i64::from(*g)).collect(),
        }),
    }
}

fn mount(mount: &container::config::MountRequest) -> cri::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => cri::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
    };
    cri::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation as i32,
        recursive_read_only: mount.recursive_read_only,
        ..cri::Mount::default()
    }
}

fn resources(from: &Resources) -> cri::ContainerResources {
    cri::ContainerResources {
        linux: Some(cri::LinuxContainerResources {
            cpu_period: from.cpu_period,
            cpu_quota: from.cpu_quota,
            cpu_shares: from.cpu_shares,
            memory_limit_in_bytes: from.memory_limit,
            oom_score_adj: from.oom_score_adj,
            cpuset_cpus: from.cpuset_cpus.clone(),
            cpuset_mems: from.cpuset_mems.clone(),
            hugepage_limits: from
                .hugepages
                .iter()
                .map(|(size, limit)| cri::HugepageLimit {
                    page_size: size.clone(),
                    limit: *limit,
                })
                .collect(),
            unified: from.unified.clone(),
            memory_swap_limit_in_bytes: from.memory_swap_limit,
        }),
        windows: None,
    }
}

/// The `info` of a verbose container status. Environment values may be secrets: they stay out.
pub fn container_info(container: &Container) -> BTreeMap<String, String> {
    let fixed = &container.fixed;
    let path = fixed.bundle.join("config.json");
    let mut spec: serde_json::Value = std::fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    if let Some(process) = spec.get_mut("process").and_then(|p| p.as_object_mut()) {
        process.remove("env");
    }
    let info = serde_json::json!({
        "sandboxID": fixed.sandbox_id.as_str(),
        "pid": container.pid().unwrap_or(0),
        "bundle": fixed.bundle,
        "cgroupsPath": fixed.cgroups_path,
        "user": fixed.user,
        "runtimeSpec": spec,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

/// An image.
pub fn image(image: &Image) -> cri::Image {
    let (uid, username) = image_user(&image.config.user);
    cri::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(cri::ImageSpec::default()),
        pinned: image.pinned,
    }
}

/// The kubelet checks runAsNonRoot against this: a number or a name, the group left out.
fn image_user(user: &str) -> (Option<cri::Int64Value>, String) {
    let name = user.split(':').next().unwrap_or_default();
    match name.parse::<i64>() {
        Ok(value) => (Some(cri::Int64Value { value }), String::new()),
        Err(_) => (None, name.to_owned()),
    }
}

fn number(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn optional(value: Option<u64>) -> Option<cri::UInt64Value> {
    value.and_then(number)
}

fn psi(from: Option<&Psi>) -> Option<cri::PsiStats> {
    let line = |line: &PsiLine| cri::PsiData {
        total: line.total,
        avg10: line.averages[0],
        avg60: line.averages[1],
        avg300: line.averages[2],
    };
    from.map(|psi| cri::PsiStats {
        full: Some(line(&psi.full)),
        some: Some(line(&psi.some)),
    })
}

fn cpu(sample: &Sample, nano_cores: Option<u64>, timestamp: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: number(sample.cpu_ns),
        usage_nano_cores: optional(nano_cores),
        psi: psi(sample.cpu_psi.as_ref()),
    }
}

fn memory(sample: &Sample, timestamp: i64) -> cri::MemoryUsage {
    let memory = &sample.memory;
    let available = memory
        .limit
        .map(|limit| limit.saturating_sub(memory.working_set));
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: number(memory.working_set),
        available_bytes: optional(available),
        usage_bytes: number(memory.usage),
        rss_bytes: optional(memory.rss),
        page_faults: optional(memory.page_faults),
        major_page_faults: optional(memory.major_page_faults),
        psi: psi(memory.psi.as_ref()),
    }
}

/// The statistics of a container.
pub fn container_stats(
    daemon: &Daemon,
    container: &Container,
    stats: &Stats,
) -> cri::ContainerStats {
    let (fixed, at) = (&container.fixed, stats.at_ns);
    let mountpoint = daemon.images.fs_info().mountpoint.display().to_string();
    let sample = stats.cgroup.as_ref();
    let swap = sample.and_then(|s| s.memory.swap_usage.map(|usage| (usage, &s.memory)));
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.id().to_owned(),
            metadata: Some(container_metadata(&fixed.config)),
            labels: fixed.config.labels.clone(),
            annotations: fixed.config.annotations.clone(),
        }),
        cpu: sample.map(|sample| cpu(sample, stats.nano_cores, at)),
        memory: sample.map(|sample| memory(sample, at)),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp: at,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint }),
            used_bytes: number(stats.writable.map_or(0, |(bytes, _)| bytes)),
            inodes_used: number(stats.writable.map_or(0, |(_, inodes)| inodes)),
        }),
        swap: swap.map(|(usage, memory)| cri::SwapUsage {
            timestamp: at,
            swap_available_bytes: optional(
                memory.swap_limit.map(|limit| limit.saturating_sub(usage)),
            ),
            swap_usage_bytes: number(usage),
        }),
        io: sample
            .and_then(|sample| psi(sample.io_psi.as_ref()))
            .map(|psi| cri::IoUsage {
                timestamp: at,
                psi: Some(psi),
            }),
    }
}

fn interface(from: &InterfaceStats) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: from.name.clone(),
        rx_bytes: number(from.rx_bytes),
        rx_errors: number(from.rx_errors),
        tx_bytes: number(from.tx_bytes),
        tx_errors: number(from.tx_errors),
    }
}

/// The statistics of a pod.
pub fn pod_stats(daemon: &Daemon, sandbox: &Sandbox, stats: &PodStats) -> cri::PodSandboxStats {
    let (config, at) = (&sandbox.fixed.config, stats.at_ns);
    let interfaces: Vec<_> = stats.interfaces.iter().map(interface).collect();
    let containers = stats.containers.iter().filter_map(|(id, numbers)| {
        let container = daemon.registry.containers.find(id).ok()?;
        Some(container_stats(daemon, &container, numbers))
    });
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: sandbox.id().to_owned(),
            metadata: Some(sandbox_metadata(&config.name)),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(&stats.total, Some(stats.nano_cores), at)),
            memory: Some(memory(&stats.total, at)),
            network: (!interfaces.is_empty()).then(|| cri::NetworkUsage {
                timestamp: at,
                default_interface: interfaces.iter().find(|i| i.name == "eth0").cloned(),
                interfaces: interfaces.clone(),
            }),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: number(stats.total.processes.unwrap_or(0)),
            }),
            containers: containers.collect(),
            io: None,
        }),
        windows: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_user_is_a_number_or_a_name() {
        let uid = |value| Some(cri::Int64Value { value });
        assert_eq!(image_user(""), (None, String::new()));
        assert_eq!(image_user("1002"), (uid(1002), String::new()));
        assert_eq!(image_user("1003:1004"), (uid(1003), String::new()));
        assert_eq!(image_user("www-data:g"), (None, "www-data".to_owned()));
    }
}
