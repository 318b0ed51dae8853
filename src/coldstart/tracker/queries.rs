//! Queries: the record, the running phase, and the time left.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Tracker,
    active::{ActiveColdStart, Observations},
};
use crate::coldstart::{ColdStart, ColdStartKind, Estimates, Phase, store::HoldTally, timeline::Timeline};

impl Tracker {
    /// Returns the number of activations that have made the target ready.
    pub fn activations(&self) -> u64 {
        self.activations.load(Ordering::SeqCst)
    }

    /// Returns a snapshot of the running cold start.
    pub fn current(&self) -> Option<ColdStart> {
        let tally = self.tally.load_full();
        let state = self.state.lock();
        let active = state.active.as_ref()?;
        Some(self.record(active, &state.observations, &tally, Some(Instant::now())))
    }

    /// Returns the running phase and the age of the cold start. `None` once an answer has begun: requests that are
    /// still held then wait for a free slot at an endpoint.
    pub fn phase(&self) -> Option<(Phase, Duration)> {
        if !self.is_running.load(Ordering::SeqCst) {
            return None;
        }
        let state = self.state.lock();
        let active = state.active.as_ref().filter(|active| !active.is_answered())?;
        let (phase, _) = active.running(&state.observations);
        Some((phase, active.began.elapsed()))
    }

    /// Returns the estimates for the kind of the next cold start.
    pub fn estimates(&self) -> Option<Arc<Estimates>> {
        let kind = self.state.lock().observations.kind;
        self.estimates[kind as usize].load_full()
    }

    pub(super) fn refresh_estimates(&self, kind: ColdStartKind) {
        self.estimates[kind as usize].store(self.store.estimates(&self.route, kind).map(Arc::new));
    }

    /// Estimates the time until ready; of a whole cold start if none runs. `None` without history, or if the running
    /// cold start exceeds the 90th percentile.
    pub fn time_left(&self) -> Option<Duration> {
        let estimates = self.estimates()?;
        let state = self.state.lock();
        match &state.active {
            Some(active) => {
                let (phase, since) = active.running(&state.observations);
                estimates.left(phase, since.elapsed())
            }
            None => estimates.until_ready.left(Duration::ZERO),
        }
    }

    /// Makes the record. `until` ends the unfinished phase.
    pub(super) fn record(
        &self,
        active: &ActiveColdStart,
        observations: &Observations,
        tally: &HoldTally,
        until: Option<Instant>,
    ) -> ColdStart {
        let pod = observations.pod(active);
        let timeline = Timeline {
            running: until.map(|until| (active.running(observations).0, until)),
            ..active.timeline(observations, pod)
        };
        let phases = timeline.spans();
        let mut record = ColdStart {
            id: active.id,
            route: self.route.clone(),
            kind: observations.kind,
            outcome: None,
            started_at: humantime::format_rfc3339_millis(active.wall).to_string(),
            total_ms: phases.last().map_or(0.0, |last| last.start_ms + last.duration_ms),
            phases,
            reason: active.obstacle.clone(),
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
