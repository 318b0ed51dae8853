//! Estimates for the next cold start from the recent ones.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ColdStart, Phase};

/// Durations of a route's recent cold starts of one kind that became ready.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Estimates {
    /// Number of cold starts in the sample.
    pub count: usize,
    /// From the first request until the target takes requests.
    pub until_ready: Estimate,
    /// Every phase that occurred, in order. The medians need not sum to the median of the whole.
    pub phases: Vec<PhaseEstimate>,
}

/// Distribution of a duration over the sample.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Estimate {
    /// Median.
    pub median_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
}

/// Duration of a phase over the sample.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct PhaseEstimate {
    /// The phase.
    pub name: Phase,
    /// Duration, over the cold starts that had the phase.
    #[serde(flatten)]
    pub took: Estimate,
}

// === impl Estimates ===

impl Estimates {
    /// Recent cold starts in the sample, at most.
    pub const SAMPLE_SIZE: usize = 20;

    /// Computes the estimates; `None` without records.
    pub(super) fn of(records: &[&ColdStart]) -> Option<Self> {
        let until_ready = records.iter().filter_map(|record| record.t_actuation_ms).collect();
        let phases = Phase::ALL.into_iter().filter_map(|name| {
            let took = records.iter().filter_map(|record| record.phase(name)).map(|span| span.duration_ms);
            Some(PhaseEstimate { name, took: Estimate::of(took.collect())? })
        });
        let phases = phases.collect();
        Some(Self { count: records.len(), until_ready: Estimate::of(until_ready)?, phases })
    }

    /// Estimates the time until ready when `phase` has run for `in_phase`; `None` beyond the 90th percentile.
    pub fn left(&self, phase: Phase, in_phase: Duration) -> Option<Duration> {
        let later: f64 = self
            .phases
            .iter()
            .filter(|one| one.name > phase && one.name.is_activation())
            .map(|one| one.took.median_ms)
            .sum();
        let of_this = match self.phases.iter().find(|one| one.name == phase) {
            Some(one) if phase.is_activation() => one.took.left(in_phase)?,
            // The phase is not in the sample.
            _ => Duration::ZERO,
        };
        Some(of_this + ms(later))
    }
}

// === impl Estimate ===

impl Estimate {
    fn of(mut all: Vec<f64>) -> Option<Self> {
        all.sort_by(f64::total_cmp);
        // Nearest rank, without interpolation.
        let rank = |share: f64| all.get(((share * all.len() as f64).ceil() as usize).max(1) - 1).copied();
        Some(Self { median_ms: rank(0.5)?, p90_ms: rank(0.9)? })
    }

    /// Estimates the time left after `elapsed`: up to the median, else to the 90th percentile; `None` beyond that.
    pub fn left(&self, elapsed: Duration) -> Option<Duration> {
        [self.median_ms, self.p90_ms]
            .map(ms)
            .into_iter()
            .find(|usual| *usual > elapsed)
            .map(|usual| usual - elapsed)
    }
}

fn ms(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_sums_rest_of_phase_and_later_medians() {
        let records: Vec<_> = (1..=10)
            .map(|i| {
                ColdStart::of_phases(&[
                    (Phase::Signal, 1.0),
                    (Phase::Start, 100.0),
                    (Phase::Load, 1000.0 * f64::from(i)),
                ])
            })
            .collect();
        let all = Estimates::of(&records.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(
            (all.until_ready.median_ms, all.until_ready.p90_ms),
            (5101.0, 9101.0),
            "ranks 5 and 9 of 10"
        );
        let left = |phase, ms| all.left(phase, Duration::from_millis(ms)).map(|left| left.as_millis());
        assert_eq!(left(Phase::Start, 40), Some(60 + 5000));
        assert_eq!(left(Phase::Load, 2000), Some(3000), "the median");
        assert_eq!(left(Phase::Load, 6000), Some(3000), "beyond the median: the 90th percentile");
        assert_eq!(left(Phase::Load, 9000), None, "beyond the 90th percentile");
        assert_eq!(
            left(Phase::Pull, 7000),
            Some(100 + 5000),
            "not in the sample: only the later phases count"
        );
        assert_eq!(left(Phase::Dispatch, 1), Some(0));
        assert_eq!(Estimates::of(&[]), None);
    }
}
