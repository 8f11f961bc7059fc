//! Owns the mounts of a container: the standard ones, the pod's files, image volumes, and what
//! CRI asks for over them. Makes missing host paths; mounts nothing itself.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use super::document::Mount;
use crate::container::config::{ContainerConfig, MountRequest, Propagation};
use crate::error::{Error, Result};

/// Files and directories that a pod's containers share.
#[derive(Debug, Clone)]
pub struct PodMounts {
    /// /etc/hostname
    pub hostname: PathBuf,
    /// /etc/hosts
    pub hosts: PathBuf,
    /// /etc/resolv.conf
    pub resolv_conf: PathBuf,
    /// /dev/shm
    pub shm: PathBuf,
}

/// A volume that the image declares, and the directory that holds it.
#[derive(Debug, Clone)]
pub struct ImageVolume {
    /// Where in the container.
    pub destination: String,
    /// The directory on the host.
    pub source: PathBuf,
}

/// The mounts in the order in which they are made, and the propagation of the root.
#[derive(Debug)]
pub struct Planned {
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// `linux.rootfsPropagation`; empty: the runtime's default.
    pub rootfs_propagation: &'static str,
}

/// Plans all mounts of a container.
pub fn plan(config: &ContainerConfig, pod: &PodMounts, volumes: &[ImageVolume]) -> Result<Planned> {
    let table = MountTable::read()?;
    let mut requested = Vec::with_capacity(config.mounts.len());
    let mut rootfs_propagation = "";
    for (i, request) in config.mounts.iter().enumerate() {
        let mount = requested_mount(request, &table)
            .map_err(|e| e.within(format!("config.mounts[{i}]"), ""))?;
        rootfs_propagation = match (request.propagation, rootfs_propagation) {
            (Propagation::Bidirectional, _) | (_, "rshared") => "rshared",
            (Propagation::HostToContainer, _) => "rslave",
            (Propagation::Private, current) => current,
        };
        requested.push(mount);
    }
    let mut mounts = standard(config.security.privileged);
    mounts.extend(pod_files(config.security.readonly_rootfs, pod));
    for volume in volumes {
        mounts.push(bind(
            &volume.destination,
            volume.source.display().to_string(),
            &["rbind", "rprivate", "rw"],
        ));
    }
    // A request replaces what would be at the same place, and everything that would be below it.
    mounts.retain(|m| {
        !requested
            .iter()
            .any(|r| covers(&r.destination, &m.destination))
    });
    mounts.extend(requested);
    // Parents before children; otherwise the order of the request.
    mounts.sort_by_key(|m| Path::new(&m.destination).components().count());
    Ok(Planned {
        mounts,
        rootfs_propagation,
    })
}

fn covers(above: &str, below: &str) -> bool {
    above == below || (above == "/dev" && below.starts_with("/dev/"))
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

fn bind(destination: &str, source: String, options: &[&str]) -> Mount {
    mount(destination, "bind", &source, options)
}

fn standard(privileged: bool) -> Vec<Mount> {
    let kernel = ["nosuid", "noexec", "nodev"];
    let access = if privileged { "rw" } else { "ro" };
    let sys = ["nosuid", "noexec", "nodev", access];
    let cgroup = ["nosuid", "noexec", "nodev", "relatime", access];
    let dev = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    let pts = [
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
        "gid=5",
    ];
    vec![
        mount("/proc", "proc", "proc", &kernel),
        mount("/dev", "tmpfs", "tmpfs", &dev),
        mount("/dev/pts", "devpts", "devpts", &pts),
        mount("/dev/mqueue", "mqueue", "mqueue", &kernel),
        mount("/sys", "sysfs", "sysfs", &sys),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &cgroup),
    ]
}

fn pod_files(readonly: bool, pod: &PodMounts) -> Vec<Mount> {
    let access = if readonly { "ro" } else { "rw" };
    let file = |to: &str, from: &Path| {
        bind(
            to,
            from.display().to_string(),
            &["rbind", "rprivate", access],
        )
    };
    vec![
        file("/etc/hostname", &pod.hostname),
        file("/etc/hosts", &pod.hosts),
        file("/etc/resolv.conf", &pod.resolv_conf),
        bind(
            "/dev/shm",
            pod.shm.display().to_string(),
            &["rbind", "rprivate", "rw"],
        ),
    ]
}

