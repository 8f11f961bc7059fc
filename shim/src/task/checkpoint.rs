//! Checkpoint of a running task, as containerd's runc shim does it.
//!
//! Owns: the meaning of `containerd.runc.v1.CheckpointOptions`, and CRIU's work directory, which
//! is the bundle's own and goes with the call unless the caller has named one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::call::{Job, args};
use crate::error::{Error, Kind, Result};
use crate::events::Event;
use crate::options::message_name;
use crate::process::ProcessId;
use crate::proto::containerd::events as ev;
use crate::proto::containerd::linux::runc as old;
use crate::proto::containerd::runc::v1 as runc;
use crate::proto::containerd::task::v2 as wire;
use crate::service::Reply;
use crate::supervisor::Supervisor;

/// What CRIU says of a failed dump outlives its work directory under this name.
const LOG: &str = "criu-dump.log";

/// A checkpoint under way.
pub struct Made {
    image: String,
    /// To be removed in the end.
    work: Option<PathBuf>,
}

impl Supervisor {
    pub fn checkpoint(&mut self, id: &ProcessId, r: &wire::CheckpointTaskRequest, reply: Reply) {
        let begun = self.task(id).and_then(|task| {
            let options = options(r)?;
            // The daemon's directory comes with the request, whatever the options name.
            let image = match r.path.as_str() {
                "" => &options.image_path,
                path => path,
            };
            if image.is_empty() {
                return Err(Error::new(Kind::Invalid, "checkpoint", &r.id).source("no image path"));
            }
            let named = match options.work_path.as_str() {
                "" => task.options.criu_work_path.clone(),
                path => path.into(),
            };
            let (work, own) = match named.as_os_str().is_empty() {
                true => (task.bundle.join("criu-work"), true),
                false => (named, false),
            };
            let parts = arguments(&options, image, &work, &r.id);
            let made = Made {
                image: image.to_owned(),
                work: own.then_some(work),
            };
            Ok((parts, made))
        });
        match begun {
            Ok((parts, made)) => {
                self.call_or_tell(id, Job::Checkpoint { made }, reply, &parts, Vec::new());
            }
            Err(e) => self.answer(reply, Err(e)),
        }
    }

    pub fn checkpoint_ended(
        &mut self,
        id: &ProcessId,
        made: &Made,
        reply: Option<Reply>,
        result: std::result::Result<(), String>,
    ) {
        let result = result.map_err(|text| {
            let error = Error::new(Kind::Runtime, "OCI runtime checkpoint failed", "");
            let kept = self
                .task(id)
                .ok()
                .and_then(|task| keep_log(made, &task.bundle));
            error.source(match kept {
                Some(log) => format!("{text} path= {}", log.display()),
                None => text,
            })
        });
        if let Some(work) = &made.work {
            // Never made when the runtime refused beforehand.
            let _ = std::fs::remove_dir_all(work);
        }
        if result.is_ok() {
            self.publish(&Event::Checkpointed(ev::TaskCheckpointed {
                container_id: id.task.clone(),
                checkpoint: made.image.clone(),
            }));
        }
        self.tell(reply, result);
    }
}

/// Copies the log of a work directory that goes away; None when there is none, or the directory
/// stays.
fn keep_log(made: &Made, bundle: &Path) -> Option<PathBuf> {
    let log = bundle.join(LOG);
    std::fs::copy(made.work.as_ref()?.join("dump.log"), &log).ok()?;
    Some(log)
}

fn options(r: &wire::CheckpointTaskRequest) -> Result<runc::CheckpointOptions> {
    let Some(any) = r.options.as_ref().filter(|any| !any.value.is_empty()) else {
        return Ok(runc::CheckpointOptions::default());
    };
    let bad = |e: prost::DecodeError| Error::new(Kind::Invalid, "options", &any.type_url).source(e);
    match message_name(any) {
        "containerd.runc.v1.CheckpointOptions" => {
            prost::Message::decode(any.value.as_slice()).map_err(bad)
        }
        // Clients of containerd 1.x, to a runtime of any type but their own.
        "containerd.linux.runc.CheckpointOptions" => {
            let o: old::CheckpointOptions =
                prost::Message::decode(any.value.as_slice()).map_err(bad)?;
            Ok(runc::CheckpointOptions {
                exit: o.exit,
                open_tcp: o.open_tcp,
                external_unix_sockets: o.external_unix_sockets,
                terminal: o.terminal,
                file_locks: o.file_locks,
                empty_namespaces: o.empty_namespaces,
                cgroups_mode: o.cgroups_mode,
                image_path: o.image_path,
                work_path: o.work_path,
                parent_path: String::new(),
            })
        }
        _ => Err(Error::new(
            Kind::Invalid,
            "options of unknown type",
            &any.type_url,
        )),
    }
}

