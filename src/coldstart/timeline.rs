//! Merges events of several clocks into consecutive phases; pure.
//!
//! Phase ends marked by this proxy are exact. An event in the cluster occurred no later than this proxy observed it,
//! and after the preceding mark. Timestamps of another clock narrow that interval: together they bound the offset of
//! that clock.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{PartSpan, Phase, PhaseSpan};
use crate::state::{Observation, PartObservation, Stamp};

/// Input of the merge: the known events of one cold start.
pub(super) struct Timeline<'a> {
    /// The first request, on the monotonic clock and on the wall clock.
    pub(super) began: Instant,
    pub(super) wall: SystemTime,
    /// Ends of phases that this proxy marked itself.
    pub(super) own_marks: &'a [(Phase, Instant)],
    /// Ends of phases observed in the cluster.
    pub(super) observed: Vec<(Phase, &'a Observation)>,
    pub(super) parts: Vec<&'a PartObservation>,
    /// The unfinished phase, and the time up to which it is reported.
    pub(super) running: Option<(Phase, Instant)>,
}

/// Largest assumed offset of a cluster's clock. An event stamped longer than that before the first request is not
/// part of the cold start, even if it was observed later.
const MAX_CLOCK_SKEW_NANOS: i128 = 60_000_000_000;

/// Bounds of the end of a phase, in nanoseconds from the first request.
struct PhaseEnd<'a> {
    latest: i128,
    earliest: i128,
    stamp: Option<&'a Stamp>,
    is_exact: bool,
}

/// Bounds of the nanoseconds by which a clock is ahead of ours.
#[derive(Clone, Copy)]
struct ClockOffset {
    least: i128,
    most: i128,
}

// === impl Timeline ===

impl Timeline<'_> {
    /// Returns the phases with their parts, in order, without gap or overlap.
    pub(super) fn spans(&self) -> Vec<PhaseSpan> {
        let mut ends = self.ends();
        self.narrow(&mut ends);
        // A phase ended no later than the phases after it.
        let mut cap = i128::MAX;
        for end in ends.values_mut().rev() {
            cap = cap.min(end.latest);
            end.latest = cap;
        }
        let (mut start, mut earliest) = (0, 0);
        let mut spans = Vec::with_capacity(ends.len() + 1);
        for (phase, end) in ends {
            earliest = end.earliest.max(earliest).min(end.latest);
            let early = Some(end.latest - earliest).filter(|early| !end.is_exact && *early > 0);
            spans.push(self.span(phase, start, end.latest, early));
            start = end.latest;
        }
        if let Some((phase, until)) = self.running {
            let span = self.span(phase, start, self.since(until).max(start), None);
            spans.push(PhaseSpan { unfinished: true, ..span });
        }
        spans
    }

    fn ends(&self) -> BTreeMap<Phase, PhaseEnd<'_>> {
        let mut ends = BTreeMap::new();
        for (phase, at) in self.own_marks {
            let at = self.since(*at).max(0);
            ends.insert(*phase, PhaseEnd { latest: at, earliest: at, stamp: None, is_exact: true });
        }
        for (phase, seen) in &self.observed {
            let at = self.since(seen.at);
            let stamp = seen.stamp.as_ref();
            let long_ago = stamp.is_some_and(|stamp| {
                self.since_by_wall(stamp) + nanos(stamp.resolution) < -MAX_CLOCK_SKEW_NANOS
            });
            if at >= 0 && !long_ago {
                // The end is no earlier than our own marks of the phases before it.
                let before =
                    self.own_marks.iter().filter(|(ours, _)| ours < phase).map(|(_, at)| self.since(*at));
                let earliest = before.max().unwrap_or(0).clamp(0, at);
                ends.entry(*phase).or_insert(PhaseEnd { latest: at, earliest, stamp, is_exact: false });
            }
        }
        ends
    }

    /// Narrows the bounds by the timestamps of every clock whose timestamps are consistent with the observations.
    fn narrow(&self, ends: &mut BTreeMap<Phase, PhaseEnd<'_>>) {
        let mut clocks: HashMap<Arc<str>, ClockOffset> = HashMap::new();
        for end in ends.values() {
            let Some(stamp) = end.stamp else { continue };
            let (from, until) =
                (self.since_by_wall(stamp), self.since_by_wall(stamp) + nanos(stamp.resolution));
            let ahead = ClockOffset { least: from - end.latest, most: until - end.earliest };
            let all = clocks.entry(stamp.clock.clone()).or_insert(ahead);
            *all = ClockOffset { least: all.least.max(ahead.least), most: all.most.min(ahead.most) };
        }
        for end in ends.values_mut() {
            let Some(stamp) = end.stamp else { continue };
            let Some(ahead) = clocks.get(&stamp.clock).filter(|ahead| ahead.least <= ahead.most) else {
                continue;
            };
            let (from, until) =
                (self.since_by_wall(stamp), self.since_by_wall(stamp) + nanos(stamp.resolution));
            end.latest = end.latest.min(until - ahead.least).max(end.earliest);
            end.earliest = end.earliest.max(from - ahead.most).min(end.latest);
        }
    }

    fn span(&self, name: Phase, start: i128, end: i128, early: Option<i128>) -> PhaseSpan {
        let mut parts: Vec<_> = self.parts.iter().filter(|part| part.part.phase() == name).collect();
        parts.sort_by_key(|part| part.end);
        let mut cursor = start;
        let parts = parts.into_iter().filter_map(|part| {
            let from = part.start.map_or(cursor, |start| self.since(start)).max(cursor);
            let until = self.since(part.end).min(end);
            (from < until).then(|| {
                cursor = until;
                PartSpan { name: part.part, start_ms: ms(from), duration_ms: ms(until - from) }
            })
        });
        let parts = parts.collect();
        PhaseSpan {
            name,
            start_ms: ms(start),
            duration_ms: ms(end - start),
            early_ms: early.map(ms),
            unfinished: false,
            parts,
        }
    }

    /// Returns nanoseconds from the first request, on the monotonic clock.
    fn since(&self, at: Instant) -> i128 {
        match at.checked_duration_since(self.began) {
            Some(after) => nanos(after),
            None => -nanos(self.began - at),
        }
    }

    /// Returns nanoseconds from the first request, on the clock of the stamp.
    fn since_by_wall(&self, stamp: &Stamp) -> i128 {
        match stamp.time.duration_since(self.wall) {
            Ok(after) => nanos(after),
            Err(before) => -nanos(before.duration()),
        }
    }
}

fn nanos(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

fn ms(nanos: i128) -> f64 {
    nanos as f64 / 1e6
}

#[cfg(test)]
mod tests;
