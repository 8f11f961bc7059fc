//! Host ports: who holds which, and the nf_tables state that follows from it.
//!
//! Memory is the truth while the daemon runs (rebuilt from the journal at start); the kernel's
//! maps follow it by small transactions. When one is refused (someone flushed the ruleset) the
//! whole table is replaced, which is always right.
//!
//! 127.0.0.1:port works from the host for IPv4; IPv6 has no route_localnet, so [::1]:port does not.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use super::super::error::{NetworkError, NetworkErrorKind, Result};
use super::super::nft::ruleset::{self, ANY_ADDRESS, ONE_ADDRESS, Wanted};
use super::super::nft::{Batch, Element, Family};
use super::super::pod::{PortMapping, Protocol};
use super::super::subnet::{Subnet, octets};
use super::record::Record;
use super::setup::Ready;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    protocol: Protocol,
    port: u16,
    /// None: every address of the host, of both families.
    host_ip: Option<IpAddr>,
    /// With a wildcard: the only family meant (0.0.0.0 or ::), None for both.
    family: Option<bool>,
}

#[derive(Clone, Debug)]
struct Target {
    sandbox_id: String,
    label: String,
    ips: Vec<IpAddr>,
    port: u16,
}

#[derive(Default)]
pub(super) struct HostPorts {
    held: Mutex<BTreeMap<Key, Target>>,
}

impl Key {
    fn of(mapping: &PortMapping) -> Key {
        let wildcard = mapping.host_ip.is_none_or(|ip| ip.is_unspecified());
        Key {
            protocol: mapping.protocol,
            port: mapping.host_port,
            host_ip: mapping.host_ip.filter(|_| !wildcard),
            family: mapping.host_ip.map(|ip| ip.is_ipv6()),
        }
    }

    fn serves(&self, ipv6: bool) -> bool {
        self.family.is_none_or(|only| only == ipv6)
    }

    /// As the kernel sees two listening sockets: a wildcard takes the port of every address.
    fn collides(&self, other: &Key) -> bool {
        let families = match (self.family, other.family) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let addresses = match (self.host_ip, other.host_ip) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        self.protocol == other.protocol && self.port == other.port && families && addresses
    }

    fn text(&self) -> String {
        match self.host_ip {
            Some(ip) => format!(
                "{}/{}",
                std::net::SocketAddr::new(ip, self.port),
                self.protocol
            ),
            None => format!("{}/{}", self.port, self.protocol),
        }
    }
}

impl HostPorts {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Target>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the ports of a pod in memory; a conflict takes none of them.
    pub(super) fn reserve(&self, record: &Record) -> Result<()> {
        let mut held = self.lock();
        let mut taken: BTreeMap<Key, Target> = BTreeMap::new();
        for mapping in &record.ports {
            let key = Key::of(mapping);
            let mut others = held.iter().chain(&taken);
            if let Some((_, holder)) = others.find(|(k, _)| k.collides(&key)) {
                let why = if holder.sandbox_id == record.sandbox_id {
                    "asked for twice by the same pod".to_owned()
                } else {
                    format!(
                        "held by pod {} (sandbox {})",
                        holder.label, holder.sandbox_id
                    )
                };
                let kind = NetworkErrorKind::Conflict;
                return Err(NetworkError::new(kind, "host port", key.text()).cause(why));
            }
            let target = Target {
                sandbox_id: record.sandbox_id.clone(),
                label: record.label.clone(),
                ips: record.attached.ips.clone(),
                port: mapping.container_port,
            };
            if !target.ips.iter().any(|ip| key.serves(ip.is_ipv6())) {
                let why = "the pod has no address of that family";
                return Err(NetworkError::invalid("host port", key.text(), why));
            }
            taken.insert(key, target);
        }
        held.extend(taken);
        Ok(())
    }

    /// Forgets the pod's ports; true when it had any. The kernel still has them.
    pub(super) fn forget(&self, sandbox_id: &str) -> bool {
        let mut held = self.lock();
        let before = held.len();
        held.retain(|_, target| target.sandbox_id != sandbox_id);
        held.len() != before
    }

    pub(super) fn holds(&self, sandbox_id: &str) -> bool {
        self.lock()
            .values()
            .any(|target| target.sandbox_id == sandbox_id)
    }

