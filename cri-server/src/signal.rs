//! Owns the values of CRI's signals. Pure; the names and numbers are in `coracle_oci::signal`.

use coracle_oci::signal::{NAMED, RTMAX, RTMIN, name, parse};

/// The signal of a value of CRI's enum; `None` for "the runtime's default" and unknown values.
pub fn from_cri(value: i32) -> Option<i32> {
    match value {
        1..=34 => NAMED
            .get(usize::try_from(value).ok()? - 1)
            .map(|(_, number)| *number),
        // RTMIN .. RTMIN+15, RTMAX-14 .. RTMAX, without a gap.
        35..=65 => Some(RTMIN + value - 35),
        _ => None,
    }
}

/// The value of CRI's enum for a signal; 0 when it has none.
pub fn to_cri(signal: i32) -> i32 {
    let position = name(signal).and_then(|usual| NAMED.iter().position(|(name, _)| *name == usual));
    match position {
        Some(at) => i32::try_from(at).unwrap_or(-1) + 1,
        None if (RTMIN..=RTMAX).contains(&signal) => signal - RTMIN + 35,
        None => 0,
    }
}

/// The signal that an image names: `SIGTERM`, `term`, `15`, `RTMIN+3`.
pub fn from_name(text: &str) -> Option<i32> {
    parse(text).filter(|number| (1..=RTMAX).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cri_values_match_the_api() {
        for (value, signal) in [
            (13, 9),
            (23, 15),
            (29, 10),
            (35, 34),
            (50, 49),
            (51, 50),
            (65, 64),
        ] {
            assert_eq!(from_cri(value), Some(signal));
            assert_eq!(to_cri(signal), value);
        }
        assert_eq!(from_cri(0), None);
        assert_eq!(from_cri(66), None);
        assert_eq!(to_cri(libc::SIGCHLD), 4);
    }

    #[test]
    fn image_names() {
        for (text, signal) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-14", Some(50)),
            ("SIGNOTHING", None),
            ("0", None),
            ("65", None),
            ("RTMIN+99", None),
        ] {
            assert_eq!(from_name(text), signal, "{text}");
        }
    }
}
