//! The ramp of an endpoint: how many requests may be in flight on it now.
//!
//! ```text
//!            a head of an answer: twice as many as have been answered
//!  start ──▶ a sign of life while requests are held: twice as many      ──▶ the maximum
//!            a request is broken off at a level that no answer came from:
//!            back to the level that is proven, and after 5 s 1, 2, 4, … more
//! ```
//!
//! The level of a request is the number in flight when it went out, itself included. An answer to it proves that the
//! server bears as many. A failure at a proven level says nothing of the number, and so leaves it alone.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// How long a level that failed is not tried again.
const FAILED_LEVEL_PAUSE: Duration = Duration::from_secs(5);

/// How long an opening, or the head of an answer, shows that a ramp goes on.
const PROGRESS_PERIOD: Duration = Duration::from_secs(10);

/// The number of requests that may be in flight, and what it grows by.
pub(super) struct Ramp {
    base: Instant,
    limit: AtomicU32,
    /// Heads of answers since the ramp began; not counted beyond its end.
    answered: AtomicU32,
    /// The highest level that was answered.
    proven: AtomicU32,
    /// A level that needs no proof: the route's `rampStart`, known from the first failure on.
    floor: AtomicU32,
    /// How many more are tried next beyond the proven level; 0: nothing has failed, and the limit doubles.
    stride: AtomicU32,
    /// When a level failed last, in milliseconds from `base`.
    failed_ms: AtomicU64,
    /// When it opened, or the ramp was answered last, in milliseconds from `base`.
    progress_ms: AtomicU64,
}

// === impl Ramp ===

