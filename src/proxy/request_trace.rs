//! The trace of one request: a server span, a span for each hold with the phases of its cold start, and a span for each
//! attempt.
//!
//! Owned by `Proxy::answer` until admission, then by the exchange. Spans are submitted on drop.

mod describe;
mod phases;

use std::sync::{Arc, OnceLock};

use http::{HeaderMap, HeaderName, HeaderValue, Request, request};
use opentelemetry::Value;
use tokio::time::Instant;

use super::Client;
use crate::{
    admission::Gate,
    error::{Outcome, ProxyError},
    openai::Scan,
    state::{Endpoint, Protocol},
    telemetry::traces::{Clock, Context, Kind, Parent, Span, Traces, names},
};

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The trace of a request, if sampled. Taken on admission.
pub(super) type TraceSlot = Option<Box<RequestTrace>>;

/// Time of an early 200, set by its body.
pub(super) type EarlyAnswerTime = Arc<OnceLock<Instant>>;

/// The trace of a sampled request.
pub struct RequestTrace {
    traces: Arc<Traces>,
    context: Context,
    clock: Clock,
    server: Span,
    open: Option<OpenSpan>,
    done: Vec<OpenSpan>,
    /// Spans over [`Traces::MAX_SPANS`].
    dropped: u64,
    /// Attempts so far.
    sent: u32,
    early: EarlyAnswerTime,
}

/// The current child span.
enum OpenSpan {
    Hold(Span),
    Attempt(Span),
}

/// End of an admitted request.
pub(super) struct TraceEnding<'a> {
    pub(super) gate: &'a Gate,
    pub(super) request_id: &'a HeaderValue,
    pub(super) outcome: Outcome,
    /// Status sent to the client; `None` without a response.
    pub(super) status: Option<u16>,
    pub(super) cold: bool,
}

// === impl RequestTrace ===

impl RequestTrace {
    /// Starts a trace, or continues that of the client. Returns `None` if it is not sampled. An absent or invalid
    /// `traceparent` is replaced in either case.
    pub(super) fn begin<B>(
        traces: &Arc<Traces>,
        client: &Client,
        request: &mut Request<B>,
        started: Instant,
    ) -> TraceSlot {
        let headers = request.headers();
        let context = match parent(headers) {
            Some(parent) if !parent.is_sampled() => return None,
            Some(parent) => Context::child_of(parent, state(headers).as_deref()),
            None => {
                let mut context = Context::new();
                context.sample(traces.is_sampled(context.trace_id));
                context
            }
        };
        let is_new = context.parent == 0;
        let is_sampled = context.flags & 1 != 0;
        let server = is_sampled.then(|| describe::server(client, request, started));
        if is_new {
            let id = server.as_ref().map_or_else(|| fastrand::u64(1..), |server| server.id);
            let headers = request.headers_mut();
            // Belongs to the invalid `traceparent`.
            headers.remove(TRACESTATE);
            set_parent(headers, &context, id);
        }
        Some(Box::new(Self {
            traces: traces.clone(),
            context,
            clock: Clock::now(),
            server: server?,
            open: None,
            done: Vec::new(),
            dropped: 0,
            sent: 0,
            early: EarlyAnswerTime::default(),
        }))
    }

    /// Returns the trace id, for exemplars.
    pub(super) fn id(&self) -> u128 {
        self.context.trace_id
    }

    /// Returns the cell for the time of an early 200.
    pub(super) fn early(&self) -> EarlyAnswerTime {
        self.early.clone()
    }

    /// Adds the model and `stream`.
    pub(super) fn record_scan(&mut self, scan: &Scan) {
        if let Some(model) = &scan.model {
            self.server.set(names::MODEL, model.to_string());
            if scan.stream {
                self.server.set(names::STREAM, true);
            }
        }
    }

    /// Starts the span of a hold.
    pub(super) fn hold(&mut self, since: Instant) {
        self.close(Instant::now());
        if self.sent > 0 {
            self.server.event(since, names::HELD_AGAIN, Vec::new());
        }
        let span = Span::new(names::HOLD.into(), Kind::Internal, self.server.id, since);
        self.open = Some(OpenSpan::Hold(span));
    }

    /// Ends the span of a hold.
    pub(super) fn end_hold(&mut self, end: Instant) {
        if let Some(OpenSpan::Hold(_)) = self.open {
            self.close(end);
        }
    }

    /// Records the use of the fallback.
    pub(super) fn record_fallback(&mut self) {
        self.server.event(Instant::now(), names::FELL_BACK, Vec::new());
    }

    /// Starts the span of an attempt, and makes it the parent of the endpoint's spans.
    pub(super) fn attempt(&mut self, endpoint: &Endpoint, head: &mut request::Parts) {
        let now = Instant::now();
        self.close(now);
        let mut span = describe::attempt(endpoint.address(), head, self.server.id, now);
        span.set(names::PROTOCOL_VERSION, if endpoint.protocol() == Protocol::H2c { "2" } else { "1.1" });
        if self.sent > 0 {
            span.set(names::RESEND_COUNT, i64::from(self.sent));
        }
        self.sent = self.sent.saturating_add(1);
        set_parent(&mut head.headers, &self.context, span.id);
        self.open = Some(OpenSpan::Attempt(span));
    }

    /// Records the head of the response.
    pub(super) fn answer_began(&mut self, status: u16) {
        let Some(OpenSpan::Attempt(span)) = &mut self.open else { return };
        span.event(Instant::now(), names::FIRST_BYTE, Vec::new());
        span.set(names::STATUS_CODE, i64::from(status));
        if status >= 400 {
            fail(span, status.to_string());
        }
    }

