//! The inputs of `runtime/fuzz/regressions`, through the fuzz targets' own code: seeds, and what
//! once made one of them fail.

#[path = "../fuzz/bodies.rs"]
mod bodies;

use std::path::Path;

fn feed(target: &str, body: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/regressions")
        .join(target);
    let mut fed = 0;
    for file in std::fs::read_dir(&folder).expect("the folder is in the repository") {
        let path = file.expect("a readable folder").path();
        println!("{}", path.display());
        body(&std::fs::read(&path).expect("a readable file"));
        fed += 1;
    }
    assert!(fed > 0, "{} is empty", folder.display());
}

#[test]
fn config() {
    feed("config", bodies::config);
}

#[test]
fn seccomp() {
    feed("seccomp", bodies::seccomp);
}

#[test]
fn passwd() {
    feed("passwd", bodies::passwd);
}

#[test]
fn record() {
    feed("record", bodies::record);
}
