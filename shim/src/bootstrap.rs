//! `start` and `-info`: what a daemon calls before it can talk to a shim.
//!
//! `start` finds or makes the group's shim and prints where it listens. The shim proper is a
//! fresh process of this binary in its own session that inherits the listening socket as 3 and
//! nothing else. Only the answer goes to stdout.
//! Owns: the choice of group, of the answer's form, and the child's surroundings.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use coracle_sys::spawn::Spawn;
use prost::Message;
use prost_types::Any;
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use crate::args::Args;
use crate::error::{Error, Kind, Result};
use crate::options::Options;
use crate::proto::containerd::runtime::bootstrap::v1 as wire;
use crate::proto::containerd::types;
use crate::runtime_cli::Runtime;
use crate::socket::{self, Bound};

const MAX_INPUT: u64 = 4 << 20;
/// The first that is there names the group.
const GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];
pub const LISTENER: i32 = 3;

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_INPUT)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io("read", "stdin", e))?;
    Ok(bytes)
}

#[derive(Debug, PartialEq)]
enum Form {
    /// containerd 1.6 and coracled.
    Plain,
    /// containerd 1.7 to 2.2.
    Json,
    /// containerd 2.3 and later.
    Protobuf,
}

/// What stdin held and how to answer.
struct Asked {
    form: Form,
    options: Options,
    events: String,
    socket_dir: Option<PathBuf>,
    /// The options as they came, for the container of a sandbox.
    raw: Vec<u8>,
}

fn understand(args: &Args, input: &[u8], events: String, grpc: &str) -> Result<Asked> {
    // An Any decodes as BootstrapParams too: its type URL would be the id. It is one only if it
    // names this very instance.
    let params = wire::BootstrapParams::decode(input)
        .ok()
        .filter(|p| p.instance_id == args.id && p.namespace == args.namespace);
    if let Some(params) = params {
        let known = |any: &&Any| crate::options::message_name(any).ends_with(".Options");
        let extensions = params.extensions.iter().filter_map(|e| e.value.as_ref());
        let any = extensions.into_iter().find(known);
        let options = crate::options::parse(any)?;
        let raw = any.map(Message::encode_to_vec).unwrap_or_default();
        let events = match params.containerd_ttrpc_address.as_str() {
            "" => events,
            address => address.to_owned(),
        };
        let socket_dir = params
            .socket_dir
            .filter(|d| !d.is_empty())
            .map(PathBuf::from);
        return Ok(Asked {
            form: Form::Protobuf,
            options,
            events,
            socket_dir,
            raw,
        });
    }
    let any = Any::decode(input)
        .map_err(|e| Error::new(Kind::Invalid, "options", "on stdin").source(e))?;
    let options = crate::options::parse(Some(&any))?;
    let form = if grpc.is_empty() {
        Form::Plain
    } else {
        Form::Json
    };
    Ok(Asked {
        form,
        options,
        events,
        socket_dir: None,
        raw: input.to_vec(),
    })
}

impl Form {
    fn answer(&self, address: &str) -> Vec<u8> {
        match self {
            Form::Plain => address.as_bytes().to_vec(),
            Form::Json => {
                format!(r#"{{"version":2,"address":"{address}","protocol":"ttrpc"}}"#).into_bytes()
            }
            Form::Protobuf => wire::BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                capabilities: Vec::new(),
                metadata: BTreeMap::new(),
            }
            .encode_to_vec(),
        }
    }
}

#[derive(Deserialize, Default)]
struct Annotated {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// Containers of a pod share a shim. Without a bundle's word there is one per id.
fn group(bundle: &Path, id: &str) -> Result<String> {
    let path = bundle.join("config.json");
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(id.to_owned()),
        Err(e) => return Err(Error::io("read", path.display().to_string(), e)),
    };
    let config: Annotated = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Invalid, "parse", path.display().to_string()).source(e))?;
    let annotations = config.annotations.unwrap_or_default();
    let named = GROUPS
        .iter()
        .find_map(|key| annotations.get(*key).filter(|v| !v.is_empty()));
    Ok(named.cloned().unwrap_or_else(|| id.to_owned()))
}

