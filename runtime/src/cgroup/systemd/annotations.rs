//! `org.systemd.property.*` annotations: properties for the container's unit. Pure.

use std::collections::{BTreeMap, HashMap};

use super::gvariant;
use super::manager::Property;
use super::wire::Value;
use crate::error::{Error, Result};

const PREFIX: &str = "org.systemd.property.";

/// The properties, in the order of their names.
///
/// # Errors
/// A name or a value is malformed.
pub fn properties(annotations: Option<&HashMap<String, String>>) -> Result<Vec<Property>> {
    let sorted: BTreeMap<_, _> = annotations.into_iter().flatten().collect();
    let mut out = Vec::new();
    for (key, text) in sorted {
        let Some(name) = key.strip_prefix(PREFIX) else {
            continue;
        };
        let refuse = |why: String| {
            Error::invalid(format!("annotation {key}={text} value parse error: {why}"))
        };
        check_name(name)
            .map_err(|why| Error::invalid(format!("annotation {key} name incorrect: {why}")))?;
        let value = gvariant::parse(text).map_err(refuse)?;
        out.push(match seconds(name) {
            Some(stem) => (
                format!("{stem}USec"),
                microseconds(&value).ok_or_else(|| refuse("not a number".to_owned()))?,
            ),
            None => (name.to_owned(), value),
        });
    }
    Ok(out)
}

fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    if name.len() < 3 {
        return Err("too short");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return Err("contains non-alphabetic character");
    }
    Ok(())
}

/// `TimeoutStopSec` is how unit files say it; on D-Bus it is `TimeoutStopUSec`.
fn seconds(name: &str) -> Option<&str> {
    let stem = name.strip_suffix("Sec")?;
    stem.ends_with(|letter: char| letter.is_ascii_lowercase())
        .then_some(stem)
}

fn microseconds(value: &Value) -> Option<Value> {
    let seconds: i128 = match value {
        Value::Byte(number) => (*number).into(),
        Value::I16(number) => (*number).into(),
        Value::U16(number) => (*number).into(),
        Value::I32(number) => (*number).into(),
        Value::U32(number) => (*number).into(),
        Value::I64(number) => (*number).into(),
        Value::U64(number) => (*number).into(),
        Value::Double(number) if number.is_finite() && *number >= 0.0 => {
            return Some(Value::U64((number * 1e6) as u64));
        }
        _ => return None,
    };
    u64::try_from(seconds.checked_mul(1_000_000)?)
        .ok()
        .map(Value::U64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Vec<Property>> {
        let map = pairs
            .iter()
            .map(|(key, text)| ((*key).to_owned(), (*text).to_owned()))
            .collect();
        properties(Some(&map))
    }

    #[test]
    fn property_table() {
        let cases: &[(&str, &str, &str, Value)] = &[
            (
                "TimeoutStopUSec",
                "uint64 123456789",
                "TimeoutStopUSec",
                Value::U64(123_456_789),
            ),
            (
                "TimeoutStopSec",
                "uint64 5",
                "TimeoutStopUSec",
                Value::U64(5_000_000),
            ),
            (
                "TimeoutStopSec",
                "1.5",
                "TimeoutStopUSec",
                Value::U64(1_500_000),
            ),
            (
                "CollectMode",
                "'inactive-or-failed'",
                "CollectMode",
                Value::text("inactive-or-failed"),
            ),
            // No lower-case letter before it: not the unit of a time.
            ("FOOSec", "1", "FOOSec", Value::I32(1)),
        ];
        for (name, text, want, value) in cases {
            let key = format!("org.systemd.property.{name}");
            let found = parse(&[(&key, text), ("other", "x")]).unwrap();
            assert_eq!(
                found,
                [((*want).to_owned(), value.clone())],
                "{name}={text}"
            );
        }
        assert_eq!(properties(None).unwrap(), []);
    }

    #[test]
    fn refusals_name_the_annotation() {
        for (name, text) in [
            ("ab", "1"),
            ("A_b", "1"),
            ("A1c", "1"),
            ("", "1"),
            ("TimeoutStopSec", "'x'"),
            ("TimeoutStopSec", "-1"),
            ("TimeoutStopSec", "int64 -1"),
            ("CollectMode", "inactive"),
            ("CollectMode", ""),
        ] {
            let key = format!("org.systemd.property.{name}");
            let error = parse(&[(&key, text)]).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("annotation {key}")),
                "{error}"
            );
        }
    }
}
