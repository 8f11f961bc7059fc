//! What the containers of a pod share besides namespaces: host name, hosts, resolver and
//! /dev/shm. The daemon's CRI plugin makes these for its own sandboxes only, and mounts into a
//! container those that it finds; for ours we do both.
//!
//! Owns: `<sandbox's bundle>/pod`, and the mounts that are added to a container's config.json.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config::root_of;
use crate::error::{Error, Kind, Result};
use crate::proto::containerd::types::Mount;
use crate::proto::runtime::v1::{DnsConfig, NamespaceMode, PodSandboxConfig, UserNamespace};

const SHM: &str = "shm";
/// containerd's, and Docker's.
const SHM_OPTIONS: [&str; 5] = ["nosuid", "nodev", "noexec", "mode=1777", "size=67108864"];
/// File of ours, and where containers expect it.
const FILES: [(&str, &str); 3] = [
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
];

fn directory(bundle: &Path) -> PathBuf {
    bundle.join("pod")
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let subject = path.display().to_string();
    move |e| Error::io(operation, subject, e)
}

/// A client without a pod's description knows no pod: its containers say what they need.
pub fn make(bundle: &Path, pod: Option<&PodSandboxConfig>) -> Result<()> {
    let Some(pod) = pod else { return Ok(()) };
    let context = pod.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let options = context.and_then(|c| c.namespace_options.clone());
    let options = options.unwrap_or_default();
    let userns = options.userns_options.as_ref();
    let owner = userns.filter(|u| u.mode() == NamespaceMode::Pod);
    let dir = directory(bundle);
    fs::create_dir_all(&dir).map_err(failed("mkdir", &dir))?;
    for (name, place) in FILES {
        let content = match (name, &pod.dns_config) {
            ("hostname", _) => hostname(pod)?,
            ("resolv.conf", Some(dns)) => resolver(dns)?.into_bytes(),
            // The node's own.
            _ => match fs::read(place) {
                Ok(content) => content,
                Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(e) => return Err(failed("read", Path::new(place))(e)),
            },
        };
        let path = dir.join(name);
        write(&path, &content, owner).map_err(failed("write", &path))?;
    }
    if options.ipc() == NamespaceMode::Node {
        return Ok(());
    }
    let shm = dir.join(SHM);
    fs::create_dir_all(&shm).map_err(failed("mkdir", &shm))?;
    let (uid, gid) = owner.map_or((None, None), roots);
    let mut options = SHM_OPTIONS.map(str::to_owned).to_vec();
    options.push(format!("uid={}", uid.unwrap_or(0)));
    options.push(format!("gid={}", gid.unwrap_or(0)));
    let tmpfs = Mount {
        r#type: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        target: String::new(),
        options,
    };
    crate::hands::mount(&[tmpfs], &shm)
}

/// Absence is success.
pub fn remove(bundle: &Path) -> Result<()> {
    let dir = directory(bundle);
    crate::hands::unmount_all(&dir.join(SHM))?;
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &dir)(e)),
        _ => Ok(()),
    }
}

fn hostname(pod: &PodSandboxConfig) -> Result<Vec<u8>> {
    let mut name = pod.hostname.clone();
    if name.is_empty() {
        let own = rustix::system::uname();
        name = own.nodename().to_string_lossy().into_owned();
    }
    name.push('\n');
    Ok(name.into_bytes())
}

