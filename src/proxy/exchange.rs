//! Accounting of one admitted request. Its outcome is counted exactly once, on drop.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderValue, request};
use tokio::time::Instant;

use super::{
    access_log::AccessLine, connection_state::RequestGuard, dispatch_error::RetryableFailure, forward,
    request_trace::TraceSlot, shared::Shared,
};
use crate::{
    admission::{Gate, Permit},
    coldstart::{LeaveReason, Phase},
    error::{Outcome, ProxyError},
    history::{ArrivedRequest, Ending, Event, HoldReason, RequestInfo, Story},
    hold::Ticket,
    openai::Dialect,
    state::Endpoint,
    telemetry::HoldEnd,
};

/// An admitted request. Dropping it records the outcome.
pub struct Exchange {
    gate: Arc<Gate>,
    under_way: RequestGuard,
    shared: Arc<Shared>,
    /// Value of `x-request-id`.
    pub request_id: HeaderValue,
    /// Error format of the API that the client uses.
    pub dialect: Dialect,
    started: Instant,
    outcome: Option<Outcome>,
    status: u16,
    current_hold: Option<CurrentHold>,
    /// Total time in the hold queue.
    waited: Duration,
    cold: bool,
    /// Timeline for the history; present once the request has been held or has failed.
    story: Option<Arc<Story>>,
    /// Present if the request is sampled.
    trace: TraceSlot,
    /// Present if the access log is on.
    access: Option<Box<RequestInfo>>,
}

struct CurrentHold {
    since: Instant,
    /// Activations of the target before this hold.
    activations: u64,
}

/// Status of requests without a response (nginx: "client closed request").
const CLIENT_CLOSED_REQUEST: u16 = 499;

// === impl Exchange ===

impl Exchange {
    /// Starts accounting for an admitted request that arrived at `started`.
    pub fn new(
        gate: Arc<Gate>,
        under_way: RequestGuard,
        shared: Arc<Shared>,
        request_id: HeaderValue,
        dialect: Dialect,
        started: Instant,
        trace: TraceSlot,
    ) -> Self {
        Self {
            gate,
            under_way,
            shared,
            request_id,
            dialect,
            started,
            outcome: None,
            status: CLIENT_CLOSED_REQUEST,
            current_hold: None,
            waited: Duration::ZERO,
            cold: false,
            story: None,
            trace,
            access: None,
        }
    }

    /// Returns the route.
    pub const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Notes that a model server's response is being relayed.
    pub(super) fn relays(&self) {
        self.under_way.relays();
    }

    /// Returns the arrival time.
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// Returns the total time in the hold queue, or `None` if the request was never held.
    pub fn waited(&self) -> Option<Duration> {
        (!self.waited.is_zero()).then_some(self.waited)
    }

    /// Returns `true` if a cold start held the request.
    pub const fn is_cold(&self) -> bool {
        self.cold
    }

    /// Returns the timeline, which starts when a request is held or fails.
    pub fn story(&mut self, head: &request::Parts, model: Option<&str>) -> &Arc<Story> {
        self.story.get_or_insert_with(|| {
            begin_story(
                &self.shared,
                &self.gate,
                &self.request_id,
                self.started,
                Some(summarize(head, model)),
            )
        })
    }

    /// Records an event now, in the timeline and the trace. Free without either.
    pub(super) fn record(&mut self, event: Event) {
        if self.story.is_some() || self.trace.is_some() {
            self.record_at(Instant::now(), event);
        }
    }

    fn record_at(&mut self, at: Instant, event: Event) {
        if let Some(trace) = &mut self.trace {
            trace.record(at, &event);
        }
        if let Some(story) = &self.story {
            story.record(at, event);
        }
    }

    /// Adds the request to the access log when it ends.
    pub fn log_access(&mut self, info: RequestInfo) {
        self.access = Some(Box::new(info));
    }

