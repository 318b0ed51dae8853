//! The running cold start of a route: phases end as events come in, and the last one makes the record.

mod active;
mod queries;
mod shares;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

pub use active::TargetKind;
use active::{ActiveColdStart, EndedColdStart, Observations};
use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{ColdStartKind, ColdStartOutcome, ColdStarts, Estimates, Phase, store::HoldTally};
use crate::{
    domain::RouteKey,
    state::{Observation, PartObservation, PodStart},
    telemetry::Pulse,
};

/// The cold starts of one route; at most one runs at a time.
pub struct Tracker {
    route: RouteKey,
    store: Arc<ColdStarts>,
    state: Mutex<TrackerState>,
    /// Copy of `state.active.is_some()` for warm requests, which take no lock.
    is_running: AtomicBool,
    /// True if a push to the scaler ends the `signal` phase; otherwise [`Self::signal_acknowledged`] ends it.
    expects_push: AtomicBool,
    /// Activations that made the target ready. An increase during a hold means that a cold start caused the hold.
    activations: AtomicU64,
    /// Counts of the running cold start, or of the last one.
    tally: ArcSwap<HoldTally>,
    /// Indexed by [`ColdStartKind`].
    estimates: [ArcSwapOption<Estimates>; 2],
    last: ArcSwapOption<EndedColdStart>,
}

#[derive(Default)]
struct TrackerState {
    active: Option<ActiveColdStart>,
    observations: Observations,
    /// The first push that arrived before the cold start it belongs to.
    early_push: Option<Instant>,
}

/// The answer whose first byte, or first token if it streams, ends a cold start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirstAnswer {
    /// The answer streams, and the caller will report its first token.
    pub streams: bool,
    /// `x-request-id` of the request.
    pub request_id: Option<Arc<str>>,
    /// Trace id of the request, 32 hexadecimal digits.
    pub trace_id: Option<Arc<str>>,
    /// The trace is exported, by this proxy or by the caller that started it.
    pub is_traced: bool,
}

/// The way in which a held request left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveReason {
    /// Dispatched.
    Released,
    /// Failed with the activation, or at its deadline.
    Failed,
    /// The client disconnected.
    Left,
}

// === impl Tracker ===

impl Tracker {
    /// Maximum number of pods observed per target.
    const MAX_PODS: usize = 64;

    /// Creates the tracker of `route`, whose records go to `store`.
    pub fn new(route: RouteKey, store: Arc<ColdStarts>) -> Self {
        let tracker = Self {
            route,
            store,
            state: Mutex::default(),
            is_running: AtomicBool::new(false),
            expects_push: AtomicBool::new(false),
            activations: AtomicU64::new(0),
            tally: ArcSwap::default(),
            estimates: Default::default(),
            last: ArcSwapOption::empty(),
        };
        for kind in [ColdStartKind::ColdStart, ColdStartKind::Wake] {
            tracker.refresh_estimates(kind);
        }
        tracker
    }

    /// Sets the kind of target, which determines the phases.
    pub fn set_target_kind(&self, target: TargetKind) {
        self.state.lock().observations.target = target;
    }

    /// Sets the kind of the running cold start and of the next ones.
    pub fn set_kind(&self, kind: ColdStartKind) {
        self.state.lock().observations.kind = kind;
    }

