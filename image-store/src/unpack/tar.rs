//! Owns reading a tar stream: entries with PAX and GNU extensions applied, every size bounded.
//! Never touches a file system.
//!
//! Headers are decoded by the `tar` crate's `Header`. Its entry iterator is not used: it buffers
//! extension records of any declared size, and splits PAX records at newlines, which breaks binary
//! xattrs such as security.capability. Facts: pax(1) "Extended Header", GNU tar manual "Sparse
//! Formats" and "Basic Tar Format".

use std::collections::BTreeMap;
use std::io::{self, BufRead};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

const BLOCK: usize = 512;
/// Long names and PAX records of one entry (Go's archive/tar has the same limit).
const EXTENSION_MAX: u64 = 1 << 20;
/// Longest path that a system call takes.
const PATH_MAX: usize = 4095;
const SPARSE_SEGMENTS_MAX: usize = 1 << 16;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    Hardlink,
    Char,
    Block,
    Fifo,
}

/// Seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// A run of stored bytes of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// One entry, extensions applied. Paths are as written in the archive.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) atime: Option<Time>,
    /// Size of the file, holes included.
    pub(crate) size: u64,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) sparse: Option<Vec<Segment>>,
}

/// Why reading stopped.
#[derive(Debug)]
pub(crate) enum TarError {
    /// The stream broke, or the stage before it failed.
    Io(io::Error),
    /// The bytes are no tar, or break a limit.
    Corrupt(String),
    /// A tar with something that an image layer cannot have.
    Unsupported(String),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => TarError::Corrupt("the tar ends in mid-entry".into()),
            _ => TarError::Io(error),
        }
    }
}

type Result<T> = std::result::Result<T, TarError>;

fn corrupt(text: impl Into<String>) -> TarError {
    TarError::Corrupt(text.into())
}

/// A path fit for an error text.
pub(crate) fn show(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let cut: String = text
        .chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect();
    format!("\"{cut}\"")
}

/// Reads entries in turn; the data of each is read with [`TarReader::data`] before the next.
pub(crate) struct TarReader<R> {
    source: R,
    /// Stored bytes of the current entry not yet read.
    remaining: u64,
    /// Padding after them.
    padding: u64,
    finished: bool,
}

/// Extensions that apply to the next entry.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
    /// PAX sparse format 0.0 repeats keys: offset, numbytes, offset, ...
    sparse_pairs: Vec<u64>,
}

impl<R: BufRead> TarReader<R> {
    pub(crate) fn new(source: R) -> Self {
        TarReader {
            source,
            remaining: 0,
            padding: 0,
            finished: false,
        }
    }

    /// Gives the source back, to read what follows the archive's end.
    pub(crate) fn into_source(self) -> R {
        self.source
    }

