//! D-Bus messages as bytes: the values that systemd's interfaces use, and the frame around them.
//! Pure.
//!
//! Everything that is read is bounded: the length of a message, the depth of its values, every
//! count within what is left of the body. What is longer, deeper or of another form is an error.

use std::fmt;

/// The specification allows 128 MiB; systemd's answers to us are a few kilobytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Depth of containers in containers, 32 arrays and 32 structs in the specification.
const MAX_DEPTH: usize = 64;

const LITTLE: u8 = b'l';
const VERSION: u8 = 1;

/// The fixed part of a header, up to the length of the field array.
pub const FIXED_HEADER: usize = 16;

/// A value with its D-Bus type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Byte(u8),
    Bool(bool),
    I16(i16),
    U16(u16),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    Double(f64),
    Text(String),
    Path(String),
    Signature(String),
    /// The signature of the elements, which an empty array still has.
    Array(String, Vec<Value>),
    Struct(Vec<Value>),
    Entry(Box<Value>, Box<Value>),
    Variant(Box<Value>),
}

impl Value {
    pub fn text(text: impl Into<String>) -> Value {
        Value::Text(text.into())
    }

    pub fn variant(self) -> Value {
        Value::Variant(Box::new(self))
    }

    pub fn bytes(bytes: &[u8]) -> Value {
        Value::Array("y".into(), bytes.iter().map(|b| Value::Byte(*b)).collect())
    }

    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
        Value::Array("s".into(), texts.into_iter().map(Value::text).collect())
    }

    pub fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(text) | Value::Path(text) | Value::Signature(text) => Some(text),
            Value::Variant(inner) => inner.as_text(),
            _ => None,
        }
    }

    pub fn signature(&self) -> String {
        let mut out = String::new();
        self.sign(&mut out);
        out
    }

    fn sign(&self, out: &mut String) {
        match self {
            Value::Byte(_) => out.push('y'),
            Value::Bool(_) => out.push('b'),
            Value::I16(_) => out.push('n'),
            Value::U16(_) => out.push('q'),
            Value::I32(_) => out.push('i'),
            Value::U32(_) => out.push('u'),
            Value::I64(_) => out.push('x'),
            Value::U64(_) => out.push('t'),
            Value::Double(_) => out.push('d'),
            Value::Text(_) => out.push('s'),
            Value::Path(_) => out.push('o'),
            Value::Signature(_) => out.push('g'),
            Value::Array(element, _) => {
                out.push('a');
                out.push_str(element);
            }
            Value::Struct(fields) => {
                out.push('(');
                fields.iter().for_each(|field| field.sign(out));
                out.push(')');
            }
            Value::Entry(key, value) => {
                out.push('{');
                key.sign(out);
                value.sign(out);
                out.push('}');
            }
            Value::Variant(_) => out.push('v'),
        }
    }
}

/// What is wrong with bytes that claim to be a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed D-Bus message: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

type Read<T> = std::result::Result<T, Malformed>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Call,
    Return,
    Error,
    Signal,
    /// Types of a later protocol are to be ignored.
    Other,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Call => 1,
            Kind::Return => 2,
            Kind::Error => 3,
            Kind::Signal => 4,
            Kind::Other => u8::MAX,
        }
    }
}

/// A message. Fields that it does not have are empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub kind: Kind,
    pub serial: u32,
    pub reply_to: u32,
    pub path: String,
    pub interface: String,
    pub member: String,
    pub error: String,
    pub destination: String,
    pub sender: String,
    pub body: Vec<Value>,
}

impl Message {
    pub fn empty(kind: Kind, serial: u32) -> Message {
        Message {
            kind,
            serial,
            reply_to: 0,
            path: String::new(),
            interface: String::new(),
            member: String::new(),
            error: String::new(),
            destination: String::new(),
            sender: String::new(),
            body: Vec::new(),
        }
    }

