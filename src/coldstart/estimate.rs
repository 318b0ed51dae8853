//! What recent cold starts tell of the next.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ColdStart, Phase};

/// How long cold starts of a route take, by the recent ones of the same kind that got ready.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Estimates {
    /// Of how many.
    pub count: usize,
    /// From the first request until we may send to the target.
    pub until_ready: Estimate,
    /// Each phase that any of them had, in order. The medians need not sum to that of the whole.
    pub phases: Vec<PhaseEstimate>,
}

/// A duration by the recent ones.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Estimate {
    /// Half of them took no longer.
    pub median_ms: f64,
    /// Nine of ten took no longer.
    pub p90_ms: f64,
}

/// A phase by the recent ones.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct PhaseEstimate {
    /// Which.
    pub name: Phase,
    /// How long it took, where there was one.
    #[serde(flatten)]
    pub took: Estimate,
}

// === impl Estimates ===

impl Estimates {
    /// How many of the recent cold starts count.
    pub const OF: usize = 20;

    /// By these, which all got ready. None without any.
    pub(super) fn of(records: &[&ColdStart]) -> Option<Self> {
        let until_ready = records.iter().filter_map(|record| record.t_actuation_ms).collect();
        let phases = Phase::ALL.into_iter().filter_map(|name| {
            let took = records.iter().filter_map(|record| record.phase(name)).map(|span| span.duration_ms);
            Some(PhaseEstimate { name, took: Estimate::of(took.collect())? })
        });
        let phases = phases.collect();
        Some(Self { count: records.len(), until_ready: Estimate::of(until_ready)?, phases })
    }

    /// What is left until ready when `phase` has run for `in_phase`; `None` when it takes longer than in nine of ten.
    pub fn left(&self, phase: Phase, in_phase: Duration) -> Option<Duration> {
        let later: f64 = self
            .phases
            .iter()
            .filter(|one| one.name > phase && one.name.is_activation())
            .map(|one| one.took.median_ms)
            .sum();
        let of_this = match self.phases.iter().find(|one| one.name == phase) {
            Some(one) if phase.is_activation() => one.took.left(in_phase)?,
            // It is not usual, so nothing is known of it.
            _ => Duration::ZERO,
        };
        Some(of_this + ms(later))
    }
}

// === impl Estimate ===

impl Estimate {
    fn of(mut all: Vec<f64>) -> Option<Self> {
        all.sort_by(f64::total_cmp);
        // Nearest rank: a duration that was really seen.
        let rank = |share: f64| all.get(((share * all.len() as f64).ceil() as usize).max(1) - 1).copied();
        Some(Self { median_ms: rank(0.5)?, p90_ms: rank(0.9)? })
    }

    /// What is left after `elapsed`; `None` when this one takes longer than nine of ten did.
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
    fn what_is_left_is_the_rest_of_this_phase_and_the_usual_time_of_those_to_come() {
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
        assert_eq!(left(Phase::Load, 6000), Some(3000), "longer than the median: the ninth of ten");
        assert_eq!(left(Phase::Load, 9000), None, "longer than nine of ten");
        assert_eq!(left(Phase::Pull, 7000), Some(100 + 5000), "not usual: only what comes after it is known");
        assert_eq!(left(Phase::Dispatch, 1), Some(0));
        assert_eq!(Estimates::of(&[]), None);
    }
}
