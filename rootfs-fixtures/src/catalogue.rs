//! The images: what is in them and under which names they are found. Names are full, with host
//! and tag; the loopback registry serves them for every host (see hosts.toml of the harness).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::debian::{Known, Packages};
use crate::layout::{Config, Format, Layout, Stored};
use crate::tree::{Compression, Layer, Source, Tree};

/// Prefix of the images that critest pulls for its image specs.
const CRI_TOOLS: &str = "gcr.io/k8s-staging-cri-tools";
const E2E: &str = "registry.k8s.io/e2e-test-images";
/// Prefix of the images that are ours.
const OURS: &str = "docker.io/coracle";

pub const ARCHITECTURE: &str = match std::env::consts::ARCH.as_bytes() {
    b"aarch64" => "arm64",
    _ => "amd64",
};

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
app:x:1234:1235:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
";
const GROUP: &str = "root:x:0:
daemon:x:1:
tty:x:5:
www-data:x:33:
app:x:1235:
extra:x:2001:app
more:x:2002:app,www-data
nogroup:x:65534:
";

// Not busybox-static: its shell runs applets without looking at the files in /bin, so that a test
// which replaces or forbids one would not notice.
const BUSYBOX: &[&str] = &["busybox", "util-linux", "libc6"];

/// critest looks for processes with it, and Debian's busybox has none.
const PGREP: &str = "#!/bin/sh
# pgrep [-f] PATTERN: pids of the processes whose name (-f: command line) has PATTERN in it.
file=comm
[ \"$1\" = -f ] && { file=cmdline; shift; }
status=1
for dir in /proc/[0-9]*; do
    pid=${dir#/proc/}
    [ \"$pid\" = $$ ] && continue
    tr '\\0' ' ' < $dir/$file 2>/dev/null | grep -q -e \"$1\" && { echo $pid; status=0; }
done
exit $status
";
const NGINX: &[&str] = &[
    "nginx",
    "nginx-common",
    "libcrypt1",
    "libpcre2-8-0",
    "libssl3t64|libssl3",
    "zlib1g",
    "libc6",
];
const HTTPD: &[&str] = &[
    "apache2-bin",
    "libapr1t64|libapr1",
    "libaprutil1t64|libaprutil1",
    "libcrypt1",
    "libexpat1",
    "libpcre2-8-0",
    "libuuid1",
    "libc6",
];
const REDIS: &[&str] = &[
    "redis-tools",
    "libatomic1",
    "libjemalloc2",
    "liblua5.1-0",
    "lua-cjson",
    "lua-bitop",
    "liblzf1",
    "libhiredis0.14|libhiredis1.1.0",
    "libsystemd0",
    "libcap2",
    "libgcrypt20",
    "libgpg-error0",
    "liblz4-1",
    "liblzma5",
    "libzstd1",
    "libssl3t64|libssl3",
    "libgcc-s1",
    "libstdc++6",
    "libc6",
];

/// What the images are made of, fetched before anything is built.
pub struct Ingredients {
    busybox: Packages,
    nginx: Packages,
    httpd: Packages,
    redis: Packages,
    probe: PathBuf,
}

impl Ingredients {
    pub fn gather(cache: &Path, probe: &Path) -> Result<Self> {
        let known = Known::ask([BUSYBOX, NGINX, HTTPD, REDIS].concat())?;
        Ok(Self {
            busybox: Packages::fetch(cache, &known, BUSYBOX)?,
            nginx: Packages::fetch(cache, &known, NGINX)?,
            httpd: Packages::fetch(cache, &known, HTTPD)?,
            redis: Packages::fetch(cache, &known, REDIS)?,
            probe: probe.to_owned(),
        })
    }

    /// Changes when any image would.
    pub fn key(&self) -> Result<String> {
        let mut text = crate::tree::hash_file(&self.probe)?;
        for packages in [&self.busybox, &self.nginx, &self.httpd, &self.redis] {
            text.push('\n');
            text.push_str(&packages.names().join(" "));
        }
        // The recipes are in this program.
        text.push('\n');
        text.push_str(&crate::tree::hash_file(&std::env::current_exe()?)?);
        Ok(text)
    }
}

/// Builds every image into the layout.
pub fn build(ingredients: &Ingredients, layout: &mut Layout) -> Result<()> {
    let base = layout.layer(&busybox(&ingredients.busybox)?, Compression::Gzip)?;
    plain(layout, &base)?;
    servers(layout, ingredients, &base)?;
    users(layout, ingredients, &base)?;
    ours(layout, ingredients, &base)?;
    odd_layers(layout, &base)?;
    broken(layout, &base)
}

/// Stores an image of this machine's architecture under several names.
fn add(layout: &mut Layout, names: &[String], layers: &[Layer], config: &Config) -> Result<Stored> {
    let stored = layout.image(layers, config, Format::Oci, ARCHITECTURE)?;
    for name in names {
        layout.name(&stored, name);
    }
    Ok(stored)
}

fn busybox(packages: &Packages) -> Result<Tree> {
    let binary = packages.find("/bin/busybox")?;
    let mut tree = Tree::new();
    for (path, mode) in [
        ("/dev", 0o755),
        ("/proc", 0o755),
        ("/sys", 0o755),
        ("/tmp", 0o1777),
        ("/root", 0o700),
        ("/home", 0o755),
        ("/mnt", 0o755),
        ("/run", 0o755),
        ("/usr/bin", 0o755),
        ("/usr/sbin", 0o755),
        ("/var/tmp", 0o1777),
        ("/var/www", 0o755),
    ] {
        tree = tree.dir(path, mode);
    }
    tree = tree
        .symlink("/var/run", "../run")
        .text("/etc/passwd", 0o644, PASSWD)
        .text("/etc/group", 0o644, GROUP)
        .text(
            "/etc/nsswitch.conf",
            0o644,
            "passwd: files\ngroup: files\nhosts: files dns\n",
        )
        .dir("/home/app", 0o755)
        .owned("/home/app", 1234, 1235);
    let programs = [
        ("/bin/busybox", "/bin/busybox"),
        ("/usr/bin/ipcs", "/usr/bin/ipcs"),
    ];
    tree = packages
        .programs(tree, &programs)?
        .text("/usr/bin/pgrep", 0o755, PGREP);
    let output = Command::new(&binary)
        .arg("--list")
        .output()
        .context("list busybox applets")?;
    if !output.status.success() {
        bail!("busybox --list: {}", output.status);
    }
    for applet in String::from_utf8(output.stdout)?
        .lines()
        .filter(|a| *a != "busybox")
    {
        tree = tree.hardlink(&format!("/bin/{applet}"), "/bin/busybox");
    }
    Ok(tree)
}

/// Images that are busybox with something small beside it.
fn plain(layout: &mut Layout, base: &Layer) -> Result<()> {
    let shell = || Config {
        cmd: vec!["sh"],
        ..Config::default()
    };
    let names = [
        "docker.io/library/busybox:latest".to_owned(),
        "docker.io/library/busybox:1.36".to_owned(),
        "public.ecr.aws/docker/library/busybox:latest".to_owned(),
        format!("{E2E}/busybox:1.29-2"),
    ];
    add(layout, &names, std::slice::from_ref(base), &shell())?;

    // The image specs of critest: which names share an image is what they check.
    for (content, tags) in [
        ("test-image-1", &["test-image-1:latest"][..]),
        ("test-image-2", &["test-image-2:latest"]),
        ("test-image-3", &["test-image-3:latest"]),
        ("test-image-latest", &["test-image-latest:latest"]),
        (
            "test-image-tags",
            &[
                "test-image-tags:1",
                "test-image-tags:2",
                "test-image-tags:3",
            ],
        ),
        ("test-image-tag", &["test-image-tag:test"]),
        ("test-image-tag-all", &["test-image-tag:all"]),
    ] {
        let marker = Tree::new().text(&format!("/{content}"), 0o644, &format!("{content}\n"));
        let marker = layout.layer(&marker, Compression::Gzip)?;
        let names: Vec<String> = tags.iter().map(|t| format!("{CRI_TOOLS}/{t}")).collect();
        add(layout, &names, &[base.clone(), marker], &shell())?;
    }
    for (image, user) in [
        ("test-image-user-uid", "1002"),
        ("test-image-user-username", "www-data"),
        ("test-image-user-uid-group", "1003:1004"),
        ("test-image-user-username-group", "www-data:1004"),
    ] {
        let config = Config { user, ..shell() };
        let name = format!("{CRI_TOOLS}/{image}:latest");
        add(layout, &[name], std::slice::from_ref(base), &config)?;
    }
    let accounts = Tree::new()
        .text(
            "/etc/passwd",
            0o644,
            &format!("{PASSWD}default-user:x:1000:1000::/home:/bin/sh\n"),
        )
        .text(
            "/etc/group",
            0o644,
            &format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
        );
    let accounts = layout.layer(&accounts, Compression::Gzip)?;
    let name = format!("{CRI_TOOLS}/test-image-predefined-group:latest");
    add(
        layout,
        &[name],
        &[base.clone(), accounts],
        &Config {
            user: "1000",
            ..shell()
        },
    )?;
    Ok(())
}

fn servers(layout: &mut Layout, from: &Ingredients, base: &Layer) -> Result<()> {
    let nginx = |port: u16| {
        format!(
            "user www-data;\nworker_processes 1;\npid /var/run/nginx.pid;\n\
             error_log /dev/stderr notice;\nevents {{ worker_connections 256; }}\n\
             http {{\n  include mime.types;\n  access_log /dev/stdout;\n  server {{\n    \
             listen {port};\n    location / {{ root /usr/share/nginx/html; index index.html; }}\n  \
             }}\n}}\n"
        )
    };
    let program = from
        .nginx
        .programs(Tree::new(), &[("/usr/sbin/nginx", "/usr/sbin/nginx")])?
        .file(
            "/etc/nginx/mime.types",
            0o644,
            Source::Path(from.nginx.find("/etc/nginx/mime.types")?),
        )
        .text(
            "/usr/share/nginx/html/index.html",
            0o644,
            "<h1>Welcome to nginx!</h1>\n",
        )
        .dir("/var/log/nginx", 0o755)
        .dir("/var/lib/nginx", 0o755)
        .text("/etc/nginx/nginx.conf", 0o644, &nginx(80));
    let program = layout.layer(&program, Compression::Gzip)?;
    let config = |port| Config {
        entrypoint: vec!["nginx", "-g", "daemon off;"],
        stop_signal: "SIGQUIT",
        exposed_ports: vec![port],
        ..Config::default()
    };
    let names = [
        format!("{E2E}/nginx:1.14-2"),
        "docker.io/library/nginx:latest".to_owned(),
    ];
    let layers = [base.clone(), program.clone()];
    add(layout, &names, &layers, &config("80/tcp"))?;
    let other = Tree::new().text("/etc/nginx/nginx.conf", 0o644, &nginx(12003));
    let other = layout.layer(&other, Compression::Gzip)?;
    let name = format!("{CRI_TOOLS}/hostnet-nginx-{ARCHITECTURE}:latest");
    add(
        layout,
        &[name],
        &[base.clone(), program, other],
        &config("12003/tcp"),
    )?;

    let modules = ["mpm_event", "authz_core", "dir"];
    let mut files: Vec<(String, String)> = modules
        .iter()
        .map(|m| {
            (
                format!("/usr/lib/apache2/modules/mod_{m}.so"),
                format!("/usr/local/apache2/modules/mod_{m}.so"),
            )
        })
        .collect();
    files.push((
        "/usr/sbin/apache2".into(),
        "/usr/local/apache2/bin/httpd".into(),
    ));
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    let mut conf =
        "ServerRoot /usr/local/apache2\nListen 80\nServerName localhost\nUser www-data\n\
                    Group www-data\nPidFile /run/httpd.pid\nErrorLog /dev/stderr\n\
                    DefaultRuntimeDir /run\nDocumentRoot /usr/local/apache2/htdocs\n"
            .to_owned();
    for module in modules {
        conf.push_str(&format!(
            "LoadModule {module}_module modules/mod_{module}.so\n"
        ));
    }
    let program = from
        .httpd
        .programs(Tree::new(), &files)?
        .text("/usr/local/apache2/conf/httpd.conf", 0o644, &conf)
        .text(
            "/usr/local/apache2/htdocs/index.html",
            0o644,
            "<h1>It works!</h1>\n",
        );
    let program = layout.layer(&program, Compression::Gzip)?;
    let config = Config {
        cmd: vec![
            "httpd",
            "-f",
            "/usr/local/apache2/conf/httpd.conf",
            "-D",
            "FOREGROUND",
        ],
        env: vec!["PATH=/usr/local/apache2/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        stop_signal: "SIGWINCH",
        exposed_ports: vec!["80/tcp"],
        ..Config::default()
    };
    let names = [
        format!("{E2E}/httpd:2.4.39-4"),
        "docker.io/library/httpd:latest".to_owned(),
    ];
    add(layout, &names, &[base.clone(), program], &config)?;

    let program = from.redis.programs(
        Tree::new(),
        &[
            ("/usr/bin/redis-check-rdb", "/usr/bin/redis-server"),
            ("/usr/bin/redis-cli", "/usr/bin/redis-cli"),
        ],
    )?;
    let program = layout.layer(&program, Compression::Gzip)?;
    let config = Config {
        cmd: vec!["redis-server", "--save", "", "--protected-mode", "no"],
        working_dir: "/tmp",
        exposed_ports: vec!["6379/tcp"],
        ..Config::default()
    };
    let names = ["docker.io/library/redis:latest".to_owned()];
    add(layout, &names, &[base.clone(), program], &config)?;
    Ok(())
}

/// The probe under the names of the images that need only one static program.
fn users(layout: &mut Layout, from: &Ingredients, base: &Layer) -> Result<()> {
    let probe = || Source::Path(from.probe.clone());
    let pause = layout.layer(
        &Tree::new().file("/pause", 0o755, probe()),
        Compression::Gzip,
    )?;
    let config = Config {
        entrypoint: vec!["/pause", "trap", "0"],
        ..Config::default()
    };
    let names = [
        "registry.k8s.io/pause:3.9".to_owned(),
        "k8s.gcr.io/pause:3.9".to_owned(),
    ];
    add(layout, &names, &[pause], &config)?;

    // Set-user-ID root: with no_new_privs it must not help.
    let nnp = layout.layer(
        &Tree::new().file("/nnp", 0o4755, probe()),
        Compression::Gzip,
    )?;
    let config = Config {
        entrypoint: vec!["/nnp"],
        ..Config::default()
    };
    add(
        layout,
        &[format!("{E2E}/nonewprivs:1.3")],
        &[base.clone(), nnp],
        &config,
    )?;
    Ok(())
}

fn ours(layout: &mut Layout, from: &Ingredients, base: &Layer) -> Result<()> {
    let probe = || Source::Path(from.probe.clone());
    let scratch = layout.layer(
        &Tree::new().file("/probe", 0o755, probe()),
        Compression::Gzip,
    )?;
    let config = Config {
        entrypoint: vec!["/probe"],
        cmd: vec!["serve", "8080"],
        exposed_ports: vec!["8080/tcp"],
        ..Config::default()
    };
    let probe_image = std::slice::from_ref(&scratch);
    add(
        layout,
        &[format!("{OURS}/probe:latest")],
        probe_image,
        &config,
    )?;

    let tools = Tree::new()
        .file("/bin/probe", 0o755, probe())
        .text("/etc/from-image", 0o644, "image\n")
        .text("/data/seed", 0o640, "seed\n")
        .owned("/data/seed", 1234, 1235)
        .dir("/app", 0o777);
    let tools = layout.layer(&tools, Compression::Gzip)?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let config = || Config {
        cmd: vec!["probe", "serve", "8080"],
        env: vec![path, "FROM_IMAGE=image", "OVERRIDDEN=image"],
        working_dir: "/app",
        labels: vec![("org.coracle.fixture", "tools")],
        ..Config::default()
    };
    let layers = [base.clone(), tools.clone()];
    add(
        layout,
        &[format!("{OURS}/tools:latest")],
        &layers,
        &config(),
    )?;
    for (name, config) in [
        (
            "user",
            Config {
                user: "app",
                ..config()
            },
        ),
        (
            "user-missing",
            Config {
                user: "nosuchuser",
                ..config()
            },
        ),
        (
            "volume",
            Config {
                volumes: vec!["/data", "/fresh"],
                ..config()
            },
        ),
        (
            "stopsignal",
            Config {
                stop_signal: "SIGUSR1",
                cmd: vec!["probe", "trap", "7"],
                ..config()
            },
        ),
        (
            "entrypoint",
            Config {
                entrypoint: vec!["echo", "entrypoint"],
                cmd: vec!["cmd"],
                ..config()
            },
        ),
    ] {
        add(layout, &[format!("{OURS}/{name}:latest")], &layers, &config)?;
    }
    Ok(())
}

/// Everything that a layer may hold, in each compression and manifest format.
fn odd_layers(layout: &mut Layout, base: &Layer) -> Result<()> {
    let long = format!("/long/{}/{}", "d".repeat(120), "f".repeat(200));
    let first = Tree::new()
        .text("/keep", 0o644, "keep\n")
        .text("/gone", 0o644, "gone\n")
        .text("/replaced", 0o600, "old\n")
        .text("/dir/gone", 0o644, "gone\n")
        .text("/dir/keep", 0o644, "keep\n")
        .text("/opaque/old", 0o644, "old\n")
        .text("/becomes-dir", 0o644, "file\n")
        .text("/becomes-file/child", 0o644, "child\n")
        .symlink("/link-to-dir", "dir")
        .text("/original", 0o644, "original\n")
        .hardlink("/dir/hardlink", "/original")
        .text(&long, 0o644, "long\n")
        .text("/setuid", 0o4755, "setuid\n")
        .text("/owned", 0o640, "owned\n")
        .owned("/owned", 4_000_000, 4_000_001)
        .dir("/sticky", 0o1777)
        .fifo("/fifo", 0o600)
        .char_device("/null", 0o666, 1, 3)
        .text("/labelled", 0o644, "xattr\n")
        .xattr("/labelled", "user.fixture", b"value\0with nul");
    let second = Tree::new()
        .whiteout("/gone")
        .whiteout("/dir/gone")
        .opaque("/opaque")
        .text("/opaque/new", 0o644, "new\n")
        .text("/replaced", 0o755, "new\n")
        .text("/becomes-dir/child", 0o644, "child\n")
        .text("/becomes-file", 0o644, "file\n")
        .bare_file("link-to-dir/through-link", "through\n")
        // As a copy-up of one of two names stores it: both are in this layer again.
        .text("/pair", 0o644, "pair\n")
        .hardlink("/another", "/pair");
    let third = Tree::new().text("/unicode-\u{fc}\u{2603}", 0o644, "unicode\n");
    let config = Config {
        cmd: vec!["sh"],
        ..Config::default()
    };
    for (tag, format, last) in [
        ("oci", Format::Oci, Compression::Zstd),
        ("docker", Format::Docker, Compression::Gzip),
    ] {
        let layers = [
            base.clone(),
            layout.layer(&first, Compression::Gzip)?,
            layout.layer(&second, Compression::None)?,
            layout.layer(&third, last)?,
        ];
        let stored = layout.image(&layers, &config, format, ARCHITECTURE)?;
        layout.name(&stored, &format!("{OURS}/layers:{tag}"));
    }

    let mut members = Vec::new();
    for architecture in ["arm64", "amd64"] {
        let text = format!("{architecture}\n");
        let marker = Tree::new().text("/architecture", 0o644, &text);
        let layers = [base.clone(), layout.layer(&marker, Compression::Gzip)?];
        members.push((
            layout.image(&layers, &config, Format::Oci, architecture)?,
            architecture,
        ));
    }
    let index = layout.index(&members)?;
    layout.name(&index, &format!("{OURS}/multi:latest"));
    Ok(())
}

/// Images that a client must refuse.
fn broken(layout: &mut Layout, base: &Layer) -> Result<()> {
    let config = Config {
        cmd: vec!["sh"],
        ..Config::default()
    };
    let mut wrong = base.clone();
    wrong.diff_id = "0".repeat(64);
    add(
        layout,
        &[format!("{OURS}/bad-diff-id:latest")],
        &[wrong],
        &config,
    )?;

    let stored = layout.manifest(
        std::slice::from_ref(base),
        b"{ this is no config",
        Format::Oci,
    )?;
    layout.name(&stored, &format!("{OURS}/bad-config:latest"));

    let evil = Tree::new().bare_file("../../../../../../coracle-escaped", "escaped\n");
    let evil = layout.layer(&evil, Compression::Gzip)?;
    add(
        layout,
        &[format!("{OURS}/evil-dotdot:latest")],
        &[base.clone(), evil],
        &config,
    )?;

    // A link that leads out of the root, then a file through it: it must land inside.
    let outside = Tree::new().symlink("/escape", "/../../../../../../../tmp");
    let through = Tree::new().bare_file("escape/coracle-escaped", "escaped\n");
    let layers = [
        base.clone(),
        layout.layer(&outside, Compression::Gzip)?,
        layout.layer(&through, Compression::Gzip)?,
    ];
    add(
        layout,
        &[format!("{OURS}/evil-symlink:latest")],
        &layers,
        &config,
    )?;

    let other = if ARCHITECTURE == "amd64" {
        "arm64"
    } else {
        "amd64"
    };
    let foreign = layout.image(std::slice::from_ref(base), &config, Format::Oci, other)?;
    let index = layout.index(&[(foreign, other)])?;
    layout.name(&index, &format!("{OURS}/other-platform:latest"));
    Ok(())
}
