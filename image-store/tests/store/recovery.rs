//! What an unclean end leaves, and a disk that is full.

use std::process::Command;
use std::time::Duration;

use coracle_image_store::{ErrorKind, ImageStore, PullRequest};

use crate::fixture::*;

const SLOW: Duration = Duration::from_secs(20);

fn image() -> TestImage {
    TestImage::new(vec![base_layer(), layer(&[file("./own", "1")])])
}

#[tokio::test(flavor = "multi_thread")]
async fn reopened_store_has_its_images_and_snapshots_and_sheds_the_rest() {
    let registry = FaultRegistry::start(&image(), |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let snapshot = test
        .store
        .create_snapshot("c", &pulled.id)
        .expect("snapshot");
    let info = test.store.fs_info();
    let (root, TestStore { store, dir }) = (test.root(), test);
    let busy = ImageStore::open(config(dir.path(), &[], SLOW)).expect_err("locked");
    assert!(
        busy.to_string().contains(&std::process::id().to_string()),
        "{busy}"
    );
    drop(store);

    std::fs::create_dir_all(root.join("staging/1-2/fs/half")).expect("mkdir");
    std::fs::create_dir_all(root.join("gc/old/x")).expect("mkdir");
    std::fs::create_dir_all(root.join("layers/unreachable/fs")).expect("mkdir");
    let record = root
        .join("layers")
        .join(pulled.layers[0].diff_id.hex())
        .join("layer.json");
    std::fs::copy(&record, root.join("layers/unreachable/layer.json")).expect("copy");
    std::fs::create_dir_all(root.join("layers/broken/fs")).expect("mkdir");
    std::fs::write(root.join("layers/broken/layer.json"), "{").expect("write");
    std::fs::write(root.join("images/.x.json.tmp"), "{").expect("write");
    std::fs::create_dir_all(root.join("snapshots/half/upper")).expect("mkdir");

    let test = TestStore {
        store: ImageStore::open(config(dir.path(), &[], SLOW)).expect("open"),
        dir,
    };
    test.store.settle();
    assert_eq!(test.store.list(), std::slice::from_ref(&pulled));
    assert_eq!(test.store.snapshot("c"), Some(snapshot));
    let again = test.store.fs_info();
    assert_eq!((again.bytes, again.inodes), (info.bytes, info.inodes));
    assert_eq!(test.names("layers").len(), 2);
    for directory in ["staging", "gc"] {
        assert_eq!(test.names(directory).len(), 0, "{directory}");
    }
    assert_eq!(test.names("images").len(), 1);
    assert_eq!(test.names("snapshots"), ["c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn image_with_a_damaged_layer_is_dropped_and_can_be_pulled_again() {
    let registry = FaultRegistry::start(&image(), |_| None).await;
    let test = store();
    let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
    let (root, TestStore { store, dir }) = (test.root(), test);
    drop(store);
    let key = pulled.layers[1].diff_id.hex().to_owned();
    std::fs::write(root.join("layers").join(key).join("layer.json"), "").expect("damage");
    let test = TestStore {
        store: ImageStore::open(config(dir.path(), &[], SLOW)).expect("open"),
        dir,
    };
    assert_eq!(test.store.list().len(), 0);
    let again = test
        .pull(&registry.name("app:v1"))
        .await
        .expect("pull again");
    assert_eq!(again.id, pulled.id);
    assert!(test.path(&again, "own").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn store_of_another_format_is_refused() {
    let test = store();
    let (root, TestStore { store, dir }) = (test.root(), test);
    drop(store);
    std::fs::write(root.join("VERSION"), "99\n").expect("write");
    let error = ImageStore::open(config(dir.path(), &[], SLOW)).expect_err("format");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("99"), "{error}");
    std::fs::write(root.join("VERSION"), "1\n").expect("write");
    ImageStore::open(config(dir.path(), &[], SLOW)).expect("open");
    let odd = tempfile::Builder::new()
        .prefix("a:b")
        .tempdir()
        .expect("temp dir");
    assert!(ImageStore::open(config(odd.path(), &[], SLOW)).is_err());
}

/// A tmpfs that goes away with the test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("temp dir");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir.path())
            .status()
            .ok()?;
        status.success().then_some(SmallDisk(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the store's deleting thread may hold its directory for a moment longer.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_fails_the_pull_cleanly_and_removing_still_works() {
    for options in ["size=2m", "nr_inodes=40"] {
        let Some(disk) = SmallDisk::mount(options) else {
            crate::skip!("full_disk", "no tmpfs can be mounted")
        };
        let small = FaultRegistry::start(&image(), |_| None).await;
        let files: Vec<Entry> = (0..60)
            .map(|n| file(&format!("./f{n}"), &"x".repeat(100_000)))
            .collect();
        let large =
            FaultRegistry::start(&TestImage::new(vec![base_layer(), layer(&files)]), |_| None)
                .await;
        let store = ImageStore::open(config(disk.0.path(), &[], SLOW)).expect("open");
        let pull = |name: String| {
            store.pull(PullRequest {
                reference: name,
                auth: None,
            })
        };
        let kept = pull(small.name("app:v1")).await.expect("pull");
        store.create_snapshot("c", &kept.id).expect("snapshot");
        let error = pull(large.name("app:v1")).await.expect_err("full");
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains(&large.name("app:v1")), "{error}");
        store.settle();
        assert_eq!(store.list().len(), 1);
        let names = |d: &str| {
            std::fs::read_dir(disk.0.path().join("store").join(d))
                .expect("list")
                .count()
        };
        assert_eq!((names("staging"), names("layers"), names("gc")), (0, 2, 0));
        // Fill what is left.
        let mut number = 0;
        while std::fs::write(
            disk.0.path().join(format!("fill{number}")),
            vec![1; 1 << 16],
        )
        .is_ok()
        {
            number += 1;
        }
        store.remove_snapshot("c").expect("remove snapshot");
        assert!(store.remove(&kept.id.to_string()).expect("remove"));
        store.settle();
        assert_eq!(
            (names("layers"), names("images"), names("snapshots")),
            (0, 0, 0)
        );
        drop(store);
    }
}
