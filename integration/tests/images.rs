//! Images: what is pulled is what was pushed, under every name, and goes away whole.

use anyhow::{Context as _, Result, ensure};
use coracle_integration::crictl::container;
use coracle_integration::need_root;
use coracle_integration::world::{BUSYBOX, TOOLS, World};
use serde_json::Value;

fn image(world: &World, name: &str) -> Result<Value> {
    Ok(world.crictl.json(&["inspecti", "-o", "json", name])?["status"].take())
}

#[test]
fn pull_is_listed_by_tag_digest_and_id() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let said = world.pull("busybox")?;
    let by_tag = image(&world, BUSYBOX)?;
    let id = by_tag["id"].as_str().context("id")?.to_owned();
    ensure!(said.contains(&id), "{said}: {id}");
    ensure!(by_tag["repoTags"][0] == BUSYBOX, "{by_tag:#}");
    let digest = by_tag["repoDigests"][0]
        .as_str()
        .context("digest")?
        .to_owned();
    ensure!(
        digest.starts_with("docker.io/library/busybox@sha256:"),
        "{digest}"
    );
    for name in ["busybox", &id, &id["sha256:".len()..][..12], &digest] {
        ensure!(image(&world, name)?["id"] == by_tag["id"], "{name}");
    }
    let size: u64 = by_tag["size"].as_str().context("size")?.parse()?;
    ensure!((100_000..50_000_000).contains(&size), "{size}");
    world.pull(&digest)?;
    ensure!(world.crictl.ids(&["images", "-q"])?.len() == 1);
    world.finish()
}

#[test]
fn tags_of_one_image_go_together_and_different_images_apart() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let prefix = "gcr.io/k8s-staging-cri-tools";
    let tags: Vec<String> = (1..4)
        .map(|n| format!("{prefix}/test-image-tags:{n}"))
        .collect();
    for tag in &tags {
        world.pull(tag)?;
    }
    let mut listed: Vec<String> = image(&world, &tags[0])?["repoTags"]
        .as_array()
        .context("repoTags")?
        .iter()
        .filter_map(|t| t.as_str().map(str::to_owned))
        .collect();
    listed.sort();
    ensure!(listed == tags, "{listed:?}");
    for n in 1..4 {
        world.pull(&format!("{prefix}/test-image-{n}:latest"))?;
    }
    ensure!(world.crictl.ids(&["images", "-q"])?.len() == 4);
    world.crictl.run(&["rmi", &tags[1]])?;
    let left = world.crictl.ids(&["images", "-q"])?.len();
    ensure!(left == 3, "{left} images are left");
    world.finish()
}

#[test]
fn layers_odd_unpack_to_what_they_say_in_both_formats() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let pod = world.pod("layers")?;
    let script = r#"
