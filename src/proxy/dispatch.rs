//! One dispatch: a request that has a permit goes to its endpoint; what may be tried again comes back.

mod refused;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode, header::CONTENT_LENGTH, request};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::{
    Proxy,
    answers::tell_wait,
    beats::Wishes,
    body::{Body, Lease, Relay},
    exchange::Exchange,
    first_token::TokenWatch,
    forward,
    intake::{Buffered, Unread},
    intercept::Intercepted,
    memory::Memory,
    outgoing::{CutOff, Outgoing, Streamed},
    responses::{Kept, NewResponse},
    traced::Traced,
    tries::Tries,
    tunnel::Tunnel,
};
use crate::{
    admission::{Gate, Permit},
    config::Limits,
    error::{Outcome, ProxyError},
    hold::{Place, Ticket},
    state::Verdict,
    upstream::{Reuse, SendError},
};

/// A request as it goes to an endpoint, again if need be.
pub(super) struct Sending {
    pub(super) head: Box<request::Parts>,
    source: Source,
    pub(super) tries: Tries,
    /// Its route serves anything.
    pub(super) intercepted: Option<Box<Intercepted>>,
    /// What it has to do with responses that servers keep.
    pub(super) kept: Option<Box<Kept>>,
    /// What heartbeats there may be.
    pub(super) wishes: Wishes,
}

enum Source {
    /// There is nothing to send.
    Empty,
    Buffered(Buffered),
    Streamed(Streamed),
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
    /// The right to be where it went: it is in flight there until it is held again.
    pub(super) permit: Permit,
    pub(super) reason: String,
    /// It says nothing of the endpoint, which may be sent to at once.
    pub(super) is_ours: bool,
    /// The endpoint broke it off after it was written, and had answered so often after failures by then.
    broken_off: Option<u32>,
}

/// How long a request waits for the verdict on an endpoint that broke it off: longer than the probe takes that its owner
/// makes at once, by default.
const VERDICT: Duration = Duration::from_secs(2);

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
        let Sending { head, source, tries, intercepted, .. } = sending;
        if let Some(intercepted) = intercepted {
            intercepted.bound(&mut timeouts, &mut limits);
        }
        if let Some(trace) = &mut trace {
            trace.attempt(permit.endpoint(), head);
        }
        let reuse = tries.reuse();
        let keep = (reuse != Reuse::Once).then_some(&self.shared.memory);
        let body = || source.dispatch(&limits, keep);
        let error = match self.upstream.send(permit.endpoint(), head, body, timeouts, reuse).await {
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
            SendError::Reset { source, .. } => CutOff::among(source, &limits),
            SendError::Body(source) => CutOff::among(&**source, &limits),
            _ => None,
        };
        if let Some(error) = cut_off {
            return Err(Failed::Finally(error));
        }
        let reason = error.to_string();
        let setback = match &error {
            SendError::Reset { .. } => return Err(sending.broken_off(permit, reason)),
            SendError::Gone(_) => (tries.lost(&reason) && source.is_left()).then_some(false),
            SendError::Connect { .. } | SendError::ConnectTimeout(_) => {
                tries.missed(&reason);
                let is_ours = error.is_ours();
                // Others may have a connection to it already, and go on.
                if !is_ours {
                    permit.suspect();
                }
                source.is_left().then_some(is_ours)
            }
            _ => None,
        };
        tracing::debug!(route = %gate.key(), %error, again = setback.is_some(), "dispatch failed");
        if let Some(is_ours) = setback {
            return Err(Failed::ForNow(Setback { is_ours, ..Setback::of(permit, reason) }));
        }
        let (route, reason) = (gate.key().clone(), format!("{reason}{}", tries.verdict(source.is_left())));
        Err(Failed::Finally(match error {
            SendError::ResponseTimeout { .. } if intercepted.is_some() => {
                ProxyError::UpstreamTimeout { route, reason }
            }
            _ => ProxyError::UpstreamError { route, reason },
        }))
    }

    /// Takes a request into the queue again, at its old place; one that streamed is buffered for that. Until then it is in
    /// flight where it failed.
    pub(super) async fn hold_again(
        &self,
        sending: &mut Sending,
        gate: &Arc<Gate>,
        place: Place,
        setback: Setback,
        deadline: Instant,
    ) -> Result<Ticket<Permit>, ProxyError> {
        if let Some(answers) = setback.broken_off {
            let rest = sending.tries.rest();
            let _ = timeout_at(deadline, setback.settle(gate, answers, rest)).await;
        }
        sending.source = match std::mem::replace(&mut sending.source, Source::Empty) {
            // On the heap: what is buffered already should not carry its room.
            Source::Streamed(body) => {
                let limits = **self.shared.limits.load();
                Source::Buffered(Box::pin(body.buffer(&limits, &self.shared.memory)).await?)
            }
            source => source,
        };
        let bytes = match &sending.source {
            Source::Buffered(read) => read.bytes.len(),
            Source::Empty | Source::Streamed(_) => 0,
        };
        let pin = sending.kept.as_ref().and_then(|kept| kept.pin);
        let ticket = gate.readmit_for(pin, place, bytes);
        drop(setback);
        Ok(ticket)
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
                let made = sending.kept.and_then(|kept| {
                    NewResponse::watch(&kept, head.status, &sending.head, &self.shared, &lease)
                });
                // What has a length has no room for anything else.
                let beats = match head.headers.contains_key(CONTENT_LENGTH) {
                    true => None,
                    false => sending.wishes.beats(exchange.gate(), &sending.head.headers, &head.headers),
                };
                let relay = Relay::new(incoming, lease, exchange, deadline, watch, made, beats);
                Response::from_parts(head, Body::Relay(relay))
            }
            Answer::Begun(response, begun, lease) => {
                let (mut head, incoming) = response.into_parts();
                finish(&mut head, &mut exchange);
                let deadline = intercepted.and_then(|by| by.deadline);
                Response::from_parts(
                    head,
                    Body::Relay(
                        Relay::new(incoming, lease, exchange, deadline, None, None, None).begun_with(begun),
                    ),
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
        wishes: Wishes,
    ) -> Self {
        // What a completion does twice, it does twice in vain; what another application does, nobody knows.
        let tries = Tries::new(intercepted.is_some() && !head.method.is_safe());
        Self { head, source: body.into(), tries, intercepted, wishes, kept: None }
    }

    /// An endpoint broke it off after it was written: either of the two is to blame.
    fn broken_off(&mut self, permit: Permit, reason: String) -> Failed {
        let endpoint = permit.endpoint();
        let answers = endpoint.answers();
        let is_left = self.source.is_left();
        let again = self.tries.broken_off(endpoint, &reason) && is_left;
        permit.doubt();
        tracing::debug!(route = %permit.gate().key(), reason, again, "dispatch failed");
        if again {
            return Failed::ForNow(Setback { broken_off: Some(answers), ..Setback::of(permit, reason) });
        }
        let reason = reason + &self.tries.verdict(is_left);
        Failed::Finally(ProxyError::UpstreamError { route: permit.gate().key().clone(), reason })
    }
}