    /// The next entry, or `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_rest()?;
            let Some(block) = self.header_block()? else {
                return Ok(None);
            };
            let header = Header::from_byte_slice(&block);
            let size = stored_size(header)?;
            match header.entry_type() {
                EntryType::GNULongName => extensions.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => extensions.link = Some(self.long_name(size)?),
                EntryType::XHeader => {
                    let records = self.extension(size)?;
                    parse_pax(&records, &mut extensions)?;
                }
                // Global headers are read over, as Go's archive/tar does: layers differ between
                // readers otherwise.
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                _ => return self.entry(&block, extensions).map(Some),
            }
        }
    }

    /// The next piece of the current entry's stored bytes; empty at their end. Call
    /// [`TarReader::consume`] with what was used.
    pub(crate) fn data(&mut self) -> Result<&[u8]> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let buffer = self.source.fill_buf()?;
        if buffer.is_empty() {
            return Err(corrupt("the tar ends in mid-entry"));
        }
        let length = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        Ok(&buffer[..length])
    }

    pub(crate) fn consume(&mut self, length: usize) {
        let length = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(length);
        self.source.consume(length);
        self.remaining -= length as u64;
    }

    fn skip_rest(&mut self) -> Result<()> {
        let mut left = self.remaining + self.padding;
        self.remaining = 0;
        self.padding = 0;
        while left > 0 {
            let available = self.source.fill_buf()?.len();
            if available == 0 {
                return Err(corrupt("the tar ends in mid-entry"));
            }
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(available);
            self.source.consume(length);
            left -= length as u64;
        }
        Ok(())
    }

    /// A header block, or `None` at the end: two zero blocks, or the stream's end between entries.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        if self.finished || self.source.fill_buf()?.is_empty() {
            self.finished = true;
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        self.source.read_exact(&mut block)?;
        if block.iter().any(|byte| *byte != 0) {
            check_sum(&block)?;
            return Ok(Some(block));
        }
        self.finished = true;
        if self.source.fill_buf()?.is_empty() {
            return Ok(None);
        }
        self.source.read_exact(&mut block)?;
        if block.iter().any(|byte| *byte != 0) {
            return Err(corrupt("a zero block between tar entries"));
        }
        Ok(None)
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > EXTENSION_MAX {
            return Err(corrupt(format!(
                "an extended tar header of {size} bytes, over {EXTENSION_MAX}"
            )));
        }
        // Bounded by EXTENSION_MAX just above.
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.source.read_exact(&mut bytes)?;
        self.padding = padding(size);
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.extension(size)?;
        let end = name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    fn entry(&mut self, block: &[u8; BLOCK], extensions: Extensions) -> Result<Entry> {
        let header = Header::from_byte_slice(block);
        let old = header.as_old();
        let pax = &extensions.pax;
        let text = |key: &str| pax.get(key.as_bytes());
        let path = extensions
            .path
            .or_else(|| text("GNU.sparse.name").or_else(|| text("path")).cloned())
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .link
            .or_else(|| text("linkpath").cloned())
            .unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        for (name, value) in [("path", &path), ("link target", &link)] {
            if value.contains(&0) || value.len() > PATH_MAX {
                return Err(corrupt(format!("an unusable {name} {}", show(value))));
            }
        }
        let kind = kind(header.entry_type(), &path)?;
        let number = |key: &str| -> Result<Option<u64>> {
            text(key)
                .map(|value| decimal(value).ok_or_else(|| corrupt(format!("bad PAX {key}"))))
                .transpose()
        };
        let time = |key: &str| -> Result<Option<Time>> {
            text(key)
                .map(|value| parse_time(value).ok_or_else(|| corrupt(format!("bad PAX {key}"))))
                .transpose()
        };
        let owner = |key: &str, field: &[u8]| -> Result<u32> {
            let value = match number(key)? {
                Some(value) => value,
                None => u64::try_from(numeric(field)?).map_err(|_| corrupt("negative owner"))?,
            };
            // 2^32-1 is "leave as it is" to chown(2).
            u32::try_from(value)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| {
                    TarError::Unsupported(format!("{key} {value} of {} is no id", show(&path)))
                })
        };
        let stored = match (kind, number("size")?) {
            (Kind::File, Some(size)) => size,
            (Kind::File, None) => stored_size(header)?,
            // Whatever the field says, these have no data (Go's archive/tar, isHeaderOnlyType).
            _ => 0,
        };
        let (uid, gid) = (owner("uid", &old.uid)?, owner("gid", &old.gid)?);
        let mtime = match time("mtime")? {
            Some(time) => time,
            None => Time {
                seconds: numeric(&old.mtime)?,
                nanos: 0,
            },
        };
        let atime = time("atime")?;
        let mut entry = Entry {
            kind,
            mode: (numeric(&old.mode)? & 0o7777) as u32,
            uid,
            gid,
            mtime,
            atime,
            size: stored,
            device: device(header, kind)?,
            xattrs: xattrs(pax),
            sparse: None,
            path,
            link,
        };
        self.remaining = stored;
        self.padding = padding(stored);
        if kind == Kind::File {
            self.read_sparse(
                header,
                &extensions.pax,
                &extensions.sparse_pairs,
                &mut entry,
            )?;
        }
        Ok(entry)
    }

    /// Finds the map of a sparse file in whichever of the four formats, and its real size.
    fn read_sparse(
        &mut self,
        header: &Header,
        pax: &BTreeMap<Vec<u8>, Vec<u8>>,
        pairs: &[u64],
        entry: &mut Entry,
    ) -> Result<()> {
        let value = |key: &str| pax.get(key.as_bytes()).map(Vec::as_slice);
        let numbers = if header.entry_type().is_gnu_sparse() {
            let gnu = header
                .as_gnu()
                .ok_or_else(|| corrupt("a sparse entry without a map"))?;
            entry.size = u64::try_from(numeric(&gnu.realsize)?).map_err(|_| corrupt("bad size"))?;
            let mut numbers = Vec::new();
            gnu_segments(&gnu.sparse, &mut numbers)?;
            let mut more = gnu.is_extended();
            while more {
                let mut block = GnuExtSparseHeader::new();
                self.source.read_exact(block.as_mut_bytes())?;
                gnu_segments(block.sparse(), &mut numbers)?;
                more = block.is_extended();
            }
            numbers
        } else if value("GNU.sparse.major") == Some(b"1") {
            self.sparse_map_in_data()?
        } else if let Some(map) = value("GNU.sparse.map") {
            map.split(|byte| *byte == b',')
                .map(|n| decimal(n).ok_or_else(|| corrupt("bad GNU.sparse.map")))
                .collect::<Result<Vec<_>>>()?
        } else if !pairs.is_empty() {
            pairs.to_vec()
        } else {
            return Ok(());
        };
        if let Some(size) = value("GNU.sparse.realsize").or_else(|| value("GNU.sparse.size")) {
            entry.size = decimal(size).ok_or_else(|| corrupt("bad GNU.sparse.size"))?;
        }
        entry.sparse = Some(check_segments(&numbers, entry.size, self.remaining)?);
        Ok(())
    }

    /// Format 1.0: the map stands before the data, as decimal lines, padded to a block.
    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>> {
        let mut read = 0u64;
        let mut number = |reader: &mut Self| -> Result<u64> {
            let mut value = 0u64;
            loop {
                let mut byte = [0];
                if reader.remaining == 0 {
                    return Err(corrupt("a sparse map longer than its entry"));
                }
                reader.source.read_exact(&mut byte)?;
                reader.remaining -= 1;
                read += 1;
                match byte[0] {
                    b'\n' => return Ok(value),
                    digit @ b'0'..=b'9' => {
                        value = value
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                            .ok_or_else(|| corrupt("a sparse map with a huge number"))?;
                    }
                    _ => return Err(corrupt("a sparse map that is not decimal")),
                }
            }
        };
        let count = number(self)?;
        if count > SPARSE_SEGMENTS_MAX as u64 {
            return Err(corrupt(format!("a sparse map of {count} segments")));
        }
        let mut numbers = Vec::new();
        for _ in 0..count * 2 {
            numbers.push(number(self)?);
        }
        let mut pad = padding(read);
        if pad > self.remaining {
            return Err(corrupt("a sparse map longer than its entry"));
        }
        self.remaining -= pad;
        while pad > 0 {
            let available = self.source.fill_buf()?.len();
            if available == 0 {
                return Err(corrupt("the tar ends in mid-entry"));
            }
            let length = usize::try_from(pad).unwrap_or(available).min(available);
            self.source.consume(length);
            pad -= length as u64;
        }
        Ok(numbers)
    }
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn check_sum(block: &[u8; BLOCK]) -> Result<()> {
    let field = 148..156;
    let stored = numeric(&block[field.clone()])?;
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if field.contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        // Some old tars summed signed chars.
        signed += i64::from(byte.cast_signed());
    }
    if stored == unsigned || stored == signed {
        Ok(())
    } else {
        Err(corrupt("a tar header with a wrong checksum"))
    }
}

