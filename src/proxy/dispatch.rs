//! One dispatch: a request that has a permit goes to its endpoint; what may be tried again comes back.

mod refused;

use bytes::Bytes;
use http::{Response, StatusCode, header::CONTENT_LENGTH};
use tokio::time::{Instant, timeout_at};

use super::{
    Proxy,
    answers::tell_wait,
    body::{Body, Relay},
    exchange::Exchange,
    first_token::TokenWatch,
    forward,
    lease::Lease,
    outgoing::CutOff,
    responses::watch::NewResponse,
    traced::Traced,
    tunnel::Tunnel,
    upstream_request::{DispatchError, RetryableFailure, UpstreamBody, UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    error::{Outcome, ProxyError},
    hold::{Place, Ticket},
    upstream::{Reuse, SendError},
};

// === impl Proxy ===

impl Proxy {
    /// Sends a request that has a permit.
    pub(super) async fn attempt(
        &self,
        permit: Permit,
        sending: &mut UpstreamRequest,
        mut trace: Option<&mut Traced>,
    ) -> Result<UpstreamResponse, DispatchError> {
        let mut timeouts = permit.gate().policy().upstream;
        let mut limits = **self.shared.limits.load();
        let UpstreamRequest { head, body: source, tries, intercepted, .. } = sending;
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
                        return Ok(UpstreamResponse::Upgraded(response, lease));
                    }
                    // `Upgrade` is not passed on, so nobody asked for it, and what would follow is no HTTP.
                    let (route, reason) =
                        (lease.permit.gate().key().clone(), "it switched to another protocol".into());
                    return Err(DispatchError::Final(ProxyError::UpstreamError { route, reason }));
                }
                if !refused::is_to_be_read(response.status(), &lease.permit) {
                    refused::note_success(&head.method, response.status(), lease.permit.endpoint());
                    let watch = TokenWatch::begin(&lease.permit, head, &response);
                    return Ok(UpstreamResponse::Streaming(response, lease, watch));
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
            return Err(DispatchError::Final(error));
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
        tracing::debug!(route = %permit.gate().key(), %error, again = setback.is_some(), "dispatch failed");
        if let Some(is_ours) = setback {
            let failure = RetryableFailure { is_ours, ..RetryableFailure::of(permit, reason) };
            return Err(DispatchError::Retryable(failure));
        }
        let (route, reason) =
            (permit.gate().key().clone(), format!("{reason}{}", tries.verdict(source.is_left())));
        Err(DispatchError::Final(match error {
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
        sending: &mut UpstreamRequest,
        place: Place,
        failure: RetryableFailure,
        deadline: Instant,
    ) -> Result<Ticket<Permit>, ProxyError> {
        if let Some(answers) = failure.broken_off {
            let rest = sending.tries.rest();
            let _ = timeout_at(deadline, failure.settle(answers, rest)).await;
        }
        sending.body = match std::mem::replace(&mut sending.body, UpstreamBody::Empty) {
            // On the heap: what is buffered already should not carry its room.
            UpstreamBody::Streamed(body) => {
                let limits = **self.shared.limits.load();
                UpstreamBody::Buffered(Box::pin(body.buffer(&limits, &self.shared.memory)).await?)
            }
            source => source,
        };
        let bytes = match &sending.body {
            UpstreamBody::Buffered(read) => read.bytes.len(),
            UpstreamBody::Empty | UpstreamBody::Streamed(_) => 0,
        };
        let pin = sending.kept.as_ref().and_then(|kept| kept.pin);
        let ticket = failure.permit.gate().readmit_for(pin, place, bytes);
        drop(failure);
        Ok(ticket)
    }

    /// Passes an answer on.
    pub(super) fn respond(
        &self,
        answer: UpstreamResponse,
        mut exchange: Exchange,
        sending: UpstreamRequest,
    ) -> Response<Body> {
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
            UpstreamResponse::Streaming(response, lease, watch) => {
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
            UpstreamResponse::PartlyRead(response, begun, lease) => {
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
            UpstreamResponse::Upgraded(mut response, lease) => {
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
            UpstreamResponse::Complete(response) => {
                let (mut head, body) = response.into_parts();
                finish(&mut head, &mut exchange);
                exchange.end(Outcome::Completed);
                Response::from_parts(head, Body::ending(body, exchange))
            }
        }
    }
}
