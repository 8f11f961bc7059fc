//! Owns CreateContainer: snapshot, volumes and config.json, or nothing at all. No process exists
//! yet afterwards.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_image_store::Image;

use super::config::ContainerConfig;
use super::state::{ContainerState, decide};
use super::{Container, ContainerRecord, Fixed, Live};
use crate::daemon::{Daemon, blocking, now_ns};
use crate::error::{Error, Kind, Result};
use crate::events::EventKind;
use crate::id::ContainerId;
use crate::sandbox::config::NamespaceMode;
use crate::sandbox::{self, Sandbox};
use crate::signal;
use crate::spec_builder::document::{Namespace, Spec, User};
use crate::spec_builder::mounts::ImageVolume;
use crate::spec_builder::user::Accounts;
use crate::spec_builder::{self, image_root};
use crate::store::records::{Table, make_private_dir};

impl Daemon {
    /// Makes a container and answers with its id.
    pub async fn create_container(
        self: &Arc<Self>,
        sandbox: Arc<Sandbox>,
        config: ContainerConfig,
    ) -> Result<ContainerId> {
        let fingerprint = serde_json::to_string(&config).unwrap_or_default();
        let key = (sandbox.fixed.id.clone(), config.name.clone());
        let name = format!("{}_{}", config.name.name, config.name.attempt);
        let daemon = self.clone();
        let in_sandbox = sandbox.id().to_owned();
        let work = async move {
            let _step = sandbox.step.read().await;
            daemon.make_container(&sandbox, config).await
        };
        self.container_names
            .run(key, fingerprint, work, |id| {
                let what = format!("container name {name:?} in sandbox {in_sandbox} is taken");
                Error::new(
                    Kind::AlreadyExists,
                    what,
                    format!("it belongs to container {id}"),
                )
            })
            .await
    }

    async fn make_container(
        self: Arc<Self>,
        sandbox: &Arc<Sandbox>,
        config: ContainerConfig,
    ) -> Result<ContainerId> {
        require_ready(sandbox)?;
        let image = self
            .images
            .resolve(&config.image.image)
            .ok_or_else(|| Error::not_found("image", &config.image.image))?;
        check_against_pod(sandbox, &config)?;
        let id = ContainerId::random()?;
        let fixed = self.plan_container(id.clone(), sandbox, config, &image)?;
        let live = Live {
            resources: fixed.config.resources.clone(),
            state: ContainerState::Creating,
        };
        let mut record = ContainerRecord { fixed, live };
        let built = self.build_container(&mut record, sandbox, &image).await;
        if let Err(error) = built {
            let error = error.within("create container", record.fixed.config.name.name.clone());
            return match self.erase_container(&record.fixed).await {
                Ok(()) => Err(error),
                Err(left) => Err(error.within("clean-up failed too", left.to_string())),
            };
        }
        let container = Arc::new(Container::new(record));
        container.change(&self.records, |live| live.state = ContainerState::Created)?;
        self.registry.containers.insert(id.as_str(), container);
        self.events
            .publish(EventKind::Created, id.as_str(), sandbox.id());
        Ok(id)
    }

    fn plan_container(
        &self,
        id: ContainerId,
        sandbox: &Sandbox,
        config: ContainerConfig,
        image: &Image,
    ) -> Result<Fixed> {
        let log_path = log_path(&sandbox.fixed.config.log_directory, &config.log_path);
        let cgroup_parent = sandbox.fixed.cgroup_parent.trim_end_matches('/');
        Ok(Fixed {
            sandbox_id: sandbox.fixed.id.clone(),
            image_id: image.id.to_string(),
            image_ref: image
                .repo_digests
                .first()
                .cloned()
                .unwrap_or(image.id.to_string()),
            user: User::default(),
            stop_signal: stop_signal(&config, image)?,
            created_at_ns: now_ns(),
            boot_id: self.host.boot_id.clone(),
            bundle: self.bundle(&id),
            volumes: self.volumes_dir(&id),
            log_path,
            cgroups_path: format!("{cgroup_parent}/{id}"),
            id,
            config,
        })
    }

    async fn build_container(
        self: &Arc<Self>,
        record: &mut ContainerRecord,
        sandbox: &Arc<Sandbox>,
        image: &Image,
    ) -> Result<()> {
        // The record is the intent: after a crash the next start undoes what it names.
        let id = record.fixed.id.clone();
        self.records.save(Table::Containers, id.as_str(), record)?;
        let namespaces = self.namespaces(sandbox, &record.fixed.config).await?;
        let (daemon, fixed, sandbox) = (self.clone(), record.fixed.clone(), sandbox.clone());
        let image = image.clone();
        let spec = blocking(move || daemon.write_container(&fixed, &sandbox, &image, namespaces));
        record.fixed.user = spec.await?.process.user;
        Ok(())
    }

