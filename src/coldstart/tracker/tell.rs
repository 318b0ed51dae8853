//! What a tracker tells: the record, where the cold start stands, and what is left of it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{Tracker, running::Active};
use crate::coldstart::{ColdStart, ColdStartKind, Estimates, Phase, store::Tally, timeline::Known};

impl Tracker {
    /// How many activations have made the target ready.
    pub fn activations(&self) -> u64 {
        self.activations.load(Ordering::SeqCst)
    }

    /// The cold start that runs now, as far as it is.
    pub fn current(&self) -> Option<ColdStart> {
        let tally = self.tally.lock().clone();
        let active = self.active.lock();
        active.as_ref().map(|active| self.record(active, &tally, Some(Instant::now())))
    }

    /// The phase that runs now, and since when the cold start does. None once it has been answered: whoever waits then
    /// waits for their turn.
    pub fn phase(&self) -> Option<(Phase, Duration)> {
        if !self.running.load(Ordering::SeqCst) {
            return None;
        }
        let active = self.active.lock();
        let active = active.as_ref().filter(|active| !active.is_answered())?;
        let (phase, _) = active.running(&self.observed.lock());
        Some((phase, active.began.elapsed()))
    }

    /// How long cold starts of this route take, of the kind that would be the next.
    pub fn estimates(&self) -> Option<Arc<Estimates>> {
        let kind = self.observed.lock().kind;
        self.estimates[kind as usize].load_full()
    }

    pub(super) fn estimate_anew(&self, kind: ColdStartKind) {
        self.estimates[kind as usize].store(self.store.estimates(&self.route, kind).map(Arc::new));
    }

    /// What is left until ready, as far as history tells; if nothing runs: of the whole.
    pub fn time_left(&self) -> Option<Duration> {
        let estimates = self.estimates()?;
        let active = self.active.lock();
        match active.as_ref() {
            Some(active) => {
                let (phase, since) = active.running(&self.observed.lock());
                estimates.left(phase, since.elapsed())
            }
            None => estimates.until_ready.left(Duration::ZERO),
        }
    }

    pub(super) fn record(&self, active: &Active, tally: &Tally, until: Option<Instant>) -> ColdStart {
        let observed = self.observed.lock();
        let pod = observed.pod(active);
        let known = Known {
            running: until.map(|until| (active.running(&observed).0, until)),
            ..active.known(&observed, pod)
        };
        let phases = known.spans();
        let mut record = ColdStart {
            id: active.id,
            route: self.route.clone(),
            kind: observed.kind,
            outcome: None,
            started_at: humantime::format_rfc3339_millis(active.wall).to_string(),
            total_ms: phases.last().map_or(0.0, |last| last.start_ms + last.duration_ms),
            phases,
            reason: active.hindrance.clone(),
            pod: pod.map(|pod| pod.name.clone()),
            node: pod.and_then(|pod| pod.node.clone()),
            request_id: active.request_id.clone(),
            trace_id: active.trace_id.clone(),
            is_traced: active.is_traced,
            ..ColdStart::default()
        };
        record.set_totals();
        tally.write_to(&mut record);
        record
    }
}
