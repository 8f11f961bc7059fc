//! Pulls from Debian's docker-registry.

use std::os::unix::fs::MetadataExt;

use coracle_image_store::{Digest, ErrorKind};

use crate::fixture::*;
use crate::skip;

#[tokio::test(flavor = "multi_thread")]
async fn pull_by_tag_then_by_digest_then_remove_leaves_nothing() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("pull_by_tag_then_by_digest", "docker-registry is missing")
    };
    let top = layer(&[file("etc/motd", "hello\n"), file("etc/.wh.os-release", "")]);
    let image = TestImage::with_config(
        vec![base_layer(), top],
        serde_json::json!({"Entrypoint": ["/bin/sh"], "User": "1:2", "WorkingDir": "/tmp",
            "StopSignal": "SIGQUIT", "Labels": {"a": "b"}, "Volumes": {"/v": {}}}),
    );
    registry.push("team/app", "v1", &image).await;
    let test = store();
    let name = registry.name("team/app:v1");
    let pulled = test.pull(&name).await.expect("pull");
    assert_eq!(pulled.id.to_string(), image.id());
    assert_eq!(pulled.repo_tags, [name.as_str()]);
    let digest_name = format!("{}@{}", registry.name("team/app"), image.manifest_digest());
    assert_eq!(pulled.repo_digests, [digest_name.as_str()]);
    assert_eq!(pulled.config.entrypoint, ["/bin/sh"]);
    assert_eq!(
        (
            pulled.config.user.as_str(),
            pulled.config.working_dir.as_str()
        ),
        ("1:2", "/tmp")
    );
    assert_eq!(pulled.config.stop_signal.as_deref(), Some("SIGQUIT"));
    let blobs: usize = image.blobs().iter().map(Vec::len).sum();
    assert_eq!(pulled.size, (blobs + image.manifest.len()) as u64);
    assert_eq!(pulled.layers.len(), 2);

    let motd = test.path(&pulled, "etc/motd");
    assert_eq!(std::fs::read(&motd).expect("read"), b"hello\n");
    assert_eq!(motd.metadata().expect("stat").mtime(), 1_700_000_000);
    let sh = test.path(&pulled, "bin/sh").metadata().expect("stat");
    assert_eq!(sh.mode() & 0o7777, 0o4755);
    // The whiteout is a 0/0 character device in the top layer.
    let gone = test
        .path(&pulled, "etc/os-release")
        .symlink_metadata()
        .expect("stat");
    assert_eq!((gone.mode() & 0o170_000, gone.rdev()), (0o020_000, 0));

    let again = test.pull(&digest_name).await.expect("pull by digest");
    assert_eq!(again, pulled);
    for text in [
        &name,
        &digest_name,
        &image.id(),
        &image.id()[7..19].to_owned(),
    ] {
        assert_eq!(test.store.resolve(text).as_ref(), Some(&pulled), "{text}");
    }
    assert_eq!(test.store.list(), std::slice::from_ref(&pulled));
    let info = test.store.fs_info();
    assert!(info.bytes > 0 && info.inodes >= 9, "{info:?}");
    assert!(test.store.remove(&name).expect("remove"));
    assert!(!test.store.remove(&name).expect("remove again"));
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_reads_every_compression_and_both_manifest_kinds() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("pull_reads_every_compression", "docker-registry is missing")
    };
    let plain = tar(&[file("plain", "1")]);
    let zstd = tar(&[file("zstd", "2")]);
    let multi = tar(&[file("multi", &"3".repeat(100_000))]);
    let (one, other) = multi.split_at(multi.len() / 3);
    let layers = vec![
        Layer {
            diff_id: Digest::sha256(&plain),
            blob: plain.clone(),
            media_type: "application/vnd.oci.image.layer.v1.tar",
        },
        Layer {
            diff_id: Digest::sha256(&zstd),
            blob: zstd::encode_all(&zstd[..], 3).expect("zstd"),
            // Wrong on purpose: the bytes decide.
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        },
        Layer {
            diff_id: Digest::sha256(&multi),
            blob: [gzip(one), gzip(other)].concat(),
            media_type: "application/vnd.docker.image.rootfs.diff.tar.gzip",
        },
    ];
    let mut image = TestImage::new(layers);
    image.media_type = "application/vnd.docker.distribution.manifest.v2+json".into();
    image.manifest = String::from_utf8(image.manifest)
        .expect("json")
        .replace(
            "application/vnd.oci.image.manifest.v1+json",
            &image.media_type,
        )
        .replace(
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.docker.container.image.v1+json",
        )
        .into_bytes();
    registry.push("kinds", "docker", &image).await;
    let test = store();
    let pulled = test
        .pull(&registry.name("kinds:docker"))
        .await
        .expect("pull");
    for (name, content) in [
        ("plain", "1"),
        ("zstd", "2"),
        ("multi", &"3".repeat(100_000)),
    ] {
        let found = std::fs::read_to_string(test.path(&pulled, name)).expect("read");
        assert_eq!(found, content, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_of_an_index_takes_this_machines_image_and_records_the_index_digest() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("pull_of_an_index", "docker-registry is missing")
    };
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let mine = TestImage::new(vec![layer(&[file("mine", "")])]);
    let other = TestImage::new(vec![layer(&[file("other", "")])]);
    registry.push("multi", "mine", &mine).await;
    registry.push("multi", "other", &other).await;
    let entry = |image: &TestImage, arch: &str| {
        serde_json::json!({"mediaType": image.media_type, "digest": image.manifest_digest(),
            "size": image.manifest.len(), "platform": {"os": "linux", "architecture": arch}})
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = |entries: Vec<serde_json::Value>| {
        serde_json::json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries})
            .to_string()
            .into_bytes()
    };
    let both = index(vec![entry(&other, "s390x"), entry(&mine, arch)]);
    registry.push_manifest("multi", "both", &both, kind).await;
    let foreign = index(vec![entry(&other, "s390x")]);
    registry
        .push_manifest("multi", "foreign", &foreign, kind)
        .await;
    let test = store();
    let pulled = test.pull(&registry.name("multi:both")).await.expect("pull");
    assert_eq!(pulled.id.to_string(), mine.id());
    assert!(pulled.repo_digests[0].ends_with(&Digest::sha256(&both).to_string()));
    test.store.remove(&mine.id()).expect("remove");
    let error = test
        .pull(&registry.name("multi:foreign"))
        .await
        .expect_err("foreign");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("it has: linux/s390x"), "{error}");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_layers_are_kept_once_and_as_long_as_needed() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("shared_layers", "docker-registry is missing")
    };
    let one = TestImage::new(vec![base_layer(), layer(&[file("./one", "1")])]);
    let two = TestImage::new(vec![base_layer(), layer(&[file("./two", "2")])]);
    registry.push("a", "1", &one).await;
    registry.push("b", "2", &two).await;
    let test = store();
    let (name_a, name_b) = (registry.name("a:1"), registry.name("b:2"));
    let (first, second) = tokio::join!(test.pull(&name_a), test.pull(&name_b));
    let (first, second) = (first.expect("pull"), second.expect("pull"));
    assert_eq!(test.names("layers").len(), 3);
    assert_eq!(test.names("staging").len(), 0);
    test.store.remove(&first.id.to_string()).expect("remove");
    test.store.settle();
    assert_eq!(test.names("layers").len(), 2);
    assert!(test.path(&second, "etc/os-release").exists());
    test.store.remove(&second.id.to_string()).expect("remove");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn tag_moves_to_the_image_pulled_last_also_after_reopening() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("tag_moves", "docker-registry is missing")
    };
    let old = TestImage::new(vec![base_layer()]);
    let new = TestImage::new(vec![base_layer(), layer(&[file("new", "")])]);
    let test = store();
    let name = registry.name("app:latest");
    registry.push("app", "latest", &old).await;
    test.pull(&name).await.expect("pull");
    registry.push("app", "latest", &new).await;
    test.pull(&registry.name("app")).await.expect("pull");
    let check = |store: &coracle_image_store::ImageStore| {
        assert_eq!(store.resolve(&name).expect("tag").id.to_string(), new.id());
        let former = store.resolve(&old.id()).expect("old image");
        assert_eq!((former.repo_tags.len(), former.repo_digests.len()), (0, 1));
    };
    check(&test.store);
    let TestStore { store, dir } = test;
    drop(store);
    let config = config(dir.path(), &[], std::time::Duration::from_secs(5));
    check(&coracle_image_store::ImageStore::open(config).expect("reopen"));
}

