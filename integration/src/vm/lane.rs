//! `make test-vm`: boots a guest, runs test executables in it one after the other and passes on
//! what libtest prints, so that `.ci/totals` counts it as if it had run here.
//!
//! An executable that dies or runs over its time gets a `test result: FAILED` line of ours. The
//! lane fails when a test failed, when the guest died and when nothing ran.

use std::fs;
use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::guest::{Guest, Machine, Share};
use super::image::Image;
use super::wire::{Ended, Request};
use crate::binaries;

/// Where the guest sees what is to be tested.
const ARTEFACTS: &str = "/run/artefacts";
/// Where it puts the programs, on a disk of its own: they are executed again and again.
const PROGRAMS: &str = "/opt/coracle";

/// Said in libtest's name for an executable that did not come to its own.
const FAILED: &str =
    "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out";

pub struct Lane {
    /// Output of `cargo test --no-run --message-format=json`.
    pub tests: PathBuf,
    /// Only tests whose name holds one of these; every one when there are none.
    pub filters: Vec<String>,
    /// The guest is killed when it lives longer.
    pub limit: Duration,
}

/// What libtest said of all executables.
#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
}

impl Lane {
    /// True when every test passed.
    pub fn run(&self) -> Result<bool> {
        if let Some(why) = missing() {
            println!("\nSKIP check vm: {why}");
            return Ok(true);
        }
        let tests = executables(&self.tests)?;
        ensure!(!tests.is_empty(), "{}: no tests", self.tests.display());
        let started = Instant::now();
        let image = Image::get(&[])?;
        println!("vm: image after {:.0?}", started.elapsed());

        let scratch = tempfile::tempdir()?;
        let artefacts = scratch.path().join("artefacts");
        collect(&tests, &artefacts)?;
        let machine = Machine {
            shares: vec![Share {
                host: artefacts,
                guest: ARTEFACTS.to_owned(),
                writable: false,
            }],
            ..Machine::default()
        };
        let started = Instant::now();
        let mut guest = Guest::start(&image, &machine, &scratch.path().join("guest"))?;
        let end = started + self.limit;
        prepare(&mut guest, end)?;
        println!("vm: booted after {:.0?}", started.elapsed());

        let mut totals = Totals::default();
        for (name, _) in &tests {
            let before = Instant::now();
            self.run_one(&mut guest, name, end, &mut totals)?;
            println!("vm: {name} took {:.0?}", before.elapsed());
        }
        println!("vm: the guest ran {:.0?}", started.elapsed());
        ensure!(
            totals.passed + totals.failed > 0,
            "no test ran in the guest"
        );
        Ok(totals.failed == 0)
    }

    fn run_one(
        &self,
        guest: &mut Guest,
        name: &str,
        end: Instant,
        totals: &mut Totals,
    ) -> Result<()> {
        println!("     Running {name} (in the guest)");
        let mut argv = vec![
            format!("{ARTEFACTS}/tests/{name}"),
            "--test-threads=1".into(),
        ];
        argv.extend(self.filters.iter().cloned());
        let left = end.saturating_duration_since(Instant::now());
        let request = Request {
            argv,
            env: vec![
                ("CORACLE_BIN_DIR".into(), PROGRAMS.into()),
                ("CORACLE_VM".into(), "1".into()),
                ("RUST_LIB_BACKTRACE".into(), "0".into()),
            ],
            cwd: Some("/root".into()),
            seconds: Some(left.as_secs().max(1)),
            ..Request::default()
        };
        let mut said = Said::default();
        let ended = guest.exec(request, left + Duration::from_secs(30), &mut |_, bytes| {
            said.pass_on(bytes)
        });
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // Counted like any test that did not end; there is no guest for those to come.
                println!("\n{FAILED}");
                return Err(error.context(name.to_owned()));
            }
        };
        totals.passed += said.passed;
        totals.failed += said.failed;
        // libtest ends with 101 and a result line when tests failed; anything else is no result.
        let counted = said.results > 0 && matches!(ended, Ended::Code(0 | 101));
        if !counted {
            totals.failed += 1;
            println!("\n{name}: {ended:?} in the guest, last said: {}", said.last);
            println!("{FAILED}");
        } else if ended != Ended::Code(0) && said.failed == 0 {
            bail!("{name} ended with {ended:?} and named no failed test");
        }
        Ok(())
    }
}

