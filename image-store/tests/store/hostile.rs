//! Layers that try to get out. Whatever they do, nothing beside their own directory changes.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use coracle_image_store::{Error, Image};
use tar::EntryType;

use crate::fixture::*;

/// Pulls an image of these layers with a canary beside the store, and checks the canary.
async fn pull(layers: &[Vec<Entry>]) -> (TestStore, Result<Image, Error>) {
    let test = store();
    let canary = test.dir.path().join("canary");
    std::fs::create_dir(&canary).expect("mkdir");
    std::fs::write(canary.join("file"), "untouched").expect("write");
    let before = listing(test.dir.path());
    let image = TestImage::new(layers.iter().map(|entries| layer(entries)).collect());
    let registry = FaultRegistry::start(&image, |_| None).await;
    let outcome = test.pull(&registry.name("app:v1")).await;
    assert_eq!(
        listing(test.dir.path()),
        before,
        "something outside the store changed"
    );
    assert_eq!(
        std::fs::read_to_string(canary.join("file")).expect("read"),
        "untouched"
    );
    let stat = canary.join("file").metadata().expect("stat");
    assert_eq!((stat.nlink(), stat.mode() & 0o7777), (1, 0o644));
    if outcome.is_err() {
        test.assert_empty();
    }
    (test, outcome)
}

fn listing(path: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).expect("list").flatten() {
        if entry.file_name() == "store" {
            continue;
        }
        names.push(entry.path().display().to_string());
        if entry.path().is_dir() {
            names.extend(listing(&entry.path()));
        }
    }
    names.sort();
    names
}

/// From `layers/<key>/fs` up to the directory that holds the canary.
const UP: &str = "../../../../canary";

#[tokio::test(flavor = "multi_thread")]
async fn names_that_climb_out_are_refused() {
    for name in [
        "../evil",
        "../../../../canary/evil",
        "/../evil",
        "a/../../evil",
        "..",
    ] {
        let (_, outcome) = pull(&[vec![file(name, "evil")]]).await;
        let error = outcome.expect_err(name);
        assert!(error.to_string().contains("climbs out"), "{error}");
    }
    // Inside, `..` is only odd; an absolute name means the root of the layer.
    let (test, outcome) = pull(&[vec![file("a/b/../c", "1"), file("/abs", "2")]]).await;
    let image = outcome.expect("pull");
    assert!(test.path(&image, "a/c").exists() && test.path(&image, "abs").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn symlinked_parents_stay_inside() {
    for target in [
        UP,
        "/canary",
        "/proc/self/cwd",
        "/proc/1/root/tmp",
        "../../../../../../../../tmp",
    ] {
        let (test, outcome) = pull(&[vec![symlink("link", target), file("link/evil", "e")]]).await;
        if let Ok(image) = outcome {
            // The kernel clamped the walk at the layer's root.
            let root = test.store.layer_dirs(&image.id).expect("layers")[0].clone();
            let mut found = Vec::new();
            find(&root, "evil", &mut found);
            assert_eq!(found.len(), 1, "{target}");
        }
        assert!(!Path::new("/tmp/evil").exists());
    }
    // A link to a link to a directory, relative and absolute, and a loop.
    let (test, outcome) = pull(&[vec![
        dir("real/", 0o755),
        symlink("one", "/real"),
        symlink("two", "./one"),
        file("two/x", "x"),
    ]])
    .await;
    let image = outcome.expect("pull");
    assert!(test.path(&image, "real/x").exists());
    let looping = vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "x")];
    pull(&[looping]).await.1.expect_err("loop");
}

