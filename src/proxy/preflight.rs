//! CORS preflights. With `cors` configured, the proxy answers them; else the model server does while it is up. They create
//! no demand: opening a web page must not start a GPU.

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
    answers::fail, body::Body, client::Client, dispatch_error::DispatchError, request::ReceivedRequest,
    request_trace::TraceSlot, shared::Proxy, table::RouteTable,
};
use crate::{
    admission::{Gate, Permit},
    error::ProxyError,
    openai::Api,
};

/// Returns the method that a preflight asks for (Fetch, section 4.8), or `None` if the request is not a preflight.
fn requested_method(method: &Method, headers: &HeaderMap) -> Option<Method> {
    if *method != Method::OPTIONS || !headers.contains_key(ORIGIN) {
        return None;
    }
    Method::from_bytes(headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
}

/// Response headers that pages may read: those that SDKs use, and those about the wait.
const EXPOSED_HEADERS: &str =
    "retry-after, server-timing, x-anteroom-cold-start, x-request-id, x-should-retry";

/// Lifetime of a preflight response in the browser.
const MAX_AGE_SECS: &str = "600";

/// Allows pages of `origin` to read a response, unless the model server has set CORS headers itself.
pub(super) fn allow_reading(headers: &mut HeaderMap, origin: &HeaderValue) {
    if headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
        return;
    }
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    headers.append(VARY, HeaderValue::from_static("Origin"));
}

/// Answers the preflight of a listed origin: allows the method and headers asked for.
fn preflight_response(method: &Method, asked: &HeaderMap) -> Response<Body> {
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
    /// Returns the route of the request that a preflight announces, if it can be found without a model.
    pub(super) fn preflight(
        &self,
        host: &str,
        path: &str,
        method: &Method,
        headers: &HeaderMap,
    ) -> Option<&Arc<Gate>> {
        let method = requested_method(method, headers)?;
        match self.api(&method, path) {
            Api::Models | Api::Model(_) | Api::Probe | Api::Root | Api::WrongMethod(_) | Api::Unknown => None,
            _ => self.only_route_at(host, path, headers),
        }
    }
}

// === impl Proxy ===

impl Proxy {
    /// Rejects requests from other sites and for foreign hosts. Answers preflights of listed origins, except for
    /// application routes, which may have rules of their own.
    pub(super) fn check_page(
        &self,
        host: &HeaderValue,
        head: &request::Parts,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let table = self.shared.table.load();
        self.shared.cross_site.check_host(host, |name| table.names_host(name))?;
        self.shared.cross_site.check_page(host, &head.headers)?;
        let Some(method) = requested_method(&head.method, &head.headers) else { return Ok(None) };
        let is_ours = self.shared.cross_site.listed_origin(&head.headers).is_some()
            && !matches!(table.api(&method, path), Api::WrongMethod(_) | Api::Unknown)
            && table.interceptor(host, path, &head.headers, &table.api(&head.method, path)).is_none();
        Ok(is_ours.then(|| preflight_response(&method, &head.headers)))
    }

    /// Forwards a preflight to the model server.
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
        let error = match self.dispatch(permit, &mut request, &mut exchange).await {
            Ok(answer) => return self.forward_response(answer, exchange, request),
            Err(DispatchError::Final(error)) => error,
            // Not retried: the browser will.
            Err(DispatchError::Retryable(failure)) => {
                let route = exchange.gate().key().clone();
                ProxyError::UpstreamError { route, reason: failure.reason }
            }
        };
        exchange.story(&request.head, None);
        fail(exchange, &error)
    }
}
