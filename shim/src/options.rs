//! The runtime options of a task: `containerd.runc.v1.Options`, or a TOML body for daemons that
//! know our runtime type only by name.
//!
//! Owns: the meaning of each option. An option that cannot be honoured is an error.

use std::path::PathBuf;

use prost::Message;
use prost_types::Any;

use crate::error::{Error, Kind, Result};
use crate::proto::containerd::linux::runc as old;
use crate::proto::containerd::runc::v1 as runc;
use crate::proto::runtimeoptions::v1 as generic;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub binary_name: String,
    pub root: String,
    pub systemd_cgroup: bool,
    pub no_pivot_root: bool,
    pub no_new_keyring: bool,
    pub shim_cgroup: String,
    pub io_uid: u32,
    pub io_gid: u32,
    pub criu_image_path: PathBuf,
    pub criu_work_path: PathBuf,
    /// Only the TOML body can say no.
    pub unconfined: bool,
}

impl From<runc::Options> for Options {
    fn from(o: runc::Options) -> Options {
        Options {
            binary_name: o.binary_name,
            root: o.root,
            systemd_cgroup: o.systemd_cgroup,
            no_pivot_root: o.no_pivot_root,
            no_new_keyring: o.no_new_keyring,
            shim_cgroup: o.shim_cgroup,
            io_uid: o.io_uid,
            io_gid: o.io_gid,
            criu_image_path: o.criu_image_path.into(),
            criu_work_path: o.criu_work_path.into(),
            unconfined: false,
        }
    }
}

impl TryFrom<old::CreateOptions> for Options {
    type Error = &'static str;

    fn try_from(o: old::CreateOptions) -> std::result::Result<Options, &'static str> {
        // They were for a restore.
        let other = o.open_tcp
            || o.external_unix_sockets
            || o.terminal
            || o.file_locks
            || !o.empty_namespaces.is_empty()
            || !o.cgroups_mode.is_empty();
        if other {
            return Err("options of CRIU are not taken from here");
        }
        Ok(Options {
            no_pivot_root: o.no_pivot_root,
            no_new_keyring: o.no_new_keyring,
            shim_cgroup: o.shim_cgroup,
            io_uid: o.io_uid,
            io_gid: o.io_gid,
            criu_image_path: o.criu_image_path.into(),
            criu_work_path: o.criu_work_path.into(),
            ..Options::default()
        })
    }
}

/// The message's name without the prefix that some daemons put before it.
pub fn message_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or("")
}

pub fn parse(any: Option<&Any>) -> Result<Options> {
    let Some(any) = any.filter(|a| !a.type_url.is_empty() || !a.value.is_empty()) else {
        return Ok(Options::default());
    };
    let bad = |e: prost::DecodeError| Error::new(Kind::Invalid, "options", &any.type_url).source(e);
    match message_name(any) {
        "containerd.runc.v1.Options" => Ok(runc::Options::decode(any.value.as_slice())
            .map_err(bad)?
            .into()),
        "runtimeoptions.v1.Options" => {
            let options = generic::Options::decode(any.value.as_slice()).map_err(bad)?;
            if !options.config_body.is_empty() {
                return toml(&String::from_utf8_lossy(&options.config_body));
            }
            if options.config_path.is_empty() {
                return Ok(Options::default());
            }
            let text = std::fs::read_to_string(&options.config_path)
                .map_err(|e| Error::new(Kind::Invalid, "read", &options.config_path).source(e))?;
            toml(&text)
        }
        // Clients of containerd 1.x, to a runtime of any type but their own: `ctr run --uidmap`.
        "containerd.linux.runc.CreateOptions" => {
            let options = old::CreateOptions::decode(any.value.as_slice()).map_err(bad)?;
            options
                .try_into()
                .map_err(|why| Error::new(Kind::Invalid, "options", &any.type_url).source(why))
        }
        _ => Err(Error::new(
            Kind::Invalid,
            "options of unknown type",
            &any.type_url,
        )),
    }
}