    /// The frame in little-endian byte order.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Encoder::default();
        let mut signature = String::new();
        for value in &self.body {
            value.sign(&mut signature);
            body.value(value);
        }
        let text = |code: u8, text: &str| (!text.is_empty()).then(|| (code, Value::text(text)));
        let fields = [
            (!self.path.is_empty()).then(|| (1, Value::Path(self.path.clone()))),
            text(2, &self.interface),
            text(3, &self.member),
            text(4, &self.error),
            (self.reply_to != 0).then_some((5, Value::U32(self.reply_to))),
            text(6, &self.destination),
            text(7, &self.sender),
            (!signature.is_empty()).then_some((8, Value::Signature(signature))),
        ];
        let fields = fields
            .into_iter()
            .flatten()
            .map(|(code, value)| Value::Struct(vec![Value::Byte(code), value.variant()]))
            .collect();
        let mut frame = Encoder::default();
        frame.bytes.extend([LITTLE, self.kind.code(), 0, VERSION]);
        frame.u32(body.bytes.len() as u32);
        frame.u32(self.serial);
        frame.value(&Value::Array("(yv)".into(), fields));
        frame.pad(8);
        frame.bytes.extend(body.bytes);
        frame.bytes
    }

    /// Bytes of the whole message, from its first [`FIXED_HEADER`].
    pub fn length(fixed: &[u8; FIXED_HEADER]) -> Read<usize> {
        let big = is_big(fixed[0])?;
        let number = |at: usize| {
            let bytes = [fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]];
            let number = if big {
                u32::from_be_bytes(bytes)
            } else {
                u32::from_le_bytes(bytes)
            };
            number as usize
        };
        let (body, fields) = (number(4), number(12));
        if body > MAX_MESSAGE || fields > MAX_MESSAGE {
            return Err(Malformed("too long"));
        }
        let total = (FIXED_HEADER + fields).next_multiple_of(8) + body;
        if total > MAX_MESSAGE {
            return Err(Malformed("too long"));
        }
        Ok(total)
    }

    pub fn decode(frame: &[u8]) -> Read<Message> {
        let mut reader = Decoder {
            bytes: frame,
            at: 0,
            big: is_big(*frame.first().ok_or(Malformed("empty"))?)?,
        };
        reader.take(1)?;
        let kind = match reader.byte()? {
            0 => return Err(Malformed("message type 0")),
            1 => Kind::Call,
            2 => Kind::Return,
            3 => Kind::Error,
            4 => Kind::Signal,
            _ => Kind::Other,
        };
        let _flags = reader.byte()?;
        if reader.byte()? != VERSION {
            return Err(Malformed("protocol version"));
        }
        let body_length = reader.u32()? as usize;
        let serial = reader.u32()?;
        if serial == 0 {
            return Err(Malformed("serial 0"));
        }
        let mut message = Message::empty(kind, serial);
        let fields = reader.value("a(yv)", 0)?;
        let signature = message.take_fields(fields)?;
        reader.pad(8)?;
        if frame.len() - reader.at != body_length {
            return Err(Malformed("length of the body"));
        }
        // Alignment in the body counts from its own start.
        let mut reader = Decoder {
            bytes: &frame[reader.at..],
            at: 0,
            big: reader.big,
        };
        let mut rest = signature.as_str();
        while !rest.is_empty() {
            let (one, tail) = split_type(rest, 0)?;
            message.body.push(reader.value(one, 0)?);
            rest = tail;
        }
        if reader.at != reader.bytes.len() {
            return Err(Malformed("bytes after the body"));
        }
        Ok(message)
    }

    /// Fills in the header's fields; gives back the signature of the body.
    fn take_fields(&mut self, fields: Value) -> Read<String> {
        let mut signature = String::new();
        let Value::Array(_, fields) = fields else {
            return Err(Malformed("header fields"));
        };
        for field in fields {
            let Value::Struct(pair) = field else {
                return Err(Malformed("header field"));
            };
            let Ok([Value::Byte(code), Value::Variant(value)]) = <[Value; 2]>::try_from(pair)
            else {
                return Err(Malformed("header field"));
            };
            let place = match (code, *value) {
                (1, Value::Path(text)) => (&mut self.path, text),
                (2, Value::Text(text)) => (&mut self.interface, text),
                (3, Value::Text(text)) => (&mut self.member, text),
                (4, Value::Text(text)) => (&mut self.error, text),
                (5, Value::U32(serial)) => {
                    self.reply_to = serial;
                    continue;
                }
                (6, Value::Text(text)) => (&mut self.destination, text),
                (7, Value::Text(text)) => (&mut self.sender, text),
                (8, Value::Signature(text)) => (&mut signature, text),
                (0..=8, _) => return Err(Malformed("type of a header field")),
                // Unknown fields are to be ignored.
                _ => continue,
            };
            *place.0 = place.1;
        }
        Ok(signature)
    }
}

