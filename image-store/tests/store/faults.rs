//! Registries that fail: each failure has its kind, names what failed, and leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use coracle_image_store::{Digest, ErrorKind};

use crate::fixture::*;

/// Incompressible, so that blobs are cut in their middle.
fn noise(length: usize) -> String {
    let mut state = 1u64;
    (0..length)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            char::from(b'!' + (state >> 33) as u8 % 90)
        })
        .collect()
}

fn image() -> TestImage {
    TestImage::new(vec![base_layer(), layer(&[file("./big", &noise(300_000))])])
}

fn is_blob(request: &Request, blob: &[u8]) -> bool {
    request.path.ends_with(&Digest::sha256(blob).to_string())
}

/// Pulls `app:v1` and checks how that fails.
async fn check(
    registry: &FaultRegistry,
    progress: Duration,
    kind: ErrorKind,
    needles: &[&str],
) -> String {
    let test = store_with(&[], progress);
    let name = registry.name("app:v1");
    let error = test.pull(&name).await.expect_err("must fail");
    let shown = error.to_string();
    assert_eq!(error.kind(), kind, "{shown}");
    for needle in [&name[..], &registry.address].iter().chain(needles) {
        assert!(shown.contains(needle), "no {needle} in: {shown}");
    }
    assert!(!shown.contains('\n'), "{shown}");
    test.assert_empty();
    shown
}

