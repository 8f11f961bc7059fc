//! The log file of a CRI container, written by the shim itself so that the application never
//! waits for a daemon and no line is lost while one is down.
//!
//! Format (k8s.io/cri-api, "CRI log format"): `<RFC3339Nano> <stream> <F|P> <text>\n`; a line
//! longer than 16 KiB is cut into P parts and a last F part.
//! Owns: the open file, lines not yet ended, and the count of bytes lost to a full disk. Never
//! blocks on anything but the page cache and never fails its caller: output that cannot be
//! written is counted and dropped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::stdio::loss::Loss;

pub const MAX_PART: usize = 16 * 1024;

/// `2006-01-02T15:04:05.000000000Z `
pub struct Stamp([u8; 31]);

impl Stamp {
    pub fn now() -> Stamp {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Stamp::at(since.as_secs(), since.subsec_nanos())
    }

    /// Days to a civil date by the proleptic Gregorian calendar's 400-year cycle.
    pub fn at(secs: u64, nanos: u32) -> Stamp {
        let days = secs / 86_400 + 719_468;
        let era = days / 146_097;
        let of_era = days % 146_097;
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let mut text = *b"0000-00-00T00:00:00.000000000Z ";
        let mut put = |at: usize, width: usize, mut value: u64| {
            for i in (at..at + width).rev() {
                text[i] = b'0' + (value % 10) as u8;
                value /= 10;
            }
        };
        put(0, 4, year);
        put(5, 2, month);
        put(8, 2, day);
        put(11, 2, secs / 3_600 % 24);
        put(14, 2, secs / 60 % 60);
        put(17, 2, secs % 60);
        put(20, 9, u64::from(nanos));
        Stamp(text)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.0[..30]).unwrap_or("")
    }
}

/// Cuts one stream of output into log lines.
pub struct Lines {
    /// `stdout ` or `stderr `
    stream: &'static [u8],
    partial: Vec<u8>,
}

impl Lines {
    pub fn stdout() -> Lines {
        Lines {
            stream: b"stdout ",
            partial: Vec::new(),
        }
    }

    pub fn stderr() -> Lines {
        Lines {
            stream: b"stderr ",
            partial: Vec::new(),
        }
    }

    /// Appends the log lines that `chunk` completes to `out`.
    pub fn push(&mut self, mut chunk: &[u8], stamp: &Stamp, out: &mut Vec<u8>) {
        while !chunk.is_empty() {
            let room = MAX_PART - self.partial.len();
            let window = &chunk[..chunk.len().min(room)];
            let (text, tag) = match memchr::memchr(b'\n', window) {
                Some(end) => (&window[..end], b'F'),
                None if chunk.len() > room => (window, b'P'),
                // A line of exactly 16 KiB may end with the next byte: it is no part yet.
                None => {
                    self.partial.extend_from_slice(window);
                    return;
                }
            };
            // The newline after exactly 16 KiB of text belongs to this line.
            let (tag, used) = match tag {
                b'F' => (tag, text.len() + 1),
                _ if chunk.get(room) == Some(&b'\n') => (b'F', room + 1),
                _ => (tag, room),
            };
            self.line(text, tag, stamp, out);
            chunk = &chunk[used..];
        }
    }

    fn line(&mut self, text: &[u8], tag: u8, stamp: &Stamp, out: &mut Vec<u8>) {
        out.extend_from_slice(&stamp.0);
        out.extend_from_slice(self.stream);
        out.extend_from_slice(&[tag, b' ']);
        if !self.partial.is_empty() {
            out.extend_from_slice(&self.partial);
            self.partial = Vec::new();
        }
        out.extend_from_slice(text);
        out.push(b'\n');
    }

    /// The end of the stream: text without a newline is written as a part.
    pub fn finish(&mut self, stamp: &Stamp, out: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.line(&[], b'P', stamp, out);
        }
    }
}

pub struct CriLog {
    path: PathBuf,
    file: File,
    loss: Loss,
}

fn open(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK a FIFO put in the log's place would stop the shim.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_fifo() || kind.is_block_device() || kind.is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok(file)
}

impl CriLog {
    pub fn open(path: &Path) -> io::Result<CriLog> {
        Ok(CriLog {
            path: path.to_owned(),
            file: open(path)?,
            loss: Loss::default(),
        })
    }

