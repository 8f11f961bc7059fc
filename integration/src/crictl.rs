//! crictl against one socket, and the configs that it takes for pods and containers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::binaries;

#[derive(Clone)]
pub struct Crictl {
    program: PathBuf,
    config: PathBuf,
}

impl Crictl {
    pub fn new(dir: &Path, socket: &Path) -> Result<Self> {
        let config = dir.join("crictl.yaml");
        let endpoint = format!("unix://{}", socket.display());
        std::fs::write(
            &config,
            format!("runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 30\n"),
        )?;
        Ok(Self {
            program: binaries::crictl()?,
            config,
        })
    }

    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--config")
            .arg(&self.config)
            .args(args.iter().map(AsRef::as_ref));
        command.stdin(Stdio::null());
        command
    }

    /// Whatever happens, as it is.
    pub fn try_run<S: AsRef<str>>(&self, args: &[S]) -> Result<Output> {
        self.command(args).output().context("run crictl")
    }

    /// Stdout without the last newline; a failure is an error with what crictl said.
    pub fn run<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        let output = self.try_run(args)?;
        let words: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        if !output.status.success() {
            bail!(
                "crictl {}: {}: {}{}",
                words.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout)
            .trim_end_matches('\n')
            .to_owned())
    }

    /// What crictl says when the call is refused; succeeding is an error.
    pub fn refused<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        let output = self.try_run(args)?;
        let words: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        ensure!(
            !output.status.success(),
            "crictl {} succeeded",
            words.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub fn json<S: AsRef<str>>(&self, args: &[S]) -> Result<Value> {
        let text = self.run(args)?;
        serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
    }

    /// Ids, one a line.
    pub fn ids<S: AsRef<str>>(&self, args: &[S]) -> Result<Vec<String>> {
        Ok(self.run(args)?.lines().map(str::to_owned).collect())
    }
}

/// What the kubelet asks for unless a pod says otherwise: pids of the container's own.
const NAMESPACES: &str = "/linux/security_context/namespace_options";

/// A JSON document that is filled in by pointers ("/linux/security_context/privileged").
#[derive(Clone, Debug)]
pub struct Config(pub Value);

impl Config {
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.0;
        for key in pointer.split('/').skip(1) {
            if !at.is_object() {
                *at = json!({});
            }
            at = &mut at[key];
        }
        *at = value.into();
        self
    }

    pub fn push(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let old = self.0.pointer(pointer).and_then(Value::as_array).cloned();
        let mut list = old.unwrap_or_default();
        list.push(value.into());
        self = self.set(pointer, list);
        self
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(std::fs::write(path, serde_json::to_vec_pretty(&self.0)?)?)
    }
}

pub fn pod(name: &str) -> Config {
    Config(json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0},
    }))
    .set(NAMESPACES, json!({"pid": 1}))
}

/// A container that runs `command` (none: the image's own).
pub fn container(name: &str, image: &str, command: &[&str]) -> Config {
    Config(json!({
        "metadata": {"name": name, "attempt": 0},
        "image": {"image": image},
        "command": command,
        "log_path": format!("{name}.log"),
    }))
    .set(NAMESPACES, json!({"pid": 1}))
}

/// One parsed line of a container's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub time: String,
    pub stream: String,
    pub partial: bool,
    pub text: String,
}

/// Parses CRI log lines strictly: a line that does not fit the format is an error.
pub fn parse_log(text: &str) -> Result<Vec<LogLine>> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some(time), Some(stream), Some(tag), Some(text)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            bail!("not a CRI log line: {line:?}");
        };
        ensure!(
            time.len() >= 20 && time.contains('T'),
            "no RFC 3339 time: {line:?}"
        );
        ensure!(
            ["stdout", "stderr"].contains(&stream),
            "no stream: {line:?}"
        );
        ensure!(["F", "P"].contains(&tag), "no tag: {line:?}");
        lines.push(LogLine {
            time: time.to_owned(),
            stream: stream.to_owned(),
            partial: tag == "P",
            text: text.to_owned(),
        });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_creates_objects_on_the_way() {
        let config = pod("a")
            .set("/linux/security_context/privileged", true)
            .push("/x/y", 1);
        assert_eq!(config.0["linux"]["security_context"]["privileged"], true);
        assert_eq!(config.0["x"]["y"], json!([1]));
    }

    #[test]
    fn parse_log_wrong_line_is_an_error() {
        let lines = parse_log("2024-01-01T00:00:00.1Z stdout F a b\n").unwrap();
        assert_eq!(lines[0].text, "a b");
        assert!(parse_log("line without a time").is_err());
    }
}
