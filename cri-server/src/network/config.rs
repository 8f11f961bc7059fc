//! What the configuration file says of the network.
//!
//! Pure data with defaults; `Network::open` checks it against the machine.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::subnet::Subnet;

/// Who connects pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// CNI as long as `cni_conf_dir` has a valid configuration, else the built-in bridge.
    #[default]
    Auto,
    /// The built-in bridge; `cni_conf_dir` is not looked at.
    Bridge,
    /// CNI only: pods wait until there is a configuration. The mode for a Kubernetes node.
    Cni,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkConfig {
    pub mode: Mode,
    pub cni_conf_dir: PathBuf,
    /// Searched in order.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// What DEL will need again; outlives a reboot, as the plugins' own leases do.
    pub cni_cache_dir: PathBuf,
    /// For one call of one plugin; then its process group is killed.
    pub cni_timeout_seconds: u64,
    /// Leases and records of the bridge. They describe kernel objects, so they belong under /run.
    pub state_dir: PathBuf,
    pub bridge: BridgeConfig,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BridgeConfig {
    pub name: String,
    /// None: the first of 10.88.0.0/16 to 10.103.0.0/16 that no route of the host overlaps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
    /// Pods get an IPv6 address too when this is set, for example fd00:10:88::/64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<Subnet>,
    /// None: the kernel's 1500.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Hide pods behind the host's address when they leave the subnet.
    pub masquerade: bool,
    /// Turn on net.ipv4.ip_forward (and IPv6 forwarding with `subnet6`) when it is off.
    pub enable_forwarding: bool,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            mode: Mode::Auto,
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cni_bin_dirs: vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")],
            cni_cache_dir: PathBuf::from("/var/lib/coracle/cni"),
            cni_timeout_seconds: 60,
            state_dir: PathBuf::from("/run/coracle/network"),
            bridge: BridgeConfig::default(),
        }
    }
}

impl NetworkConfig {
    pub(crate) fn cni_timeout(&self) -> Duration {
        Duration::from_secs(self.cni_timeout_seconds.max(1))
    }
}

impl Default for BridgeConfig {
    fn default() -> Self {
        BridgeConfig {
            name: "coracle0".to_owned(),
            subnet: None,
            subnet6: None,
            mtu: None,
            masquerade: true,
            enable_forwarding: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_round_trips_through_toml_and_has_defaults() {
        let parsed: NetworkConfig = toml::from_str(
            "mode = \"cni\"\n[bridge]\nsubnet = \"10.9.0.0/24\"\nenable_forwarding = true\n",
        )
        .unwrap();
        assert_eq!(parsed.mode, Mode::Cni);
        assert_eq!(parsed.bridge.name, "coracle0");
        assert_eq!(parsed.bridge.subnet, Some("10.9.0.0/24".parse().unwrap()));
        let text = toml::to_string(&parsed).unwrap();
        assert_eq!(toml::from_str::<NetworkConfig>(&text).unwrap(), parsed);
        assert!(toml::from_str::<NetworkConfig>("[bridge]\nsubnet = \"10.9.0.1/24\"\n").is_err());
    }
}