    fn write_container(
        &self,
        fixed: &Fixed,
        sandbox: &Sandbox,
        image: &Image,
        namespaces: Vec<Namespace>,
    ) -> Result<Spec> {
        make_private_dir(&fixed.bundle)?;
        let rootfs = fixed.bundle.join("rootfs");
        std::fs::create_dir(&rootfs).map_err(|e| Error::io("mkdir", rootfs.display(), e))?;
        self.images.create_snapshot(fixed.id.as_str(), &image.id)?;
        let layers = self.images.layer_dirs(&image.id)?;
        let accounts = self.accounts.read(&fixed.image_id, &layers)?;
        let volumes = volumes(fixed, image, &layers)?;
        if let Some(dir) = fixed.log_path.as_deref().and_then(Path::parent) {
            std::fs::create_dir_all(dir).map_err(|e| Error::io("mkdir", dir.display(), e))?;
        }
        let spec = self.spec(fixed, sandbox, image, &accounts, (namespaces, &volumes))?;
        let json = serde_json::to_vec(&spec)
            .map_err(|e| Error::io("serialise config.json", fixed.id.as_str(), e))?;
        let path = fixed.bundle.join("config.json");
        std::fs::write(&path, json).map_err(|e| Error::io("write", path.display(), e))?;
        Ok(spec)
    }

    fn spec(
        &self,
        fixed: &Fixed,
        sandbox: &Sandbox,
        image: &Image,
        accounts: &Accounts,
        (namespaces, volumes): (Vec<Namespace>, &[ImageVolume]),
    ) -> Result<Spec> {
        spec_builder::build(spec_builder::Input {
            config: &fixed.config,
            image: &image.config,
            accounts,
            hostname: &sandbox.fixed.hostname,
            pod_mounts: &sandbox::files::mounts(&sandbox.fixed),
            volumes,
            namespaces,
            cgroups_path: fixed.cgroups_path.clone(),
            annotations: annotations(fixed, sandbox),
            host: &self.host,
        })
    }

    /// The namespaces of a container: its own, the pod's pinned ones, those of other processes.
    async fn namespaces(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
    ) -> Result<Vec<Namespace>> {
        let fixed = &sandbox.fixed;
        let own = |kind: &str| Namespace {
            kind: kind.to_owned(),
            path: String::new(),
        };
        let joined = |kind: &str, path: PathBuf| Namespace {
            kind: kind.to_owned(),
            path: path.display().to_string(),
        };
        let mut namespaces = vec![own("mount")];
        for (kind, path) in [
            ("network", &fixed.netns),
            ("ipc", &fixed.ipc),
            ("uts", &fixed.uts),
        ] {
            namespaces.extend(path.clone().map(|path| joined(kind, path)));
        }
        let of = |pid: u32| joined("pid", PathBuf::from(format!("/proc/{pid}/ns/pid")));
        match config.security.namespaces.pid {
            NamespaceMode::Container => namespaces.push(own("pid")),
            NamespaceMode::Pod => namespaces.push(of(self.pod_init(sandbox).await?)),
            NamespaceMode::Target => {
                let target = &config.security.namespaces.target_id;
                namespaces.push(of(self.target_pid(sandbox, target)?));
            }
            NamespaceMode::Node => {}
        }
        // A cgroup namespace hides the host's tree; with v1 containerd makes none either.
        if self.host.unified && !config.security.privileged {
            namespaces.push(own("cgroup"));
        }
        Ok(namespaces)
    }

    fn target_pid(&self, sandbox: &Sandbox, target: &str) -> Result<u32> {
        let field = "config.linux.security_context.namespace_options.target_id";
        let container = self
            .registry
            .containers
            .find(target)
            .map_err(|e| e.within(field, ""))?;
        if container.fixed.sandbox_id != sandbox.fixed.id {
            let text = format!("container {target} is in another sandbox");
            return Err(Error::invalid(field, text));
        }
        container
            .pid()
            .ok_or_else(|| Error::state(field, format!("{target} is not running")))
    }

    /// Removes everything that a container may have outside the shim. Idempotent.
    pub async fn erase_container(self: &Arc<Self>, fixed: &Fixed) -> Result<()> {
        let (daemon, fixed) = (self.clone(), fixed.clone());
        blocking(move || {
            daemon.images.remove_snapshot(fixed.id.as_str())?;
            for dir in [&fixed.bundle, &fixed.volumes] {
                match std::fs::remove_dir_all(dir) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io("remove", dir.display(), e));
                    }
                    _ => {}
                }
            }
            daemon.records.remove(Table::Containers, fixed.id.as_str())
        })
        .await
    }
}

