//! SPDY/3.1 frames: heads and control frames, parsed and written. Pure.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::headers::{Deflater, HeaderError, Headers, Inflater};

/// Both kinds of frame start with this many bytes.
pub const HEAD: usize = 8;
/// The longest control frame that is read. Clients send some hundred bytes of headers.
pub const MAX_CONTROL: usize = 16 * 1024;
/// The longest data frame that is sent.
pub const MAX_DATA: usize = 32 * 1024;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;
const ID_MASK: u32 = 0x7fff_ffff;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Why a stream is reset: the status codes of RST_STREAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    ProtocolError = 1,
    RefusedStream = 3,
    Cancel = 5,
    InternalError = 6,
}

/// Why a connection ends: the status codes of GOAWAY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Farewell {
    Ok = 0,
    ProtocolError = 1,
}

/// The first eight bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    Data {
        stream: u32,
        fin: bool,
        length: usize,
    },
    Control {
        version: u16,
        kind: u16,
        flags: u8,
        length: usize,
    },
}

impl Head {
    pub fn parse(bytes: [u8; HEAD]) -> Self {
        let [a, b, c, d, flags, l0, l1, l2] = bytes;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        if a & 0x80 == 0 {
            let stream = u32::from_be_bytes([a, b, c, d]);
            return Self::Data {
                stream,
                fin: flags & FLAG_FIN != 0,
                length,
            };
        }
        Self::Control {
            version: u16::from_be_bytes([a & 0x7f, b]),
            kind: u16::from_be_bytes([c, d]),
            flags,
            length,
        }
    }
}

/// A control frame that means something here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    },
    SynReply {
        stream: u32,
        fin: bool,
    },
    RstStream {
        stream: u32,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last: u32,
    },
    /// Late headers. Nobody uses them, but a FIN may ride on them.
    Headers {
        stream: u32,
        fin: bool,
    },
    /// SETTINGS, WINDOW_UPDATE and frames that this version does not define.
    Ignored,
}

#[derive(Debug)]
pub enum FrameError {
    Version(u16),
    Length { kind: u16, length: usize },
    StreamZero,
    Headers(HeaderError),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => write!(f, "frame of spdy version {version}"),
            Self::Length { kind, length } => {
                write!(f, "control frame of type {kind} has length {length}")
            }
            Self::StreamZero => f.write_str("frame for stream 0"),
            Self::Headers(_) => f.write_str("header block"),
        }
    }
}

impl std::error::Error for FrameError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Headers(error) => Some(error),
            _ => None,
        }
    }
}

/// Reads big-endian numbers off the front of a control frame's payload.
struct Payload<'a> {
    kind: u16,
    length: usize,
    rest: &'a [u8],
}

impl Payload<'_> {
    fn number(&mut self) -> Result<u32, FrameError> {
        let error = FrameError::Length {
            kind: self.kind,
            length: self.length,
        };
        let (number, rest) = self.rest.split_first_chunk::<4>().ok_or(error)?;
        self.rest = rest;
        Ok(u32::from_be_bytes(*number))
    }

    fn stream(&mut self) -> Result<u32, FrameError> {
        match self.number()? & ID_MASK {
            0 => Err(FrameError::StreamZero),
            stream => Ok(stream),
        }
    }
}

/// Parses a control frame. Every header block must pass through `inflater`, in order.
pub fn parse_control(
    version: u16,
    kind: u16,
    flags: u8,
    payload: &[u8],
    inflater: &mut Inflater,
) -> Result<Control, FrameError> {
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let fin = flags & FLAG_FIN != 0;
    let mut payload = Payload {
        kind,
        length: payload.len(),
        rest: payload,
    };
    Ok(match kind {
        SYN_STREAM => {
            let stream = payload.stream()?;
            let _associated_to = payload.number()?;
            let error = FrameError::Length {
                kind,
                length: payload.length,
            };
            let (_priority_and_slot, block) = payload.rest.split_first_chunk::<2>().ok_or(error)?;
            let headers = inflater.headers(block).map_err(FrameError::Headers)?;
            let unidirectional = flags & FLAG_UNIDIRECTIONAL != 0;
            Control::SynStream {
                stream,
                fin,
                unidirectional,
                headers,
            }
        }
        SYN_REPLY | HEADERS => {
            let stream = payload.stream()?;
            inflater
                .headers(payload.rest)
                .map_err(FrameError::Headers)?;
            match kind {
                SYN_REPLY => Control::SynReply { stream, fin },
                _ => Control::Headers { stream, fin },
            }
        }
        RST_STREAM => Control::RstStream {
            stream: payload.stream()?,
            status: payload.number()?,
        },
        PING => Control::Ping {
            id: payload.number()?,
        },
        GOAWAY => Control::GoAway {
            last: payload.number()? & ID_MASK,
        },
        SETTINGS | WINDOW_UPDATE => Control::Ignored,
        _ => Control::Ignored,
    })
}

/// The head of a data frame.
pub fn data_head(stream: u32, fin: bool, length: usize) -> [u8; HEAD] {
    debug_assert!(length < 1 << 24);
    let [a, b, c, d] = (stream & ID_MASK).to_be_bytes();
    let [_, l0, l1, l2] = (length as u32).to_be_bytes();
    [a, b, c, d, if fin { FLAG_FIN } else { 0 }, l0, l1, l2]
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + payload.len());
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    frame.put_u32(u32::from(flags) << 24 | payload.len() as u32);
    frame.put_slice(payload);
    frame.freeze()
}

