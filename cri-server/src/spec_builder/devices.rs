//! Owns the devices of a container: those asked for, all of the host's for a privileged one, and
//! the rules of the device cgroup. Reads /dev, changes nothing.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::document::{Device, DeviceRule};
use crate::container::config::DeviceRequest;
use crate::error::{Error, Result};

/// Device nodes to make and rules to set.
#[derive(Debug, Default)]
pub struct Planned {
    /// `linux.devices`
    pub nodes: Vec<Device>,
    /// `linux.resources.devices`
    pub rules: Vec<DeviceRule>,
}

/// Plans the devices of a container.
pub fn plan(requests: &[DeviceRequest], privileged: bool) -> Result<Planned> {
    let mut planned = Planned::default();
    if privileged {
        planned.rules.push(everything(true));
        walk(Path::new("/dev"), &mut planned.nodes)?;
    } else {
        // The runtime adds its own short list (null, zero, tty, ...) after this.
        planned.rules.push(everything(false));
    }
    for (i, request) in requests.iter().enumerate() {
        one(request, privileged, &mut planned)
            .map_err(|e| e.within(format!("config.devices[{i}].host_path"), ""))?;
    }
    Ok(planned)
}

fn everything(allow: bool) -> DeviceRule {
    DeviceRule {
        allow,
        access: "rwm".to_owned(),
        ..DeviceRule::default()
    }
}

fn one(request: &DeviceRequest, privileged: bool, planned: &mut Planned) -> Result<()> {
    let host = std::fs::canonicalize(&request.host_path)
        .map_err(|e| Error::invalid(request.host_path.clone(), "not usable").because(e))?;
    let meta = std::fs::metadata(&host).map_err(|e| Error::io("stat", host.display(), e))?;
    let mut nodes = Vec::new();
    if meta.is_dir() {
        walk(&host, &mut nodes)?;
        for node in &mut nodes {
            let host = host.display().to_string();
            let below = node.path.strip_prefix(&host).unwrap_or(&node.path);
            node.path = format!("{}{below}", request.container_path.trim_end_matches('/'));
        }
    } else if let Some(device) = node(&request.container_path, &meta) {
        nodes.push(device);
    }
    if nodes.is_empty() {
        let text = "is no device, nor a directory with devices";
        return Err(Error::invalid(request.host_path.clone(), text));
    }
    for device in nodes {
        if !privileged {
            planned.rules.push(DeviceRule {
                allow: true,
                kind: device.kind.clone(),
                major: Some(device.major),
                minor: Some(device.minor),
                access: request.permissions.clone(),
            });
        }
        planned.nodes.retain(|known| known.path != device.path);
        planned.nodes.push(device);
    }
    Ok(())
}

/// Names below /dev that are file systems of their own, or links into /proc.
const SKIPPED: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];

fn walk(dir: &Path, nodes: &mut Vec<Device>) -> Result<()> {
    let failed = |e| Error::io("read directory", dir.display(), e);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if SKIPPED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        // symlink_metadata: a link in /dev is not followed, its target is found by itself.
        let Ok(meta) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            walk(&path, nodes)?;
        } else if path != Path::new("/dev/console")
            && let Some(device) = node(&path.display().to_string(), &meta)
        {
            nodes.push(device);
        }
    }
    Ok(())
}

fn node(path: &str, meta: &Metadata) -> Option<Device> {
    let kind = match meta.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return None,
    };
    Some(Device {
        path: path.to_owned(),
        kind: kind.to_owned(),
        major: i64::from(rustix::fs::major(meta.rdev())),
        minor: i64::from(rustix::fs::minor(meta.rdev())),
        file_mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str) -> DeviceRequest {
        DeviceRequest {
            container_path: "/dev/mine".to_owned(),
            host_path: host.to_owned(),
            permissions: "r".to_owned(),
        }
    }

    #[test]
    fn device_gets_its_node_and_its_rule() {
        let planned = plan(&[request("/dev/null")], false).unwrap();
        let node = &planned.nodes[0];
        assert_eq!((node.kind.as_str(), node.major, node.minor), ("c", 1, 3));
        assert_eq!(node.path, "/dev/mine");
        assert_eq!(planned.rules.len(), 2);
        assert!(!planned.rules[0].allow);
        assert_eq!(planned.rules[1].access, "r");
    }

    #[test]
    fn what_is_no_device_is_refused_by_name() {
        for path in ["/etc/passwd", "/nonexistent", "/etc"] {
            let error = plan(&[request(path)], false).unwrap_err().to_string();
            assert!(error.contains("config.devices[0].host_path"), "{error}");
            assert!(error.contains(path), "{error}");
        }
    }
}
