//! The cold start that runs: marked from outside as its phases end, and made into a record when it does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{ColdStart, ColdStartOutcome, ColdStarts, Estimate, Phase, PhaseSpan, store::Tally};
use crate::{domain::RouteKey, telemetry::Pulse};

/// The cold starts of one route: at most one at a time.
pub struct Tracker {
    route: RouteKey,
    store: Arc<ColdStarts>,
    active: Mutex<Option<Active>>,
    /// Whether there is an active one: what every warm request asks.
    running: AtomicBool,
    /// Whether a scaler's push ends the signal, and not that we have heard of it ourselves.
    awaits_push: AtomicBool,
    /// The last push for which no cold start ran.
    pushed: Mutex<Option<Instant>>,
    /// How many activations made the target ready: a held request that saw this rise was held by a cold start.
    activations: AtomicU64,
    tally: Mutex<Arc<Tally>>,
}

struct Active {
    id: u64,
    began: Instant,
    wall: SystemTime,
    ends: Vec<(Phase, Instant)>,
    hindrance: Option<Arc<str>>,
}

/// How a held request left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Dispatched.
    Released,
    /// With the activation, or at its deadline.
    Failed,
    /// The client gave up.
    Left,
}

// === impl Tracker ===

impl Tracker {
    /// The cold starts of `route`, which end up in `store`.
    pub fn new(route: RouteKey, store: Arc<ColdStarts>) -> Self {
        Self {
            route,
            store,
            active: Mutex::default(),
            running: AtomicBool::new(false),
            awaits_push: AtomicBool::new(false),
            pushed: Mutex::default(),
            activations: AtomicU64::new(0),
            tally: Mutex::default(),
        }
    }

    /// An activation begins; its first request came at `began`. While one runs, this changes nothing.
    pub fn begin(&self, began: Instant, held: usize) {
        let mut active = self.active.lock();
        if active.is_none() {
            let id = self.store.next_id.fetch_add(1, Ordering::Relaxed);
            let wall = SystemTime::now() - began.elapsed();
            let mut ends = Vec::with_capacity(Phase::ALL.len());
            // The scaler may have heard of it before we did. A push from before `began` was for something else.
            let pushed = self.pushed.lock().take().filter(|pushed| *pushed >= began);
            ends.extend(pushed.map(|pushed| (Phase::Signal, pushed)));
            *active = Some(Active { id, began, wall, ends, hindrance: None });
            *self.tally.lock() = Arc::default();
            self.running.store(true, Ordering::SeqCst);
        }
        drop(active);
        self.held(held);
    }

    /// Beats with everything that is shown of routes.
    pub fn pulse(&self) -> &Pulse {
        self.store.pulse()
    }

    /// So many are held now.
    pub fn held(&self, held: usize) {
        if self.running.load(Ordering::SeqCst) {
            self.tally.lock().held_peak.fetch_max(held as u64, Ordering::Relaxed);
        }
    }