fn numbers(kind: u16, numbers: &[u32]) -> Bytes {
    let payload: Vec<u8> = numbers
        .iter()
        .flat_map(|number| number.to_be_bytes())
        .collect();
    control(kind, 0, &payload)
}

pub fn syn_reply(stream: u32, deflater: &mut Deflater) -> Result<Bytes, HeaderError> {
    let mut payload = (stream & ID_MASK).to_be_bytes().to_vec();
    deflater.headers(&Headers::default(), &mut payload)?;
    Ok(control(SYN_REPLY, 0, &payload))
}

pub fn rst_stream(stream: u32, status: Reset) -> Bytes {
    numbers(RST_STREAM, &[stream & ID_MASK, status as u32])
}

pub fn ping(id: u32) -> Bytes {
    numbers(PING, &[id])
}

pub fn goaway(last: u32, status: Farewell) -> Bytes {
    numbers(GOAWAY, &[last & ID_MASK, status as u32])
}

/// What only clients send; the tests' client is one.
#[cfg(test)]
pub mod client {
    use super::*;

    pub fn syn_stream(stream: u32, fin: bool, headers: &Headers, deflater: &mut Deflater) -> Bytes {
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        deflater.headers(headers, &mut payload).unwrap();
        control(SYN_STREAM, u8::from(fin), &payload)
    }

    pub fn settings() -> Bytes {
        numbers(SETTINGS, &[1, 4, 100])
    }

    pub fn window_update(stream: u32) -> Bytes {
        numbers(WINDOW_UPDATE, &[stream, 1000])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(frame: &[u8], inflater: &mut Inflater) -> Result<Control, FrameError> {
        let (head, payload) = frame.split_first_chunk::<HEAD>().unwrap();
        match Head::parse(*head) {
            Head::Control {
                version,
                kind,
                flags,
                length,
            } => {
                assert_eq!(length, payload.len());
                parse_control(version, kind, flags, payload, inflater)
            }
            head => panic!("{head:?}"),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (mut inflater, mut deflater) = (Inflater::new(), Deflater::new());
        for id in [1, 3, 5] {
            let headers = Headers::from_iter([("streamtype", "stdin"), ("port", "80")]);
            let frame = client::syn_stream(id, id == 3, &headers, &mut deflater);
            assert_eq!(
                parse(&frame, &mut inflater).unwrap(),
                Control::SynStream {
                    stream: id,
                    fin: id == 3,
                    unidirectional: false,
                    headers
                }
            );
        }
        let (mut inflater, mut deflater) = (Inflater::new(), Deflater::new());
        for id in [1, 3] {
            let frame = syn_reply(id, &mut deflater).unwrap();
            let expected = Control::SynReply {
                stream: id,
                fin: false,
            };
            assert_eq!(parse(&frame, &mut inflater).unwrap(), expected);
        }
        for (frame, expected) in [
            (
                rst_stream(7, Reset::RefusedStream),
                Control::RstStream {
                    stream: 7,
                    status: 3,
                },
            ),
            (ping(9), Control::Ping { id: 9 }),
            (goaway(5, Farewell::Ok), Control::GoAway { last: 5 }),
            (client::settings(), Control::Ignored),
            (client::window_update(1), Control::Ignored),
        ] {
            assert_eq!(parse(&frame, &mut inflater).unwrap(), expected);
        }
        assert_eq!(
            Head::parse(data_head(0x7fff_ffff, true, 0x00ff_fffe)),
            Head::Data {
                stream: 0x7fff_ffff,
                fin: true,
                length: 0x00ff_fffe
            }
        );
    }

    #[test]
    fn control_frames_cut_short_are_refused() {
        let headers = Headers::from_iter([("streamtype", "stdin")]);
        let frames = [
            client::syn_stream(1, false, &headers, &mut Deflater::new()),
            syn_reply(1, &mut Deflater::new()).unwrap(),
            rst_stream(1, Reset::Cancel),
            ping(1),
            goaway(1, Farewell::ProtocolError),
        ];
        for frame in frames {
            let kind = u16::from_be_bytes([frame[2], frame[3]]);
            for length in 0..frame.len() - HEAD {
                // GOAWAY's status is not looked at, and what follows the last header is a flush.
                let flush =
                    matches!(kind, SYN_STREAM | SYN_REPLY) && length + 8 >= frame.len() - HEAD;
                if kind == GOAWAY && length >= 4 || flush {
                    continue;
                }
                let payload = &frame[HEAD..HEAD + length];
                let parsed = parse_control(VERSION, kind, 0, payload, &mut Inflater::new());
                assert!(parsed.is_err(), "type {kind} with {length} bytes");
            }
        }
        assert!(matches!(
            parse_control(2, PING, 0, &[0; 4], &mut Inflater::new()),
            Err(FrameError::Version(2))
        ));
        assert!(matches!(
            parse_control(VERSION, RST_STREAM, 0, &[0; 8], &mut Inflater::new()),
            Err(FrameError::StreamZero)
        ));
    }
}