/// Octal text, or base 256 when the top bit is set. Empty is 0.
fn numeric(field: &[u8]) -> Result<i64> {
    let bad = || corrupt(format!("a tar header with the number {}", show(field)));
    if let Some(first) = field.first()
        && first & 0x80 != 0
    {
        let negative = first & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 {
                if negative { byte | 0x80 } else { byte & 0x3f }
            } else {
                *byte
            };
            let overflow = if negative {
                value < i64::MIN >> 8
            } else {
                value > i64::MAX >> 8
            };
            if overflow {
                return Err(bad());
            }
            value = (value << 8) | i64::from(byte);
        }
        return Ok(value);
    }
    let text = field
        .split(|byte| *byte == 0)
        .find(|part| !part.is_empty())
        .unwrap_or(&[]);
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(0);
    }
    let mut value: i64 = 0;
    for byte in text {
        if !(b'0'..=b'7').contains(byte) {
            return Err(bad());
        }
        value = value.checked_mul(8).ok_or_else(bad)? + i64::from(byte - b'0');
    }
    Ok(value)
}

fn stored_size(header: &Header) -> Result<u64> {
    u64::try_from(numeric(&header.as_old().size)?).map_err(|_| corrupt("a negative size"))
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `[-]seconds[.fraction]`; digits past nanoseconds are dropped.
fn parse_time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0;
    for at in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0'));
    }
    Some(match (negative, nanos) {
        (false, _) => Time { seconds, nanos },
        (true, 0) => Time {
            seconds: -seconds,
            nanos: 0,
        },
        (true, _) => Time {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

fn kind(entry_type: EntryType, path: &[u8]) -> Result<Kind> {
    Ok(match entry_type {
        // Before POSIX a directory was a file whose name ends in a slash.
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::Hardlink,
        EntryType::Char => Kind::Char,
        EntryType::Block => Kind::Block,
        EntryType::Fifo => Kind::Fifo,
        other => {
            let byte = char::from(other.as_byte()).escape_default();
            return Err(TarError::Unsupported(format!(
                "entry {} has type '{byte}'",
                show(path)
            )));
        }
    })
}

fn device(header: &Header, kind: Kind) -> Result<(u32, u32)> {
    if !matches!(kind, Kind::Char | Kind::Block) {
        return Ok((0, 0));
    }
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (numeric(&ustar.dev_major)?, numeric(&ustar.dev_minor)?),
        (None, Some(gnu)) => (numeric(&gnu.dev_major)?, numeric(&gnu.dev_minor)?),
        (None, None) => (0, 0),
    };
    // The kernel has 12 bits of major and 20 bits of minor.
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(corrupt(format!("device number {major}:{minor}"))),
    }
}

fn xattrs(pax: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<(Vec<u8>, Vec<u8>)> {
    pax.iter()
        .filter_map(|(key, value)| {
            Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))
        })
        .collect()
}

