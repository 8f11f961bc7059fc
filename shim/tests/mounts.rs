//! Root filesystems as daemons ask for them: many layers, mapped owners, files as devices; and
//! nothing mounted is left, whoever died first.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::proto::containerd::runc::v1::Options;
use support::proto::containerd::types::Mount;
use support::*;

const MAPS: [&str; 2] = ["uidmap=0:100000:65536", "gidmap=0:100000:65536"];

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        r#type: kind.to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

/// Runs `script` on this root to its end; what it wrote, and the container's deletion.
fn output(pod: &mut Pod, config: &Value, rootfs: Vec<Mount>) -> Vec<String> {
    let mut request = pod.request("a", config);
    request.rootfs = rootfs;
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let status = pod.wait("a", "").unwrap();
    let lines = pod.lines("a");
    assert_eq!(status, 0, "{lines:?}");
    pod.delete("a", "").unwrap();
    fs::remove_file(pod.log("a")).unwrap();
    lines
}

fn read_only(mut config: Value) -> Value {
    config["root"]["readonly"] = true.into();
    config
}

/// A user namespace; the way to the bundle is open to its root.
fn mapped(pod: &Pod, mut config: Value) -> Value {
    for dir in [pod.dir.clone(), pod.bundle("a")] {
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let linux = &mut config["linux"];
    linux["uidMappings"] = map.clone();
    linux["gidMappings"] = map;
    let namespaces = linux["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    config
}

fn loops_of(file: &Path) -> Vec<PathBuf> {
    let behind = |dir: &Path| fs::read_to_string(dir.join("loop/backing_file"));
    let all = fs::read_dir("/sys/block").unwrap().flatten();
    all.map(|entry| entry.path())
        .filter(|dir| behind(dir).is_ok_and(|b| b.trim() == file.to_str().unwrap()))
        .collect()
}

/// The last copy of a mount goes with the mount namespace of a process that may just be dying.
fn given_back(file: &Path) {
    wait_until("the loop device to be given back", || {
        loops_of(file).is_empty()
    });
}

fn run(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|o| {
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        true
    })
}

/// The image's directory as a file with a file system.
fn ext4(pod: &Pod) -> PathBuf {
    let file = pod.dir.join("image.ext4");
    let (image, path) = (pod.dir.join("image"), file.to_str().unwrap().to_owned());
    let args = [
        "-q",
        "-t",
        "ext4",
        "-d",
        image.to_str().unwrap(),
        &path,
        "16M",
    ];
    assert!(run("mke2fs", &args), "mke2fs is part of every Debian");
    file
}

#[test]
fn overlay_of_more_layers_than_a_page_has_room_for() {
    let Some(mut pod) = Pod::new("layers") else {
        return;
    };
    // The second time the kernel's newer interface refuses a name as too long, and the shorter
    // form of the older one is needed.
    for (round, upper) in ["upper".to_owned(), "u".repeat(250)]
        .into_iter()
        .enumerate()
    {
        let layers = pod.dir.join(format!("snapshots-of-a-daemon-{round}"));
        let mut lower = Vec::new();
        for n in 0..150 {
            let layer = layers.join(format!("{n:04}/fs"));
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join(format!("layer-{n}")), "").unwrap();
            lower.push(layer.display().to_string());
        }
        let image = layers.join("image");
        let from = pod.dir.join("image");
        assert!(run(
            "cp",
            &["-a", from.to_str().unwrap(), image.to_str().unwrap()]
        ));
        lower.push(image.display().to_string());
        let lower = format!("lowerdir={}", lower.join(":"));
        assert!(lower.len() > 4096);
        let script = "set -- /layer-*; echo $#; echo written > /written";
        let config = pod.config("a", script);
        let upper = pod.dir.join(upper);
        let work = pod.dir.join(format!("work{round}"));
        for dir in [&upper, &work] {
            fs::create_dir_all(dir).unwrap();
        }
        let upper_option = format!("upperdir={}", upper.display());
        let options = [
            &lower,
            &upper_option,
            &format!("workdir={}", work.display()),
        ];
        let options = options.map(String::as_str);
        let root = mount("overlay", Path::new("overlay"), &options);
        assert_eq!(output(&mut pod, &config, vec![root]), ["stdout F 150"]);
        assert_eq!(
            fs::read_to_string(upper.join("written")).unwrap(),
            "written\n"
        );
    }
    pod.shutdown();
}

