//! What the host needs once before pods can be connected: the bridge, its address, our
//! nf_tables, the sysctls. Every step looks first and does only what is missing.
//!
//! Changes on the host, each told in the log at info: the bridge itself, per-interface sysctls of
//! the bridge, the table `coracle`, and forwarding when `enable_forwarding` says so.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::super::config::BridgeConfig;
use super::super::error::{NetworkError, NetworkErrorKind, Result};
use super::super::netlink::{Connection, Refusal, route};
use super::super::nft::{self, Family, ruleset};
use super::super::subnet::Subnet;
use super::hostport::HostPorts;
use super::ipam::Leases;
use crate::netns::write_sysctl;

const IFNAMSIZ: usize = 16;
const FORWARD_V4: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// The bridge as it stands.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    pub bridge: String,
    pub index: u32,
    /// IPv4 first, then IPv6 when configured.
    pub subnets: Vec<Subnet>,
    pub masquerade: bool,
}

pub(super) fn check(config: &BridgeConfig) -> Result<()> {
    let name = &config.name;
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if name.is_empty() || name.len() >= IFNAMSIZ || !plain || name.starts_with(['.', '-']) {
        return Err(NetworkError::invalid(
            "bridge name",
            format!("{name:?}"),
            "not an interface name",
        ));
    }
    for (field, subnet, ipv4) in [
        ("subnet", config.subnet, true),
        ("subnet6", config.subnet6, false),
    ] {
        if let Some(subnet) = subnet.filter(|s| s.is_ipv4() != ipv4) {
            return Err(NetworkError::invalid(
                field,
                subnet.to_string(),
                "of the wrong family",
            ));
        }
    }
    if let Some(mtu) = config.mtu.filter(|mtu| !(1280..=65535).contains(mtu)) {
        return Err(NetworkError::invalid(
            "bridge mtu",
            mtu.to_string(),
            "not within 1280 to 65535",
        ));
    }
    Ok(())
}

/// Brings the host into the state that pods need, or says what is in the way.
pub(super) fn ensure(config: &BridgeConfig, leases: &Leases, ports: &HostPorts) -> Result<Ready> {
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    let found = find(&mut conn, &config.name)?;
    let subnets = choose(&mut conn, config, leases, found.as_ref())?;
    let index = match found {
        Some(link) => link.index,
        None => make(&mut conn, config, &subnets)?,
    };
    quiet(config)?;
    address(&mut conn, config, index, &subnets)?;
    let ready = Ready {
        bridge: config.name.clone(),
        index,
        subnets,
        masquerade: config.masquerade,
    };
    // The guard rules stand before route_localnet opens what they close.
    ports.replace_table(&ready)?;
    set(config, "ipv4", "route_localnet", "1")?;
    apply(&mut conn, route::set_up(index), "set link up", &config.name)?;
    forwarding(config)?;
    for chain in nft::dropping_forward_chains(Family::Ipv4) {
        warn!(
            chain,
            subnet = %ready.subnets[0],
            "another firewall drops forwarded packets that it does not know; it has to accept the pods' subnet"
        );
    }
    Ok(ready)
}

/// Whether `ensure` could choose a bridge and a subnet; makes nothing.
pub(super) fn preview(config: &BridgeConfig, leases: &Leases) -> Result<()> {
    let mut conn = Connection::route().map_err(|e| NetworkError::kernel("open", "netlink", e))?;
    let found = find(&mut conn, &config.name)?;
    choose(&mut conn, config, leases, found.as_ref()).map(drop)
}

/// Why pods on this bridge would not work, without changing anything.
pub(super) fn preflight(config: &BridgeConfig) -> std::result::Result<(), String> {
    if !config.enable_forwarding {
        let off = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
        let mut missing = Vec::new();
        if off(FORWARD_V4) {
            missing.push("net.ipv4.ip_forward");
        }
        if config.subnet6.is_some() && off(FORWARD_V6) {
            missing.push("net.ipv6.conf.all.forwarding");
        }
        if !missing.is_empty() {
            return Err(format!(
                "{} is 0, so pods cannot reach beyond this host: set it to 1, or enable_forwarding = true in the bridge's configuration",
                missing.join(" and ")
            ));
        }
    }
    Ok(())
}

