//! I3 and I4: who the program runs as, and files that say so without an end.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;

use super::stage::{Set, Stage, tell};
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let case = |cve, tried, run| Case { cve, tried, run };
    vec![
        case(
            "containerd 2024-40635 class",
            "uid and gid 4294967295, huge, negative, fractional in config.json",
            overflow,
        ),
        case(
            "containerd 2024-40635 class",
            "exec --user with the same, names and blanks",
            exec_user,
        ),
        case(
            "CRI-O 2022-4318 class",
            "digits as names in passwd, ids beyond 32 bits, CR in HOME",
            passwd_lines,
        ),
        case(
            "containerd 2022-36109, CRI-O 2022-2995 class",
            "the caller's supplementary groups in run and exec",
            groups,
        ),
        case(
            "containerd 2026-46680 class",
            "passwd and group as a sparse file of 8 GiB, FIFO, /dev/zero, directory",
            endless,
        ),
    ]
}

/// The ids that a run has printed, if it got that far.
fn ids(out: &str) -> Option<(String, String, String)> {
    let field = |name: &str| {
        let mut lines = out.lines();
        lines
            .find_map(|line| line.strip_prefix(name))
            .map(|rest| rest.trim().to_owned())
    };
    Some((field("uid")?, field("gid")?, field("groups")?))
}

const SHOW: &str = "echo uid $(id -u); echo gid $(id -g); echo groups $(id -G)";

/// Puts a number, or what is none, into the text itself: no JSON library would make them all.
fn with_text(set: &Set, pointer: &str, value: &str) -> Result<()> {
    let marked = set.config_with(pointer, json!("@VALUE@"));
    let text = serde_json::to_string(&marked)?.replace("\"@VALUE@\"", value);
    Ok(fs::write(set.bundle.join("config.json"), text)?)
}

fn overflow(stage: &Stage<'_>) -> Result<Verdict> {
    let mut tries = 0;
    for value in [
        "4294967295",
        "4294967296",
        "-1",
        "-4294967296",
        "18446744073709551615",
        "18446744073709551616",
        "1e20",
        "1.5",
        "\"0\"",
        "\"\"",
        "[0]",
        "true",
    ] {
        for pointer in [
            "/process/user/uid",
            "/process/user/gid",
            "/process/user/additionalGids/0",
        ] {
            let set = stage.set()?.script(SHOW).with(
                "/process/user",
                json!({"uid": 1000, "gid": 1000, "additionalGids": [1000]}),
            );
            with_text(&set, pointer, value)?;
            let bundle = set.bundle.display().to_string();
            let ran = stage.call(&["run", "-b", &bundle, &set.id])?;
            stage.delete(&set.id)?;
            tries += 1;
            let Some((uid, gid, groups)) = ids(&ran.out) else {
                continue;
            };
            let root = |list: &str| list.split(' ').any(|id| id == "0");
            if root(&uid) || root(&gid) || root(&groups) {
                return Ok(Verdict::Vulnerable(format!(
                    "{pointer} = {value} runs as uid {uid}, gid {gid}, groups {groups}"
                )));
            }
        }
    }
    Ok(Verdict::Safe(format!("{tries} tries, none runs as root")))
}

fn exec_user(stage: &Stage<'_>) -> Result<Verdict> {
    let set = stage
        .set()?
        .script("sleep 600")
        .with("/process/user", json!({"uid": 1000, "gid": 1000}));
    fs::write(
        set.rootfs.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\n4294967295:x:0:0::/:/bin/sh\n-1:x:0:0::/:/bin/sh\n",
    )?;
    let started = stage.start(&set)?;
    ensure!(
        started.status.is_some_and(|s| s.success()),
        "{}",
        started.error
    );
    let mut found = None;
    let users = [
        "4294967295",
        "4294967295:4294967295",
        "1000:4294967295",
        "4294967296",
        "4294967296:4294967296",
        "-1",
        "-1:-1",
        "18446744073709551616",
        "1000:-4294967296",
        "0x3e8",
        "1000 ",
        "1000\n",
        ":",
        "nobody-has-this-name",
    ];
    for user in users {
        let ran = stage.call(&["exec", "--user", user, &set.id, "/bin/sh", "-c", SHOW])?;
        if let Some((uid, gid, _)) = ids(&ran.out)
            && (uid == "0" || (gid == "0" && user.contains(':')))
        {
            found.get_or_insert(format!("--user {user:?} runs as uid {uid}, gid {gid}"));
        }
    }
    stage.delete(&set.id)?;
    Ok(match found {
        Some(what) => Verdict::Vulnerable(what),
        None => Verdict::Safe(format!("{} tries, none runs as root", users.len())),
    })
}

