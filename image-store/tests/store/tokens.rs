//! Who we are: challenges, tokens, and where credentials must not go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_image_store::{Auth, Digest, ErrorKind};

use crate::fixture::*;

const SECRET: &str = "hunter2-secret";

fn user() -> Auth {
    Auth {
        username: "u".into(),
        password: SECRET.into(),
        ..Auth::default()
    }
}

fn image() -> TestImage {
    TestImage::new(vec![base_layer()])
}

fn bearer_challenge(realm: &str) -> Answer {
    Answer::status(401).header(
        "www-authenticate",
        format!(
            "Bearer realm=\"http://{realm}/token\",service=\"reg\",scope=\"repository:app:pull\""
        ),
    )
}

/// A token server that answers with `answer` and remembers requests.
async fn token_server(
    answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
) -> FaultRegistry {
    FaultRegistry::start(&image(), move |request| Some(answer(request))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_auth_is_sent_after_the_challenge_only() {
    let registry = FaultRegistry::start(&image(), |request| {
        // base64 of u:hunter2-secret
        let wanted = "Basic dTpodW50ZXIyLXNlY3JldA==";
        (request.headers.get("authorization").map(String::as_str) != Some(wanted))
            .then(|| Answer::status(401).header("www-authenticate", "Basic realm=\"x\""))
    })
    .await;
    let name = registry.name("app:v1");
    let test = store();
    test.pull_as(&name, user()).await.expect("pull");
    assert!(!registry.requests()[0].headers.contains_key("authorization"));
    // One pull's credentials do nothing for the next one.
    let error = test.pull(&name).await.expect_err("no credentials");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(error.to_string().contains("none were given"), "{error}");
    let wrong = Auth {
        password: "wrong".into(),
        ..user()
    };
    let error = store().pull_as(&name, wrong).await.expect_err("wrong");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(error.to_string().contains("refused"), "{error}");
    let elsewhere = Auth {
        server_address: "https://other.example".into(),
        ..user()
    };
    let error = store()
        .pull_as(&name, elsewhere)
        .await
        .expect_err("not for this host");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(!error.to_string().contains(SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn bearer_token_is_fetched_by_get_and_renewed_when_it_expires() {
    let issued = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&issued);
    let tokens = token_server(move |_| {
        let number = counter.fetch_add(1, Ordering::SeqCst);
        Answer::ok(format!("{{\"token\":\"t{number}\"}}"))
    })
    .await;
    let realm = tokens.address.clone();
    let registry = FaultRegistry::start(&image(), move |request| {
        // The first token dies after the manifest.
        let wanted = if request.path.contains("/manifests/") {
            "Bearer t0"
        } else {
            "Bearer t1"
        };
        (request.headers.get("authorization").map(String::as_str) != Some(wanted))
            .then(|| bearer_challenge(&realm))
    })
    .await;
    let test = store();
    test.pull_as(&registry.name("app:v1"), user())
        .await
        .expect("pull");
    assert_eq!(issued.load(Ordering::SeqCst), 2);
    let request = &tokens.requests()[0];
    assert_eq!(request.method, "GET");
    assert_eq!(
        request.query,
        "service=reg&scope=repository%3Aapp%3Apull&account=u"
    );
    assert!(request.headers["authorization"].starts_with("Basic "));
    // The registry itself never sees the password.
    assert!(registry.requests().iter().all(|r| {
        r.headers
            .get("authorization")
            .is_none_or(|v| v.starts_with("Bearer "))
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_pull_gets_an_anonymous_token() {
    let tokens = token_server(|_| Answer::ok(r#"{"access_token":"anon"}"#)).await;
    let realm = tokens.address.clone();
    let registry = FaultRegistry::start(&image(), move |request| {
        (request.headers.get("authorization").map(String::as_str) != Some("Bearer anon"))
            .then(|| bearer_challenge(&realm))
    })
    .await;
    store().pull(&registry.name("app:v1")).await.expect("pull");
    assert!(!tokens.requests()[0].headers.contains_key("authorization"));
    assert_eq!(tokens.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_token_is_exchanged_by_post_and_registry_token_sent_as_it_is() {
    let tokens = token_server(|request| {
        if request.method == "POST" && request.body.contains("refresh_token=idt") {
            Answer::ok(r#"{"access_token":"good"}"#)
        } else {
            Answer::status(401)
        }
    })
    .await;
    let realm = tokens.address.clone();
    let registry = FaultRegistry::start(&image(), move |request| {
        (request.headers.get("authorization").map(String::as_str) != Some("Bearer good"))
            .then(|| bearer_challenge(&realm))
    })
    .await;
    let name = registry.name("app:v1");
    let identity = Auth {
        identity_token: "idt".into(),
        ..Auth::default()
    };
    store()
        .pull_as(&name, identity)
        .await
        .expect("identity token");
    let body = &tokens.requests()[0].body;
    assert!(
        body.contains("grant_type=refresh_token") && body.contains("service=reg"),
        "{body}"
    );
    let ready = Auth {
        registry_token: "good".into(),
        ..Auth::default()
    };
    store().pull_as(&name, ready).await.expect("registry token");
    assert_eq!(tokens.requests().len(), 1);
    let bad = Auth {
        identity_token: "no".into(),
        ..Auth::default()
    };
    let error = store().pull_as(&name, bad).await.expect_err("bad token");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_401_ends_after_one_refresh() {
    let tokens = token_server(|_| Answer::ok(r#"{"token":"t"}"#)).await;
    let realm = tokens.address.clone();
    let registry = FaultRegistry::start(&image(), move |_| Some(bearer_challenge(&realm))).await;
    let test = store();
    let error = test
        .pull_as(&registry.name("app:v1"), user())
        .await
        .expect_err("401");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert_eq!((registry.requests().len(), tokens.requests().len()), (2, 1));
    assert!(!error.to_string().contains(SECRET), "{error}");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn token_server_that_talks_nonsense_is_named() {
    let tokens = token_server(|_| Answer::ok("<html>")).await;
    let realm = tokens.address.clone();
    let registry = FaultRegistry::start(&image(), move |_| Some(bearer_challenge(&realm))).await;
    let test = store();
    let error = test
        .pull(&registry.name("app:v1"))
        .await
        .expect_err("nonsense");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&tokens.address), "{error}");
    test.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_to_another_host_gets_no_credentials() {
    let image = image();
    let catcher = FaultRegistry::start(&image, |_| None).await;
    let target = catcher.address.clone();
    let layer = Digest::sha256(&image.layers[0].blob).to_string();
    let registry = FaultRegistry::start(&image, move |request| {
        if !request.headers.contains_key("authorization") {
            return Some(Answer::status(401).header("www-authenticate", "Basic realm=\"x\""));
        }
        request.path.ends_with(&layer).then(|| {
            Answer::status(307).header(
                "location",
                format!("http://{target}{}?sig=abc", request.path),
            )
        })
    })
    .await;
    let hosts = tempfile::tempdir().expect("temp dir");
    let text = format!(
        "server = \"http://{}\"\n[header]\nx-api-key = \"{SECRET}\"\n",
        registry.address
    );
    crate::faults::write_hosts(hosts.path(), "_default", &text);
    let test = store_with(
        &[hosts.path().to_owned()],
        std::time::Duration::from_secs(20),
    );
    test.pull_as(&registry.name("app:v1"), user())
        .await
        .expect("pull");
    assert!(
        registry
            .requests()
            .iter()
            .all(|r| r.headers.contains_key("x-api-key"))
    );
    let caught = catcher.requests();
    assert_eq!(caught.len(), 1);
    assert_eq!(caught[0].query, "sig=abc");
    for name in ["authorization", "x-api-key", "cookie", "referer"] {
        assert!(
            !caught[0].headers.contains_key(name),
            "{name} leaked: {caught:?}"
        );
    }
    assert!(!format!("{caught:?}").contains(SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_reaches_the_disk_or_an_error() {
    let registry = FaultRegistry::start(&image(), |_| None).await;
    let test = store();
    let all = Auth {
        auth: SECRET.into(),
        identity_token: SECRET.into(),
        ..user()
    };
    test.pull_as(&registry.name("app:v1"), all.clone())
        .await
        .expect("pull");
    assert!(!format!("{all:?}").contains(SECRET));
    let found = std::process::Command::new("grep")
        .args(["-r", "-l", SECRET])
        .arg(test.root())
        .output()
        .expect("grep");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}