    /// Puts the pod's reserved ports into the kernel.
    pub(super) fn publish(&self, sandbox_id: &str, ready: &Ready) -> Result<()> {
        let held = self.lock();
        let own: Vec<_> = held
            .iter()
            .filter(|(_, t)| t.sandbox_id == sandbox_id)
            .collect();
        if own.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(ruleset::TABLE);
        for subnet in &ready.subnets {
            let (any, one) = elements(own.iter().copied(), subnet);
            batch.add_elements(family(subnet), ANY_ADDRESS, &any);
            batch.add_elements(family(subnet), ONE_ADDRESS, &one);
        }
        if batch.commit().is_ok() {
            return Ok(());
        }
        replace(&held, ready)
    }

    /// Takes the pod's ports out of the kernel and forgets them.
    pub(super) fn withdraw(&self, sandbox_id: &str, ready: &Ready) -> Result<()> {
        let mut held = self.lock();
        let own: BTreeMap<Key, Target> = held
            .extract_if(.., |_, target| target.sandbox_id == sandbox_id)
            .collect();
        if own.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(ruleset::TABLE);
        for subnet in &ready.subnets {
            let (any, one) = elements(own.iter(), subnet);
            batch.delete_elements(family(subnet), ANY_ADDRESS, &any);
            batch.delete_elements(family(subnet), ONE_ADDRESS, &one);
        }
        if batch.commit().is_ok() {
            return Ok(());
        }
        let outcome = replace(&held, ready);
        if outcome.is_err() {
            // Still in the kernel: a later detach must find them again.
            held.extend(own);
        }
        outcome
    }

    pub(super) fn drop_table(&self, ready: &Ready) -> Result<()> {
        let _held = self.lock();
        let mut batch = Batch::new(ruleset::TABLE);
        for subnet in &ready.subnets {
            batch.drop_table(family(subnet));
        }
        batch
            .commit()
            .map_err(|e| NetworkError::kernel("remove nf_tables table", ruleset::TABLE, e))
    }

    /// Makes the kernel's tables exactly what memory says.
    pub(super) fn replace_table(&self, ready: &Ready) -> Result<()> {
        replace(&self.lock(), ready)
    }
}

fn replace(held: &BTreeMap<Key, Target>, ready: &Ready) -> Result<()> {
    let mut batch = Batch::new(ruleset::TABLE);
    for subnet in &ready.subnets {
        let (any_address, one_address) = elements(held.iter(), subnet);
        let wanted = Wanted {
            bridge: &ready.bridge,
            subnet: *subnet,
            masquerade: ready.masquerade,
            any_address,
            one_address,
        };
        ruleset::render(&mut batch, &wanted);
    }
    batch.commit().map_err(|e| {
        let subject = format!("table {}", ruleset::TABLE);
        NetworkError::kernel("write nf_tables", subject, e)
    })
}

fn family(subnet: &Subnet) -> Family {
    if subnet.is_ipv4() {
        Family::Ipv4
    } else {
        Family::Ipv6
    }
}

/// The map entries of one family: for every address of the host, and for one.
fn elements<'a>(
    ports: impl Iterator<Item = (&'a Key, &'a Target)>,
    subnet: &Subnet,
) -> (Vec<Element>, Vec<Element>) {
    let ipv6 = !subnet.is_ipv4();
    let (mut any, mut one) = (Vec::new(), Vec::new());
    for (key, target) in ports.filter(|(key, _)| key.serves(ipv6)) {
        let Some(ip) = target.ips.iter().find(|ip| ip.is_ipv6() == ipv6) else {
            continue;
        };
        // Every field of a concatenation is padded to four bytes.
        let mut field = key.host_ip.map(octets).unwrap_or_default();
        field.extend_from_slice(&[key.protocol.number(), 0, 0, 0]);
        field.extend_from_slice(&key.port.to_be_bytes());
        field.extend_from_slice(&[0, 0]);
        let mut data = octets(*ip);
        data.extend_from_slice(&target.port.to_be_bytes());
        data.extend_from_slice(&[0, 0]);
        let comment = format!(
            "{} {}",
            &target.sandbox_id[..target.sandbox_id.len().min(12)],
            target.label
        );
        let element = Element {
            key: field,
            data,
            comment,
        };
        if key.host_ip.is_some() {
            one.push(element)
        } else {
            any.push(element)
        }
    }
    (any, one)
}

