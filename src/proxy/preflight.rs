//! CORS preflights. Where origins are configured, they are answered here. Else the server that will answer the request
//! behind one answers it, too, while it is up. They wake nothing and keep nothing up: a page that is only looked at must
//! not start a GPU.

use std::sync::Arc;

use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
        ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
    },
    request,
};

use super::{
    Client, Proxy, RouteTable, answers::fail, body::Body, request::ReceivedRequest, request_trace::TraceSlot,
    upstream_request::DispatchError,
};
use crate::{
    admission::{Gate, Permit},
    error::ProxyError,
    openai::Api,
};

/// The method of the request that a preflight is about (Fetch, section 4.8); `None` for any other request.
fn method_asked_for(method: &Method, headers: &HeaderMap) -> Option<Method> {
    if *method != Method::OPTIONS || !headers.contains_key(ORIGIN) {
        return None;
    }
    Method::from_bytes(headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
}

/// Headers of our answers that pages may read: what SDKs go by, and what is said of the wait.
const EXPOSED: &str = "retry-after, server-timing, x-anteroom-cold-start, x-request-id, x-should-retry";

/// How long a browser may remember the answer to a preflight: 10 minutes.
const MAX_AGE_SECS: &str = "600";

/// Lets pages of `origin` read an answer, unless the server that made it has said which may.
pub(super) fn allow_reading(headers: &mut HeaderMap, origin: &HeaderValue) {
    if headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
        return;
    }
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    headers.append(VARY, HeaderValue::from_static("Origin"));
}

/// Answers a preflight: a page of a listed origin may send what it asks for.
fn allow(method: &Method, asked: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    if let Ok(method) = HeaderValue::from_str(method.as_str()) {
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, method);
    }
    if let Some(names) = asked.get(ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE_SECS));
    let varies = "Access-Control-Request-Method, Access-Control-Request-Headers";
    headers.insert(VARY, HeaderValue::from_static(varies));
    response
}

// === impl RouteTable ===

impl RouteTable {
    /// The route whose server answers a preflight: that of the request behind it, where its model is not needed to find
    /// it. Another server may allow other origins.
    pub(super) fn preflight(
        &self,
        host: &str,
        path: &str,
        method: &Method,
        headers: &HeaderMap,
    ) -> Option<&Arc<Gate>> {
        let method = method_asked_for(method, headers)?;
        match self.api(&method, path) {
            Api::Models | Api::Model(_) | Api::Probe | Api::Root | Api::WrongMethod(_) | Api::Unknown => None,
            // An answer of a model server.
            _ => self.only_route_at(host, path, headers),
        }
    }
}

// === impl Proxy ===

impl Proxy {
    /// Stops a request of a foreign page or to a foreign host, and answers the preflight of a page that is listed, unless
    /// it is for an application: that may have rules of its own.
    pub(super) fn check_page(
        &self,
        host: &HeaderValue,
        head: &request::Parts,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let table = self.shared.table.load();
        self.shared.cross_site.check_host(host, |name| table.names_host(name))?;
        self.shared.cross_site.check_page(host, &head.headers)?;
        let Some(method) = method_asked_for(&head.method, &head.headers) else { return Ok(None) };
        let is_ours = self.shared.cross_site.listed_origin(&head.headers).is_some()
            && !matches!(table.api(&method, path), Api::WrongMethod(_) | Api::Unknown)
            && table.interceptor(host, path, &head.headers, &table.api(&head.method, path)).is_none();
        Ok(is_ours.then(|| allow(&method, &head.headers)))
    }

    /// Passes a preflight on.
    pub(super) async fn preflight(
        &self,
        client: &Client,
        permit: Permit,
        received: ReceivedRequest,
        trace: &mut TraceSlot,
    ) -> Response<Body> {
        let gate = permit.gate().clone();
        let routed = received.routed_to(gate, client);
        let (mut exchange, mut request, _) = self.open_exchange(routed, trace.take());
        let error = match self.dispatch(permit, &mut request, exchange.trace()).await {
            Ok(answer) => return self.forward_response(answer, exchange, request),
            Err(DispatchError::Final(error)) => error,
            // Nothing is held for it: the browser asks again.
            Err(DispatchError::Retryable(failure)) => {
                let route = exchange.gate().key().clone();
                ProxyError::UpstreamError { route, reason: failure.reason }
            }
        };
        exchange.story(&request.head, None);
        fail(exchange, &error)
    }
}
