//! The account of one admitted request: whatever way it ends, it is counted once.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderValue, request};
use tokio::time::Instant;

use super::{
    Shared,
    connection_state::UnderWay,
    forward, stream_stall,
    traced::{self, Early, Slot, Traced},
};
use crate::{
    admission::{Gate, Permit},
    coldstart::{LeaveReason, Phase},
    error::{Outcome, ProxyError},
    history::{Arrival, Ending, Event, HoldReason, RequestInfo, Story},
    hold::Ticket,
    openai::{Dialect, Scan},
    telemetry::HoldEnd,
};

/// An admitted request, until its outcome is counted by dropping this.
pub struct Exchange {
    gate: Arc<Gate>,
    under_way: UnderWay,
    shared: Arc<Shared>,
    /// For the log, here and at the endpoint.
    pub request_id: HeaderValue,
    /// The shape of its errors.
    pub dialect: Dialect,
    started: Instant,
    outcome: Option<Outcome>,
    status: u16,
    holding: Option<Holding>,
    /// How long it was held in all.
    waited: Duration,
    cold: bool,
    /// What happened to it, once it has waited or failed.
    story: Option<Arc<Story>>,
    /// Its trace, if it is exported.
    trace: Slot,
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
        shared: Arc<Shared>,
        request_id: HeaderValue,
        dialect: Dialect,
        started: Instant,
        trace: Slot,
    ) -> Self {
        Self {
            gate,
            under_way,
            shared,
            request_id,
            dialect,
            started,
            outcome: None,
            status: NO_ANSWER,
            holding: None,
            waited: Duration::ZERO,
            cold: false,
            story: None,
            trace,
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

    /// Its story is told from now on: it has to wait, or has failed.
    pub fn tell(&mut self, head: &request::Parts, model: Option<&str>) -> &Arc<Story> {
        self.story.get_or_insert_with(|| {
            begin(&self.shared, &self.gate, &self.request_id, self.started, Some(asked(head, model)))
        })
    }

    /// Its trace, if it is exported.
    pub(super) fn trace(&mut self) -> Option<&mut Traced> {
        self.trace.as_deref_mut()
    }

    /// What its body says, for its trace.
    pub fn asks(&mut self, scan: &Scan) {
        if let Some(trace) = &mut self.trace {
            trace.asks(scan);
        }
    }

    /// Where its trace learns of an early answer.
    pub fn early(&self) -> Option<Early> {
        self.trace.as_ref().map(|trace| trace.early())
    }

    /// It is held from now on.
    pub fn hold(&mut self, ticket: &Ticket<Permit>) {
        let since = ticket.since();
        let why = if self.gate.target().is_up() { HoldReason::Saturated } else { HoldReason::NothingReady };
        if let Some(story) = &self.story {
            story.held(since, ticket.ahead(), why);
        }
        if let Some(trace) = &mut self.trace {
            trace.hold(since);
        }
        self.holding = Some(Holding { since, activations: self.gate.cold_starts().activations() });
    }

    /// It is held no more, and goes on with this.
    pub fn dispatched(&mut self, permit: &Permit) {
        self.end_hold(HoldEnd::Dispatched);
        self.sent_to(permit);
    }

    /// It goes where this allows it to.
    pub fn sent_to(&self, permit: &Permit) {
        if let Some(story) = &self.story {
            story.dispatched(permit.endpoint().address());
        }
    }

    /// It came back from an endpoint, and may be tried again.
    pub(super) fn set_back(
        &mut self,
        address: &str,
        reason: &str,
        head: &request::Parts,
        model: Option<&str>,
    ) {
        self.tell(head, model).dispatch_failed(address, reason);
    }

    /// It was held in vain, and goes to the fallback.
    pub fn fell_back(&mut self) {
        self.end_hold(HoldEnd::Ended(Outcome::ColdStartTimeout));
        if let Some(story) = &self.story {
            story.record(Event::FellBack);
        }
        if let Some(trace) = &mut self.trace {
            trace.fell_back();
        }
    }

    /// The answer began.
    pub fn first_byte(&mut self, status: u16) {
        self.status = status;
        // A trace of a request that did not wait is nothing to look for in a histogram.
        let traced = self.trace.as_ref().filter(|_| self.waited().is_some()).map(|trace| trace.id());
        self.gate.counters().first_byte(self.started.elapsed(), self.cold, traced);
        if let Some(story) = &self.story {
            story.record(Event::FirstByte { status });
        }
    }

    /// The client was sent a heartbeat.
    pub fn beat(&self) {
        if let Some(story) = &self.story {
            story.heartbeat();
        }
    }

    /// Its id as text.
    pub fn id(&self) -> &str {
        self.request_id.to_str().unwrap_or("anteroom")
    }

    /// The first token of the answer came by.
    pub fn first_token(&mut self) {
        if let Some(story) = &self.story {
            story.record(Event::FirstToken);
        }
        if let Some(trace) = &mut self.trace {
            trace.first_token();
        }
    }

    /// What it was held for, as far as is known now. The rest of its wait was for its turn.
    pub fn shares(&self) -> Vec<(Phase, Duration)> {
        let waits = self.story.as_ref().map(|story| story.waits()).unwrap_or_default();
        self.gate.cold_starts().shares(&waits)
    }

    /// It ended, and how.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        if let Some(trace) = &mut self.trace {
            trace.end_attempt(outcome);
        }
    }

    /// Its answer broke off.
    pub fn broke(&mut self, error: &dyn std::fmt::Display) {
        self.end(Outcome::UpstreamError);
        self.because(&error.to_string());
    }

    /// It failed. The status is what the error's table says, even where a 200 went out early.
    pub fn fail(&mut self, error: &ProxyError) {
        self.status = error.answer().status.as_u16();
        // A body that breaks its bounds on its way: that is the client's end.
        self.outcome = Some(error.ending().unwrap_or(Outcome::ClientGone));
        self.because(&error.to_string());
    }

    /// Why it will have ended as it does.
    fn because(&mut self, reason: &str) {
        self.story_of_a_failure().set_reason(reason);
    }

    /// What it asked for is not known any more, if nobody has told before.
    fn story_of_a_failure(&mut self) -> &Arc<Story> {
        self.story
            .get_or_insert_with(|| begin(&self.shared, &self.gate, &self.request_id, self.started, None))
    }

    fn end_hold(&mut self, end: HoldEnd) {
        let Some(holding) = self.holding.take() else { return };
        // The linger counts from here: whoever waited may come back.
        self.gate.demand().record_activity();
        let held = holding.since.elapsed();
        self.waited += held.max(Duration::from_nanos(1));
        let cold_starts = self.gate.cold_starts();
        let woken = cold_starts.activations() > holding.activations;
        // An activation that failed is over before those that it held learn of it.
        let failed = end == HoldEnd::Ended(Outcome::ColdStartFailed);
        self.cold |= woken || failed || (end != HoldEnd::Dispatched && cold_starts.phase().is_some());
        if self.cold {
            cold_starts.record_leave(match end {
                HoldEnd::Dispatched => LeaveReason::Released,
                HoldEnd::Ended(Outcome::ClientGone) => LeaveReason::Left,
                HoldEnd::Ended(_) => LeaveReason::Failed,
            });
        }
        let traced = self.trace.as_mut().map(|trace| {
            trace.end_hold(holding.since + held);
            trace.id()
        });
        self.gate.counters().held(end, held, traced);
        self.gate.mark_dirty();
        if let Some(story) = &self.story {
            story.dequeued(holding.since + held, cold_starts.latest_id().filter(|_| self.cold));
        }
    }

    /// Closes the story, which has one if it waited or failed. One that was answered at once has none, and neither has
    /// one that was given up once its answer had begun: clients may stop reading when they like.
    fn end_story(&mut self, outcome: Outcome) {
        let failed = match outcome {
            Outcome::Completed => self.status >= 500,
            Outcome::ClientGone => false,
            _ => true,
        };
        if failed || (outcome == Outcome::ClientGone && self.status == NO_ANSWER) {
            self.story_of_a_failure();
        }
        if let Some(story) = self.story.take() {
            let status = (self.status != NO_ANSWER).then_some(self.status);
            let ending = Ending { outcome: outcome.name(), admitted: true, status, failed };
            self.shared.history.end(story, ending);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or_else(|| match () {
            () if std::thread::panicking() => Outcome::Internal,
            () if self.under_way.is_stalled() || stream_stall::is_ending() => Outcome::ClientStalled,
            () if self.shared.cut.load(Ordering::Relaxed) => Outcome::Draining,
            () => Outcome::ClientGone,
        });
        self.end_hold(HoldEnd::Ended(outcome));
        if outcome == Outcome::ClientGone && self.status != NO_ANSWER {
            self.under_way.given_up(self.started);
        }
        // The story first, so that who sees the count finds it.
        self.end_story(outcome);
        if let Some(trace) = &mut self.trace {
            trace.ended(&traced::Ending {
                gate: &self.gate,
                request_id: &self.request_id,
                outcome,
                status: (self.status != NO_ANSWER).then_some(self.status),
                cold: self.cold,
            });
        }
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

/// A request that was not admitted, as history has it.
pub(super) fn refused(
    shared: &Shared,
    gate: &Gate,
    request_id: &HeaderValue,
    started: Instant,
    asked: RequestInfo,
    error: &ProxyError,
) {
    let story = begin(shared, gate, request_id, started, Some(asked));
    story.set_reason(&error.to_string());
    let answer = error.answer();
    let status = Some(answer.status.as_u16());
    shared.history.end(story, Ending { outcome: answer.code, admitted: false, status, failed: true });
}

/// What a request asks for.
pub(super) fn asked(head: &request::Parts, model: Option<&str>) -> RequestInfo {
    let mut asked = RequestInfo::new(&head.method, head.uri.path(), model);
    asked.trace_id = forward::trace_id(&head.headers).map(Into::into);
    asked
}

fn begin(
    shared: &Shared,
    gate: &Gate,
    request_id: &HeaderValue,
    arrived: Instant,
    asked: Option<RequestInfo>,
) -> Arc<Story> {
    let request_id = String::from_utf8_lossy(request_id.as_bytes());
    shared.history.begin(Arrival::new(gate.key(), &request_id, arrived), asked)
}
