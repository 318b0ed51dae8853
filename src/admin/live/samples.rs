//! Number of held requests in each of the last seconds.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::{admission::Gate, domain::RouteKey};

/// Peak number of held requests in each second, by route. Bounded by the number of routes.
#[derive(Default)]
pub(in crate::admin) struct Samples {
    ticks: u64,
    routes: HashMap<RouteKey, SampleRing>,
}

#[derive(Default)]
struct SampleRing {
    held: VecDeque<usize>,
    /// Peak since the last tick.
    peak: usize,
}

// === impl Samples ===

impl Samples {
    /// Number of seconds kept.
    pub(in crate::admin) const SAMPLE_WINDOW_SECS: usize = 120;

    /// Ends a second.
    pub(super) fn tick(&mut self, gates: &[Arc<Gate>]) {
        self.record_held_peaks(gates);
        self.ticks += 1;
        if self.routes.len() > gates.len() {
            let names: std::collections::HashSet<_> = gates.iter().map(|gate| gate.key()).collect();
            self.routes.retain(|name, _| names.contains(name));
        }
        for gate in gates {
            let Some(ring) = self.routes.get_mut(gate.key()) else { continue };
            if ring.held.len() == Self::SAMPLE_WINDOW_SECS {
                ring.held.pop_front();
            }
            ring.held.push_back(std::mem::replace(&mut ring.peak, gate.held()));
        }
    }

    /// Records the current number of held requests.
    pub(super) fn record_held_peaks(&mut self, gates: &[Arc<Gate>]) {
        for gate in gates {
            let held = gate.held();
            match self.routes.get_mut(gate.key()) {
                Some(ring) => ring.peak = ring.peak.max(held),
                None => {
                    self.routes.insert(gate.key().clone(), SampleRing { held: VecDeque::new(), peak: held });
                }
            }
        }
    }

    /// Returns the number of seconds recorded.
    pub(super) const fn ticks(&self) -> u64 {
        self.ticks
    }

    /// Returns the last seconds of a route, oldest first.
    pub(super) fn of(&self, route: &RouteKey) -> impl Iterator<Item = usize> {
        self.routes.get(route).into_iter().flat_map(|ring| ring.held.iter().copied())
    }

    /// Returns the last second of a route.
    pub(super) fn last(&self, route: &RouteKey) -> usize {
        self.routes.get(route).and_then(|ring| ring.held.back().copied()).unwrap_or(0)
    }
}