    /// Records the start of a hold.
    pub fn begin_hold(&mut self, ticket: &Ticket<Permit>) {
        let since = ticket.since();
        let why = if self.gate.target().is_up() { HoldReason::Saturated } else { HoldReason::NothingReady };
        self.record_at(since, Event::Held { position: ticket.ahead() + 1, why });
        self.current_hold = Some(CurrentHold { since, activations: self.gate.cold_starts().activations() });
    }

    /// Records the end of a hold by a permit.
    pub fn release(&mut self) {
        self.end_hold(HoldEnd::Dispatched);
    }

    /// Records a dispatch. Makes its span the parent of the endpoint's spans, by `traceparent` in `head`.
    pub fn record_dispatch(&mut self, endpoint: &Endpoint, head: &mut request::Parts) {
        if let Some(trace) = &mut self.trace {
            trace.attempt(endpoint, head);
        }
        if let Some(story) = &self.story {
            story.record(Instant::now(), Event::dispatched(endpoint.address()));
        }
    }

    /// Records a dispatch that failed and may be retried.
    pub(super) fn record_failed_dispatch(
        &mut self,
        failure: &RetryableFailure,
        head: &request::Parts,
        model: Option<&str>,
    ) {
        self.story(head, model);
        self.record(Event::dispatch_failed(failure.permit.endpoint().address(), &failure.reason));
    }

    /// Records the end of a hold by the fallback.
    pub fn record_fallback(&mut self) {
        self.end_hold(HoldEnd::Ended(Outcome::ColdStartTimeout));
        self.record(Event::FellBack);
    }

    /// Records the head of the response.
    pub fn first_byte(&mut self, status: u16) {
        self.status = status;
        // Exemplars point to slow requests only.
        let traced = self.trace.as_ref().filter(|_| self.waited().is_some()).map(|trace| trace.id());
        self.gate.counters().first_byte(self.started.elapsed(), self.cold, traced);
        self.record(Event::FirstByte { status });
    }

    /// Returns the request id as text.
    pub fn id(&self) -> &str {
        self.request_id.to_str().unwrap_or("anteroom")
    }

    /// Splits the wait by phase of the cold start. The remainder was spent waiting for capacity.
    pub fn wait_by_phase(&self) -> Vec<(Phase, Duration)> {
        let waits = self.story.as_ref().map(|story| story.waits()).unwrap_or_default();
        self.gate.cold_starts().shares(&waits)
    }

