//! Results of ADD: what CRI wants to know of them. Pure.

use std::net::IpAddr;

use serde_json::Value;

use super::super::pod::{Attached, Interface};

/// Reads any result form from 0.1.0 (`ip4`, `ip6`) to 1.1.0 (`ips`, `interfaces`).
pub(super) fn attached(result: &Value) -> Result<Attached, String> {
    let interfaces = interfaces(result);
    let mut ips = Vec::new();
    if let Some(list) = result.get("ips").and_then(Value::as_array) {
        for entry in list {
            let address = entry.get("address").and_then(Value::as_str);
            let ip = parse(address.ok_or("an entry of \"ips\" has no \"address\"")?)?;
            // An address of an interface outside the pod is not the pod's.
            let index = entry.get("interface").and_then(Value::as_u64);
            let owner = index.and_then(|i| interfaces.get(usize::try_from(i).ok()?));
            if owner.is_none_or(|interface| !interface.sandbox.is_empty()) {
                ips.push(ip);
            }
        }
    }
    for family in ["ip4", "ip6"] {
        if let Some(text) = result
            .get(family)
            .and_then(|f| f.get("ip"))
            .and_then(Value::as_str)
        {
            ips.push(parse(text)?);
        }
    }
    // The pod's IP is the first IPv4 one, as containerd and the kubelet's defaults have it.
    if let Some(at) = ips.iter().position(IpAddr::is_ipv4) {
        ips[..=at].rotate_right(1);
    }
    Ok(Attached {
        ips,
        interfaces,
        cni_result: Some(result.clone()),
    })
}

fn interfaces(result: &Value) -> Vec<Interface> {
    let list = result.get("interfaces").and_then(Value::as_array);
    let text = |entry: &Value, key: &str| {
        entry
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    list.into_iter()
        .flatten()
        .map(|entry| Interface {
            name: text(entry, "name"),
            mac: text(entry, "mac"),
            sandbox: text(entry, "sandbox"),
        })
        .collect()
}

fn parse(text: &str) -> Result<IpAddr, String> {
    let bare = text.split('/').next().unwrap_or_default();
    bare.parse()
        .map_err(|_| format!("{text:?} is not an address"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ips(result: Value) -> Vec<String> {
        attached(&result)
            .unwrap()
            .ips
            .iter()
            .map(IpAddr::to_string)
            .collect()
    }

    #[test]
    fn pods_addresses_are_taken_ipv4_first() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "cni0", "mac": "m"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [
                {"address": "10.9.9.9/24", "interface": 0},
                {"address": "fd00::5/64", "interface": 1},
                {"address": "fd00::6/64"},
                {"address": "10.1.0.5/16", "interface": 1},
            ],
        });
        assert_eq!(ips(result.clone()), ["10.1.0.5", "fd00::5", "fd00::6"]);
        assert_eq!(attached(&result).unwrap().interfaces[0].name, "cni0");
        assert_eq!(
            ips(json!({"ip4": {"ip": "10.1.0.5/16"}, "ip6": {"ip": "fd00::5/64"}})).len(),
            2
        );
        assert!(ips(json!({})).is_empty());
        assert!(attached(&json!({"ips": [{"address": "x"}]})).is_err());
    }
}