    /// Starts a cold start whose first request arrived at `began`. Does nothing while one runs, with one exception: a
    /// running cold start that lacks only its first token is completed first.
    pub fn begin(&self, began: Instant, held: usize) {
        if self.state.lock().active.as_ref().is_some_and(ActiveColdStart::is_answered) {
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
        let mut state = self.state.lock();
        if state.active.is_none() {
            let id = self.store.next_id.fetch_add(1, Ordering::Relaxed);
            // A push from before `began` was for an earlier demand.
            let pushed = state.early_push.take().filter(|pushed| *pushed >= began);
            let mut active = ActiveColdStart::new(id, began, SystemTime::now() - began.elapsed());
            active.ends.extend(pushed.map(|pushed| (Phase::Signal, pushed)));
            state.active = Some(active);
            self.tally.store(Arc::default());
            self.is_running.store(true, Ordering::SeqCst);
        }
        drop(state);
        self.record_held(held);
        self.pulse().notify_change();
    }

    /// Returns the pulse that triggers an update of the dashboard.
    pub fn pulse(&self) -> &Pulse {
        self.store.pulse()
    }

    /// Records the number of held requests, for the peak.
    pub fn record_held(&self, held: usize) {
        if self.is_running.load(Ordering::SeqCst) {
            self.tally.load().held_peak.fetch_max(held as u64, Ordering::Relaxed);
        }
    }

    /// Counts a held request that left the queue.
    pub fn record_leave(&self, reason: LeaveReason) {
        let tally = self.tally.load();
        let count = match reason {
            LeaveReason::Released => &tally.released,
            LeaveReason::Failed => &tally.failed,
            LeaveReason::Left => &tally.left,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Records what blocks the start. The last obstacle becomes the reason of a record that has no other reason.
    pub fn set_obstacle(&self, reason: Arc<str>) {
        if let Some(active) = self.state.lock().active.as_mut() {
            active.obstacle = Some(reason);
        }
    }

    /// Sets whether a push to a scaler ends the `signal` phase, because the scaler starts the target.
    pub fn expect_push(&self, expects: bool) {
        self.expects_push.store(expects, Ordering::Relaxed);
    }

    /// Ends the `signal` phase because this proxy has noticed the demand. Does nothing if a push to a scaler must end
    /// the phase.
    pub fn signal_acknowledged(&self) {
        if !self.expects_push.load(Ordering::Relaxed) {
            self.mark(Phase::Signal);
        }
    }

    /// Ends the `signal` phase: the scaler was notified of the demand of `since`, or has scaled. The first push counts, as
    /// KEDA may have several streams. A push before the cold start begins is kept for it.
    pub fn record_push(&self, since: Instant) {
        let mut state = self.state.lock();
        match state.active.as_mut().filter(|active| !active.is_answered()) {
            Some(active) => active.mark(Phase::Signal),
            None => {
                let known = state.early_push.filter(|pushed| *pushed >= since);
                state.early_push = known.or_else(|| Some(Instant::now()));
            }
        }
        drop(state);
        self.pulse().notify_change();
    }

    /// Ends a phase now, by this proxy's own action. Does nothing if this proxy has already ended the phase or a
    /// later one.
    pub fn mark(&self, phase: Phase) {
        if let Some(active) = self.state.lock().active.as_mut() {
            active.mark(phase);
        }
        self.pulse().notify_change();
    }

    /// Records the end of a phase of the whole target, as observed in the cluster. The first observation in a cold start
    /// counts; it may precede [`Self::begin`].
    pub fn observe(&self, phase: Phase, seen: Observation) {
        let mut state = self.state.lock();
        let began = state.active.as_ref().map(|active| active.began);
        let known = &mut state.observations.ends;
        match known.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, known)) if began.is_none_or(|began| known.at < began) => *known = seen,
            Some(_) => {}
            None => known.push((phase, seen)),
        }
        drop(state);
        self.pulse().notify_change();
    }

    /// Replaces the observations of the target's pods.
    pub fn observe_pods(&self, pods: impl IntoIterator<Item = PodStart>) {
        let pods = pods.into_iter().take(Self::MAX_PODS).collect();
        self.state.lock().observations.pods = pods;
        self.pulse().notify_change();
    }

    /// Records a part of a phase of our own process. A later report of the same part replaces the earlier one.
    pub fn record_part(&self, part: PartObservation) {
        if let Some(active) = self.state.lock().active.as_mut() {
            active.parts.retain(|known| known.part != part.part);
            active.parts.push(part);
        }
        self.pulse().notify_change();
    }

    /// Ends the load when the first pod behind a gateway answers at `address`. The gateway itself is not ready yet.
    pub fn pod_loaded(&self, address: &str) {
        let mut state = self.state.lock();
        let TrackerState { active, observations, .. } = &mut *state;
        if let Some(active) = active.as_mut().filter(|active| active.first_address.is_none()) {
            active.first_address = Some(address.into());
            if !active.is_loaded(observations) {
                active.mark(Phase::Load);
            }
        }
    }

    /// Ends the load when the target is ready for requests, or `propagate` if the load has ended. `address` is that of the
    /// endpoint, `None` for a gateway.
    pub fn ready(&self, address: Option<&str>) {
        let mut state = self.state.lock();
        let TrackerState { active, observations, .. } = &mut *state;
        if let Some(active) = active {
            if let Some(address) = address {
                active.first_address = Some(address.into());
            }
            let is_loaded = active.is_loaded(observations);
            active.mark(if is_loaded { Phase::Propagate } else { Phase::Load });
            self.activations.fetch_add(1, Ordering::SeqCst);
        }
        drop(state);
        self.pulse().notify_change();
    }

    /// Reopens the phases from `first` on, because the target takes no requests after all. Does nothing once an
    /// answer has begun.
    pub fn reopen(&self, first: Phase) {
        if let Some(active) = self.state.lock().active.as_mut().filter(|active| !active.is_answered()) {
            active.ends.retain(|(phase, _)| *phase < first);
            if first <= Phase::Load {
                active.first_address = None;
            }
        }
        self.pulse().notify_change();
    }

