//! Which cgroup hierarchies this host offers and where this process stands in them.
//!
//! Owns the reading of /proc/self/mountinfo and /proc/self/cgroup. Never creates or joins anything.

use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where a pure v2 host mounts cgroup2, and the place that is asked first.
pub const UNIFIED_MOUNT: &str = "/sys/fs/cgroup";

/// The cgroup layout of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Separate v1 hierarchies, with a cgroup2 mount beside them on hybrid hosts.
    V1 {
        hierarchies: Vec<Hierarchy>,
        unified: Option<Hierarchy>,
    },
    /// One cgroup2 mount that holds every controller.
    V2 { mountpoint: PathBuf, own: PathBuf },
}

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// `cpu`, `cpuacct`, `name=systemd`; empty for cgroup2.
    pub controllers: Vec<String>,
    pub mountpoint: PathBuf,
    /// The cgroup that the mount shows as its root: not `/` inside containers without a cgroup
    /// namespace.
    pub root: PathBuf,
    /// The cgroup of this process.
    pub own: PathBuf,
}

impl CgroupMode {
    /// The directory of a cgroup as /proc/pid/cgroup names it, in the hierarchy of that key.
    pub(super) fn dir_of(&self, key: &str, path: &Path) -> Option<PathBuf> {
        match self {
            CgroupMode::V2 { mountpoint, .. } => {
                key.is_empty().then(|| mountpoint.join(relative(path)))
            }
            CgroupMode::V1 {
                hierarchies,
                unified,
            } => {
                let mut all = hierarchies.iter().chain(unified);
                let hierarchy = all.find(|hierarchy| hierarchy.key() == key)?;
                let below = path
                    .strip_prefix(&hierarchy.root)
                    .unwrap_or_else(|_| relative(path));
                Some(hierarchy.mountpoint.join(below))
            }
        }
    }
}

impl Hierarchy {
    /// The name of the hierarchy in records: its controllers as the kernel lists them.
    pub fn key(&self) -> String {
        self.controllers.join(",")
    }

    /// The directory of this process's own cgroup under the mount point.
    pub fn own_dir(&self) -> PathBuf {
        let below = self
            .own
            .strip_prefix(&self.root)
            .unwrap_or_else(|_| relative(&self.own));
        self.mountpoint.join(below)
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Looks at the host.
///
/// # Errors
/// /proc cannot be read, or no cgroup file system is mounted.
pub fn detect() -> Result<CgroupMode> {
    let own = read("/proc/self/cgroup")?;
    // A pure v2 host is recognised by one statfs: mountinfo has a line for each mount of the host,
    // thousands on a busy node.
    let pure = rustix::fs::statfs(UNIFIED_MOUNT)
        .is_ok_and(|fs| fs.f_type as u64 == libc::CGROUP2_SUPER_MAGIC as u64);
    if pure {
        return Ok(CgroupMode::V2 {
            mountpoint: UNIFIED_MOUNT.into(),
            own: own_unified(&own),
        });
    }
    parse(&read("/proc/self/mountinfo")?, &own)
}

/// In large pieces: such files have no size to go by.
fn read(path: &str) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::with_capacity(16 << 10);
    std::fs::File::open(path)
        .and_then(|mut file| {
            let mut piece = [0u8; 16 << 10];
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(()),
                    count => bytes.extend_from_slice(&piece[..count]),
                }
            }
        })
        .map_err(|error| Error::system("read", path, error))?;
    Ok(bytes)
}

