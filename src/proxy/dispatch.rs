//! One dispatch: a request that has a permit goes to its endpoint; what may be tried again comes back.

mod refused;

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode, request};
use hyper::body::Incoming;

use super::{
    Proxy,
    answers::tell_wait,
    body::{Body, Lease, Relay},
    exchange::Exchange,
    first_token::TokenWatch,
    forward,
    intake::{Buffered, CutOff, Outgoing, too_slow},
    intercept::Intercepted,
    traced::Traced,
    tunnel::Tunnel,
};
use crate::{
    admission::{Gate, Permit},
    config::Limits,
    error::{Outcome, ProxyError},
    hold::{Place, Ticket},
    state::Endpoint,
    upstream::{MAX_WRITES, SendError, Writes},
};

/// A request as it goes to an endpoint, again if need be.
pub(super) struct Sending {
    pub(super) head: Box<request::Parts>,
    source: Source,
    writes: Writes,
    /// Its route serves anything.
    pub(super) intercepted: Option<Box<Intercepted>>,
}

enum Source {
    Buffered(Buffered),
    /// Until it is sent.
    Streaming(Option<Incoming>),
}

/// What an endpoint answered.
pub(super) enum Answer {
    Stream(Response<Incoming>, Lease, Option<Box<TokenWatch>>),
    /// Looked at, and too long to be read to its end: what has been read, and the rest.
    Begun(Response<Incoming>, Bytes, Lease),
    /// Looked at, and so read to its end.
    Whole(Response<Bytes>),
    /// The last of HTTP on its connection, as was asked for.
    Switched(Response<Incoming>, Lease),
}

/// Why there is no answer.
pub(super) enum Failed {
    /// It may be tried again.
    ForNow(Setback),
    /// That was it.
    Finally(ProxyError),
}

/// A dispatch that came to nothing.
pub(super) struct Setback {
    /// Where it went.
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) reason: String,
    /// It says nothing of the endpoint, which may be sent to at once.
    pub(super) is_ours: bool,
}

// === impl Proxy ===

impl Proxy {
    /// Sends a request that has a permit.
    pub(super) async fn attempt(
        &self,
        permit: Permit,
        sending: &mut Sending,
        gate: &Gate,
        mut trace: Option<&mut Traced>,
    ) -> Result<Answer, Failed> {
        let mut timeouts = gate.policy().upstream;
        let mut limits = **self.shared.limits.load();
        let Sending { head, source, writes, intercepted } = sending;
        if let Some(intercepted) = intercepted {
            intercepted.bound(&mut timeouts, &mut limits);
        }
        if let Some(trace) = &mut trace {
            trace.attempt(permit.endpoint(), head);
        }
        let body = || source.take(&limits);
        let error = match self.upstream.send(permit.endpoint(), head, body, timeouts, writes).await {
            Ok((response, connection)) => {
                if let Some(trace) = trace {
                    trace.answer_began(response.status().as_u16());
                }
                let lease = Lease { connection, pool: self.upstream.clone(), permit };
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    if intercepted.as_ref().is_some_and(|by| by.upgrade.is_some()) {
                        TokenWatch::begin(&lease.permit, head, &response);
                        return Ok(Answer::Switched(response, lease));
                    }
                    // `Upgrade` is not passed on, so nobody asked for it, and what would follow is no HTTP.
                    let (route, reason) = (gate.key().clone(), "it switched to another protocol".into());
                    return Err(Failed::Finally(ProxyError::UpstreamError { route, reason }));
                }
                if !refused::is_to_be_read(response.status(), &lease.permit) {
                    refused::note_success(&head.method, response.status(), lease.permit.endpoint());
                    let watch = TokenWatch::begin(&lease.permit, head, &response);
                    return Ok(Answer::Stream(response, lease, watch));
                }
                let looking = self.refused(response, lease, sending, timeouts.idle_timeout.get());
                return Box::pin(looking).await;
            }
            Err(error) => error,
        };
        if let Some(trace) = trace {
            trace.attempt_failed(error.name());
        }
        let cut_off = match &error {
            SendError::Reset { source, .. } => cut_off(source, &limits),
            SendError::Body(source) => cut_off(&**source, &limits),
            _ => None,
        };
        if let Some(error) = cut_off {
            return Err(Failed::Finally(error));
        }
        let again = error.is_retryable() && writes.0 < MAX_WRITES && source.is_left();
        let is_ours = error.is_ours();
        // Others may have a connection to it already, and go on.
        if error.is_retryable() && !is_ours {
            permit.suspect();
        }
        tracing::debug!(route = %gate.key(), %error, again, "dispatch failed");
        let (route, reason) = (gate.key().clone(), error.to_string());
        if again {
            return Err(Failed::ForNow(Setback { endpoint: permit.endpoint().clone(), reason, is_ours }));
        }
        Err(Failed::Finally(match error {
            SendError::ResponseTimeout { .. } if intercepted.is_some() => {
                ProxyError::UpstreamTimeout { route, reason }
            }
            _ => ProxyError::UpstreamError { route, reason },
        }))
    }

    /// Takes a request into the queue again, at its old place; one that streamed is buffered for that.
    pub(super) async fn hold_again(
        &self,
        sending: &mut Sending,
        gate: &Arc<Gate>,
        place: Place,
    ) -> Result<Ticket<Permit>, ProxyError> {
        if let Source::Streaming(incoming) = &mut sending.source
            && let Some(incoming) = incoming.take()
        {
            sending.source = Intake::Read(self.read(incoming).await?).into();
        }
        let bytes = match &mut sending.source {
            Source::Buffered(read) => read.bytes.len(),
            Source::Streaming(_) => 0,
        };
        Ok(gate.readmit(place, bytes))
    }

    /// Passes an answer on.
    pub(super) fn respond(&self, answer: Answer, mut exchange: Exchange, sending: Sending) -> Response<Body> {
        let mut intercepted = sending.intercepted;
        let upstream = exchange.started().elapsed();
        let request_id = exchange.request_id.clone();
        let finish = |head: &mut http::response::Parts, exchange: &mut Exchange| {
            forward::response(&mut head.headers, request_id);
            exchange.first_byte(head.status.as_u16());
            if let Some(waited) = exchange.waited() {
                let upstream = upstream.saturating_sub(waited);
                tell_wait(&mut head.headers, waited, &exchange.shares(), upstream, exchange.is_cold());
            }
            if let Some(intercepted) = &intercepted {
                intercepted.tell_cold_start(&mut head.headers, exchange.is_cold());
            }
        };
        match answer {
            Answer::Stream(response, lease, watch) => {
                let (mut head, incoming) = response.into_parts();
                finish(&mut head, &mut exchange);
                let deadline = intercepted.and_then(|by| by.deadline);
                Response::from_parts(
                    head,
                    Body::Relay(Relay::new(incoming, lease, exchange, deadline, watch)),
                )
            }
            Answer::Begun(response, begun, lease) => {
                let (mut head, incoming) = response.into_parts();
                finish(&mut head, &mut exchange);
                let deadline = intercepted.and_then(|by| by.deadline);
                Response::from_parts(
                    head,
                    Body::Relay(Relay::new(incoming, lease, exchange, deadline, None).begun_with(begun)),
                )
            }
            Answer::Switched(mut response, lease) => {
                let upstream = hyper::upgrade::on(&mut response);
                let (mut head, _) = response.into_parts();
                finish(&mut head, &mut exchange);
                forward::upgrade(&mut head.headers);
                if let Some(by) = &mut intercepted
                    && let Some(upgrade) = by.upgrade.take()
                {
                    upgrade.begin(Tunnel { upstream, lease, exchange, deadline: by.deadline });
                }
                Response::from_parts(head, Body::full(Bytes::new()))
            }
            Answer::Whole(response) => {
                let (mut head, body) = response.into_parts();
                finish(&mut head, &mut exchange);
                exchange.end(Outcome::Completed);
                Response::from_parts(head, Body::ending(body, exchange))
            }
        }
    }
}

