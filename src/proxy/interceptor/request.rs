//! A request of a route that proxies any HTTP application: its limits, placeholder and fallback.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request,
};
use tokio::time::Instant;

use super::route::Interceptor;
use crate::{
    admission::Permit,
    config::Limits,
    domain::{ByteCount, Overflow, Period, StaticAnswer, UpstreamTimeouts},
    error::ProxyError,
    proxy::{body::Body, forward::KEDA_COLD_START, tunnel::Upgrade},
    telemetry::StaticKind,
};

/// State of a request of an application route.
pub(in crate::proxy) struct InterceptedRequest {
    pub(super) interceptor: Arc<Interceptor>,
    /// Deadline of the whole request, from `timeouts.request`.
    pub(in crate::proxy) deadline: Option<Instant>,
    /// Present if the client asked for a WebSocket.
    pub(in crate::proxy) upgrade: Option<Upgrade>,
    /// The response carries the cold-start header. Unset for the fallback and for static routes.
    pub(super) reports_cold_start: bool,
}

// === impl InterceptedRequest ===

impl InterceptedRequest {
    /// Returns the placeholder to send instead of holding the request, if configured, and wakes the target.
    pub(in crate::proxy) fn placeholder_instead_of_hold(
        &self,
        head: &request::Parts,
    ) -> Option<Response<Body>> {
        let gate = &self.interceptor.gate;
        let placeholder =
            self.interceptor.config.immediate_placeholder().filter(|_| !gate.target().is_up())?;
        gate.wake();
        Some(self.placeholder(placeholder, head))
    }

    /// Returns the placeholder to send when the hold queue is full, if configured.
    pub(in crate::proxy) fn placeholder_on_overflow(
        &self,
        error: &ProxyError,
        head: &request::Parts,
    ) -> Option<Response<Body>> {
        let placeholder = self.interceptor.config.placeholder.as_ref()?;
        let is_full = matches!(error, ProxyError::HoldQueueFull { .. });
        (is_full && self.interceptor.config.overflow == Overflow::Placeholder)
            .then(|| self.placeholder(placeholder, head))
    }

    /// Limits the timeouts of a dispatch to the deadline, and lifts the limits on the body, which is streamed.
    pub(in crate::proxy) fn apply_limits(&self, timeouts: &mut UpstreamTimeouts, limits: &mut Limits) {
        limits.max_body_bytes = ByteCount::MAX;
        // gRPC client streams may pause at any time.
        limits.min_rate = ByteCount::bytes(0);
        if let Some(deadline) = self.deadline {
            let left = Period::from(deadline.saturating_duration_since(Instant::now()));
            timeouts.connect_timeout = timeouts.connect_timeout.min(left);
            timeouts.response_timeout = timeouts.response_timeout.min(left);
        }
    }

    /// Returns a permit for the fallback, if configured and below its limit.
    pub(in crate::proxy) fn fallback(&self) -> Option<Permit> {
        self.interceptor.gate.fall_back()
    }

    fn placeholder(&self, answer: &StaticAnswer, head: &request::Parts) -> Response<Body> {
        self.interceptor.gate.counters().record_static_answer(StaticKind::Placeholder);
        static_response(answer, head, Body::full)
    }

    /// Sets the cold-start header of the KEDA HTTP Add-on.
    pub(in crate::proxy) fn set_cold_start_headers(&self, headers: &mut HeaderMap, cold: bool) {
        headers.remove(KEDA_COLD_START);
        if self.reports_cold_start {
            headers.insert(KEDA_COLD_START, HeaderValue::from_static(if cold { "true" } else { "false" }));
        }
    }
}

/// Creates a response configured in the route. `body` wraps its bytes.
pub(super) fn static_response(
    answer: &StaticAnswer,
    head: &request::Parts,
    body: impl FnOnce(Bytes) -> Body,
) -> Response<Body> {
    let is_head = head.method == Method::HEAD;
    let Some((bytes, kind)) = answer.body(head.uri.path()) else {
        let mut response = Response::new(body(Bytes::from_static(b"Internal Server Error\n")));
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        return response;
    };
    let length = HeaderValue::from(bytes.len());
    let mut response = Response::new(body(if is_head { Bytes::new() } else { bytes }));
    *response.status_mut() = answer.status();
    let headers = response.headers_mut();
    headers.clone_from(answer.headers());
    if is_head {
        headers.insert(CONTENT_LENGTH, length);
    }
    if let Some(kind) = kind {
        headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static(kind));
    }
    response
}