/// Why this machine can have no guest.
fn missing() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("the guest is x86_64".into());
    }
    if !rustix::process::geteuid().is_root() {
        return Some("building the guest image needs root".into());
    }
    ["qemu-system-x86_64", "mmdebstrap", "mkfs.ext4", "setpriv"]
        .iter()
        .find(|name| binaries::installed(name).is_none())
        .map(|name| format!("{name} is not installed"))
}

/// Test executables in cargo's messages: (name, path).
fn executables(messages: &Path) -> Result<Vec<(String, PathBuf)>> {
    let text =
        fs::read_to_string(messages).with_context(|| format!("read {}", messages.display()))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let message: Value = serde_json::from_str(line).context("a message of cargo")?;
        let test = message["profile"]["test"] == true && message["target"]["kind"][0] == "test";
        if let (true, Some(path)) = (test, message["executable"].as_str()) {
            let name = message["target"]["name"]
                .as_str()
                .context("a nameless target")?;
            found.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    found.sort();
    Ok(found)
}

/// Everything the guest needs in one directory. Links where the file system allows, else copies.
fn collect(tests: &[(String, PathBuf)], to: &Path) -> Result<()> {
    let put = |from: &Path, folder: &str, name: &str| -> Result<()> {
        let folder = to.join(folder);
        fs::create_dir_all(&folder)?;
        let to = folder.join(name);
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
        }
        Ok(())
    };
    for (name, path) in tests {
        put(path, "tests", name)?;
    }
    put(&binaries::coracle()?, "bin", "coracle")?;
    put(&binaries::shim()?, "bin", "containerd-shim-coracle-v2")?;
    put(&binaries::fixtures()?, "bin", "fixtures")?;
    put(&binaries::probe()?, "bin", "probe")
}

fn prepare(guest: &mut Guest, end: Instant) -> Result<()> {
    let request = Request {
        argv: ["cp", "-r", &format!("{ARTEFACTS}/bin"), PROGRAMS]
            .map(str::to_owned)
            .to_vec(),
        ..Request::default()
    };
    let left = end.saturating_duration_since(Instant::now());
    let mut said = Vec::new();
    let ended = guest.exec(request, left, &mut |_, bytes| {
        said.extend_from_slice(bytes);
        Ok(())
    })?;
    let said = String::from_utf8_lossy(&said);
    ensure!(
        ended == Ended::Code(0),
        "copy the programs: {ended:?}: {said}"
    );
    Ok(())
}

/// Output of one executable, passed on as it comes and counted by lines.
#[derive(Default)]
struct Said {
    unfinished: Vec<u8>,
    last: String,
    results: u64,
    passed: u64,
    failed: u64,
}

impl Said {
    fn pass_on(&mut self, bytes: &[u8]) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.unfinished.extend_from_slice(bytes);
        let Some(end) = self.unfinished.iter().rposition(|b| *b == b'\n') else {
            return;
        };
        let lines: Vec<u8> = self.unfinished.drain(..=end).collect();
        for line in lines.lines() {
            self.read(&line.unwrap_or_default());
        }
    }

    fn read(&mut self, line: &str) {
        if !line.trim().is_empty() {
            self.last = line.to_owned();
        }
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        self.results += 1;
        let words: Vec<&str> = result.split_ascii_whitespace().collect();
        let count = |what: &str| -> u64 {
            let at = words.iter().position(|w| *w == what).unwrap_or(0);
            at.checked_sub(1)
                .and_then(|i| words[i].parse().ok())
                .unwrap_or(0)
        };
        self.passed += count("passed;");
        self.failed += count("failed;");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_across_any_cut() {
        let text = b"running 3 tests\ntest a ... ok\n\ntest result: FAILED. 2 passed; 1 failed; \
                     0 ignored; 0 measured; 4 filtered out; finished in 0.01s\n\n";
        for step in 1..text.len() {
            let mut said = Said::default();
            for part in text.chunks(step) {
                said.count(part);
            }
            assert_eq!((said.results, said.passed, said.failed), (1, 2, 1));
        }
    }

    #[test]
    fn executables_are_those_of_test_targets() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("messages");
        let message = |kind: &str, name: &str, test: bool| {
            serde_json::json!({
                "reason": "compiler-artifact", "profile": {"test": test},
                "target": {"kind": [kind], "name": name}, "executable": format!("/x/{name}"),
            })
            .to_string()
        };
        let lines = [
            message("test", "vm_b", true),
            message("bin", "coracle", false),
            message("lib", "coracle", true),
            message("test", "vm_a", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        fs::write(&file, lines.join("\n"))?;
        let names: Vec<String> = executables(&file)?.into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["vm_a", "vm_b"]);
        Ok(())
    }
}