    /// Ends the cold start: the target is ready, and every client has disconnected.
    pub fn abandoned(&self) {
        self.end(ColdStartOutcome::Abandoned, None, Vec::new());
    }

    /// Ends `dispatch` with the first request sent after the load.
    pub fn dispatched(&self) {
        self.end_phase_if(Phase::is_activation, Phase::Dispatch, |_| {});
    }

    /// Ends `first_byte` with the first answer after the dispatch, and the cold start too unless the answer streams.
    /// For a streamed answer, returns the id of the cold start, which the caller must pass to [`Self::first_token`]
    /// or [`Self::ended_without_token`]. `answer` is called only for that first answer.
    pub fn first_byte(&self, answer: impl FnOnce() -> FirstAnswer) -> Option<u64> {
        let mut awaited = None;
        let is_first = self.end_phase_if(
            |last| last == Phase::Dispatch,
            Phase::FirstByte,
            |active| {
                let FirstAnswer { streams, request_id, trace_id, is_traced } = answer();
                (active.request_id, active.trace_id, active.is_traced) = (request_id, trace_id, is_traced);
                awaited = streams.then_some(active.id);
            },
        );
        if is_first && awaited.is_none() {
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
        awaited
    }

    /// Ends cold start `id` with the first token of its first answer.
    pub fn first_token(&self, id: u64) {
        if self.awaits_token(id) {
            self.end_phase_if(|last| last == Phase::FirstByte, Phase::FirstToken, |_| {});
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
    }

    /// Ends cold start `id` when its first answer has ended without a token.
    pub fn ended_without_token(&self, id: u64) {
        if self.awaits_token(id) {
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
    }

    /// Returns true if cold start `id` is still the running one, and only its first token is missing.
    fn awaits_token(&self, id: u64) -> bool {
        self.state.lock().active.as_ref().is_some_and(|active| active.id == id && active.is_answered())
    }

    /// Ends `phase` if `is_previous` accepts the last phase that this proxy ended, and applies `update`. Costs a warm
    /// request one load.
    fn end_phase_if(
        &self,
        is_previous: impl FnOnce(Phase) -> bool,
        phase: Phase,
        update: impl FnOnce(&mut ActiveColdStart),
    ) -> bool {
        if !self.is_running.load(Ordering::SeqCst) {
            return false;
        }
        let mut state = self.state.lock();
        let Some(active) = state.active.as_mut() else { return false };
        let last = active.ends.last().map(|(ended, _)| *ended).filter(|ended| *ended >= Phase::Load);
        let follows = last.is_some_and(is_previous);
        if follows {
            active.mark(phase);
            update(active);
            self.pulse().notify_change();
        }
        follows
    }

    /// Ends the cold start: the target could not be started.
    pub fn failed(&self, reason: Arc<str>, last_lines: Vec<String>) {
        self.end(ColdStartOutcome::Failed, Some(reason), last_lines);
    }

    fn end(&self, outcome: ColdStartOutcome, reason: Option<Arc<str>>, last_lines: Vec<String>) {
        let (mut record, tally) = {
            let mut state = self.state.lock();
            let Some(ended) = state.active.take() else { return };
            // Set under the lock, so that a reader finds this cold start either running or as the last one.
            self.is_running.store(false, Ordering::SeqCst);
            // A cold start whose answer has begun counts as completed, even if the answer breaks off.
            let outcome = if ended.is_answered() { ColdStartOutcome::Completed } else { outcome };
            let tally = self.tally.load_full();
            let until = (outcome == ColdStartOutcome::Failed).then(Instant::now);
            let mut record = self.record(&ended, &state.observations, &tally, until);
            record.outcome = Some(outcome);
            self.last.store(Some(Arc::new(EndedColdStart { began: ended.began, record: record.clone() })));
            (record, tally)
        };
        if record.outcome == Some(ColdStartOutcome::Failed) {
            record.reason = reason.or(record.reason);
            record.last_lines = last_lines;
        }
        let kind = record.kind;
        self.store.end(record, tally);
        self.refresh_estimates(kind);
        self.pulse().notify_change();
    }
}

// === impl FirstAnswer ===

impl FirstAnswer {
    /// A complete answer to a request without ids.
    pub fn whole() -> Self {
        Self::default()
    }

    /// A streamed answer to a request without ids.
    pub fn streamed() -> Self {
        Self { streams: true, ..Self::default() }
    }
}

#[cfg(test)]
mod tests;
