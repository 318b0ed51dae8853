//! The cold starts that have ended: the recent ones, bounded, and what they tell of the next.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{ColdStart, ColdStartOutcome, Estimate, Phase};
use crate::{domain::RouteKey, telemetry::Pulse};

/// The cold starts of all routes: the recent ones, bounded.
pub struct ColdStarts {
    pub(super) next_id: AtomicU64,
    ended: Mutex<VecDeque<Arc<Ended>>>,
    /// Tells the metrics and the log of each that ended.
    on_end: Box<dyn Fn(&ColdStart) + Send + Sync>,
    changed: watch::Sender<u64>,
    pulse: Pulse,
}

/// Counts that go on after the record has ended: the last held requests go out later than the first byte comes.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) held_peak: AtomicU64,
    pub(super) released: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) left: AtomicU64,
}

struct Ended {
    record: ColdStart,
    tally: Arc<Tally>,
}

// === impl ColdStarts ===

impl ColdStarts {
    /// How many records are kept in memory.
    pub const KEPT: usize = 256;

    /// Whoever counts and logs is told of each cold start that ends.
    pub fn new(on_end: impl Fn(&ColdStart) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            next_id: AtomicU64::new(1),
            ended: Mutex::default(),
            on_end: Box::new(on_end),
            changed: watch::Sender::new(0),
            pulse: Pulse::default(),
        })
    }

    /// The latest that ended, newest first.
    pub fn recent(&self, route: Option<&str>, limit: usize) -> Vec<ColdStart> {
        let ended = self.ended.lock();
        let of_route = |ended: &&Arc<Ended>| route.is_none_or(|route| ended.record.route.as_str() == route);
        ended.iter().rev().filter(of_route).take(limit).map(|ended| ended.record()).collect()
    }

    /// Changes whenever a cold start ends.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Beats with everything that is shown of routes and their cold starts: all that know of the one know of the other.
    pub const fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    pub(super) fn end(&self, record: ColdStart, tally: Arc<Tally>) {
        (self.on_end)(&record);
        let mut ended = self.ended.lock();
        if ended.len() == Self::KEPT {
            ended.pop_front();
        }
        ended.push_back(Arc::new(Ended { record, tally }));
        drop(ended);
        self.changed.send_modify(|count| *count += 1);
        self.pulse.beat();
    }

    /// How long cold starts of a route take until ready, by its last 20 that got there.
    pub(super) fn estimate(&self, route: &RouteKey) -> Option<Estimate> {
        let mut until_ready: Vec<f64> = {
            let ended = self.ended.lock();
            ended
                .iter()
                .rev()
                .filter(|ended| ended.record.route == *route)
                .filter_map(|ended| ended.ready_ms())
                .take(20)
                .collect()
        };
        until_ready.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let index = (share * until_ready.len() as f64).ceil() as usize;
            until_ready.get(index.max(1) - 1).map(|ms| Duration::from_secs_f64(ms / 1e3))
        };
        Some(Estimate { median: rank(0.5)?, p90: rank(0.9)? })
    }
}

// === impl Ended ===

impl Ended {
    fn record(&self) -> ColdStart {
        let mut record = self.record.clone();
        self.tally.write_to(&mut record);
        record
    }

    fn ready_ms(&self) -> Option<f64> {
        let loaded = self.record.phases.iter().find(|span| span.name == Phase::Load)?;
        (self.record.outcome != Some(ColdStartOutcome::Failed))
            .then_some(loaded.start_ms + loaded.duration_ms)
    }
}

// === impl Tally ===

impl Tally {
    pub(super) fn write_to(&self, record: &mut ColdStart) {
        record.held_peak = usize::try_from(self.held_peak.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        record.released = self.released.load(Ordering::Relaxed);
        record.failed = self.failed.load(Ordering::Relaxed);
        record.left = self.left.load(Ordering::Relaxed);
    }
}