/// The sandbox must be ready for a new container.
pub fn require_ready(sandbox: &Sandbox) -> Result<()> {
    use crate::sandbox::state::{Decision, Request, decide};
    match decide(sandbox.state(), Request::CreateContainer) {
        Decision::Proceed => Ok(()),
        Decision::Deny(why) => Err(Error::state(format!("sandbox {}", sandbox.id()), why)),
        Decision::StopFirst | Decision::AlreadyDone => Err(Error::state(
            format!("sandbox {}", sandbox.id()),
            "not ready",
        )),
    }
}

/// The container must be in a state that allows the request.
pub fn require(container: &Container, request: super::state::Request) -> Result<()> {
    use super::state::Decision;
    match decide(&container.state(), request) {
        Decision::Proceed | Decision::KillFirst | Decision::AlreadyDone => Ok(()),
        Decision::Deny(why) => Err(Error::state(format!("container {}", container.id()), why)),
    }
}

fn check_against_pod(sandbox: &Sandbox, config: &ContainerConfig) -> Result<()> {
    let at = "config.linux.security_context";
    let pod = &sandbox.fixed.config;
    if config.security.privileged && !pod.privileged {
        let text = "a privileged container needs a privileged sandbox";
        return Err(Error::invalid(format!("{at}.privileged"), text));
    }
    let modes = &config.security.namespaces;
    for (name, asked, of_pod) in [
        ("network", modes.network, pod.namespaces.network),
        ("ipc", modes.ipc, pod.namespaces.ipc),
    ] {
        if asked == NamespaceMode::Node && of_pod != NamespaceMode::Node {
            let text = "is NODE, but the sandbox has a namespace of its own";
            return Err(Error::invalid(
                format!("{at}.namespace_options.{name}"),
                text,
            ));
        }
    }
    Ok(())
}

fn log_path(directory: &str, path: &str) -> Option<PathBuf> {
    (!directory.is_empty() && !path.is_empty()).then(|| Path::new(directory).join(path))
}

/// CRI's signal, else the image's, else TERM.
fn stop_signal(config: &ContainerConfig, image: &Image) -> Result<i32> {
    if let Some(signal) = signal::from_cri(config.stop_signal) {
        return Ok(signal);
    }
    match image.config.stop_signal.as_deref() {
        None | Some("") => Ok(libc::SIGTERM),
        Some(text) => signal::from_name(text).ok_or_else(|| {
            let why = format!("{text:?} is no signal");
            Error::invalid(format!("STOPSIGNAL of image {}", image.id), why)
        }),
    }
}

/// Makes a directory for each VOLUME of the image, with the image's content.
fn volumes(fixed: &Fixed, image: &Image, layers: &[PathBuf]) -> Result<Vec<ImageVolume>> {
    if image.config.volumes.is_empty() {
        return Ok(Vec::new());
    }
    let failed = |e| Error::io("open image", fixed.image_id.as_str(), e);
    let root = image_root::open(layers).map_err(failed)?;
    let mut volumes = Vec::new();
    for (i, path) in image.config.volumes.iter().enumerate() {
        let destination = spec_builder::mounts::clean(path);
        if destination == "/" {
            return Err(Error::invalid(
                format!("VOLUME of image {}", image.id),
                "is /",
            ));
        }
        let source = fixed.volumes.join(i.to_string());
        make_private_dir(&fixed.volumes)?;
        std::fs::DirBuilder::new()
            .mode(0o755)
            .create(&source)
            .map_err(|e| Error::io("mkdir", source.display(), e))?;
        image_root::seed_volume(&root, &destination, &source)?;
        volumes.push(ImageVolume {
            destination,
            source,
        });
    }
    Ok(volumes)
}

/// The marks by which tools (NVIDIA's hook, Kata, debuggers) recognise a CRI container; the
/// client's own annotations are data and do not go into the spec.
fn annotations(fixed: &Fixed, sandbox: &Sandbox) -> BTreeMap<String, String> {
    let pod = &sandbox.fixed.config.name;
    let pairs = [
        ("container-type", "container"),
        ("container-name", &fixed.config.name.name),
        ("sandbox-id", sandbox.id()),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("image-name", &fixed.config.image.image),
    ];
    pairs
        .into_iter()
        .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value.to_owned()))
        .collect()
}