#[cfg(test)]
mod tests {
    use super::super::super::pod::Attached;
    use super::*;

    fn mapping(protocol: Protocol, host_port: u16, host_ip: Option<&str>) -> PortMapping {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        PortMapping {
            protocol,
            container_port: 80,
            host_port,
            host_ip,
        }
    }

    fn record(id: &str, ports: Vec<PortMapping>) -> Record {
        let ips = vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let attached = Attached {
            ips,
            ..Attached::default()
        };
        Record {
            sandbox_id: id.into(),
            label: format!("default/{id}"),
            attached,
            ports,
        }
    }

    #[test]
    fn conflicts_follow_sockets() {
        use Protocol::{Tcp, Udp};
        let cases = [
            (mapping(Tcp, 80, None), mapping(Tcp, 80, None), true),
            (mapping(Tcp, 80, None), mapping(Udp, 80, None), false),
            (mapping(Tcp, 80, None), mapping(Tcp, 81, None), false),
            (
                mapping(Tcp, 80, None),
                mapping(Tcp, 80, Some("1.2.3.4")),
                true,
            ),
            (
                mapping(Tcp, 80, Some("0.0.0.0")),
                mapping(Tcp, 80, Some("1.2.3.4")),
                true,
            ),
            (
                mapping(Tcp, 80, Some("0.0.0.0")),
                mapping(Tcp, 80, Some("::")),
                false,
            ),
            (
                mapping(Tcp, 80, Some("0.0.0.0")),
                mapping(Tcp, 80, Some("fd00::9")),
                false,
            ),
            (mapping(Tcp, 80, None), mapping(Tcp, 80, Some("::")), true),
            (
                mapping(Tcp, 80, Some("1.2.3.4")),
                mapping(Tcp, 80, Some("1.2.3.5")),
                false,
            ),
            (
                mapping(Tcp, 80, Some("1.2.3.4")),
                mapping(Tcp, 80, Some("1.2.3.4")),
                true,
            ),
        ];
        for (a, b, conflict) in cases {
            let text = format!("{a:?} {b:?}");
            let ports = HostPorts::default();
            ports.reserve(&record("one", vec![a])).unwrap();
            assert_eq!(
                ports.reserve(&record("two", vec![b])).is_err(),
                conflict,
                "{text}"
            );
        }
    }

    #[test]
    fn conflict_names_the_holder_and_takes_nothing() {
        let ports = HostPorts::default();
        ports
            .reserve(&record("one", vec![mapping(Protocol::Tcp, 80, None)]))
            .unwrap();
        let wanted = vec![
            mapping(Protocol::Tcp, 81, None),
            mapping(Protocol::Tcp, 80, None),
        ];
        let error = ports.reserve(&record("two", wanted)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "host port 80/tcp: held by pod default/one (sandbox one)"
        );
        assert!(!ports.holds("two"));
        assert!(ports.forget("one") && !ports.forget("one"));
        let twice = vec![
            mapping(Protocol::Tcp, 80, None),
            mapping(Protocol::Tcp, 80, None),
        ];
        let error = ports.reserve(&record("three", twice)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "host port 80/tcp: asked for twice by the same pod"
        );
    }

    #[test]
    fn elements_are_laid_out_in_registers() {
        let ports = HostPorts::default();
        let wanted = vec![
            mapping(Protocol::Udp, 53, None),
            mapping(Protocol::Tcp, 80, Some("1.2.3.4")),
        ];
        ports.reserve(&record("one", wanted)).unwrap();
        let held = ports.lock();
        let (any, one) = elements(held.iter(), &"10.0.0.0/24".parse().unwrap());
        assert_eq!(any[0].key, [17, 0, 0, 0, 0, 53, 0, 0]);
        assert_eq!(any[0].data, [10, 0, 0, 2, 0, 80, 0, 0]);
        assert_eq!(one[0].key, [1, 2, 3, 4, 6, 0, 0, 0, 0, 80, 0, 0]);
        let (any, one) = elements(held.iter(), &"fd00::/64".parse().unwrap());
        assert_eq!((any.len(), any[0].data.len(), one.len()), (1, 20, 0));
    }
}
