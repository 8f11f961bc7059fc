//! A secret in the container's environment shows up nowhere on the host that others may read.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;

use super::stage::Stage;
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        cve: "-",
        tried: "a secret of process.env and exec --env in logs, errors and state files",
        run: environment,
    }]
}

const SECRET: &str = "canary-of-the-environment-7f3a";

fn environment(stage: &Stage<'_>) -> Result<Verdict> {
    let log = stage.dir().join("secret.log");
    let log_path = log.display().to_string();
    let mut texts = Vec::new();
    let variable = format!("TOKEN={SECRET}");
    for broken in [false, true] {
        for format in ["text", "json"] {
            let mut set = stage
                .set()?
                .script("sleep 600")
                .with("/process/env", json!(["PATH=/bin", variable]));
            if broken {
                set = set.with("/process/args", json!(["/no/such/program"]));
            }
            set.write_config()?;
            let bundle = set.bundle.display().to_string();
            let head = ["--debug", "--log", &log_path, "--log-format", format];
            let with = |rest: &[&str]| -> Vec<String> {
                let words = head.iter().chain(rest);
                words.map(|word| (*word).to_owned()).collect()
            };
            let call = |rest: &[&str]| {
                let words = with(rest);
                stage.call(&words.iter().map(String::as_str).collect::<Vec<_>>())
            };
            let ran = call(&["run", "-d", "-b", &bundle, &set.id])?;
            ensure!(
                broken || ran.status.is_some_and(|s| s.success()),
                "{}",
                ran.error
            );
            texts.push(("run", ran.error));
            for program in ["/bin/true", "/no/such/program"] {
                let line = ["exec", "--env", &variable, &set.id, program];
                texts.push(("exec", call(&line)?.error));
            }
            texts.push(("state", call(&["state", &set.id])?.out));
            texts.push(("list", call(&["list", "-f", "json"])?.out));
            if let Some(file) = readable_by_others(&stage.runtime.root)? {
                stage.delete(&set.id)?;
                return Ok(Verdict::Vulnerable(format!(
                    "{} holds it and others may read it",
                    file.display()
                )));
            }
            stage.delete(&set.id)?;
        }
    }
    texts.push(("the log", fs::read_to_string(&log).unwrap_or_default()));
    let found = texts.iter().find(|(_, text)| text.contains(SECRET));
    Ok(match found {
        Some((what, _)) => Verdict::Vulnerable(format!("{what} shows it")),
        None => Verdict::Safe("in none of them".to_owned()),
    })
}

/// A file below the state root that holds the secret, with no directory on the way that keeps
/// others out.
fn readable_by_others(root: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(root)?.flatten() {
        let path = entry.path();
        let stat = fs::symlink_metadata(&path)?;
        if stat.mode() & 0o077 == 0 {
            continue;
        }
        if stat.is_dir() {
            if let Some(found) = readable_by_others(&path)? {
                return Ok(Some(found));
            }
        } else if stat.is_file()
            && stat.mode() & 0o044 != 0
            && String::from_utf8_lossy(&fs::read(&path)?).contains(SECRET)
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
