//! What we unpack is what GNU tar unpacks: every name, mode, owner, time, xattr, link and byte.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink as make_symlink};
use std::path::Path;
use std::process::Command;

use coracle_image_store::Digest;

use crate::fixture::*;
use crate::skip;

fn run(command: &mut Command) {
    let output = command.output().expect("run");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn generate(root: &Path) {
    let make = |path: &str, bytes: &[u8], mode: u32, owner: (u32, u32)| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        std::fs::write(&path, bytes).expect("write");
        std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1)).expect("chown");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("chmod");
    };
    make("bin/suid", b"#!", 0o6755, (0, 0));
    make(
        "home/user/näme with space\tand tab",
        b"x",
        0o600,
        (1000, 1000),
    );
    make("big/owner", b"x", 0o644, (4_294_967_294, 4_000_000_000));
    make(
        &format!("long/{}/{}", "a".repeat(120), "b".repeat(200)),
        b"long",
        0o644,
        (0, 0),
    );
    make("data/large", &vec![7; 3 << 20], 0o444, (0, 5));
    make("data/empty", b"", 0o000, (0, 0));
    for number in 0..300 {
        make(
            &format!("many/{}/{number}", number % 17),
            &[1; 700],
            0o640,
            (number, number),
        );
    }
    std::fs::hard_link(root.join("data/large"), root.join("data/hard")).expect("link");
    std::fs::hard_link(root.join("bin/suid"), root.join("hard-suid")).expect("link");
    make_symlink("../data/large", root.join("bin/link")).expect("symlink");
    make_symlink("x".repeat(300), root.join("bin/long-link")).expect("symlink");
    make_symlink("/nowhere", root.join("bin/dangling")).expect("symlink");
    std::os::unix::fs::lchown(root.join("bin/link"), Some(12), Some(34)).expect("lchown");
    std::fs::hard_link(root.join("bin/link"), root.join("bin/link2")).expect("link");
    std::fs::create_dir(root.join("sticky")).expect("mkdir");
    std::fs::set_permissions(root.join("sticky"), PermissionsExt::from_mode(0o3777))
        .expect("chmod");
    let sparse = std::fs::File::create(root.join("data/sparse")).expect("create");
    sparse.set_len(5 << 20).expect("size");
    for offset in [0u64, 1 << 20, (5 << 20) - 4096] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[9; 4096], offset).expect("write");
    }
    for (name, kind, major, minor) in [("dev-c", "c", 5, 1), ("dev-b", "b", 8, 300)] {
        run(Command::new("mknod").arg(root.join(name)).args([
            kind,
            &format!("{major}"),
            &format!("{minor}"),
        ]));
    }
    run(Command::new("mkfifo").arg(root.join("fifo")));
    for (path, name, value) in [
        (
            "bin/suid",
            "security.capability",
            &[
                1u8, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0,
            ][..],
        ),
        ("data/empty", "user.empty", b""),
        ("data/large", "user.binary", b"a\nb=c\0d"),
        ("sticky", "user.dir", b"1"),
    ] {
        rustix::fs::setxattr(
            root.join(path),
            name,
            value,
            rustix::fs::XattrFlags::empty(),
        )
        .expect("setxattr");
    }
    run(Command::new("touch")
        .args(["-d", "2001-02-03 04:05:06.123456789Z"])
        .arg(root.join("data/large")));
    run(Command::new("touch")
        .args(["-h", "-d", "1999-01-01 00:00:00.5Z"])
        .arg(root.join("bin/link")));
    run(Command::new("touch")
        .args(["-d", "1960-01-01 00:00:00.25Z"])
        .arg(root.join("data/empty")));
    run(Command::new("touch")
        .args(["-d", "2010-01-01 00:00:00Z"])
        .arg(root.join("many/3"))
        .arg(root.join("sticky"))
        .arg(root));
}