cd /; for f in gone dir/gone opaque/old becomes-file/child; do [ -e $f ] && echo $f is there; done
cat keep dir/keep replaced opaque/new becomes-dir/child becomes-file
stat -c '%n %a %u:%g %F' replaced setuid owned sticky fifo null
stat -c '%n %h' original dir/hardlink pair another
ls -d unicode-*; ls long/*/ | wc -c; cat dir/through-link"#;
    let want = "keep\nkeep\nnew\nnew\nchild\nfile\n\
                replaced 755 0:0 regular file\nsetuid 4755 0:0 regular file\n\
                owned 640 4000000:4000001 regular file\nsticky 1777 0:0 directory\n\
                fifo 600 0:0 fifo\nnull 666 0:0 character special file\n\
                original 2\ndir/hardlink 2\npair 2\nanother 2\n\
                unicode-\u{fc}\u{2603}\n201\nthrough\n";
    for tag in ["oci", "docker"] {
        let name = format!("docker.io/coracle/layers:{tag}");
        world.pull(&name)?;
        let config = container(tag, &name, &["sh", "-c", script]);
        let (_, output) = world.run_to_end(&pod, &config)?;
        let output = output.replace("unicode-?????", "unicode-\u{fc}\u{2603}");
        ensure!(output == want, "{tag}:\n{output}\nwanted:\n{want}");
    }
    world.finish()
}

#[test]
fn index_gives_the_image_of_this_machine() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let name = "docker.io/coracle/multi:latest";
    world.pull(name)?;
    let pod = world.pod("multi")?;
    let (_, output) = world.run_to_end(&pod, &container("c", name, &["cat", "/architecture"]))?;
    let want = if cfg!(target_arch = "aarch64") {
        "arm64\n"
    } else {
        "amd64\n"
    };
    ensure!(output == want, "{output}");
    world.finish()
}

#[test]
fn layers_that_lead_outside_stay_inside_or_are_refused() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    for name in ["evil-dotdot", "evil-symlink"] {
        let name = format!("docker.io/coracle/{name}:latest");
        // Refused or kept inside: both are right.
        let pulled = world.crictl.try_run(&["pull", &name])?.status.success();
        for path in ["/coracle-escaped", "/tmp/coracle-escaped"] {
            ensure!(!std::path::Path::new(path).exists(), "{name} wrote {path}");
        }
        let outside = world
            .daemon
            .root()
            .parent()
            .context("parent")?
            .join("coracle-escaped");
        ensure!(!outside.exists(), "{name} wrote {}", outside.display());
        if pulled && name.contains("symlink") {
            let pod = world.pod("evil")?;
            let config = container("c", &name, &["cat", "/tmp/coracle-escaped"]);
            let _ = world.run_to_end(&pod, &config)?;
        }
    }
    world.finish()
}

#[test]
fn image_in_use_can_be_removed_and_the_container_runs_on() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    world.pull(TOOLS)?;
    let pod = world.pod("used")?;
    let id = world.tools(&pod, "c", &["sleep", "1000"])?;
    world.crictl.run(&["rmi", TOOLS])?;
    ensure!(world.exec(&id, &["cat", "/etc/from-image"])? == "image");
    world.daemon.stop()?;
    world.daemon.start()?;
    ensure!(world.exec(&id, &["cat", "/etc/from-image"])? == "image");
    world.pull(TOOLS)?;
    world.finish()
}

#[test]
fn removal_frees_the_disk_and_info_counts_it() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let used = || -> Result<u64> {
        let info = world.crictl.json(&["imagefsinfo", "-o", "json"])?;
        let one = &info["status"]["imageFilesystems"][0];
        Ok(one["usedBytes"]["value"]
            .as_str()
            .context("usedBytes")?
            .parse()?)
    };
    let empty = used()?;
    world.pull("docker.io/library/redis:latest")?;
    let full = used()?;
    ensure!(full > empty + 10_000_000, "{empty} -> {full}");
    world
        .crictl
        .run(&["rmi", "docker.io/library/redis:latest"])?;
    let after = used()?;
    ensure!(after == empty, "{empty} -> {full} -> {after}");
    coracle_integration::wait_for("the files' end", std::time::Duration::from_secs(10), || {
        let output = std::process::Command::new("du")
            .arg("-sk")
            .arg(world.daemon.root())
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let kib: u64 = text.split('\t').next().context("du")?.parse()?;
        Ok((kib < 2048).then_some(()))
    })?;
    world.finish()
}

#[test]
fn pulls_at_once_of_one_image_share_the_work() -> Result<()> {
    need_root!();
    let world = World::start()?;
    let mut children = Vec::new();
    for _ in 0..6 {
        let mut command = world
            .crictl
            .command(&["pull", "docker.io/library/nginx:latest"]);
        children.push(command.stdout(std::process::Stdio::null()).spawn()?);
    }
    for mut child in children {
        ensure!(child.wait()?.success());
    }
    ensure!(world.crictl.ids(&["images", "-q"])?.len() == 1);
    world.finish()
}

#[test]
fn scratch_image_without_libc_or_passwd_runs() -> Result<()> {
    need_root!();
    let mut world = World::start()?;
    let name = "docker.io/coracle/probe:latest";
    world.pull(name)?;
    let pod = world.pod("scratch")?;
    let config = container("c", name, &["/probe", "show"]);
    let (_, output) = world.run_to_end(&pod, &config)?;
    let shown: Value = serde_json::from_str(&output)?;
    ensure!(shown["pid"] == 1 && shown["uids"][0] == 0, "{shown:#}");
    world.finish()
}