fn arguments(
    options: &runc::CheckpointOptions,
    image: &str,
    work: &Path,
    id: &str,
) -> Vec<OsString> {
    let mut parts = args(&["checkpoint", "--image-path", image, "--work-path"]);
    parts.push(work.into());
    for (flag, value) in [
        ("--parent-path", &options.parent_path),
        ("--manage-cgroups-mode", &options.cgroups_mode),
    ] {
        if !value.is_empty() {
            parts.extend(args(&[flag, value]));
        }
    }
    for (flag, on) in [
        ("--leave-running", !options.exit),
        ("--tcp-established", options.open_tcp),
        ("--ext-unix-sk", options.external_unix_sockets),
        ("--shell-job", options.terminal),
        ("--file-locks", options.file_locks),
    ] {
        parts.extend(on.then(|| OsString::from(flag)));
    }
    for namespace in &options.empty_namespaces {
        parts.extend(args(&["--empty-ns", namespace]));
    }
    parts.push(id.into());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use prost_types::Any;

    fn words(options: &runc::CheckpointOptions) -> String {
        let parts = arguments(options, "/i", Path::new("/w"), "c");
        let parts: Vec<_> = parts.iter().map(|part| part.to_string_lossy()).collect();
        parts.join(" ")
    }

    #[test]
    fn every_option_reaches_the_runtime() {
        assert_eq!(
            words(&runc::CheckpointOptions::default()),
            "checkpoint --image-path /i --work-path /w --leave-running c"
        );
        let all = runc::CheckpointOptions {
            exit: true,
            open_tcp: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "soft".into(),
            image_path: "/ignored".into(),
            work_path: "/ignored".into(),
            parent_path: "../p".into(),
        };
        assert_eq!(
            words(&all),
            "checkpoint --image-path /i --work-path /w --parent-path ../p --manage-cgroups-mode \
             soft --tcp-established --ext-unix-sk --shell-job --file-locks --empty-ns network c"
        );
    }

    #[test]
    fn options_of_another_type_are_refused() {
        let request = |url: &str| wire::CheckpointTaskRequest {
            options: Some(Any {
                type_url: url.into(),
                value: runc::CheckpointOptions {
                    exit: true,
                    ..Default::default()
                }
                .encode_to_vec(),
            }),
            ..Default::default()
        };
        let good = request("type.googleapis.com/containerd.runc.v1.CheckpointOptions");
        assert!(options(&good).unwrap().exit);
        assert!(
            !options(&wire::CheckpointTaskRequest::default())
                .unwrap()
                .exit
        );
        // The two paths have changed places since.
        let mut request_of_old = request("containerd.linux.runc.CheckpointOptions");
        let value = old::CheckpointOptions {
            image_path: "/i".into(),
            work_path: "/w".into(),
            ..Default::default()
        };
        request_of_old.options.as_mut().unwrap().value = value.encode_to_vec();
        let got = options(&request_of_old).unwrap();
        assert_eq!(
            (got.image_path.as_str(), got.work_path.as_str()),
            ("/i", "/w")
        );
        assert_eq!(options(&request("x.Y")).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn log_is_kept_when_its_directory_goes() {
        let bundle = tempfile::tempdir().unwrap();
        let work = bundle.path().join("criu-work");
        let made = Made {
            image: String::new(),
            work: Some(work.clone()),
        };
        assert_eq!(keep_log(&made, bundle.path()), None);
        std::fs::create_dir(&work).unwrap();
        std::fs::write(work.join("dump.log"), "why").unwrap();
        let kept = keep_log(&made, bundle.path()).unwrap();
        assert_eq!(std::fs::read_to_string(kept).unwrap(), "why");
    }
}
