//! The runtime after a fault: what `delete --force` still gives back.

use anyhow::{Result, ensure};
use coracle_integration::bundle::Bench;
use coracle_integration::need_root;

#[test]
fn delete_forced_with_a_damaged_record_leaves_nothing() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    for damage in ["", "{", "{\"id\":7}"] {
        coracle.detached(&["run", "-d", "-b", &bundle, "c"], &bench.dir.join("log"))?;
        let pid = coracle.state("c")?["pid"].as_u64().unwrap_or_default();
        std::fs::write(coracle.root.join("c/state.json"), damage)?;
        let error = coracle.refused(&["delete", "c"])?;
        ensure!(error.contains("state.json"), "{error}");
        coracle.try_run(&["list"])?;
        coracle.run(&["delete", "--force", "c"])?;
        // A zombie, until its new parent reaps it, has no command line.
        let alive = std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| !c.is_empty());
        ensure!(!alive, "process {pid} lives on after damage {damage:?}");
        ensure!(!coracle.root.join("c").exists());
    }
    bench.finish()
}

/// Syscalls of `create` that change something, in parent or child: each is killed at its first,
/// second, ... occurrence until `create` gets through.
const KILLED_AT: &[&str] = &[
    "mkdir,mkdirat",
    "openat,openat2",
    "write",
    "rename,renameat",
    "clone3",
    "mknodat",
    "mount_setattr",
    "move_mount",
    "pivot_root",
    "recvmsg",
    "sethostname",
    "unlinkat",
];

/// Between two occurrences that are tried, once there are many.
const STRIDE: usize = 3;

#[test]
fn create_killed_at_any_syscall_leaves_nothing_after_forced_delete() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let coracle = bench.coracle()?;
    let bundle = bench.bundle("b", &bench.config("c", &["sleep", "60"]))?;
    let bundle = bundle.display().to_string();
    let create = coracle.words(&["create", "-b", &bundle, "c"]);
    let mut killed = 0;
    for calls in KILLED_AT {
        for when in (1..4).chain((4..).step_by(STRIDE)) {
            let output = std::fs::File::create(bench.dir.join("create"))?;
            let status = std::process::Command::new("strace")
                .args(["-DDD", "-qq", "-f", "-o", "/dev/null", "-e"])
                .arg(format!("trace={calls}"))
                .arg("-e")
                .arg(format!("inject={calls}:signal=KILL:when={when}"))
                .args(&create)
                .stdin(std::process::Stdio::null())
                .stdout(output.try_clone()?)
                .stderr(output)
                .status()?;
            let error = coracle.try_run(&["delete", "--force", "c"])?;
            ensure!(
                error.status.success() && !coracle.root.join("c").exists(),
                "create killed at {calls} {when}: {error:?}"
            );
            if status.success() {
                break;
            }
            killed += 1;
        }
    }
    ensure!(killed > KILLED_AT.len(), "only {killed} kills took place");
    bench.finish()
}
