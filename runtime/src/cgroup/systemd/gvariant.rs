//! Values in the GVariant text format, as the annotations `org.systemd.property.*` hold them. Pure.
//!
//! <https://docs.gtk.org/glib/gvariant-text-format.html>: every type that D-Bus has. Stricter where
//! that guesses: an array's first element decides the type of all.

use super::wire::{Value, split_type};

const MAX_DEPTH: usize = 32;

type Parsed<T> = std::result::Result<T, String>;

/// Parses one value.
///
/// # Errors
/// The text is no value, or has something after it.
pub fn parse(text: &str) -> Parsed<Value> {
    let mut parser = Parser { rest: text };
    let value = parser.value(None, 0)?;
    parser.space();
    match parser.rest {
        "" => Ok(value),
        rest => Err(format!("unexpected {rest:?} after the value")),
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn eat(&mut self, token: char) -> bool {
        self.space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: char) -> Parsed<()> {
        if self.eat(token) {
            return Ok(());
        }
        Err(format!("expected {token:?} before {:?}", self.rest))
    }

    fn word(&mut self) -> &'a str {
        let end = self
            .rest
            .find(|c: char| !c.is_ascii_alphanumeric() && !"+-._".contains(c))
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn value(&mut self, expected: Option<&str>, depth: usize) -> Parsed<Value> {
        if depth > MAX_DEPTH {
            return Err("too deeply nested".to_owned());
        }
        self.space();
        let value = match self.rest.bytes().next() {
            None => return Err("no value".to_owned()),
            Some(b'@') => self.annotated(depth)?,
            Some(b'\'' | b'"') => text_value(self.string()?, expected)?,
            Some(b'b') if matches!(self.rest.as_bytes().get(1), Some(b'\'' | b'"')) => {
                self.rest = &self.rest[1..];
                let mut bytes = self.string()?.into_bytes();
                bytes.push(0);
                Value::bytes(&bytes)
            }
            Some(b'[') => self.array(expected, depth)?,
            Some(b'(') => self.tuple(expected, depth)?,
            Some(b'{') => self.dictionary(expected, depth)?,
            Some(b'<') => {
                self.expect('<')?;
                let inner = self.value(None, depth + 1)?;
                self.expect('>')?;
                inner.variant()
            }
            Some(_) => self.plain(expected, depth)?,
        };
        match expected {
            Some(expected) if value.signature() != expected => Err(format!(
                "a value of type {:?} where {expected:?} belongs",
                value.signature()
            )),
            _ => Ok(value),
        }
    }

    /// `@au [1, 2]`
    fn annotated(&mut self, depth: usize) -> Parsed<Value> {
        self.expect('@')?;
        let (signature, rest) = split_type(self.rest, 0).map_err(|error| error.0.to_owned())?;
        self.rest = rest;
        self.value(Some(signature), depth + 1)
    }

    /// Booleans, numbers, and values that a word gives a type.
    fn plain(&mut self, expected: Option<&str>, depth: usize) -> Parsed<Value> {
        let word = self.word();
        let typed = match word {
            "" => return Err(format!("no value before {:?}", self.rest)),
            "true" => return Ok(Value::Bool(true)),
            "false" => return Ok(Value::Bool(false)),
            "boolean" => "b",
            "byte" => "y",
            "int16" => "n",
            "uint16" => "q",
            "int32" => "i",
            "uint32" => "u",
            "int64" => "x",
            "uint64" => "t",
            "double" => "d",
            "string" => "s",
            "objectpath" => "o",
            "signature" => "g",
            number => return parse_number(number, expected),
        };
        self.value(Some(typed), depth + 1)
    }

    fn array(&mut self, expected: Option<&str>, depth: usize) -> Parsed<Value> {
        let mut element = expected
            .and_then(|signature| signature.strip_prefix('a'))
            .map(str::to_owned);
        self.expect('[')?;
        let mut items = Vec::new();
        while !self.eat(']') {
            if !items.is_empty() {
                self.expect(',')?;
            }
            let item = self.value(element.as_deref(), depth + 1)?;
            element.get_or_insert_with(|| item.signature());
            items.push(item);
        }
        match element {
            Some(element) => Ok(Value::Array(element, items)),
            None => Err("an empty array needs a type: @as []".to_owned()),
        }
    }

    fn tuple(&mut self, expected: Option<&str>, depth: usize) -> Parsed<Value> {
        let mut types = expected
            .and_then(|signature| signature.strip_prefix('(')?.strip_suffix(')'))
            .map(str::to_owned);
        self.expect('(')?;
        let mut fields = Vec::new();
        while !self.eat(')') {
            if !fields.is_empty() {
                self.expect(',')?;
                // A tuple of one has a comma after it.
                if self.eat(')') {
                    break;
                }
            }
            let field = match types.as_deref() {
                None => self.value(None, depth + 1)?,
                Some(rest) => {
                    let (one, tail) =
                        split_type(rest, 0).map_err(|_| "too many fields".to_owned())?;
                    let field = self.value(Some(one), depth + 1)?;
                    types = Some(tail.to_owned());
                    field
                }
            };
            fields.push(field);
        }
        if fields.is_empty() {
            return Err("D-Bus has no empty tuple".to_owned());
        }
        Ok(Value::Struct(fields))
    }

    fn dictionary(&mut self, expected: Option<&str>, depth: usize) -> Parsed<Value> {
        let mut types = match expected.and_then(|s| s.strip_prefix("a{")?.strip_suffix('}')) {
            None => None,
            Some(pair) => {
                let (key, value) = split_type(pair, 0).map_err(|error| error.0.to_owned())?;
                Some((key.to_owned(), value.to_owned()))
            }
        };
        self.expect('{')?;
        let mut entries = Vec::new();
        while !self.eat('}') {
            if !entries.is_empty() {
                self.expect(',')?;
            }
            let key = self.value(types.as_ref().map(|pair| &*pair.0), depth + 1)?;
            self.expect(':')?;
            let value = self.value(types.as_ref().map(|pair| &*pair.1), depth + 1)?;
            types.get_or_insert_with(|| (key.signature(), value.signature()));
            entries.push(Value::Entry(Box::new(key), Box::new(value)));
        }
        match types {
            Some((key, _)) if key.len() != 1 || key == "v" => {
                Err("the keys of a dictionary are of a basic type".to_owned())
            }
            Some((key, value)) => Ok(Value::Array(format!("{{{key}{value}}}"), entries)),
            None => Err("an empty dictionary needs a type: @a{sv} {}".to_owned()),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let mut letters = self.rest.chars();
        let quote = letters.next();
        let mut out = String::new();
        loop {
            match letters.next() {
                None => return Err("a string without its closing quote".to_owned()),
                letter if letter == quote => break,
                Some('\\') => out.push(escape(&mut letters)?),
                Some('\0') => return Err("a string with a zero byte".to_owned()),
                Some(letter) => out.push(letter),
            }
        }
        self.rest = letters.as_str();
        Ok(out)
    }
}

fn escape(letters: &mut std::str::Chars<'_>) -> Parsed<char> {
    let letter = letters.next().ok_or("a string ends in a backslash")?;
    let digits = match letter {
        'a' => return Ok('\x07'),
        'b' => return Ok('\x08'),
        'f' => return Ok('\x0c'),
        'n' => return Ok('\n'),
        'r' => return Ok('\r'),
        't' => return Ok('\t'),
        'v' => return Ok('\x0b'),
        'u' => 4,
        'U' => 8,
        other => return Ok(other),
    };
    let text = letters.as_str();
    let code = text
        .get(..digits)
        .and_then(|hex| u32::from_str_radix(hex, 16).ok())
        .and_then(char::from_u32)
        .filter(|code| *code != '\0')
        .ok_or_else(|| format!("\\{letter} without the number of a character"))?;
    *letters = text[digits..].chars();
    Ok(code)
}

fn text_value(text: String, expected: Option<&str>) -> Parsed<Value> {
    match expected {
        Some("o") => {
            let parts = text
                .strip_prefix('/')
                .ok_or("an object path begins with /")?;
            let fits = |part: &str| {
                !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            };
            if !parts.is_empty() && !parts.split('/').all(fits) {
                return Err(format!("{text:?} is no object path"));
            }
            Ok(Value::Path(text))
        }
        Some("g") => {
            let mut rest = text.as_str();
            while !rest.is_empty() {
                rest = split_type(rest, 0)
                    .map_err(|_| format!("{text:?} is no signature"))?
                    .1;
            }
            Ok(Value::Signature(text))
        }
        _ => Ok(Value::Text(text)),
    }
}

fn parse_number(word: &str, expected: Option<&str>) -> Parsed<Value> {
    let has_point = word.contains('.') || (!word.contains("0x") && word.contains(['e', 'E']));
    let wanted = match expected {
        Some(expected) => expected,
        None if has_point => "d",
        None => "i",
    };
    let invalid = || format!("{word:?} is no value of type {wanted:?}");
    if wanted == "d" {
        let starts_well = word.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
        let number = word.parse().ok().filter(|_| starts_well);
        return number.map(Value::Double).ok_or_else(invalid);
    }
    let number = integer(word).ok_or_else(invalid)?;
    let value = match wanted {
        "y" => u8::try_from(number).ok().map(Value::Byte),
        "n" => i16::try_from(number).ok().map(Value::I16),
        "q" => u16::try_from(number).ok().map(Value::U16),
        "i" => i32::try_from(number).ok().map(Value::I32),
        "u" => u32::try_from(number).ok().map(Value::U32),
        "x" => i64::try_from(number).ok().map(Value::I64),
        "t" => u64::try_from(number).ok().map(Value::U64),
        _ => None,
    };
    value.ok_or_else(invalid)
}

/// Decimal, `0x1f` or, with a leading zero, octal.
fn integer(word: &str) -> Option<i128> {
    let (negative, digits) = match word.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, word.strip_prefix('+').unwrap_or(word)),
    };
    let (digits, radix) = match (digits.strip_prefix("0x"), digits.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) if !digits.is_empty() => (digits, 8),
        _ => (digits, 10),
    };
    if digits.starts_with(['+', '-']) || digits.len() > 32 {
        return None;
    }
    let number = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -number } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_table() {
        let cases: Vec<(&str, Value)> = vec![
            ("true", Value::Bool(true)),
            ("boolean false", Value::Bool(false)),
            ("42", Value::I32(42)),
            ("-0x10", Value::I32(-16)),
            ("010", Value::I32(8)),
            ("1.5", Value::Double(1.5)),
            ("2e3", Value::Double(2000.0)),
            ("uint64 123456789", Value::U64(123_456_789)),
            ("uint64 18446744073709551615", Value::U64(u64::MAX)),
            ("int16 -5", Value::I16(-5)),
            ("byte 0xff", Value::Byte(255)),
            ("@t 7", Value::U64(7)),
            ("double 3", Value::Double(3.0)),
            ("'inactive-or-failed'", Value::text("inactive-or-failed")),
            (r#""a\"\u00e9\n""#, Value::text("a\"\u{e9}\n")),
            ("b'ab'", Value::bytes(b"ab\0")),
            ("objectpath '/a/b'", Value::Path("/a/b".into())),
            ("signature 'a{sv}'", Value::Signature("a{sv}".into())),
            ("['a', 'b']", Value::texts(["a", "b"])),
            (
                "[uint32 1, 2]",
                Value::Array("u".into(), vec![Value::U32(1), Value::U32(2)]),
            ),
            ("@as []", Value::texts([])),
            (
                "@a(ss) [('/dev/null', 'rw')]",
                Value::Array(
                    "(ss)".into(),
                    vec![Value::Struct(vec![
                        Value::text("/dev/null"),
                        Value::text("rw"),
                    ])],
                ),
            ),
            ("(1,)", Value::Struct(vec![Value::I32(1)])),
            ("<'x'>", Value::text("x").variant()),
            (
                "{'a': <1>}",
                Value::Array(
                    "{sv}".into(),
                    vec![Value::Entry(
                        Box::new(Value::text("a")),
                        Box::new(Value::I32(1).variant()),
                    )],
                ),
            ),
        ];
        for (text, want) in cases {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_no_value_is_refused() {
        for text in [
            "",
            " ",
            "abc",
            "'a",
            "'a\\",
            "[]",
            "[1, 'a']",
            "{}",
            "()",
            "true true",
            "1 2",
            "uint32 -1",
            "byte 256",
            "int32 'a'",
            "@u 'a'",
            "@z 1",
            "@as [1]",
            "[1 2]",
            "<1",
            "uint64 18446744073709551616",
            "objectpath 'a'",
            "objectpath '/a//b'",
            "signature '('",
            "nan",
            "inf",
            "0x",
            "--1",
            "'\\u00'",
            "{<1>: 2}",
            "'a\0b'",
            "boolean 1",
        ] {
            assert!(parse(text).is_err(), "{text:?}: {:?}", parse(text));
        }
        assert!(parse(&"[".repeat(1000)).is_err());
        assert!(parse(&"@".repeat(1000)).is_err());
        assert!(parse(&"<".repeat(1000)).is_err());
    }
}
