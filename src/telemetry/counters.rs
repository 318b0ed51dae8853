//! Counters of a route: one set per worker thread, summed on read.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use strum::{IntoStaticStr, VariantArray};

use super::{
    BUCKETS, COUNTER_SHARDS, Histogram,
    histogram::{HistogramSnapshot, TraceLabel, exemplar},
    shard,
};
use crate::error::{Outcome, Refusal};

/// Status codes counted individually; all others count as `other`, so that a model server cannot create labels.
pub const STATUS_CODES: [u16; 27] = [
    101, 200, 201, 202, 204, 206, 301, 302, 304, 307, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422,
    429, 499, 500, 502, 503, 504,
];

const CODES: usize = STATUS_CODES.len() + 1;
const OUTCOMES: usize = Outcome::ALL.len();
const REFUSALS: usize = Refusal::ALL.len();

/// End of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEnd {
    /// The request was dispatched.
    Dispatched,
    /// The request ended.
    Ended(Outcome),
}

/// Kind of response given by an `InterceptorRoute` without admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum StaticKind {
    /// A static route.
    Static,
    /// The placeholder of a cold start.
    Placeholder,
}

/// Counters of a route.
#[derive(Default)]
pub struct RouteCounters {
    shards: [OnceLock<Box<CounterShard>>; COUNTER_SHARDS],
    /// Hold times by end: dispatched, then every outcome. Shared by all threads, as is the queue that held requests
    /// pass through.
    held: [OnceLock<HistogramWithExemplars<TraceLabel>>; OUTCOMES + 1],
    /// Times to first byte of requests held by a cold start; those of all other requests are in the shards.
    cold_first_byte: OnceLock<HistogramWithExemplars<TraceLabel>>,
}

#[derive(Default)]
struct CounterShard {
    admitted: AtomicU64,
    refused: [AtomicU64; REFUSALS],
    ended: [[[AtomicU64; 2]; CODES]; OUTCOMES],
    first_byte: Histogram,
    static_answers: [AtomicU64; StaticKind::ALL.len()],
    fallbacks: AtomicU64,
    admitted_without_demand: AtomicU64,
}

/// Returns the slot of a status code; the last slot is `other`.
pub fn status_slot(code: u16) -> usize {
    STATUS_CODES.binary_search(&code).unwrap_or(STATUS_CODES.len())
}

// === impl HoldEnd ===

impl HoldEnd {
    /// Returns all ends, in the order of their slots.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Dispatched).chain(Outcome::ALL.map(Self::Ended))
    }

    /// Returns the name used in metrics.
    pub fn name(self) -> &'static str {
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
    /// All kinds, in the order of their discriminants.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns the name used in metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

// === impl RouteCounters ===

impl RouteCounters {
    fn own(&self) -> &CounterShard {
        self.shards[shard()].get_or_init(Box::default)
    }

    fn all(&self) -> impl Iterator<Item = &CounterShard> {
        self.shards.iter().filter_map(|shard| shard.get().map(AsRef::as_ref))
    }

    /// Records an admitted request.
    pub fn admit(&self) {
        self.own().admitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Records an admitted request that does not count as demand.
    pub fn admit_without_demand(&self) {
        self.admit();
        self.own().admitted_without_demand.fetch_add(1, Ordering::Relaxed);
    }

    /// Records a rejected request.
    pub fn refuse(&self, why: Refusal) {
        self.own().refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Records the end of an admitted request. `code` is the status sent to the client or, for a client that
    /// disconnected, the one it would have received.
    pub fn end(&self, outcome: Outcome, code: u16, cold: bool) {
        self.own().ended[outcome as usize][status_slot(code)][usize::from(cold)]
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Records the end of a hold, with the trace as exemplar.
    pub fn held(&self, end: HoldEnd, duration: Duration, traced: Option<u128>) {
        observe(&self.held[end.slot()], duration, traced);
    }

    /// Records the time to first byte.
    pub fn first_byte(&self, duration: Duration, cold: bool, traced: Option<u128>) {
        if cold {
            observe(&self.cold_first_byte, duration, traced);
        } else {
            self.own().first_byte.observe(duration);
        }
    }

    /// Records a static response without admission.
    pub fn record_static_answer(&self, kind: StaticKind) {
        self.own().static_answers[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Records an admitted request sent to the fallback.
    pub fn fall_back(&self) {
        self.own().fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of static responses of a kind.
    pub fn static_answers(&self, kind: StaticKind) -> u64 {
        self.all().map(|shard| shard.static_answers[kind as usize].load(Ordering::Relaxed)).sum()
    }

    /// Returns the number of requests sent to the fallback.
    pub fn fallbacks(&self) -> u64 {
        self.all().map(|shard| shard.fallbacks.load(Ordering::Relaxed)).sum()
    }

    /// Returns the number of admitted requests.
    pub fn admitted(&self) -> u64 {
        self.all().map(|shard| shard.admitted.load(Ordering::Relaxed)).sum()
    }

    /// Returns the number of requests that wanted the target: admitted, or answered with its placeholder.
    pub fn wanted(&self) -> u64 {
        // The two counts of a quiet request are not read atomically.
        let quiet: u64 = self.all().map(|shard| shard.admitted_without_demand.load(Ordering::Relaxed)).sum();
        self.admitted().saturating_sub(quiet) + self.static_answers(StaticKind::Placeholder)
    }

    /// Returns the number of requests rejected for a reason.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.all().map(|shard| shard.refused[why as usize].load(Ordering::Relaxed)).sum()
    }

    /// Returns the number of admitted requests with an outcome and status slot.
    pub fn ended(&self, outcome: Outcome, slot: usize, cold: bool) -> u64 {
        self.all()
            .map(|shard| shard.ended[outcome as usize][slot][usize::from(cold)].load(Ordering::Relaxed))
            .sum()
    }

    /// Returns the number of admitted requests with an outcome.
    pub fn ended_as(&self, outcome: Outcome) -> u64 {
        (0..CODES).map(|slot| self.ended(outcome, slot, false) + self.ended(outcome, slot, true)).sum()
    }

    /// Returns the number of admitted requests that ended.
    pub fn ended_in_all(&self) -> u64 {
        Outcome::ALL.into_iter().map(|outcome| self.ended_as(outcome)).sum()
    }

    /// Returns the hold times with this end; `None` if there are none.
    pub fn hold_durations(&self, end: HoldEnd) -> Option<&HistogramWithExemplars<TraceLabel>> {
        self.held[end.slot()].get()
    }

    /// Returns the times to first byte of requests held by a cold start; `None` if there are none.
    pub fn cold_first_byte_durations(&self) -> Option<&HistogramWithExemplars<TraceLabel>> {
        self.cold_first_byte.get()
    }

    /// Returns the times to first byte of all other requests.
    pub fn first_byte_durations(&self) -> HistogramSnapshot {
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
    fn discriminants_are_positions_in_the_lists() {
        assert!(STATUS_CODES.is_sorted());
        assert!(HoldEnd::all().enumerate().all(|(place, end)| end.slot() == place));
    }
}