/// Pairs the cgroup mounts of `mountinfo` with the lines of `/proc/self/cgroup`.
fn parse(mountinfo: &[u8], own: &[u8]) -> Result<CgroupMode> {
    let mounts = parse_mountinfo(mountinfo);
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    let mut unified = None;
    for line in lines(own) {
        let mut fields = line.splitn(3, |b| *b == b':');
        let (Some(_id), Some(names), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let controllers: Vec<String> = names
            .split(|b| *b == b',')
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        // The first mount of a hierarchy counts, as for every other runtime.
        let mount = mounts.iter().find(|mount| match controllers.first() {
            None => mount.version == 2,
            Some(name) => mount.version == 1 && mount.options.iter().any(|o| o == name),
        });
        let Some(mount) = mount else { continue };
        let hierarchy = Hierarchy {
            mountpoint: mount.mountpoint.clone(),
            root: mount.root.clone(),
            own: path_of(path),
            controllers,
        };
        if mount.version == 2 {
            unified = Some(hierarchy);
        } else {
            hierarchies.push(hierarchy);
        }
    }
    match (hierarchies.is_empty(), unified) {
        (true, None) => Err(Error::unsupported(
            "no cgroup mount found in /proc/self/mountinfo",
        )),
        (true, Some(unified)) => Ok(CgroupMode::V2 {
            mountpoint: unified.mountpoint,
            own: unified.own,
        }),
        (false, unified) => Ok(CgroupMode::V1 {
            hierarchies,
            unified,
        }),
    }
}

/// The cgroup2 line of /proc/self/cgroup: `0::/path`.
fn own_unified(own: &[u8]) -> PathBuf {
    lines(own)
        .find_map(|line| line.strip_prefix(b"0::"))
        .map_or_else(|| PathBuf::from("/"), path_of)
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|b| *b == b'\n').filter(|line| !line.is_empty())
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

struct Mount {
    version: u8,
    root: PathBuf,
    mountpoint: PathBuf,
    options: Vec<String>,
}

/// The cgroup mounts that can be reached by their path.
fn parse_mountinfo(text: &[u8]) -> Vec<Mount> {
    let all: Vec<Line<'_>> = lines(text).filter_map(Line::parse).collect();
    let mut mounts = Vec::new();
    for line in &all {
        let version = match line.kind {
            b"cgroup" => 1,
            b"cgroup2" => 2,
            _ => continue,
        };
        if is_covered(line, &all) {
            continue;
        }
        mounts.push(Mount {
            version,
            root: unescape(line.root),
            mountpoint: unescape(line.mountpoint),
            options: String::from_utf8_lossy(line.options)
                .split(',')
                .map(str::to_owned)
                .collect(),
        });
    }
    mounts
}

/// A line of mountinfo, escapes and all:
/// `31 23 0:28 /root /mountpoint opts tag:1 - cgroup source rw,cpu,cpuacct`
#[derive(Clone, Copy)]
struct Line<'a> {
    id: &'a [u8],
    parent: &'a [u8],
    root: &'a [u8],
    mountpoint: &'a [u8],
    kind: &'a [u8],
    options: &'a [u8],
}

