//! A request of a route that proxies any HTTP application: its limits, placeholder and fallback.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request,
};
use tokio::time::Instant;

use super::Interceptor;
use crate::{
    admission::Permit,
    config::Limits,
    domain::{ByteCount, Overflow, Period, StaticAnswer, UpstreamTimeouts},
    error::ProxyError,
    proxy::{body::Body, forward::KEDA_COLD_START, tunnel::Upgrade},
    telemetry::StaticKind,
};

/// What a request of such a route carries on its way.
pub(in crate::proxy) struct InterceptedRequest {
    pub(super) by: Arc<Interceptor>,
    /// When it must have ended.
    pub(in crate::proxy) deadline: Option<Instant>,
    /// It wants to speak another protocol than HTTP from its answer on.
    pub(in crate::proxy) upgrade: Option<Upgrade>,
    /// Whether its answer says if there was a cold start: not one of the fallback, nor to a request that is no demand.
    pub(super) reports_cold_start: bool,
}

// === impl InterceptedRequest ===

impl InterceptedRequest {
    /// The placeholder, if that is what a request gets that would be held. The target is woken.
    pub(in crate::proxy) fn placeholder_instead_of_hold(
        &self,
        head: &request::Parts,
    ) -> Option<Response<Body>> {
        let gate = &self.by.gate;
        let placeholder = self.by.asks.placeholder_at_once().filter(|_| !gate.target().is_up())?;
        gate.wake();
        Some(self.placeholder(placeholder, head))
    }

    /// The placeholder, if that is what a request gets that finds as many held as may be.
    pub(in crate::proxy) fn placeholder_on_overflow(
        &self,
        error: &ProxyError,
        head: &request::Parts,
    ) -> Option<Response<Body>> {
        let placeholder = self.by.asks.placeholder.as_ref()?;
        let is_full = matches!(error, ProxyError::HoldQueueFull { .. });
        (is_full && self.by.asks.overflow == Overflow::Placeholder)
            .then(|| self.placeholder(placeholder, head))
    }

    /// What bounds a dispatch: the request's own limit. What is passed on unread may be of any size.
    pub(in crate::proxy) fn bound(&self, timeouts: &mut UpstreamTimeouts, limits: &mut Limits) {
        limits.max_body_bytes = ByteCount::MAX;
        // Streams of a client of gRPC bring a message now and then.
        limits.min_rate = ByteCount::bytes(0);
        if let Some(deadline) = self.deadline {
            let left = Period::from(deadline.saturating_duration_since(Instant::now()));
            timeouts.connect_timeout = timeouts.connect_timeout.min(left);
            timeouts.response_timeout = timeouts.response_timeout.min(left);
        }
    }

    /// What a request gets whose deadline for readiness has passed, or whose target could not be started: the right to
    /// go to the fallback, if there is one.
    pub(in crate::proxy) fn fallback(&self) -> Option<Permit> {
        self.by.gate.fall_back()
    }

    fn placeholder(&self, answer: &StaticAnswer, head: &request::Parts) -> Response<Body> {
        self.by.gate.counters().answer_statically(StaticKind::Placeholder);
        static_response(answer, head, Body::full)
    }

    /// Says whether a cold start held the request, in the Add-on's word.
    pub(in crate::proxy) fn set_cold_start_headers(&self, headers: &mut HeaderMap, cold: bool) {
        headers.remove(KEDA_COLD_START);
        if self.reports_cold_start {
            headers.insert(KEDA_COLD_START, HeaderValue::from_static(if cold { "true" } else { "false" }));
        }
    }
}

/// An answer that stands in the object. `body` makes the body of what it says.
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
