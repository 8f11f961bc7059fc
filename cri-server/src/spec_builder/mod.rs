//! Owns the way from what CRI asked for to the config.json of a container:
//!
//! ```text
//! ContainerConfig + image config + pod + HostFacts
//!   -> user, capabilities, seccomp, mounts, devices, resources -> Spec
//! ```
//! containerd's translation is followed, because that is what workloads are written against.
//! Nothing here talks to the shim, and no process is started.

pub mod capabilities;
pub mod devices;
pub mod document;
pub mod host_files;
pub mod image_root;
pub mod mounts;
pub mod resources;
pub mod seccomp;
pub mod user;

use std::collections::BTreeMap;
use std::path::Path;

use coracle_image_store::ImageConfig;

use crate::container::config::{AppArmorRequest, ContainerConfig, SecurityRequest};
use crate::error::{Error, Result};
use crate::host::HostFacts;
use document::{Linux, Namespace, Process, Root, Spec};

const OCI_VERSION: &str = "1.2.0";
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// containerd's list, which the kubelet also sends.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Everything that a spec depends on.
pub struct Input<'a> {
    /// The request.
    pub config: &'a ContainerConfig,
    /// The image's part.
    pub image: &'a ImageConfig,
    /// The image's accounts.
    pub accounts: &'a user::Accounts,
    /// The pod's name in its UTS namespace.
    pub hostname: &'a str,
    /// The pod's files.
    pub pod_mounts: &'a mounts::PodMounts,
    /// Image volumes.
    pub volumes: &'a [mounts::ImageVolume],
    /// Namespaces to join or make.
    pub namespaces: Vec<Namespace>,
    /// `linux.cgroupsPath`
    pub cgroups_path: String,
    /// Marks for tools that look at running containers.
    pub annotations: BTreeMap<String, String>,
    /// The host.
    pub host: &'a HostFacts,
}

/// Builds the spec of a container.
pub fn build(input: Input<'_>) -> Result<Spec> {
    let config = input.config;
    let security = &config.security;
    let capabilities = capabilities::plan(security, &input.host.capabilities)?;
    let user = user::resolve(&security.user, &input.image.user, input.accounts)?;
    let mounts = mounts::plan(config, input.pod_mounts, input.volumes)?;
    let devices = devices::plan(&config.devices, security.privileged)?;
    let mut resources = match &config.resources {
        Some(request) => resources::plan(request, input.host)?,
        None => document::LinuxResources::default(),
    };
    resources.devices = devices.rules;
    let seccomp = seccomp::profile(
        security.seccomp.as_ref(),
        security.privileged,
        &capabilities.bounding,
    )?;
    let process = Process {
        terminal: config.tty,
        user,
        args: args(config, input.image)?,
        env: env(config, input.image, input.hostname),
        cwd: cwd(config, input.image),
        capabilities,
        rlimits: Vec::new(),
        no_new_privileges: security.no_new_privs,
        apparmor_profile: apparmor(security, input.host)?,
        oom_score_adj: oom_score_adj(config, input.host),
    };
    Ok(Spec {
        oci_version: OCI_VERSION.to_owned(),
        process,
        root: Root {
            path: "rootfs".to_owned(),
            readonly: security.readonly_rootfs,
        },
        hostname: String::new(),
        mounts: mounts.mounts,
        annotations: input.annotations,
        linux: Linux {
            namespaces: input.namespaces,
            devices: devices.nodes,
            cgroups_path: input.cgroups_path,
            resources,
            rootfs_propagation: mounts.rootfs_propagation.to_owned(),
            seccomp,
            masked_paths: paths(security, &security.masked_paths, &MASKED_PATHS),
            readonly_paths: paths(security, &security.readonly_paths, &READONLY_PATHS),
        },
    })
}

/// What was asked for. Where nothing was, a container gets 0: it would inherit the shim's value,
/// which is near our own protected one.
fn oom_score_adj(config: &ContainerConfig, host: &HostFacts) -> Option<i64> {
    let inherited = (host.oom_score_adj <= 0).then_some(0);
    let asked = config.resources.as_ref().map(|r| r.oom_score_adj);
    asked.or(inherited)
}

fn paths(security: &SecurityRequest, asked: &[String], default: &[&str]) -> Vec<String> {
    if security.privileged {
        return Vec::new();
    }
    if asked.is_empty() {
        return default.iter().map(|p| (*p).to_owned()).collect();
    }
    asked.to_vec()
}