/// Reads `length key=value\n` records by their length: values are binary.
fn parse_pax(mut records: &[u8], into: &mut Extensions) -> Result<()> {
    let bad = || corrupt("a malformed PAX record");
    while !records.is_empty() && records[0] != 0 {
        let space = records
            .iter()
            .position(|byte| *byte == b' ')
            .ok_or_else(bad)?;
        let length = decimal(&records[..space]).and_then(|n| usize::try_from(n).ok());
        let length = length
            .filter(|n| *n > space + 1 && *n <= records.len())
            .ok_or_else(bad)?;
        let (record, rest) = records.split_at(length);
        let body = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = body.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let (key, value) = (&body[..equals], &body[equals + 1..]);
        if key.is_empty() || key.contains(&0) {
            return Err(bad());
        }
        records = rest;
        if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
            let is_offset = key == b"GNU.sparse.offset";
            if into.sparse_pairs.len().is_multiple_of(2) != is_offset
                || into.sparse_pairs.len() >= 2 * SPARSE_SEGMENTS_MAX
            {
                return Err(corrupt("a malformed sparse map"));
            }
            into.sparse_pairs.push(decimal(value).ok_or_else(bad)?);
        } else if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
            // An empty value withdraws an earlier record (pax(1)).
            into.pax.remove(key);
        } else {
            into.pax.insert(key.to_vec(), value.to_vec());
        }
    }
    Ok(())
}

