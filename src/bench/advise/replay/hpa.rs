//! What KEDA's HPA makes of the queue: from one replica to more, and back to the floor.
//!
//! The rules are Kubernetes' own (`GetExternalPerPodMetricReplicas`: nothing within 10 % of the target, else the value
//! divided by the target, rounded up), with the behaviour that our chart sets: two replicas a minute at most, and one a
//! minute down, to the most that was asked for in the last five minutes.

use std::collections::VecDeque;

use super::{Settings, fleet::Fleet};
use crate::{
    demand::{Capacity, Counts, queue_depth},
    domain::Scaling,
};

/// The HPA's own period (`--horizontal-pod-autoscaler-sync-period`).
const PERIOD: u64 = 15_000;
/// Kubernetes' default.
const TOLERANCE: f64 = 0.1;
/// What `behavior` of the chart says.
const STABILIZATION: u64 = 300_000;
const MINUTE: u64 = 60_000;
const UP_PER_MINUTE: u32 = 2;
const DOWN_PER_MINUTE: u32 = 1;

#[derive(Debug)]
pub(super) struct Hpa {
    capacity: Capacity,
    least: u32,
    most: u32,
    looked: Option<u64>,
    /// What was asked for in the last five minutes.
    asked: VecDeque<(u64, u32)>,
    /// What was changed in the last minute, and by how many.
    raised: VecDeque<(u64, u32)>,
    lowered: VecDeque<(u64, u32)>,
}

// === impl Hpa ===

impl Hpa {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            capacity: Capacity {
                scaling: Scaling { target: settings.target, ..Scaling::default() },
                concurrency: settings.concurrency,
            },
            least: settings.floor.max(1),
            most: settings.max_replicas.max(settings.floor).max(1),
            looked: None,
            asked: VecDeque::new(),
            raised: VecDeque::new(),
            lowered: VecDeque::new(),
        }
    }

    /// When it looks next, if there is anything to see: more replicas than need be, or too few.
    pub(super) fn next_look(&self, now: u64, fleet: &Fleet, held: usize) -> Option<u64> {
        let current = fleet.wanted();
        // What is in flight fills the replicas that there are at the most: only who waits asks for more.
        let is_due = current > self.least || (current > 0 && held > 0);
        (self.most > self.least && is_due).then(|| {
            let after = self.looked.map_or(0, |looked| looked + PERIOD);
            after.max(now.next_multiple_of(PERIOD))
        })
    }

    /// How many replicas it asks for.
    pub(super) fn look(&mut self, now: u64, fleet: &Fleet, held: usize) -> u32 {
        self.looked = Some(now);
        let current = fleet.wanted();
        let asked = self.desired(fleet, held, current).clamp(self.least, self.most);
        forget(&mut self.asked, now, STABILIZATION);
        forget(&mut self.raised, now, MINUTE);
        forget(&mut self.lowered, now, MINUTE);
        self.asked.push_back((now, asked));
        let recent = self.asked.iter().map(|(_, asked)| *asked).max().unwrap_or(asked);
        if asked > current {
            let more = (asked - current).min(UP_PER_MINUTE.saturating_sub(sum(&self.raised)));
            self.raised.push_back((now, more));
            current + more
        } else if recent < current {
            let fewer = (current - recent).min(DOWN_PER_MINUTE.saturating_sub(sum(&self.lowered)));
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
            lasting: true,
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

fn forget(events: &mut VecDeque<(u64, u32)>, now: u64, after: u64) {
    while events.front().is_some_and(|(at, _)| at + after <= now) {
        events.pop_front();
    }
}

fn sum(events: &VecDeque<(u64, u32)>) -> u32 {
    events.iter().map(|(_, count)| count).sum()
}