fn passwd_lines(stage: &Stage<'_>) -> Result<Verdict> {
    let mut verdicts = Vec::new();
    for line in [
        "1000:x:0:0::/root:/bin/sh",
        "user:x:4294968296:0::/over:/bin/sh",
        "user:x:-4294966296:0::/under:/bin/sh",
        "user:x:1000:1000::/home/a\rEVIL=1:/bin/sh",
    ] {
        let set = stage
            .set()?
            .script(&format!("{SHOW}; echo home \"$HOME\""))
            .with("/process/user", json!({"uid": 1000, "gid": 1000}));
        fs::write(set.rootfs.join("etc/passwd"), format!("{line}\n"))?;
        let ran = stage.run(&set)?;
        let home = ran.out.lines().find_map(|line| line.strip_prefix("home "));
        let home = home.unwrap_or_default().trim_end_matches('\n');
        let root = ids(&ran.out).is_some_and(|(uid, gid, _)| uid == "0" || gid == "0");
        let other = home == "/over" || home == "/under" || home == "/root";
        verdicts.push(if root {
            Verdict::Vulnerable(format!("{line:?} makes uid 1000 root"))
        } else if other || home.chars().any(char::is_control) || ran.out.contains('\r') {
            Verdict::Vulnerable(format!("{line:?} gives HOME={home:?}"))
        } else {
            Verdict::Safe(tell(&ran))
        });
    }
    Ok(Verdict::worst(verdicts))
}

fn groups(stage: &Stage<'_>) -> Result<Verdict> {
    let caller = ["setpriv", "--groups", "4,27,998", "--"];
    let set = stage
        .set()?
        .script(SHOW)
        .with("/process/user", json!({"uid": 1000, "gid": 1000}));
    set.write_config()?;
    let bundle = set.bundle.display().to_string();
    let ran = stage.call_by(&caller, &["run", "-b", &bundle, &set.id])?;
    stage.delete(&set.id)?;
    let set = stage
        .set()?
        .script("sleep 600")
        .with("/process/user", json!({"uid": 1000, "gid": 1000}));
    let started = stage.start(&set)?;
    ensure!(
        started.status.is_some_and(|s| s.success()),
        "{}",
        started.error
    );
    let executed = stage.call_by(&caller, &["exec", &set.id, "/bin/sh", "-c", SHOW])?;
    stage.delete(&set.id)?;
    for (what, ran) in [("run", &ran), ("exec", &executed)] {
        match ids(&ran.out) {
            Some((_, _, groups)) => {
                let mut has = groups.split(' ');
                if has.any(|group| ["4", "27", "998"].contains(&group)) {
                    return Ok(Verdict::Vulnerable(format!(
                        "{what} has the groups {groups}"
                    )));
                }
            }
            None => return Ok(Verdict::Unsupported(format!("{what}: {}", tell(ran)))),
        }
    }
    Ok(Verdict::Safe("only the container's own".to_owned()))
}

fn endless(stage: &Stage<'_>) -> Result<Verdict> {
    const MIB_AT_MOST: i64 = 300;
    let mut verdicts = Vec::new();
    for file in ["passwd", "group"] {
        for kind in ["sparse", "fifo", "zero", "directory"] {
            let set = stage
                .set()?
                .script("echo fine")
                .with("/process/user", json!({"uid": 1000, "gid": 1000}));
            let path = set.rootfs.join("etc").join(file);
            let _ = fs::remove_file(&path);
            match kind {
                "sparse" => fs::File::create(&path)?.set_len(8 << 30)?,
                "fifo" => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?,
                "zero" => symlink("/dev/zero", &path)?,
                _ => fs::create_dir(&path)?,
            }
            let before = peak_of_children()? / 1024;
            let started = Instant::now();
            let ran = stage.run(&set)?;
            let seconds = started.elapsed().as_secs_f64();
            let mib = peak_of_children()? / 1024;
            verdicts.push(if ran.status.is_none() || seconds > 15.0 {
                Verdict::Vulnerable(format!("/etc/{file} as {kind}: {seconds:.0} s"))
            } else if mib > MIB_AT_MOST && mib > before {
                Verdict::Vulnerable(format!("/etc/{file} as {kind}: {mib} MiB of memory"))
            } else {
                Verdict::Safe(format!("{}, at most {mib} MiB", tell(&ran)))
            });
        }
    }
    Ok(Verdict::worst(verdicts))
}

/// KiB of the largest process that was waited for, in this replay.
fn peak_of_children() -> Result<i64> {
    use nix::sys::resource::{UsageWho, getrusage};
    Ok(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss())
}
