//! The last step of every response: rejections, and headers that depend on the client's connection.

use std::{
    num::NonZeroU32,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Version, header::CONNECTION, request};
use tokio::time::Instant;

use super::{
    ConnectionState, Proxy, answering::Next, answers::error_response, body::Body, exchange, forward,
    preflight::may_be_read, traced::Slot,
};
use crate::{admission::Gate, error::ProxyError, history::Asked, openai::Dialect};

/// What an answer of ours depends on, other than what it says.
pub(super) struct Reply {
    /// The request's id, if it has one.
    id: Option<Box<HeaderValue>>,
    /// The shape of its errors.
    dialect: Dialect,
    version: Version,
    /// Seconds for which the connection stays open, if it does.
    keep_alive_s: Option<NonZeroU32>,
    /// The origin of the web page that may read the answer. On the heap: most requests have none.
    reader: Option<Box<HeaderValue>>,
    /// There is to be no body.
    is_head: bool,
    started: Instant,
}

// === impl Reply ===

impl Reply {
    /// Collects what the response to a request with this head depends on.
    pub(super) fn new(
        proxy: &Proxy,
        head: &request::Parts,
        connection: &ConnectionState,
        started: Instant,
    ) -> Self {
        // Copies: parts of the read buffer would keep all of it while the request is held.
        let id = head.headers.get(forward::REQUEST_ID);
        let id = id.and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok()).map(Box::new);
        let cross_site = &proxy.shared.cross_site;
        let reader =
            if cross_site.guards_requests() { cross_site.listed_origin(&head.headers) } else { None };
        Self {
            id,
            dialect: Dialect::of(head.uri.path(), &head.headers),
            version: head.version,
            keep_alive_s: keep_alive_s(head, connection),
            reader: reader.map(Box::new),
            is_head: head.method == Method::HEAD,
            started,
        }
    }
}

// === impl Proxy ===

impl Proxy {
    /// Counts and tells why a request was not admitted, and makes its answer.
    pub(super) fn reject(
        &self,
        gate: Option<(Arc<Gate>, Box<Asked>)>,
        error: &ProxyError,
        reply: &Reply,
        trace: Slot,
    ) -> Response<Body> {
        let id = reply.id.as_deref().cloned().unwrap_or_else(forward::new_id);
        if let Some(trace) = trace {
            trace.refused(gate.as_ref().map(|(gate, _)| &**gate), &id, error);
        }
        let detail = gate.as_ref().map(|(gate, _)| gate.policy().failure.detail).unwrap_or_default();
        if let Err(refusal) = error.ending() {
            match gate {
                Some((gate, asked)) => {
                    exchange::refused(&self.shared, &gate, &id, reply.started, *asked, error);
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

    /// Finishes the head of an answer, and counts its body if it is ours.
    ///
    /// A connection that is closed while the next request is on its way fails that one. So when we are about to stop, it is
    /// said beforehand, and the client goes elsewhere. HTTP/2 has a frame for that.
    pub(super) fn finish(&self, reply: &Reply, mut response: Response<Body>) -> Next {
        if let Some(origin) = &reply.reader {
            may_be_read(response.headers_mut(), origin);
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
        Next::Answer(body.map(|body| Response::from_parts(head, body)))
    }
}

/// What the answer says of how long the connection stays open, over HTTP/1.1 and unless the client ends it.
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
