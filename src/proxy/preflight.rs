//! CORS preflights. The server that will answer the request behind one answers it, too, while it is up. They wake nothing
//! and keep nothing up: a page that is only looked at must not start a GPU.

use std::sync::Arc;

use http::{
    HeaderMap, Method, Response,
    header::{ACCESS_CONTROL_REQUEST_METHOD, ORIGIN},
};

use super::{
    Client, Proxy, RouteTable,
    answers::fail,
    beats::Wishes,
    body::Body,
    dispatch::{Failed, Sending},
    forward,
    pipeline::Arrived,
    traced::Slot,
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
    /// Passes a preflight on.
    pub(super) async fn preflight(
        &self,
        client: &Client,
        permit: Permit,
        arrived: Arrived,
        trace: &mut Slot,
    ) -> Response<Body> {
        let Arrived { mut head, host, body, started, under_way } = arrived;
        let gate = permit.gate().clone();
        let request_id = forward::request(&mut head, &host, client.address);
        let mut exchange = self.exchange(&gate, &head, under_way, request_id, started, trace.take());
        let mut sending = Sending::new(head, body, None, Wishes::default());
        let error = match self.attempt(permit, &mut sending, &gate, exchange.trace()).await {
            Ok(answer) => return self.respond(answer, exchange, sending),
            Err(Failed::Finally(error)) => error,
            // Nothing is held for it: the browser asks again.
            Err(Failed::ForNow(setback)) => {
                ProxyError::UpstreamError { route: gate.key().clone(), reason: setback.reason }
            }
        };
        exchange.tell(&sending.head, None);
        fail(exchange, &error)
    }
}
