//! Samples of one thing done by several programs in turn, and what may be said of them.

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// One program's samples, in milliseconds, in the order in which they were taken.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Series {
    pub program: String,
    pub millis: Vec<f64>,
}

/// Programs that did the same thing in turn. The first one is ours.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// What was timed, as a heading.
    pub what: String,
    /// From where to where the clock ran, and what it therefore leaves out.
    pub clock: String,
    pub series: Vec<Series>,
    /// Peer and the ratio of medians that we promise to stay under.
    pub goal: Option<(String, f64)>,
}

impl Series {
    /// The value that `share` (0 to 1) of the samples do not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.millis.clone();
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
        let mut series: Vec<Series> = programs
            .iter()
            .map(|p| Series {
                program: (*p).to_owned(),
                millis: Vec::with_capacity(rounds),
            })
            .collect();
        for round in 0..=rounds {
            for turn in 0..programs.len() {
                let program = (turn + round) % programs.len();
                let took = step(program, round)?;
                if round > 0 {
                    series[program].millis.push(took.as_secs_f64() * 1e3);
                }
            }
        }
        Ok(Comparison {
            what: what.to_owned(),
            clock: clock.to_owned(),
            series,
            goal: None,
        })
    }

    pub fn goal(mut self, peer: &str, ratio: f64) -> Comparison {
        self.goal = Some((peer.to_owned(), ratio));
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
        assert_eq!(taken.series[0].millis, [11.0, 12.0]);
        assert_eq!(taken.series[1].millis, [21.0, 22.0]);
    }

    #[test]
    fn median_ignores_outliers() {
        let series = Series {
            program: "a".into(),
            millis: vec![900.0, 1.0, 2.0, 3.0, 2.0],
        };
        assert_eq!(series.median(), 2.0);
        assert_eq!(series.quantile(0.0), 1.0);
        assert_eq!(series.quantile(1.0), 900.0);
    }
}
