//! The same bundles under coracle and under Debian's runc and crun: bundles generated from a
//! grammar of config features, and configs that are refused. Differences that are allowed are
//! listed with their reason, and each of them must occur; any other fails.
//!
//! `CORACLE_SEED=17` runs that case alone and prints its config and what each runtime made of it.

#[path = "runtime_peers/allowed.rs"]
mod allowed;

use std::collections::BTreeMap;

use allowed::{ALLOWED, Allowed};
use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::differ::{self, Ground};
use coracle_integration::generated::{self, Case};
use coracle_integration::{need_root, skip};
use serde_json::Value;

const CASES: u64 = 300;
/// Of these, one in so many also goes through create, start, exec, kill and delete.
const LIVE: u64 = 15;
const WORKERS: u64 = 2;
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// One difference, in one case.
#[derive(Debug)]
pub struct Difference {
    case: String,
    features: Vec<&'static str>,
    text: String,
}

/// An outcome without what is a race in every runtime: a poststart hook that fails ends a container
/// whose program is running already, and may have said something by then or not.
fn settled(case: &Case, mut outcome: Value) -> Value {
    let fails = case.features.contains(&"hook that fails")
        && case.config.0.pointer("/hooks/poststart").is_some()
        && outcome["code"] != 0;
    if let (true, Some(all)) = (fails, outcome.as_object_mut()) {
        for key in ["sees", "output", "error"] {
            all.remove(key);
        }
    }
    outcome
}

/// All that is compared for one seed.
fn compare_case(
    ground: &Ground,
    ours: &Runtime,
    theirs: &Runtime,
    seed: u64,
) -> Result<Vec<Difference>> {
    let case = generated::case(seed, &ground.places);
    let id = format!("{}c", ground.places.mark.replace('/', "-"));
    let alone = std::env::var_os("CORACLE_SEED").is_some();
    let mut texts = Vec::new();
    let run = |runtime: &Runtime| {
        ground
            .run(runtime, &case, &id)
            .map(|outcome| settled(&case, outcome))
            .with_context(|| format!("seed {seed}, {}", runtime.name))
    };
    let left = run(ours)?;
    let right = run(theirs)?;
    if alone {
        println!(
            "{:#}\ncoracle: {left:#}\n{}: {right:#}",
            case.config.0, theirs.name
        );
    }
    texts.extend(differ::differences(&left, &right));
    let bad = |texts: &[String]| {
        let of = |text: &String| Difference {
            case: String::new(),
            features: case.features.clone(),
            text: text.clone(),
        };
        let allowed = |d: &Difference| ALLOWED.iter().any(|a| a.covers(&theirs.name, d));
        texts.iter().map(of).any(|d| !allowed(&d))
    };
    if bad(&texts) {
        // The peers have races of their own on a busy machine; what coracle did stands.
        texts = differ::differences(&left, &run(theirs)?);
    }
    if seed.is_multiple_of(LIVE) && !case.terminal {
        let left = ground
            .live(ours, &case, &id)
            .with_context(|| format!("seed {seed}, coracle"))?;
        let right = ground
            .live(theirs, &case, &id)
            .with_context(|| format!("seed {seed}, peer"))?;
        if alone {
            println!("coracle: {left:#}\n{}: {right:#}", theirs.name);
        }
        let found = differ::differences(&left, &right);
        texts.extend(found.into_iter().map(|d| format!("/live{d}")));
    }
    Ok(texts
        .into_iter()
        .map(|text| Difference {
            case: format!("seed {seed}"),
            features: case.features.clone(),
            text,
        })
        .collect())
}

fn compare_refusals(ground: &Ground, ours: &Runtime, theirs: &Runtime) -> Result<Vec<Difference>> {
    let id = format!("{}r", ground.places.mark.replace('/', "-"));
    let mut found = Vec::new();
    for (name, config) in generated::refused(&ground.places) {
        let refusal = |runtime: &Runtime| {
            ground
                .refusal(runtime, &config, &id)
                .with_context(|| format!("{name}, {}", runtime.name))
        };
        let (left, right) = (refusal(ours)?, refusal(theirs)?);
        found.extend(
            differ::differences(&left, &right)
                .into_iter()
                .map(|text| Difference {
                    case: format!("refused: {name}"),
                    features: vec![name],
                    text,
                }),
        );
    }
    Ok(found)
}

