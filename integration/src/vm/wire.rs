//! What host and guest say to each other over one virtio-serial port: a request as a line of
//! JSON, answers as frames. Each connection has a number of its own, so that what an earlier one
//! left in the pipe is passed over.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// Commands that can run in one guest at the same time.
pub const PORTS: usize = 8;

/// Name of a port, as it is on qemu's command line and in the guest's sysfs.
pub fn port_name(index: usize) -> String {
    format!("coracle.agent.{index}")
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Request {
    pub session: u64,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: Option<String>,
    /// The guest kills all that the command started when it runs longer.
    pub seconds: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    Code(i32),
    Signal(i32),
    TimedOut,
    NotStarted(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Stdout,
    Stderr,
    /// The last frame: `Ended` as JSON.
    End,
}

impl Kind {
    const fn letter(self) -> u8 {
        match self {
            Self::Stdout => b'o',
            Self::Stderr => b'e',
            Self::End => b'x',
        }
    }

    const fn of(letter: u8) -> Option<Self> {
        match letter {
            b'o' => Some(Self::Stdout),
            b'e' => Some(Self::Stderr),
            b'x' => Some(Self::End),
            _ => None,
        }
    }
}

const MARK: &[u8] = b"\n\x01vm ";
/// Mark, 16 digits of session, space, kind, space, 8 digits of length, line feed.
const HEADER: usize = MARK.len() + 16 + 3 + 8 + 1;
const LONGEST: usize = 1 << 20;

pub fn frame(session: u64, kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(MARK);
    let letter = char::from(kind.letter());
    let rest = format!("{session:016x} {letter} {:08x}\n", payload.len());
    bytes.extend_from_slice(rest.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Takes frames of one session out of a stream of bytes.
pub struct Frames {
    session: u64,
    in_step: bool,
    bytes: Vec<u8>,
}

impl Frames {
    pub const fn new(session: u64) -> Self {
        Self {
            session,
            in_step: false,
            bytes: Vec::new(),
        }
    }

    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, None when more bytes are needed.
    pub fn take(&mut self) -> Result<Option<(Kind, Vec<u8>)>> {
        if !self.in_step && !self.find_first() {
            return Ok(None);
        }
        let Some(header) = self.bytes.get(..HEADER) else {
            return Ok(None);
        };
        let (kind, length) = parse_header(header, self.session)?;
        if self.bytes.len() < HEADER + length {
            return Ok(None);
        }
        let payload = self.bytes[HEADER..HEADER + length].to_vec();
        self.bytes.drain(..HEADER + length);
        Ok(Some((kind, payload)))
    }

    /// Drops what is in front of the first frame of this session.
    fn find_first(&mut self) -> bool {
        let start = [MARK, format!("{:016x}", self.session).as_bytes()].concat();
        let found = self.bytes.windows(start.len()).position(|w| w == start);
        let keep_from = found.unwrap_or_else(|| (self.bytes.len() + 1).saturating_sub(start.len()));
        self.bytes.drain(..keep_from);
        self.in_step = found.is_some();
        self.in_step
    }
}

fn parse_header(header: &[u8], session: u64) -> Result<(Kind, usize)> {
    let text = std::str::from_utf8(header).context("the guest's stream is out of step")?;
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, number, letter, length] = words[..] else {
        anyhow::bail!("the guest's stream is out of step at {text:?}");
    };
    ensure!(
        u64::from_str_radix(number, 16) == Ok(session),
        "a frame of another session: {text:?}"
    );
    let kind = letter.bytes().next().and_then(Kind::of);
    let length = usize::from_str_radix(length, 16)?;
    ensure!(length <= LONGEST, "a frame of {length} bytes");
    Ok((kind.context("a frame of unknown kind")?, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut_and_what_an_earlier_session_left() -> Result<()> {
        let mut stream = b"rest of a payload\n\x01vm ".to_vec();
        stream.extend(frame(7, Kind::Stdout, b"of another session"));
        stream.extend(frame(8, Kind::Stdout, b"one"));
        stream.extend(frame(8, Kind::Stderr, b""));
        stream.extend(frame(8, Kind::End, b"{}"));
        for step in 1..stream.len() {
            let mut frames = Frames::new(8);
            let mut seen = Vec::new();
            for part in stream.chunks(step) {
                frames.add(part);
                while let Some(frame) = frames.take()? {
                    seen.push(frame);
                }
            }
            let want = [
                (Kind::Stdout, b"one".to_vec()),
                (Kind::Stderr, Vec::new()),
                (Kind::End, b"{}".to_vec()),
            ];
            assert_eq!(seen, want, "cut every {step} bytes");
        }
        Ok(())
    }

    #[test]
    fn frame_of_another_session_in_the_middle_is_an_error() {
        let mut frames = Frames::new(8);
        frames.add(&frame(8, Kind::Stdout, b"one"));
        frames.add(&frame(7, Kind::Stdout, b"two"));
        assert!(matches!(frames.take(), Ok(Some(_))));
        assert!(frames.take().is_err());
    }
}
