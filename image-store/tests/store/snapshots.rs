//! Container file systems, mounted for real in a mount namespace of their own.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use coracle_image_store::ErrorKind;

use crate::fixture::*;

/// Runs a script with the snapshot mounted at $M, in a mount namespace that dies with it.
fn in_mount(test: &TestStore, key: &str, script: &str) -> String {
    let snapshot = test.store.snapshot(key).expect("snapshot");
    let mount = test.dir.path().join(format!("mnt-{key}"));
    std::fs::create_dir_all(&mount).expect("mkdir");
    let options = snapshot.overlay_options().join(",");
    let output = Command::new("unshare")
        .args(["-m", "sh", "-ec"])
        .arg(format!(
            "mount -t overlay overlay -o '{options}' \"$M\"; {script}"
        ))
        .env("M", &mount)
        .output()
        .expect("unshare");
    std::fs::remove_dir(&mount).expect("rmdir");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_shows_the_merged_image_and_keeps_writes_apart() {
    let image = TestImage::new(vec![
        layer(&[
            dir("./", 0o711),
            dir("tmp/", 0o1777),
            dir("d/", 0o755),
            file("d/low", "low"),
            file("gone", "x"),
            file("changed", "old"),
        ]),
        layer(&[
            file(".wh.gone", ""),
            file("changed", "new"),
            file("d/.wh..wh..opq", ""),
            file("d/high", "high"),
            file("tmp/t", ""),
        ]),
    ]);
    let registry = FaultRegistry::start(&image, |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let made = test
        .store
        .create_snapshot("one", &pulled.id)
        .expect("create");
    assert_eq!(
        test.store
            .create_snapshot("one", &pulled.id)
            .expect("again"),
        made
    );
    test.store
        .create_snapshot("two", &pulled.id)
        .expect("create");
    assert_eq!(test.store.snapshots(), ["one", "two"]);
    assert_eq!(made.upper.metadata().expect("stat").mode() & 0o7777, 0o711);
    let shown = in_mount(
        &test,
        "one",
        "cd $M; ls -A . d; cat changed; echo; stat -c '%a %n' . tmp; \
         head -c 100000 /dev/zero > written; rm changed",
    );
    assert_eq!(
        shown,
        ".:\nchanged\nd\ntmp\n\nd:\nhigh\nnew\n711 .\n1777 tmp\n"
    );
    assert_eq!(
        in_mount(&test, "two", "cat $M/changed; ls $M"),
        "newchanged\nd\ntmp\n"
    );
    let usage = test.store.snapshot_usage("one").expect("usage");
    assert!(usage.bytes >= 100_000 && usage.inodes == 3, "{usage:?}");

    // The image may go; the container keeps running on its layers.
    assert!(test.store.remove(&pulled.id.to_string()).expect("remove"));
    test.store.settle();
    assert_eq!(test.store.list().len(), 0);
    assert_eq!(test.names("layers").len(), 2);
    assert_eq!(in_mount(&test, "two", "cat $M/changed"), "new");
    let error = test
        .store
        .create_snapshot("three", &pulled.id)
        .expect_err("no image");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    test.store.remove_snapshot("one").expect("remove");
    test.store.remove_snapshot("one").expect("absent is fine");
    test.store.settle();
    assert_eq!(test.names("layers").len(), 2);
    test.store.remove_snapshot("two").expect("remove");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn opaque_root_hides_every_layer_below() {
    let image = TestImage::new(vec![
        layer(&[file("low", "")]),
        layer(&[file(".wh..wh..opq", ""), file("./high", "")]),
        layer(&[file("./top", "")]),
    ]);
    let registry = FaultRegistry::start(&image, |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let made = test.store.create_snapshot("c", &pulled.id).expect("create");
    assert_eq!(made.lower.len(), 2);
    assert_eq!(in_mount(&test, "c", "ls $M"), "high\ntop\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_keys_and_other_images_are_refused() {
    let image = TestImage::new(vec![base_layer()]);
    let other = TestImage::new(vec![base_layer(), layer(&[file("x", "")])]);
    let registry = FaultRegistry::start(&image, |_| None).await;
    let other_registry = FaultRegistry::start(&other, |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let second = test
        .pull(&other_registry.name("app:v1"))
        .await
        .expect("pull");
    for key in [
        "",
        "..",
        ".hidden",
        "a/b",
        "a:b",
        "a,b",
        "a\nb",
        &"x".repeat(300),
    ] {
        let error = test.store.create_snapshot(key, &pulled.id).expect_err(key);
        assert_eq!(error.kind(), ErrorKind::InvalidReference, "{key}");
        test.store.remove_snapshot(key).expect_err(key);
    }
    test.store.create_snapshot("k", &pulled.id).expect("create");
    test.store
        .create_snapshot("k", &second.id)
        .expect_err("another image");
    assert_eq!(
        test.store.snapshot_usage("none").expect_err("none").kind(),
        ErrorKind::NotFound
    );
    assert!(test.store.snapshot("none").is_none());
    assert_eq!(test.names("staging").len(), 0);
}
