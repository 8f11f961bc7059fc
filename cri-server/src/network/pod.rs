//! What the network is told of a pod, and what it answers.
//!
//! Pure data, kept in sandbox records by the caller.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{NetworkError, Result};

/// Annotations with which a pod asks for fixed addresses (comma-separated) and a hardware address.
/// Honoured by the bridge; handed to CNI plugins with the capabilities `ips` and `mac`.
pub const ANNOTATION_IPS: &str = "io.coracle.network/ips";
pub const ANNOTATION_MAC: &str = "io.coracle.network/mac";
/// The annotations of the Kubernetes bandwidth convention.
pub const ANNOTATION_INGRESS: &str = "kubernetes.io/ingress-bandwidth";
pub const ANNOTATION_EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The interface that a pod has beside loopback.
pub(crate) const POD_INTERFACE: &str = "eth0";

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNetwork {
    pub sandbox_id: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub pod_uid: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    pub hostname: String,
    pub port_mappings: Vec<PortMapping>,
    pub annotations: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub cgroup_parent: String,
    pub dns: DnsConfig,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DnsConfig {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// IPPROTO_*
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A mapping with host port 0 asks for nothing (as in the CRI).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    /// None, 0.0.0.0 and :: mean every address of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// The pod's connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attached {
    /// The first is the pod's IP, further ones are its additional IPs.
    pub ips: Vec<IpAddr>,
    pub interfaces: Vec<Interface>,
    /// The last plugin's result as it came, when a CNI plugin made the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cni_result: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    pub name: String,
    pub mac: String,
    /// The namespace that the interface is in; empty for the host's.
    pub sandbox: String,
}

impl PodNetwork {
    /// The id becomes a file name and an argument of plugins.
    pub(crate) fn check_id(&self) -> Result<()> {
        check_sandbox_id(&self.sandbox_id)
    }

    /// The mappings that ask for something, checked.
    pub(crate) fn host_ports(&self) -> Result<Vec<PortMapping>> {
        let wanted = self.port_mappings.iter().filter(|m| m.host_port != 0);
        wanted
            .map(|mapping| match mapping.container_port {
                0 => Err(NetworkError::invalid(
                    "port mapping of sandbox",
                    &self.sandbox_id,
                    format!("host_port {} has container_port 0", mapping.host_port),
                )),
                _ => Ok(mapping.clone()),
            })
            .collect()
    }

    /// Addresses asked for by annotation.
    pub(crate) fn wanted_ips(&self) -> Result<Vec<IpAddr>> {
        let Some(text) = self.annotations.get(ANNOTATION_IPS) else {
            return Ok(Vec::new());
        };
        text.split(',')
            .map(|ip| {
                // CNI allows a prefix after the address; ours is the subnet's anyway.
                let bare = ip.trim().split('/').next().unwrap_or_default();
                bare.parse().map_err(|_| {
                    let why = format!("{ip:?} is not an IP address");
                    NetworkError::invalid("annotation", ANNOTATION_IPS, why)
                })
            })
            .collect()
    }

    pub(crate) fn wanted_mac(&self) -> Result<Option<[u8; 6]>> {
        let Some(text) = self.annotations.get(ANNOTATION_MAC) else {
            return Ok(None);
        };
        let wrong = || {
            let why = format!("{text:?} is not a unicast hardware address");
            NetworkError::invalid("annotation", ANNOTATION_MAC, why)
        };
        let parts: Vec<&str> = text.trim().split(':').collect();
        let mut mac = [0; 6];
        if parts.len() != mac.len() {
            return Err(wrong());
        }
        for (byte, part) in mac.iter_mut().zip(&parts) {
            if part.len() != 2 {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return Err(wrong());
        }
        Ok(Some(mac))
    }
}

pub(crate) fn check_sandbox_id(id: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    let starts = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if starts && id.len() <= 200 && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(NetworkError::invalid(
        "sandbox id",
        format!("{id:?}"),
        "not a plain identifier",
    ))
}

pub(crate) fn mac_text(mac: &[u8]) -> String {
    mac.iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(key: &str, value: &str) -> PodNetwork {
        let annotations = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        PodNetwork {
            annotations,
            ..PodNetwork::default()
        }
    }

    #[test]
    fn wanted_addresses_are_parsed_or_refused() {
        let ips = annotated(ANNOTATION_IPS, "10.1.0.5, fd00::5/64")
            .wanted_ips()
            .unwrap();
        assert_eq!(
            ips,
            [
                "10.1.0.5".parse::<IpAddr>().unwrap(),
                "fd00::5".parse().unwrap()
            ]
        );
        assert!(annotated(ANNOTATION_IPS, "10.1.0").wanted_ips().is_err());
        let mac = annotated(ANNOTATION_MAC, "02:00:00:00:00:0a")
            .wanted_mac()
            .unwrap();
        assert_eq!(mac, Some([2, 0, 0, 0, 0, 10]));
        for bad in [
            "",
            "01:00:00:00:00:00",
            "02:00",
            "02:00:00:00:00:0aa",
            "zz:00:00:00:00:00",
        ] {
            assert!(
                annotated(ANNOTATION_MAC, bad).wanted_mac().is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn sandbox_id_must_be_plain() {
        for bad in ["", ".", "../x", "a/b", "a b", "-x", "a\n"] {
            assert!(check_sandbox_id(bad).is_err(), "{bad:?}");
        }
        assert!(check_sandbox_id("0af3").is_ok());
    }
}
