//! One ttrpc frame: length (u32), stream (u32), type (u8), flags (u8), all big-endian, then the
//! body.
//!
//! Owns: the header's layout and its bounds. Never does I/O.

pub const HEADER: usize = 10;
/// ttrpc's own limit for a body; a peer that announces more is not a ttrpc peer.
pub const MAX_BODY: usize = 4 << 20;

pub const REQUEST: u8 = 1;
pub const RESPONSE: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub length: usize,
    pub stream: u32,
    pub kind: u8,
    pub flags: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong(pub usize);

/// The header at the start of `bytes`, `None` when it is not there whole.
pub fn parse(bytes: &[u8]) -> Result<Option<Header>, TooLong> {
    let Some(head) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if length > MAX_BODY {
        return Err(TooLong(length));
    }
    let stream = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    Ok(Some(Header {
        length,
        stream,
        kind: head[8],
        flags: head[9],
    }))
}

/// Appends a frame with this message as its body.
pub fn append(out: &mut Vec<u8>, stream: u32, kind: u8, body: &impl prost::Message) {
    let length = body.encoded_len();
    out.reserve(HEADER + length);
    out.extend_from_slice(&(length as u32).to_be_bytes());
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[kind, 0]);
    body.encode(out).expect("a Vec grows as needed");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ttrpc::Response;

    #[test]
    fn header_round_trips_and_partial_headers_wait() {
        let mut out = Vec::new();
        append(
            &mut out,
            3,
            RESPONSE,
            &Response {
                status: None,
                payload: b"abc".to_vec(),
            },
        );
        let header = parse(&out).unwrap().unwrap();
        assert_eq!(
            header,
            Header {
                length: 5,
                stream: 3,
                kind: RESPONSE,
                flags: 0
            }
        );
        assert_eq!(out.len(), HEADER + 5);
        for cut in 0..HEADER {
            assert_eq!(parse(&out[..cut]), Ok(None));
        }
    }

    #[test]
    fn a_body_over_the_limit_is_refused() {
        let mut head = [0u8; HEADER];
        head[..4].copy_from_slice(&(MAX_BODY as u32 + 1).to_be_bytes());
        assert_eq!(parse(&head), Err(TooLong(MAX_BODY + 1)));
    }
}
