//! `fixtures`: builds the test images into the cache, lists them, pushes them to a registry or
//! writes a registry's storage. Says on stdout where the result is.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use coracle_fixtures::catalogue::{self, Ingredients};
use coracle_fixtures::layout::{self, Layout};
use coracle_fixtures::registry;

const USAGE: &str = "usage: fixtures build    [--out DIR]
       fixtures list     [--out DIR]
       fixtures push     [--out DIR] --registry HOST:PORT
       fixtures storage  [--out DIR]
DIR is the OCI layout, by default in $CORACLE_CACHE (~/.cache/coracle).
storage writes DIR.registry, the files of a docker-registry that serves every image.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fixtures: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let command = args.next().context(USAGE)?;
    let mut out = None;
    let mut host = None;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--out" => out = Some(PathBuf::from(args.next().context(USAGE)?)),
            "--registry" => host = Some(args.next().context(USAGE)?),
            _ => bail!(USAGE),
        }
    }
    let built = build(out)?;
    match command.as_str() {
        "build" => println!("{}", built.layout.display()),
        "list" => {
            for named in layout::read_index(&built.layout)? {
                println!("{} sha256:{}", named.name, named.digest);
            }
        }
        "push" => {
            let host = host.context(USAGE)?;
            let count = registry::push(&built.layout, &host)?;
            println!("pushed {count} names to {host}");
        }
        "storage" => println!("{}", storage(&built)?.display()),
        _ => bail!(USAGE),
    }
    Ok(())
}

struct Built {
    layout: PathBuf,
    key: String,
}

/// Builds unless the directory holds the result already. In the cache every result has a
/// directory of its own, as a test may still be reading the last one.
fn build(out: Option<PathBuf>) -> Result<Built> {
    let exe = std::env::current_exe()?;
    let probe = exe.with_file_name("probe");
    if !probe.exists() {
        bail!(
            "{} is missing: it is built together with this program",
            probe.display()
        );
    }
    let cache = coracle_fixtures::cache_dir()?;
    let ingredients = Ingredients::gather(&cache, &probe)?;
    let key = ingredients.key()?;
    let layout = match out {
        Some(out) => out,
        None => {
            let all = cache.join("fixtures");
            let name = coracle_fixtures::short_hash(&key);
            prune(&all, &name);
            all.join(name).join("layout")
        }
    };
    if !Layout::is_current(&layout, &key) {
        replace(&layout, |staging| {
            let mut layout = Layout::create(staging)?;
            catalogue::build(&ingredients, &mut layout)?;
            layout.finish(&key)
        })?;
    }
    Ok(Built { layout, key })
}

/// Removes results that no run has made for a day.
fn prune(all: &Path, keep: &str) {
    for entry in std::fs::read_dir(all).into_iter().flatten().flatten() {
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .map(|m| m.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age > Duration::from_secs(24 * 3600));
        if old && entry.file_name() != keep {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn storage(built: &Built) -> Result<PathBuf> {
    let dir = built.layout.with_extension("registry");
    let stamp = dir.join("fixtures.key");
    if std::fs::read_to_string(&stamp).is_ok_and(|k| k == built.key) {
        return Ok(dir);
    }
    replace(&dir, |staging| {
        registry::export(&built.layout, staging)?;
        Ok(std::fs::write(staging.join("fixtures.key"), &built.key)?)
    })?;
    Ok(dir)
}

/// Fills a directory beside `dir` and puts it in its place, so that no reader sees half of it.
fn replace(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let staging = dir.with_extension(format!("tmp{}", std::process::id()));
    let old = dir.with_extension(format!("old{}", std::process::id()));
    std::fs::create_dir_all(&staging)?;
    if let Err(error) = fill(&staging) {
        let _ = std::fs::remove_dir_all(&staging);
        return Err(error);
    }
    if dir.exists() {
        std::fs::rename(dir, &old)?;
    }
    std::fs::rename(&staging, dir)?;
    if old.exists() {
        std::fs::remove_dir_all(&old)?;
    }
    Ok(())
}
