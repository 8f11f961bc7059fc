//! Owns the statistics of containers: cgroup numbers, the writable layer, and the cpu rate from
//! two looks at different times, without ever sleeping for the second one.

use std::sync::PoisonError;

use super::Container;
use super::state::ContainerState;
use crate::cgroup::Sample;
use crate::daemon::{Daemon, now_ns};

/// One look at the cpu time of a cgroup.
#[derive(Debug, Clone, Copy)]
pub struct CpuSample {
    /// When.
    pub at_ns: i64,
    /// Time used since the start.
    pub used_ns: u64,
    /// The rate that was computed then, for a look that comes too soon after.
    pub rate: u64,
}

/// Looks closer than this share a rate: the counters are too coarse for less.
const MIN_INTERVAL_NS: i64 = 100_000_000;

/// Numbers of one container.
#[derive(Debug, Clone)]
pub struct Stats {
    /// When they were taken.
    pub at_ns: i64,
    /// Cgroup numbers; none: it does not run.
    pub cgroup: Option<Sample>,
    /// Billionths of a cpu in use.
    pub nano_cores: Option<u64>,
    /// Bytes and inodes of the writable layer.
    pub writable: Option<(u64, u64)>,
}

impl Daemon {
    /// The numbers of a container, whatever its state.
    pub fn container_stats(&self, container: &Container) -> Stats {
        let at_ns = now_ns();
        let state = container.state();
        let cgroup = match state {
            ContainerState::Running { .. } => {
                self.host.cgroups.sample(&container.fixed.cgroups_path)
            }
            _ => None,
        };
        let nano_cores = match (&cgroup, state) {
            (Some(sample), ContainerState::Running { started_at_ns, .. }) => {
                let mut last = container
                    .cpu_sample
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                let new = next_sample(*last, sample.cpu_ns, at_ns, started_at_ns);
                *last = Some(new);
                Some(new.rate)
            }
            _ => None,
        };
        let usage = self.images.snapshot_usage(container.id()).ok();
        Stats {
            at_ns,
            cgroup,
            nano_cores,
            writable: usage.map(|usage| (usage.bytes, usage.inodes)),
        }
    }
}

/// The rate since the last look, or since the start when this is the first one.
pub fn next_sample(last: Option<CpuSample>, used_ns: u64, at_ns: i64, since_ns: i64) -> CpuSample {
    let (from_ns, from_used) = match last {
        Some(last) if at_ns - last.at_ns < MIN_INTERVAL_NS => return last,
        Some(last) => (last.at_ns, last.used_ns),
        None => (since_ns, 0),
    };
    let elapsed = u128::try_from(at_ns - from_ns).unwrap_or(0).max(1);
    let used = u128::from(used_ns.saturating_sub(from_used));
    let rate = used * 1_000_000_000 / elapsed;
    CpuSample {
        at_ns,
        used_ns,
        rate: u64::try_from(rate).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_the_time_between_two_looks() {
        let second = 1_000_000_000;
        let first = next_sample(None, 500_000_000, second, 0);
        assert_eq!(first.rate, 500_000_000);
        let next = next_sample(Some(first), 2_500_000_000, 2 * second, 0);
        assert_eq!(next.rate, 2_000_000_000);
        let soon = next_sample(Some(next), 2_600_000_000, 2 * second + 5, 0);
        assert_eq!((soon.rate, soon.used_ns), (next.rate, next.used_ns));
    }
}
