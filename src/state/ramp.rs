//! Ramp of an endpoint: the current limit of requests in flight.
//!
//! ```text
//!            response head: twice the number of responses
//!  start ──▶ successful probe while requests are held: twice the limit  ──▶ maximum
//!            connections break at unproven levels:
//!            back to the proven level, and after 5 s 1, 2, 4, … more
//! ```
//!
//! The level of a request is the number in flight at its dispatch, including itself. A response proves that the server
//! copes with that level. A failure at a proven level is unrelated to the number and does not lower it. Neither does a
//! single failure at a higher level, since the request itself may crash servers: it takes several dispatched together, or
//! several in a row.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// Pause before a failed level is tried again.
const FAILED_LEVEL_PAUSE: Duration = Duration::from_secs(5);

/// Consecutive single failures that show a level to be too high: two requests, each sent twice.
const FAILURES_IN_A_ROW: u32 = 4;

/// Time after opening or a response head in which the ramp counts as progressing.
const PROGRESS_PERIOD: Duration = Duration::from_secs(10);

/// Limit of requests in flight and the state of its growth.
pub(super) struct Ramp {
    base: Instant,
    limit: AtomicU32,
    /// Response heads since the ramp began; not counted once it is complete.
    answered: AtomicU32,
    /// Highest level with a response.
    proven: AtomicU32,
    /// Level that needs no proof: the route's `rampStart`, recorded with the first failure.
    floor: AtomicU32,
    /// Failures at unproven levels; wraps around.
    failures: AtomicU32,
    /// Those of `failures` since the last response at an unproven level.
    in_a_row: AtomicU32,
    /// Next increment beyond the proven level; 0 if nothing has failed and the limit doubles.
    stride: AtomicU32,
    /// Time of the last failure at an unproven level, in milliseconds since `base`.
    failed_ms: AtomicU64,
    /// Time of the last opening or response head, in milliseconds since `base`.
    progress_ms: AtomicU64,
}

/// Position on the ramp at the dispatch of a request.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Requests in flight, including this one.
    in_flight: u32,
    /// Value of [`Ramp::failures`].
    failures: u32,
}

// === impl Ramp ===

