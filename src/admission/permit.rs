//! The right to have one request in flight.

use std::sync::{Arc, atomic::Ordering};

use super::Gate;
use crate::{
    coldstart::FirstAnswer,
    state::{Endpoint, Level},
};

/// The right to have one request in flight on an endpoint. It lives in the body of the answer, and dropping it lets
/// the next one go.
pub struct Permit {
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    kind: Kind,
    level: Level,
}

/// What a permit is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The target, which the request wants.
    Demand,
    /// The target, but the request must not keep it up.
    Quiet,
    /// The fallback.
    Fallback,
}

// === impl Permit ===

impl Permit {
    /// For a request that has its place on the endpoint already.
    pub(super) fn new(gate: &Arc<Gate>, endpoint: Arc<Endpoint>, kind: Kind) -> Self {
        if let Some(count) = gate.apart(kind) {
            count.fetch_add(1, Ordering::SeqCst);
        }
        let level = endpoint.level();
        Self { gate: gate.clone(), endpoint, kind, level }
    }

    /// The route that gave it.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Where the request goes.
    pub const fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Its answer began: one more may go.
    pub fn first_byte(&self) {
        self.answered(FirstAnswer::whole);
    }

    /// The same, of an answer of which more is to be said if it ends a cold start. The id of that, if it waits for the
    /// answer's first token.
    pub fn answered(&self, answer: impl FnOnce() -> FirstAnswer) -> Option<u64> {
        // A request that wakes nothing is no part of a cold start.
        let awaited = match self.kind {
            Kind::Demand => self.gate.cold_starts.first_byte(answer),
            Kind::Quiet | Kind::Fallback => None,
        };
        if self.endpoint.succeeded(self.level) {
            self.gate.pump();
        }
        awaited
    }

    /// The endpoint broke it off after it was written: one of the two is to blame.
    pub fn doubt(&self) {
        // Nobody would find out whether a fallback lives.
        if self.kind != Kind::Fallback {
            self.lower_ramp();
            self.endpoint.doubt();
        }
    }

    /// The endpoint failed it before it could be written, or cannot be told from one that is down.
    pub fn suspect(&self) {
        // Nobody would find out that a fallback answers again.
        if self.kind != Kind::Fallback {
            self.lower_ramp();
            self.endpoint.suspect();
        }
    }

    /// Perhaps there were too many in flight.
    fn lower_ramp(&self) {
        self.endpoint.failed_at(self.level, self.gate.policy.load().concurrency.ramp_start);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.kind != Kind::Quiet {
            self.gate.demand.touch();
        }
        // What is quiet is taken off what is in flight: so first from the one and then from the other, and demand is
        // never missed.
        if let Some(count) = self.gate.apart(self.kind) {
            count.fetch_sub(1, Ordering::SeqCst);
        }
        self.endpoint.release();
        self.gate.pump();
    }
}