#[test]
fn layers_show_the_containers_own_users() {
    let Some(mut pod) = Pod::new("idmap") else {
        return;
    };
    // Without its owner's id, nothing of an image could be changed by the container's root.
    let script = "busybox stat -c %u:%g /bin/busybox /etc; echo new > /etc/new; \
                  echo opened > /dev/stdout";
    let config = mapped(&pod, pod.config("a", script));
    let mut request = pod.request("a", &config);
    for dir in ["upper", "work"] {
        let dir = pod.bundle("a").join(dir);
        std::os::unix::fs::chown(dir, Some(100_000), Some(100_000)).unwrap();
    }
    // A daemon says who opens the ends of the pipes anew.
    let options = Options {
        binary_name: pod.runtime_path().display().to_string(),
        root: pod.dir.join("runtime").display().to_string(),
        io_uid: 100_000,
        io_gid: 100_000,
        ..Default::default()
    };
    request.options = Some(options_any(&options));
    request.rootfs[0].options.extend(MAPS.map(str::to_owned));
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    let status = pod.wait("a", "").unwrap();
    let want = ["stdout F 0:0", "stdout F 0:0", "stdout F opened"];
    assert_eq!(pod.lines("a"), want);
    assert_eq!(status, 0);
    let new = pod.bundle("a").join("upper/etc/new");
    assert_eq!(fs::metadata(new).unwrap().uid(), 100_000);
    // The stage is gone while the container lives on in the overlay, and the image is unchanged.
    assert!(!pod.bundle("a").join("idmap").exists());
    let image = fs::metadata(pod.dir.join("image/bin/busybox")).unwrap();
    assert_eq!(image.uid(), 0);
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn pipes_belong_to_root_where_nobody_is_named() {
    let Some(mut pod) = Pod::new("pipes") else {
        return;
    };
    // The counter-proof of io_uid above.
    let config = mapped(
        &pod,
        pod.config("a", "(echo opened > /dev/stdout) 2>/dev/null; echo $?"),
    );
    let mut request = pod.request("a", &config);
    request.rootfs[0].options.extend(MAPS.map(str::to_owned));
    for dir in ["upper", "work"] {
        let dir = pod.bundle("a").join(dir);
        std::os::unix::fs::chown(dir, Some(100_000), Some(100_000)).unwrap();
    }
    pod.create(&request).unwrap();
    pod.start("a", "").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(pod.lines("a").last().unwrap(), "stdout F 1");
    pod.delete("a", "").unwrap();
    pod.shutdown();
}

#[test]
fn bind_shows_the_containers_own_users() {
    let Some(mut pod) = Pod::new("idbind") else {
        return;
    };
    let config = read_only(mapped(
        &pod,
        pod.config("a", "busybox stat -c %u:%g /bin /etc"),
    ));
    let image = pod.dir.join("image");
    let options = ["rbind", "ro", MAPS[0], MAPS[1]];
    let root = mount("bind", &image, &options);
    let want = ["stdout F 0:0", "stdout F 0:0"];
    assert_eq!(output(&mut pod, &config, vec![root]), want);
    pod.shutdown();
}

#[test]
fn file_systems_in_files_are_mounted_and_their_devices_given_back() {
    let Some(mut pod) = Pod::new("loop") else {
        return;
    };
    let file = ext4(&pod);
    let plain = pod.config("a", "echo mark > /mark && cat /mark");
    let root = mount("ext4", &file, &["loop"]);
    assert_eq!(output(&mut pod, &plain, vec![root]), ["stdout F mark"]);
    given_back(&file);
    // Read-only down to the device, and the last container's file is still there.
    let script = "cat /mark; (echo more > /mark) 2>/dev/null || echo refused";
    let config = read_only(pod.config("a", script));
    let root = mount("ext4", &file, &["loop", "ro", "direct-io"]);
    let mut request = pod.request("a", &config);
    request.rootfs = vec![root];
    pod.create(&request).unwrap();
    let devices = loops_of(&file);
    assert_eq!(devices.len(), 1);
    assert_eq!(fs::read_to_string(devices[0].join("ro")).unwrap(), "1\n");
    pod.start("a", "").unwrap();
    assert_eq!(pod.wait("a", "").unwrap(), 0);
    assert_eq!(pod.lines("a"), ["stdout F mark", "stdout F refused"]);
    pod.delete("a", "").unwrap();
    fs::remove_file(pod.log("a")).unwrap();
    given_back(&file);
    // With mapped owners.
    let config = read_only(mapped(
        &pod,
        pod.config("a", "busybox stat -c %u /bin /mark"),
    ));
    let root = mount("ext4", &file, &["loop", "ro", MAPS[0], MAPS[1]]);
    assert_eq!(
        output(&mut pod, &config, vec![root]),
        ["stdout F 0", "stdout F 0"]
    );
    given_back(&file);
    // A file that holds none: named, and nothing stays.
    let bad = pod.dir.join("bad");
    fs::write(&bad, [0; 8192]).unwrap();
    let mut request = pod.request("a", &config);
    request.rootfs = vec![mount("ext4", &bad, &["loop"])];
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains(bad.to_str().unwrap()), "{error:?}");
    given_back(&bad);
    request.rootfs = vec![mount("ext4", Path::new("/nonexistent"), &["loop"])];
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("/nonexistent"), "{error:?}");
    pod.shutdown();
}

