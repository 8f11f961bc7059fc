//! Owns the statistics of pods: the sum of its containers, and the interfaces of its network namespace.

use super::Sandbox;
use crate::cgroup::Sample;
use crate::container::state::ContainerState;
use crate::container::stats::Stats;
use crate::daemon::{Daemon, now_ns};
use crate::netns::{self, InterfaceStats};

/// Numbers of one container together with its id.
pub type ContainerNumbers = (String, Stats);

/// Numbers of one pod.
#[derive(Debug)]
pub struct PodStats {
    /// When they were taken.
    pub at_ns: i64,
    /// Sums over the pod.
    pub total: Sample,
    /// Billionths of a cpu in use.
    pub nano_cores: u64,
    /// Interfaces, loopback left out; empty with the host's network.
    pub interfaces: Vec<InterfaceStats>,
    /// Running containers.
    pub containers: Vec<ContainerNumbers>,
}

impl Daemon {
    /// The numbers of a pod.
    pub fn pod_stats(&self, sandbox: &Sandbox) -> PodStats {
        let running = |container: &std::sync::Arc<crate::container::Container>| {
            matches!(container.state(), ContainerState::Running { .. })
        };
        let containers: Vec<ContainerNumbers> = self
            .registry
            .containers_of(sandbox.id())
            .into_iter()
            .filter(running)
            .map(|container| (container.id().to_owned(), self.container_stats(&container)))
            .collect();
        let total = sum(containers
            .iter()
            .filter_map(|(_, stats)| stats.cgroup.as_ref()));
        let nano_cores = containers
            .iter()
            .filter_map(|(_, stats)| stats.nano_cores)
            .sum();
        let interfaces = sandbox
            .fixed
            .netns
            .as_ref()
            .map(|path| netns::netns_stats(path));
        let mut interfaces = match interfaces {
            Some(Ok(interfaces)) => interfaces,
            // Being stopped, most likely: no interface is the truth then.
            Some(Err(_)) | None => Vec::new(),
        };
        interfaces.retain(|interface| interface.name != "lo");
        PodStats {
            at_ns: now_ns(),
            total,
            nano_cores,
            interfaces,
            containers,
        }
    }
}

fn sum<'a>(samples: impl Iterator<Item = &'a Sample>) -> Sample {
    let add = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (None, None) => None,
        (a, b) => Some(a.unwrap_or(0).saturating_add(b.unwrap_or(0))),
    };
    let mut total = Sample::default();
    for sample in samples {
        let (to, from) = (&mut total.memory, &sample.memory);
        to.usage += from.usage;
        to.working_set += from.working_set;
        to.rss = add(to.rss, from.rss);
        to.page_faults = add(to.page_faults, from.page_faults);
        to.major_page_faults = add(to.major_page_faults, from.major_page_faults);
        total.cpu_ns += sample.cpu_ns;
        total.processes = add(total.processes, sample.processes);
    }
    total
}
