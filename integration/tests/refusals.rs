//! Wrong requests: each gets a gRPC code and a text that names the thing, and leaves nothing.

use std::process::Command;

use anyhow::{Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::registry::{Answer, FakeRegistry, write_host};
use coracle_integration::world::{TOOLS, World};
use serde_json::json;

const NOBODY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn says(error: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(error.contains(part), "{part:?} is not in: {error}");
    }
    Ok(())
}

#[test]
fn ids_unknown_are_not_found_but_stop_and_remove_succeed() -> Result<()> {
    need_root!();
    let world = World::start()?;
    for args in [
        &["inspect", NOBODY][..],
        &["inspectp", NOBODY],
        &["start", NOBODY],
        &["exec", "--sync", NOBODY, "true"],
        &["exec", NOBODY, "true"],
        &["attach", NOBODY],
        &["update", "--memory", "1000000", NOBODY],
        &["logs", "--reopen", NOBODY],
        &["port-forward", NOBODY, "1:1"],
    ] {
        says(&world.crictl.refused(args)?, &["NotFound", NOBODY])?;
    }
    for args in [&["stopp", NOBODY][..], &["stop", NOBODY]] {
        world.crictl.run(args)?;
    }
    let image = format!("sha256:{NOBODY}");
    ensure!(
        world
            .crictl
            .refused(&["inspecti", &image])?
            .contains("no such image")
    );
    world.finish()
}

#[test]
fn pod_config_bad_fields_are_named_and_nothing_is_left() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let cases = [
        (
            "/linux/sysctls",
            json!({"vm.swappiness": "1"}),
            "vm.swappiness",
        ),
        (
            "/linux/sysctls",
            json!({"kernel.shm_rmid_forced\n": "1"}),
            "sysctl",
        ),
        (
            "/port_mappings",
            json!([{"container_port": 80, "host_port": 99999}]),
            "99999",
        ),
        ("/log_directory", json!("relative/logs"), "log"),
        ("/linux/cgroup_parent", json!("/../../etc"), "cgroup"),
    ];
    for (n, (pointer, value, named)) in cases.into_iter().enumerate() {
        let config = world.pod_config(&format!("bad-{n}")).set(pointer, value);
        let error = world.refuse_pod(&config)?;
        says(&error, &["InvalidArgument", named]).map_err(|e| e.context(pointer))?;
    }
    let path = world.dir.join("handler.json");
    world.pod_config("handler").write(&path)?;
    let args = [
        "runp",
        "--runtime",
        "nosuchhandler",
        &path.display().to_string(),
    ];
    says(&world.crictl.refused(&args)?, &["nosuchhandler"])?;
    world.nothing_left()?;
    world.finish()
}

#[test]
fn pod_name_taken_is_refused_until_it_is_removed() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let config = world.pod_config("taken");
    let pod = world.run_pod(&config)?;
    says(&world.refuse_pod(&config)?, &["AlreadyExists", "taken"])?;
    world.remove_pod(&pod)?;
    world.run_pod(&config)?;
    world.finish()
}

