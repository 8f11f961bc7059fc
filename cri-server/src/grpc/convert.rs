//! Owns the way from CRI messages to our own types. Every field is either kept, or refused by
//! name when it asks for something that is not supported: nothing is dropped silently.

use std::collections::BTreeMap;

use crate::container::config::{
    AppArmorRequest, ContainerConfig, ContainerName, DeviceRequest, ImageRequest, MountRequest,
    Propagation, Resources, SeccompRequest, SecurityRequest, UserRequest,
};
use crate::error::{Error, Result};
use crate::proto::cri;
use crate::sandbox::config::{
    DnsConfig, NamespaceMode, NamespaceModes, Port, PortProtocol, SandboxConfig, SandboxName,
};

/// Parses the configuration of a sandbox.
pub fn sandbox_config(config: Option<cri::PodSandboxConfig>) -> Result<SandboxConfig> {
    let config = config.ok_or_else(|| Error::invalid("config", "is missing"))?;
    let metadata = config
        .metadata
        .ok_or_else(|| Error::invalid("config.metadata", "is missing"))?;
    let name = SandboxName {
        name: required("config.metadata.name", metadata.name)?,
        uid: metadata.uid,
        namespace: metadata.namespace,
        attempt: metadata.attempt,
    };
    if config.windows.is_some() {
        return Err(Error::unsupported("config.windows", "this is Linux"));
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let at = "config.linux.security_context";
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        let why = "is set without run_as_user";
        return Err(Error::invalid(format!("{at}.run_as_group"), why));
    }
    selinux(security.selinux_options, &format!("{at}.selinux_options"))?;
    let seccomp = seccomp(security.seccomp, &security.seccomp_profile_path, at)?;
    // Checked for its form only: a sandbox has no process to confine, each container brings its
    // own profile.
    apparmor(security.apparmor, "", at)?;
    Ok(SandboxConfig {
        name,
        hostname: hostname(config.hostname)?,
        log_directory: absolute("config.log_directory", config.log_directory)?,
        dns: config.dns_config.map(|dns| DnsConfig {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        ports: ports(config.port_mappings)?,
        labels: config.labels,
        annotations: config.annotations,
        cgroup_parent: cgroup_parent(linux.cgroup_parent)?,
        namespaces: namespaces(security.namespace_options, at)?,
        sysctls: linux.sysctls,
        privileged: security.privileged,
        seccomp,
        resources: linux.resources.map(resources).transpose()?,
        overhead: linux.overhead.map(resources).transpose()?,
    })
}

fn required(field: &str, value: String) -> Result<String> {
    if value.is_empty() {
        return Err(Error::invalid(field, "is empty"));
    }
    Ok(value)
}

/// An absolute path, or none.
fn absolute(field: &str, path: String) -> Result<String> {
    if !path.is_empty() && !path.starts_with('/') {
        return Err(Error::invalid(field, format!("{path:?} is not absolute")));
    }
    if path.contains('\0') {
        return Err(Error::invalid(field, "has a NUL"));
    }
    Ok(path)
}

fn hostname(name: String) -> Result<String> {
    // sethostname(2): at most 64 bytes.
    if name.len() > 64 || name.bytes().any(|b| b.is_ascii_control() || b == b'/') {
        let text = format!("{name:?} is no hostname of at most 64 bytes");
        return Err(Error::invalid("config.hostname", text));
    }
    Ok(name)
}

fn cgroup_parent(parent: String) -> Result<String> {
    let field = "config.linux.cgroup_parent";
    if parent.ends_with(".slice") {
        let text = format!("{parent:?} is for the systemd driver; the driver in force is cgroupfs");
        return Err(Error::unsupported(field, text));
    }
    if parent.split('/').any(|part| part == "..") || parent.contains('\0') {
        return Err(Error::invalid(
            field,
            format!("{parent:?} leaves its place"),
        ));
    }
    Ok(parent)
}

fn ports(mappings: Vec<cri::PortMapping>) -> Result<Vec<Port>> {
    let mut ports = Vec::with_capacity(mappings.len());
    for (i, mapping) in mappings.into_iter().enumerate() {
        let at = format!("config.port_mappings[{i}]");
        let port = |name: &str, value: i32| {
            u16::try_from(value)
                .map_err(|_| Error::invalid(format!("{at}.{name}"), format!("{value} is no port")))
        };
        let protocol = match mapping.protocol {
            0 => PortProtocol::Tcp,
            1 => PortProtocol::Udp,
            2 => PortProtocol::Sctp,
            n => {
                let text = format!("{n} is no protocol");
                return Err(Error::invalid(format!("{at}.protocol"), text));
            }
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                Error::invalid(format!("{at}.host_ip"), format!("{text:?} is no address"))
            })?),
        };
        ports.push(Port {
            protocol,
            container_port: port("container_port", mapping.container_port)?,
            host_port: port("host_port", mapping.host_port)?,
            host_ip,
        });
    }
    Ok(ports)
}

