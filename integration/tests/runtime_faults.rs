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