    /// Opens the path again after a rename. Unfinished lines are in memory, so none is split.
    pub fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }

    pub fn dropped(&self) -> u64 {
        self.loss.total()
    }

    pub fn news(&mut self) -> Option<String> {
        self.loss.news()
    }

    /// Writes whole lines. What does not fit on the disk is counted; a torn line is taken back.
    pub fn append(&mut self, lines: &[u8]) {
        let (written, error) = write_most(&mut self.file, lines);
        let Some(error) = error else {
            return self.loss.over(&self.path);
        };
        let whole = memchr::memrchr(b'\n', &lines[..written]).map_or(0, |at| at + 1);
        let torn = (written - whole) as u64;
        if torn > 0
            && let Ok(meta) = self.file.metadata()
        {
            // Best effort: a torn line is worse than none, but the count is right either way.
            let _ = self.file.set_len(meta.len().saturating_sub(torn));
        }
        self.loss.lost(&self.path, lines.len() - whole, &error);
    }
}

/// How much of it a file took, and why not all.
pub fn write_most(file: &mut File, bytes: &[u8]) -> (usize, Option<io::Error>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Some(io::ErrorKind::WriteZero.into())),
            Ok(n) => written += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return (written, Some(e)),
        }
    }
    (written, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_civil_utc() {
        let cases = [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399, 1, "2000-02-28T23:59:59.000000001Z"),
            (951_782_400, 999_999_999, "2000-02-29T00:00:00.999999999Z"),
            (1_709_251_199, 5, "2024-02-29T23:59:59.000000005Z"),
            (4_102_444_800, 0, "2100-01-01T00:00:00.000000000Z"),
        ];
        for (secs, nanos, want) in cases {
            assert_eq!(Stamp::at(secs, nanos).text(), want);
        }
    }

    fn run(chunks: &[&[u8]]) -> Vec<(char, Vec<u8>)> {
        let stamp = Stamp::at(0, 0);
        let mut lines = Lines::stdout();
        let mut out = Vec::new();
        for chunk in chunks {
            lines.push(chunk, &stamp, &mut out);
        }
        lines.finish(&stamp, &mut out);
        out.split_inclusive(|b| *b == b'\n')
            .map(|line| {
                assert!(line.starts_with(b"1970-01-01T00:00:00.000000000Z stdout "));
                let rest = &line[38..line.len() - 1];
                assert_eq!(rest[1], b' ');
                (rest[0] as char, rest[2..].to_vec())
            })
            .collect()
    }

    #[test]
    fn lines_parts_and_the_unfinished_end() {
        let full = vec![b'x'; MAX_PART];
        let long = vec![b'y'; MAX_PART + 5];
        assert_eq!(
            run(&[b"a\nb\n"]),
            [('F', b"a".to_vec()), ('F', b"b".to_vec())]
        );
        assert_eq!(run(&[b"a", b"b", b"\n"]), [('F', b"ab".to_vec())]);
        assert_eq!(run(&[b"\n\n"]), [('F', vec![]), ('F', vec![])]);
        assert_eq!(run(&[b"tail"]), [('P', b"tail".to_vec())]);
        assert_eq!(run(&[b""]), []);
        assert_eq!(run(&[&full, b"\n"]), [('F', full.clone())]);
        let mut at_once = full.clone();
        at_once.extend(b"\nz\n");
        assert_eq!(
            run(&[&at_once]),
            [('F', full.clone()), ('F', b"z".to_vec())]
        );
        assert_eq!(
            run(&[&long, b"\n"]),
            [
                ('P', long[..MAX_PART].to_vec()),
                ('F', long[MAX_PART..].to_vec())
            ]
        );
        assert_eq!(
            run(&[&full, &full, b"\n"]),
            [('P', full.clone()), ('F', full.clone())]
        );
    }

    #[test]
    fn any_cutting_of_the_input_gives_the_same_text() {
        let mut input = Vec::new();
        for i in 0..50usize {
            input.extend(std::iter::repeat_n(b'a' + (i % 26) as u8, i * 997 % 40_000));
            input.push(b'\n');
        }
        let whole = run(&[&input]);
        for size in [1usize, 7, 4096, 16_384, 16_385, 65_536] {
            let pieces: Vec<&[u8]> = input.chunks(size).collect();
            assert_eq!(run(&pieces), whole, "pieces of {size}");
        }
    }

    #[test]
    fn reopen_after_rename_splits_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = CriLog::open(&path).unwrap();
        log.append(b"one\n");
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        log.append(b"two\n");
        log.reopen().unwrap();
        log.append(b"three\n");
        assert_eq!(
            std::fs::read(dir.path().join("old")).unwrap(),
            b"one\ntwo\n"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        assert_eq!(log.dropped(), 0);
    }

    #[test]
    fn a_full_disk_is_counted_and_not_an_error() {
        let full = std::fs::OpenOptions::new()
            .append(true)
            .open("/dev/full")
            .unwrap();
        let mut log = CriLog {
            path: "/dev/full".into(),
            file: full,
            loss: Loss::default(),
        };
        log.append(b"lost\n");
        assert_eq!(log.dropped(), 5);
        assert!(log.news().unwrap().contains("No space left on device"));
    }
}
