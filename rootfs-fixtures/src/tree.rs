//! One layer: a sorted set of entries, written as a tar archive with fixed times, so that the
//! same entries always give the same bytes and digest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// 2024-01-01T00:00:00Z, the modification time of everything in an image.
const EPOCH: u64 = 1_704_067_200;

#[derive(Clone)]
pub enum Source {
    Bytes(Vec<u8>),
    Path(PathBuf),
}

#[derive(Clone)]
enum Kind {
    Dir,
    File(Source),
    Symlink(String),
    Hardlink(String),
    CharDevice(u32, u32),
    Fifo,
}

#[derive(Clone)]
struct Entry {
    kind: Kind,
    mode: u32,
    owner: (u64, u64),
    xattrs: Vec<(String, Vec<u8>)>,
}

#[derive(Clone, Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
    /// Files whose path is kept as written, `..` and all, without entries for their parents.
    bare: Vec<(String, Entry)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

#[derive(Clone)]
pub struct Layer {
    /// Hex, without the algorithm.
    pub digest: String,
    pub diff_id: String,
    pub size: u64,
    pub compression: Compression,
}

impl Tree {
    pub fn new() -> Self {
        Self::default()
    }

    fn put(&mut self, path: &str, kind: Kind, mode: u32) -> &mut Entry {
        let path = path.trim_start_matches('/').to_owned();
        let mut at = 0;
        while let Some(slash) = path[at..].find('/') {
            let parent = path[..at + slash].to_owned();
            self.entries
                .entry(parent)
                .or_insert(Entry::new(Kind::Dir, 0o755));
            at += slash + 1;
        }
        let entry = Entry::new(kind, mode);
        self.entries.insert(path.clone(), entry);
        self.entries
            .get_mut(&path)
            .expect("the entry was inserted in the line above")
    }

    pub fn dir(mut self, path: &str, mode: u32) -> Self {
        self.put(path, Kind::Dir, mode);
        self
    }

    pub fn text(self, path: &str, mode: u32, text: &str) -> Self {
        self.file(path, mode, Source::Bytes(text.as_bytes().to_vec()))
    }

    pub fn file(mut self, path: &str, mode: u32, source: Source) -> Self {
        self.put(path, Kind::File(source), mode);
        self
    }

    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        self.put(path, Kind::Symlink(target.to_owned()), 0o777);
        self
    }

    /// The target must be in the same layer, as no unpacker looks for it below.
    pub fn hardlink(mut self, path: &str, target: &str) -> Self {
        let target = target.trim_start_matches('/').to_owned();
        let mode = self.entries.get(&target).map_or(0o644, |e| e.mode);
        self.put(path, Kind::Hardlink(target), mode);
        self
    }

    pub fn char_device(mut self, path: &str, mode: u32, major: u32, minor: u32) -> Self {
        self.put(path, Kind::CharDevice(major, minor), mode);
        self
    }

    pub fn fifo(mut self, path: &str, mode: u32) -> Self {
        self.put(path, Kind::Fifo, mode);
        self
    }

    /// Hides `path` of the layers below.
    pub fn whiteout(self, path: &str) -> Self {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.text(&format!("{dir}/.wh.{name}"), 0o644, "")
    }

    /// Hides all that the layers below have in directory `path`.
    pub fn opaque(self, path: &str) -> Self {
        self.dir(path, 0o755)
            .text(&format!("{path}/.wh..wh..opq"), 0o644, "")
    }

    /// Owner of an entry that is there already.
    pub fn owned(mut self, path: &str, uid: u64, gid: u64) -> Self {
        if let Some(entry) = self.entries.get_mut(path.trim_start_matches('/')) {
            entry.owner = (uid, gid);
        }
        self
    }

    pub fn xattr(mut self, path: &str, name: &str, value: &[u8]) -> Self {
        if let Some(entry) = self.entries.get_mut(path.trim_start_matches('/')) {
            entry.xattrs.push((name.to_owned(), value.to_vec()));
        }
        self
    }

    pub fn bare_file(mut self, raw_path: &str, text: &str) -> Self {
        let kind = Kind::File(Source::Bytes(text.as_bytes().to_vec()));
        self.bare
            .push((raw_path.to_owned(), Entry::new(kind, 0o644)));
        self
    }

    /// Everything of `other`, which wins where both have a path.
    pub fn with(mut self, other: &Tree) -> Self {
        self.entries
            .extend(other.entries.iter().map(|(k, v)| (k.clone(), v.clone())));
        self
    }

    /// Writes the layer to `<blobs>/<digest>`.
    pub fn write(&self, compression: Compression, blobs: &Path) -> Result<Layer> {
        let temporary = blobs.join(format!(".layer-{}", std::process::id()));
        let blob = Hashing::new(BufWriter::new(File::create(&temporary)?));
        let (blob, diff_id) = match compression {
            Compression::None => {
                let (blob, diff_id) = self.archive(blob)?;
                (blob, diff_id)
            }
            Compression::Gzip => {
                let level = flate2::Compression::new(6);
                // GzBuilder's default header has no name and no time.
                let (gz, diff_id) = self.archive(flate2::GzBuilder::new().write(blob, level))?;
                (gz.finish()?, diff_id)
            }
            Compression::Zstd => {
                let (zstd, diff_id) = self.archive(zstd::Encoder::new(blob, 3)?)?;
                (zstd.finish()?, diff_id)
            }
        };
        let (mut file, digest, size) = blob.finish();
        file.flush()?;
        std::fs::rename(&temporary, blobs.join(&digest))?;
        Ok(Layer {
            digest,
            diff_id,
            size,
            compression,
        })
    }

    fn archive<W: Write>(&self, out: W) -> Result<(W, String)> {
        let mut tar = tar::Builder::new(Hashing::new(out));
        tar.mode(tar::HeaderMode::Deterministic);
        // A hard link must follow its target.
        let is_link = |e: &Entry| matches!(e.kind, Kind::Hardlink(_));
        let ordered = self
            .entries
            .iter()
            .filter(|(_, e)| !is_link(e))
            .chain(self.entries.iter().filter(|(_, e)| is_link(e)));
        for (path, entry) in ordered {
            entry
                .append(&mut tar, path)
                .with_context(|| format!("add {path}"))?;
        }
        for (path, entry) in &self.bare {
            entry.append_raw(&mut tar, path)?;
        }
        let hashing = tar.into_inner()?;
        let (out, diff_id, _) = hashing.finish();
        Ok((out, diff_id))
    }
}

