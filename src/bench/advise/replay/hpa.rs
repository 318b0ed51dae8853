//! Model of the HPA that KEDA creates, which scales between 1 (or the floor) and the maximum.
//!
//! Follows `GetExternalPerPodMetricReplicas` of Kubernetes (no change within 10 % of the target, else value ÷ target, rounded
//! up) and the `behavior` of the chart: at most two replicas up and one down per minute, and down only to the largest
//! recommendation of the last five minutes.

use std::collections::VecDeque;

use super::{ReplaySettings, fleet::Fleet};
use crate::{
    demand::{Capacity, Counts, queue_depth},
    domain::Scaling,
};

/// `--horizontal-pod-autoscaler-sync-period`, in milliseconds.
const SYNC_PERIOD_MS: u64 = 15_000;
/// `--horizontal-pod-autoscaler-tolerance`.
const TOLERANCE: f64 = 0.1;
/// `behavior` of the chart, in milliseconds and replicas.
const DOWN_STABILIZATION_MS: u64 = 300_000;
const MINUTE_MS: u64 = 60_000;
const UP_PER_MINUTE: u32 = 2;
const DOWN_PER_MINUTE: u32 = 1;

#[derive(Debug)]
pub(super) struct Hpa {
    capacity: Capacity,
    min: u32,
    max: u32,
    last_sync: Option<u64>,
    /// Time and value within the stabilization window.
    recommendations: VecDeque<(u64, u32)>,
    /// Time and size of changes within the last minute.
    raised: VecDeque<(u64, u32)>,
    lowered: VecDeque<(u64, u32)>,
}

// === impl Hpa ===

impl Hpa {
    pub(super) fn new(settings: &ReplaySettings) -> Self {
        Self {
            capacity: Capacity {
                scaling: Scaling { target: settings.target, ..Scaling::default() },
                concurrency: settings.concurrency,
            },
            min: settings.floor.max(1),
            max: settings.max_replicas.max(settings.floor).max(1),
            last_sync: None,
            recommendations: VecDeque::new(),
            raised: VecDeque::new(),
            lowered: VecDeque::new(),
        }
    }

    /// Returns the time of the next sync that could change the replicas.
    pub(super) fn next_sync(&self, now: u64, fleet: &Fleet, held: usize) -> Option<u64> {
        let current = fleet.desired();
        // Requests in flight fit on the current replicas: only held ones can require more.
        let is_due = current > self.min || (current > 0 && held > 0);
        (self.max > self.min && is_due).then(|| {
            let after = self.last_sync.map_or(0, |last| last + SYNC_PERIOD_MS);
            after.max(now.next_multiple_of(SYNC_PERIOD_MS))
        })
    }

    /// Returns the new number of replicas.
    pub(super) fn sync(&mut self, now: u64, fleet: &Fleet, held: usize) -> u32 {
        self.last_sync = Some(now);
        let current = fleet.desired();
        let recommendation = self.desired(fleet, held, current).clamp(self.min, self.max);
        drop_older(&mut self.recommendations, now, DOWN_STABILIZATION_MS);
        drop_older(&mut self.raised, now, MINUTE_MS);
        drop_older(&mut self.lowered, now, MINUTE_MS);
        self.recommendations.push_back((now, recommendation));
        let stabilized = self.recommendations.iter().map(|(_, value)| *value).max().unwrap_or(recommendation);
        if recommendation > current {
            let more = (recommendation - current).min(UP_PER_MINUTE.saturating_sub(sum(&self.raised)));
            self.raised.push_back((now, more));
            current + more
        } else if stabilized < current {
            let fewer = (current - stabilized).min(DOWN_PER_MINUTE.saturating_sub(sum(&self.lowered)));
            self.lowered.push_back((now, fewer));
            current - fewer
        } else {
            current
        }
    }

    fn desired(&self, fleet: &Fleet, held: usize, current: u32) -> u32 {
        let counts = Counts {
            held: held as u64,
            in_flight: fleet.in_flight(),
            is_kept_alive: true,
            ready: fleet.has_ready(),
            ..Counts::default()
        };
        let replicas = queue_depth(&counts, self.capacity) / f64::from(self.capacity.scaling.target);
        if (replicas / f64::from(current.max(1)) - 1.0).abs() <= TOLERANCE {
            return current;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let rounded = replicas.ceil() as u32;
        rounded
    }
}

fn drop_older(events: &mut VecDeque<(u64, u32)>, now: u64, age: u64) {
    while events.front().is_some_and(|(at, _)| at + age <= now) {
        events.pop_front();
    }
}

fn sum(events: &VecDeque<(u64, u32)>) -> u32 {
    events.iter().map(|(_, count)| count).sum()
}
