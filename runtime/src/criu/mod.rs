//! Checkpoint and restore, which CRIU does: what it is told, and what is done around it.
//!
//! ```text
//! checkpoint: record + config.json -> Plan -> request --swrk--> images, descriptors.json
//! restore:    bundle -> Plan -> intent -> cgroup, root --swrk--> notifications -> record
//! ```
//! The options are runc's, one by one, and so are the files: images made under one runtime restore
//! under the other. CRIU is a program of the host that is found in $PATH; nothing of it is linked.

pub mod checkpoint;
mod descriptors;
mod host_cgroup;
mod mounts;
mod quote;
pub mod restore;
mod root;
mod rpc;
mod swrk;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_oci::spec::LinuxNamespaceType;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::plan::{Plan, namespace_flag};

/// CRIU 3.0 answers for its version, and before 3.11 it knows no configuration files.
const OLDEST: i32 = 30_000;
const EXTERNAL_NETWORK: i32 = 31_100;
const EXTERNAL_PID: i32 = 31_500;

const LOG_LEVEL: i32 = 4;

/// What both directions have in common on the command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub images: PathBuf,
    pub work: Option<PathBuf>,
    pub tcp_established: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub file_locks: bool,
    pub auto_dedup: bool,
    pub lazy_pages: bool,
    pub cgroups: ManageCgroups,
}

/// `--manage-cgroups-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManageCgroups {
    #[default]
    Default,
    Soft,
    Full,
    Strict,
    Ignore,
}

impl ManageCgroups {
    /// # Errors
    /// Not one of the words that runc takes.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "" => Self::Default,
            "soft" => Self::Soft,
            "full" => Self::Full,
            "strict" => Self::Strict,
            "ignore" => Self::Ignore,
            _ => return Err(Error::invalid("invalid manage-cgroups-mode value")),
        })
    }

    fn wire(self) -> i32 {
        let mode = match self {
            Self::Default => rpc::CgroupMode::Default,
            Self::Soft => rpc::CgroupMode::Soft,
            Self::Full => rpc::CgroupMode::Full,
            Self::Strict => rpc::CgroupMode::Strict,
            Self::Ignore => rpc::CgroupMode::Ignore,
        };
        mode as i32
    }
}

/// The directories of the images and of the log, open: CRIU reads them through our descriptors.
struct Directories {
    images: OwnedFd,
    work: Option<OwnedFd>,
    log: PathBuf,
}

impl Directories {
    /// `log` is the name of CRIU's log file, in the work directory.
    fn open(options: &Options, log: &str) -> Result<Self> {
        let work = options.work.as_deref().map(|path| {
            make_directory(path)?;
            open_directory(path)
        });
        let log_dir = options.work.as_deref().unwrap_or(&options.images);
        Ok(Self {
            images: open_directory(&options.images)?,
            work: work.transpose()?,
            log: std::path::absolute(log_dir)
                .unwrap_or_else(|_| log_dir.to_owned())
                .join(log),
        })
    }

    /// Has a request name them by these descriptors.
    fn point(&self, opts: &mut rpc::Options) {
        opts.images_dir_fd = self.images.as_raw_fd();
        opts.work_dir_fd = self.work.as_ref().map(|fd| fd.as_raw_fd());
    }

    /// What a request says about them, and about everything that both directions share.
    fn options(&self, options: &Options) -> rpc::Options {
        rpc::Options {
            images_dir_fd: self.images.as_raw_fd(),
            work_dir_fd: self.work.as_ref().map(|fd| fd.as_raw_fd()),
            log_level: Some(LOG_LEVEL),
            log_file: self
                .log
                .file_name()
                .map(|name| name.to_string_lossy().into_owned()),
            manage_cgroups: Some(true),
            manage_cgroups_mode: Some(options.cgroups.wire()),
            notify_scripts: Some(true),
            orphan_pts_master: Some(true),
            shell_job: Some(options.shell_job),
            ext_unix_sk: Some(options.ext_unix_sk),
            tcp_established: Some(options.tcp_established),
            file_locks: Some(options.file_locks),
            auto_dedup: Some(options.auto_dedup),
            lazy_pages: Some(options.lazy_pages),
            // Interfaces and routes are the engine's; the namespace itself is restored empty.
            empty_ns: Some(libc::CLONE_NEWNET.cast_unsigned()),
            ..rpc::Options::default()
        }
    }
}

/// Makes one directory, unless it is there.
fn make_directory(path: &Path) -> Result<()> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(Error::system("mkdir", path.display().to_string(), error)),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| Error::system("open", path.display().to_string(), error))
}

/// The annotation that names a configuration file for CRIU, whose settings go before ours.
const CONFIG_ANNOTATION: &str = "org.criu.config";

/// Without the annotation: what the administrator has set for containers. An empty annotation
/// asks for none.
fn config_file(annotations: &BTreeMap<String, String>) -> Option<String> {
    if let Some(path) = annotations.get(CONFIG_ANNOTATION) {
        return (!path.is_empty()).then(|| path.clone());
    }
    let own = "/etc/criu/coracle.conf";
    let file = match Path::new(own).exists() {
        true => own,
        false => "/etc/criu/runc.conf",
    };
    Some(file.to_owned())
}

/// CRIU would take the mounts of the host for the container's.
///
/// # Errors
/// The container has no mount namespace but the host's.
fn need_mount_namespace(plan: &Plan) -> Result<()> {
    let flag = namespace_flag(LinuxNamespaceType::Mount);
    let joins = plan
        .namespaces
        .joins
        .iter()
        .any(|join| join.kind == LinuxNamespaceType::Mount);
    match joins || plan.namespaces.clone_flags & flag != 0 {
        true => Ok(()),
        false => Err(Error::unsupported(
            "criu cannot take a container in the mount namespace of the host",
        )),
    }
}

/// The name by which an external namespace is known in the images.
fn namespace_key(file: &str) -> String {
    let (first, rest) = file.split_at(1.min(file.len()));
    format!("extRoot{}{rest}NS", first.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_namespaces_are_runcs() {
        assert_eq!(namespace_key("net"), "extRootNetNS");
        assert_eq!(namespace_key("pid"), "extRootPidNS");
    }

    #[test]
    fn config_file_table() {
        let with = |value: &str| BTreeMap::from([(CONFIG_ANNOTATION.to_owned(), value.to_owned())]);
        assert_eq!(config_file(&with("/x")), Some("/x".to_owned()));
        assert_eq!(config_file(&with("")), None);
        assert!(config_file(&BTreeMap::new()).is_some_and(|path| path.starts_with("/etc/criu/")));
    }

    #[test]
    fn cgroup_modes() {
        for (text, wire) in [
            ("", 6),
            ("soft", 3),
            ("full", 4),
            ("strict", 5),
            ("ignore", 0),
        ] {
            assert_eq!(ManageCgroups::parse(text).unwrap().wire(), wire, "{text}");
        }
        assert!(ManageCgroups::parse("hard").is_err());
    }
}
