//! The trace of one request: a server span, a span for each hold with the phases of its cold start, and a span for each
//! attempt.
//!
//! Owned by `Proxy::answer` until admission, then by the exchange. Spans are submitted on drop.

mod describe;
mod phases;

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Request, request};
use tokio::time::Instant;

use self::describe::{fail, text};
use super::client::Client;
use crate::{
    admission::Gate,
    error::{Outcome, ProxyError},
    history::{Ending, Event},
    openai::RoutingFields,
    state::{Endpoint, Protocol},
    telemetry::traces::{ClockAnchor, Context, Parent, Span, SpanDirection, SpanQueue, names},
};

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The trace of a request, if sampled. Taken on admission.
pub(super) type TraceSlot = Option<Box<RequestTrace>>;

/// The trace of a sampled request.
pub struct RequestTrace {
    traces: Arc<SpanQueue>,
    context: Context,
    clock: ClockAnchor,
    server: Span,
    /// The current hold or attempt.
    open: Option<Span>,
    done: Vec<Span>,
    /// Number of spans dropped beyond [`SpanQueue::MAX_SPANS`].
    dropped: u64,
    /// Attempts so far.
    sent: u32,
}

// === impl RequestTrace ===

impl RequestTrace {
    /// Starts a trace, or continues that of the client. Returns `None` if it is not sampled. An absent or invalid
    /// `traceparent` is replaced in either case.
    pub(super) fn begin<B>(
        traces: &Arc<SpanQueue>,
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
            clock: ClockAnchor::now(),
            server: server?,
            open: None,
            done: Vec::new(),
            dropped: 0,
            sent: 0,
        }))
    }

    /// Returns the trace id, for exemplars.
    pub(super) fn id(&self) -> u128 {
        self.context.trace_id
    }

    /// Adds the model and `stream` to the server span.
    pub(super) fn record_scan(&mut self, scan: &RoutingFields) {
        if let Some(model) = &scan.model {
            self.server.set(names::MODEL, model.to_string());
            if scan.stream {
                self.server.set(names::STREAM, true);
            }
        }
    }

    /// Records an event. A dispatch is recorded by [`Self::attempt`].
    pub(super) fn record(&mut self, at: Instant, event: &Event) {
        let attempt = self.open.as_mut().filter(|span| span.kind == SpanDirection::Client);
        match (event, attempt) {
            (Event::Held { .. }, _) => {
                self.close(at);
                if self.sent > 0 {
                    self.server.event(at, names::HELD_AGAIN);
                }
                self.open = Some(Span::new(names::HOLD.into(), SpanDirection::Internal, self.server.id, at));
            }
            (Event::Dequeued { .. }, _) => self.close(at),
            (Event::FellBack, _) => self.server.event(at, names::FELL_BACK),
            (Event::HeadArrived { status }, Some(span)) => {
                span.event(at, names::FIRST_BYTE);
                span.set(names::STATUS_CODE, i64::from(*status));
                if *status >= 400 {
                    fail(span, status.to_string());
                }
            }
            (Event::FirstToken, span) => {
                if let Some(span) = span {
                    span.event(at, names::FIRST_TOKEN);
                }
                self.server.set(names::FIRST_CHUNK, (at - self.server.start).as_secs_f64());
            }
            (Event::AttemptEnded { error }, Some(span)) => {
                if let Some(error) = error {
                    fail(span, *error);
                }
                self.close(at);
            }
            _ => {}
        }
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
        self.open = Some(span);
    }

    /// Ends the trace of a request that was not admitted.
    pub(super) fn refused(
        mut self: Box<Self>,
        gate: Option<&Gate>,
        request_id: &HeaderValue,
        error: &ProxyError,
    ) {
        if let ProxyError::ModelNotFound(model) = error {
            self.server.set(names::MODEL, model.to_string());
        }
        let answer = error.answer();
        self.describe_end(gate, request_id, answer.code, Some(answer.status.as_u16()));
    }

    /// Records a response of the proxy itself.
    pub(super) fn answered(&mut self, status: u16) {
        self.server.set(names::STATUS_CODE, i64::from(status));
        if status >= 500 {
            fail(&mut self.server, status.to_string());
        }
    }

    /// Ends the trace of an admitted request. `early`: the client has got a 200 already, even if `ending` is an error.
    pub(super) fn ended(
        &mut self,
        gate: &Gate,
        request_id: &HeaderValue,
        ending: Ending,
        early: Option<Instant>,
        cold: bool,
    ) {
        let Ending { outcome, status, .. } = ending;
        let error = (outcome != Outcome::Completed.name()).then_some(outcome);
        self.record(Instant::now(), &Event::AttemptEnded { error });
        self.server.set(names::COLD_START, cold);
        if let Some(early) = early {
            self.server.event(early, names::EARLY_200);
        }
        self.describe_end(Some(gate), request_id, outcome, early.map(|_| 200).or(status));
        for place in 0..self.done.len() {
            if self.done[place].kind == SpanDirection::Internal {
                let phases = phases::of(gate.cold_starts(), &mut self.done[place]);
                phases.into_iter().for_each(|span| self.keep(span));
            }
        }
    }

    fn describe_end(
        &mut self,
        gate: Option<&Gate>,
        request_id: &HeaderValue,
        outcome: &'static str,
        status: Option<u16>,
    ) {
        let server = &mut self.server;
        if let Some(gate) = gate {
            server.set(names::ANTEROOM_ROUTE, gate.key().to_string());
        }
        server.set(names::REQUEST_ID, text(request_id));
        server.set(names::OUTCOME, outcome);
        if let Some(status) = status {
            server.set(names::STATUS_CODE, i64::from(status));
        }
        match status {
            // A client error that was reported in full.
            Some(400..=498) => {}
            Some(status @ 500..) if outcome == Outcome::Completed.name() => fail(server, status.to_string()),
            _ if outcome == Outcome::Completed.name() => {}
            _ => fail(server, outcome),
        }
    }

    fn close(&mut self, now: Instant) {
        if let Some(mut open) = self.open.take() {
            open.end = now;
            self.keep(open);
        }
    }

    fn keep(&mut self, span: Span) {
        if self.done.len() + 1 < SpanQueue::MAX_SPANS { self.done.push(span) } else { self.dropped += 1 }
    }
}

impl Drop for RequestTrace {
    fn drop(&mut self) {
        let now = Instant::now();
        if !self.server.has_attribute(names::OUTCOME) && !self.server.has_attribute(names::STATUS_CODE) {
            // Dropped before admission and without a response: the client has disconnected, or is about to be.
            self.server.set(names::OUTCOME, Outcome::ClientGone.name());
            fail(&mut self.server, Outcome::ClientGone.name());
        }
        self.close(now);
        self.server.end = now;
        let server = std::mem::replace(&mut self.server, Span::new("".into(), SpanDirection::Server, 0, now));
        let spans = std::iter::once(server).chain(self.done.drain(..)).collect();
        self.traces.submit(&self.context, &self.clock, spans, self.dropped);
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
