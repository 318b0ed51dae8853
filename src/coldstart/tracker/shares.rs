//! What a request that was held spent its time on: its share of the phases of the cold start.

use std::time::Duration;

use tokio::time::Instant;

use super::Tracker;
use crate::coldstart::{ColdStart, Phase};

/// What is still asked of a cold start that has ended.
pub(super) struct Past {
    began: Instant,
    record: ColdStart,
}

impl Past {
    pub(super) const fn new(began: Instant, record: ColdStart) -> Self {
        Self { began, record }
    }
}

impl Tracker {
    /// The cold start that runs, or else the last one, by its id.
    pub fn latest(&self) -> Option<u64> {
        let active = self.active.lock();
        active
            .as_ref()
            .map(|active| active.id)
            .or_else(|| self.last.load().as_ref().map(|last| last.record.id))
    }

    /// The cold start that runs, as far as it is, and the last one before it, in order, each with when it began: what a
    /// request can have waited for.
    pub fn last_two(&self) -> impl Iterator<Item = (Instant, ColdStart)> {
        let active = self.active.lock();
        let tally = self.tally.lock().clone();
        let now =
            active.as_ref().map(|active| (active.began, self.record(active, &tally, Some(Instant::now()))));
        let last = self.last.load();
        drop(active);
        last.as_ref().map(|last| (last.began, last.record.clone())).into_iter().chain(now)
    }

    /// What of these times, which do not overlap, was spent in each phase of a cold start, as far as is known now: of the
    /// one that runs, and of the last one. A phase that took no time is told to who was there. What is left of the times
    /// was spent waiting for a turn.
    pub fn shares(&self, times: &[(Instant, Instant)]) -> Vec<(Phase, Duration)> {
        let active = self.active.lock();
        let now = active.as_ref().map(|active| {
            let observed = self.observed.lock();
            (active.began, active.known(&observed, observed.pod(active)).spans())
        });
        let last = self.last.load();
        drop(active);
        let last = last.as_ref().map(|last| (last.began, &last.record.phases));
        let mut shares = [None; Phase::ALL.len()];
        for (began, phases) in now.as_ref().map(|(began, phases)| (*began, phases)).into_iter().chain(last) {
            for span in phases.iter().filter(|span| span.name <= Phase::Dispatch) {
                let at = |ms: f64| began + Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
                let (start, end) = (at(span.start_ms), at(span.start_ms + span.duration_ms));
                for (since, until) in times {
                    let share = end.min(*until).checked_duration_since(start.max(*since));
                    if let Some(share) = share.filter(|share| !share.is_zero() || start == end) {
                        *shares[span.name as usize].get_or_insert(Duration::ZERO) += share;
                    }
                }
            }
        }
        Phase::ALL.into_iter().filter_map(|phase| Some((phase, shares[phase as usize]?))).collect()
    }
}

#[cfg(test)]
mod tests;
