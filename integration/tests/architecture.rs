//! The architecture as a test: the edges between crates, the top-level folders, the file sizes
//! and where `unsafe` may live. Reads files only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Crate, its folder, and the workspace crates that it may link. Nothing else is allowed.
const EDGES: &[(&str, &str, &[&str])] = &[
    ("coracle-oci", "runtime/oci", &[]),
    ("coracle-sys", "runtime/sys", &[]),
    ("regex", "runtime/regex", &[]),
    ("coracle", "runtime", &["coracle-oci", "coracle-sys"]),
    ("coracle-shim", "shim", &["coracle-oci", "coracle-sys"]),
    (
        "coracle-image-store",
        "image-store",
        &["coracle-oci", "coracle-sys"],
    ),
    (
        "coracle-cri",
        "cri-server",
        &["coracle-image-store", "coracle-oci", "coracle-sys"],
    ),
    ("coracle-integration", "integration", &[]),
    ("coracle-fixtures", "rootfs-fixtures", &[]),
];

const FOLDERS: &[&str] = &[
    "cri-server",
    "docs",
    "image-store",
    "integration",
    "rootfs-fixtures",
    "runtime",
    "shim",
];

/// What the runtime must never link: async runtimes, networks. (prost alone is for CRIU's protocol.)
const NEVER_IN_RUNTIME: &[&str] = &[
    "tokio",
    "prost-types",
    "tonic",
    "reqwest",
    "hyper",
    "oci-client",
    "rustls",
];

const LINES_AT_MOST: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
        .into()
}

fn manifest(folder: &str) -> toml::Table {
    let path = root().join(folder).join("Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse()
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of everything that a manifest's tables of the given names list, per-target ones too.
fn dependencies(manifest: &toml::Table, tables: &[&str]) -> BTreeSet<String> {
    let targets = manifest.get("target").and_then(|t| t.as_table());
    let scopes = targets
        .into_iter()
        .flat_map(|t| t.values())
        .filter_map(|t| t.as_table());
    std::iter::once(manifest)
        .chain(scopes)
        .flat_map(|scope| tables.iter().filter_map(|key| scope.get(*key)?.as_table()))
        .flat_map(|table| table.keys().cloned())
        .collect()
}

/// Rust sources of one crate; nested crates (runtime/oci, runtime/sys) are crates of their own.
fn sources_of(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                if path.file_name().is_some_and(|n| n != "target")
                    && !path.join("Cargo.toml").exists()
                {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn crates_link_only_along_the_allowed_edges() {
    let ours: BTreeSet<&str> = EDGES.iter().map(|(name, _, _)| *name).collect();
    let mut wrong = Vec::new();
    for (name, folder, allowed) in EDGES {
        let manifest = manifest(folder);
        assert_eq!(
            manifest["package"]["name"].as_str(),
            Some(*name),
            "{folder}/Cargo.toml"
        );
        let all = ["dependencies", "dev-dependencies", "build-dependencies"];
        for dependency in dependencies(&manifest, &all) {
            if ours.contains(dependency.as_str()) && !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{name} -> {dependency}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "edges that the architecture does not allow: {wrong:?}"
    );
}

#[test]
fn workspace_members_are_exactly_the_listed_crates() {
    let workspace = manifest("");
    let members: BTreeSet<&str> = workspace["workspace"]["members"]
        .as_array()
        .expect("members is an array")
        .iter()
        .filter_map(|m| m.as_str())
        .collect();
    let listed: BTreeSet<&str> = EDGES.iter().map(|(_, folder, _)| *folder).collect();
    assert_eq!(members, listed);
    for (_, folder, _) in EDGES {
        let manifest = manifest(folder);
        assert_eq!(
            manifest["lints"]["workspace"].as_bool(),
            Some(true),
            "{folder}: no lints"
        );
    }
}

#[test]
fn top_level_folders_are_the_users() {
    let present: BTreeSet<String> = fs::read_dir(root())
        .expect("the workspace is readable")
        .map(|e| e.expect("a readable entry"))
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "target")
        .collect();
    let wanted: BTreeSet<String> = FOLDERS.iter().map(|f| (*f).to_owned()).collect();
    assert_eq!(present, wanted);
}

#[test]
fn runtime_never_links_async_protobuf_or_networks() {
    for folder in ["runtime", "runtime/oci", "runtime/sys"] {
        let linked = dependencies(&manifest(folder), &["dependencies"]);
        for banned in NEVER_IN_RUNTIME {
            assert!(!linked.contains(*banned), "{folder} links {banned}");
        }
    }
}

/// Lines of a source in front of its own tests; none for a file of tests.
fn lines_without_tests(path: &Path) -> usize {
    let of_tests = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs";
    if path.iter().any(of_tests) {
        return 0;
    }
    let text = fs::read_to_string(path).expect("a readable source");
    text.lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .count()
}

#[test]
fn files_stay_under_the_line_limit() {
    let mut long = BTreeMap::new();
    for (_, folder, _) in EDGES {
        for path in sources_of(folder) {
            let lines = lines_without_tests(&path);
            if lines > LINES_AT_MOST {
                long.insert(path.display().to_string(), lines);
            }
        }
    }
    assert!(
        long.is_empty(),
        "files of more than {LINES_AT_MOST} lines, tests not counted: {long:#?}"
    );
}

/// `unsafe` as a word of code, not of a comment.
fn has_unsafe(text: &str) -> bool {
    text.lines().any(|line| {
        let code = line.split("//").next().unwrap_or_default();
        code.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| word == "unsafe")
    })
}

#[test]
fn unsafe_lives_in_sys_alone() {
    let mut wrong = Vec::new();
    for (name, folder, _) in EDGES {
        if ["coracle-sys", "coracle-integration", "coracle-fixtures"].contains(name) {
            continue;
        }
        for path in sources_of(folder) {
            let text = fs::read_to_string(&path).expect("a readable source");
            if has_unsafe(&text) && !path.ends_with("runtime/src/launch/clone.rs") {
                wrong.push(path);
            }
        }
    }
    assert!(wrong.is_empty(), "unsafe outside runtime/sys: {wrong:#?}");
}
