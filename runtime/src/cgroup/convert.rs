//! The arithmetic between v1 values, which config.json speaks, and v2 files. Pure.

use crate::error::{Error, Result};

/// cpu.shares (2..=262144, default 1024) to cpu.weight (1..=10000, default 100). Zero stays unset.
///
/// A quadratic in log2(shares) through the two minima, defaults and maxima, so that the default
/// maps to the default: systemd, runc and crun agree on it.
pub(super) fn shares_to_weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1 | 2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

/// blkio.weight (10..=1000) to io.weight (1..=10000). Zero stays unset.
pub(super) fn blkio_to_io_weight(weight: u16) -> u64 {
    match weight {
        0 => 0,
        // Below the v1 range: the kernel's own minimum.
        1..=10 => 1,
        _ => 1 + (u64::from(weight) - 10) * 9999 / 990,
    }
}

/// memory+swap and memory to what memory.swap.max counts: swap alone. `None` is unset, -1 is max.
pub(super) fn swap_alone(memory_and_swap: i64, memory: i64) -> Result<Option<i64>> {
    let refuse = |text: &'static str| {
        Err(Error::invalid(format!(
            "linux.resources.memory.swap: {text}"
        )))
    };
    match (memory, memory_and_swap) {
        // Unlimited memory with swap left open: unlimited both, as v1 has it.
        (-1, 0) | (_, -1) => Ok(Some(-1)),
        (_, 0) => Ok(None),
        (-1, swap) => Ok(Some(swap)),
        (0, _) => refuse("unable to set swap limit without memory limit"),
        (memory, _) if memory < 0 => Err(Error::invalid(format!(
            "linux.resources.memory.limit: invalid value {memory}"
        ))),
        (memory, swap) if swap < memory => refuse("memory+swap limit should be >= memory limit"),
        (memory, swap) => Ok(Some(swap - memory)),
    }
}

/// A limit as v2 files spell it.
pub(super) fn limit_text(value: i64) -> String {
    if value == -1 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// pids.max: a negative limit is none. Zero becomes 1, which the kernel treats alike and systemd
/// accepts.
pub(super) fn pids_text(limit: i64) -> String {
    match limit {
        0 => "1".to_owned(),
        1.. => limit.to_string(),
        _ => "max".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_table() {
        let cases = [
            (0, 0),
            (1, 1),
            (2, 1),
            (3, 2),
            (10, 4),
            (100, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
            (500_000, 10_000),
        ];
        for (shares, weight) in cases {
            assert_eq!(shares_to_weight(shares), weight, "{shares}");
        }
    }

    #[test]
    fn io_weight_table() {
        for (blkio, io) in [
            (0, 0),
            (5, 1),
            (10, 1),
            (100, 910),
            (500, 4950),
            (1000, 10_000),
        ] {
            assert_eq!(blkio_to_io_weight(blkio), io, "{blkio}");
        }
    }

    #[test]
    fn swap_table() {
        let cases: &[(i64, i64, Option<Option<i64>>)] = &[
            (0, 0, Some(None)),
            (0, 100, Some(None)),
            (-1, 100, Some(Some(-1))),
            (-1, 0, Some(Some(-1))),
            (0, -1, Some(Some(-1))),
            (100, -1, Some(Some(100))),
            (100, 100, Some(Some(0))),
            (200, 50, Some(Some(150))),
            (50, 100, None),
            (50, 0, None),
            (50, -2, None),
        ];
        for (swap, memory, want) in cases {
            assert_eq!(swap_alone(*swap, *memory).ok(), *want, "{swap} {memory}");
        }
    }

    #[test]
    fn pids_table() {
        for (limit, text) in [
            (-1, "max"),
            (0, "1"),
            (1, "1"),
            (42, "42"),
            (i64::MIN, "max"),
        ] {
            assert_eq!(pids_text(limit), text);
        }
    }
}
