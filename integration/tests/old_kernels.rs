//! The table of docs/kernel-features.md: each system call that a kernel or a sandbox may not have,
//! answered with ENOSYS. Either the container sees the same as with it, or the error names the call
//! and nothing is left.

use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::crictl::Config;
use coracle_integration::{binaries, need_root};
use serde_json::{Value, json};

/// `coracle ARGS` with calls missing.
fn without(bench: &Bench, calls: &str, args: &[&str]) -> Result<Output> {
    let words = bench.coracle()?.words(args);
    Command::new(binaries::without()?)
        .arg(calls)
        .args(words)
        .stdin(std::process::Stdio::null())
        .output()
        .context("without")
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// What the probe shows, but for what differs from run to run, and for the filter that hides the
/// calls.
fn shown(out: &str) -> Result<Value> {
    let mut shown: Value = serde_json::from_str(out).with_context(|| out.to_owned())?;
    let all = shown.as_object_mut().context("an object")?;
    for key in [
        "namespaces",
        "seccomp",
        "seccompFilters",
        "noNewPrivs",
        "cgroup",
        "fds",
    ] {
        let value = all
            .remove(key)
            .with_context(|| format!("the probe shows {key}"))?;
        if key == "fds" {
            // Which fds there are; the pipes behind them are of each run.
            let numbers: Vec<String> = value
                .as_object()
                .into_iter()
                .flatten()
                .map(|(n, _)| n.clone())
                .collect();
            all.insert(key.to_owned(), json!(numbers));
        }
    }
    Ok(shown)
}

fn config(bench: &Bench, args: &[&str]) -> Config {
    bench
        .config("c", args)
        .set("/process/noNewPrivileges", json!(true))
}

const WITH_FALLBACK: [&str; 4] = [
    "clone3",
    "close_range",
    "openat2",
    "clone3,close_range,openat2",
];

#[test]
fn run_without_a_call_that_has_a_fallback_is_the_same() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    // Symlinks on the way to masked and read-only paths: what openat2 is there for.
    let config = config(&bench, &["show"])
        .set("/linux/maskedPaths", json!(["/proc/kcore", "/link/sub"]))
        .set("/linux/readonlyPaths", json!(["/proc/sys", "/link/file"]));
    let bundle = bench.bundle("b", &config)?;
    let rootfs = bundle.join("rootfs");
    std::fs::create_dir_all(rootfs.join("real/sub"))?;
    std::fs::write(rootfs.join("real/file"), "")?;
    std::os::unix::fs::symlink("/real", rootfs.join("link"))?;
    let bundle = bundle.display().to_string();
    let whole = shown(&bench.coracle()?.run(&["run", "-b", &bundle, "c"])?)?;
    ensure!(whole.to_string().contains("/real/sub"), "{whole:#}");
    for calls in WITH_FALLBACK {
        let output = without(&bench, calls, &["run", "-b", &bundle, "c"])?;
        let (out, err) = text(&output);
        ensure!(output.status.success(), "without {calls}: {err}");
        let seen = shown(&out)?;
        ensure!(
            seen == whole,
            "without {calls}:\n{seen:#}\nwith:\n{whole:#}"
        );
    }
    bench.finish()
}

#[test]
fn exec_without_a_call_that_has_a_fallback_is_the_same() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let sleeper = config(&bench, &["sleep", "100"]);
    let bundle = bench.bundle("b", &sleeper)?.display().to_string();
    let coracle = bench.coracle()?;
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let look = ["exec", "c", "/bin/probe", "show"];
    let pids = |mut seen: Value| {
        // The pid namespace lives on: each exec is another process in it.
        for key in ["pid", "nsPid", "session", "processGroup"] {
            seen[key] = Value::Null;
        }
        seen
    };
    let whole = pids(shown(&coracle.run(&look)?)?);
    for calls in WITH_FALLBACK {
        let output = without(&bench, calls, &look)?;
        let (out, err) = text(&output);
        ensure!(output.status.success(), "without {calls}: {err}");
        let seen = pids(shown(&out)?);
        ensure!(
            seen == whole,
            "without {calls}:\n{seen:#}\nwith:\n{whole:#}"
        );
    }
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}

#[test]
fn run_without_a_required_call_names_it_and_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let bundle = bench
        .bundle("b", &config(&bench, &["show"]))?
        .display()
        .to_string();
    for call in ["open_tree", "move_mount", "fsopen", "mount_setattr"] {
        let output = without(&bench, call, &["run", "-b", &bundle, "c"])?;
        let (_, err) = text(&output);
        ensure!(!output.status.success(), "run did without {call}");
        ensure!(
            err.contains(call) && err.to_lowercase().contains("function not implemented"),
            "without {call}: {err}"
        );
        let left = bench.coracle()?.run(&["list", "-q"])?;
        ensure!(left.is_empty(), "without {call}: {left} is left");
    }
    bench.finish()
}

#[test]
fn kill_without_pidfd_open_names_it_and_leaves_the_container() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let sleeper = config(&bench, &["sleep", "100"]);
    let bundle = bench.bundle("b", &sleeper)?.display().to_string();
    let coracle = bench.coracle()?;
    // The start itself has its pidfd from the clone.
    let whole = bench
        .bundle("whole", &config(&bench, &["show"]))?
        .display()
        .to_string();
    let output = without(&bench, "pidfd_open", &["run", "-b", &whole, "whole"])?;
    ensure!(output.status.success(), "{}", text(&output).1);
    coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
    let output = without(&bench, "pidfd_open", &["kill", "c", "KILL"])?;
    let (_, err) = text(&output);
    ensure!(
        !output.status.success() && err.contains("pidfd_open"),
        "{err}"
    );
    coracle.wait_status("c", "running")?;
    coracle.run(&["delete", "--force", "c"])?;
    bench.finish()
}