impl Entry {
    fn new(kind: Kind, mode: u32) -> Self {
        Self {
            kind,
            mode,
            owner: (0, 0),
            xattrs: Vec::new(),
        }
    }

    fn header(&self, size: u64) -> Result<tar::Header> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(EPOCH);
        header.set_size(size);
        let kind = match &self.kind {
            Kind::Dir => tar::EntryType::Directory,
            Kind::File(_) => tar::EntryType::Regular,
            Kind::Symlink(_) => tar::EntryType::Symlink,
            Kind::Hardlink(_) => tar::EntryType::Link,
            Kind::CharDevice(major, minor) => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                tar::EntryType::Char
            }
            Kind::Fifo => tar::EntryType::Fifo,
        };
        header.set_entry_type(kind);
        Ok(header)
    }

    fn append<W: Write>(&self, tar: &mut tar::Builder<W>, path: &str) -> Result<()> {
        let xattrs: Vec<(String, &[u8])> = self
            .xattrs
            .iter()
            .map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.as_slice()))
            .collect();
        if !xattrs.is_empty() {
            tar.append_pax_extensions(xattrs.iter().map(|(k, v)| (k.as_str(), *v)))?;
        }
        match &self.kind {
            Kind::Symlink(target) | Kind::Hardlink(target) => {
                tar.append_link(&mut self.header(0)?, path, target)?;
            }
            Kind::File(Source::Bytes(bytes)) => {
                tar.append_data(
                    &mut self.header(bytes.len() as u64)?,
                    path,
                    bytes.as_slice(),
                )?;
            }
            Kind::File(Source::Path(file)) => {
                let source =
                    File::open(file).with_context(|| format!("open {}", file.display()))?;
                let size = source.metadata()?.len();
                tar.append_data(&mut self.header(size)?, path, source)?;
            }
            Kind::Dir => {
                tar.append_data(&mut self.header(0)?, format!("{path}/"), io::empty())?;
            }
            Kind::CharDevice(..) | Kind::Fifo => {
                tar.append_data(&mut self.header(0)?, path, io::empty())?;
            }
        }
        Ok(())
    }

    /// Past the checks of the tar crate, which refuses `..`.
    fn append_raw<W: Write>(&self, tar: &mut tar::Builder<W>, path: &str) -> Result<()> {
        let Kind::File(Source::Bytes(bytes)) = &self.kind else {
            bail!("a bare entry is a literal file");
        };
        let mut header = self.header(bytes.len() as u64)?;
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, bytes.as_slice())?;
        Ok(())
    }
}

/// Hashes and counts what passes through.
struct Hashing<W> {
    to: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            hash: Sha256::new(),
            size: 0,
        }
    }

    fn finish(self) -> (W, String, u64) {
        (self.to, crate::hex(&self.hash.finalize()), self.size)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.to.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Digest of a whole file.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crate::hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        Tree::new()
            .text("/b/two", 0o644, "2")
            .text("/a", 0o600, "1")
            .hardlink("/[", "/a")
            .symlink("/c", "a")
            .whiteout("/d/gone")
            .xattr("/a", "user.x", b"y")
    }

    #[test]
    fn write_same_entries_gives_same_digest() {
        let dir = tempfile::tempdir().unwrap();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let one = sample().write(compression, dir.path()).unwrap();
            let two = sample().write(compression, dir.path()).unwrap();
            assert_eq!(one.digest, two.digest);
            assert_eq!(one.diff_id, two.diff_id);
            assert_eq!(
                hash_file(&dir.path().join(&one.digest)).unwrap(),
                one.digest
            );
        }
    }

    #[test]
    fn write_hardlink_follows_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let layer = sample().write(Compression::None, dir.path()).unwrap();
        let file = File::open(dir.path().join(&layer.digest)).unwrap();
        let names: Vec<String> = tar::Archive::new(file)
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["a", "b/", "b/two", "c", "d/", "d/.wh.gone", "["]);
    }
}