fn find(root: &Path, name: &str, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(root).expect("list").flatten() {
        if entry.file_name() == name {
            found.push(entry.path());
        }
        if entry.path().symlink_metadata().is_ok_and(|m| m.is_dir()) {
            find(&entry.path(), name, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_replace_symlinks_and_never_follow_them() {
    let target = format!("{UP}/file");
    for entry in [
        file("x", "evil"),
        dir("x/", 0o777),
        symlink("x", "elsewhere"),
        device("x", EntryType::Fifo, 0, 0),
        device("x", EntryType::Char, 1, 3),
    ] {
        let kind = entry.kind;
        let (test, outcome) = pull(&[vec![symlink("x", &target), entry]]).await;
        let image = outcome.expect("pull");
        let stat = test.path(&image, "x").symlink_metadata().expect("stat");
        match kind {
            EntryType::Regular => assert!(stat.is_file()),
            EntryType::Directory => assert!(stat.is_dir()),
            EntryType::Symlink => assert!(stat.is_symlink()),
            EntryType::Fifo => assert!(stat.file_type().is_fifo()),
            _ => assert!(stat.file_type().is_char_device()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_links_reach_nothing_outside() {
    let outside = format!("{UP}/file");
    for target in [
        &outside[..],
        "/canary/file",
        "/etc/passwd",
        "missing",
        ".",
        "",
    ] {
        let (_, outcome) = pull(&[vec![hardlink("x", target)]]).await;
        outcome.expect_err(target);
    }
    // Through a symlink, then written through or changed in mode: the link is to the symlink.
    let (test, outcome) = pull(&[vec![
        symlink("s", &outside),
        hardlink("h", "s"),
        Entry {
            mode: 0o777,
            ..file("h", "evil")
        },
    ]])
    .await;
    let image = outcome.expect("pull");
    assert!(
        test.path(&image, "h")
            .symlink_metadata()
            .expect("stat")
            .is_file()
    );
    assert!(
        test.path(&image, "s")
            .symlink_metadata()
            .expect("stat")
            .is_symlink()
    );
    let parent = vec![symlink("d", UP), hardlink("x", "d/file")];
    pull(&[parent])
        .await
        .1
        .expect_err("through a symlinked parent");
    let to_directory = vec![dir("d/", 0o755), hardlink("x", "d")];
    pull(&[to_directory]).await.1.expect_err("to a directory");
    let (test, outcome) = pull(&[vec![
        file("a", "1"),
        hardlink("b", "a"),
        hardlink("a", "a"),
        file("a", "2"),
    ]])
    .await;
    let image = outcome.expect("pull");
    assert_eq!(
        std::fs::read_to_string(test.path(&image, "b")).expect("read"),
        "1"
    );
    assert_eq!(
        std::fs::read_to_string(test.path(&image, "a")).expect("read"),
        "2"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_only_ever_mark() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh...", ".wh.x/y"] {
        pull(&[vec![file(name, "")]]).await.1.expect_err(name);
    }
    let (test, outcome) = pull(&[
        vec![dir("d/", 0o755), file("d/low", "1"), file("gone", "2")],
        vec![
            symlink("link", UP),
            file("link/.wh.file", ""),
            file(".wh.gone", ""),
            file("d/.wh..wh..opq", ""),
            file("d/new", "3"),
            file(".wh..wh.plnk/1.2", ""),
            // In the same layer the entry wins, before and after.
            file("both", "4"),
            file(".wh.both", ""),
            file(".wh.again", ""),
            file("again", "5"),
            file(".wh.redo", ""),
            file("redo/x", "6"),
        ],
    ])
    .await;
    let image = outcome.expect("pull");
    let top = &test.store.layer_dirs(&image.id).expect("layers")[0];
    let is_whiteout = |name: &str| {
        let stat = top.join(name).symlink_metadata().expect(name);
        stat.file_type().is_char_device() && stat.rdev() == 0
    };
    assert!(is_whiteout("gone") && is_whiteout("canary/file"));
    assert!(!is_whiteout("both") && !is_whiteout("again"));
    assert!(!top.join(".wh..wh.plnk").exists());
    let opaque = |name: &str| {
        let mut value = [0; 4];
        rustix::fs::lgetxattr(top.join(name), "trusted.overlay.opaque", &mut value) == Ok(1)
            && value[0] == b'y'
    };
    assert!(opaque("d") && opaque("redo") && !opaque("canary"));
}

#[tokio::test(flavor = "multi_thread")]
async fn overlay_and_foreign_xattrs_are_dropped_and_capabilities_kept() {
    let capability = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0];
    let entry = Entry {
        xattrs: vec![
            ("security.capability", capability.clone()),
            ("trusted.overlay.redirect", b"/etc".to_vec()),
            ("trusted.x", b"1".to_vec()),
            ("user.overlay.opaque", b"y".to_vec()),
            ("security.selinux", b"label".to_vec()),
            ("user.note", b"line\nline".to_vec()),
        ],
        mode: 0o4755,
        ..file("x", "x")
    };
    let directory = Entry {
        xattrs: vec![("trusted.overlay.opaque", b"y".to_vec())],
        ..dir("d/", 0o755)
    };
    let linked = Entry {
        xattrs: vec![("user.note", b"1".to_vec())],
        ..symlink("l", "x")
    };
    let (test, outcome) = pull(&[vec![entry, directory, linked]]).await;
    let image = outcome.expect("pull");
    let names = |path: &str| {
        let mut list = vec![0; 1024];
        let length = rustix::fs::llistxattr(test.path(&image, path), &mut list).expect("list");
        let text = String::from_utf8_lossy(&list[..length]).into_owned();
        let mut names: Vec<String> = text
            .split('\0')
            .filter(|n| !n.is_empty())
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("x"), ["security.capability", "user.note"]);
    assert_eq!(names("d"), Vec::<String>::new());
    let mut value = [0; 64];
    let path = test.path(&image, "x");
    let length =
        rustix::fs::lgetxattr(&path, "security.capability", &mut value).expect("capability");
    assert_eq!(&value[..length], capability);
    assert_eq!(path.metadata().expect("stat").mode() & 0o7777, 0o4755);
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_archives_are_refused_with_the_entry_named() {
    let long = format!("{}x", "d/".repeat(700));
    let mut too_deep = file("short", "");
    too_deep.path = long.into_bytes();
    for (entries, needle) in [
        (vec![file(&"n".repeat(100), ""), too_deep], "too deep"),
        (
            vec![file("f", "1"), file("f/x", "2")],
            "is used as a directory",
        ),
        (vec![symlink("s", "")], "symlink to nothing"),
        (vec![file(".", "data")], "root of a layer"),
        (
            vec![Entry {
                kind: EntryType::new(b'Z'),
                ..file("z", "")
            }],
            "type 'Z'",
        ),
        (
            vec![device("dev", EntryType::Char, 5000, 1)],
            "device number",
        ),
    ] {
        let error = pull(&[entries]).await.1.expect_err(needle);
        assert!(error.to_string().contains(needle), "{needle}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn device_nodes_are_made_as_written() {
    let (test, outcome) = pull(&[vec![
        Entry {
            mode: 0o640,
            ..device("dev/null", EntryType::Char, 1, 3)
        },
        device("dev/loop", EntryType::Block, 7, 0),
        device("pipe", EntryType::Fifo, 0, 0),
    ]])
    .await;
    let image = outcome.expect("pull");
    let null = test
        .path(&image, "dev/null")
        .symlink_metadata()
        .expect("stat");
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.mode() & 0o7777),
        (rustix::fs::makedev(1, 3), 0o640)
    );
    assert!(
        test.path(&image, "dev/loop")
            .metadata()
            .expect("stat")
            .file_type()
            .is_block_device()
    );
    assert!(
        test.path(&image, "pipe")
            .metadata()
            .expect("stat")
            .file_type()
            .is_fifo()
    );
}
