//! Samples of one thing done by several programs in turn, and what may be said of them.

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// One program's samples, in the order in which they were taken; the unit is the comparison's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Series {
    pub program: String,
    pub samples: Vec<f64>,
}

/// Programs that did the same thing in turn. The first one is ours.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// What was timed, as a heading.
    pub what: String,
    /// From where to where the clock ran, and what it therefore leaves out.
    pub clock: String,
    /// Of every sample: "ms", "KiB", "calls".
    pub unit: String,
    pub series: Vec<Series>,
    /// Peers, and the ratio of medians to each that we promise to stay under.
    pub goals: Vec<(String, f64)>,
}

pub const MILLISECONDS: &str = "ms";

impl Series {
    /// The value that `share` (0 to 1) of the samples do not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        sorted
            .get((share * last as f64).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

impl Comparison {
    /// Runs `step(program, round)` for every program in turn; one round in front is not counted.
    /// The order rotates, so that no program always follows the same other one.
    pub fn take(
        what: &str,
        clock: &str,
        programs: &[&str],
        rounds: usize,
        mut step: impl FnMut(usize, usize) -> Result<Duration>,
    ) -> Result<Comparison> {
        let millis = |program, round| step(program, round).map(|took| took.as_secs_f64() * 1e3);
        Self::measure(what, clock, MILLISECONDS, (programs, rounds), millis)
    }

    /// The same for anything that has a number.
    pub fn measure(
        what: &str,
        clock: &str,
        unit: &str,
        (programs, rounds): (&[&str], usize),
        mut step: impl FnMut(usize, usize) -> Result<f64>,
    ) -> Result<Comparison> {
        let mut series: Vec<Series> = programs
            .iter()
            .map(|p| Series {
                program: (*p).to_owned(),
                samples: Vec::with_capacity(rounds),
            })
            .collect();
        for round in 0..=rounds {
            for turn in 0..programs.len() {
                let program = (turn + round) % programs.len();
                let value = step(program, round)?;
                if round > 0 {
                    series[program].samples.push(value);
                }
            }
        }
        Ok(Comparison {
            what: what.to_owned(),
            clock: clock.to_owned(),
            unit: unit.to_owned(),
            series,
            goals: Vec::new(),
        })
    }

    /// Adds a goal against the first peer whose name begins so; none if it did not take part.
    pub fn goal(mut self, peer: &str, ratio: f64) -> Comparison {
        let named = self.series.iter().find(|s| s.program.starts_with(peer));
        self.goals
            .extend(named.map(|series| (series.program.clone(), ratio)));
        self
    }

    /// Our median over the median of series `index`.
    pub fn ratio(&self, index: usize) -> f64 {
        self.series[0].median() / self.series[index].median()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_rotate_and_the_first_is_dropped() {
        let mut order = Vec::new();
        let taken = Comparison::take("w", "c", &["a", "b"], 2, |program, round| {
            order.push((round, program));
            Ok(Duration::from_millis(
                10 * (program as u64 + 1) + round as u64,
            ))
        })
        .expect("steps succeed");
        assert_eq!(order, [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]);
        assert_eq!(taken.series[0].samples, [11.0, 12.0]);
        assert_eq!(taken.series[1].samples, [21.0, 22.0]);
    }

    #[test]
    fn median_ignores_outliers() {
        let series = Series {
            program: "a".into(),
            samples: vec![900.0, 1.0, 2.0, 3.0, 2.0],
        };
        assert_eq!(series.median(), 2.0);
        assert_eq!(series.quantile(0.0), 1.0);
        assert_eq!(series.quantile(1.0), 900.0);
    }
}