fn requested_mount(request: &MountRequest, table: &MountTable) -> Result<Mount> {
    let destination = clean(&request.container_path);
    if destination == "/" {
        return Err(Error::invalid("container_path", "is the root directory"));
    }
    // Without SELinux there is no label to set; with it, labels are not supported yet.
    if request.selinux_relabel && Path::new("/sys/fs/selinux/enforce").exists() {
        return Err(Error::unsupported(
            "selinux_relabel",
            "SELinux is not supported yet",
        ));
    }
    let source = host_path(&request.host_path)?;
    let propagation = match request.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => {
            table.require(&source, &["shared:", "master:"], "shared or slave")?;
            "rslave"
        }
        Propagation::Bidirectional => {
            table.require(&source, &["shared:"], "shared")?;
            "rshared"
        }
    };
    let access = match (request.readonly, request.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let options = ["rbind", propagation, access];
    Ok(bind(&destination, source.display().to_string(), &options))
}

/// The path without `.`, `..` and double slashes, and with one at its start.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.push(part),
            Component::ParentDir => {
                parts.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let joined: PathBuf = parts.iter().collect();
    format!("/{}", joined.display())
}

/// Symbolic links resolved; a path that does not exist becomes a directory, as it always did.
fn host_path(path: &str) -> Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Ok(found) => Ok(found),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o755);
            builder
                .create(path)
                .and_then(|()| std::fs::canonicalize(path))
                .map_err(|e| Error::io("create host_path", path, e))
        }
        Err(e) => Err(Error::io("resolve host_path", path, e)),
    }
}

/// The mounts of the host, for the propagation checks.
#[derive(Debug)]
struct MountTable(String);

impl MountTable {
    fn read() -> Result<MountTable> {
        let path = "/proc/self/mountinfo";
        std::fs::read_to_string(path)
            .map(MountTable)
            .map_err(|e| Error::io("read", path, e))
    }

    /// The mount that holds `path` must have one of the `tags` (proc_pid_mountinfo(5)).
    fn require(&self, path: &Path, tags: &[&str], name: &str) -> Result<()> {
        let (point, optional) = self.holding(path);
        if optional
            .iter()
            .any(|field| tags.iter().any(|tag| field.starts_with(tag)))
        {
            return Ok(());
        }
        let text = format!(
            "path {} is mounted on {point}, which is not a {name} mount",
            path.display()
        );
        Err(Error::invalid("propagation", text))
    }

    /// Mount point and optional fields of the mount that holds a path.
    fn holding(&self, path: &Path) -> (String, Vec<&str>) {
        let mut best = (String::new(), Vec::new());
        for line in self.0.lines() {
            let mut fields = line.split(' ').skip(4);
            let Some(point) = fields.next().map(unescape) else {
                continue;
            };
            // Later mounts lie over earlier ones at the same place.
            if path.starts_with(&point) && point.len() >= best.0.len() {
                let optional = fields.skip(1).take_while(|f| *f != "-").collect();
                best = (point, optional);
            }
        }
        best
    }
}

/// Undoes the octal escapes of mountinfo (space, tab, newline, backslash).
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_keeps_destinations_inside() {
        for (from, to) in [
            ("/a//b/", "/a/b"),
            ("a", "/a"),
            ("/../../etc", "/etc"),
            ("/a/./b/..", "/a"),
            ("/", "/"),
        ] {
            assert_eq!(clean(from), to);
        }
    }

    #[test]
    fn propagation_looks_at_the_innermost_mount() {
        let table = MountTable(
            "1 0 0:1 / / rw shared:1 - ext4 /dev/a rw\n\
             2 1 0:2 / /mnt\\040x rw - tmpfs t rw\n\
             3 1 0:3 / /slave rw master:1 - tmpfs t rw\n"
                .to_owned(),
        );
        let shared = |p: &str| table.require(Path::new(p), &["shared:"], "shared").is_ok();
        assert!(shared("/mnt"));
        assert!(!shared("/mnt x/y"));
        assert!(!shared("/slave/y"));
        let either = ["shared:", "master:"];
        assert!(table.require(Path::new("/slave"), &either, "").is_ok());
        let error = table.require(Path::new("/mnt x"), &either, "shared or slave");
        assert_eq!(
            error.unwrap_err().to_string(),
            "propagation: path /mnt x is mounted on /mnt x, which is not a shared or slave mount"
        );
    }

    #[test]
    fn request_replaces_the_standard_mount() {
        assert!(covers("/dev/shm", "/dev/shm"));
        assert!(covers("/dev", "/dev/pts"));
        assert!(!covers("/etc", "/etc/hosts"));
        assert!(!covers("/de", "/dev"));
    }
}
