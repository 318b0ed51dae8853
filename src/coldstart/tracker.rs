//! The cold start that runs: marked from outside as its phases end, and made into a record when it does.

mod running;
mod shares;
mod tell;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
pub use running::Scope;
use running::{Active, Observed};
use shares::Past;
use tokio::time::Instant;

use super::{ColdStartKind, ColdStartOutcome, ColdStarts, Estimates, Phase, store::Tally};
use crate::{
    domain::RouteKey,
    state::{PartSeen, PodStart, Seen},
    telemetry::Pulse,
};

/// The cold starts of one route: at most one at a time.
pub struct Tracker {
    route: RouteKey,
    store: Arc<ColdStarts>,
    active: Mutex<Option<Active>>,
    /// Whether there is an active one: what every warm request asks.
    running: AtomicBool,
    /// Whether a scaler's push ends the signal, and not that we have heard of it ourselves.
    awaits_push: AtomicBool,
    /// The first push for a demand of which no cold start was known yet.
    pushed: Mutex<Option<Instant>>,
    /// How many activations made the target ready: a held request that saw this rise was held by a cold start.
    activations: AtomicU64,
    tally: Mutex<Arc<Tally>>,
    /// What others say; some of it comes before it is known that a cold start runs.
    observed: Mutex<Observed>,
    /// By kind.
    estimates: [ArcSwapOption<Estimates>; 2],
    /// The last one that ended.
    last: ArcSwapOption<Past>,
}

