//! Owns the names and numbers of signals as CRI and images write them. Pure.

/// Names in the order of CRI's enum from 1 on (SIGABRT .. SIGUSR2, and so on), with their numbers.
const NAMED: [(&str, i32); 34] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", 16),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
];

/// The first real-time signal that programs may use, as glibc counts.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

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
    // The usual name of a number comes last or alone (CHLD, not CLD; ABRT, not IOT).
    let aliases = ["CLD", "IOT", "POLL"];
    let position = NAMED
        .iter()
        .position(|(name, number)| *number == signal && !aliases.contains(name));
    match position {
        Some(at) => i32::try_from(at).unwrap_or(-1) + 1,
        None if (RTMIN..=RTMAX).contains(&signal) => signal - RTMIN + 35,
        None => 0,
    }
}

/// The signal that an image names: `SIGTERM`, `term`, `15`, `RTMIN+3`.
pub fn from_name(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<i32>().ok(),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => RTMIN + offset(rest, '+')?,
        (_, Some(rest)) => RTMAX - offset(rest, '-')?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
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
