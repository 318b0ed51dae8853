//! Records of the cold starts that have ended, bounded, and the estimates from them.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{ColdStart, ColdStartKind, ColdStartOutcome, Estimates};
use crate::{domain::RouteKey, telemetry::Pulse};

/// The recent cold starts of all routes, at most [`Self::MAX_RECORDS`].
pub struct ColdStarts {
    pub(super) next_id: AtomicU64,
    ended: Mutex<VecDeque<Arc<StoredColdStart>>>,
    /// Reports each record to metrics and log.
    on_end: Box<dyn Fn(&ColdStart) + Send + Sync>,
    changed: watch::Sender<u64>,
    pulse: Pulse,
}

/// Counts of held requests. They may grow after the record was made: the last held requests leave the queue after the
/// first byte has arrived.
#[derive(Default)]
pub(super) struct HoldTally {
    pub(super) held_peak: AtomicU64,
    pub(super) released: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) left: AtomicU64,
}

struct StoredColdStart {
    record: ColdStart,
    tally: Arc<HoldTally>,
}

// === impl ColdStarts ===

impl ColdStarts {
    /// Maximum number of records kept in memory.
    pub const MAX_RECORDS: usize = 256;

    /// Creates a store that calls `on_end` for each cold start that ends.
    pub fn new(on_end: impl Fn(&ColdStart) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            next_id: AtomicU64::new(1),
            ended: Mutex::default(),
            on_end: Box::new(on_end),
            changed: watch::Sender::new(0),
            pulse: Pulse::default(),
        })
    }

    /// Restores the records of an earlier process, oldest first. Ids continue after theirs.
    pub fn restore(&self, records: Vec<ColdStart>) {
        let last = records.iter().map(|record| record.id).max().unwrap_or(0);
        self.next_id.fetch_max(last + 1, Ordering::Relaxed);
        let kept = records.len().saturating_sub(Self::MAX_RECORDS);
        let records = records.into_iter().skip(kept);
        let ended = records
            .map(|record| Arc::new(StoredColdStart { tally: Arc::new(HoldTally::of(&record)), record }));
        *self.ended.lock() = ended.collect();
    }

    /// Returns up to `limit` records, newest first.
    pub fn recent(&self, route: Option<&str>, limit: usize) -> Vec<ColdStart> {
        let ended = self.ended.lock();
        let of_route =
            |ended: &&Arc<StoredColdStart>| route.is_none_or(|route| ended.record.route.as_str() == route);
        ended.iter().rev().filter(of_route).take(limit).map(|ended| ended.record()).collect()
    }

    /// Subscribes to ends of cold starts.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns the notifier for changes that the dashboard shows. It lives here because every route has this store.
    pub const fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    pub(super) fn end(&self, record: ColdStart, tally: Arc<HoldTally>) {
        (self.on_end)(&record);
        let mut ended = self.ended.lock();
        if ended.len() == Self::MAX_RECORDS {
            ended.pop_front();
        }
        ended.push_back(Arc::new(StoredColdStart { record, tally }));
        drop(ended);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Estimates durations from the recent cold starts of the route and kind that became ready.
    pub(super) fn estimates(&self, route: &RouteKey, kind: ColdStartKind) -> Option<Estimates> {
        let ended = self.ended.lock();
        let records = ended.iter().rev().map(|ended| &ended.record);
        let ready = records.filter(|record| {
            record.route == *route
                && record.kind == kind
                && record.outcome != Some(ColdStartOutcome::Failed)
                && record.t_actuation_ms.is_some()
        });
        Estimates::of(&ready.take(Estimates::SAMPLE_SIZE).collect::<Vec<_>>())
    }
}

// === impl StoredColdStart ===

impl StoredColdStart {
    fn record(&self) -> ColdStart {
        let mut record = self.record.clone();
        self.tally.write_to(&mut record);
        record
    }
}

// === impl HoldTally ===

impl HoldTally {
    fn of(record: &ColdStart) -> Self {
        Self {
            held_peak: AtomicU64::new(record.held_peak as u64),
            released: AtomicU64::new(record.released),
            failed: AtomicU64::new(record.failed),
            left: AtomicU64::new(record.left),
        }
    }

    pub(super) fn write_to(&self, record: &mut ColdStart) {
        record.held_peak = usize::try_from(self.held_peak.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        record.released = self.released.load(Ordering::Relaxed);
        record.failed = self.failed.load(Ordering::Relaxed);
        record.left = self.left.load(Ordering::Relaxed);
    }
}
