//! Netlink attributes (type-length-value), written and read.
//!
//! Owns alignment and nesting only. Bounds are checked on reading: a short or lying attribute
//! ends the iteration.

/// Attribute type flag for a container of attributes.
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_HEADER: usize = 4;

pub(crate) fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// A buffer that attributes are appended to.
#[derive(Default)]
pub(crate) struct AttrBuf {
    bytes: Vec<u8>,
}

impl AttrBuf {
    /// Starts with a fixed message header before the attributes.
    pub(crate) fn with_header(header: &[u8]) -> AttrBuf {
        AttrBuf {
            bytes: header.to_vec(),
        }
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // The length field is 16 bits; callers chunk what could grow past it.
        let length = (NLA_HEADER + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(align(self.bytes.len()), 0);
        self
    }

    /// Numbers of nf_tables are big-endian.
    pub(crate) fn u32_be(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A string with its terminating zero.
    pub(crate) fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut text = value.as_bytes().to_vec();
        text.push(0);
        self.bytes(kind, &text)
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut AttrBuf)) -> &mut Self {
        let mut child = AttrBuf::default();
        fill(&mut child);
        self.bytes(kind | NLA_F_NESTED, &child.bytes)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Iterates over attributes as (type without flags, value).
pub(crate) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Attributes { rest: bytes }
    }

    pub(crate) fn get(bytes: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Attributes::new(bytes)
            .find(|(found, _)| *found == kind)
            .map(|(_, value)| value)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.len() < NLA_HEADER {
            return None;
        }
        let length = super::read_u16(self.rest, 0) as usize;
        let kind = super::read_u16(self.rest, 2) & NLA_TYPE_MASK;
        if length < NLA_HEADER || length > self.rest.len() {
            self.rest = &[];
            return None;
        }
        let value = &self.rest[NLA_HEADER..length];
        self.rest = &self.rest[align(length).min(self.rest.len())..];
        Some((kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip_with_padding_and_nesting() {
        let mut buffer = AttrBuf::default();
        buffer.string(1, "abc").u32_be(2, 7).nest(3, |inner| {
            inner.bytes(9, &[1]);
        });
        let bytes = buffer.finish();
        let all: Vec<_> = Attributes::new(&bytes).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], (1, b"abc\0".as_slice()));
        assert_eq!(all[1], (2, [0, 0, 0, 7].as_slice()));
        assert_eq!(Attributes::get(all[2].1, 9), Some([1].as_slice()));
    }

    #[test]
    fn lying_length_ends_the_iteration() {
        assert_eq!(Attributes::new(&[200, 0, 1, 0, 5]).count(), 0);
        assert_eq!(Attributes::new(&[2, 0, 1, 0]).count(), 0);
    }
}