/// `command` replaces the entrypoint and drops the image's cmd; `args` replaces cmd only.
fn args(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let (entrypoint, cmd) = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => (&config.command, &config.args),
        (true, false) => (&image.entrypoint, &config.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<String> = entrypoint.iter().chain(cmd).cloned().collect();
    if args.is_empty() {
        let text = "neither the request nor the image has a command";
        return Err(Error::invalid("config.command", text));
    }
    Ok(args)
}

/// The image's environment under the request's, each name once.
fn env(config: &ContainerConfig, image: &ImageConfig, hostname: &str) -> Vec<String> {
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if config.tty {
        env.push("TERM=xterm".to_owned());
    }
    let image = image.env.iter().cloned();
    let asked = config
        .envs
        .iter()
        .map(|(key, value)| format!("{key}={value}"));
    for pair in image.chain(asked) {
        let name_len = pair.find('=').unwrap_or(pair.len());
        let same = |known: &String| {
            known.get(..name_len) == pair.get(..name_len)
                && known.as_bytes().get(name_len) == Some(&b'=')
        };
        match env.iter_mut().find(|known| same(known)) {
            Some(known) => *known = pair,
            None => env.push(pair),
        }
    }
    env
}

fn cwd(config: &ContainerConfig, image: &ImageConfig) -> String {
    [&config.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty())
        .map_or("/".to_owned(), |dir| match Path::new(dir).is_absolute() {
            true => dir.clone(),
            false => format!("/{dir}"),
        })
}

fn apparmor(security: &SecurityRequest, host: &HostFacts) -> Result<String> {
    let field = "config.linux.security_context.apparmor";
    match &security.apparmor {
        None | Some(AppArmorRequest::Unconfined) => Ok(String::new()),
        _ if security.privileged => Ok(String::new()),
        Some(_) if !host.apparmor => Err(Error::unsupported(
            field,
            "AppArmor is not enabled on this host",
        )),
        Some(AppArmorRequest::RuntimeDefault) => Err(Error::unsupported(
            field,
            "there is no default AppArmor profile yet; name a loaded one with Localhost",
        )),
        Some(AppArmorRequest::Localhost(name)) => {
            let path = "/sys/kernel/security/apparmor/profiles";
            let loaded = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
            let known = |line: &str| line.rsplit_once(" (").is_some_and(|(n, _)| n == name);
            if loaded.lines().any(known) {
                return Ok(name.clone());
            }
            let text = format!("profile {name:?} is not loaded");
            Err(Error::invalid(format!("{field}.localhost_ref"), text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::config::{ContainerName, ImageRequest};

    fn config() -> ContainerConfig {
        ContainerConfig {
            name: ContainerName {
                name: "c".to_owned(),
                attempt: 0,
            },
            image: ImageRequest::default(),
            command: Vec::new(),
            args: Vec::new(),
            working_dir: String::new(),
            envs: Vec::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            log_path: String::new(),
            stdin: false,
            stdin_once: false,
            tty: false,
            resources: None,
            security: SecurityRequest::default(),
            stop_signal: 0,
        }
    }

    fn image() -> ImageConfig {
        let list = |items: &[&str]| items.iter().map(|i| (*i).to_owned()).collect();
        ImageConfig {
            entrypoint: list(&["/entry", "point"]),
            cmd: list(&["cmd"]),
            env: list(&["PATH=/image", "A=1", "AB=2"]),
            ..ImageConfig::default()
        }
    }

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(|i| (*i).to_owned()).collect()
    }

    #[test]
    fn command_replaces_entrypoint_and_drops_cmd() {
        for (command, given, expected) in [
            (&[][..], &[][..], &["/entry", "point", "cmd"][..]),
            (&["c"], &[], &["c"]),
            (&[], &["a"], &["/entry", "point", "a"]),
            (&["c"], &["a"], &["c", "a"]),
        ] {
            let mut config = config();
            config.command = strings(command);
            config.args = strings(given);
            assert_eq!(args(&config, &image()).unwrap(), strings(expected));
        }
        assert!(args(&config(), &ImageConfig::default()).is_err());
    }

    #[test]
    fn request_overrides_the_image_environment() {
        let mut config = config();
        config.envs = vec![
            ("A".to_owned(), "x=y".to_owned()),
            ("N".to_owned(), String::new()),
        ];
        assert_eq!(
            env(&config, &image(), "host"),
            strings(&["PATH=/image", "HOSTNAME=host", "A=x=y", "AB=2", "N="])
        );
    }

    #[test]
    fn build_makes_a_complete_document() {
        let mut config = config();
        config.security.readonly_rootfs = true;
        let pod_mounts = mounts::PodMounts {
            hostname: "/p/hostname".into(),
            hosts: "/p/hosts".into(),
            resolv_conf: "/p/resolv.conf".into(),
            shm: "/p/shm".into(),
        };
        let spec = build(Input {
            config: &config,
            image: &image(),
            accounts: &user::Accounts::default(),
            hostname: "h",
            pod_mounts: &pod_mounts,
            volumes: &[],
            namespaces: Vec::new(),
            cgroups_path: "/p/c".to_owned(),
            annotations: BTreeMap::new(),
            host: &HostFacts::for_tests(),
        })
        .unwrap();
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["process"]["cwd"], "/");
        assert_eq!(json["root"]["readonly"], true);
        assert_eq!(json["process"]["oomScoreAdj"], 0);
        assert_eq!(json["linux"]["maskedPaths"].as_array().unwrap().len(), 12);
        assert_eq!(
            json["process"]["capabilities"]["bounding"]
                .as_array()
                .unwrap()
                .len(),
            14
        );
        assert!(json["linux"].get("seccomp").is_none());
        let hosts = spec
            .mounts
            .iter()
            .find(|m| m.destination == "/etc/hosts")
            .unwrap();
        assert!(hosts.options.contains(&"ro".to_owned()));
        assert_eq!(serde_json::from_value::<Spec>(json).unwrap(), spec);
    }
}