    /// Sets the outcome. A later call overrides it.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        let error = (outcome != Outcome::Completed).then(|| outcome.name());
        self.record(Event::AttemptEnded { error });
    }

    /// Sets the outcome of a response that the endpoint aborted.
    pub fn fail_response(&mut self, error: &dyn std::fmt::Display) {
        self.end(Outcome::UpstreamError);
        self.set_reason(&error.to_string());
    }

    /// Sets outcome and status of a failed request. The status is that of `error`, even after an early 200.
    pub fn fail(&mut self, error: &ProxyError) {
        self.status = error.answer().status.as_u16();
        // A refusal after admission: the streamed body exceeded its limits.
        self.outcome = Some(error.outcome_or_refusal().unwrap_or(Outcome::ClientGone));
        self.set_reason(&error.to_string());
    }

    fn set_reason(&mut self, reason: &str) {
        self.story_of_failure().set_reason(reason);
    }

    /// Returns the timeline. A timeline that starts here lacks the request line, which is no longer available.
    fn story_of_failure(&mut self) -> &Arc<Story> {
        self.story.get_or_insert_with(|| {
            begin_story(&self.shared, &self.gate, &self.request_id, self.started, None)
        })
    }

    fn end_hold(&mut self, end: HoldEnd) {
        let Some(hold) = self.current_hold.take() else { return };
        // The linger restarts: a client that gave up may retry.
        self.gate.demand().record_activity();
        let held = hold.since.elapsed();
        self.waited += held.max(Duration::from_nanos(1));
        let cold_starts = self.gate.cold_starts();
        let woken = cold_starts.activations() > hold.activations;
        // A failed activation has ended by the time its requests are released.
        let failed = end == HoldEnd::Ended(Outcome::ColdStartFailed);
        self.cold |= woken || failed || (end != HoldEnd::Dispatched && cold_starts.phase().is_some());
        if self.cold {
            cold_starts.record_leave(match end {
                HoldEnd::Dispatched => LeaveReason::Released,
                HoldEnd::Ended(Outcome::ClientGone) => LeaveReason::Left,
                HoldEnd::Ended(_) => LeaveReason::Failed,
            });
        }
        let cold_start = cold_starts.latest_id().filter(|_| self.cold);
        self.gate.counters().held(end, held, self.trace.as_ref().map(|trace| trace.id()));
        self.gate.mark_dirty();
        self.record_at(hold.since + held, Event::Dequeued { cold_start });
    }

    /// Ends the trace, and adds the timeline to the history if the request was held or has failed. Cancelling a response
    /// that has begun is no failure.
    fn record_end(&mut self, outcome: Outcome) {
        let status = (self.status != CLIENT_CLOSED_REQUEST).then_some(self.status);
        let failed = match outcome {
            Outcome::Completed => self.status >= 500,
            Outcome::ClientGone => false,
            _ => true,
        };
        if failed || (outcome == Outcome::ClientGone && status.is_none()) {
            self.story_of_failure();
        }
        let ending = Ending { outcome: outcome.name(), admitted: true, status, failed };
        if let Some(trace) = &mut self.trace {
            let early = self.story.as_ref().and_then(|story| story.early_answer());
            trace.ended(&self.gate, &self.request_id, ending, early, self.cold);
        }
        if let Some(story) = self.story.take() {
            self.shared.history.end(story, ending);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or_else(|| match () {
            () if std::thread::panicking() => Outcome::Internal,
            () if self.under_way.is_stalled() => Outcome::ClientStalled,
            () if self.shared.drain_timed_out.load(Ordering::Relaxed) => Outcome::Draining,
            () => Outcome::ClientGone,
        });
        self.end_hold(HoldEnd::Ended(outcome));
        if outcome == Outcome::ClientGone && self.status != CLIENT_CLOSED_REQUEST {
            self.under_way.record_client_abort(self.started);
        }
        // Before the counter, so that the history is complete when the counter changes.
        self.record_end(outcome);
        self.gate.counters().end(outcome, self.status, self.cold);
        if let Some(info) = &self.access {
            let line = AccessLine {
                request_id: &self.request_id,
                route: Some(self.gate.key()),
                info,
                status: self.status,
                outcome: outcome.name(),
                waited: self.waited,
                total: self.started.elapsed(),
            };
            line.log();
        }
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

/// Adds a request that was not admitted to the history.
pub(super) fn record_rejection(
    shared: &Shared,
    gate: &Gate,
    request_id: &HeaderValue,
    started: Instant,
    asked: RequestInfo,
    error: &ProxyError,
) {
    let story = begin_story(shared, gate, request_id, started, Some(asked));
    story.set_reason(&error.to_string());
    let answer = error.answer();
    let status = Some(answer.status.as_u16());
    shared.history.end(story, Ending { outcome: answer.code, admitted: false, status, failed: true });
}

/// Summarizes a request for the history.
pub(super) fn summarize(head: &request::Parts, model: Option<&str>) -> RequestInfo {
    let mut asked = RequestInfo::new(&head.method, head.uri.path(), model);
    asked.trace_id = forward::trace_id(&head.headers).map(Into::into);
    asked
}

fn begin_story(
    shared: &Shared,
    gate: &Gate,
    request_id: &HeaderValue,
    arrived: Instant,
    asked: Option<RequestInfo>,
) -> Arc<Story> {
    let request_id = String::from_utf8_lossy(request_id.as_bytes());
    shared.history.begin(ArrivedRequest::new(gate.key(), &request_id, arrived), asked)
}
