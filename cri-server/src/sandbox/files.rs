//! Owns the files that a pod's containers share: hostname, hosts, resolv.conf and the /dev/shm of
//! its IPC namespace, all in the sandbox's directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::Fixed;
use super::config::{DnsConfig, NamespaceMode};
use crate::error::{Error, Result};
use crate::spec_builder::host_files::read_bounded;
use crate::spec_builder::mounts::PodMounts;

const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
/// Nobody's resolv.conf is larger.
const MAX_FILE: u64 = 1 << 20;

/// Where the files of a sandbox are.
pub fn mounts(fixed: &Fixed) -> PodMounts {
    PodMounts {
        hostname: fixed.dir.join("hostname"),
        hosts: fixed.dir.join("hosts"),
        resolv_conf: fixed.dir.join("resolv.conf"),
        shm: match fixed.config.namespaces.ipc {
            NamespaceMode::Node => PathBuf::from("/dev/shm"),
            _ => fixed.dir.join("shm"),
        },
    }
}

/// Writes the files and mounts the shared memory.
pub fn create(fixed: &Fixed) -> Result<()> {
    let paths = mounts(fixed);
    write(&paths.hostname, &format!("{}\n", fixed.hostname))?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_else(|_| HOSTS.to_owned());
    write(&paths.hosts, &hosts)?;
    write(&paths.resolv_conf, &resolv_conf(fixed.config.dns.as_ref())?)?;
    if fixed.config.namespaces.ipc == NamespaceMode::Node {
        return Ok(());
    }
    fs::create_dir(&paths.shm).map_err(|e| Error::io("mkdir", paths.shm.display(), e))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // 64 MiB, as containerd and Docker give it.
    let options = c"mode=1777,size=65536k";
    rustix::mount::mount("shm", &paths.shm, "tmpfs", flags, options)
        .map_err(|e| Error::io("mount tmpfs", paths.shm.display(), e))
}

/// Unmounts what [`create`] mounted. Idempotent.
pub fn unmount(fixed: &Fixed) -> Result<()> {
    let shm = fixed.dir.join("shm");
    loop {
        match rustix::mount::unmount(&shm, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: not a mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(e) => return Err(Error::io("umount", shm.display(), e)),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)))
        .map_err(|e| Error::io("write", path.display(), e))
}

fn resolv_conf(dns: Option<&DnsConfig>) -> Result<String> {
    let generated = dns.map(generate).transpose()?.unwrap_or_default();
    if !generated.is_empty() {
        return Ok(generated);
    }
    let path = Path::new("/etc/resolv.conf");
    let bytes = read_bounded(path, MAX_FILE).map_err(|e| Error::io("read", path.display(), e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn generate(dns: &DnsConfig) -> Result<String> {
    let lists = [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ];
    for (name, list) in lists {
        if let Some(bad) = list.iter().find(|item| item.contains(['\n', '\r', '\0'])) {
            let text = format!("{bad:?} is more than one line");
            return Err(Error::invalid(format!("config.dns_config.{name}"), text));
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_generated_line_by_line() {
        let list = |items: &[&str]| items.iter().map(|i| (*i).to_owned()).collect();
        let dns = DnsConfig {
            servers: list(&["10.0.0.1", "10.0.0.2"]),
            searches: list(&["a.example", "b.example"]),
            options: list(&["ndots:5"]),
        };
        assert_eq!(
            resolv_conf(Some(&dns)).unwrap(),
            "search a.example b.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
    }

    #[test]
    fn dns_entry_with_a_newline_is_refused() {
        let dns = DnsConfig {
            servers: vec!["1.1.1.1\nnameserver 6.6.6.6".to_owned()],
            ..DnsConfig::default()
        };
        let error = generate(&dns).unwrap_err().to_string();
        assert!(error.contains("dns_config.servers"), "{error}");
    }
}
