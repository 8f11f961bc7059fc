//! SPDY/3 header blocks: zlib with the dictionary that the protocol fixes, one context for each
//! direction of a connection.
//!
//! Nothing is believed: what a block may inflate to, and how many headers it may hold, is bounded.

use std::sync::LazyLock;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// What a block may come to. A stream's headers are some dozen bytes.
const MAX_BLOCK: usize = 64 * 1024;
const MAX_HEADERS: usize = 64;

/// The dictionary of the SPDY/3 draft, section 2.6.10.1: words with their lengths, then text.
static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS {
        dictionary.extend((word.len() as u32).to_be_bytes());
        dictionary.extend(word.as_bytes());
    }
    dictionary.extend(TEXT.as_bytes());
    dictionary
});

#[rustfmt::skip]
const WORDS: &[&str] = &[
    "options", "head", "post", "put", "delete", "trace", "accept", "accept-charset",
    "accept-encoding", "accept-language", "accept-ranges", "age", "allow", "authorization",
    "cache-control", "connection", "content-base", "content-encoding", "content-language",
    "content-length", "content-location", "content-md5", "content-range", "content-type", "date",
    "etag", "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match",
    "if-range", "if-unmodified-since", "last-modified", "location", "max-forwards", "pragma",
    "proxy-authenticate", "proxy-authorization", "range", "referer", "retry-after", "server",
    "te", "trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via", "warning",
    "www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url",
    "public", "set-cookie", "keep-alive", "origin",
];

const TEXT: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502",
    "504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Re",
    "quest401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Impl",
    "emented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00",
    ":00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,imag",
    "e/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivate",
    "max-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

/// A stream's headers: names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first header of that name; an empty one counts as none.
    pub fn value(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(own, _)| own == name);
        found
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Headers {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(headers: I) -> Self {
        Self(
            headers
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        )
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// The zlib stream is broken, or ends.
    Zlib,
    TooLong,
    TooMany(u32),
    /// A length points past the end.
    Truncated,
    NotUtf8,
}

impl std::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zlib => f.write_str("zlib stream is broken"),
            Self::TooLong => write!(f, "inflates to more than {MAX_BLOCK} bytes"),
            Self::TooMany(count) => write!(f, "holds {count} headers, more than {MAX_HEADERS}"),
            Self::Truncated => f.write_str("ends within a header"),
            Self::NotUtf8 => f.write_str("holds a header that is not utf-8"),
        }
    }
}

impl std::error::Error for HeaderError {}

/// The reading direction's zlib context.
pub struct Inflater(Decompress);

impl Inflater {
    pub fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub fn headers(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let mut out = Vec::with_capacity(1024);
        let mut rest = block;
        loop {
            if out.len() == out.capacity() {
                if out.len() >= MAX_BLOCK {
                    return Err(HeaderError::TooLong);
                }
                out.reserve(out.len());
            }
            let (consumed, produced) = (self.0.total_in(), out.len());
            let result = self.0.decompress_vec(rest, &mut out, FlushDecompress::Sync);
            let consumed = (self.0.total_in() - consumed) as usize;
            rest = rest.get(consumed..).ok_or(HeaderError::Zlib)?;
            match result {
                Ok(Status::StreamEnd) => return Err(HeaderError::Zlib),
                Ok(_) if rest.is_empty() && out.len() < out.capacity() => return Ok(out),
                Ok(_) if consumed == 0 && out.len() == produced => return Err(HeaderError::Zlib),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| HeaderError::Zlib)?;
                }
                Err(_) => return Err(HeaderError::Zlib),
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = number(&mut block)?;
    if count as usize > MAX_HEADERS {
        return Err(HeaderError::TooMany(count));
    }
    let mut headers = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        // Several values of one name are joined by NUL; nobody sends more than one.
        let value = text(&mut block)?
            .split('\0')
            .next()
            .unwrap_or_default()
            .to_owned();
        headers.push((name, value));
    }
    Ok(Headers(headers))
}