impl<'a> Line<'a> {
    fn parse(line: &'a [u8]) -> Option<Line<'a>> {
        let mut fields = line.split(|b| *b == b' ');
        let (id, parent) = (fields.next()?, fields.next()?);
        let (root, mountpoint) = (fields.nth(1)?, fields.next()?);
        // Optional fields end with a lone dash.
        fields.find(|field| *field == b"-")?;
        Some(Line {
            id,
            parent,
            root,
            mountpoint,
            kind: fields.next()?,
            options: fields.nth(1).unwrap_or_default(),
        })
    }
}

/// Whether a path leads to another mount: one that was made later on this one, or on one that it
/// is mounted in, at its mount point or above it.
fn is_covered(mount: &Line<'_>, all: &[Line<'_>]) -> bool {
    let above = |top: &Line<'_>| {
        mount
            .mountpoint
            .strip_prefix(top.mountpoint)
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/' || top.mountpoint == b"/")
    };
    let mut over: Vec<&Line<'_>> = all.iter().filter(|line| above(line)).collect();
    // From the mount up to the root, the mounts that the path goes through, each with how far it
    // goes in that one: of several mounts in it the path enters the first that it comes to.
    let mut chain = Vec::new();
    let (mut id, mut end) = (mount.id, usize::MAX);
    while let Some(at) = over.iter().position(|line| line.id == id) {
        chain.push((id, end));
        let line = over.swap_remove(at);
        (id, end) = (line.parent, line.mountpoint.len());
    }
    over.iter().any(|line| {
        let mut through = chain.iter();
        through.any(|(id, end)| line.parent == *id && line.mountpoint.len() < *end)
    })
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        if let (
            b'\\',
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ],
        ) = (byte, tail)
        {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = after;
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    path_of(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
23 1 0:1 / / rw - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
50 23 0:29 / /mnt/a\\040b rw - cgroup cgroup rw,cpu,cpuacct
";

    #[test]
    fn hybrid_is_v1_with_a_unified_hierarchy() {
        let own = b"9:name=systemd:/\n4:memory:/docker/abc/x\n3:cpu,cpuacct:/c\n2:pids:/\n0::/u\n";
        let CgroupMode::V1 {
            hierarchies,
            unified,
        } = parse(HYBRID.as_bytes(), own).unwrap()
        else {
            panic!("not v1");
        };
        let found: Vec<_> = hierarchies.iter().map(|h| (h.key(), h.own_dir())).collect();
        let want = [
            ("name=systemd", "/sys/fs/cgroup/systemd"),
            ("memory", "/sys/fs/cgroup/memory/x"),
            ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/c"),
        ]
        .map(|(key, dir)| (key.to_owned(), PathBuf::from(dir)));
        assert_eq!(found, want);
        assert_eq!(
            unified.unwrap().mountpoint,
            Path::new("/sys/fs/cgroup/unified")
        );
    }

    #[test]
    fn only_cgroup2_is_v2() {
        let mounts = b"31 23 0:28 / /cg rw - cgroup2 none rw,nsdelegate\n";
        assert_eq!(
            parse(mounts, b"0::/user.slice\n").unwrap(),
            CgroupMode::V2 {
                mountpoint: "/cg".into(),
                own: "/user.slice".into()
            }
        );
    }

    #[test]
    fn covered_mounts_are_passed_over() {
        let own = b"4:memory:/\n3:cpu,cpuacct:/\n0::/\n";
        let found = |more: &str| {
            let mode = parse(format!("{HYBRID}{more}").as_bytes(), own);
            match mode.unwrap() {
                CgroupMode::V1 {
                    hierarchies,
                    unified,
                } => hierarchies
                    .into_iter()
                    .chain(unified)
                    .map(|h| h.mountpoint.display().to_string())
                    .collect::<Vec<_>>(),
                CgroupMode::V2 { mountpoint, .. } => vec![format!("2 {}", mountpoint.display())],
            }
        };
        let (memory, cpu) = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,cpuacct");
        let unified = "/sys/fs/cgroup/unified";
        assert_eq!(found(""), [memory, cpu, unified]);
        // On top of the mount itself.
        let over = "60 41 0:50 / /sys/fs/cgroup/unified rw - tmpfs t rw\n";
        assert_eq!(found(over), [memory, cpu]);
        let over = "60 32 0:50 / /sys/fs/cgroup/cpu,cpuacct rw - tmpfs t rw\n";
        assert_eq!(found(over), [memory, "/mnt/a b", unified]);
        // On top of the directory that all of them are mounted in: cgroup2 is what one sees.
        let over = "60 31 0:38 / /sys/fs/cgroup rw - cgroup2 none rw\n";
        assert_eq!(found(over), ["/mnt/a b", "/sys/fs/cgroup"]);
        let over = "60 23 0:50 / /sys rw - sysfs s rw\n61 23 0:50 / /mnt rw - tmpfs t rw\n\
            62 60 0:38 / /sys/fs/cgroup rw - cgroup2 none rw\n";
        assert_eq!(found(over), ["2 /sys/fs/cgroup"]);
        // Beside or below them nothing is covered.
        let beside = "60 31 0:50 / /sys/fs/cgroup/mem rw - tmpfs t rw\n\
            61 41 0:50 / /sys/fs/cgroup/unified/x rw - tmpfs t rw\n";
        assert_eq!(found(beside), [memory, cpu, unified]);
    }

    #[test]
    fn no_cgroup_is_an_error() {
        assert!(parse(b"23 1 0:1 / / rw - ext4 /dev/vda rw\n", b"").is_err());
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c\09"), Path::new("/a b\\c\\09"));
    }
}
