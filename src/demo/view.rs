//! Snapshot of the route for the display.

use std::time::Duration;

use super::proxy::DemoProxy;
use crate::{
    coldstart::{ColdStart, Phase},
    state::Status,
};

/// Largest number of requests that are displayed individually.
pub(super) const MAX_SHOWN_REQUESTS: usize = 16;

/// Snapshot of the route.
pub(super) struct RouteView {
    pub(super) status: Status,
    pub(super) phase: Option<(Phase, Duration)>,
    pub(super) cold_start: Option<ColdStart>,
    pub(super) held: usize,
    pub(super) in_flight: u64,
    /// Number of ready endpoints.
    pub(super) endpoints: usize,
}

// === impl RouteView ===

impl RouteView {
    pub(super) fn of(proxy: &DemoProxy) -> Self {
        let gate = &proxy.gate;
        let endpoints = gate.target().endpoints();
        Self {
            status: gate.target().status(),
            phase: gate.cold_starts().phase(),
            cold_start: proxy.cold_start(),
            held: gate.held(),
            in_flight: gate.in_flight(),
            endpoints: endpoints.iter().filter(|endpoint| endpoint.is_ready()).count(),
        }
    }
}