fn namespaces(options: Option<cri::NamespaceOption>, at: &str) -> Result<NamespaceModes> {
    let Some(options) = options else {
        return Ok(NamespaceModes::default());
    };
    let at = format!("{at}.namespace_options");
    if let Some(userns) = options.userns_options {
        if userns.mode != cri::NamespaceMode::Node as i32 {
            let text = "pods with a user namespace of their own are not supported yet";
            return Err(Error::unsupported(
                format!("{at}.userns_options.mode"),
                text,
            ));
        }
        if !userns.uids.is_empty() || !userns.gids.is_empty() {
            let text = "mappings are given for mode NODE";
            return Err(Error::invalid(format!("{at}.userns_options"), text));
        }
    }
    let mode = |name: &str, value: i32| match value {
        0 => Ok(NamespaceMode::Pod),
        1 => Ok(NamespaceMode::Container),
        2 => Ok(NamespaceMode::Node),
        3 => Ok(NamespaceMode::Target),
        n => {
            let text = format!("{n} is no namespace mode");
            Err(Error::invalid(format!("{at}.{name}"), text))
        }
    };
    let shared = |name: &str, value: i32| match mode(name, value)? {
        mode @ (NamespaceMode::Pod | NamespaceMode::Node) => Ok(mode),
        NamespaceMode::Container | NamespaceMode::Target => Err(Error::invalid(
            format!("{at}.{name}"),
            "only POD and NODE are possible here",
        )),
    };
    let modes = NamespaceModes {
        network: shared("network", options.network)?,
        pid: mode("pid", options.pid)?,
        ipc: shared("ipc", options.ipc)?,
        target_id: options.target_id,
    };
    if modes.pid == NamespaceMode::Target && modes.target_id.is_empty() {
        return Err(Error::invalid(format!("{at}.target_id"), "is empty"));
    }
    Ok(modes)
}

/// Parses limits.
pub fn resources(from: cri::LinuxContainerResources) -> Result<Resources> {
    let field = "linux.resources";
    if !(-1000..=1000).contains(&from.oom_score_adj) {
        let text = format!("{} is not within -1000 and 1000", from.oom_score_adj);
        return Err(Error::invalid(format!("{field}.oom_score_adj"), text));
    }
    if from.cpu_period < 0 || from.cpu_shares < 0 {
        let name = if from.cpu_period < 0 {
            "cpu_period"
        } else {
            "cpu_shares"
        };
        return Err(Error::invalid(format!("{field}.{name}"), "is negative"));
    }
    Ok(Resources {
        cpu_period: from.cpu_period,
        cpu_quota: from.cpu_quota,
        cpu_shares: from.cpu_shares,
        memory_limit: from.memory_limit_in_bytes,
        memory_swap_limit: from.memory_swap_limit_in_bytes,
        oom_score_adj: from.oom_score_adj,
        cpuset_cpus: from.cpuset_cpus,
        cpuset_mems: from.cpuset_mems,
        hugepages: from
            .hugepage_limits
            .into_iter()
            .map(|h| (h.page_size, h.limit))
            .collect(),
        unified: from.unified,
    })
}