#[test]
fn container_config_bad_fields_are_named_and_nothing_is_left() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    world.pull("docker.io/coracle/user-missing:latest")?;
    let pod = world.pod("p")?;
    let context = "/linux/security_context";
    let cases = [
        (
            "/image/image",
            json!("docker.io/library/nosuch:latest"),
            "nosuch",
        ),
        (
            &format!("{context}/run_as_username"),
            json!("nosuchuser"),
            "nosuchuser",
        ),
        (
            &format!("{context}/run_as_group"),
            json!({"value": 5}),
            "group",
        ),
        (
            &format!("{context}/capabilities/add_capabilities"),
            json!(["BOGUS"]),
            "BOGUS",
        ),
        (
            &format!("{context}/seccomp"),
            json!({"profile_type": 2, "localhost_ref": "/nonexistent/profile.json"}),
            "/nonexistent/profile.json",
        ),
        (
            &format!("{context}/apparmor"),
            json!({"profile_type": 2, "localhost_ref": "nosuchprofile"}),
            // Its name where AppArmor is on, else that it is off.
            "security_context.apparmor",
        ),
        (
            "/mounts",
            json!([{"container_path": "relative", "host_path": "/tmp"}]),
            "relative",
        ),
        (
            "/devices",
            json!([{"container_path": "/dev/x", "host_path": "/dev/nosuchdevice"}]),
            "nosuchdevice",
        ),
        ("/log_path", json!("../../escape.log"), "log"),
    ]
    .map(|(pointer, value, named)| (pointer.to_owned(), value, named));
    for (n, (pointer, value, named)) in cases.into_iter().enumerate() {
        let config = container(&format!("bad-{n}"), TOOLS, &["true"]).set(&pointer, value);
        let error = world.refuse_container(&pod, &config)?;
        ensure!(
            error.contains("code = "),
            "{pointer}: no gRPC code: {error}"
        );
        says(&error, &[named]).map_err(|e| e.context(pointer))?;
    }
    // What only the kernel can refuse is refused at the start, and the container says why.
    let config =
        container("cpuset", TOOLS, &["true"]).set("/linux/resources/cpuset_cpus", "4000-4001");
    let id = world.create(&pod, &config)?;
    says(
        &world.crictl.refused(&["start", &id])?,
        &["code = ", "cpuset.cpus"],
    )?;
    let status = world.container_status(&id)?;
    ensure!(status["reason"] == "StartError", "{status:#}");
    world.crictl.run(&["rm", &id])?;
    let image = "docker.io/coracle/user-missing:latest";
    let error = world.refuse_container(&pod, &container("user", image, &["true"]))?;
    says(&error, &["nosuchuser"])?;
    ensure!(
        world.crictl.ids(&["ps", "-aq"])?.is_empty(),
        "a container is left"
    );
    world.remove_pod(&pod)?;
    world.nothing_left()?;
    world.finish()
}

#[test]
fn start_of_a_missing_program_fails_with_a_reason_and_can_be_removed() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("start")?;
    let id = world.create(&pod, &container("c", TOOLS, &["nosuchprogram"]))?;
    let error = world.crictl.refused(&["start", &id])?;
    says(
        &error,
        &["nosuchprogram", "executable file not found in $PATH"],
    )?;
    let status = world.container_status(&id)?;
    ensure!(status["state"] == "CONTAINER_EXITED", "{status:#}");
    ensure!(
        status["reason"] == "StartError" && status["exitCode"] == 128,
        "{status:#}"
    );
    ensure!(
        status["message"]
            .as_str()
            .unwrap_or("")
            .contains("nosuchprogram"),
        "{status:#}"
    );
    says(&world.crictl.refused(&["start", &id])?, &[&id[..12]])?;
    world.crictl.run(&["rm", &id])?;
    let done = world.tools(&pod, "done", &["true"])?;
    world.wait_exited(&done)?;
    says(&world.crictl.refused(&["start", &done])?, &["code = "])?;
    says(
        &world.crictl.refused(&["exec", "--sync", &done, "true"])?,
        &["code = "],
    )?;
    world.finish()
}

#[test]
fn create_in_a_stopped_pod_is_refused() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("stopped")?;
    world.crictl.run(&["stopp", &pod.id])?;
    let error = world.refuse_container(&pod, &container("c", TOOLS, &["true"]))?;
    says(&error, &["code = ", &pod.id[..12]])?;
    world.finish()
}

#[test]
fn pull_of_what_a_registry_does_not_serve_says_why() -> Result<()> {
    need_root!();
    let world = World::start()?;
    says(
        &world
            .crictl
            .refused(&["pull", "docker.io/library/nosuch:latest"])?,
        &["NotFound", "library/nosuch"],
    )?;
    says(
        &world
            .crictl
            .refused(&["pull", "docker.io/library/busybox:nosuchtag"])?,
        &["NotFound", "nosuchtag"],
    )?;
    says(
        &world.crictl.refused(&["pull", "Upper/Case:latest"])?,
        &["InvalidArgument", "Upper/Case"],
    )?;
    says(
        &world.crictl.refused(&["pull", "busybox@sha256:short"])?,
        &["InvalidArgument", "sha256:short"],
    )?;
    for (image, text) in [
        ("docker.io/coracle/bad-diff-id:latest", "diff"),
        ("docker.io/coracle/bad-config:latest", "config"),
        ("docker.io/coracle/other-platform:latest", "linux/"),
    ] {
        let error = world.crictl.refused(&["pull", image])?;
        says(&error, &["code = ", text]).map_err(|e| e.context(image))?;
    }
    ensure!(
        world.crictl.ids(&["images", "-q"])?.is_empty(),
        "an image is left"
    );
    // Nobody listens: an address of this namespace that answers with a reset.
    write_host(&world.certs(), "gone.example", "127.0.0.1:1")?;
    let error = world.crictl.refused(&["pull", "gone.example/a/b:c"])?;
    says(&error, &["code = ", "gone.example"])?;
    world.finish()
}