// === impl Setback ===

impl Setback {
    fn of(permit: Permit, reason: String) -> Self {
        Self { permit, reason, is_ours: false, broken_off: None }
    }

    /// Waits until another endpoint may take the request; or until it is known whether the one that broke it off lives,
    /// and then for the rest between two writes to the same. That it is down needs no rest: its owner has a back-off.
    async fn settle(&self, gate: &Gate, answers: u32, rest: Duration) {
        let endpoint = self.permit.endpoint();
        if gate.has_room_beside(endpoint) {
            return;
        }
        let rested = Instant::now() + rest;
        match timeout(VERDICT, endpoint.verdict(answers)).await {
            Ok(Verdict::Down) => {}
            Ok(Verdict::Alive) => sleep_until(rested).await,
            Err(_) => self.permit.suspect(),
        }
    }
}

// === impl Source ===

/// A request body before admission.
pub(super) enum Intake {
    Unread(Unread),
    Read(Buffered),
}

impl From<Intake> for Source {
    fn from(intake: Intake) -> Self {
        match intake {
            Intake::Unread(body) if body.incoming.is_end_stream() => Self::Empty,
            Intake::Unread(body) => Self::Streamed(Streamed::new(body)),
            Intake::Read(read) => Self::Buffered(read),
        }
    }
}

impl Source {
    /// Makes the body of one dispatch; one that streams is kept for others within `keep`, if given.
    fn dispatch(&self, limits: &Limits, keep: Option<&Arc<Memory>>) -> Option<Outgoing> {
        match self {
            Self::Empty => Some(Outgoing::Full(None)),
            Self::Buffered(read) => {
                Some(Outgoing::Full(Some(read.bytes.clone()).filter(|bytes| !bytes.is_empty())))
            }
            Self::Streamed(body) => body.replay(limits, keep),
        }
    }

    /// Returns whether it can be sent (again).
    fn is_left(&self) -> bool {
        match self {
            Self::Empty | Self::Buffered(_) => true,
            Self::Streamed(body) => body.is_left(),
        }
    }
}