/// The flat `Key = value` table that containerd's CRI plugin writes.
fn toml(text: &str) -> Result<Options> {
    let mut options = Options::default();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = |why: &'static str| {
            Error::new(
                Kind::Invalid,
                "options, line",
                format!("{}: {line}", number + 1),
            )
            .source(why)
        };
        let (key, value) = line.split_once('=').ok_or_else(|| bad("not key = value"))?;
        let key = key.trim().trim_matches('"');
        let value = value.trim();
        let string = || toml_string(value).ok_or_else(|| bad("not a string"));
        let flag = || value.parse::<bool>().map_err(|_| bad("not true or false"));
        let number = || value.parse::<u32>().map_err(|_| bad("not a number"));
        match key {
            "BinaryName" => options.binary_name = string()?,
            "Root" => options.root = string()?,
            "SystemdCgroup" => options.systemd_cgroup = flag()?,
            "NoPivotRoot" => options.no_pivot_root = flag()?,
            "NoNewKeyring" => options.no_new_keyring = flag()?,
            "ShimCgroup" => options.shim_cgroup = string()?,
            "IoUid" => options.io_uid = number()?,
            "IoGid" => options.io_gid = number()?,
            "CriuImagePath" => options.criu_image_path = string()?.into(),
            "CriuWorkPath" => options.criu_work_path = string()?.into(),
            "Confine" => options.unconfined = !flag()?,
            // Deprecated in runc's own options; criu is found in PATH.
            "CriuPath" if string()?.is_empty() => {}
            "TypeUrl" | "ConfigPath" | "TaskApiAddress" | "TaskApiVersion" => {}
            _ => return Err(bad("unknown option")),
        }
    }
    Ok(options)
}

fn toml_string(value: &str) -> Option<String> {
    if let Some(literal) = value.strip_prefix('\'') {
        return literal
            .strip_suffix('\'')
            .filter(|s| !s.contains('\''))
            .map(str::to_owned);
    }
    // A basic string without control characters has JSON's escapes.
    value
        .starts_with('"')
        .then(|| serde_json::from_str(value).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(parse(None).unwrap(), Options::default());
        assert_eq!(parse(Some(&Any::default())).unwrap(), Options::default());
    }

    #[test]
    fn toml_body_of_a_cri_plugin() {
        let text = "BinaryName = \"/usr/bin/crun\"\nSystemdCgroup = true\nIoUid = 5\nRoot = '/r'\n";
        let body = generic::Options {
            config_body: text.into(),
            ..Default::default()
        };
        let any = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: body.encode_to_vec(),
        };
        let options = parse(Some(&any)).unwrap();
        assert_eq!(options.binary_name, "/usr/bin/crun");
        assert_eq!(options.root, "/r");
        assert!(options.systemd_cgroup);
        assert_eq!(options.io_uid, 5);
        assert!(!options.unconfined && toml("Confine = false\n").unwrap().unconfined);
    }

    #[test]
    fn options_of_an_old_client() {
        let mut old = old::CreateOptions {
            io_uid: 7,
            shim_cgroup: "/s".into(),
            ..Default::default()
        };
        let any = |old: &old::CreateOptions| Any {
            type_url: "containerd.linux.runc.CreateOptions".into(),
            value: old.encode_to_vec(),
        };
        let options = parse(Some(&any(&old))).unwrap();
        assert_eq!((options.io_uid, options.shim_cgroup.as_str()), (7, "/s"));
        old.open_tcp = true;
        assert!(parse(Some(&any(&old))).is_err());
    }

    #[test]
    fn a_wrong_option_is_named() {
        for (text, name) in [
            ("SystemdCgroup = 3", "SystemdCgroup"),
            ("Foo = true", "Foo"),
            ("x", "x"),
        ] {
            assert!(toml(text).unwrap_err().to_string().contains(name));
        }
        let any = Any {
            type_url: "x.Y".into(),
            value: vec![],
        };
        assert_eq!(
            parse(Some(&any)).unwrap_err().to_string(),
            "options of unknown type x.Y"
        );
    }
}
