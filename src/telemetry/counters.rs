//! The counters of a route, one set a core, added up when they are read.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::exemplar::HistogramWithExemplars;

use super::{
    BUCKETS, Histogram, SHARDS,
    histogram::{Summed, TraceLabel, exemplar},
    shard,
};
use crate::error::{Outcome, Refusal};

/// The status codes that are counted each on their own; every other one is counted as `other`, so that a model server
/// cannot invent labels.
pub const STATUS_CODES: [u16; 27] = [
    101, 200, 201, 202, 204, 206, 301, 302, 304, 307, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422,
    429, 499, 500, 502, 503, 504,
];

const CODES: usize = STATUS_CODES.len() + 1;
const OUTCOMES: usize = Outcome::ALL.len();
const REFUSALS: usize = Refusal::ALL.len();

/// How holding a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEnd {
    /// It was dispatched.
    Dispatched,
    /// As the request did.
    Ended(Outcome),
}

/// What an `InterceptorRoute` has answered without admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaticKind {
    /// A static route.
    Static,
    /// The placeholder of a cold start.
    Placeholder,
}

/// What is counted of a route.
#[derive(Default)]
pub struct RouteCounters {
    shards: [OnceLock<Box<Shard>>; SHARDS],
    /// How long requests were held, by how it ended: dispatched, then every outcome. Shared by all threads: whoever was
    /// held has been through the queue, which is shared as well.
    held: [OnceLock<HistogramWithExemplars<TraceLabel>>; OUTCOMES + 1],
    /// To the first byte, of requests that were held by a cold start. Those of the others are in the sets.
    cold_first_byte: OnceLock<HistogramWithExemplars<TraceLabel>>,
}

#[derive(Default)]
struct Shard {
    admitted: AtomicU64,
    refused: [AtomicU64; REFUSALS],
    ended: [[[AtomicU64; 2]; CODES]; OUTCOMES],
    first_byte: Histogram,
    static_answers: [AtomicU64; StaticKind::ALL.len()],
    fallbacks: AtomicU64,
    quiet: AtomicU64,
}

/// Where a status code is counted; the last place is `other`'s.
pub fn status_slot(code: u16) -> usize {
    STATUS_CODES.binary_search(&code).unwrap_or(STATUS_CODES.len())
}

// === impl HoldEnd ===

impl HoldEnd {
    /// Every way, in the order of its number.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Dispatched).chain(Outcome::ALL.map(Self::Ended))
    }

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dispatched => "dispatched",
            Self::Ended(outcome) => outcome.name(),
        }
    }

    const fn slot(self) -> usize {
        match self {
            Self::Dispatched => 0,
            Self::Ended(outcome) => 1 + outcome as usize,
        }
    }
}

// === impl StaticKind ===

impl StaticKind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 2] = [Self::Static, Self::Placeholder];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Placeholder => "placeholder",
        }
    }
}

// === impl RouteCounters ===

impl RouteCounters {
    fn own(&self) -> &Shard {
        self.shards[shard()].get_or_init(Box::default)
    }

    fn all(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter().filter_map(|shard| shard.get().map(AsRef::as_ref))
    }