    /// Records the first token.
    pub(super) fn first_token(&mut self) {
        let now = Instant::now();
        self.server.set(names::FIRST_CHUNK, (now - self.server.start).as_secs_f64());
        if let Some(OpenSpan::Attempt(span)) = &mut self.open {
            span.event(now, names::FIRST_TOKEN, Vec::new());
        }
    }

    /// Ends an attempt without a response.
    pub(super) fn attempt_failed(&mut self, why: &'static str) {
        if let Some(OpenSpan::Attempt(span)) = &mut self.open {
            fail(span, why);
        }
        self.close(Instant::now());
    }

    /// Ends an attempt after its response.
    pub(super) fn end_attempt(&mut self, outcome: Outcome) {
        let Some(OpenSpan::Attempt(span)) = &mut self.open else { return };
        if outcome != Outcome::Completed {
            fail(span, outcome.name());
        }
        self.close(Instant::now());
    }

    /// Ends the trace of a request that was not admitted.
    pub(super) fn refused(
        mut self: Box<Self>,
        gate: Option<&Gate>,
        request_id: &HeaderValue,
        error: &ProxyError,
    ) {
        let answer = error.answer();
        self.server.set(names::REQUEST_ID, text(request_id));
        if let Some(gate) = gate {
            self.server.set(names::ANTEROOM_ROUTE, gate.key().to_string());
        }
        if let ProxyError::ModelNotFound(model) = error {
            self.server.set(names::MODEL, model.to_string());
        }
        self.server.set(names::OUTCOME, answer.code);
        self.answered(answer.status.as_u16());
        if answer.status.is_server_error() {
            fail(&mut self.server, answer.code);
        }
    }

    /// Records a response of the proxy itself.
    pub(super) fn answered(&mut self, status: u16) {
        self.server.set(names::STATUS_CODE, i64::from(status));
        if status >= 500 {
            fail(&mut self.server, status.to_string());
        }
    }

    /// Ends the trace of an admitted request.
    pub(super) fn ended(&mut self, ending: &TraceEnding<'_>) {
        let TraceEnding { gate, request_id, outcome, status, cold } = *ending;
        self.end_attempt(outcome);
        self.close(Instant::now());
        let server = &mut self.server;
        server.set(names::ANTEROOM_ROUTE, gate.key().to_string());
        server.set(names::REQUEST_ID, text(request_id));
        server.set(names::OUTCOME, outcome.name());
        server.set(names::COLD_START, cold);
        let early = self.early.get().copied();
        if let Some(early) = early {
            server.event(early, names::EARLY_200, Vec::new());
        }
        let sent = early.map(|_| 200).or(status);
        if let Some(sent) = sent {
            server.set(names::STATUS_CODE, i64::from(sent));
        }
        match (outcome, sent) {
            (Outcome::Completed, Some(status)) if status >= 500 => fail(server, status.to_string()),
            // A client error that was reported in full.
            (Outcome::Completed, _) | (_, Some(400..=498)) => {}
            (outcome, _) => fail(server, outcome.name()),
        }
        for place in 0..self.done.len() {
            if let OpenSpan::Hold(hold) = &mut self.done[place] {
                let phases = phases::of(gate.cold_starts(), hold);
                phases.into_iter().for_each(|span| self.keep(OpenSpan::Attempt(span)));
            }
        }
    }

    fn close(&mut self, now: Instant) {
        if let Some(mut open) = self.open.take() {
            open.span().end = now;
            self.keep(open);
        }
    }

    fn keep(&mut self, span: OpenSpan) {
        if self.done.len() + 1 < Traces::MAX_SPANS { self.done.push(span) } else { self.dropped += 1 }
    }
}

impl Drop for RequestTrace {
    fn drop(&mut self) {
        let now = Instant::now();
        if !self.server.says(names::OUTCOME) && !self.server.says(names::STATUS_CODE) {
            // Dropped before admission and without a response: the client has disconnected, or is about to be.
            self.server.set(names::OUTCOME, Outcome::ClientGone.name());
            fail(&mut self.server, Outcome::ClientGone.name());
        }
        self.close(now);
        self.server.end = now;
        let server = std::mem::replace(&mut self.server, Span::new("".into(), Kind::Server, 0, now));
        let spans = std::iter::once(server).chain(self.done.drain(..).map(OpenSpan::into_span)).collect();
        self.traces.submit(&self.context, &self.clock, spans, self.dropped);
    }
}

// === impl OpenSpan ===

impl OpenSpan {
    const fn span(&mut self) -> &mut Span {
        match self {
            Self::Hold(span) | Self::Attempt(span) => span,
        }
    }

    fn into_span(self) -> Span {
        match self {
            Self::Hold(span) | Self::Attempt(span) => span,
        }
    }
}

/// Returns the parent of a request's trace. Repeated `traceparent` headers are invalid.
pub(super) fn parent(headers: &HeaderMap) -> Option<Parent> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let parent = Parent::parse(values.next()?.as_bytes())?;
    values.next().is_none().then_some(parent)
}

/// Joins the lines of `tracestate` (W3C Trace Context, section 3.3.1).
fn state(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(TRACESTATE).iter().map(|value| value.to_str().ok());
    let values = values.collect::<Option<Vec<_>>>()?;
    Some(values.join(",")).filter(|state| !state.is_empty())
}

fn set_parent(headers: &mut HeaderMap, context: &Context, span_id: u64) {
    if let Ok(value) = HeaderValue::from_maybe_shared(bytes::Bytes::from(context.traceparent(span_id))) {
        headers.insert(TRACEPARENT, value);
    }
}

fn fail(span: &mut Span, why: impl Into<Value>) {
    span.fail();
    span.set(names::ERROR_TYPE, why);
}

fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}