/// Whether what `ensure` made is still there.
pub(super) fn verify(ready: &Ready) -> std::result::Result<(), String> {
    let mut conn = Connection::route().map_err(|e| format!("netlink: {e}"))?;
    let link = route::link_by_name(&mut conn, &ready.bridge).map_err(|e| e.to_string())?;
    match link {
        None => return Err(format!("bridge {} is gone", ready.bridge)),
        Some(link) if link.index != ready.index => {
            return Err(format!("bridge {} was replaced", ready.bridge));
        }
        Some(link) if !link.up => return Err(format!("bridge {} is down", ready.bridge)),
        Some(_) => {}
    }
    match nft::table_exists(Family::Ipv4, ruleset::TABLE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("nf_tables table ip {} is gone", ruleset::TABLE)),
        Err(error) => Err(format!("nf_tables: {error}")),
    }
}

fn find(conn: &mut Connection, name: &str) -> Result<Option<route::Link>> {
    let link = route::link_by_name(conn, name)
        .map_err(|e| NetworkError::kernel("look up link", name, e))?;
    match link {
        Some(link) if !link.is_bridge => {
            Err(
                NetworkError::new(NetworkErrorKind::Conflict, "bridge", name)
                    .cause("an interface of that name exists and is not a bridge"),
            )
        }
        link => Ok(link),
    }
}

fn make(conn: &mut Connection, config: &BridgeConfig, subnets: &[Subnet]) -> Result<u32> {
    let mac = super::cable::mac_for(subnets[0].gateway());
    let message = route::create_bridge(&config.name, mac, config.mtu);
    apply(conn, message, "create bridge", &config.name)?;
    let link = find(conn, &config.name)?.ok_or_else(|| {
        NetworkError::new(NetworkErrorKind::Kernel, "create bridge", &config.name)
            .cause("it vanished at once")
    })?;
    info!(bridge = config.name, subnet = %subnets[0], "made the pod bridge");
    Ok(link.index)
}

fn apply(
    conn: &mut Connection,
    message: super::super::netlink::Message,
    operation: &'static str,
    subject: &str,
) -> Result<()> {
    conn.apply(&[message])
        .map(drop)
        .map_err(|(_, refusal): (usize, Refusal)| NetworkError::kernel(operation, subject, refusal))
}

/// The subnets that pods get, free of everything the host already routes elsewhere.
fn choose(
    conn: &mut Connection,
    config: &BridgeConfig,
    leases: &Leases,
    bridge: Option<&route::Link>,
) -> Result<Vec<Subnet>> {
    let routes = route::routes(conn).map_err(|e| NetworkError::kernel("list", "routes", e))?;
    let own = bridge.map(|link| link.index);
    let taken: Vec<Subnet> = routes
        .iter()
        .filter(|r| r.oif.is_none() || r.oif != own)
        .filter(|r| r.prefix > 0)
        .filter_map(|r| Subnet::containing(r.destination, r.prefix))
        .collect();
    let obstacle = |subnet: &Subnet| taken.iter().find(|t| t.overlaps(subnet));
    let mut subnets = Vec::new();
    subnets.push(match config.subnet {
        Some(subnet) => subnet,
        None => match present(conn, leases, own)? {
            Some(subnet) => subnet,
            None => candidates().find(|s| obstacle(s).is_none()).ok_or_else(|| {
                NetworkError::new(NetworkErrorKind::Conflict, "choose a subnet for", &config.name)
                    .cause("routes of this host overlap 10.88.0.0/16 to 10.103.0.0/16; set bridge.subnet")
            })?,
        },
    });
    subnets.extend(config.subnet6);
    for subnet in &subnets {
        if let Some(route) = obstacle(subnet) {
            let why = format!("this host already routes {route} elsewhere");
            return Err(NetworkError::new(
                NetworkErrorKind::Conflict,
                "subnet of the pod bridge",
                subnet.to_string(),
            )
            .cause(why));
        }
    }
    if let Some((ip, owner)) = leases.outside(&subnets) {
        let all: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
        let why = format!("sandbox {owner} still has {ip} of another subnet; remove it first");
        return Err(NetworkError::new(
            NetworkErrorKind::Conflict,
            "change the subnet to",
            all.join(", "),
        )
        .cause(why));
    }
    Ok(subnets)
}