#[test]
fn erofs_images_are_mounted_with_and_without_a_device() {
    let Some(mut pod) = Pod::new("erofs") else {
        return;
    };
    let file = pod.dir.join("image.erofs");
    let image = pod.dir.join("image");
    if !run(
        "mkfs.erofs",
        &[file.to_str().unwrap(), image.to_str().unwrap()],
    ) {
        say_skipped("needs mkfs.erofs");
        return pod.shutdown();
    }
    let config = read_only(pod.config("a", "echo > /x || cat /proc/mounts | grep ' / '"));
    for options in [&["ro"][..], &["ro", "loop"]] {
        let root = mount("erofs", &file, options);
        let lines = output(&mut pod, &config, vec![root]);
        let mounted = |line: &String| line.contains(" / erofs ro");
        assert!(lines.iter().any(mounted), "{lines:?}");
        given_back(&file);
    }
    pod.shutdown();
}

#[test]
fn nothing_stays_mounted_whoever_dies_first() {
    let Some(mut pod) = Pod::new("orders") else {
        return;
    };
    let file = ext4(&pod);
    let mounted = |pod: &Pod| {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let rootfs = pod.bundle("a").join("rootfs");
        table.contains(rootfs.to_str().unwrap())
    };
    let config = pod.config("a", "sleep 100");
    let mut request = pod.request("a", &config);
    request.rootfs = vec![mount("ext4", &file, &["loop"])];
    // A second mount over a part of the first.
    fs::create_dir_all(pod.dir.join("extra")).unwrap();
    let mut over = mount("bind", &pod.dir.join("extra"), &["rbind"]);
    over.target = "/tmp".to_owned();
    request.rootfs.push(over);
    // Never started.
    pod.create(&request).unwrap();
    assert!(mounted(&pod) && loops_of(&file).len() == 1);
    pod.delete("a", "").unwrap();
    assert!(!mounted(&pod));
    given_back(&file);
    // The runtime refuses.
    let mut bad = request.clone();
    fs::write(
        pod.bundle("a").join("config.json"),
        pod.config("a", "x")
            .to_string()
            .replace("\"sh\"", "\"/nonexistent\""),
    )
    .unwrap();
    bad.rootfs.truncate(1);
    let error = pod.create(&bad).unwrap_err();
    assert!(error.message.contains("/nonexistent"), "{error:?}");
    assert!(!mounted(&pod));
    given_back(&file);
    // The second mount of two fails.
    bad.rootfs
        .push(mount("bind", Path::new("/nonexistent"), &["rbind"]));
    pod.create(&bad).unwrap_err();
    assert!(!mounted(&pod));
    given_back(&file);
    // The container dies, then its shim, before the delete.
    fs::write(pod.bundle("a").join("config.json"), config.to_string()).unwrap();
    for alive in [false, true] {
        pod.create(&request).unwrap();
        pod.start("a", "").unwrap();
        if !alive {
            pod.kill("a", "", 9).unwrap();
            pod.wait("a", "").unwrap();
        }
        let shim = pod.shim_pid();
        // What a death in the midst of a mapped mount leaves.
        let stage = pod.bundle("a").join("idmap/0");
        fs::create_dir_all(&stage).unwrap();
        assert!(run("mount", &["-t", "tmpfs", "t", stage.to_str().unwrap()]));
        kill(shim, 9);
        wait_until("the shim to die", || !support::alive(shim));
        let deleted = shim_delete(&pod.bundle("a"), &pod.id("a"));
        assert_eq!(deleted.exit_status, 137);
        assert!(!mounted(&pod));
        given_back(&file);
        assert!(!pod.bundle("a").join("idmap").exists());
        pod.restart_shim();
    }
    pod.shutdown();
}

