//! Permits for requests in flight.

use std::sync::{Arc, atomic::Ordering};

use super::gate::{Gate, Permit, PermitKind};
use crate::{coldstart::FirstAnswer, state::Endpoint};

// === impl Permit ===

impl Permit {
    /// Creates a permit after [`Endpoint::acquire`].
    pub(super) fn new(gate: &Arc<Gate>, endpoint: Arc<Endpoint>, kind: PermitKind) -> Self {
        match kind {
            PermitKind::Demand => {}
            PermitKind::Quiet => gate.quiet.begin(),
            PermitKind::Fallback => _ = gate.in_flight_on_fallback.fetch_add(1, Ordering::SeqCst),
        }
        let level = endpoint.level();
        Self { gate: gate.clone(), endpoint, kind, level }
    }

    /// Returns the gate of the route.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Returns the endpoint.
    pub const fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Records the first byte of the response, which may raise the endpoint's limit of requests in flight.
    pub fn first_byte(&self) {
        self.answered(FirstAnswer::whole);
    }

    /// Like [`Self::first_byte`], with the details of the response in case it ends a cold start. Returns the id of a
    /// cold start that awaits the first token of this response.
    pub fn answered(&self, answer: impl FnOnce() -> FirstAnswer) -> Option<u64> {
        // Only a response to demand on the target can end a cold start.
        let awaited = match self.kind {
            PermitKind::Demand => self.gate.cold_starts.first_byte(answer),
            PermitKind::Quiet | PermitKind::Fallback => None,
        };
        if self.endpoint.succeeded(self.level) {
            self.gate.release_held();
        }
        awaited
    }

    /// Marks the endpoint as doubted: it broke off a request that was written, so the endpoint or the request may be at
    /// fault.
    pub fn doubt(&self) {
        // A fallback is not probed, so it would stay doubted.
        if self.kind != PermitKind::Fallback {
            self.lower_ramp();
            self.endpoint.doubt();
        }
    }

    /// Marks the endpoint as suspect: it failed before the request was written, or behaves as if down.
    pub fn suspect(&self) {
        // A fallback is not probed, so it would stay suspect.
        if self.kind != PermitKind::Fallback {
            self.lower_ramp();
            self.endpoint.suspect();
        }
    }

    /// Lowers the ramp: the failure may be due to overload.
    fn lower_ramp(&self) {
        self.endpoint.failed_at(self.level, self.gate.policy.load().concurrency.ramp_start);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.kind != PermitKind::Quiet {
            self.gate.demand.record_activity();
        }
        match self.kind {
            PermitKind::Demand => {}
            PermitKind::Quiet => self.gate.quiet.end(),
            PermitKind::Fallback => _ = self.gate.in_flight_on_fallback.fetch_sub(1, Ordering::SeqCst),
        }
        self.endpoint.release();
        self.gate.release_held();
    }
}