fn candidates() -> impl Iterator<Item = Subnet> {
    (88..=103).filter_map(|second| Subnet::containing(IpAddr::from([10, second, 0, 0]), 16))
}

/// The subnet that an earlier run chose: the bridge's address says it, or a lease.
fn present(conn: &mut Connection, leases: &Leases, bridge: Option<u32>) -> Result<Option<Subnet>> {
    if let Some(index) = bridge {
        let addresses = list_addresses(conn)?;
        let own = addresses
            .iter()
            .find(|a| a.index == index && a.address.is_ipv4());
        if let Some(subnet) = own.and_then(|a| Subnet::containing(a.address, a.prefix)) {
            return Ok(Some(subnet));
        }
    }
    let lease = leases.any_ipv4();
    Ok(lease.and_then(|ip| candidates().find(|s| s.contains(ip))))
}

fn list_addresses(conn: &mut Connection) -> Result<Vec<route::LinkAddress>> {
    route::addresses(conn).map_err(|e| NetworkError::kernel("list", "addresses", e))
}

/// Pods must not configure the host by router advertisements (CVE-2020-13401), and the bridge's
/// own addresses need no check for duplicates.
fn quiet(config: &BridgeConfig) -> Result<()> {
    if !route::has_ipv6() {
        return Ok(());
    }
    set(config, "ipv6", "accept_ra", "0")?;
    set(config, "ipv6", "accept_dad", "0")
}

fn set(config: &BridgeConfig, family: &str, leaf: &str, value: &str) -> Result<()> {
    let path: PathBuf = [
        Path::new("/proc/sys/net"),
        Path::new(family),
        Path::new("conf"),
        Path::new(&config.name),
    ]
    .iter()
    .collect();
    let path = path.join(leaf);
    let current = fs::read_to_string(&path)
        .map_err(|e| NetworkError::io("read sysctl", path.display(), e))?;
    if current.trim() == value {
        return Ok(());
    }
    write_sysctl(&path, value).map_err(|e| NetworkError::io("set sysctl", path.display(), e))?;
    info!(path = %path.display(), value, "set a sysctl of the pod bridge");
    Ok(())
}

fn address(
    conn: &mut Connection,
    config: &BridgeConfig,
    index: u32,
    subnets: &[Subnet],
) -> Result<()> {
    let present: Vec<_> = list_addresses(conn)?
        .into_iter()
        .filter(|a| a.index == index)
        .collect();
    for subnet in subnets {
        let gateway = subnet.gateway();
        let mut found = false;
        for old in present
            .iter()
            .filter(|a| a.address.is_ipv4() == subnet.is_ipv4())
        {
            if old.address == gateway && old.prefix == subnet.prefix() {
                found = true;
            } else if !is_link_local(old.address) {
                // No lease is outside the subnets (see `choose`), so nobody uses it.
                let message = route::delete_address(index, old.address, old.prefix);
                apply(conn, message, "remove the old address of", &config.name)?;
            }
        }
        if !found {
            let message = route::add_address(index, gateway, subnet.prefix());
            apply(conn, message, "give an address to", &config.name)?;
        }
    }
    Ok(())
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn forwarding(config: &BridgeConfig) -> Result<()> {
    if !config.enable_forwarding {
        if let Err(reason) = preflight(config) {
            warn!(reason, "pods are confined to this host");
        }
        return Ok(());
    }
    let wanted = [(FORWARD_V4, true), (FORWARD_V6, config.subnet6.is_some())];
    for (path, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
        let current = fs::read_to_string(path).map_err(|e| NetworkError::io("read", path, e))?;
        if current.trim() == "0" {
            write_sysctl(Path::new(path), "1")
                .map_err(|e| NetworkError::io("set sysctl", path, e))?;
            info!(path, "turned forwarding on, as enable_forwarding says");
        }
    }
    Ok(())
}
