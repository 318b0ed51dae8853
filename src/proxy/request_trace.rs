//! The trace of one request: a span for the whole of it, one for each time that it is held, with the phases of the cold
//! start that it waited for, and one for each time that it is sent.
//!
//! It goes along with the request, first in a slot of `Proxy::answer`, then in its account, and hands its spans over
//! when it is dropped. A request that is not traced has none.

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

/// Where the trace of a request is until it is admitted.
pub(super) type TraceSlot = Option<Box<RequestTrace>>;

/// When a 200 went out before the answer was there, told by the body that began it.
pub(super) type EarlyAnswerTime = Arc<OnceLock<Instant>>;

/// The trace of a request that is exported.
pub struct RequestTrace {
    traces: Arc<Traces>,
    context: Context,
    clock: Clock,
    server: Span,
    open: Option<Open>,
    done: Vec<Open>,
    /// Children that there was no room for.
    dropped: u64,
    /// How often it was sent.
    sent: u32,
    early: EarlyAnswerTime,
}

/// What a request is doing.
enum Open {
    Hold(Span),
    Attempt(Span),
}

/// How a request ended, for its span.
pub(super) struct Ending<'a> {
    pub(super) gate: &'a Gate,
    pub(super) request_id: &'a HeaderValue,
    pub(super) outcome: Outcome,
    /// What went out, if an answer did.
    pub(super) status: Option<u16>,
    pub(super) cold: bool,
}

// === impl RequestTrace ===

impl RequestTrace {
    /// Begins the trace of a request, or goes on with the one that it is part of. Whether or not it is exported, its
    /// `traceparent` says from now on which one that is; what came as one and is none is gone.
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
            // It belonged to what could not be read.
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

    /// For exemplars: what they lead to.
    pub(super) fn id(&self) -> u128 {
        self.context.trace_id
    }

    /// Where the body of an early answer notes when it began.
    pub(super) fn early(&self) -> EarlyAnswerTime {
        self.early.clone()
    }

    /// What its body says.
    pub(super) fn asks(&mut self, scan: &Scan) {
        if let Some(model) = &scan.model {
            self.server.set(names::MODEL, model.to_string());
            if scan.stream {
                self.server.set(names::STREAM, true);
            }
        }
    }

    /// It is held.
    pub(super) fn hold(&mut self, since: Instant) {
        self.close(Instant::now());
        if self.sent > 0 {
            self.server.event(since, names::HELD_AGAIN, Vec::new());
        }
        let span = Span::new(names::HOLD.into(), Kind::Internal, self.server.id, since);
        self.open = Some(Open::Hold(span));
    }

    /// It is held no more.
    pub(super) fn end_hold(&mut self, end: Instant) {
        if let Some(Open::Hold(_)) = self.open {
            self.close(end);
        }
    }

    /// What waited in vain goes to the fallback.
    pub(super) fn record_fallback(&mut self) {
        self.server.event(Instant::now(), names::FELL_BACK, Vec::new());
    }

    /// It is sent: its endpoint learns that its own work is part of this attempt.
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
        self.open = Some(Open::Attempt(span));
    }

    /// The head of an answer came.
    pub(super) fn answer_began(&mut self, status: u16) {
        let Some(Open::Attempt(span)) = &mut self.open else { return };
        span.event(Instant::now(), names::FIRST_BYTE, Vec::new());
        span.set(names::STATUS_CODE, i64::from(status));
        if status >= 400 {
            fail(span, status.to_string());
        }
    }

    /// Its first token came.
    pub(super) fn first_token(&mut self) {
        let now = Instant::now();
        self.server.set(names::FIRST_CHUNK, (now - self.server.start).as_secs_f64());
        if let Some(Open::Attempt(span)) = &mut self.open {
            span.event(now, names::FIRST_TOKEN, Vec::new());
        }
    }

    /// An attempt came to nothing.
    pub(super) fn attempt_failed(&mut self, why: &'static str) {
        if let Some(Open::Attempt(span)) = &mut self.open {
            fail(span, why);
        }
        self.close(Instant::now());
    }

    /// All of the answer has come, or no more will.
    pub(super) fn end_attempt(&mut self, outcome: Outcome) {
        let Some(Open::Attempt(span)) = &mut self.open else { return };
        if outcome != Outcome::Completed {
            fail(span, outcome.name());
        }
        self.close(Instant::now());
    }

    /// It was not admitted.
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

    /// We answered it ourselves.
    pub(super) fn answered(&mut self, status: u16) {
        self.server.set(names::STATUS_CODE, i64::from(status));
        if status >= 500 {
            fail(&mut self.server, status.to_string());
        }
    }

    /// An admitted request ended.
    pub(super) fn ended(&mut self, ending: &Ending<'_>) {
        let Ending { gate, request_id, outcome, status, cold } = *ending;
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
            // A whole answer that says what the client did wrong.
            (Outcome::Completed, _) | (_, Some(400..=498)) => {}
            (outcome, _) => fail(server, outcome.name()),
        }
        for place in 0..self.done.len() {
            if let Open::Hold(hold) = &mut self.done[place] {
                let phases = phases::of(gate.cold_starts(), hold);
                phases.into_iter().for_each(|span| self.keep(Open::Attempt(span)));
            }
        }
    }

    fn close(&mut self, now: Instant) {
        if let Some(mut open) = self.open.take() {
            open.span().end = now;
            self.keep(open);
        }
    }

    fn keep(&mut self, span: Open) {
        if self.done.len() + 1 < Traces::MAX_SPANS { self.done.push(span) } else { self.dropped += 1 }
    }
}

impl Drop for RequestTrace {
    fn drop(&mut self) {
        let now = Instant::now();
        if !self.server.says(names::OUTCOME) && !self.server.says(names::STATUS_CODE) {
            // It was dropped before it was admitted or answered: the client has gone, or is about to be let go.
            self.server.set(names::OUTCOME, Outcome::ClientGone.name());
            fail(&mut self.server, Outcome::ClientGone.name());
        }
        self.close(now);
        self.server.end = now;
        let server = std::mem::replace(&mut self.server, Span::new("".into(), Kind::Server, 0, now));
        let spans = std::iter::once(server).chain(self.done.drain(..).map(Open::into_span)).collect();
        self.traces.submit(&self.context, &self.clock, spans, self.dropped);
    }
}

// === impl Open ===

impl Open {
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

/// The trace that a request says it is part of; two are none.
pub(super) fn parent(headers: &HeaderMap) -> Option<Parent> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let parent = Parent::parse(values.next()?.as_bytes())?;
    values.next().is_none().then_some(parent)
}

/// Several lines are one list (W3C Trace Context, section 3.3.1).
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