impl Ramp {
    /// One that is at its end.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            base: Instant::now(),
            limit: AtomicU32::new(limit),
            answered: AtomicU32::new(0),
            proven: AtomicU32::new(0),
            floor: AtomicU32::new(0),
            stride: AtomicU32::new(0),
            failed_ms: AtomicU64::new(0),
            progress_ms: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit.load(Relaxed)
    }

    /// Moves the limit for another reason than an answer or a failure.
    pub(super) fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Relaxed);
    }

    /// Begins for a server of which nothing is known yet.
    pub(super) fn begin(&self, limit: u32) {
        self.answered.store(0, Relaxed);
        self.proven.store(0, Relaxed);
        self.stride.store(0, Relaxed);
        self.progress_ms.store(self.now_ms(), Relaxed);
        self.limit.store(limit, Relaxed);
    }

    /// Begins anew, with one request, for a server that failed one.
    pub(super) fn restart(&self) {
        self.answered.store(0, Relaxed);
        self.limit.store(1, Relaxed);
    }

    /// The server that failed a request answers again: it gets one beside those that it still has.
    pub(super) fn resume(&self, in_flight: u32, max: u32) {
        let limit = in_flight.saturating_add(1).min(max);
        let bears = if self.has_failed() { self.bears().max(1) } else { max };
        self.limit.fetch_max(limit.min(bears), Relaxed);
    }

    /// A request that went out at this level was answered. Returns whether the limit grew.
    pub(super) fn answered(&self, level: u32, max: u32) -> bool {
        if level > self.proven.load(Relaxed) {
            self.proven.fetch_max(level, Relaxed);
        }
        if self.limit() >= max {
            return false;
        }
        self.progress_ms.store(self.now_ms(), Relaxed);
        let answered = self.answered.fetch_add(1, Relaxed) + 1;
        let bears = if self.has_failed() { self.bears() } else { max };
        let limit = answered.saturating_mul(2).min(bears).min(max);
        self.limit.fetch_max(limit, Relaxed) < limit
    }

    /// A request that went out at this level failed before its answer. `floor` is a level that needs no proof.
    pub(super) fn failed(&self, level: u32, floor: u32) {
        let bears = self.proven.load(Relaxed).max(floor);
        if level <= bears {
            return;
        }
        self.floor.store(floor, Relaxed);
        self.stride.store(1, Relaxed);
        self.failed_ms.store(self.now_ms(), Relaxed);
        self.limit.fetch_min(bears, Relaxed);
    }

    /// Time has passed without a failure, and the server gives signs of life. Returns whether the limit grew.
    pub(super) fn widen(&self, max: u32) -> bool {
        let (limit, stride) = (self.limit(), self.stride.load(Relaxed));
        if limit >= max || !self.pause().is_zero() {
            return false;
        }
        let next = if stride == 0 {
            limit.saturating_mul(2)
        } else if limit < self.bears() {
            limit.saturating_mul(2).min(self.bears())
        } else {
            self.stride.store(stride.saturating_mul(2), Relaxed);
            limit.saturating_add(stride)
        };
        if next >= max {
            self.stride.store(0, Relaxed);
        }
        // A failure that came meanwhile goes first.
        self.limit.compare_exchange(limit, next.min(max), Relaxed, Relaxed).is_ok()
    }

    /// How long the limit does not grow with time, because the next level has just failed.
    pub(super) fn pause(&self) -> Duration {
        if !self.has_failed() || self.limit() < self.bears() {
            return Duration::ZERO;
        }
        let since = self.base.elapsed().saturating_sub(Duration::from_millis(self.failed_ms.load(Relaxed)));
        FAILED_LEVEL_PAUSE.saturating_sub(since)
    }

    /// Whether it opened, or was answered, so recently that the rest of the ramp can be counted on.
    pub(super) fn progresses(&self) -> bool {
        self.now_ms().saturating_sub(self.progress_ms.load(Relaxed)) < PROGRESS_PERIOD.as_millis() as u64
    }

    fn has_failed(&self) -> bool {
        self.stride.load(Relaxed) > 0
    }

    /// How many the server is known to bear.
    fn bears(&self) -> u32 {
        self.proven.load(Relaxed).max(self.floor.load(Relaxed))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u32 = 64;

    #[test]
    fn ramp_doubles_with_each_round_of_heads() {
        let ramp = Ramp::new(MAX);
        ramp.begin(4);
        let (mut rounds, mut answered) = (vec![], 0);
        while ramp.limit() < MAX {
            let limit = ramp.limit();
            rounds.push(limit);
            // Each of the round is answered, and none ends.
            (answered + 1..=limit).for_each(|level| {
                ramp.answered(level, MAX);
            });
            answered = limit;
        }
        assert_eq!(rounds, [4, 8, 16, 32]);
        assert!(!ramp.answered(MAX, MAX), "it is at its maximum");
        ramp.restart();
        assert_eq!(ramp.limit(), 1);
        ramp.answered(1, MAX);
        assert_eq!(ramp.limit(), 2, "twice the one that was answered");
    }

    #[test]
    fn ramp_doubles_with_time_alone() {
        let ramp = Ramp::new(MAX);
        ramp.begin(4);
        let limits: Vec<_> = std::iter::from_fn(|| ramp.widen(MAX).then(|| ramp.limit())).collect();
        assert_eq!(limits, [8, 16, 32, 64]);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_level_is_tried_again_after_5_s_in_strides() {
        let ramp = Ramp::new(MAX);
        ramp.begin(4);
        (1..=8).for_each(|level| {
            ramp.answered(level, MAX);
        });
        assert_eq!(ramp.limit(), 16);
        (9..=16).for_each(|level| ramp.failed(level, 4));
        assert_eq!((ramp.limit(), ramp.widen(MAX)), (8, false), "what was answered");
        (1..=8).for_each(|level| {
            ramp.answered(level, MAX);
        });
        assert_eq!(ramp.limit(), 8, "answers at 8 say nothing of 9");
        tokio::time::advance(Duration::from_millis(4_999)).await;
        assert_eq!((ramp.widen(MAX), ramp.pause().as_millis()), (false, 1));
        tokio::time::advance(Duration::from_millis(1)).await;
        let limits: Vec<_> = std::iter::from_fn(|| ramp.widen(MAX).then(|| ramp.limit())).collect();
        assert_eq!(limits, [9, 11, 15, 23, 39, 64], "8 + 1 + 2 + 4 + 8 + 16, and the rest");
        ramp.begin(4);
        assert!(ramp.widen(MAX) && ramp.limit() == 8, "another server is not held to it");
    }

    #[tokio::test(start_paused = true)]
    async fn failure_at_a_proven_level_leaves_the_limit_alone() {
        let ramp = Ramp::new(MAX);
        ramp.failed(4, 4);
        assert_eq!(ramp.limit(), MAX, "rampStart needs no proof");
        ramp.answered(32, MAX);
        (1..=32).for_each(|level| ramp.failed(level, 4));
        assert_eq!(ramp.limit(), MAX);
        ramp.failed(33, 4);
        assert_eq!(ramp.limit(), 32);
        ramp.restart();
        ramp.resume(40, MAX);
        assert_eq!(ramp.limit(), 32, "no more than is proven, though 40 are still in flight");
    }

    #[tokio::test(start_paused = true)]
    async fn ramp_progresses_for_10_s_after_its_opening_and_each_head() {
        let ramp = Ramp::new(MAX);
        ramp.begin(4);
        let secs = Duration::from_secs;
        tokio::time::advance(secs(9)).await;
        assert!(ramp.progresses(), "9 s of 10");
        ramp.answered(1, MAX);
        tokio::time::advance(secs(9)).await;
        assert!(ramp.progresses(), "9 s since the head");
        tokio::time::advance(secs(1)).await;
        ramp.restart();
        ramp.resume(0, MAX);
        assert!(!ramp.progresses(), "being open again after a failure is no progress");
    }
}