// === impl Sending ===

impl Sending {
    /// A request that has not been sent.
    pub(super) fn new(
        head: Box<request::Parts>,
        body: Intake,
        intercepted: Option<Box<Intercepted>>,
    ) -> Self {
        // What a completion does twice, it does twice in vain; what another application does, nobody knows.
        let once = intercepted.is_some() && !head.method.is_safe();
        let writes = if once { Writes(MAX_WRITES - 1) } else { Writes::default() };
        Self { head, source: body.into(), writes, intercepted }
    }
}

// === impl Setback ===

impl Setback {
    fn of(endpoint: Arc<Endpoint>, reason: &str) -> Self {
        Self { endpoint, reason: reason.into(), is_ours: false }
    }
}

// === impl Source ===

/// A request body before admission.
pub(super) enum Intake {
    Unread(Incoming),
    Read(Buffered),
}

impl From<Intake> for Source {
    fn from(intake: Intake) -> Self {
        match intake {
            Intake::Unread(incoming) => Self::Streaming(Some(incoming)),
            Intake::Read(read) => Self::Buffered(read),
        }
    }
}

impl Source {
    fn take(&mut self, limits: &Limits) -> Option<Outgoing> {
        match self {
            Self::Buffered(read) => {
                Some(Outgoing::Full(Some(read.bytes.clone()).filter(|bytes| !bytes.is_empty())))
            }
            Self::Streaming(incoming) => incoming.take().map(|incoming| Outgoing::stream(incoming, limits)),
        }
    }

    /// Whether it can be sent (again).
    const fn is_left(&self) -> bool {
        matches!(self, Self::Buffered(_) | Self::Streaming(Some(_)))
    }
}

/// The request body itself was what broke.
fn cut_off(error: &(dyn std::error::Error + 'static), limits: &Limits) -> Option<ProxyError> {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let cut_off = causes.into_iter().find_map(|cause| cause.downcast_ref::<CutOff>())?;
    Some(match cut_off {
        CutOff::TooLarge => ProxyError::RequestTooLarge { limit: limits.max_body_bytes.get() },
        CutOff::TooSlow => too_slow(limits),
        CutOff::Broken(_) => ProxyError::InvalidRequest("The request body broke off.".into()),
    })
}
