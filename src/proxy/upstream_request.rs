//! A request as it is sent to an endpoint, and its response.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, request};
use http_body::Body as _;
use hyper::body::Incoming;

use super::{
    dispatch_error::{DispatchError, RetryableFailure},
    first_token::TokenWatch,
    heartbeat::HeartbeatPreference,
    intake::BufferedBody,
    interceptor::request::InterceptedRequest,
    lease::Lease,
    memory::Memory,
    outgoing::{OutgoingBody, StreamedBody},
    request::RequestBody,
    responses::ResponseAffinity,
    retry_budget::RetryBudget,
};
use crate::{admission::Permit, config::Limits, error::ProxyError};

/// A request as it is sent to an endpoint, several times if it is retried.
pub(super) struct UpstreamRequest {
    pub(super) head: Box<request::Parts>,
    pub(super) body: UpstreamBody,
    pub(super) retries: RetryBudget,
    /// Present on routes that proxy any application.
    pub(super) intercepted: Option<Box<InterceptedRequest>>,
    pub(super) affinity: Option<Box<ResponseAffinity>>,
    pub(super) heartbeats: HeartbeatPreference,
}

/// A request body that each dispatch sends from its beginning.
pub(super) enum UpstreamBody {
    Empty,
    Buffered(BufferedBody),
    Streamed(StreamedBody),
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

// === impl UpstreamRequest ===

impl UpstreamRequest {
    /// Creates a request that has not been sent.
    pub(super) fn new(
        head: Box<request::Parts>,
        body: RequestBody,
        intercepted: Option<Box<InterceptedRequest>>,
        heartbeats: HeartbeatPreference,
        affinity: Option<Box<ResponseAffinity>>,
    ) -> Self {
        // Repeating a completion has no side effects; repeating a request to an unknown application may.
        let retries = RetryBudget::new(intercepted.is_some() && !head.method.is_safe());
        Self { head, body: body.into(), retries, intercepted, heartbeats, affinity }
    }

    /// Records that the endpoint reset the connection after the request was written: the endpoint or the request may be
    /// at fault.
    pub(super) fn reset_by(&mut self, permit: Permit, reason: String) -> DispatchError {
        let endpoint = permit.endpoint();
        let answers = endpoint.answers();
        let can_resend = self.body.can_resend();
        let again = self.retries.record_reset(endpoint, &reason) && can_resend;
        permit.doubt();
        tracing::debug!(route = %permit.gate().key(), reason, again, "dispatch failed");
        if again {
            return DispatchError::Retryable(RetryableFailure {
                reset_at: Some(answers),
                ..RetryableFailure::of(permit, reason)
            });
        }
        let reason = reason + &self.retries.summary(can_resend);
        DispatchError::Final(ProxyError::UpstreamError { route: permit.gate().key().clone(), reason })
    }
}

// === impl UpstreamBody ===

impl From<RequestBody> for UpstreamBody {
    fn from(body: RequestBody) -> Self {
        match body {
            RequestBody::Unread(body) if body.incoming.is_end_stream() => Self::Empty,
            RequestBody::Unread(body) => Self::Streamed(StreamedBody::new(body)),
            RequestBody::Buffered(read) => Self::Buffered(read),
        }
    }
}

impl UpstreamBody {
    /// Creates the body of one dispatch. With `keep`, the parts of a streamed body are kept there for a retry. Returns
    /// `None` if the body can no longer be sent.
    pub(super) fn for_dispatch(&self, limits: &Limits, keep: Option<&Arc<Memory>>) -> Option<OutgoingBody> {
        match self {
            Self::Empty => Some(OutgoingBody::Full(None)),
            Self::Buffered(read) => {
                Some(OutgoingBody::Full(Some(read.bytes.clone()).filter(|bytes| !bytes.is_empty())))
            }
            Self::Streamed(body) => body.replay(limits, keep),
        }
    }

    /// Returns `true` if the body can be sent (again).
    pub(super) fn can_resend(&self) -> bool {
        match self {
            Self::Empty | Self::Buffered(_) => true,
            Self::Streamed(body) => body.can_replay(),
        }
    }
}
