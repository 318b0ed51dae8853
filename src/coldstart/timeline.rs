//! From what was seen, by whatever clock, to phases that follow each other; pure.
//!
//! Our own marks are exact. What happened elsewhere had happened when we saw it, and after what caused it. A stamp of
//! another clock narrows that: all stamps of one clock together bound how far it is from ours.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{PartSpan, Phase, PhaseSpan};
use crate::state::{PartSeen, Seen, Stamp};

/// What is known of a cold start.
pub(super) struct Known<'a> {
    /// The first request, by both clocks of ours.
    pub(super) began: Instant,
    pub(super) wall: SystemTime,
    /// Which phases are over by our own doing.
    pub(super) ours: &'a [(Phase, Instant)],
    /// Which ones somebody else brought to an end.
    pub(super) seen: Vec<(Phase, &'a Seen)>,
    pub(super) parts: Vec<&'a PartSeen>,
    /// What runs still, and until when it is told of.
    pub(super) running: Option<(Phase, Instant)>,
}

/// How far a clock of a cluster may be from ours. What is said to have happened longer ago than that before the first
/// request was not a part of the cold start, however late we saw it.
const SKEW: i128 = 60_000_000_000;

/// The end of a phase, in nanoseconds since the beginning.
struct End<'a> {
    latest: i128,
    earliest: i128,
    stamp: Option<&'a Stamp>,
    is_exact: bool,
}

/// How far a clock is ahead of ours, at the least and at the most.
#[derive(Clone, Copy)]
struct Ahead {
    least: i128,
    most: i128,
}

// === impl Known ===

impl Known<'_> {
    /// The phases in order, the parts in them. They follow each other without gap or overlap.
    pub(super) fn spans(&self) -> Vec<PhaseSpan> {
        let mut ends = self.ends();
        self.narrow(&mut ends);
        // What was over when something later was seen was over before that.
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

    fn ends(&self) -> BTreeMap<Phase, End<'_>> {
        let mut ends = BTreeMap::new();
        for (phase, at) in self.ours {
            let at = self.since(*at).max(0);
            ends.insert(*phase, End { latest: at, earliest: at, stamp: None, is_exact: true });
        }
        for (phase, seen) in &self.seen {
            let at = self.since(seen.at);
            let stamp = seen.stamp.as_ref();
            let long_ago = stamp.is_some_and(|stamp| self.by(stamp) + nanos(stamp.resolution) < -SKEW);
            if at >= 0 && !long_ago {
                // It came after what we had done before it.
                let before = self.ours.iter().filter(|(ours, _)| ours < phase).map(|(_, at)| self.since(*at));
                let earliest = before.max().unwrap_or(0).clamp(0, at);
                ends.entry(*phase).or_insert(End { latest: at, earliest, stamp, is_exact: false });
            }
        }
        ends
    }

    /// Takes the stamps into account, of those clocks whose stamps agree with what we saw.
    fn narrow(&self, ends: &mut BTreeMap<Phase, End<'_>>) {
        let mut clocks: HashMap<Arc<str>, Ahead> = HashMap::new();
        for end in ends.values() {
            let Some(stamp) = end.stamp else { continue };
            let (from, until) = (self.by(stamp), self.by(stamp) + nanos(stamp.resolution));
            let ahead = Ahead { least: from - end.latest, most: until - end.earliest };
            let all = clocks.entry(stamp.clock.clone()).or_insert(ahead);
            *all = Ahead { least: all.least.max(ahead.least), most: all.most.min(ahead.most) };
        }
        for end in ends.values_mut() {
            let Some(stamp) = end.stamp else { continue };
            let Some(ahead) = clocks.get(&stamp.clock).filter(|ahead| ahead.least <= ahead.most) else {
                continue;
            };
            let (from, until) = (self.by(stamp), self.by(stamp) + nanos(stamp.resolution));
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

    /// Since the beginning, by our clock.
    fn since(&self, at: Instant) -> i128 {
        match at.checked_duration_since(self.began) {
            Some(after) => nanos(after),
            None => -nanos(self.began - at),
        }
    }

    /// Since the beginning, by another clock.
    fn by(&self, stamp: &Stamp) -> i128 {
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