fn is_big(mark: u8) -> Read<bool> {
    match mark {
        LITTLE => Ok(false),
        b'B' => Ok(true),
        _ => Err(Malformed("byte order")),
    }
}

/// The alignment of a type, by the first letter of its signature.
fn alignment(letter: u8) -> usize {
    match letter {
        b'y' | b'g' | b'v' => 1,
        b'n' | b'q' => 2,
        b'x' | b't' | b'd' | b'(' | b'{' => 8,
        _ => 4,
    }
}

/// The first complete type of a signature, and the rest.
pub fn split_type(signature: &str, depth: usize) -> Read<(&str, &str)> {
    if depth > MAX_DEPTH {
        return Err(Malformed("depth of a signature"));
    }
    let letters = signature.as_bytes();
    let end = match letters.first() {
        None => return Err(Malformed("end of a signature")),
        Some(b'y' | b'b' | b'n' | b'q' | b'i' | b'u' | b'x' | b't' | b'd' | b's' | b'o' | b'g')
        | Some(b'v' | b'h') => 1,
        Some(b'a') => 1 + split_type(&signature[1..], depth + 1)?.0.len(),
        Some(open @ (b'(' | b'{')) => {
            let close = if *open == b'(' { ')' } else { '}' };
            let mut rest = &signature[1..];
            let mut members = 0;
            while !rest.starts_with(close) {
                rest = split_type(rest, depth + 1)?.1;
                members += 1;
            }
            if members == 0 || (close == '}' && members != 2) {
                return Err(Malformed("members of a container"));
            }
            signature.len() - rest.len() + 1
        }
        Some(_) => return Err(Malformed("letter in a signature")),
    };
    Ok(signature.split_at(end))
}

#[derive(Default)]
struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, number: u32) {
        self.pad(4);
        self.bytes.extend(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.bytes.push(text.len() as u8);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Byte(byte) => self.bytes.push(*byte),
            Value::Bool(flag) => self.u32(u32::from(*flag)),
            Value::I16(number) => self.number(&number.to_le_bytes()),
            Value::U16(number) => self.number(&number.to_le_bytes()),
            Value::I32(number) => self.number(&number.to_le_bytes()),
            Value::U32(number) => self.u32(*number),
            Value::I64(number) => self.number(&number.to_le_bytes()),
            Value::U64(number) => self.number(&number.to_le_bytes()),
            Value::Double(number) => self.number(&number.to_le_bytes()),
            Value::Text(text) | Value::Path(text) => self.text(text),
            Value::Signature(text) => self.signature(text),
            Value::Array(element, items) => {
                self.u32(0);
                let length_at = self.bytes.len() - 4;
                // The padding before the first element does not count.
                self.pad(element.bytes().next().map_or(1, alignment));
                let start = self.bytes.len();
                items.iter().for_each(|item| self.value(item));
                let length = (self.bytes.len() - start) as u32;
                self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
            }
            Value::Struct(fields) => {
                self.pad(8);
                fields.iter().for_each(|field| self.value(field));
            }
            Value::Entry(key, value) => {
                self.pad(8);
                self.value(key);
                self.value(value);
            }
            Value::Variant(inner) => {
                self.signature(&inner.signature());
                self.value(inner);
            }
        }
    }

    fn number(&mut self, bytes: &[u8]) {
        self.pad(bytes.len());
        self.bytes.extend(bytes);
    }
}

struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    big: bool,
}

