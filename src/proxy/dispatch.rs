//! One dispatch of a request to an endpoint: send, classify the failure, forward the response.

mod inspect;

use bytes::Bytes;
use http::{Response, StatusCode, header::CONTENT_LENGTH};
use tokio::time::{Instant, timeout_at};

use super::{
    answers::set_wait_headers,
    body::{Body, Relay},
    dispatch_error::{DispatchError, RetryableFailure},
    exchange::Exchange,
    first_token::TokenWatch,
    forward,
    lease::Lease,
    outgoing::BodyAbort,
    responses::watch::ResponseIdWatch,
    shared::Proxy,
    tunnel::Tunnel,
    upstream_request::{UpstreamBody, UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    error::{Outcome, ProxyError},
    history::Event,
    hold::{QueuePosition, Ticket},
    upstream::{Reuse, SendError},
};

// === impl Proxy ===

impl Proxy {
    /// Sends a request to the endpoint of `permit`.
    pub(super) async fn dispatch(
        &self,
        permit: Permit,
        request: &mut UpstreamRequest,
        exchange: &mut Exchange,
    ) -> Result<UpstreamResponse, DispatchError> {
        let mut timeouts = permit.gate().policy().upstream;
        let mut limits = **self.shared.limits.load();
        let UpstreamRequest { head, body, retries, intercepted, .. } = request;
        if let Some(intercepted) = intercepted {
            intercepted.apply_limits(&mut timeouts, &mut limits);
        }
        exchange.record_dispatch(permit.endpoint(), head);
        let reuse = retries.connection_reuse();
        let keep = (reuse != Reuse::Once).then_some(&self.shared.memory);
        let new_body = || body.for_dispatch(&limits, keep);
        let error = match self.upstream.send(permit.endpoint(), head, new_body, timeouts, reuse).await {
            Ok((response, connection)) => {
                exchange.record(Event::HeadArrived { status: response.status().as_u16() });
                let lease = Lease { connection, pool: self.upstream.clone(), permit };
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    if intercepted.as_ref().is_some_and(|by| by.upgrade.is_some()) {
                        TokenWatch::begin(&lease.permit, head, &response);
                        return Ok(UpstreamResponse::Upgraded(response, lease));
                    }
                    // `Upgrade` is removed from requests, so the endpoint switched unasked.
                    let (route, reason) = (
                        lease.permit.gate().key().clone(),
                        "it switched protocols without being asked to".into(),
                    );
                    return Err(DispatchError::Final(ProxyError::UpstreamError { route, reason }));
                }
                if !inspect::needs_inspection(response.status(), &lease.permit) {
                    inspect::note_success(&head.method, response.status(), lease.permit.endpoint());
                    let watch = TokenWatch::begin(&lease.permit, head, &response);
                    return Ok(UpstreamResponse::Streaming(response, lease, watch));
                }
                let inspecting = self.inspect_error(response, lease, request, timeouts.idle_timeout.get());
                return Box::pin(inspecting).await;
            }
            Err(error) => error,
        };
        exchange.record(Event::AttemptEnded { error: Some(error.name()) });
        let aborted = match &error {
            SendError::Reset { source, .. } => BodyAbort::from_error_chain(source, &limits),
            SendError::Body(source) => BodyAbort::from_error_chain(&**source, &limits),
            _ => None,
        };
        if let Some(error) = aborted {
            return Err(DispatchError::Final(error));
        }
        let reason = error.to_string();
        let retry = match &error {
            SendError::Reset { .. } => return Err(request.reset_by(permit, reason)),
            SendError::Gone(_) => (retries.record_gone(&reason) && body.can_resend()).then_some(false),
            SendError::Connect { .. } | SendError::ConnectTimeout(_) => {
                retries.record_unsent(&reason);
                let is_ours = error.is_ours();
                // A local failure says nothing about the endpoint, whose open connections stay in use.
                if !is_ours {
                    permit.suspect();
                }
                body.can_resend().then_some(is_ours)
            }
            _ => None,
        };
        tracing::debug!(route = %permit.gate().key(), %error, again = retry.is_some(), "dispatch failed");
        if let Some(is_ours) = retry {
            let failure = RetryableFailure { is_ours, ..RetryableFailure::of(permit, reason) };
            return Err(DispatchError::Retryable(failure));
        }
        let (route, reason) =
            (permit.gate().key().clone(), format!("{reason}{}", retries.summary(body.can_resend())));
        Err(DispatchError::Final(match error {
            SendError::ResponseTimeout { .. } if intercepted.is_some() => {
                ProxyError::UpstreamTimeout { route, reason }
            }
            _ => ProxyError::UpstreamError { route, reason },
        }))
    }

    /// Queues a request again at its old place, and buffers a streamed body for that. Until then the request counts as in
    /// flight at the endpoint where it failed.
    pub(super) async fn requeue(
        &self,
        request: &mut UpstreamRequest,
        place: QueuePosition,
        failure: RetryableFailure,
        deadline: Instant,
    ) -> Result<Ticket<Permit>, ProxyError> {
        if let Some(answers) = failure.reset_at {
            let backoff = request.retries.backoff();
            let _ = timeout_at(deadline, failure.wait_for_verdict(answers, backoff)).await;
        }
        request.body = match std::mem::replace(&mut request.body, UpstreamBody::Empty) {
            // Boxed to keep the future small for bodies that are buffered already.
            UpstreamBody::Streamed(body) => {
                let limits = **self.shared.limits.load();
                UpstreamBody::Buffered(Box::pin(body.buffer(&limits, &self.shared.memory)).await?)
            }
            body => body,
        };
        let bytes = match &request.body {
            UpstreamBody::Buffered(read) => read.bytes.len(),
            UpstreamBody::Empty | UpstreamBody::Streamed(_) => 0,
        };
        let pin = request.affinity.as_ref().and_then(|affinity| affinity.pin);
        let ticket = failure.permit.gate().readmit_for(pin, place, bytes);
        drop(failure);
        Ok(ticket)
    }

    /// Turns the response of an endpoint into the response to the client.
    pub(super) fn forward_response(
        &self,
        response: UpstreamResponse,
        mut exchange: Exchange,
        request: UpstreamRequest,
    ) -> Response<Body> {
        let mut intercepted = request.intercepted;
        let upstream = exchange.started().elapsed();
        let request_id = exchange.request_id.clone();
        let finish = |head: &mut http::response::Parts, exchange: &mut Exchange| {
            forward::prepare_response(&mut head.headers, request_id);
            exchange.first_byte(head.status.as_u16());
            if let Some(waited) = exchange.waited() {
                let upstream = upstream.saturating_sub(waited);
                set_wait_headers(
                    &mut head.headers,
                    waited,
                    &exchange.wait_by_phase(),
                    upstream,
                    exchange.is_cold(),
                );
            }
            if let Some(intercepted) = &intercepted {
                intercepted.set_cold_start_headers(&mut head.headers, exchange.is_cold());
            }
        };
        match response {
            UpstreamResponse::Streaming(response, lease, watch) => {
                let (mut head, incoming) = response.into_parts();
                finish(&mut head, &mut exchange);
                let deadline = intercepted.and_then(|by| by.deadline);
                let id_watch = request.affinity.and_then(|affinity| {
                    ResponseIdWatch::watch(&affinity, head.status, &request.head, &self.shared, &lease)
                });
                // Heartbeats would exceed an announced length.
                let beats = match head.headers.contains_key(CONTENT_LENGTH) {
                    true => None,
                    false => request.heartbeats.within_response(
                        exchange.gate(),
                        &request.head.headers,
                        &head.headers,
                    ),
                };
                let relay = Relay::new(incoming, lease, exchange, deadline, watch, id_watch, beats);
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
                forward::set_websocket_upgrade(&mut head.headers);
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
                Response::from_parts(head, Body::for_admitted(body, exchange))
            }
        }
    }
}
