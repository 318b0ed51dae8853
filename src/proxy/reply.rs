//! Rejections, and the response headers that depend on the client and its connection.

use std::{
    num::NonZeroU32,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Version, header::CONNECTION, request};
use tokio::time::Instant;

use super::{
    access_log::AccessLine, answering::NextStep, answers::error_response, body::Body,
    connection_state::ConnectionState, exchange, forward, preflight::allow_reading, request_trace::TraceSlot,
    shared::Proxy,
};
use crate::{admission::Gate, error::ProxyError, history::RequestInfo, openai::Dialect};

/// Properties of a request and its connection that shape the response.
pub(super) struct ReplyContext {
    /// Id from the request, if present.
    id: Option<Box<HeaderValue>>,
    /// Error format of the API that the client uses.
    dialect: Dialect,
    version: Version,
    /// Idle timeout to announce in `Keep-Alive`, in seconds.
    keep_alive_s: Option<NonZeroU32>,
    /// Allowed origin of a cross-origin request. Boxed because it is rare.
    allowed_origin: Option<Box<HeaderValue>>,
    /// HEAD: the response has no body.
    is_head: bool,
    started: Instant,
    /// Present if the access log is on.
    access: Option<Box<RequestInfo>>,
}

// === impl ReplyContext ===

impl ReplyContext {
    /// Collects what the response to a request with this head depends on.
    pub(super) fn new(
        proxy: &Proxy,
        head: &request::Parts,
        connection: &ConnectionState,
        started: Instant,
    ) -> Self {
        // Copied, as a slice would keep the read buffer alive while the request is held.
        let id = head.headers.get(forward::REQUEST_ID);
        let id = id.and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok()).map(Box::new);
        let cross_site = &proxy.shared.cross_site;
        let allowed_origin =
            if cross_site.guards_requests() { cross_site.listed_origin(&head.headers) } else { None };
        Self {
            id,
            dialect: Dialect::of(head.uri.path(), &head.headers),
            version: head.version,
            keep_alive_s: keep_alive_s(head, connection),
            allowed_origin: allowed_origin.map(Box::new),
            is_head: head.method == Method::HEAD,
            started,
            access: proxy
                .shared
                .access_log
                .load(Ordering::Relaxed)
                .then(|| Box::new(exchange::summarize(head, None))),
        }
    }
}

// === impl Proxy ===

impl Proxy {
    /// Counts and logs a request that was not admitted, and builds the error response.
    pub(super) fn reject(
        &self,
        gate: Option<(Arc<Gate>, Box<RequestInfo>)>,
        error: &ProxyError,
        reply: &ReplyContext,
        trace: TraceSlot,
    ) -> Response<Body> {
        let id = reply.id.as_deref().cloned().unwrap_or_else(forward::new_id);
        if let Some(trace) = trace {
            trace.refused(gate.as_ref().map(|(gate, _)| &**gate), &id, error);
        }
        let detail = gate.as_ref().map(|(gate, _)| gate.policy().failure.detail).unwrap_or_default();
        if let Err(refusal) = error.outcome_or_refusal() {
            if let Some(info) = &reply.access {
                let line = AccessLine {
                    request_id: &id,
                    route: gate.as_ref().map(|(gate, _)| gate.key()),
                    info: gate.as_ref().map_or(info, |(_, asked)| asked),
                    status: error.answer().status.as_u16(),
                    outcome: refusal.answer().code,
                    waited: Duration::ZERO,
                    total: reply.started.elapsed(),
                };
                line.log();
            }
            match gate {
                Some((gate, asked)) => {
                    exchange::record_rejection(&self.shared, &gate, &id, reply.started, *asked, error);
                    gate.counters().refuse(refusal);
                }
                None => self.shared.unrouted.refuse(refusal),
            }
            tracing::debug!(refusal = refusal.answer().code, %error, request_id = ?id, "request refused");
        }
        let closes = matches!(error, ProxyError::Ambiguous(_)) && reply.version < Version::HTTP_2;
        let body = |body| Body::full(if reply.is_head { Bytes::new() } else { body });
        let mut response = error_response(&error.for_client(detail), reply.dialect, id, body);
        if closes {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Adds the headers that depend on the client's connection, and accounts for the memory of the proxy's own bodies.
    ///
    /// While draining, HTTP/1 responses carry `Connection: close`: closing without notice would fail a request that is
    /// already on its way. HTTP/2 has GOAWAY.
    pub(super) fn finish(&self, reply: &ReplyContext, mut response: Response<Body>) -> NextStep {
        if let Some(origin) = &reply.allowed_origin {
            allow_reading(response.headers_mut(), origin);
        }
        let is_http = response.status() != StatusCode::SWITCHING_PROTOCOLS;
        if reply.version < Version::HTTP_2 && is_http {
            let headers = response.headers_mut();
            if self.shared.draining.load(Ordering::Relaxed) {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            } else if let Some(seconds) = reply.keep_alive_s
                && !headers.contains_key(CONNECTION)
            {
                headers.insert(forward::KEEP_ALIVE, forward::keep_alive(seconds));
            }
        }
        let (head, body) = response.into_parts();
        let body = body.counted(&self.shared.memory, reply.version < Version::HTTP_2);
        NextStep::Answer(body.map(|body| Response::from_parts(head, body)))
    }
}

/// Returns the idle timeout to announce over HTTP/1.1, unless the client asked to close the connection.
fn keep_alive_s(head: &request::Parts, connection: &ConnectionState) -> Option<NonZeroU32> {
    let ends = |value: &HeaderValue| {
        value
            .to_str()
            .is_ok_and(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case("close")))
    };
    if head.version != Version::HTTP_11 || head.headers.get_all(CONNECTION).iter().any(ends) {
        return None;
    }
    connection.keep_alive_s()
}
