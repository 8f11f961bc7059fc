//! What we tell plugins of a pod: CNI_ARGS and the capabilities' runtimeConfig.
//!
//! Pure. The conventions are those of the CNI repository's CONVENTIONS.md and of the kubelet.

use serde_json::{Map, Value, json};

use super::super::error::{NetworkError, Result};
use super::super::pod::{ANNOTATION_EGRESS, ANNOTATION_INGRESS, PodNetwork, mac_text};

/// The capability by which Calico and others get at annotations without asking the API server.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

pub(super) fn args(pod: &PodNetwork) -> Result<String> {
    let pairs = [
        ("K8S_POD_NAMESPACE", &pod.pod_namespace),
        ("K8S_POD_NAME", &pod.pod_name),
        ("K8S_POD_INFRA_CONTAINER_ID", &pod.sandbox_id),
        ("K8S_POD_UID", &pod.pod_uid),
    ];
    let mut text = "IgnoreUnknown=1".to_owned();
    for (key, value) in pairs {
        if value.contains([';', '=', '\0']) {
            let why = "the value cannot be passed in CNI_ARGS";
            return Err(NetworkError::invalid(key, format!("{value:?}"), why));
        }
        text.push_str(&format!(";{key}={value}"));
    }
    Ok(text)
}

/// Everything that a plugin may ask for; each gets only the capabilities that it declares.
pub(super) fn runtime_config(pod: &PodNetwork) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    let ports = pod.host_ports()?;
    if !ports.is_empty() {
        let list = ports.iter().map(|mapping| {
            json!({
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": mapping.protocol.as_str(),
                "hostIP": mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        });
        all.insert("portMappings".to_owned(), list.collect());
    }
    if let Some(shape) = bandwidth(pod)? {
        all.insert("bandwidth".to_owned(), shape);
    }
    pod.wanted_ips()?;
    if let Some(text) = pod.annotations.get(super::super::pod::ANNOTATION_IPS) {
        let list: Vec<&str> = text.split(',').map(str::trim).collect();
        all.insert("ips".to_owned(), json!(list));
    }
    if let Some(mac) = pod.wanted_mac()? {
        all.insert("mac".to_owned(), Value::String(mac_text(&mac)));
    }
    let dns = &pod.dns;
    if !(dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty()) {
        let value = json!({
            "servers": dns.servers, "searches": dns.searches, "options": dns.options,
        });
        all.insert("dns".to_owned(), value);
    }
    if !pod.cgroup_parent.is_empty() {
        all.insert(
            "cgroupPath".to_owned(),
            Value::String(pod.cgroup_parent.clone()),
        );
    }
    all.insert(POD_ANNOTATIONS.to_owned(), json!(pod.annotations));
    Ok(all)
}

fn bandwidth(pod: &PodNetwork) -> Result<Option<Value>> {
    /// The plugin wants a burst with a rate; unbounded means the rate alone decides.
    const BURST: u64 = i32::MAX as u64;
    let mut shape = Map::new();
    for (key, rate, burst) in [
        (ANNOTATION_INGRESS, "ingressRate", "ingressBurst"),
        (ANNOTATION_EGRESS, "egressRate", "egressBurst"),
    ] {
        let Some(text) = pod.annotations.get(key) else {
            continue;
        };
        // The limits of the kubelet's check: 1k to 1P bits per second.
        let bits = quantity(text).filter(|bits| (1_000..=1_000_000_000_000_000).contains(bits));
        let bits = bits.ok_or_else(|| {
            NetworkError::invalid(
                "annotation",
                key,
                format!("{text:?} is not a rate of 1k to 1P"),
            )
        })?;
        shape.insert(rate.to_owned(), json!(bits));
        shape.insert(burst.to_owned(), json!(BURST));
    }
    Ok((!shape.is_empty()).then_some(Value::Object(shape)))
}

/// A Kubernetes quantity, whole numbers with a decimal or binary suffix or a decimal fraction.
fn quantity(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mut value = u128::from(whole.parse::<u64>().ok()?) * u128::from(factor);
    if !fraction.is_empty() {
        let digits = u32::try_from(fraction.len()).ok().filter(|n| *n <= 9)?;
        value +=
            u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor) / 10u128.pow(digits);
    }
    u64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::super::super::pod::{PortMapping, Protocol};
    use super::*;

    #[test]
    fn quantities() {
        let cases = [
            ("10M", Some(10_000_000)),
            ("1Ki", Some(1024)),
            ("1.5G", Some(1_500_000_000)),
            ("7", Some(7)),
            ("", None),
            ("M", None),
            ("1m", None),
            ("-1M", None),
            ("99999999999P", None),
        ];
        for (text, value) in cases {
            assert_eq!(quantity(text), value, "{text}");
        }
    }

    #[test]
    fn pod_becomes_arguments_and_capabilities() {
        let mut pod = PodNetwork {
            sandbox_id: "abc".into(),
            pod_name: "web".into(),
            pod_namespace: "default".into(),
            pod_uid: "u-1".into(),
            cgroup_parent: "/kubepods/p".into(),
            ..PodNetwork::default()
        };
        assert_eq!(
            args(&pod).unwrap(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
        pod.port_mappings = vec![
            PortMapping {
                protocol: Protocol::Udp,
                container_port: 53,
                host_port: 5353,
                host_ip: None,
            },
            PortMapping {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 0,
                host_ip: None,
            },
        ];
        pod.annotations
            .insert(ANNOTATION_INGRESS.into(), "1M".into());
        pod.dns.servers = vec!["10.0.0.10".into()];
        let config = runtime_config(&pod).unwrap();
        assert_eq!(
            config["portMappings"],
            json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": ""}])
        );
        assert_eq!(
            config["bandwidth"],
            json!({"ingressRate": 1_000_000, "ingressBurst": 2_147_483_647u32})
        );
        assert_eq!(config["cgroupPath"], "/kubepods/p");
        assert_eq!(config["dns"]["servers"][0], "10.0.0.10");
        pod.annotations
            .insert(ANNOTATION_INGRESS.into(), "fast".into());
        assert!(runtime_config(&pod).is_err());
        pod.pod_name = "a;b".into();
        assert!(args(&pod).is_err());
    }
}