fn selinux(options: Option<cri::SeLinuxOption>, field: &str) -> Result<Option<[String; 4]>> {
    let Some(options) = options else {
        return Ok(None);
    };
    let parts = [options.user, options.role, options.r#type, options.level];
    if parts.iter().all(String::is_empty) {
        return Ok(None);
    }
    Err(Error::unsupported(
        field,
        "SELinux labels are not supported yet",
    ))
}

fn seccomp(
    profile: Option<cri::SecurityProfile>,
    deprecated: &str,
    at: &str,
) -> Result<Option<SeccompRequest>> {
    let Some(profile) = profile else {
        return match deprecated {
            "" => Ok(None),
            "runtime/default" | "docker/default" => Ok(Some(SeccompRequest::RuntimeDefault)),
            "unconfined" => Ok(Some(SeccompRequest::Unconfined)),
            text => match text.strip_prefix("localhost/") {
                Some(path) => Ok(Some(SeccompRequest::Localhost(path.to_owned()))),
                None => {
                    let why = format!("{text:?} is no profile");
                    Err(Error::invalid(format!("{at}.seccomp_profile_path"), why))
                }
            },
        };
    };
    Ok(Some(match profile.profile_type {
        0 => SeccompRequest::RuntimeDefault,
        1 => SeccompRequest::Unconfined,
        2 => {
            let field = format!("{at}.seccomp.localhost_ref");
            SeccompRequest::Localhost(required(&field, profile.localhost_ref)?)
        }
        n => return Err(bad_profile(at, "seccomp", n)),
    }))
}

fn apparmor(
    profile: Option<cri::SecurityProfile>,
    deprecated: &str,
    at: &str,
) -> Result<Option<AppArmorRequest>> {
    let Some(profile) = profile else {
        return match deprecated {
            "" => Ok(None),
            "runtime/default" => Ok(Some(AppArmorRequest::RuntimeDefault)),
            "unconfined" => Ok(Some(AppArmorRequest::Unconfined)),
            text => match text.strip_prefix("localhost/") {
                Some(name) => Ok(Some(AppArmorRequest::Localhost(name.to_owned()))),
                None => {
                    let why = format!("{text:?} is no profile");
                    Err(Error::invalid(format!("{at}.apparmor_profile"), why))
                }
            },
        };
    };
    Ok(Some(match profile.profile_type {
        0 => AppArmorRequest::RuntimeDefault,
        1 => AppArmorRequest::Unconfined,
        2 => {
            let field = format!("{at}.apparmor.localhost_ref");
            let name = required(&field, profile.localhost_ref)?;
            let name = name.strip_prefix("localhost/").unwrap_or(&name).to_owned();
            AppArmorRequest::Localhost(name)
        }
        n => return Err(bad_profile(at, "apparmor", n)),
    }))
}

fn bad_profile(at: &str, which: &str, number: i32) -> Error {
    let text = format!("{number} is no profile type");
    Error::invalid(format!("{at}.{which}.profile_type"), text)
}

/// Parses an image name; empty is an error.
pub fn image_request(spec: Option<cri::ImageSpec>, field: &str) -> Result<ImageRequest> {
    let spec = spec.ok_or_else(|| Error::invalid(field, "is missing"))?;
    Ok(ImageRequest {
        image: required(&format!("{field}.image"), spec.image)?,
        annotations: spec.annotations,
        user_specified_image: spec.user_specified_image,
        runtime_handler: spec.runtime_handler,
    })
}

/// Parses the configuration of a container.
pub fn container_config(config: Option<cri::ContainerConfig>) -> Result<ContainerConfig> {
    let config = config.ok_or_else(|| Error::invalid("config", "is missing"))?;
    let metadata = config
        .metadata
        .ok_or_else(|| Error::invalid("config.metadata", "is missing"))?;
    if config.windows.is_some() {
        return Err(Error::unsupported("config.windows", "this is Linux"));
    }
    if let Some(device) = config.cdi_devices.first() {
        let text = format!("{:?}: CDI devices are not supported yet", device.name);
        return Err(Error::unsupported("config.CDI_devices", text));
    }
    if !(0..=65).contains(&config.stop_signal) {
        let text = format!("{} is no signal", config.stop_signal);
        return Err(Error::invalid("config.stop_signal", text));
    }
    if config.log_path.split('/').any(|part| part == "..") || config.log_path.contains('\0') {
        let text = format!("{:?} leaves the log directory", config.log_path);
        return Err(Error::invalid("config.log_path", text));
    }
    let linux = config.linux.unwrap_or_default();
    Ok(ContainerConfig {
        name: ContainerName {
            name: required("config.metadata.name", metadata.name)?,
            attempt: metadata.attempt,
        },
        image: image_request(config.image, "config.image")?,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs: envs(config.envs)?,
        mounts: mounts(config.mounts)?,
        devices: devices(config.devices)?,
        labels: config.labels,
        annotations: config.annotations,
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.map(resources).transpose()?,
        security: security(linux.security_context.unwrap_or_default())?,
        stop_signal: config.stop_signal,
    })
}

fn envs(pairs: Vec<cri::KeyValue>) -> Result<Vec<(String, String)>> {
    let mut envs = Vec::with_capacity(pairs.len());
    for (i, pair) in pairs.into_iter().enumerate() {
        let bad = |why: &str| Error::invalid(format!("config.envs[{i}]"), why);
        let value = String::from_utf8(pair.value).map_err(|_| bad("the value is not UTF-8"))?;
        if pair.key.is_empty() || pair.key.contains(['=', '\0']) || value.contains('\0') {
            return Err(bad(
                "the key is empty or has = or NUL, or the value has NUL",
            ));
        }
        envs.push((pair.key, value));
    }
    Ok(envs)
}

fn mounts(from: Vec<cri::Mount>) -> Result<Vec<MountRequest>> {
    let mut mounts = Vec::with_capacity(from.len());
    for (i, mount) in from.into_iter().enumerate() {
        mounts.push(one_mount(mount, &format!("config.mounts[{i}]"))?);
    }
    Ok(mounts)
}

fn one_mount(mount: cri::Mount, at: &str) -> Result<MountRequest> {
    let unsupported = |name: &str, why: &str| Err(Error::unsupported(format!("{at}.{name}"), why));
    if mount.image.is_some_and(|image| !image.image.is_empty()) || !mount.image_sub_path.is_empty()
    {
        return unsupported("image", "image volumes are not supported yet");
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return unsupported("uidMappings", "idmapped mounts are not supported yet");
    }
    if !mount.mount_options.is_empty() {
        return unsupported("mount_options", "further options are not supported yet");
    }
    let propagation = match mount.propagation {
        0 => Propagation::Private,
        1 => Propagation::HostToContainer,
        2 => Propagation::Bidirectional,
        n => {
            let text = format!("{n} is no propagation");
            return Err(Error::invalid(format!("{at}.propagation"), text));
        }
    };
    // cri-api: recursive_read_only requires readonly and PROPAGATION_PRIVATE.
    if mount.recursive_read_only && !mount.readonly {
        let field = format!("{at}.recursive_read_only");
        return Err(Error::invalid(field, "is set without readonly"));
    }
    if mount.recursive_read_only && propagation != Propagation::Private {
        let field = format!("{at}.recursive_read_only");
        return Err(Error::invalid(
            field,
            "is set with a propagation other than private",
        ));
    }
    let path = |name: &str, path: String| {
        let field = format!("{at}.{name}");
        absolute(&field, required(&field, path)?)
    };
    let container_path = path("container_path", mount.container_path)?;
    let host_path = path("host_path", mount.host_path)?;
    Ok(MountRequest {
        container_path,
        host_path,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        selinux_relabel: mount.selinux_relabel,
        propagation,
    })
}

fn devices(from: Vec<cri::Device>) -> Result<Vec<DeviceRequest>> {
    let mut devices = Vec::with_capacity(from.len());
    for (i, device) in from.into_iter().enumerate() {
        let at = format!("config.devices[{i}]");
        let host_path = required(&format!("{at}.host_path"), device.host_path)?;
        if !device.permissions.bytes().all(|b| b"rwm".contains(&b)) {
            let text = format!("{:?} has more than r, w and m", device.permissions);
            return Err(Error::invalid(format!("{at}.permissions"), text));
        }
        let container_path = match device.container_path.as_str() {
            "" => host_path.clone(),
            _ => device.container_path,
        };
        let permissions = match device.permissions.as_str() {
            "" => "rwm".to_owned(),
            _ => device.permissions,
        };
        devices.push(DeviceRequest {
            container_path,
            host_path,
            permissions,
        });
    }
    Ok(devices)
}

fn security(from: cri::LinuxContainerSecurityContext) -> Result<SecurityRequest> {
    let at = "config.linux.security_context";
    let capabilities = from.capabilities.unwrap_or_default();
    let number = |name: &str, value: Option<cri::Int64Value>| match value {
        Some(value) => identity(&format!("{at}.{name}"), value.value).map(Some),
        None => Ok(None),
    };
    let user = UserRequest {
        uid: number("run_as_user", from.run_as_user)?,
        gid: number("run_as_group", from.run_as_group)?,
        username: from.run_as_username,
        supplemental_groups: groups(
            &format!("{at}.supplemental_groups"),
            from.supplemental_groups,
        )?,
        strict_groups: from.supplemental_groups_policy
            == cri::SupplementalGroupsPolicy::Strict as i32,
    };
    if user.gid.is_some() && user.uid.is_none() && user.username.is_empty() {
        let why = "is set without run_as_user or run_as_username";
        return Err(Error::invalid(format!("{at}.run_as_group"), why));
    }
    Ok(SecurityRequest {
        privileged: from.privileged,
        namespaces: namespaces(from.namespace_options, at)?,
        user,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        readonly_rootfs: from.readonly_rootfs,
        no_new_privs: from.no_new_privs,
        masked_paths: from.masked_paths,
        readonly_paths: from.readonly_paths,
        seccomp: seccomp(from.seccomp, &from.seccomp_profile_path, at)?,
        apparmor: apparmor(from.apparmor, &from.apparmor_profile, at)?,
        selinux: selinux(from.selinux_options, &format!("{at}.selinux_options"))?,
    })
}

/// A uid or gid: 32 bits, and not the value that means "none" to the kernel.
fn identity(field: &str, value: i64) -> Result<u32> {
    match u32::try_from(value) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(Error::invalid(
            field,
            format!("{value} is no user or group id"),
        )),
    }
}

