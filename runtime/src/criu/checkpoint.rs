//! `checkpoint`: a container's processes into images.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use coracle_oci::record::{CgroupRecord, ContainerRecord};
use coracle_oci::spec::LinuxNamespaceType;

use super::rpc::{self, Features, Notify, PageServer, Request, RequestType};
use super::swrk::{Criu, Notified, Swrk};
use super::{Directories, EXTERNAL_NETWORK, EXTERNAL_PID, OLDEST, Options};
use super::{config_file, descriptors, make_directory, mounts, namespace_key};
use super::{need_mount_namespace, quote};
use crate::cli::GlobalArgs;
use crate::error::{Error, Result};
use crate::host::HostFacts;
use crate::log;
use crate::plan::{Input, LaunchOptions, Plan};
use crate::spec::CheckedSpec;
use crate::state::Container;

/// The first version that freezes by a v2 cgroup.
const FREEZES_V2: i32 = 31_400;

/// The first version that notifies when its page server is ready.
const NOTIFIES_STATUS: i32 = 31_500;

/// What a checkpoint has on its command line beside what a restore has, too.
#[derive(Debug, Default)]
pub struct Extra {
    /// Relative to the image directory, as CRIU wants it.
    pub parent: Option<String>,
    pub leave_running: bool,
    pub pre_dump: bool,
    pub tcp_skip_in_flight: bool,
    pub link_remap: bool,
    pub page_server: Option<(String, i32)>,
    /// Where to say that the page server is ready.
    pub status: Option<OwnedFd>,
}

/// Writes the images. Without `leave_running` and `pre_dump` the container's processes are gone
/// afterwards.
///
/// # Errors
/// CRIU is missing, too old, or fails: then the container goes on running.
pub fn checkpoint(
    container: &Container,
    options: &Options,
    mut extra: Extra,
    global: &GlobalArgs,
) -> Result<Plan> {
    let criu = Criu::find(OLDEST)?;
    make_directory(&options.images)?;
    let directories = Directories::open(options, "dump.log")?;
    let plan = plan(container)?;
    need_mount_namespace(&plan)?;
    let mut opts = directories.options(options);
    describe(&mut opts, &container.record, &extra);
    external_namespaces(&mut opts, &plan, criu)?;
    opts.freeze_cgroup = freezer(&container.record.cgroup, criu);
    if extra.pre_dump {
        criu.require(Features {
            mem_track: Some(true),
            ..Features::default()
        })?;
    }
    if options.lazy_pages {
        criu.require(Features {
            lazy_pages: Some(true),
            ..Features::default()
        })?;
        if !criu.has(NOTIFIES_STATUS) {
            opts.status_fd = extra.status.as_ref().map(|fd| fd.as_raw_fd());
        }
    }
    let kind = match extra.pre_dump {
        true => RequestType::PreDump,
        false => RequestType::Dump,
    };
    if !extra.pre_dump {
        opts.ext_mnt = mounts::of_running(&plan, container.record.init_pid)?;
        let stdio = descriptors::of_process(container.record.init_pid);
        descriptors::write(&directories.images, &stdio)?;
    }
    let mut request = Request::new(kind);
    log::debug(global, || format!("Using CRIU in {kind:?} mode: {opts:?}"));
    request.opts = Some(opts);
    let mut status = Status {
        by_number: request
            .opts
            .as_ref()
            .is_some_and(|opts| opts.status_fd.is_some()),
        file: extra.status.take(),
        global,
    };
    Swrk::spawn(false, &[])?
        .ask(&request, &mut status)
        .map_err(|error| quote::explain(global, error, &directories.log))?;
    Ok(plan)
}

/// What the container was made from, planned again.
fn plan(container: &Container) -> Result<Plan> {
    let host = HostFacts::probe()?;
    let spec = CheckedSpec::check(&container.entry.config()?, &host)?;
    Plan::new(Input {
        id: container.id(),
        bundle: &container.record.bundle,
        spec: &spec,
        host: &host,
        cgroup: &container.record.cgroup,
        options: &LaunchOptions::default(),
    })
}

fn describe(opts: &mut rpc::Options, record: &ContainerRecord, extra: &Extra) {
    opts.root = Some(record.rootfs.to_string_lossy().into_owned());
    opts.pid = Some(record.init_pid);
    opts.config_file = config_file(&record.annotations);
    opts.leave_running = Some(extra.leave_running);
    opts.tcp_skip_in_flight = Some(extra.tcp_skip_in_flight);
    opts.link_remap = Some(extra.link_remap);
    opts.ps = extra
        .page_server
        .as_ref()
        .map(|(address, port)| PageServer {
            address: Some(address.clone()),
            port: Some(*port),
        });
    if let Some(parent) = &extra.parent {
        opts.parent_img = Some(parent.clone());
        opts.track_mem = Some(true);
    }
}

/// Network and pid namespaces that the container has joined stay where they are.
fn external_namespaces(opts: &mut rpc::Options, plan: &Plan, criu: Criu) -> Result<()> {
    for join in &plan.namespaces.joins {
        let (name, least) = match join.kind {
            LinuxNamespaceType::Network => ("net", EXTERNAL_NETWORK),
            LinuxNamespaceType::Pid => ("pid", EXTERNAL_PID),
            _ => continue,
        };
        if !criu.has(least) {
            return Err(Error::unsupported(format!(
                "criu lacks support for external {name} namespace during checkpointing process \
                 (old criu version?)"
            )));
        }
        let path = join.path.to_string_lossy();
        let inode = std::fs::metadata(path.as_ref())
            .map_err(|error| Error::system("stat", path.as_ref(), error))?
            .ino();
        opts.external
            .push(format!("{name}[{inode}]:{}", namespace_key(name)));
    }
    Ok(())
}

/// The cgroup by which CRIU stops the processes. Without one it stops them one by one.
fn freezer(cgroup: &CgroupRecord, criu: Criu) -> Option<String> {
    let path = match cgroup {
        CgroupRecord::None => None,
        CgroupRecord::V2 { path, .. } => criu.has(FREEZES_V2).then_some(path),
        CgroupRecord::V1 { paths, .. } => paths
            .iter()
            .find(|(key, _)| key.split(',').any(|name| name == "freezer"))
            .map(|(_, path)| path),
    };
    path.map(|path| path.to_string_lossy().into_owned())
}

/// Tells whoever waits for the page server.
struct Status<'a> {
    file: Option<OwnedFd>,
    /// CRIU itself writes to it, and has opened it by number once it has answered anything.
    by_number: bool,
    global: &'a GlobalArgs,
}

impl Notified for Status<'_> {
    fn notified(&mut self, notify: &Notify, _: Option<OwnedFd>) -> Result<()> {
        log::debug(self.global, || format!("notify: {}", notify.script()));
        if notify.script() == "status-ready"
            && let Some(file) = self.file.take()
            && let Err(error) = rustix::io::write(&file, &[0])
        {
            log::warning(
                self.global,
                &format!("can't write \\0 to status fd: {error}"),
            );
        }
        Ok(())
    }

    fn accepted(&mut self) {
        if self.by_number {
            self.file = None;
        }
    }
}
