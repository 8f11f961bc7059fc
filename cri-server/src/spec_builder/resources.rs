//! Owns limits: from CRI's numbers to OCI's. Pure; what the host can do is a parameter.

use super::document::{Cpu, Hugepage, LinuxResources, Memory};
use crate::container::config::Resources;
use crate::error::{Error, Result};
use crate::host::HostFacts;

/// The OCI form of limits, devices left out.
pub fn plan(request: &Resources, host: &HostFacts) -> Result<LinuxResources> {
    let set = |value: i64| (value != 0).then_some(value);
    let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v != 0);
    let mut memory = Memory {
        limit: set(request.memory_limit),
        swap: set(request.memory_swap_limit),
    };
    // Equal limits keep a container from swapping, which is what the kubelet expects when it
    // says nothing about swap.
    if memory.swap.is_none() && host.swap_accounting {
        memory.swap = memory.limit;
    }
    if memory.swap.is_some() && !host.swap_accounting {
        let text = "the kernel does not account for swap";
        return Err(Error::unsupported(
            "linux.resources.memory_swap_limit_in_bytes",
            text,
        ));
    }
    if !request.unified.is_empty() && !host.unified {
        let text = "this host has cgroup v1";
        return Err(Error::unsupported("linux.resources.unified", text));
    }
    Ok(LinuxResources {
        devices: Vec::new(),
        memory,
        cpu: Cpu {
            shares: positive(request.cpu_shares),
            quota: set(request.cpu_quota),
            period: positive(request.cpu_period),
            cpus: request.cpuset_cpus.clone(),
            mems: request.cpuset_mems.clone(),
        },
        hugepage_limits: hugepages(&request.hugepages, host)?,
        unified: request.unified.clone(),
    })
}

fn hugepages(limits: &[(String, u64)], host: &HostFacts) -> Result<Vec<Hugepage>> {
    let mut planned = Vec::new();
    for (size, limit) in limits {
        if !host.hugetlb {
            // The kubelet sends a limit of 0 for every page size, whether or not the host has
            // the controller.
            if *limit == 0 {
                continue;
            }
            let text = format!("{size}: this host has no hugetlb controller");
            return Err(Error::unsupported("linux.resources.hugepage_limits", text));
        }
        planned.push(Hugepage {
            page_size: size.clone(),
            limit: *limit,
        });
    }
    Ok(planned)
}

/// Lays an update over the current limits: only what it names changes.
pub fn updated(current: &Resources, update: &Resources) -> Resources {
    let number = |new: i64, old: i64| if new != 0 { new } else { old };
    let text = |new: &String, old: &String| {
        if new.is_empty() {
            old.clone()
        } else {
            new.clone()
        }
    };
    let mut unified = current.unified.clone();
    unified.extend(update.unified.clone());
    Resources {
        cpu_period: number(update.cpu_period, current.cpu_period),
        cpu_quota: number(update.cpu_quota, current.cpu_quota),
        cpu_shares: number(update.cpu_shares, current.cpu_shares),
        memory_limit: number(update.memory_limit, current.memory_limit),
        memory_swap_limit: number(update.memory_swap_limit, current.memory_swap_limit),
        oom_score_adj: number(update.oom_score_adj, current.oom_score_adj),
        cpuset_cpus: text(&update.cpuset_cpus, &current.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &current.cpuset_mems),
        hugepages: match update.hugepages.is_empty() {
            true => current.hugepages.clone(),
            false => update.hugepages.clone(),
        },
        unified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            unified: false,
            hugetlb: false,
            swap_accounting: true,
            ..HostFacts::for_tests()
        }
    }

    #[test]
    fn zero_is_not_asked_for() {
        let planned = plan(&Resources::default(), &host()).unwrap();
        assert_eq!(planned, LinuxResources::default());
    }

    #[test]
    fn memory_limit_also_bounds_swap() {
        let request = Resources {
            memory_limit: 64 << 20,
            ..Resources::default()
        };
        let planned = plan(&request, &host()).unwrap();
        assert_eq!(planned.memory.swap, Some(64 << 20));
        let mut without = host();
        without.swap_accounting = false;
        assert_eq!(plan(&request, &without).unwrap().memory.swap, None);
    }

    #[test]
    fn what_the_host_lacks_is_named() {
        let request = Resources {
            hugepages: vec![("2MB".to_owned(), 0), ("1GB".to_owned(), 1 << 30)],
            ..Resources::default()
        };
        let error = plan(&request, &host()).unwrap_err().to_string();
        assert!(
            error.contains("hugepage_limits") && error.contains("1GB"),
            "{error}"
        );
    }

    #[test]
    fn update_changes_only_what_it_names() {
        let current = Resources {
            cpu_quota: 10_000,
            memory_limit: 5,
            ..Resources::default()
        };
        let update = Resources {
            memory_limit: 9,
            ..Resources::default()
        };
        let new = updated(&current, &update);
        assert_eq!((new.cpu_quota, new.memory_limit), (10_000, 9));
    }
}