#[tokio::test(flavor = "multi_thread")]
async fn directory_that_only_a_lower_layer_names_keeps_its_metadata() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!(
            "directory_that_only_a_lower_layer_names",
            "docker-registry is missing"
        )
    };
    let base = layer(&[
        dir("tmp/", 0o1777),
        dir("usr/lib/", 0o750),
        symlink("lib", "usr/lib"),
    ]);
    let image = TestImage::new(vec![
        base,
        layer(&[file("tmp/x", ""), file("lib/y", "y"), file("new/z", "z")]),
    ]);
    registry.push("implicit", "1", &image).await;
    let test = store();
    let pulled = test.pull(&registry.name("implicit:1")).await.expect("pull");
    let top = &test.store.layer_dirs(&pulled.id).expect("layers")[0];
    let mode = |path: &str| top.join(path).metadata().expect("stat").mode() & 0o7777;
    assert_eq!(mode("tmp"), 0o1777);
    assert_eq!(mode("usr/lib"), 0o750);
    assert!(top.join("usr/lib/y").exists() && !top.join("lib").exists());
    assert_eq!(mode("new"), 0o755);
    assert!(
        test.names("layers")
            .iter()
            .any(|name| name.starts_with("chain-"))
    );
    // The bottom layer's own usr/ is implicit too: both have chain keys, a second pull finds them.
    test.store.remove(&pulled.id.to_string()).expect("remove");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn image_without_layers_is_an_image() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("image_without_layers", "docker-registry is missing")
    };
    registry.push("scratch", "1", &TestImage::new(vec![])).await;
    let test = store();
    let pulled = test.pull(&registry.name("scratch:1")).await.expect("pull");
    let snapshot = test
        .store
        .create_snapshot("c1", &pulled.id)
        .expect("snapshot");
    assert_eq!(snapshot.lower.len(), 1);
    assert_eq!(
        std::fs::read_dir(&snapshot.lower[0]).expect("list").count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pulls_and_removals_at_once_leave_the_store_sound() {
    let Some(registry) = DockerRegistry::start().await else {
        skip!("many_pulls_and_removals", "docker-registry is missing")
    };
    let mut images = Vec::new();
    for number in 0..8 {
        let own = layer(&[file("./own", &number.to_string())]);
        let image = TestImage::new(vec![base_layer(), own]);
        registry.push(&format!("many{number}"), "1", &image).await;
        images.push(image);
    }
    let test = std::sync::Arc::new(store());
    let mut tasks = Vec::new();
    for round in 0..4 {
        for number in 0..images.len() {
            let (test, name) = (test.clone(), registry.name(&format!("many{number}:1")));
            tasks.push(tokio::spawn(async move {
                let pulled = test.pull(&name).await.expect("pull");
                if (round + number) % 2 == 0 {
                    test.store.remove(&pulled.id.to_string()).expect("remove");
                }
            }));
        }
    }
    for task in tasks {
        task.await.expect("task");
    }
    for image in test.store.list() {
        for layer in test.store.layer_dirs(&image.id).expect("layers") {
            assert!(layer.is_dir(), "{} lost a layer", image.id);
        }
        assert_eq!(
            std::fs::read_to_string(test.path(&image, "etc/os-release")).expect("read"),
            "ID=test\n"
        );
    }
    for image in test.store.list() {
        test.store.remove(&image.id.to_string()).expect("remove");
    }
    test.assert_empty();
}