#[test]
fn registries_that_answer_401_404_500_or_garbage_are_told_apart() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let cases: Vec<(&str, FakeRegistry, &[&str])> = vec![
        (
            "denied.example",
            FakeRegistry::start(|_| {
                Answer::new(
                    401,
                    r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}"#,
                )
                .header("WWW-Authenticate", "Basic realm=\"test\"")
                .header("Content-Type", "application/json")
            })?,
            &["Unauthenticated", "denied.example"],
        ),
        (
            "missing.example",
            FakeRegistry::start(|_| {
                Answer::new(
                    404,
                    r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#,
                )
            })?,
            &["NotFound", "missing.example"],
        ),
        (
            "broken.example",
            FakeRegistry::start(|_| Answer::new(500, "oops"))?,
            &["broken.example"],
        ),
        (
            "garbage.example",
            FakeRegistry::start(|_| {
                Answer::new(200, "<html>captive portal</html>")
                    .header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            })?,
            &["garbage.example"],
        ),
        (
            "huge.example",
            FakeRegistry::start(|_| {
                Answer::new(200, vec![b' '; 8 << 20])
                    .header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            })?,
            &["huge.example"],
        ),
        (
            "ambiguous.example",
            FakeRegistry::start(|_| {
                Answer::new(
                    200,
                    r#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#,
                )
                .header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            })?,
            &["ambiguous.example"],
        ),
        (
            "schema1.example",
            FakeRegistry::start(|_| {
                Answer::new(
                    200,
                    r#"{"schemaVersion":1,"name":"a/b","tag":"c","fsLayers":[]}"#,
                )
                .header(
                    "Content-Type",
                    "application/vnd.docker.distribution.manifest.v1+prettyjws",
                )
            })?,
            &["schema1.example", "schema"],
        ),
    ];
    for (host, registry, parts) in &cases {
        write_host(&world.certs(), host, registry.address())?;
        let error = world.crictl.refused(&["pull", &format!("{host}/a/b:c")])?;
        says(&error, &["code = "]).map_err(|e| e.context(*host))?;
        says(&error, parts).map_err(|e| e.context(*host))?;
        ensure!(!registry.requests().is_empty(), "{host} was not asked");
    }
    ensure!(
        world.crictl.ids(&["images", "-q"])?.is_empty(),
        "an image is left"
    );
    let ingest = Command::new("find")
        .arg(world.daemon.root())
        .args(["-type", "f"])
        .output()?;
    let files = String::from_utf8_lossy(&ingest.stdout).into_owned();
    ensure!(!files.contains("ingest/"), "{files}");
    world.finish()
}

#[test]
fn credentials_go_to_their_registry_and_into_no_log() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let registry = FakeRegistry::start(|request| match &request.authorization {
        Some(_) => Answer::new(404, "{}"),
        None => Answer::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"test\""),
    })?;
    write_host(&world.certs(), "secret.example", registry.address())?;
    let canary = "canary-3f9a";
    let creds = format!("user:{canary}");
    let error = world
        .crictl
        .refused(&["pull", "--creds", &creds, "secret.example/a/b:c"])?;
    says(&error, &["NotFound"])?;
    // "user:canary-3f9a" in base64.
    let sent = registry
        .requests()
        .iter()
        .any(|r| r.authorization.as_deref() == Some("Basic dXNlcjpjYW5hcnktM2Y5YQ=="));
    ensure!(sent, "{:?}", registry.requests());
    let found = Command::new("grep")
        .args(["-rl", canary])
        .arg(&world.dir)
        .output()?;
    ensure!(
        found.stdout.is_empty(),
        "in {}",
        String::from_utf8_lossy(&found.stdout)
    );
    world.finish()
}
