//! Names and numbers of signals, as command lines, images and CRI write them.
//!
//! The numbers are those of every Linux architecture but alpha, mips, parisc and sparc.

/// Names in the order of CRI's enum, from its value 1 on.
pub const NAMED: [(&str, i32); 34] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
];

/// The first real-time signal that programs may use, as glibc counts.
pub const RTMIN: i32 = 34;
pub const RTMAX: i32 = 64;

/// A number as it stands, or a name: `9`, `KILL`, `sigkill`, `RTMIN+3`.
pub fn parse(text: &str) -> Option<i32> {
    text.parse().ok().or_else(|| from_name(text))
}

/// The signal of a name, in any case, with or without "SIG".
pub fn from_name(name: &str) -> Option<i32> {
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => RTMIN + offset(rest, '+')?,
        (_, Some(rest)) => RTMAX - offset(rest, '-')?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// The usual name of a number: CHLD and not CLD, ABRT and not IOT, IO and not POLL.
pub fn name(number: i32) -> Option<&'static str> {
    let usual = |name: &str| !matches!(name, "CLD" | "IOT" | "POLL");
    let mut names = NAMED.iter().filter(|(name, _)| usual(name));
    names
        .find(|(_, known)| *known == number)
        .map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, want) in [
            ("9", Some(9)),
            ("KILL", Some(9)),
            ("SIGKILL", Some(9)),
            ("sigterm", Some(15)),
            ("usr1", Some(10)),
            ("35", Some(35)),
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX", Some(64)),
            ("RTMAX-14", Some(50)),
            ("RTMIN+30", Some(64)),
            ("RTMIN+31", None),
            ("RTMIN+", None),
            ("RTMIN-1", None),
            ("RTMAX-31", None),
            ("", None),
            ("SIG", None),
            ("SIGSIGKILL", None),
            ("NOPE", None),
        ] {
            assert_eq!(parse(text), want, "{text:?}");
        }
    }

    #[test]
    fn every_signal_of_old_has_one_usual_name() {
        for number in 1..=31 {
            let name = name(number).unwrap();
            assert_eq!(from_name(name), Some(number), "{name}");
        }
        assert_eq!(name(17), Some("CHLD"));
        assert_eq!(name(6), Some("ABRT"));
        assert_eq!(name(29), Some("IO"));
        assert_eq!(name(0), None);
        assert_eq!(name(34), None);
    }
}