fn compare(bench: &Bench, peer: &str, theirs: &Runtime) -> Result<Vec<Difference>> {
    let ours = bench.coracle()?;
    let one = std::env::var("CORACLE_SEED")
        .ok()
        .map(|s| s.parse::<u64>())
        .transpose()?;
    let mut found = Vec::new();
    let grounds = (0..WORKERS)
        .map(|n| {
            Ground::prepare(
                &bench.dir.join(format!("w{n}")),
                &format!("{}/w{n}", bench.mark),
            )
        })
        .collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = grounds
            .iter()
            .zip(0u64..)
            .map(|(ground, n)| {
                let ours = &ours;
                scope.spawn(move || -> Result<Vec<Difference>> {
                    let mut found = Vec::new();
                    for seed in (0..CASES).filter(|s| s % WORKERS == n) {
                        if one.is_none_or(|one| one == seed) {
                            found.extend(compare_case(ground, ours, theirs, seed)?);
                        }
                    }
                    if n == 0 && one.is_none() {
                        found.extend(compare_refusals(ground, ours, theirs)?);
                    }
                    Ok(found)
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(part) => found.extend(part?),
                Err(_) => bail!("a worker panicked"),
            }
        }
        Ok(())
    })?;
    for ground in grounds {
        ground.close()?;
    }
    for runtime in [&ours, theirs] {
        let left = runtime.run(&["list", "-q"])?;
        ensure!(
            left.trim().is_empty(),
            "{peer}: containers are left: {left}"
        );
    }
    Ok(found)
}

/// Without the times that messages begin with, so that equal ones are counted together.
fn timeless(text: &str) -> String {
    let mut parts = text.split("time=\"");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| {
        all + part.split_once("\" ").map_or(part, |(_, rest)| rest)
    })
}

/// Splits off what is allowed; an entry that allowed nothing is an error as well.
fn judge(peer: &str, found: Vec<Difference>) -> Result<()> {
    let mine: Vec<&Allowed> = ALLOWED.iter().filter(|a| a.peer == peer).collect();
    let mut used = vec![false; mine.len()];
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for difference in found {
        match mine.iter().position(|a| a.covers(peer, &difference)) {
            Some(index) => used[index] = true,
            None => wrong
                .entry(timeless(&difference.text))
                .or_default()
                .push(format!("{} {:?}", difference.case, difference.features)),
        }
    }
    let mut lines: Vec<String> = Vec::new();
    for (text, cases) in &wrong {
        lines.push(format!(
            "{text}\n      in {} cases: {}",
            cases.len(),
            cases[..cases.len().min(4)].join(", ")
        ));
    }
    if std::env::var_os("CORACLE_SEED").is_none() {
        for (allowed, _) in mine.iter().zip(&used).filter(|(_, used)| !**used) {
            lines.push(format!(
                "allowed and never seen: {:?} {:?} ({})",
                allowed.feature, allowed.text, allowed.why
            ));
        }
    }
    ensure!(
        lines.is_empty(),
        "against {peer}:\n  {}",
        lines.join("\n  ")
    );
    Ok(())
}

#[test]
fn generated_bundles_are_to_coracle_what_they_are_to_runc() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let Some(runc) = bench.peer("runc")? else {
        skip!("runc is not installed")
    };
    let found = compare(&bench, "runc", &runc)?;
    judge("runc", found)?;
    bench.finish()
}

#[test]
fn generated_bundles_are_to_coracle_what_they_are_to_crun() -> Result<()> {
    need_root!();
    let bench = Bench::new()?;
    let Some(crun) = bench.peer("crun")? else {
        skip!("crun is not installed")
    };
    // crun refuses a hybrid host whose cgroup2 mount has controllers. In the test's own mount
    // namespace that mount can go, for both alike.
    let _ = nix::mount::umount(UNIFIED);
    let found = compare(&bench, "crun", &crun)?;
    // It writes there all the same, and what lies below the mount is a plain directory.
    for entry in std::fs::read_dir(UNIFIED).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(&bench.mark) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    judge("crun", found)?;
    bench.finish()
}
