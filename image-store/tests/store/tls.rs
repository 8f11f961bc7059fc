//! TLS as hosts.toml configures it, against Debian's docker-registry.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coracle_image_store::ErrorKind;

use crate::faults::write_hosts;
use crate::fixture::*;
use crate::skip;

fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(dir)
        .output()
        .expect("openssl");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An authority, a server certificate for 127.0.0.1 and a client certificate.
fn certificates(dir: &Path) {
    std::fs::write(
        dir.join("san"),
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .expect("write");
    openssl(
        dir,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca \
         -keyout ca.key -out ca.pem",
    );
    for name in ["server", "client"] {
        openssl(
            dir,
            &format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} \
                 -keyout {name}.key -out {name}.csr"
            ),
        );
        openssl(
            dir,
            &format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                 -extfile san -out {name}.pem"
            ),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_as_configured() {
    if Command::new("openssl").arg("version").output().is_err() {
        skip!("tls_is_verified_as_configured", "openssl is missing")
    }
    let Some(plain) = DockerRegistry::start().await else {
        skip!(
            "tls_is_verified_as_configured",
            "docker-registry is missing"
        )
    };
    plain
        .push("app", "v1", &TestImage::new(vec![base_layer()]))
        .await;
    let dir = tempfile::tempdir().expect("temp dir");
    let at = dir.path();
    certificates(at);
    let path = |name: &str| at.join(name).display().to_string();
    let tls = |clients: bool| {
        let mut text = format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            path("server.pem"),
            path("server.key")
        );
        if clients {
            text.push_str(&format!("    clientcas: [{}]\n", path("ca.pem")));
        }
        text
    };
    let data = Some(plain.data());
    let secure = DockerRegistry::start_with(&tls(false), data.clone())
        .await
        .expect("start");
    let mutual = DockerRegistry::start_with(&tls(true), data)
        .await
        .expect("start");
    let hosts = at.join("certs.d");
    let ca = format!("ca = \"{}\"\n", path("ca.pem"));
    let client = format!(
        "client = [[\"{}\", \"{}\"]]\n",
        path("client.pem"),
        path("client.key")
    );
    for (registry, keys, wanted) in [
        (&secure, "", Err("certificate")),
        (&secure, &ca[..], Ok(())),
        (&secure, "skip_verify = true\n", Ok(())),
        (&mutual, &ca[..], Err("")),
        (&mutual, &format!("{ca}{client}"), Ok(())),
        (&secure, "ca = \"missing.pem\"\n", Err("missing.pem")),
    ] {
        let text = format!("server = \"https://{}\"\n{keys}", registry.address);
        write_hosts(&hosts, "_default", &text);
        let test = store_with(std::slice::from_ref(&hosts), Duration::from_secs(20));
        match (test.pull(&registry.name("app:v1")).await, wanted) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(needle)) => {
                assert!(error.to_string().contains(needle), "{error}");
                assert!(
                    matches!(error.kind(), ErrorKind::RegistryUnavailable | ErrorKind::Io),
                    "{error}"
                );
                test.assert_empty();
            }
            (got, wanted) => panic!("{keys}: {got:?}, wanted {wanted:?}"),
        }
    }
}
