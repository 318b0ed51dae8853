//! The account of one admitted request: whatever way it ends, it is counted once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use tokio::time::Instant;

use super::{client_io::UnderWay, stream_stall};
use crate::{
    admission::Gate,
    coldstart::Leave,
    error::{Outcome, ProxyError},
    telemetry::HoldEnd,
};

/// An admitted request, until its outcome is counted by dropping this.
pub struct Exchange {
    gate: Arc<Gate>,
    under_way: UnderWay,
    /// Set when draining cuts off what is still under way.
    cut: Arc<AtomicBool>,
    /// For the log, here and at the endpoint.
    pub request_id: HeaderValue,
    started: Instant,
    outcome: Option<Outcome>,
    status: u16,
    holding: Option<Holding>,
    /// How long it was held in all.
    waited: Duration,
    cold: bool,
}

struct Holding {
    since: Instant,
    activations: u64,
}

/// The status that stands for requests without an answer (nginx's "client closed request").
const NO_ANSWER: u16 = 499;

// === impl Exchange ===

impl Exchange {
    /// A request that has just been admitted; it came at `started`.
    pub fn new(
        gate: Arc<Gate>,
        under_way: UnderWay,
        cut: Arc<AtomicBool>,
        request_id: HeaderValue,
        started: Instant,
    ) -> Self {
        Self {
            gate,
            under_way,
            cut,
            request_id,
            started,
            outcome: None,
            status: NO_ANSWER,
            holding: None,
            waited: Duration::ZERO,
            cold: false,
        }
    }

    /// Its route.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// When it came.
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// How long it has been held in all; `None` if it never was.
    pub fn waited(&self) -> Option<Duration> {
        (!self.waited.is_zero()).then_some(self.waited)
    }

    /// Whether it was held by a cold start.
    pub const fn is_cold(&self) -> bool {
        self.cold
    }

    /// It is held from now on.
    pub fn hold(&mut self, since: Instant) {
        self.holding = Some(Holding { since, activations: self.gate.cold_starts().activations() });
    }

    /// It is held no more, and goes on.
    pub fn dispatched(&mut self) {
        self.end_hold(HoldEnd::Dispatched);
    }

    /// It was held in vain, and goes to the fallback.
    pub fn fell_back(&mut self) {
        self.end_hold(HoldEnd::Ended(Outcome::ColdStartTimeout));
    }

    /// The answer began.
    pub fn first_byte(&mut self, status: u16) {
        self.status = status;
        self.gate.counters().first_byte(self.started.elapsed(), self.cold);
    }

    /// It ended, and how.
    pub const fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }

    /// It failed. The status is what the error's table says, even where a 200 went out early.
    pub fn fail(&mut self, error: &ProxyError) {
        self.status = error.answer().status.as_u16();
        // A body that breaks its bounds on its way: that is the client's end.
        self.outcome = Some(error.ending().unwrap_or(Outcome::ClientGone));
    }

    fn end_hold(&mut self, end: HoldEnd) {
        let Some(holding) = self.holding.take() else { return };
        // The linger counts from here: whoever waited may come back.
        self.gate.demand().touch();
        let held = holding.since.elapsed();
        self.waited += held.max(Duration::from_nanos(1));
        let cold_starts = self.gate.cold_starts();
        let woken = cold_starts.activations() > holding.activations;
        // An activation that failed is over before those that it held learn of it.
        let failed = end == HoldEnd::Ended(Outcome::ColdStartFailed);
        self.cold |= woken || failed || (end != HoldEnd::Dispatched && cold_starts.phase().is_some());
        if self.cold {
            cold_starts.leave(match end {
                HoldEnd::Dispatched => Leave::Released,
                HoldEnd::Ended(Outcome::ClientGone) => Leave::Left,
                HoldEnd::Ended(_) => Leave::Failed,
            });
        }
        self.gate.counters().held(end, held);
        self.gate.stirred();
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or_else(|| match () {
            () if std::thread::panicking() => Outcome::Internal,
            () if self.under_way.is_stalled() || stream_stall::is_ending() => Outcome::ClientStalled,
            () if self.cut.load(Ordering::Relaxed) => Outcome::Draining,
            () => Outcome::ClientGone,
        });
        self.end_hold(HoldEnd::Ended(outcome));
        self.gate.counters().end(outcome, self.status, self.cold);
        tracing::debug!(
            route = %self.gate.key(),
            outcome = outcome.name(),
            status = self.status,
            cold_start = self.cold,
            held_ms = self.waited.as_millis(),
            total_ms = self.started.elapsed().as_millis(),
            request_id = ?self.request_id,
            "request"
        );
    }
}