/// A line break in a value would be another line.
fn resolver(dns: &DnsConfig) -> Result<String> {
    let all = dns.servers.iter().chain(&dns.searches).chain(&dns.options);
    for value in all {
        if value.contains(['\n', '\r']) {
            return Err(Error::new(
                Kind::Invalid,
                "dns_config",
                format!("{value:?}"),
            ));
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Ok(text)
}

/// Root of the pod owns them, as it would own files of its image.
fn write(path: &Path, content: &[u8], owner: Option<&UserNamespace>) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    let Some(owner) = owner else { return Ok(()) };
    let (uid, gid) = roots(owner);
    std::os::unix::fs::chown(path, uid, gid)
}

fn roots(userns: &UserNamespace) -> (Option<u32>, Option<u32>) {
    (root_of(&userns.uids), root_of(&userns.gids))
}

/// Adds to the container's config.json what it lacks of the pod's files.
pub fn share(sandbox: &Path, container: &Path) -> Result<()> {
    let dir = directory(sandbox);
    if !dir.exists() {
        return Ok(());
    }
    let path = container.join("config.json");
    let bad = |e: serde_json::Error| {
        Error::new(Kind::Invalid, "parse", path.display().to_string()).source(e)
    };
    let bytes = fs::read(&path)
        .map_err(|e| Error::new(Kind::Invalid, "read", path.display().to_string()).source(e))?;
    let mut config: Value = serde_json::from_slice(&bytes).map_err(bad)?;
    if !add(&mut config, &dir, dir.join(SHM).exists()) {
        return Ok(());
    }
    let bytes = serde_json::to_vec(&config).map_err(bad)?;
    crate::records::write(&path, &bytes).map_err(failed("write", &path))
}

/// Whether anything was missing.
fn add(config: &mut Value, dir: &Path, has_shm: bool) -> bool {
    let read_only = config["root"]["readonly"] == true;
    if !config["mounts"].is_array() {
        config["mounts"] = json!([]);
    }
    let Some(mounts) = config["mounts"].as_array_mut() else {
        return false;
    };
    let before = mounts.clone();
    let clean = |place: &str| place.trim_end_matches('/').to_owned();
    let at = |mounts: &[Value], place: &str| {
        let same = |m: &Value| m["destination"].as_str().is_some_and(|d| clean(d) == place);
        mounts.iter().position(same)
    };
    for (name, place) in FILES {
        if at(mounts, place).is_none() {
            mounts.push(json!({
                "destination": place,
                "type": "bind",
                "source": dir.join(name),
                "options": ["rbind", "rprivate", if read_only { "ro" } else { "rw" }],
            }));
        }
    }
    if has_shm {
        let shm = json!({
            "destination": "/dev/shm",
            "type": "bind",
            "source": dir.join(SHM),
            "options": ["rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"],
        });
        match at(mounts, "/dev/shm") {
            None => mounts.push(shm),
            // The runtime spec's default, which would be the container's alone.
            Some(i) if mounts[i]["type"] == "tmpfs" && mounts[i]["source"] == "shm" => {
                mounts[i] = shm;
            }
            Some(_) => {}
        }
    }
    *mounts != before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver_has_the_plugins_form() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.1".into(), "::1".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
        };
        let want = "search a.b c\nnameserver 10.0.0.1\nnameserver ::1\noptions ndots:5\n";
        assert_eq!(resolver(&dns).unwrap(), want);
        assert_eq!(resolver(&DnsConfig::default()).unwrap(), "");
        let dns = DnsConfig {
            searches: vec!["a\nnameserver 6.6.6.6".into()],
            ..Default::default()
        };
        assert_eq!(resolver(&dns).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn a_container_gets_what_it_lacks_once() {
        let dir = Path::new("/b/pod");
        let mut config = json!({"root": {"readonly": true}, "mounts": [
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/etc/hosts/", "type": "bind", "source": "/mine"},
        ]});
        assert!(add(&mut config, dir, true));
        let mounts = config["mounts"].as_array().unwrap().clone();
        let places: Vec<_> = mounts
            .iter()
            .map(|m| {
                (
                    m["destination"].as_str().unwrap(),
                    m["source"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            places,
            [
                ("/dev/shm", "/b/pod/shm"),
                ("/etc/hosts/", "/mine"),
                ("/etc/hostname", "/b/pod/hostname"),
                ("/etc/resolv.conf", "/b/pod/resolv.conf"),
            ]
        );
        assert_eq!(mounts[2]["options"][2], "ro");
        assert!(!add(&mut config, dir, true));
        // A volume of its own, and a pod that uses the node's.
        for (kind, shm) in [("bind", true), ("tmpfs", false)] {
            let own = json!({"destination": "/dev/shm", "type": kind, "source": "shm"});
            let mut config = json!({"mounts": [own.clone()]});
            add(&mut config, dir, shm);
            assert_eq!(config["mounts"][0], own);
        }
        assert!(add(&mut json!({}), dir, true));
    }
}