const SLOW: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn manifest_failures_have_kinds_and_texts() {
    let oversized = vec![b' '; (4 << 20) + 1];
    let json = "application/vnd.oci.image.manifest.v1+json";
    let cases: Vec<(Answer, ErrorKind, Vec<&str>)> = vec![
        (
            Answer::status(404),
            ErrorKind::NotFound,
            vec!["404", "app:v1"],
        ),
        (Answer::status(401), ErrorKind::Unauthenticated, vec!["401"]),
        (
            Answer::status(403),
            ErrorKind::PermissionDenied,
            vec!["403"],
        ),
        (
            Answer {
                body: br#"{"errors":[{"code":"UNAVAILABLE","message":"down"}]}"#.to_vec(),
                ..Answer::status(503)
            },
            ErrorKind::RegistryUnavailable,
            vec!["503", "UNAVAILABLE: down"],
        ),
        (
            Answer::status(400),
            ErrorKind::RegistryUnavailable,
            vec!["400"],
        ),
        (Answer::status(204), ErrorKind::Corrupt, vec!["204"]),
        (
            Answer::ok("<html>It works!</html>").header("content-type", "text/html"),
            ErrorKind::Corrupt,
            vec!["text/html", "<html>It works!"],
        ),
        (Answer::ok(""), ErrorKind::Corrupt, vec!["empty"]),
        (Answer::ok(oversized), ErrorKind::Corrupt, vec!["4194304"]),
        (
            Answer::ok(r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#),
            ErrorKind::Corrupt,
            vec!["both"],
        ),
        (
            Answer::ok(r#"{"schemaVersion":1,"fsLayers":[]}"#),
            ErrorKind::Unsupported,
            vec!["schema 1"],
        ),
        (
            Answer::ok(
                r#"{"schemaVersion":2,"config":{"digest":"sha256:../../x","size":1},"layers":[]}"#,
            )
            .header("content-type", json),
            ErrorKind::Corrupt,
            vec!["parse digest"],
        ),
        (
            Answer::status(302),
            ErrorKind::Corrupt,
            vec!["redirect 302"],
        ),
        (
            Answer::status(302).header("location", "/v2/app/manifests/v1"),
            ErrorKind::RegistryUnavailable,
            vec!["redirects"],
        ),
    ];
    for (answer, kind, needles) in cases {
        let answer = Arc::new(answer);
        let registry = FaultRegistry::start(&image(), move |request| {
            request
                .path
                .contains("/manifests/")
                .then(|| (*answer).clone())
        })
        .await;
        check(&registry, SLOW, kind, &needles).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_manifest_is_cut_off() {
    let registry = FaultRegistry::start(&image(), |request| {
        request.path.contains("/manifests/").then(|| {
            // More than is declared to be read, and no length that would give it away.
            Answer::ok(vec![b'['; 6 << 20]).header("transfer-encoding", "identity")
        })
    })
    .await;
    check(&registry, SLOW, ErrorKind::Corrupt, &["4194304"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_by_digest_must_have_that_digest() {
    let image = image();
    let registry = FaultRegistry::start(&image, |request| {
        request
            .path
            .contains("/manifests/")
            .then(|| Answer::ok(r#"{"schemaVersion":2}"#))
    })
    .await;
    let test = store();
    let name = format!("{}@{}", registry.name("app"), image.manifest_digest());
    let error = test.pull(&name).await.expect_err("must fail");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error.to_string().contains(&image.manifest_digest()),
        "{error}"
    );
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn config_and_layer_content_is_verified() {
    let image = image();
    let big = image.layers[1].blob.clone();
    let digest = Digest::sha256(&big).to_string();
    let mut flipped = big.clone();
    flipped[200_000] ^= 1;
    let mut longer = big.clone();
    longer.extend_from_slice(b"more");
    let cases = vec![
        (
            big.clone(),
            flipped,
            ErrorKind::Corrupt,
            vec![digest.clone(), "digest".into()],
        ),
        (
            big.clone(),
            longer,
            ErrorKind::Corrupt,
            vec![digest.clone(), "longer".into()],
        ),
        (
            big.clone(),
            big[..1000].to_vec(),
            ErrorKind::RegistryUnavailable,
            vec![digest.clone(), "ended after 1000".into()],
        ),
        (
            big.clone(),
            vec![b'x'; big.len()],
            ErrorKind::Corrupt,
            vec![digest],
        ),
        (
            image.config.clone(),
            vec![b'x'; image.config.len()],
            ErrorKind::Corrupt,
            vec![image.id()],
        ),
        (
            image.config.clone(),
            b"{}".to_vec(),
            ErrorKind::Corrupt,
            vec![image.id()],
        ),
    ];
    for (target, served, kind, needles) in cases {
        let registry = FaultRegistry::start(&image, move |request| {
            is_blob(request, &target).then(|| Answer::ok(served.clone()))
        })
        .await;
        let test = store();
        let error = test
            .pull(&registry.name("app:v1"))
            .await
            .expect_err("must fail");
        let shown = error.to_string();
        assert_eq!(error.kind(), kind, "{shown}");
        for needle in &needles {
            assert!(shown.contains(needle.as_str()), "no {needle} in: {shown}");
        }
        assert!(shown.contains(&registry.name("app:v1")), "{shown}");
        test.assert_empty();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_must_have_the_diff_id_of_the_config() {
    let mut wrong = layer(&[file("x", "x")]);
    wrong.diff_id = Digest::sha256(b"something else");
    let registry = FaultRegistry::start(&TestImage::new(vec![wrong.clone()]), |_| None).await;
    let needle = wrong.diff_id.to_string();
    check_without_host(&registry, ErrorKind::Corrupt, &["unpacks to", &needle]).await;
    let mut broken = layer(&[file("x", "x")]);
    broken.blob.truncate(broken.blob.len() - 4);
    broken.blob.extend_from_slice(b"abcd");
    let registry = FaultRegistry::start(&TestImage::new(vec![broken]), |_| None).await;
    check_without_host(&registry, ErrorKind::Corrupt, &["decompress layer"]).await;
    let noise = Layer {
        diff_id: Digest::sha256(b"no tar"),
        blob: b"no tar".to_vec(),
        media_type: "application/vnd.oci.image.layer.v1.tar",
    };
    let registry = FaultRegistry::start(&TestImage::new(vec![noise]), |_| None).await;
    check_without_host(&registry, ErrorKind::Corrupt, &["read tar"]).await;
}

async fn check_without_host(registry: &FaultRegistry, kind: ErrorKind, needles: &[&str]) {
    let test = store();
    let error = test
        .pull(&registry.name("app:v1"))
        .await
        .expect_err("must fail");
    let shown = error.to_string();
    assert_eq!(error.kind(), kind, "{shown}");
    for needle in needles {
        assert!(shown.contains(needle), "no {needle} in: {shown}");
    }
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_download_is_resumed_by_range_or_from_the_start() {
    for honours_range in [true, false] {
        let image = image();
        let big = image.layers[1].blob.clone();
        let cuts = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&cuts);
        let blob = big.clone();
        let registry = FaultRegistry::start(&image, move |request| {
            if !is_blob(request, &blob) {
                return None;
            }
            let range = request.headers.get("range");
            let start: usize = range
                .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
                .unwrap_or(0);
            let cut = count.fetch_add(1, Ordering::SeqCst) < 2;
            let mut answer = if honours_range && start > 0 {
                let length = blob.len();
                Answer {
                    status: 206,
                    ..Answer::ok(&blob[start..])
                }
                .header(
                    "content-range",
                    format!("bytes {start}-{}/{length}", length - 1),
                )
            } else {
                Answer::ok(blob.clone())
            };
            // The second piece, sent from the start again, ends before where the first one did.
            answer.cut = cut.then_some(if start > 0 && honours_range {
                50_000
            } else {
                90_000
            });
            Some(answer)
        })
        .await;
        let test = store();
        let pulled = test.pull(&registry.name("app:v1")).await.expect("pull");
        assert_eq!(
            std::fs::read_to_string(test.path(&pulled, "big")).expect("read"),
            noise(300_000)
        );
        assert_eq!(cuts.load(Ordering::SeqCst), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_range_is_not_spliced_in() {
    let image = image();
    let blob = image.layers[1].blob.clone();
    let registry = FaultRegistry::start(&image, move |request| {
        is_blob(request, &blob).then(|| match request.headers.get("range") {
            None => Answer {
                cut: Some(50_000),
                ..Answer::ok(blob.clone())
            },
            Some(_) => Answer {
                status: 206,
                ..Answer::ok(&blob[7..])
            }
            .header("content-range", "bytes 7-9/10"),
        })
    })
    .await;
    check(&registry, SLOW, ErrorKind::Corrupt, &["another range"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_registry_is_asked_again_a_few_times() {
    for (status, header) in [(429, Some("0")), (503, None)] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let registry = FaultRegistry::start(&image(), move |request| {
            let busy =
                request.path.contains("/manifests/") && count.fetch_add(1, Ordering::SeqCst) < 2;
            busy.then(|| match header {
                Some(seconds) => Answer::status(status).header("retry-after", seconds),
                None => Answer::status(status),
            })
        })
        .await;
        store().pull(&registry.name("app:v1")).await.expect("pull");
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_registry_ends_the_pull_by_the_progress_timeout() {
    let started = Instant::now();
    let registry = FaultRegistry::start(&image(), |_| {
        Some(Answer {
            delay: Duration::from_secs(60),
            ..Answer::status(200)
        })
    })
    .await;
    check(
        &registry,
        Duration::from_millis(300),
        ErrorKind::DeadlineExceeded,
        &["300ms"],
    )
    .await;
    let image = image();
    let big = image.layers[1].blob.clone();
    let registry = FaultRegistry::start(&image, move |request| {
        is_blob(request, &big).then(|| Answer {
            stall: Duration::from_secs(60),
            ..Answer::ok(big.clone())
        })
    })
    .await;
    check(
        &registry,
        Duration::from_millis(300),
        ErrorKind::DeadlineExceeded,
        &["300ms"],
    )
    .await;
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_and_plain_http_behind_https_are_told() {
    let port = {
        let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        probe.local_addr().expect("address").port()
    };
    let test = store();
    let error = test
        .pull(&format!("127.0.0.1:{port}/app:v1"))
        .await
        .expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable);
    assert!(error.to_string().contains("Connection refused"), "{error}");
    test.assert_empty();

    let registry = FaultRegistry::start(&image(), |_| None).await;
    let hosts = tempfile::tempdir().expect("temp dir");
    write_hosts(
        hosts.path(),
        "_default",
        &format!("server = \"https://{}\"", registry.address),
    );
    let test = store_with(&[hosts.path().to_owned()], SLOW);
    let error = test.pull(&registry.name("app:v1")).await.expect_err("tls");
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable);
    let needle = "server gave HTTP response to HTTPS client";
    assert!(error.to_string().contains(needle), "{error}");
    test.assert_empty();
}

pub fn write_hosts(dir: &std::path::Path, name: &str, text: &str) {
    std::fs::create_dir_all(dir.join(name)).expect("mkdir");
    std::fs::write(dir.join(name).join("hosts.toml"), text).expect("write");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_in_order_with_ns_and_fall_back() {
    let image = image();
    let big = image.layers[1].blob.clone();
    let down = FaultRegistry::start(&image, |_| Some(Answer::status(502))).await;
    let mut flipped = big.clone();
    flipped[100_000] ^= 1;
    // Serves manifests and a damaged layer.
    let liar = FaultRegistry::start(&image, move |request| {
        is_blob(request, &big).then(|| Answer::ok(flipped.clone()))
    })
    .await;
    let upstream = FaultRegistry::start(&image, |_| None).await;
    let hosts = tempfile::tempdir().expect("temp dir");
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n\
         [host.\"http://{}\".header]\nx-team = \"blue\"\n",
        upstream.address, down.address, liar.address, liar.address
    );
    write_hosts(hosts.path(), "registry.example", &text);
    let test = store_with(&[hosts.path().to_owned()], SLOW);
    let pulled = test.pull("registry.example/app:v1").await.expect("pull");
    assert_eq!(pulled.repo_tags, ["registry.example/app:v1"]);
    assert_eq!(
        std::fs::read_to_string(test.path(&pulled, "big")).expect("read"),
        noise(300_000)
    );
    for registry in [&down, &liar] {
        let requests = registry.requests();
        assert!(!requests.is_empty());
        assert!(
            requests.iter().all(|r| r.query == "ns=registry.example"),
            "{requests:?}"
        );
    }
    // A mirror that answers 502 is asked once, not retried.
    let manifests = |r: &FaultRegistry| {
        r.requests()
            .iter()
            .filter(|r| r.path.contains("/manifests/"))
            .count()
    };
    assert_eq!(manifests(&down), 1);
    assert!(
        liar.requests()
            .iter()
            .all(|r| r.headers.get("x-team").is_some_and(|v| v == "blue"))
    );
    assert!(
        upstream
            .requests()
            .iter()
            .all(|r| !r.headers.contains_key("x-team"))
    );
    // The configuration is read at each pull.
    write_hosts(
        hosts.path(),
        "registry.example",
        &format!("server = \"http://{}\"", down.address),
    );
    let error = test
        .pull("registry.example/app:v1")
        .await
        .expect_err("down");
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_pulls_are_joined_and_outlive_a_waiter() {
    let image = image();
    let manifest = image.manifest.clone();
    let registry = FaultRegistry::start(&image, move |request| {
        request.path.contains("/manifests/").then(|| Answer {
            delay: Duration::from_millis(500),
            ..Answer::ok(manifest.clone())
        })
    })
    .await;
    let test = Arc::new(store());
    let name = registry.name("app:v1");
    let impatient = {
        let (test, name) = (Arc::clone(&test), name.clone());
        tokio::spawn(async move { test.pull(&name).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    impatient.abort();
    let pulls: Vec<_> = (0..20)
        .map(|_| {
            let (test, name) = (Arc::clone(&test), name.clone());
            tokio::spawn(async move { test.pull(&name).await.expect("pull").id })
        })
        .collect();
    for pull in pulls {
        assert_eq!(pull.await.expect("task").to_string(), image.id());
    }
    // One manifest, one config, two layers.
    assert_eq!(registry.requests().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_references_never_reach_the_network() {
    let test = store();
    for text in ["", "UPPER/Case", "a b", "http://x/y", "x@sha256:1"] {
        let error = test.pull(text).await.expect_err(text);
        assert_eq!(error.kind(), ErrorKind::InvalidReference, "{text}");
    }
    test.assert_empty();
}