impl Ramp {
    /// Creates a completed ramp.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            base: Instant::now(),
            limit: AtomicU32::new(limit),
            answered: AtomicU32::new(0),
            proven: AtomicU32::new(0),
            floor: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            in_a_row: AtomicU32::new(0),
            stride: AtomicU32::new(0),
            failed_ms: AtomicU64::new(0),
            progress_ms: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit.load(Relaxed)
    }

    /// Returns the level of a request dispatched now, as one of `in_flight`.
    pub(super) fn level(&self, in_flight: u32) -> Level {
        Level { in_flight, failures: self.failures.load(Relaxed) }
    }

    /// Sets the limit for a reason other than a response or a failure.
    pub(super) fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Relaxed);
    }

    /// Starts the ramp at `limit`, for a server without history.
    pub(super) fn begin(&self, limit: u32) {
        self.answered.store(0, Relaxed);
        self.proven.store(0, Relaxed);
        self.stride.store(0, Relaxed);
        self.progress_ms.store(self.now_ms(), Relaxed);
        self.limit.store(limit, Relaxed);
    }

    /// Restarts the ramp at one request, for a server that failed a request.
    pub(super) fn restart(&self) {
        self.answered.store(0, Relaxed);
        self.limit.store(1, Relaxed);
    }

    /// Resumes the ramp for a server that responds again after a failure: one request beyond those still in flight.
    pub(super) fn resume(&self, in_flight: u32, max: u32) {
        let limit = in_flight.saturating_add(1).min(max);
        let bears = if self.has_failed() { self.proven_capacity().max(1) } else { max };
        self.limit.fetch_max(limit.min(bears), Relaxed);
    }

    /// Records a response to a request dispatched at this level. Returns whether the limit grew.
    pub(super) fn answered(&self, level: Level, max: u32) -> bool {
        if level.in_flight > self.proven.load(Relaxed) {
            self.proven.fetch_max(level.in_flight, Relaxed);
            self.in_a_row.store(0, Relaxed);
        }
        if self.limit() >= max {
            return false;
        }
        self.progress_ms.store(self.now_ms(), Relaxed);
        let answered = self.answered.fetch_add(1, Relaxed) + 1;
        let bears = if self.has_failed() { self.proven_capacity() } else { max };
        let limit = answered.saturating_mul(2).min(bears).min(max);
        self.limit.fetch_max(limit, Relaxed) < limit
    }

    /// Records a failure before the response. `floor` is a level that needs no proof.
    pub(super) fn failed(&self, level: Level, floor: u32) {
        let bears = self.proven.load(Relaxed).max(floor);
        if level.in_flight <= bears {
            return;
        }
        let went_out_together = self.failures.fetch_add(1, Relaxed) != level.failures;
        let is_in_a_row = self.since_failure() < FAILED_LEVEL_PAUSE;
        self.failed_ms.store(self.now_ms(), Relaxed);
        if !is_in_a_row {
            self.in_a_row.store(0, Relaxed);
        }
        let in_a_row = self.in_a_row.fetch_add(1, Relaxed) + 1;
        if went_out_together || in_a_row >= FAILURES_IN_A_ROW || self.has_failed() {
            self.floor.store(floor, Relaxed);
            self.stride.store(1, Relaxed);
            self.limit.fetch_min(bears, Relaxed);
        }
    }

    /// Raises the limit after a period without failures in which the server responded to probes. Returns whether it
    /// grew.
    pub(super) fn widen(&self, max: u32) -> bool {
        let (limit, stride) = (self.limit(), self.stride.load(Relaxed));
        if limit >= max || !self.pause().is_zero() {
            return false;
        }
        let next = if stride == 0 {
            limit.saturating_mul(2)
        } else if limit < self.proven_capacity() {
            limit.saturating_mul(2).min(self.proven_capacity())
        } else {
            self.stride.store(stride.saturating_mul(2), Relaxed);
            limit.saturating_add(stride)
        };
        if next >= max {
            self.stride.store(0, Relaxed);
        }
        // A concurrent failure takes precedence.
        self.limit.compare_exchange(limit, next.min(max), Relaxed, Relaxed).is_ok()
    }

    /// Returns the remaining time in which the limit does not grow because the next level failed.
    pub(super) fn pause(&self) -> Duration {
        if !self.has_failed() || self.limit() < self.proven_capacity() {
            return Duration::ZERO;
        }
        FAILED_LEVEL_PAUSE.saturating_sub(self.since_failure())
    }

    fn since_failure(&self) -> Duration {
        self.base.elapsed().saturating_sub(Duration::from_millis(self.failed_ms.load(Relaxed)))
    }

    /// Returns whether the ramp started or advanced within [`PROGRESS_PERIOD`], so that it is expected to continue.
    pub(super) fn progresses(&self) -> bool {
        self.now_ms().saturating_sub(self.progress_ms.load(Relaxed)) < PROGRESS_PERIOD.as_millis() as u64
    }

    fn has_failed(&self) -> bool {
        self.stride.load(Relaxed) > 0
    }

    /// Returns the number of requests the server is known to cope with.
    fn proven_capacity(&self) -> u32 {
        self.proven.load(Relaxed).max(self.floor.load(Relaxed))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_CONCURRENCY: u32 = 64;

    /// Returns the levels of requests dispatched before any response.
    fn levels_before_response(ramp: &Ramp, levels: std::ops::RangeInclusive<u32>) -> Vec<Level> {
        levels.map(|in_flight| ramp.level(in_flight)).collect()
    }

    fn answered(ramp: &Ramp, levels: std::ops::RangeInclusive<u32>) {
        levels_before_response(ramp, levels).into_iter().for_each(|level| {
            ramp.answered(level, MAX_CONCURRENCY);
        });
    }

    fn failed(ramp: &Ramp, levels: std::ops::RangeInclusive<u32>) {
        levels_before_response(ramp, levels).into_iter().for_each(|level| ramp.failed(level, 4));
    }

    #[test]
    fn ramp_doubles_with_each_round_of_heads() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        ramp.begin(4);
        let (mut rounds, mut before) = (vec![], 0);
        while ramp.limit() < MAX_CONCURRENCY {
            let limit = ramp.limit();
            rounds.push(limit);
            // Every request of the round gets its response head, and none ends.
            answered(&ramp, before + 1..=limit);
            before = limit;
        }
        assert_eq!(rounds, [4, 8, 16, 32]);
        assert!(!ramp.answered(ramp.level(MAX_CONCURRENCY), MAX_CONCURRENCY), "it is at its maximum");
        ramp.restart();
        assert_eq!(ramp.limit(), 1);
        answered(&ramp, 1..=1);
        assert_eq!(ramp.limit(), 2, "twice the one that was answered");
    }

    #[test]
    fn ramp_doubles_with_each_probe() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        ramp.begin(4);
        let limits: Vec<_> =
            std::iter::from_fn(|| ramp.widen(MAX_CONCURRENCY).then(|| ramp.limit())).collect();
        assert_eq!(limits, [8, 16, 32, 64]);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_level_is_tried_again_after_5_s_in_strides() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        ramp.begin(4);
        answered(&ramp, 1..=8);
        assert_eq!(ramp.limit(), 16);
        failed(&ramp, 9..=16);
        assert_eq!((ramp.limit(), ramp.widen(MAX_CONCURRENCY)), (8, false), "what was answered");
        answered(&ramp, 1..=8);
        assert_eq!(ramp.limit(), 8, "answers at 8 say nothing of 9");
        tokio::time::advance(Duration::from_millis(4_999)).await;
        assert_eq!((ramp.widen(MAX_CONCURRENCY), ramp.pause().as_millis()), (false, 1));
        tokio::time::advance(Duration::from_millis(1)).await;
        let limits: Vec<_> =
            std::iter::from_fn(|| ramp.widen(MAX_CONCURRENCY).then(|| ramp.limit())).collect();
        assert_eq!(limits, [9, 11, 15, 23, 39, 64], "8 + 1 + 2 + 4 + 8 + 16, and the rest");
        ramp.begin(4);
        assert!(ramp.widen(MAX_CONCURRENCY) && ramp.limit() == 8, "another server is not held to it");
    }

    #[tokio::test(start_paused = true)]
    async fn failed_level_is_not_retried_at_once() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        ramp.begin(4);
        answered(&ramp, 1..=8);
        failed(&ramp, 9..=16);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(ramp.widen(MAX_CONCURRENCY) && ramp.limit() == 9);
        failed(&ramp, 9..=9);
        assert_eq!((ramp.limit(), ramp.widen(MAX_CONCURRENCY)), (8, false));
    }

    #[tokio::test(start_paused = true)]
    async fn failure_at_a_proven_level_leaves_the_limit_alone() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        failed(&ramp, 1..=4);
        assert_eq!(ramp.limit(), MAX_CONCURRENCY, "rampStart needs no proof");
        answered(&ramp, 32..=32);
        failed(&ramp, 1..=32);
        assert_eq!(ramp.limit(), MAX_CONCURRENCY);
        failed(&ramp, 33..=34);
        assert_eq!(ramp.limit(), 32);
        ramp.restart();
        ramp.resume(40, MAX_CONCURRENCY);
        assert_eq!(ramp.limit(), 32, "no more than is proven, though 40 are still in flight");
    }

    #[tokio::test(start_paused = true)]
    async fn single_failures_lower_the_ramp_only_in_a_row() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        answered(&ramp, 32..=32);
        // A request that crashes servers, sent twice, and then another one.
        for _ in 0..3 {
            failed(&ramp, 33..=33);
            assert_eq!(ramp.limit(), MAX_CONCURRENCY);
        }
        answered(&ramp, 33..=33);
        for _ in 0..3 {
            failed(&ramp, 34..=34);
        }
        tokio::time::advance(Duration::from_secs(5)).await;
        for _ in 0..3 {
            failed(&ramp, 34..=34);
        }
        assert_eq!(
            ramp.limit(),
            MAX_CONCURRENCY,
            "another was answered at that level, or they were 5 s apart"
        );
        failed(&ramp, 34..=34);
        assert_eq!(ramp.limit(), 33, "4 in a row");
    }

    #[tokio::test(start_paused = true)]
    async fn ramp_counts_as_room_for_10_s_after_a_head() {
        let ramp = Ramp::new(MAX_CONCURRENCY);
        ramp.begin(4);
        let secs = Duration::from_secs;
        tokio::time::advance(secs(9)).await;
        assert!(ramp.progresses(), "9 s of 10");
        answered(&ramp, 1..=1);
        tokio::time::advance(secs(9)).await;
        assert!(ramp.progresses(), "9 s since the head");
        tokio::time::advance(secs(1)).await;
        ramp.restart();
        ramp.resume(0, MAX_CONCURRENCY);
        assert!(!ramp.progresses(), "being open again after a failure is no progress");
    }
}
