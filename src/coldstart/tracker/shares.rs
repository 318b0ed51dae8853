//! The time of a held request, split by the phases of the cold start that it waited for.

use std::time::Duration;

use tokio::time::Instant;

use super::Tracker;
use crate::coldstart::{ColdStart, Phase};

impl Tracker {
    /// Returns the id of the running cold start, or else of the last one.
    pub fn latest_id(&self) -> Option<u64> {
        let state = self.state.lock();
        let active = state.active.as_ref().map(|active| active.id);
        active.or_else(|| self.last.load().as_ref().map(|last| last.record.id))
    }

    /// Returns the last cold start that ended, then a snapshot of the running one, each with its start: those that a
    /// request can have waited for.
    pub fn last_two(&self) -> impl Iterator<Item = (Instant, ColdStart)> {
        let state = self.state.lock();
        let tally = self.tally.load_full();
        let now = state.active.as_ref().map(|active| {
            (active.began, self.record(active, &state.observations, &tally, Some(Instant::now())))
        });
        let last = self.last.load();
        drop(state);
        last.as_ref().map(|last| (last.began, last.record.clone())).into_iter().chain(now)
    }

    /// Splits these disjoint times by the phases of the running and the last cold start, as far as known. A phase of
    /// no duration within the times has a share of zero. The remainder was spent waiting for a free slot at an
    /// endpoint.
    pub fn shares(&self, times: &[(Instant, Instant)]) -> Vec<(Phase, Duration)> {
        let state = self.state.lock();
        let now = state.active.as_ref().map(|active| {
            let pod = state.observations.pod(active);
            (active.began, active.timeline(&state.observations, pod).spans())
        });
        let last = self.last.load();
        drop(state);
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