    /// A held request left the queue.
    pub fn leave(&self, how: Leave) {
        let tally = self.tally.lock();
        let count = match how {
            Leave::Released => &tally.released,
            Leave::Failed => &tally.failed,
            Leave::Left => &tally.left,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Something stands in its way.
    pub fn hindered(&self, reason: Arc<str>) {
        if let Some(active) = self.active.lock().as_mut() {
            active.hindrance = Some(reason);
        }
    }

    /// Whether it is a scaler's push that ends the signal, since nobody here starts the target.
    pub fn await_push(&self, awaits: bool) {
        self.awaits_push.store(awaits, Ordering::Relaxed);
    }

    /// We have heard of the demand ourselves: that ends the signal, unless a scaler's push does.
    pub fn heard(&self) {
        if !self.awaits_push.load(Ordering::Relaxed) {
            self.mark(Phase::Signal);
        }
    }

    /// A scaler was told of the demand, or has done what it asks for: that ends the signal. The cold start may begin a little later, when it is known
    /// that nothing is up.
    pub fn pushed(&self) {
        let mut active = self.active.lock();
        match active.as_mut() {
            Some(active) => active.mark(Phase::Signal),
            None => *self.pushed.lock() = Some(Instant::now()),
        }
    }

    /// A phase is over, now. One that is over already, or that a later one has followed, is not reopened.
    pub fn mark(&self, phase: Phase) {
        if let Some(active) = self.active.lock().as_mut() {
            active.mark(phase);
        }
    }

    /// The target is ready: the load is over.
    pub fn ready(&self) {
        let mut active = self.active.lock();
        if let Some(active) = active.as_mut() {
            active.mark(Phase::Load);
            self.activations.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The target is ready, and nobody is left that it could serve.
    pub fn abandoned(&self) {
        self.end(ColdStartOutcome::Abandoned, None, Vec::new());
    }

    /// A request is sent: the first one after the load ends the dispatch.
    pub fn dispatched(&self) {
        self.follow(Phase::Load, Phase::Dispatch);
    }

    /// An answer begins: the first one after the dispatch ends the cold start. One that an endpoint from before gives
    /// does not.
    pub fn first_byte(&self) {
        if self.follow(Phase::Dispatch, Phase::FirstByte) {
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
    }

    /// Ends `phase` if the one that ended last is `last`. Every warm request asks, so this costs one load.
    fn follow(&self, last: Phase, phase: Phase) -> bool {
        if !self.running.load(Ordering::SeqCst) {
            return false;
        }
        let mut active = self.active.lock();
        let Some(active) = active.as_mut() else { return false };
        let follows = active.ends.last().is_some_and(|(ended, _)| *ended == last);
        if follows {
            active.mark(phase);
        }
        follows
    }

    /// The target could not be started.
    pub fn failed(&self, reason: Arc<str>, last_lines: Vec<String>) {
        self.end(ColdStartOutcome::Failed, Some(reason), last_lines);
    }

    fn end(&self, outcome: ColdStartOutcome, reason: Option<Arc<str>>, last_lines: Vec<String>) {
        let active = {
            let mut active = self.active.lock();
            let Some(ended) = active.take() else { return };
            // Under the lock: the next one may begin right after it.
            self.running.store(false, Ordering::SeqCst);
            ended
        };
        let tally = self.tally.lock().clone();
        let mut record =
            active.record(&self.route, &tally, (outcome == ColdStartOutcome::Failed).then(Instant::now));
        record.outcome = Some(outcome);
        record.reason = reason.or(record.reason);
        record.last_lines = last_lines;
        self.store.end(record, tally);
    }

    /// How many activations have made the target ready.
    pub fn activations(&self) -> u64 {
        self.activations.load(Ordering::SeqCst)
    }

    /// The cold start that runs now, as far as it is.
    pub fn current(&self) -> Option<ColdStart> {
        let tally = self.tally.lock().clone();
        self.active.lock().as_ref().map(|active| active.record(&self.route, &tally, Some(Instant::now())))
    }

    /// The phase that runs now, and since when the cold start does.
    pub fn phase(&self) -> Option<(Phase, Duration)> {
        let active = self.active.lock();
        let active = active.as_ref()?;
        let last = active.ends.last().map(|(phase, _)| *phase);
        let phase = Phase::ALL.into_iter().find(|phase| last.is_none_or(|last| *phase > last))?;
        Some((phase, active.began.elapsed()))
    }

    /// How long cold starts of this route take.
    pub fn estimate(&self) -> Option<Estimate> {
        self.store.estimate(&self.route)
    }

    /// What is left until ready, as far as history tells.
    pub fn time_left(&self) -> Option<Duration> {
        let elapsed = self.phase().map_or(Duration::ZERO, |(_, elapsed)| elapsed);
        self.estimate()?.left(elapsed)
    }
}

// === impl Active ===

impl Active {
    fn mark(&mut self, phase: Phase) {
        if self.ends.last().is_none_or(|(last, _)| *last < phase) {
            self.ends.push((phase, Instant::now()));
        }
    }

    fn record(&self, route: &RouteKey, tally: &Tally, until: Option<Instant>) -> ColdStart {
        let ms = |since: Instant, until: Instant| (until - since).as_secs_f64() * 1e3;
        let mut start = self.began;
        let phases = self.ends.iter().map(|(name, end)| {
            let span =
                PhaseSpan { name: *name, start_ms: ms(self.began, start), duration_ms: ms(start, *end) };
            start = *end;
            span
        });
        let phases: Vec<_> = phases.collect();
        let until = until.unwrap_or(start);
        let mut record = ColdStart {
            id: self.id,
            route: route.clone(),
            outcome: None,
            started_at: humantime::format_rfc3339_millis(self.wall).to_string(),
            total_ms: ms(self.began, until),
            phases,
            held_peak: 0,
            released: 0,
            failed: 0,
            left: 0,
            reason: self.hindrance.clone(),
            last_lines: Vec::new(),
        };
        tally.write_to(&mut record);
        record
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn tracker() -> (Arc<ColdStarts>, Tracker) {
        let store = ColdStarts::new(|_| {});
        (store.clone(), Tracker::new("tiny".into(), store))
    }

    #[tokio::test(start_paused = true)]
    async fn phases_follow_each_other_and_sum_to_the_total() {
        let (store, tracker) = tracker();
        tracker.begin(Instant::now(), 1);
        for (phase, ms) in
            [(Phase::Signal, 1), (Phase::Launch, 20), (Phase::Load, 3000), (Phase::Dispatch, 2)]
        {
            advance(Duration::from_millis(ms)).await;
            tracker.mark(phase);
        }
        tracker.mark(Phase::Launch);
        tracker.held(8);
        tracker.leave(Leave::Released);
        advance(Duration::from_millis(50)).await;
        tracker.first_byte();
        tracker.leave(Leave::Released);
        let [record] = store.recent(Some("tiny"), 10).try_into().unwrap();
        assert_eq!(record.outcome, Some(ColdStartOutcome::Completed));
        assert_eq!(record.total_ms, 3073.0, "1 + 20 + 3000 + 2 + 50");
        assert_eq!(record.phases.iter().map(|span| span.duration_ms).sum::<f64>(), record.total_ms);
        assert_eq!(
            record.phases.iter().map(|span| span.start_ms).collect::<Vec<_>>(),
            [0.0, 1.0, 21.0, 3021.0, 3023.0]
        );
        assert_eq!((record.held_peak, record.released), (8, 2), "the second one went out after the end");
        assert_eq!(tracker.estimate().map(|estimate| estimate.median), Some(Duration::from_millis(3021)));
        assert!(tracker.current().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_push_ends_the_signal_whether_it_comes_before_or_after_the_beginning() {
        let (store, tracker) = tracker();
        tracker.await_push(true);
        // One that was for an earlier demand.
        tracker.pushed();
        advance(Duration::from_secs(9)).await;
        let began = Instant::now();
        for (push_first, signal) in [(false, None), (true, Some(3.0)), (false, Some(5.0))] {
            let began = if signal.is_some() { Instant::now() } else { began };
            if push_first {
                advance(Duration::from_millis(3)).await;
                tracker.pushed();
            }
            advance(Duration::from_millis(2)).await;
            tracker.begin(began, 1);
            tracker.heard();
            advance(Duration::from_millis(3)).await;
            if signal.is_some() {
                tracker.pushed();
            }
            tracker.ready();
            tracker.abandoned();
            let [record] = store.recent(None, 1).try_into().unwrap();
            let span = record.phases.iter().find(|span| span.name == Phase::Signal);
            assert_eq!(span.map(|span| span.duration_ms), signal, "{push_first}");
            assert_eq!(record.phases.last().map(|span| span.name), Some(Phase::Load));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_byte_ends_it_once_the_target_is_ready_and_not_before() {
        let (store, tracker) = tracker();
        tracker.begin(Instant::now(), 1);
        tracker.mark(Phase::Signal);
        tracker.first_byte();
        assert!(store.recent(None, 10).is_empty(), "an answer of an endpoint from before");
        advance(Duration::from_secs(7)).await;
        tracker.ready();
        advance(Duration::from_secs(1)).await;
        tracker.first_byte();
        assert!(store.recent(None, 10).is_empty(), "nothing has been sent to the new one");
        tracker.dispatched();
        tracker.first_byte();
        let [record] = store.recent(None, 10).try_into().unwrap();
        assert_eq!((record.outcome, record.total_ms), (Some(ColdStartOutcome::Completed), 8000.0), "7 + 1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_phase_that_is_not_known_is_absent() {
        let (store, tracker) = tracker();
        tracker.begin(Instant::now(), 1);
        advance(Duration::from_secs(5)).await;
        tracker.failed("no GPU".into(), vec!["last words".into()]);
        let [record] = store.recent(None, 10).try_into().unwrap();
        assert_eq!((record.phases.len(), record.total_ms), (0, 5000.0));
        assert_eq!(record.reason.as_deref(), Some("no GPU"));
        assert_eq!(tracker.estimate(), None, "failures tell nothing of how long a start takes");
    }

    #[tokio::test(start_paused = true)]
    async fn the_estimate_is_the_median_then_the_ninth_of_ten_then_nothing() {
        let (_, tracker) = tracker();
        for seconds in 1..=10 {
            tracker.begin(Instant::now(), 0);
            advance(Duration::from_secs(seconds)).await;
            tracker.ready();
            tracker.abandoned();
        }
        let estimate = tracker.estimate().unwrap();
        assert_eq!((estimate.median.as_secs(), estimate.p90.as_secs()), (5, 9), "ranks 5 and 9 of 10");
        for (elapsed, left) in [(2, Some(3)), (5, Some(4)), (9, None)] {
            assert_eq!(estimate.left(Duration::from_secs(elapsed)), left.map(Duration::from_secs));
        }
    }

    #[test]
    fn memory_is_bounded() {
        let (store, tracker) = tracker();
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            for _ in 0..ColdStarts::KEPT + 10 {
                tracker.begin(Instant::now(), 0);
                tracker.abandoned();
            }
        });
        assert_eq!(store.recent(None, usize::MAX).len(), ColdStarts::KEPT);
    }
}