fn groups(field: &str, values: Vec<i64>) -> Result<Vec<u32>> {
    values.into_iter().map(|v| identity(field, v)).collect()
}

/// Parses a label selector: it is kept as it is.
pub fn labels_match(
    selector: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn minimal() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn with_security(
        change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
    ) -> Result<ContainerConfig> {
        let mut config = minimal();
        let mut security = cri::LinuxContainerSecurityContext::default();
        change(&mut security);
        config.linux = Some(cri::LinuxContainerConfig {
            resources: None,
            security_context: Some(security),
        });
        container_config(Some(config))
    }

    #[test]
    fn uid_4294967295_is_refused_by_name() {
        let error = with_security(|s| s.run_as_user = Some(cri::Int64Value { value: 0xFFFF_FFFF }))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(
            error.to_string(),
            "config.linux.security_context.run_as_user: 4294967295 is no user or group id"
        );
    }

    #[test]
    fn group_without_user_is_refused() {
        let error = with_security(|s| s.run_as_group = Some(cri::Int64Value { value: 5 }));
        assert!(error.unwrap_err().to_string().contains("run_as_group"));
    }

    #[test]
    fn unsupported_fields_are_named() {
        let mut config = minimal();
        config.cdi_devices = vec![cri::CdiDevice {
            name: "vendor.com/gpu=0".into(),
        }];
        let error = container_config(Some(config)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unimplemented);
        assert!(error.to_string().contains("CDI_devices"), "{error}");
    }

    #[test]
    fn recursive_read_only_needs_readonly_and_private() {
        let mount = |readonly, propagation| cri::Mount {
            container_path: "/c".into(),
            host_path: "/h".into(),
            recursive_read_only: true,
            readonly,
            propagation,
            ..Default::default()
        };
        assert!(one_mount(mount(false, 0), "m").is_err());
        assert!(one_mount(mount(true, 1), "m").is_err());
        assert!(one_mount(mount(true, 0), "m").is_ok());
    }

    #[test]
    fn slice_parent_is_refused_under_cgroupfs() {
        let error = cgroup_parent("kubepods.slice".into()).unwrap_err();
        assert!(error.to_string().contains("cgroup_parent"), "{error}");
    }
}
