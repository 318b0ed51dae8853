//! A request as it is sent to an endpoint, its response, and the reasons for having none.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, request};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    beats::Wishes,
    first_token::TokenWatch,
    intake::Buffered,
    interceptor::InterceptedRequest,
    lease::Lease,
    memory::Memory,
    outgoing::{Outgoing, Streamed},
    request::RequestBody,
    responses::Kept,
    tries::Tries,
};
use crate::{admission::Permit, config::Limits, error::ProxyError, state::Verdict};

/// A request as it is sent to an endpoint, several times if it is retried.
pub(super) struct UpstreamRequest {
    pub(super) head: Box<request::Parts>,
    pub(super) body: UpstreamBody,
    pub(super) tries: Tries,
    /// Present on routes that proxy any application.
    pub(super) intercepted: Option<Box<InterceptedRequest>>,
    pub(super) kept: Option<Box<Kept>>,
    pub(super) wishes: Wishes,
}

/// A request body that each dispatch sends from its beginning.
pub(super) enum UpstreamBody {
    Empty,
    Buffered(Buffered),
    Streamed(Streamed),
}

/// The response of an endpoint.
pub(super) enum UpstreamResponse {
    /// To be passed on as it arrives.
    Streaming(Response<Incoming>, Lease, Option<Box<TokenWatch>>),
    /// An error response too long to inspect: the part that was read, to go before the rest.
    PartlyRead(Response<Incoming>, Bytes, Lease),
    /// An error response that was inspected and is to be passed on.
    Complete(Response<Bytes>),
    /// 101: the connection becomes a tunnel.
    Upgraded(Response<Incoming>, Lease),
}

/// The reason for a dispatch without a response.
pub(super) enum DispatchError {
    Retryable(RetryableFailure),
    Final(ProxyError),
}

/// A failed dispatch that may be retried.
pub(super) struct RetryableFailure {
    /// Kept until the request is queued again, so that it still counts as in flight.
    pub(super) permit: Permit,
    pub(super) reason: String,
    /// The failure is the proxy's own and says nothing about the endpoint: retry without a backoff.
    pub(super) is_ours: bool,
    /// If the endpoint reset the connection after the request was written: its count of recoveries by then.
    pub(super) broken_off: Option<u32>,
}

/// Time limit for the verdict on an endpoint that reset a request. Longer than the probe that its owner sends at once
/// takes by default.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);

// === impl UpstreamRequest ===

impl UpstreamRequest {
    /// Creates a request that has not been sent.
    pub(super) fn new(
        head: Box<request::Parts>,
        body: RequestBody,
        intercepted: Option<Box<InterceptedRequest>>,
        wishes: Wishes,
        kept: Option<Box<Kept>>,
    ) -> Self {
        // What a completion does twice, it does twice in vain; what another application does, nobody knows.
        let tries = Tries::new(intercepted.is_some() && !head.method.is_safe());
        Self { head, body: body.into(), tries, intercepted, wishes, kept }
    }

    /// An endpoint broke it off after it was written: either of the two is to blame.
    pub(super) fn broken_off(&mut self, permit: Permit, reason: String) -> DispatchError {
        let endpoint = permit.endpoint();
        let answers = endpoint.answers();
        let is_left = self.body.is_left();
        let again = self.tries.broken_off(endpoint, &reason) && is_left;
        permit.doubt();
        tracing::debug!(route = %permit.gate().key(), reason, again, "dispatch failed");
        if again {
            return DispatchError::Retryable(RetryableFailure {
                broken_off: Some(answers),
                ..RetryableFailure::of(permit, reason)
            });
        }
        let reason = reason + &self.tries.verdict(is_left);
        DispatchError::Final(ProxyError::UpstreamError { route: permit.gate().key().clone(), reason })
    }
}

// === impl RetryableFailure ===

impl RetryableFailure {
    pub(super) fn of(permit: Permit, reason: String) -> Self {
        Self { permit, reason, is_ours: false, broken_off: None }
    }

    /// Waits until another endpoint may take the request; or until it is known whether the one that broke it off lives,
    /// and then for the rest between two writes to the same. That it is down needs no rest: its owner has a back-off.
    pub(super) async fn settle(&self, answers: u32, rest: Duration) {
        let endpoint = self.permit.endpoint();
        if self.permit.gate().has_room_beside(endpoint) {
            return;
        }
        let rested = Instant::now() + rest;
        match timeout(VERDICT_TIMEOUT, endpoint.verdict(answers)).await {
            Ok(Verdict::Down) => {}
            Ok(Verdict::Alive) => sleep_until(rested).await,
            Err(_) => self.permit.suspect(),
        }
    }
}

// === impl UpstreamBody ===

impl From<RequestBody> for UpstreamBody {
    fn from(body: RequestBody) -> Self {
        match body {
            RequestBody::Unread(body) if body.incoming.is_end_stream() => Self::Empty,
            RequestBody::Unread(body) => Self::Streamed(Streamed::new(body)),
            RequestBody::Buffered(read) => Self::Buffered(read),
        }
    }
}

impl UpstreamBody {
    /// Makes the body of one dispatch; one that streams is kept for others within `keep`, if given.
    pub(super) fn dispatch(&self, limits: &Limits, keep: Option<&Arc<Memory>>) -> Option<Outgoing> {
        match self {
            Self::Empty => Some(Outgoing::Full(None)),
            Self::Buffered(read) => {
                Some(Outgoing::Full(Some(read.bytes.clone()).filter(|bytes| !bytes.is_empty())))
            }
            Self::Streamed(body) => body.replay(limits, keep),
        }
    }

    /// Returns whether it can be sent (again).
    pub(super) fn is_left(&self) -> bool {
        match self {
            Self::Empty | Self::Buffered(_) => true,
            Self::Streamed(body) => body.is_left(),
        }
    }
}
