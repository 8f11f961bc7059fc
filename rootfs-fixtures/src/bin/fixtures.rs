//! `fixtures`: builds the test images into the cache, lists them, pushes them to a registry or
//! writes a registry's storage. Says on stdout where the result is.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
    let out = match out {
        Some(out) => out,
        None => coracle_fixtures::cache_dir()?.join("fixtures/layout"),
    };
    match command.as_str() {
        "build" => {
            build(&out)?;
            println!("{}", out.display());
        }
        "list" => {
            build(&out)?;
            for named in layout::read_index(&out)? {
                println!("{} sha256:{}", named.name, named.digest);
            }
        }
        "push" => {
            build(&out)?;
            let host = host.context(USAGE)?;
            let count = registry::push(&out, &host)?;
            println!("pushed {count} names to {host}");
        }
        "storage" => {
            let key = build(&out)?;
            println!("{}", storage(&out, &key)?.display());
        }
        _ => bail!(USAGE),
    }
    Ok(())
}

/// Builds unless the directory holds the result already; returns the key of what it holds.
fn build(out: &Path) -> Result<String> {
    let exe = std::env::current_exe()?;
    let probe = exe.with_file_name("probe");
    if !probe.exists() {
        bail!(
            "{} is missing: it is built together with this program",
            probe.display()
        );
    }
    let ingredients = Ingredients::gather(&coracle_fixtures::cache_dir()?, &probe)?;
    let key = ingredients.key()?;
    if Layout::is_current(out, &key) {
        return Ok(key);
    }
    replace(out, |staging| {
        let mut layout = Layout::create(staging)?;
        catalogue::build(&ingredients, &mut layout)?;
        layout.finish(&key)
    })?;
    Ok(key)
}

fn storage(out: &Path, key: &str) -> Result<PathBuf> {
    let dir = out.with_extension("registry");
    let stamp = dir.join("fixtures.key");
    if std::fs::read_to_string(&stamp).is_ok_and(|k| k == key) {
        return Ok(dir);
    }
    replace(&dir, |staging| {
        registry::export(out, staging)?;
        Ok(std::fs::write(staging.join("fixtures.key"), key)?)
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
