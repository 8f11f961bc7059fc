//! Files out of Debian packages: downloaded by apt into the cache and extracted there, never
//! installed. A package that is in the cache is not fetched again unless apt knows a newer one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::elf;
use crate::tree::{Source, Tree};

pub struct Packages {
    cache: PathBuf,
    roots: Vec<PathBuf>,
    names: Vec<String>,
}

/// What apt would install now: package name to the file name of its archive. Asked once for all
/// packages, as every start of apt-cache takes most of a second.
pub struct Known(BTreeMap<String, String>);

impl Known {
    /// `wanted` as in `Packages::fetch`.
    pub fn ask<'a>(wanted: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let names: BTreeSet<&str> = wanted.into_iter().flat_map(|w| w.split('|')).collect();
        let output = Command::new("apt-cache")
            .args(["show", "--no-all-versions"])
            .args(names)
            .output()
            .context("run apt-cache")?;
        Ok(Self(parse_records(&String::from_utf8_lossy(
            &output.stdout,
        ))))
    }
}

impl Packages {
    /// `wanted` holds one package per item; `a|b` takes the first that apt knows, as names
    /// differ between releases.
    pub fn fetch(cache: &Path, known: &Known, wanted: &[&str]) -> Result<Self> {
        let cache = cache.join("debs");
        fs::create_dir_all(&cache)?;
        let mut packages = Self {
            cache,
            roots: Vec::new(),
            names: Vec::new(),
        };
        for alternatives in wanted {
            packages.add(known, alternatives)?;
        }
        Ok(packages)
    }

    /// File names of the packages: part of the key of what is built from them.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    fn add(&mut self, known: &Known, alternatives: &str) -> Result<()> {
        let candidate = alternatives
            .split('|')
            .find_map(|name| Some((name.to_owned(), known.0.get(name)?.clone())));
        let (name, file) = match candidate {
            Some(candidate) => candidate,
            None => self.cached(alternatives).with_context(|| {
                format!("package {alternatives}: apt does not know it (run apt-get update)")
            })?,
        };
        if !self.cache.join(&file).exists() {
            self.download(&name)?;
        }
        let root = self.extract(&file)?;
        self.roots.push(root);
        self.names.push(file);
        Ok(())
    }

    /// What an earlier run left, for a machine whose package lists are gone.
    fn cached(&self, alternatives: &str) -> Option<(String, String)> {
        let mut files: Vec<String> = fs::read_dir(&self.cache)
            .ok()?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|f| f.ends_with(".deb"))
            .collect();
        files.sort();
        alternatives.split('|').find_map(|name| {
            let prefix = format!("{name}_");
            let file = files.iter().rev().find(|f| f.starts_with(&prefix))?;
            Some((name.to_owned(), file.clone()))
        })
    }

    fn download(&self, name: &str) -> Result<()> {
        let output = Command::new("apt-get")
            .args(["download", "-q", name])
            .current_dir(&self.cache)
            .output()
            .context("run apt-get download")?;
        if !output.status.success() {
            bail!(
                "apt-get download {name}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    fn extract(&self, file: &str) -> Result<PathBuf> {
        let root = self.cache.join("extracted").join(file);
        if root.exists() {
            return Ok(root);
        }
        let staging = root.with_extension(format!("tmp{}", std::process::id()));
        fs::create_dir_all(&staging)?;
        let status = Command::new("dpkg-deb")
            .arg("-x")
            .arg(self.cache.join(file))
            .arg(&staging)
            .status()
            .context("run dpkg-deb")?;
        if !status.success() {
            bail!("dpkg-deb -x {file}: {status}");
        }
        // Lost the race against another run: its result is as good.
        if fs::rename(&staging, &root).is_err() {
            fs::remove_dir_all(&staging)?;
        }
        Ok(root)
    }

    /// The file at `path` in one of the packages.
    pub fn find(&self, path: &str) -> Result<PathBuf> {
        let relative = path.trim_start_matches('/');
        // Packages of a merged-/usr release have moved below usr.
        let places = [relative.to_owned(), format!("usr/{relative}")];
        self.roots
            .iter()
            .flat_map(|root| places.iter().map(move |p| root.join(p)))
            .find(|p| p.exists())
            .with_context(|| format!("no package in {:?} has {path}", self.names))
    }

    /// Adds the programs (path in the package, path in the image) and the shared libraries that
    /// they and `plugins` need, the dynamic linker included.
    pub fn programs(&self, mut tree: Tree, programs: &[(&str, &str)]) -> Result<Tree> {
        let mut queue = Vec::new();
        for (from, to) in programs {
            let file = self.find(from)?;
            tree = tree.file(to, 0o755, Source::Path(file.clone()));
            queue.push(file);
        }
        let libraries = self.libraries();
        let mut seen = BTreeSet::new();
        while let Some(file) = queue.pop() {
            let bytes = fs::read(&file)?;
            let dynamic = elf::dynamic(&bytes).with_context(|| file.display().to_string())?;
            for name in &dynamic.needed {
                if !seen.insert(name.clone()) {
                    continue;
                }
                let found = libraries.get(name.as_str()).with_context(|| {
                    format!(
                        "{} needs {name}, which no package in {:?} has",
                        file.display(),
                        self.names
                    )
                })?;
                tree = tree.file(
                    &format!("/lib/{}/{name}", triplet()),
                    0o755,
                    Source::Path(fs::canonicalize(found)?),
                );
                queue.push(found.clone());
            }
            if let Some(interpreter) = dynamic.interpreter {
                let name = interpreter
                    .rsplit('/')
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                let found = libraries
                    .get(name.as_str())
                    .with_context(|| format!("no package has the dynamic linker {name}"))?;
                let source = Source::Path(fs::canonicalize(found)?);
                tree = tree.file(&interpreter, 0o755, source);
                seen.insert(name);
            }
        }
        Ok(tree)
    }

    fn libraries(&self) -> BTreeMap<String, PathBuf> {
        let triplet = triplet();
        let mut found = BTreeMap::new();
        for root in &self.roots {
            for dir in ["lib", "usr/lib"] {
                let dir = root.join(dir).join(&triplet);
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if name.contains(".so") {
                        found.insert(name, entry.path());
                    }
                }
            }
        }
        found
    }
}

fn triplet() -> String {
    format!("{}-linux-gnu", std::env::consts::ARCH)
}

/// Records of `apt-cache show`, as apt names the archives that it downloads.
fn parse_records(text: &str) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for record in text.split("\n\n") {
        let field = |key: &str| {
            record
                .lines()
                .find_map(|l| l.strip_prefix(key))
                .map(str::trim)
        };
        let fields = (field("Package:"), field("Version:"), field("Architecture:"));
        if let (Some(name), Some(version), Some(arch)) = fields {
            let file = format!("{name}_{}_{arch}.deb", version.replace(':', "%3a"));
            files.insert(name.to_owned(), file);
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_records_epoch_becomes_apts_file_name() {
        let text = "Package: a\nVersion: 1:2.0-1\nArchitecture: amd64\nDescription: x\n y\n\n\
                    Package: b\nArchitecture: all\nVersion: 3\n";
        let files = parse_records(text);
        assert_eq!(files["a"], "a_1%3a2.0-1_amd64.deb");
        assert_eq!(files["b"], "b_3_all.deb");
    }
}