impl<'a> Decoder<'a> {
    fn take(&mut self, count: usize) -> Read<&'a [u8]> {
        let end = self.at.checked_add(count).ok_or(Malformed("length"))?;
        let bytes = self.bytes.get(self.at..end).ok_or(Malformed("too short"))?;
        self.at = end;
        Ok(bytes)
    }

    fn pad(&mut self, to: usize) -> Read<()> {
        let padding = self.take(self.at.next_multiple_of(to) - self.at)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Malformed("padding"));
        }
        Ok(())
    }

    fn byte(&mut self) -> Read<u8> {
        Ok(self.take(1)?[0])
    }

    fn number<const N: usize>(&mut self) -> Read<[u8; N]> {
        self.pad(N)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        if self.big {
            bytes.reverse();
        }
        Ok(bytes)
    }

    fn u32(&mut self) -> Read<u32> {
        Ok(u32::from_le_bytes(self.number()?))
    }

    fn string(&mut self, length: usize) -> Read<String> {
        let text = self.take(length)?;
        if self.byte()? != 0 || text.contains(&0) {
            return Err(Malformed("end of a string"));
        }
        String::from_utf8(text.to_vec()).map_err(|_| Malformed("a string is not UTF-8"))
    }

    fn text(&mut self) -> Read<String> {
        let length = self.u32()? as usize;
        self.string(length)
    }

    fn signature(&mut self) -> Read<String> {
        let length = self.byte()?;
        self.string(usize::from(length))
    }

    /// A value of one complete type.
    fn value(&mut self, signature: &str, depth: usize) -> Read<Value> {
        if depth > MAX_DEPTH {
            return Err(Malformed("depth of a value"));
        }
        let letter = *signature.as_bytes().first().ok_or(Malformed("signature"))?;
        Ok(match letter {
            b'y' => Value::Byte(self.byte()?),
            b'b' => match self.u32()? {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                _ => return Err(Malformed("a boolean")),
            },
            b'n' => Value::I16(i16::from_le_bytes(self.number()?)),
            b'q' => Value::U16(u16::from_le_bytes(self.number()?)),
            b'i' => Value::I32(i32::from_le_bytes(self.number()?)),
            // h: the index of a descriptor; we never agree to receive any.
            b'u' | b'h' => Value::U32(self.u32()?),
            b'x' => Value::I64(i64::from_le_bytes(self.number()?)),
            b't' => Value::U64(u64::from_le_bytes(self.number()?)),
            b'd' => Value::Double(f64::from_le_bytes(self.number()?)),
            b's' => Value::Text(self.text()?),
            b'o' => Value::Path(self.text()?),
            b'g' => Value::Signature(self.signature()?),
            b'a' => self.array(&signature[1..], depth)?,
            b'(' | b'{' => {
                self.pad(8)?;
                let mut members = Vec::new();
                let mut rest = &signature[1..signature.len() - 1];
                while !rest.is_empty() {
                    let (one, tail) = split_type(rest, depth)?;
                    members.push(self.value(one, depth + 1)?);
                    rest = tail;
                }
                if letter == b'(' {
                    return Ok(Value::Struct(members));
                }
                let [key, value] = <[Value; 2]>::try_from(members)
                    .map_err(|_| Malformed("members of a container"))?;
                Value::Entry(Box::new(key), Box::new(value))
            }
            b'v' => {
                let signature = self.signature()?;
                let (one, rest) = split_type(&signature, depth)?;
                if !rest.is_empty() {
                    return Err(Malformed("signature of a variant"));
                }
                self.value(one, depth + 1)?.variant()
            }
            _ => return Err(Malformed("letter in a signature")),
        })
    }

    fn array(&mut self, element: &str, depth: usize) -> Read<Value> {
        let length = self.u32()? as usize;
        self.pad(element.bytes().next().map_or(1, alignment))?;
        let end = self.at.checked_add(length).ok_or(Malformed("length"))?;
        if end > self.bytes.len() {
            return Err(Malformed("length of an array"));
        }
        let mut items = Vec::new();
        while self.at < end {
            items.push(self.value(element, depth + 1)?);
        }
        if self.at != end {
            return Err(Malformed("length of an array"));
        }
        Ok(Value::Array(element.to_owned(), items))
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