fn number(block: &mut &[u8]) -> Result<u32, HeaderError> {
    let (number, rest) = block
        .split_first_chunk::<4>()
        .ok_or(HeaderError::Truncated)?;
    *block = rest;
    Ok(u32::from_be_bytes(*number))
}

fn text<'a>(block: &mut &'a [u8]) -> Result<&'a str, HeaderError> {
    let length = number(block)? as usize;
    let (text, rest) = block
        .split_at_checked(length)
        .ok_or(HeaderError::Truncated)?;
    *block = rest;
    std::str::from_utf8(text).map_err(|_| HeaderError::NotUtf8)
}

/// The writing direction's zlib context.
pub struct Deflater {
    zlib: Compress,
    primed: bool,
}

impl Deflater {
    pub fn new() -> Self {
        Self {
            zlib: Compress::new(Compression::fast(), true),
            primed: false,
        }
    }

    /// Appends the block to `out`.
    pub fn headers(&mut self, headers: &Headers, out: &mut Vec<u8>) -> Result<(), HeaderError> {
        if !self.primed {
            self.zlib
                .set_dictionary(&DICTIONARY)
                .map_err(|_| HeaderError::Zlib)?;
            self.primed = true;
        }
        let mut block = (headers.0.len() as u32).to_be_bytes().to_vec();
        for text in headers.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
        let mut rest = block.as_slice();
        loop {
            out.reserve(rest.len() + 64);
            let consumed = self.zlib.total_in();
            self.zlib
                .compress_vec(rest, out, FlushCompress::Sync)
                .map_err(|_| HeaderError::Zlib)?;
            rest = &rest[(self.zlib.total_in() - consumed) as usize..];
            // Room left over means that the flush is complete.
            if rest.is_empty() && out.len() < out.capacity() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dictionary_is_the_drafts() {
        assert_eq!(DICTIONARY.len(), 1423);
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_of_one_context_are_read_in_order() {
        let (mut inflater, mut deflater) = (Inflater::new(), Deflater::new());
        let long = "x".repeat(20_000);
        for value in ["error", "", "stdin", &long, "stdin"] {
            let headers = Headers::from_iter([("streamtype", value), ("b", "c")]);
            let mut block = Vec::new();
            deflater.headers(&headers, &mut block).unwrap();
            let read = inflater.headers(&block).unwrap();
            assert_eq!(read, headers);
            assert_eq!(
                read.value("streamtype"),
                Some(value).filter(|value| !value.is_empty())
            );
            assert_eq!(read.value("StreamType"), None);
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let headers = Headers::from_iter([("a", "0".repeat(1 << 20).as_str())]);
        let mut block = Vec::new();
        Deflater::new().headers(&headers, &mut block).unwrap();
        assert!(block.len() < 16 * 1024);
        assert_eq!(Inflater::new().headers(&block), Err(HeaderError::TooLong));
    }

    #[test]
    fn counts_and_lengths_are_not_believed() {
        let error = |block: &[u8]| parse(block).unwrap_err();
        assert_eq!(error(&[]), HeaderError::Truncated);
        assert_eq!(error(&[255, 255, 255, 255]), HeaderError::TooMany(u32::MAX));
        assert_eq!(
            error(&[0, 0, 0, 1, 255, 255, 255, 255, b'a']),
            HeaderError::Truncated
        );
        assert_eq!(error(&[0, 0, 0, 1, 0, 0, 0, 1, 0xff]), HeaderError::NotUtf8);
        assert_eq!(parse(&[0, 0, 0, 0]), Ok(Headers::default()));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut good = Vec::new();
        let headers = Headers::from_iter([("streamtype", "stdout"), ("port", "80")]);
        Deflater::new().headers(&headers, &mut good).unwrap();
        for _ in 0..20_000 {
            let mut next = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as usize
            };
            let mut block = good.clone();
            for _ in 0..1 + next() % 4 {
                let at = next() % block.len();
                block[at] = next() as u8;
            }
            block.truncate(next() % (block.len() + 1));
            let _ = Inflater::new().headers(&block);
            let _ = parse(&block);
        }
    }
}
