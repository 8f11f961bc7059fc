//! The guest's disk, kernel and initrd: built once by mmdebstrap from the configured Debian
//! mirror, kept outside the tree under a key of everything that goes into it.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::binaries;

const SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Raised whenever this file makes a different image of the same packages.
const BUILDER: u32 = 1;

const PACKAGES: &[&str] = &[
    "apparmor",
    "busybox-static",
    "containernetworking-plugins",
    "criu",
    "dbus",
    "dbus-user-session",
    "initramfs-tools",
    "iproute2",
    "iptables",
    "kmod",
    "libpam-systemd",
    "linux-image-amd64",
    "nftables",
    "procps",
    "systemd",
    "systemd-sysv",
    "udev",
    "uidmap",
    "util-linux",
    "zstd",
];

/// Files of the image, made before its packages are configured.
const FILES: &[(&str, &str)] = &[
    // An initrd of what the disk needs and no more: emulation unpacks it slowly.
    (
        "etc/initramfs-tools/conf.d/coracle",
        "MODULES=list\nCOMPRESS=zstd\n",
    ),
    (
        "usr/share/initramfs-tools/modules.d/coracle",
        "virtio_pci\nvirtio_blk\next4\n",
    ),
    (
        "etc/modules-load.d/coracle.conf",
        "virtio_console\n9pnet_virtio\n9p\noverlay\n",
    ),
    ("etc/hostname", "coracle-vm\n"),
    ("etc/hosts", "127.0.0.1 localhost coracle-vm\n"),
    // Not the first boot: nothing to preset.
    ("etc/machine-id", "c0ac1ec0ac1ec0ac1ec0ac1ec0ac1ec0\n"),
    (
        "etc/systemd/system/coracle-agent.service",
        "[Unit]\n\
         Description=Runs what the host asks for\n\
         After=systemd-modules-load.service dbus.socket\n\
         [Service]\n\
         Type=exec\n\
         ExecStartPre=mkdir -p /run/coracle-tools\n\
         ExecStartPre=mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro tools /run/coracle-tools\n\
         ExecStartPre=cp /run/coracle-tools/vm /usr/local/bin/coracle-agent\n\
         ExecStart=/usr/local/bin/coracle-agent agent\n\
         Delegate=yes\n\
         KillMode=process\n\
         TasksMax=infinity\n\
         LimitNOFILE=1048576\n\
         StandardOutput=journal+console\n\
         [Install]\n\
         WantedBy=multi-user.target\n",
    ),
    // What systemd gives to users by itself lacks cpuset and io.
    (
        "etc/systemd/system/user@.service.d/delegate.conf",
        "[Service]\nDelegate=cpu cpuset io memory pids\n",
    ),
];

/// Units that only cost time in a guest that lives for minutes. Modules are named above, so that
/// nothing is left for a cold plug; tests load the AppArmor profiles that they want.
const MASKED: &[&str] = &[
    "apparmor.service",
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "modprobe@.service",
    "serial-getty@ttyS0.service",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-udev-trigger.service",
];

/// The unprivileged user that rootless tests run as, whose user manager a
/// test starts by `systemctl start user@1000`.
pub const ROOTLESS_USER: &str = "rootless";
pub const ROOTLESS_UID: u32 = 1000;

pub struct Image {
    pub disk: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl Image {
    fn of(dir: &Path) -> Self {
        Self {
            disk: dir.join("root.ext4"),
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
        }
    }

    /// The image with these packages on top of the usual ones; built when it is not there.
    pub fn get(extra: &[String]) -> Result<Self> {
        let images = binaries::cache()?.join("vm");
        fs::create_dir_all(&images)?;
        let mut packages: Vec<&str> = PACKAGES.to_vec();
        packages.extend(extra.iter().map(String::as_str));
        packages.sort_unstable();
        packages.dedup();
        let dir = images.join(key(&packages));
        // One builder at a time; the others find its work.
        let lock = File::create(images.join("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        if !dir.join("root.ext4").exists() {
            build(&dir, &packages).context("build the guest image")?;
        }
        Ok(Self::of(&dir))
    }
}

fn key(packages: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    (packages, SUITE, BUILDER, FILES, MASKED).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn build(dir: &Path, packages: &[&str]) -> Result<()> {
    let work = dir.with_extension("building");
    if work.exists() {
        // A build that was killed.
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let before = work.join("before");
    write_files(&before)?;
    let root = work.join("root");
    eprintln!(
        "vm: building the guest image, once ({} packages named)",
        packages.len()
    );
    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap
        .args(["--quiet", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--keyring={KEYRING}"))
        .arg(format!(
            "--essential-hook=cp -a {}/. \"$1\"/",
            before.display()
        ))
        .arg(format!("--customize-hook={}", customize()))
        .arg(SUITE)
        .arg(&root)
        .arg(mirror()?);
    run(&mut debootstrap)?;
    let made = Image::of(&work);
    take_boot_file(&root, "vmlinuz-", &made.kernel)?;
    take_boot_file(&root, "initrd.img-", &made.initrd)?;
    run(Command::new("mkfs.ext4")
        .args(["-q", "-L", "coracle-vm", "-E", "root_owner=0:0", "-d"])
        .arg(&root)
        .arg(&made.disk)
        .arg("6G"))?;
    fs::remove_dir_all(&root)?;
    fs::remove_dir_all(&before)?;
    fs::rename(&work, dir)?;
    Ok(())
}

fn write_files(root: &Path) -> Result<()> {
    for (path, text) in FILES {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a path below the root")?)?;
        fs::write(path, text)?;
    }
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        symlink("/dev/null", units.join(unit))?;
    }
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    symlink(
        "../coracle-agent.service",
        units.join("multi-user.target.wants/coracle-agent.service"),
    )?;
    Ok(())
}

/// The user of rootless tests. useradd gives it subordinate ids as it would on any machine.
fn customize() -> String {
    format!(
        "chroot \"$1\" useradd --create-home --uid {ROOTLESS_UID} --shell /bin/bash {ROOTLESS_USER} \
         && chroot \"$1\" passwd -q -d root && chroot \"$1\" apt-get clean && rm -rf \"$1\"/var/lib/apt/lists/*"
    )
}

/// The mirror that this machine's apt is configured for.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(REPO_URI) $(CODENAME)",
        ])
        .output()
        .context("apt-get indextargets")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let uri = text.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (origin, uri, suite) = (words.next()?, words.next()?, words.next()?);
        // Suites such as bookworm-security are archives of their own.
        (origin == "Debian" && !suite.contains('-')).then(|| uri.to_owned())
    });
    let uri = uri.context("apt is configured for no Debian mirror")?;
    Ok(format!("deb {uri} {SUITE} main"))
}

fn take_boot_file(root: &Path, prefix: &str, to: &Path) -> Result<()> {
    let found = fs::read_dir(root.join("boot"))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix)
        });
    let from = found.with_context(|| format!("the guest has no /boot/{prefix}*"))?;
    fs::copy(&from, to)?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{name}: {}: {said}", output.status);
    Ok(())
}