#[test]
fn helpers_mount_what_is_theirs() {
    let helpers = tempfile::tempdir().unwrap();
    let program = helpers.path().join("mount.fuse3");
    // Stands for fuse-overlayfs: notes what it was asked for, and mounts.
    let body = "#!/bin/sh\n[ \"$1\" = overlay ] || { echo bad source >&2; exit 3; }\n\
        echo \"$*\" > \"${0%/*}/asked\"\nmount --rbind \"${0%/*}/root\" \"$2\"\n";
    fs::write(&program, body).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(shim_program());
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", helpers.path().display()));
    let Some(mut pod) = Pod::by("helper", "", command, |_| {}) else {
        return;
    };
    std::os::unix::fs::symlink(pod.dir.join("image"), helpers.path().join("root")).unwrap();
    let config = pod.config("a", "echo inside");
    let source = Path::new("overlay");
    let options = ["lowerdir=/l1:/l2", "upperdir=/u", "ro"];
    let root = mount("fuse3.fuse-overlayfs", source, &options);
    assert_eq!(output(&mut pod, &config, vec![root]), ["stdout F inside"]);
    let asked = fs::read_to_string(helpers.path().join("asked")).unwrap();
    let want = format!(
        "overlay {} -o lowerdir=/l1:/l2 -o upperdir=/u -o ro -t fuse-overlayfs\n",
        pod.bundle("a").join("rootfs").display()
    );
    assert_eq!(asked, want);
    // One that fails, in its own words, and one that is not there.
    let mut request = pod.request("a", &config);
    request.rootfs = vec![mount("fuse3.fuse-overlayfs", Path::new("x"), &[])];
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("bad source"), "{error:?}");
    fs::remove_file(&program).unwrap();
    let error = pod.create(&request).unwrap_err();
    assert!(error.message.contains("mount.fuse3"), "{error:?}");
    pod.shutdown();
}

#[test]
fn fuse_overlayfs_ends_with_its_container() {
    let Some(mut pod) = Pod::new("fuse") else {
        return;
    };
    if !run("fuse-overlayfs", &["--version"]) || !Path::new("/dev/fuse").exists() {
        say_skipped("needs fuse-overlayfs and /dev/fuse");
        return pod.shutdown();
    }
    let shim = pod.shim_pid();
    let config = pod.config("a", "echo inside; echo written > /written");
    let mut root = pod.request("a", &config).rootfs;
    root[0].r#type = "fuse3.fuse-overlayfs".to_owned();
    assert_eq!(output(&mut pod, &config, root), ["stdout F inside"]);
    let written = pod.bundle("a").join("upper/written");
    assert_eq!(fs::read_to_string(written).unwrap(), "written\n");
    wait_until("its program to end", || children(shim).is_empty());
    pod.shutdown();
}
