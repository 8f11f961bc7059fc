//! RFC 3339 time stamps as Go prints them (`time.RFC3339Nano`), without a calendar crate.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time as `2006-01-02T15:04:05.999999999Z`: UTC, trailing zeros of the fraction cut.
pub fn rfc3339_nano(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (year, month, day) = civil_from_days(since.as_secs() / 86_400);
    let second_of_day = since.as_secs() % 86_400;
    let (hour, minute, second) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if since.subsec_nanos() != 0 {
        let fraction = format!(".{:09}", since.subsec_nanos());
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// The present time in that form.
pub fn now_rfc3339() -> String {
    rfc3339_nano(SystemTime::now())
}

/// The Gregorian date of a day number counted from 1970-01-01: a shift to eras of 400 years that
/// begin in March, so that the leap day is the last of its year.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_table() {
        let cases: &[(u64, u32, &str)] = &[
            (0, 0, "1970-01-01T00:00:00Z"),
            (951_782_400, 0, "2000-02-29T00:00:00Z"),
            (951_868_799, 500_000_000, "2000-02-29T23:59:59.5Z"),
            (1_709_164_800, 1, "2024-02-29T00:00:00.000000001Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
            (1_795_166_132, 123_456_000, "2026-11-20T09:15:32.123456Z"),
        ];
        for (seconds, nanos, want) in cases {
            let time = UNIX_EPOCH + Duration::new(*seconds, *nanos);
            assert_eq!(rfc3339_nano(time), *want);
        }
    }
}