/// Everything about every entry, as text.
fn describe(root: &Path, with_nanos: bool) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut inodes: BTreeMap<u64, String> = BTreeMap::new();
    let mut work = vec![root.to_owned()];
    while let Some(path) = work.pop() {
        let name = path
            .strip_prefix(root)
            .expect("below")
            .to_string_lossy()
            .into_owned();
        let stat = path.symlink_metadata().expect("stat");
        if stat.is_dir() {
            let mut children: Vec<_> = std::fs::read_dir(&path)
                .expect("list")
                .flatten()
                .map(|e| e.path())
                .collect();
            children.sort();
            work.extend(children);
        }
        let mut text = format!(
            "mode {:o} owner {}:{} mtime {}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.mtime()
        );
        if with_nanos {
            text.push_str(&format!(".{:09}", stat.mtime_nsec()));
        }
        if stat.is_file() {
            let content = std::fs::read(&path).expect("read");
            text.push_str(&format!(
                " size {} {}",
                content.len(),
                Digest::sha256(&content)
            ));
        }
        if stat.is_symlink() {
            text.push_str(&format!(
                " -> {}",
                std::fs::read_link(&path).expect("link").display()
            ));
        }
        if !stat.is_dir() {
            text.push_str(&format!(" nlink {} rdev {}", stat.nlink(), stat.rdev()));
        }
        let mut list = vec![0; 4096];
        let length = rustix::fs::llistxattr(&path, &mut list).expect("listxattr");
        let mut names: Vec<&[u8]> = list[..length]
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .collect();
        names.sort();
        for name in names {
            let mut value = vec![0; 4096];
            let length = rustix::fs::lgetxattr(&path, name, &mut value).expect("getxattr");
            text.push_str(&format!(
                " {}={:?}",
                String::from_utf8_lossy(name),
                &value[..length]
            ));
        }
        if stat.nlink() > 1 && !stat.is_dir() {
            // Which names share an inode.
            let first = inodes.entry(stat.ino()).or_insert_with(|| name.clone());
            text.push_str(&format!(" same as {first}"));
        }
        found.insert(name, text);
    }
    found
}

async fn compare(arguments: &[&str], with_nanos: bool, note: &str) {
    let work = tempfile::tempdir().expect("temp dir");
    let (source, gnu) = (work.path().join("source"), work.path().join("gnu"));
    std::fs::create_dir_all(&source).expect("mkdir");
    std::fs::create_dir_all(&gnu).expect("mkdir");
    std::fs::set_permissions(&source, PermissionsExt::from_mode(0o711)).expect("chmod");
    generate(&source);
    let archive = work.path().join("layer.tar");
    run(Command::new("tar")
        .args(arguments)
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&source)
        .arg("."));
    run(Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--same-owner",
            "--numeric-owner",
            "-p",
            "-xf",
        ])
        .arg(&archive)
        .arg("-C")
        .arg(&gnu));
    let tar = std::fs::read(&archive).expect("read");
    let image = TestImage::new(vec![layer_of(&tar)]);
    let registry = FaultRegistry::start(&image, |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let ours = &test.store.layer_dirs(&pulled.id).expect("layers")[0];
    let (found, wanted) = (describe(ours, with_nanos), describe(&gnu, with_nanos));
    assert!(wanted.len() > 330, "{note}: {}", wanted.len());
    for (name, text) in &wanted {
        assert_eq!(found.get(name), Some(text), "{note}: {name}");
    }
    assert_eq!(found.len(), wanted.len(), "{note}");
    // A sparse file stays sparse where the format says so.
    if note.contains("sparse") {
        let blocks = ours.join("data/sparse").metadata().expect("stat").blocks();
        assert!(blocks * 512 <= 64 << 10, "{note}: {blocks} blocks");
    }
    // What the record says is what is there.
    let usage = Command::new("du")
        .args(["-s", "-B1"])
        .arg(ours)
        .output()
        .expect("du");
    let du: u64 = String::from_utf8_lossy(&usage.stdout)
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("number");
    let info = test.store.fs_info();
    assert_eq!(info.inodes, inodes(ours), "{note}");
    assert!(
        info.bytes.abs_diff(du) <= du / 50,
        "{note}: {} and du says {du}",
        info.bytes
    );
}

fn inodes(root: &Path) -> u64 {
    let output = Command::new("du")
        .args(["-s", "--inodes"])
        .arg(root)
        .output()
        .expect("du");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("number")
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_layers_unpack_as_gnu_tar_does() {
    if Command::new("tar").arg("--version").output().is_err() {
        skip!("generated_layers_unpack_as_gnu_tar_does", "tar is missing")
    }
    let pax = [
        "--format=pax",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
    ];
    compare(&pax, true, "pax").await;
    compare(&["--format=gnu", "--numeric-owner"], false, "gnu").await;
    compare(
        &["--format=gnu", "-S", "--numeric-owner"],
        false,
        "gnu sparse",
    )
    .await;
    for version in ["0.0", "0.1", "1.0"] {
        let sparse = format!("--sparse-version={version}");
        let arguments = [&pax[..], &["-S", &sparse[..]]].concat();
        compare(&arguments, true, &format!("pax sparse {version}")).await;
    }
}
