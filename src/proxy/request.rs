//! A client's request before it is admitted.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Version, request};
use tokio::time::Instant;

use super::{
    client::Client,
    connection_state::RequestGuard,
    exchange, forward,
    heartbeat::HeartbeatPreference,
    intake::{BufferedBody, UnreadBody},
    interceptor::request::InterceptedRequest,
    responses::ResponseAffinity,
};
use crate::{
    admission::Gate,
    error::ProxyError,
    history::RequestInfo,
    openai::{self, ApiFormat, ClientTimeouts, RoutingFields},
};

/// A request whose route is known, with the head as the client sent it. The head is boxed from the start, as it would
/// otherwise take space in the future of every step.
pub(super) struct ReceivedRequest {
    pub(super) head: Box<request::Parts>,
    pub(super) host: HeaderValue,
    pub(super) body: RequestBody,
    pub(super) started: Instant,
    pub(super) under_way: RequestGuard,
}

/// A request ready for admission to its route. The head is as the endpoint gets it.
pub(super) struct RoutedRequest {
    pub(super) head: Box<request::Parts>,
    pub(super) gate: Arc<Gate>,
    pub(super) body: RequestBody,
    /// `None` for requests that are never held (`GET /v1/responses/{id}`) and for routes that proxy any application.
    pub(super) shape: Option<ApiFormat>,
    /// Result of scanning the body; empty if the body has not been read.
    pub(super) scan: RoutingFields,
    pub(super) heartbeats: HeartbeatPreference,
    /// Present on routes that proxy any application.
    pub(super) intercepted: Option<Box<InterceptedRequest>>,
    pub(super) affinity: Option<Box<ResponseAffinity>>,
    /// HTTP version of the client; the head has that of the endpoint.
    pub(super) version: Version,
    pub(super) request_id: HeaderValue,
    pub(super) started: Instant,
    pub(super) under_way: RequestGuard,
}

/// A request body before admission.
pub(super) enum RequestBody {
    Unread(UnreadBody),
    Buffered(BufferedBody),
}

/// A request that was not admitted.
pub(super) struct Rejection {
    /// Route and summary of the request, if its route was found.
    pub(super) gate: Option<(Arc<Gate>, Box<RequestInfo>)>,
    pub(super) error: ProxyError,
}

// === impl ReceivedRequest ===

impl ReceivedRequest {
    /// Rewrites the head for an endpoint of `gate`.
    pub(super) fn routed_to(self, gate: Arc<Gate>, client: &Client) -> RoutedRequest {
        let Self { mut head, host, body, started, under_way } = self;
        let version = head.version;
        let request_id = forward::prepare_request(&mut head, &host, client.address);
        RoutedRequest {
            head,
            gate,
            body,
            shape: None,
            scan: RoutingFields::default(),
            heartbeats: HeartbeatPreference::default(),
            intercepted: None,
            affinity: None,
            version,
            request_id,
            started,
            under_way,
        }
    }
}

// === impl RoutedRequest ===

impl RoutedRequest {
    /// Returns the id of the only endpoint that may serve the request, if there is one.
    pub(super) fn pin(&self) -> Option<u64> {
        self.affinity.as_ref().and_then(|affinity| affinity.pin)
    }

    /// Rejects the request with `error`.
    pub(super) fn rejected(&self, error: ProxyError) -> Rejection {
        Rejection::of(&self.gate, &self.head, self.scan.model.as_deref(), error)
    }
}

// === impl Rejection ===

impl Rejection {
    /// Rejects a request for a known route.
    pub(super) fn of(
        gate: &Arc<Gate>,
        head: &request::Parts,
        model: Option<&str>,
        error: ProxyError,
    ) -> Self {
        Self { gate: Some((gate.clone(), Box::new(exchange::summarize(head, model)))), error }
    }
}

impl From<ProxyError> for Rejection {
    fn from(error: ProxyError) -> Self {
        Self { gate: None, error }
    }
}

/// Checks that the client's `x-anteroom-max-wait`, if present, can be parsed.
///
/// # Errors
/// [`ProxyError::InvalidRequest`] if it cannot.
pub(super) fn check_max_wait(headers: &HeaderMap) -> Result<(), ProxyError> {
    if headers.contains_key(openai::MAX_WAIT) { patience(headers).map(drop) } else { Ok(()) }
}

/// Returns how long the client is prepared to wait, from its headers.
///
/// # Errors
/// [`ProxyError::InvalidRequest`] if `x-anteroom-max-wait` cannot be parsed.
pub(super) fn patience(headers: &HeaderMap) -> Result<ClientTimeouts, ProxyError> {
    ClientTimeouts::of(headers).map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}