fn gnu_segments(map: &[GnuSparseHeader], numbers: &mut Vec<u64>) -> Result<()> {
    for segment in map {
        if segment.is_empty() {
            break;
        }
        if numbers.len() >= 2 * SPARSE_SEGMENTS_MAX {
            return Err(corrupt("a sparse map with too many segments"));
        }
        for field in [&segment.offset, &segment.numbytes] {
            numbers.push(u64::try_from(numeric(field)?).map_err(|_| corrupt("bad sparse map"))?);
        }
    }
    Ok(())
}

/// Ascending, without overlap, inside the file, and as long in sum as what is stored.
fn check_segments(numbers: &[u64], size: u64, stored: u64) -> Result<Vec<Segment>> {
    let bad = || corrupt("a sparse map that does not fit its file");
    if !numbers.len().is_multiple_of(2) || numbers.len() > 2 * SPARSE_SEGMENTS_MAX {
        return Err(bad());
    }
    let (mut end, mut sum) = (0u64, 0u64);
    let mut segments = Vec::with_capacity(numbers.len() / 2);
    for pair in numbers.chunks_exact(2) {
        let segment = Segment {
            offset: pair[0],
            length: pair[1],
        };
        let segment_end = segment.offset.checked_add(segment.length).ok_or_else(bad)?;
        if segment.offset < end || segment_end > size {
            return Err(bad());
        }
        end = segment_end;
        sum += segment.length;
        if segment.length > 0 {
            segments.push(segment);
        }
    }
    if sum != stored {
        return Err(bad());
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_path(name).expect("path");
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.set_cksum();
        header
    }

    fn archive(parts: &[(Header, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (header, data) in parts {
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        bytes.resize(bytes.len() + 2 * BLOCK, 0);
        bytes
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            bytes.extend_from_slice(format!("{length} {key}=").as_bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
        let mut reader = TarReader::new(bytes);
        let mut found = Vec::new();
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            loop {
                let piece = reader.data()?;
                if piece.is_empty() {
                    break;
                }
                let length = piece.len().min(7);
                data.extend_from_slice(&piece[..length]);
                reader.consume(length);
            }
            found.push((entry, data));
        }
        Ok(found)
    }

    #[test]
    fn plain_entries_in_order() {
        let bytes = archive(&[
            (header("d/", EntryType::Directory, 0), b""),
            (header("d/f", EntryType::Regular, 5), b"hello"),
        ]);
        let found = read(&bytes).expect("read");
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].0.kind, found[0].0.path.as_slice()),
            (Kind::Directory, &b"d/"[..])
        );
        assert_eq!(found[1].1, b"hello");
        assert_eq!(
            (found[1].0.uid, found[1].0.gid, found[1].0.mtime.seconds),
            (1, 2, 3)
        );
    }

    #[test]
    fn pax_records_apply_to_the_next_entry_only() {
        let records = pax(&[
            ("path", "long/näme".as_bytes()),
            ("size", b"3"),
            ("uid", b"4294967294"),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.security.capability", b"\x01\n=\x00\n"),
            ("comment", b"x"),
        ]);
        let bytes = archive(&[
            (
                header("x", EntryType::XHeader, records.len() as u64),
                &records,
            ),
            (header("short", EntryType::Regular, 0), b"abc"),
            (header("next", EntryType::Regular, 0), b""),
        ]);
        let found = read(&bytes).expect("read");
        let first = &found[0];
        assert_eq!(first.0.path, "long/näme".as_bytes());
        assert_eq!(
            (first.1.as_slice(), first.0.uid),
            (&b"abc"[..], 4_294_967_294)
        );
        assert_eq!(
            first.0.mtime,
            Time {
                seconds: -2,
                nanos: 750_000_000
            }
        );
        assert_eq!(
            first.0.xattrs,
            [(b"security.capability".to_vec(), b"\x01\n=\x00\n".to_vec())]
        );
        assert_eq!(found[1].0.path, b"next");
    }

    #[test]
    fn gnu_long_names_and_sparse_1_0() {
        let name = "n".repeat(300);
        let records = pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.realsize", b"1000"),
        ]);
        let mut data = b"2\n0\n3\n500\n2\n".to_vec();
        data.resize(512, 0);
        data.extend_from_slice(b"abcde");
        let bytes = archive(&[
            (
                header("l", EntryType::GNULongName, 301),
                format!("{name}\0").as_bytes(),
            ),
            (header("x", EntryType::Regular, 1), b"y"),
            (
                header("p", EntryType::XHeader, records.len() as u64),
                &records,
            ),
            (
                header("GNUSparseFile.0/real", EntryType::Regular, 517),
                &data,
            ),
        ]);
        let found = read(&bytes).expect("read");
        assert_eq!(found[0].0.path, name.as_bytes());
        assert_eq!(
            (found[1].0.path.as_slice(), found[1].0.size),
            (&b"real"[..], 1000)
        );
        assert_eq!(found[1].1, b"abcde");
        assert_eq!(
            found[1].0.sparse.as_deref(),
            Some(
                &[
                    Segment {
                        offset: 0,
                        length: 3
                    },
                    Segment {
                        offset: 500,
                        length: 2
                    }
                ][..]
            )
        );
    }

    #[test]
    fn damage_is_refused() {
        let good = archive(&[(header("a", EntryType::Regular, 600), &[7; 600])]);
        assert!(matches!(read(&good[..700]), Err(TarError::Corrupt(_))));
        assert!(matches!(read(&good[..100]), Err(TarError::Corrupt(_))));
        let mut flipped = good.clone();
        flipped[0] ^= 1;
        assert!(matches!(read(&flipped), Err(TarError::Corrupt(w)) if w.contains("checksum")));
        let mut no_trailer = good.clone();
        no_trailer.truncate(512 + 1024);
        assert_eq!(read(&no_trailer).expect("end between entries").len(), 1);
        let huge = archive(&[(header("x", EntryType::XHeader, EXTENSION_MAX + 1), b"")]);
        assert!(matches!(read(&huge), Err(TarError::Corrupt(w)) if w.contains("extended")));
        let huge = archive(&[(header("x", EntryType::GNULongName, 1 << 33), b"")]);
        assert!(matches!(read(&huge), Err(TarError::Corrupt(_))));
        let odd = archive(&[(header("x", EntryType::new(b'M'), 0), b"")]);
        assert!(matches!(read(&odd), Err(TarError::Unsupported(w)) if w.contains("'M'")));
        assert!(matches!(read(&[b'x'; 1024]), Err(TarError::Corrupt(_))));
        let records = pax(&[("uid", b"4294967295")]);
        let bytes = archive(&[
            (
                header("x", EntryType::XHeader, records.len() as u64),
                &records,
            ),
            (header("f", EntryType::Regular, 0), b""),
        ]);
        assert!(matches!(read(&bytes), Err(TarError::Unsupported(w)) if w.contains("4294967295")));
    }

    #[test]
    fn pax_records_that_lie_are_refused() {
        for record in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"x a=b\n",
            b"6 ab\n\n",
            b"6 =ab\n",
            b"0 a=b\n",
        ] {
            let bytes = archive(&[
                (header("x", EntryType::XHeader, record.len() as u64), record),
                (header("f", EntryType::Regular, 0), b""),
            ]);
            assert!(read(&bytes).is_err(), "{}", show(record));
        }
    }

    #[test]
    fn numeric_fields() {
        for (field, wanted) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\0\x01\0\0\0\0", Some(1i64 << 32)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"9", None),
        ] {
            assert_eq!(numeric(field).ok(), wanted, "{field:?}");
        }
    }
}