pub fn start(args: &Args) -> Result<()> {
    if args.id.is_empty() || args.namespace.is_empty() {
        return Err(Error::new(
            Kind::Invalid,
            "start",
            "needs -id and -namespace",
        ));
    }
    let bundle = std::env::current_dir().map_err(|e| Error::io("getcwd", "", e))?;
    let asked = understand(args, &stdin()?, env("TTRPC_ADDRESS"), &env("GRPC_ADDRESS"))?;
    let dir = match (
        std::env::var_os("CORACLE_SHIM_SOCKET_DIR"),
        &asked.socket_dir,
    ) {
        (Some(dir), _) if !dir.is_empty() => PathBuf::from(dir),
        (_, Some(dir)) => dir.clone(),
        _ => PathBuf::from(socket::DEFAULT_DIR),
    };
    let group = group(&bundle, &args.id)?;
    let path = socket::path(&dir, &args.address, &args.namespace, &group)?;
    let address = format!("unix://{}", path.display());
    if let Bound::Listening(listener) = socket::bind(&path)? {
        let served = crate::cleanup::end_dead_group(&path, &args.namespace)
            .and_then(|()| keep_options(&asked.raw, &bundle))
            .and_then(|()| spawn(args, &asked, &path, listener, &bundle));
        if let Err(e) = served {
            crate::records::remove_socket(&path);
            return Err(e);
        }
    }
    // containerd 1.6 and 1.7 find the shim again by this file; so does `delete`.
    crate::records::write(&bundle.join("address"), address.as_bytes())
        .map_err(|e| Error::io("write address in", bundle.display().to_string(), e))?;
    std::io::stdout()
        .write_all(&asked.form.answer(&address))
        .map_err(|e| Error::io("write", "stdout", e))
}

/// The options come once, and a sandbox is made from them later.
fn keep_options(raw: &[u8], bundle: &Path) -> Result<()> {
    let path = bundle.join(crate::sandbox::OPTIONS);
    match raw {
        [] => Ok(()),
        raw => fs::write(&path, raw).map_err(|e| Error::io("write", path.display().to_string(), e)),
    }
}

fn spawn(args: &Args, asked: &Asked, path: &Path, listener: OwnedFd, bundle: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("start", "the shim's process", e);
    let text = |s: &[u8]| CString::new(s).map_err(|e| failed(e.into()));
    coracle_sys::exec::close_on_exec_from(3).map_err(failed)?;
    let own = std::env::current_exe().map_err(failed)?;
    let program = text(own.as_os_str().as_bytes())?;
    let mut argv = vec![program.clone()];
    for (flag, value) in [
        ("-namespace", args.namespace.as_bytes()),
        ("-id", args.id.as_bytes()),
        ("-address", args.address.as_bytes()),
        ("-socket", path.as_os_str().as_bytes()),
    ] {
        argv.push(text(flag.as_bytes())?);
        argv.push(text(value)?);
    }
    if args.debug {
        argv.push(text(b"-debug")?);
    }
    let mut env = crate::process::environment();
    env.retain(|e| !e.as_bytes().starts_with(b"TTRPC_ADDRESS="));
    env.push(text(format!("TTRPC_ADDRESS={}", asked.events).as_bytes())?);
    if asked.options.unconfined {
        env.retain(|e| {
            !e.as_bytes()
                .starts_with(crate::confine::VARIABLE.as_bytes())
        });
        env.push(text(format!("{}=0", crate::confine::VARIABLE).as_bytes())?);
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed(e.into()))?;
    let null = null.as_fd();
    let cwd = text(bundle.as_os_str().as_bytes())?;
    // Before there is a shim: it forks, and both processes are to be there and scored so.
    if !asked.options.shim_cgroup.is_empty() {
        join_cgroup(&asked.options.shim_cgroup)?;
    }
    adjust_oom_score();
    Spawn {
        program: &program,
        args: &argv,
        env: &env,
        fds: &[
            (null, 0),
            (null, 1),
            (null, 2),
            (listener.as_fd(), LISTENER),
        ],
        new_session: true,
        new_group: false,
        cwd: Some(&cwd),
    }
    .run()
    .map_err(failed)?;
    Ok(())
}

/// The shim should go before the daemon and long after its containers' processes. Lowering the
/// score needs CAP_SYS_RESOURCE; without it the inherited score stays.
fn adjust_oom_score() {
    let parent = rustix::process::getppid().map_or(1, |p| p.as_raw_nonzero().get());
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"));
    let score = score
        .ok()
        .and_then(|s| s.trim().parse::<i32>().ok())
        .unwrap_or(0);
    let _ = fs::write(
        "/proc/self/oom_score_adj",
        (score + 1).min(1000).to_string(),
    );
}

/// Options.shim_cgroup: below every mounted hierarchy.
fn join_cgroup(path: &str) -> Result<()> {
    let failed = |e| Error::io("join shim_cgroup", path, e);
    let below = path.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let mut hierarchies = vec![root.to_owned()];
    if !root.join("cgroup.controllers").exists() {
        let entries = fs::read_dir(root).map_err(failed)?.flatten();
        // Where nothing is mounted there is only a directory of that name.
        hierarchies = entries
            .map(|e| e.path())
            .filter(|dir| is_hierarchy(dir))
            .collect();
    }
    for hierarchy in hierarchies {
        let v1 = !hierarchy.join("cgroup.controllers").exists();
        let mut dir = hierarchy;
        for name in below.split('/').filter(|n| !n.is_empty()) {
            let parent = dir.clone();
            dir.push(name);
            fs::create_dir_all(&dir).map_err(failed)?;
            if v1 {
                inherit_cpus(&parent, &dir).map_err(failed)?;
            }
        }
        fs::write(dir.join("cgroup.procs"), std::process::id().to_string()).map_err(failed)?;
    }
    Ok(())
}

