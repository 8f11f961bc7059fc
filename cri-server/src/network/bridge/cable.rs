//! The cable between a pod and the bridge: a veth pair, made, set up inside, taken away.
//!
//! Owns the names and hardware addresses. Knows nothing of leases and journals.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::super::error::{NetworkError, NetworkErrorKind, Result};
use super::super::netlink::{Connection, route};
use super::super::pod::POD_INTERFACE;
use super::super::subnet::{Subnet, octets};
use super::record::Record;
use super::setup::Ready;
use crate::netns::write_sysctl;

const VETH_PREFIX: &str = "veth";

/// The host's end of a pod's cable: 15 bytes are all that an interface name has.
pub(super) fn veth_name(sandbox_id: &str) -> String {
    let digest = Sha256::digest(sandbox_id.as_bytes());
    let hex: String = digest.iter().take(6).map(|b| format!("{b:02x}")).collect();
    format!("{VETH_PREFIX}{}", &hex[..11])
}

pub(super) fn is_veth_name(name: &str) -> bool {
    name.strip_prefix(VETH_PREFIX)
        .is_some_and(|hex| hex.len() == 11 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A pod's hardware address follows from its IP, so that a neighbour's ARP entry stays true when
/// the address goes to another pod.
pub(super) fn mac_for(ip: IpAddr) -> route::Mac {
    let all = octets(ip);
    let tail = &all[all.len() - 4..];
    [0x0a, 0x58, tail[0], tail[1], tail[2], tail[3]]
}

pub(super) fn plug(
    record: &Record,
    netns: &File,
    ready: &Ready,
    mac: route::Mac,
    mtu: Option<u32>,
) -> Result<()> {
    let name = veth_name(&record.sandbox_id);
    let alias = format!("coracle {} {}", record.sandbox_id, record.label);
    let pair = route::VethPair {
        host_name: &name,
        bridge_index: ready.index,
        pod_name: POD_INTERFACE,
        pod_mac: mac,
        pod_netns: netns.as_fd(),
        mtu,
        // IFALIASZ is 256 with its zero.
        alias: &alias[..alias.floor_char_boundary(255)],
    };
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    let mut result = conn.apply(&route::create_veth(&pair)).map(drop);
    if matches!(&result, Err((0, refusal)) if refusal.is(Errno::EXIST)) {
        // The name is this sandbox's alone: a cable whose record was lost.
        unplug(&name)?;
        result = conn.apply(&route::create_veth(&pair)).map(drop);
    }
    result.map_err(|(step, refusal)| {
        let operation = if step == 0 {
            "create veth pair"
        } else {
            "set up bridge port"
        };
        NetworkError::kernel(
            operation,
            format!("{name} of sandbox {}", record.sandbox_id),
            refusal,
        )
    })
}

/// Takes the pair away from both namespaces; it may be gone with the pod's.
pub(super) fn unplug(name: &str) -> Result<()> {
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    match conn.apply(&[route::delete_link(name)]) {
        Err((_, refusal)) if !refusal.is(Errno::NODEV) => {
            Err(NetworkError::kernel("delete link", name, refusal))
        }
        _ => Ok(()),
    }
}

/// Runs inside the pod's namespace.
pub(super) fn configure(ips: &[IpAddr], ready: &Ready) -> Result<()> {
    let failed = |operation, refusal| NetworkError::kernel(operation, POD_INTERFACE, refusal);
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    let link = route::link_by_name(&mut conn, POD_INTERFACE)
        .map_err(|e| failed("look up link", e))?
        .ok_or_else(|| {
            NetworkError::new(NetworkErrorKind::Kernel, "look up link", POD_INTERFACE)
        })?;
    if ips.iter().any(IpAddr::is_ipv6) {
        // The lease says that the address is free; a pod does not wait a second to be told so.
        let path = Path::new("/proc/sys/net/ipv6/conf")
            .join(POD_INTERFACE)
            .join("accept_dad");
        write_sysctl(&path, "0").map_err(|e| NetworkError::io("set sysctl", path.display(), e))?;
    }
    let mut messages = vec![route::set_up(link.index)];
    let subnets: &[Subnet] = &ready.subnets;
    for (ip, subnet) in ips.iter().zip(subnets) {
        messages.push(route::add_address(link.index, *ip, subnet.prefix()));
        messages.push(route::add_default_route(link.index, subnet.gateway()));
    }
    conn.apply(&messages)
        .map(drop)
        .map_err(|(step, refusal)| match step {
            0 => failed("set link up", refusal),
            step if step % 2 == 1 => failed("give an address to", refusal),
            _ => failed("set the default route over", refusal),
        })
}