    /// A request was admitted.
    pub fn admit(&self) {
        self.own().admitted.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was admitted that is no demand.
    pub fn admit_quietly(&self) {
        self.admit();
        self.own().quiet.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was not admitted.
    pub fn refuse(&self, why: Refusal) {
        self.own().refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// An admitted request ended. The code is the status that the client got or, had it waited, would have got.
    pub fn end(&self, outcome: Outcome, code: u16, cold: bool) {
        self.own().ended[outcome as usize][status_slot(code)][usize::from(cold)]
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Holding a request ended, which is in this trace if it is exported.
    pub fn held(&self, end: HoldEnd, duration: Duration, traced: Option<u128>) {
        observe(&self.held[end.slot()], duration, traced);
    }

    /// An answer began, this long after the request came.
    pub fn first_byte(&self, duration: Duration, cold: bool, traced: Option<u128>) {
        if cold {
            observe(&self.cold_first_byte, duration, traced);
        } else {
            self.own().first_byte.observe(duration);
        }
    }

    /// A request was answered with what stands in the object, and not admitted.
    pub fn answer_statically(&self, kind: StaticKind) {
        self.own().static_answers[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// An admitted request goes to the fallback.
    pub fn fall_back(&self) {
        self.own().fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    /// How many requests were answered so.
    pub fn static_answers(&self, kind: StaticKind) -> u64 {
        self.all().map(|shard| shard.static_answers[kind as usize].load(Ordering::Relaxed)).sum()
    }

    /// How many requests went to the fallback.
    pub fn fallbacks(&self) -> u64 {
        self.all().map(|shard| shard.fallbacks.load(Ordering::Relaxed)).sum()
    }

    /// How many requests were admitted.
    pub fn admitted(&self) -> u64 {
        self.all().map(|shard| shard.admitted.load(Ordering::Relaxed)).sum()
    }

    /// How many requests wanted the target: admitted, or answered with a placeholder for it.
    pub fn wanted(&self) -> u64 {
        // The two counts of a quiet request are not read at one moment.
        let quiet: u64 = self.all().map(|shard| shard.quiet.load(Ordering::Relaxed)).sum();
        self.admitted().saturating_sub(quiet) + self.static_answers(StaticKind::Placeholder)
    }

    /// How many were refused for this reason.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.all().map(|shard| shard.refused[why as usize].load(Ordering::Relaxed)).sum()
    }

    /// How many admitted requests ended so, with the status in this slot.
    pub fn ended(&self, outcome: Outcome, slot: usize, cold: bool) -> u64 {
        self.all()
            .map(|shard| shard.ended[outcome as usize][slot][usize::from(cold)].load(Ordering::Relaxed))
            .sum()
    }

    /// How many admitted requests ended so.
    pub fn ended_as(&self, outcome: Outcome) -> u64 {
        (0..CODES).map(|slot| self.ended(outcome, slot, false) + self.ended(outcome, slot, true)).sum()
    }

    /// How many admitted requests ended.
    pub fn ended_in_all(&self) -> u64 {
        Outcome::ALL.into_iter().map(|outcome| self.ended_as(outcome)).sum()
    }

    /// How long requests were held, if any was and holding it ended so.
    pub fn hold_durations(&self, end: HoldEnd) -> Option<&HistogramWithExemplars<TraceLabel>> {
        self.held[end.slot()].get()
    }

    /// How long requests took to the first byte of their answer that a cold start held, if any.
    pub fn cold_first_byte_durations(&self) -> Option<&HistogramWithExemplars<TraceLabel>> {
        self.cold_first_byte.get()
    }

    /// How long the others took.
    pub fn first_byte_durations(&self) -> Summed {
        Histogram::sum(self.all().map(|shard| &shard.first_byte))
    }
}

fn observe(
    histogram: &OnceLock<HistogramWithExemplars<TraceLabel>>,
    duration: Duration,
    traced: Option<u128>,
) {
    let histogram = histogram.get_or_init(|| HistogramWithExemplars::new(BUCKETS.into_iter()));
    let (label, at) = exemplar(traced.map(|trace| format!("{trace:032x}")));
    histogram.observe(duration.as_secs_f64(), label, at);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_all_threads_add_up() {
        let counters = RouteCounters::default();
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let counters = &counters;
                scope.spawn(move || {
                    crate::telemetry::count_as_worker(worker);
                    counters.admit();
                    counters.end(Outcome::Completed, 200, worker == 0);
                    counters.held(HoldEnd::Ended(Outcome::ClientGone), Duration::from_secs(1), None);
                    counters.first_byte(Duration::from_secs(1), worker == 0, None);
                });
            }
        });
        counters.end(Outcome::Completed, 299, false);
        assert_eq!((counters.admitted(), counters.ended_in_all()), (3, 4));
        assert_eq!(counters.ended(Outcome::Completed, status_slot(200), true), 1);
        assert_eq!(counters.ended(Outcome::Completed, STATUS_CODES.len(), false), 1, "299 is other");
        assert!(counters.hold_durations(HoldEnd::Ended(Outcome::ClientGone)).is_some());
        assert!(counters.hold_durations(HoldEnd::Dispatched).is_none());
        assert_eq!(
            (counters.first_byte_durations().count, counters.cold_first_byte_durations().is_some()),
            (2, true)
        );
    }

    #[test]
    fn numbers_are_places_in_the_lists() {
        assert!(STATUS_CODES.is_sorted());
        assert!(Outcome::ALL.iter().enumerate().all(|(place, outcome)| *outcome as usize == place));
        assert!(Refusal::ALL.iter().enumerate().all(|(place, refusal)| *refusal as usize == place));
        assert!(StaticKind::ALL.iter().enumerate().all(|(place, kind)| *kind as usize == place));
        assert!(HoldEnd::all().enumerate().all(|(place, end)| end.slot() == place));
    }
}