fn is_hierarchy(dir: &Path) -> bool {
    const CGROUP_SUPER_MAGIC: u64 = 0x27_e0eb;
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    rustix::fs::statfs(dir).is_ok_and(|found| {
        matches!(
            found.f_type as u64,
            CGROUP_SUPER_MAGIC | CGROUP2_SUPER_MAGIC
        )
    })
}

/// An empty cpuset takes nobody: a new one starts with its parent's.
fn inherit_cpus(parent: &Path, dir: &Path) -> std::io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(text) = fs::read_to_string(dir.join(file))
            && text.trim().is_empty()
        {
            fs::write(dir.join(file), fs::read_to_string(parent.join(file))?)?;
        }
    }
    Ok(())
}

/// `-info`: containerd 2.x asks for the runtime's features before there is a container.
pub fn info() -> Result<()> {
    let input = stdin()?;
    let options = match Any::decode(input.as_slice()) {
        Ok(any) if !input.is_empty() => crate::options::parse(Some(&any))?,
        _ => Options::default(),
    };
    let runtime = Runtime::new(&options, "info")?;
    let output = std::process::Command::new(&runtime.binary)
        .arg("features")
        .stderr(std::process::Stdio::null())
        .output()
        .map_err(|e| Error::io("run", format!("{} features", runtime.binary.display()), e))?;
    // A runtime without the command is a runtime without known features.
    let features = output.status.success().then(|| Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: output.stdout,
    });
    let info = types::RuntimeInfo {
        name: "io.containerd.coracle.v2".to_owned(),
        version: Some(types::RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }),
        options: None,
        features,
        annotations: BTreeMap::new(),
    };
    std::io::stdout()
        .write_all(&info.encode_to_vec())
        .map_err(|e| Error::io("write", "stdout", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::containerd::runc::v1 as runc;

    fn args() -> Args {
        crate::args::parse(
            ["-id", "x", "-namespace", "ns", "start"]
                .map(Into::into)
                .into_iter(),
        )
        .unwrap()
    }

    fn options_any() -> Any {
        let options = runc::Options {
            shim_cgroup: "/s".into(),
            ..Default::default()
        };
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.encode_to_vec(),
        }
    }

    #[test]
    fn each_daemon_gets_its_form() {
        let any = options_any().encode_to_vec();
        let params = wire::BootstrapParams {
            instance_id: "x".into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "/t".into(),
            extensions: vec![wire::Extension {
                value: Some(options_any()),
            }],
            socket_dir: Some("/d".into()),
            ..Default::default()
        };
        let cases: [(&[u8], &str, Form, &str); 5] = [
            (b"", "", Form::Plain, ""),
            (&any, "", Form::Plain, "/s"),
            (b"", "/g", Form::Json, ""),
            (&any, "/g", Form::Json, "/s"),
            (&params.encode_to_vec(), "/g", Form::Protobuf, "/s"),
        ];
        for (input, grpc, form, cgroup) in cases {
            let got = understand(&args(), input, "/e".into(), grpc).unwrap();
            assert_eq!(got.form, form);
            assert_eq!(got.options.shim_cgroup, cgroup);
            let protobuf = form == Form::Protobuf;
            assert_eq!(got.events, if protobuf { "/t" } else { "/e" });
            assert_eq!(got.socket_dir.is_some(), protobuf);
        }
    }

    #[test]
    fn params_for_another_instance_are_not_params() {
        let params = wire::BootstrapParams {
            instance_id: "y".into(),
            ..Default::default()
        };
        assert!(understand(&args(), &params.encode_to_vec(), String::new(), "").is_err());
    }

    #[test]
    fn answers_by_form() {
        assert_eq!(Form::Plain.answer("unix:///a"), b"unix:///a");
        let json: serde_json::Value =
            serde_json::from_slice(&Form::Json.answer("unix:///a")).unwrap();
        assert_eq!(
            (json["version"].as_i64(), json["protocol"].as_str()),
            (Some(2), Some("ttrpc"))
        );
        let result = wire::BootstrapResult::decode(&*Form::Protobuf.answer("unix:///a")).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///a"));
    }

    #[test]
    fn group_by_annotation_then_id() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(group(dir.path(), "x").unwrap(), "x");
        for (json, want) in [
            (
                r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#,
                "pod",
            ),
            (
                r#"{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"pod"}}"#,
                "g",
            ),
            (r#"{"annotations":null}"#, "x"),
            (r#"{}"#, "x"),
        ] {
            fs::write(dir.path().join("config.json"), json).unwrap();
            assert_eq!(group(dir.path(), "x").unwrap(), want);
        }
    }
}
