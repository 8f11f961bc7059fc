//! `linux.netDevices`: moves the host's network devices into the container's network namespace.
//!
//! Name, link address and MTU come along; the permanent addresses of global scope, which the kernel
//! drops on the way, are set again. Devices of a namespace that ends go back to the host or end
//! with it, as the kernel does by itself, so nothing is undone here.

use std::os::fd::{AsFd, OwnedFd};

use coracle_oci::spec::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::rtnetlink::{Address, Route};
use crate::error::{Error, Result};
use crate::init;
use crate::plan::Plan;

/// Moves the plan's devices, if there are any, to where process `pid` is or will be.
///
/// # Errors
/// A device that is not there, cannot be moved or would meet another of its name.
pub fn move_to(plan: &Plan, pid: i32) -> Result<()> {
    if plan.net_devices.is_empty() {
        return Ok(());
    }
    let joined = plan.namespaces.joins.iter();
    let path = joined
        .filter(|join| join.kind == LinuxNamespaceType::Network)
        .map(|join| join.path.to_string_lossy().into_owned())
        .next()
        .unwrap_or_else(|| format!("/proc/{pid}/ns/net"));
    let namespace = open(&path)?;
    let host = Route::open()?;
    let container = inside(&namespace, &path)?;
    for (name, new_name) in &plan.net_devices {
        move_one(&host, &container, &namespace, (name, new_name))
            .map_err(|error| error.context(format!("move netDevice {name} to namespace {path}")))?;
    }
    Ok(())
}

fn open(path: &str) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::system("open namespace", path, error))
}

/// A socket keeps the namespace that it was made in: this process is there for that long only.
fn inside(namespace: &OwnedFd, path: &str) -> Result<Route> {
    let own = open("/proc/thread-self/ns/net")?;
    let enter = |fd: &OwnedFd, name: &str| {
        let name = std::ffi::CString::new(name).unwrap_or_default();
        init::enter(&name, LinuxNamespaceType::Network, fd)
    };
    enter(namespace, path)?;
    let route = Route::open();
    enter(&own, "/proc/thread-self/ns/net")?;
    route
}

fn move_one(
    host: &Route,
    container: &Route,
    namespace: &OwnedFd,
    (name, new_name): (&str, &str),
) -> Result<()> {
    let step = |what: &'static str| move |error: Errno| Error::system(what, "", error);
    let index = host
        .index_of(name)
        .map_err(|error| not_found(name, "runtime", error))?;
    // Before it goes down: that drops the IPv6 addresses.
    let addresses = host
        .addresses(index)
        .map_err(step("fail to get ip addresses"))?;
    // A device that is up cannot change its name on older kernels, and has routes.
    host.set_up(index, false)
        .map_err(step("fail to set link down"))?;
    // Both at once: the name may be taken here or there.
    host.move_link(index, new_name, namespace.as_fd())
        .map_err(step("fail to move network device"))?;
    let index = container
        .index_of(new_name)
        .map_err(|error| not_found(new_name, "container", error))?;
    for address in addresses.iter().filter(|address| wanted(address)) {
        container
            .add_address(index, address)
            .map_err(|error| Error::system("fail to set up address", address.to_string(), error))?;
    }
    container
        .set_up(index, true)
        .map_err(step("fail to set up interface"))
}

fn not_found(name: &str, where_: &str, error: Errno) -> Error {
    let what = format!("link not found for interface {name} on {where_} namespace");
    Error::system(what, "", error)
}

/// Dynamic addresses are a promise of the host's network; those of narrower scope are the host's.
fn wanted(address: &Address) -> bool {
    address.flags & libc::IFA_F_PERMANENT != 0 && address.scope == libc::RT_SCOPE_UNIVERSE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_permanent_global_addresses_move() {
        let address = |flags, scope| {
            let mut address = Address::default();
            (address.flags, address.scope) = (flags, scope);
            address
        };
        assert!(wanted(&address(libc::IFA_F_PERMANENT, 0)));
        assert!(!wanted(&address(0, 0)));
        assert!(!wanted(&address(
            libc::IFA_F_PERMANENT,
            libc::RT_SCOPE_HOST
        )));
        assert!(!wanted(&address(
            libc::IFA_F_PERMANENT,
            libc::RT_SCOPE_LINK
        )));
    }
}