/// The answer that ends a cold start, or does so with its first token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirstAnswer {
    /// It comes token by token, and somebody looks for the first one.
    pub streams: bool,
    /// The id of its request.
    pub request_id: Option<Arc<str>>,
    /// The trace of its request, 32 hexadecimal digits.
    pub trace_id: Option<Arc<str>>,
    /// Whether that trace is exported, by us or by whoever began it.
    pub is_traced: bool,
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
    /// How many pods of a target are looked at.
    const PODS: usize = 64;

    /// The cold starts of `route`, which end up in `store`.
    pub fn new(route: RouteKey, store: Arc<ColdStarts>) -> Self {
        let tracker = Self {
            route,
            store,
            active: Mutex::default(),
            running: AtomicBool::new(false),
            awaits_push: AtomicBool::new(false),
            pushed: Mutex::default(),
            activations: AtomicU64::new(0),
            tally: Mutex::default(),
            observed: Mutex::default(),
            estimates: Default::default(),
            last: ArcSwapOption::empty(),
        };
        for kind in [ColdStartKind::ColdStart, ColdStartKind::Wake] {
            tracker.estimate_anew(kind);
        }
        tracker
    }

    /// Which phases there will be.
    pub fn set_scope(&self, scope: Scope) {
        self.observed.lock().scope = scope;
    }

    /// What is done to bring the target up, now and from now on.
    pub fn set_kind(&self, kind: ColdStartKind) {
        self.observed.lock().kind = kind;
    }

    /// An activation begins; its first request came at `began`. While one runs, this changes nothing.
    pub fn begin(&self, began: Instant, held: usize) {
        if self.active.lock().as_ref().is_some_and(Active::is_answered) {
            // Of the last one, only the first token was missing.
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
        let mut active = self.active.lock();
        if active.is_none() {
            let id = self.store.next_id.fetch_add(1, Ordering::Relaxed);
            let wall = SystemTime::now() - began.elapsed();
            let mut ends = Vec::with_capacity(Phase::ALL.len());
            // The scaler may have heard of it before we did. A push from before `began` was for something else.
            let pushed = self.pushed.lock().take().filter(|pushed| *pushed >= began);
            ends.extend(pushed.map(|pushed| (Phase::Signal, pushed)));
            *active = Some(Active {
                id,
                began,
                wall,
                ends,
                parts: Vec::new(),
                first: None,
                hindrance: None,
                request_id: None,
                trace_id: None,
                is_traced: false,
            });
            *self.tally.lock() = Arc::default();
            self.running.store(true, Ordering::SeqCst);
        }
        drop(active);
        self.held(held);
        self.pulse().beat();
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

    /// A scaler was told of the demand that came at `raised`, or has done what it asks for: that ends the signal. The
    /// cold start may begin a little later, when it is known that nothing is up. A scaler may have several streams: the
    /// first that is told counts.
    pub fn pushed(&self, raised: Instant) {
        let mut active = self.active.lock();
        match active.as_mut().filter(|active| !active.is_answered()) {
            Some(active) => active.mark(Phase::Signal),
            None => {
                let mut pushed = self.pushed.lock();
                *pushed = pushed.filter(|pushed| *pushed >= raised).or_else(|| Some(Instant::now()));
            }
        }
        drop(active);
        self.pulse().beat();
    }

    /// A phase is over, now, by our own doing. One that is over already, or that a later one of ours has followed, is not
    /// reopened.
    pub fn mark(&self, phase: Phase) {
        if let Some(active) = self.active.lock().as_mut() {
            active.mark(phase);
        }
        self.pulse().beat();
    }

    /// Somebody else has brought a phase to an end, of the target as a whole. The first time in a cold start counts. It
    /// may come before it is known that one runs.
    pub fn observe(&self, phase: Phase, seen: Seen) {
        let began = self.active.lock().as_ref().map(|active| active.began);
        let mut observed = self.observed.lock();
        match observed.seen.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, known)) if began.is_none_or(|began| known.at < began) => *known = seen,
            Some(_) => {}
            None => observed.seen.push((phase, seen)),
        }
        self.pulse().beat();
    }

    /// What is known now of the pods of the target, all of them.
    pub fn observe_pods(&self, pods: impl IntoIterator<Item = PodStart>) {
        let pods = pods.into_iter().take(Self::PODS).collect();
        self.observed.lock().pods = pods;
        self.pulse().beat();
    }

    /// A part of a phase is over, in the process that we start. What is told of it again takes the place of what was
    /// known.
    pub fn part(&self, part: PartSeen) {
        if let Some(active) = self.active.lock().as_mut() {
            active.parts.retain(|known| known.part != part.part);
            active.parts.push(part);
        }
        self.pulse().beat();
    }

    /// The pod at `address` answers, and only a gateway before it is left to be waited for. The first one is told of.
    pub fn loaded(&self, address: &str) {
        let mut active = self.active.lock();
        if let Some(active) = active.as_mut().filter(|active| active.first.is_none()) {
            active.first = Some(address.into());
            if !active.is_loaded(&self.observed.lock()) {
                active.mark(Phase::Load);
            }
        }
    }

    /// The target is ready, and may be sent to: the load is over, or, if it was already, what came after it. `address`:
    /// where; none for a gateway.
    pub fn ready(&self, address: Option<&str>) {
        let mut active = self.active.lock();
        if let Some(active) = active.as_mut() {
            if let Some(address) = address {
                active.first = Some(address.into());
            }
            let is_loaded = active.is_loaded(&self.observed.lock());
            active.mark(if is_loaded { Phase::Propagate } else { Phase::Load });
            self.activations.fetch_add(1, Ordering::SeqCst);
        }
        self.pulse().beat();
    }

    /// Reopens the phases from `first` on: the target takes no requests after all. Changes nothing once an answer has begun.
    pub fn reopen(&self, first: Phase) {
        if let Some(active) = self.active.lock().as_mut().filter(|active| !active.is_answered()) {
            active.ends.retain(|(phase, _)| *phase < first);
            if first <= Phase::Load {
                active.first = None;
            }
        }
        self.pulse().beat();
    }

    /// The target is ready, and nobody is left that it could serve.
    pub fn abandoned(&self) {
        self.end(ColdStartOutcome::Abandoned, None, Vec::new());
    }

    /// A request is sent: the first one after the load ends the dispatch.
    pub fn dispatched(&self) {
        self.follow(Phase::is_activation, Phase::Dispatch, |_| {});
    }

    /// An answer begins: the first one after the dispatch ends the cold start, unless it streams: then its first token
    /// does, and whoever gets the id of the cold start here is to tell of it. One that an endpoint from before gives
    /// ends nothing. What the answer is, is asked for only if it is the first.
    pub fn first_byte(&self, answer: impl FnOnce() -> FirstAnswer) -> Option<u64> {
        let mut awaited = None;
        let is_first = self.follow(
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

    /// The first token of the answer that this cold start waits for.
    pub fn first_token(&self, id: u64) {
        if self.awaits_token(id) {
            self.follow(|last| last == Phase::FirstByte, Phase::FirstToken, |_| {});
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
    }

    /// The answer has ended whose first token this cold start waits for.
    pub fn ends_without_token(&self, id: u64) {
        if self.awaits_token(id) {
            self.end(ColdStartOutcome::Completed, None, Vec::new());
        }
    }

    /// Whether it is this one of which only the first token is missing, and not a later one.
    fn awaits_token(&self, id: u64) -> bool {
        self.active.lock().as_ref().is_some_and(|active| active.id == id && active.is_answered())
    }

    /// Ends `phase` if the one of ours that ended last is right, and does what belongs to it. Every warm request asks,
    /// so this costs one load.
    fn follow(
        &self,
        is_right: impl FnOnce(Phase) -> bool,
        phase: Phase,
        also: impl FnOnce(&mut Active),
    ) -> bool {
        if !self.running.load(Ordering::SeqCst) {
            return false;
        }
        let mut active = self.active.lock();
        let Some(active) = active.as_mut() else { return false };
        let last = active.ends.last().map(|(ended, _)| *ended).filter(|ended| *ended >= Phase::Load);
        let follows = last.is_some_and(is_right);
        if follows {
            active.mark(phase);
            also(active);
            self.pulse().beat();
        }
        follows
    }

    /// The target could not be started.
    pub fn failed(&self, reason: Arc<str>, last_lines: Vec<String>) {
        self.end(ColdStartOutcome::Failed, Some(reason), last_lines);
    }

    fn end(&self, outcome: ColdStartOutcome, reason: Option<Arc<str>>, last_lines: Vec<String>) {
        let (mut record, tally) = {
            let mut active = self.active.lock();
            let Some(ended) = active.take() else { return };
            // Under the lock: the next one may begin right after it, and who asks what it was finds it here or there.
            self.running.store(false, Ordering::SeqCst);
            // Whatever happens to the rest of an answer, it was one.
            let outcome = if ended.is_answered() { ColdStartOutcome::Completed } else { outcome };
            let tally = self.tally.lock().clone();
            let until = (outcome == ColdStartOutcome::Failed).then(Instant::now);
            let mut record = self.record(&ended, &tally, until);
            record.outcome = Some(outcome);
            self.last.store(Some(Arc::new(Past::new(ended.began, record.clone()))));
            (record, tally)
        };
        if record.outcome == Some(ColdStartOutcome::Failed) {
            record.reason = reason.or(record.reason);
            record.last_lines = last_lines;
        }
        let kind = record.kind;
        self.store.end(record, tally);
        self.estimate_anew(kind);
        self.pulse().beat();
    }
}

// === impl FirstAnswer ===

impl FirstAnswer {
    /// One that is no stream, to a request that has no name.
    pub fn whole() -> Self {
        Self::default()
    }

    /// One that streams, to a request that has no name.
    pub fn streamed() -> Self {
        Self { streams: true, ..Self::default() }
    }
}

#[cfg(test)]
mod tests;
