//! Routes that serve anything, as the KEDA HTTP Add-on's interceptor does: what is answered for them without an
//! endpoint, and what their requests are passed on with.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
    request,
};
use tokio::time::Instant;

use super::{
    Client, Proxy,
    answering::Served,
    answers::fail,
    beats::Wishes,
    body::Body,
    dispatch::{Failed, Sending, Setback},
    exchange::Exchange,
    forward::{self, KEDA_COLD_START},
    pipeline::{Arrived, Refused, Routed, check_patience},
    rule::Rule,
    traced::Slot,
    tunnel::Upgrade,
};
use crate::{
    admission::{Gate, Permit},
    config::Limits,
    domain::{
        ByteCount, Intercept, Overflow, Period, ResponseMode, StaticAnswer, StaticRoute, UpstreamTimeouts,
    },
    error::{Outcome, ProxyError},
    telemetry::StaticKind,
};

/// A route that serves anything, prepared for requests.
pub struct Interceptor {
    gate: Arc<Gate>,
    asks: Arc<Intercept>,
    /// Of the static routes, in their order.
    statics: Vec<Vec<Rule>>,
}

/// What a request of such a route carries on its way.
pub(super) struct Intercepted {
    by: Arc<Interceptor>,
    /// When it must have ended.
    pub(super) deadline: Option<Instant>,
    /// It wants to speak another protocol than HTTP from its answer on.
    pub(super) upgrade: Option<Upgrade>,
    /// Whether its answer says if there was a cold start: not one of the fallback, nor to a request that is no demand.
    tells_cold_start: bool,
}

// === impl Interceptor ===

impl Interceptor {
    pub(super) fn new(gate: &Arc<Gate>, asks: &Arc<Intercept>) -> Arc<Self> {
        let rules = |route: &StaticRoute| route.rules.iter().map(Rule::new).collect();
        let statics = asks.static_routes.iter().map(rules).collect();
        Arc::new(Self { gate: gate.clone(), asks: asks.clone(), statics })
    }

    /// The name of its route.
    pub fn key(&self) -> &str {
        self.gate.key().as_str()
    }

    fn static_route(&self, host: &str, path: &str, headers: &HeaderMap) -> Option<&StaticRoute> {
        let holds = |rules: &Vec<Rule>| rules.iter().any(|rule| rule.holds(host, path, headers));
        self.statics.iter().position(holds).and_then(|place| self.asks.static_routes.get(place))
    }
}

// === impl Proxy ===

impl Proxy {
    /// Serves a request of a route that serves anything.
    pub(super) async fn intercept(
        &self,
        client: &Client,
        interceptor: Arc<Interceptor>,
        arrived: Arrived,
        trace: &mut Slot,
    ) -> Result<Served, Refused> {
        let Arrived { mut head, host, body, started, under_way } = arrived;
        let gate = interceptor.gate.clone();
        if head.method == Method::CONNECT {
            // That asks for a tunnel to anywhere.
            let error = ProxyError::UnknownPath(head.uri.to_string());
            return Err(Refused::of(&gate, &head, None, error));
        }
        let path = head.uri.path();
        let fixed = interceptor.static_route(host.to_str().unwrap_or_default(), path, &head.headers);
        let mut intercepted = Intercepted {
            by: interceptor.clone(),
            deadline: interceptor.asks.request().map(|limit| started + limit.get()),
            upgrade: None,
            tells_cold_start: fixed.is_none(),
        };
        if fixed.is_none() {
            check_patience(&head.headers).map_err(|error| Refused::of(&gate, &head, None, error))?;
            intercepted.upgrade = Upgrade::asked(&mut head, &client.connection);
        }
        let Some(fixed) = fixed else {
            let version = head.version;
            let request_id = forward::request(&mut head, &host, client.address);
            if intercepted.upgrade.is_some() {
                forward::upgrade(&mut head.headers);
            }
            let wishes = Wishes::take(&mut head.headers, None);
            let wishes = wishes.map_err(|error| Refused::of(&gate, &head, None, error))?;
            let intercepted = Some(Box::new(intercepted));
            let routed = Routed {
                head,
                gate,
                body,
                shape: None,
                scan: <_>::default(),
                wishes,
                intercepted,
                kept: None,
                version,
                request_id,
                started,
                under_way,
            };
            return self.admit(routed, trace).await;
        };
        let passed = match fixed.mode {
            ResponseMode::Always => None,
            ResponseMode::WhenUnavailable => gate.enter_quietly(),
        };
        let Some(permit) = passed else {
            gate.counters().answer_statically(StaticKind::Static);
            return Ok(static_response(&fixed.answer, &head, Body::full).into());
        };
        let request_id = forward::request(&mut head, &host, client.address);
        let mut exchange = self.exchange(&gate, &head, under_way, request_id, started, trace.take());
        let mut sending = Sending::new(head, body, Some(Box::new(intercepted)), Wishes::default());
        match self.attempt(permit, &mut sending, &gate, exchange.trace()).await {
            Ok(answer) => Ok(self.respond(answer, exchange, sending).into()),
            Err(Failed::Finally(error)) => {
                exchange.tell(&sending.head, None);
                Ok(fail(exchange, &error).into())
            }
            // It is not available after all.
            Err(Failed::ForNow(_)) => {
                let ending = |body| {
                    exchange.end(Outcome::Completed);
                    Body::ending(body, exchange)
                };
                Ok(static_response(&fixed.answer, &sending.head, ending).into())
            }
        }
    }

    /// What waited in vain goes to the fallback, if there is one: no outcome yet, but the last try.
    pub(super) async fn fall_back(
        &self,
        mut exchange: Exchange,
        mut sending: Sending,
        permit: Permit,
    ) -> Result<Response<Body>, (Exchange, ProxyError)> {
        let gate = exchange.gate().clone();
        exchange.tell(&sending.head, None);
        exchange.fell_back();
        gate.counters().fall_back();
        if let Some(intercepted) = &mut sending.intercepted {
            intercepted.tells_cold_start = false;
        }
        exchange.sent_to(&permit);
        match self.attempt(permit, &mut sending, &gate, exchange.trace()).await {
            Ok(answer) => Ok(self.respond(answer, exchange, sending)),
            Err(Failed::Finally(error)) => Err((exchange, error)),
            Err(Failed::ForNow(Setback { permit, reason, .. })) => {
                let route = gate.key().clone();
                let reason =
                    format!("its fallback {} cannot be reached: {reason}", permit.endpoint().address());
                Err((exchange, ProxyError::UpstreamError { route, reason }))
            }
        }
    }
}

// === impl Intercepted ===

impl Intercepted {
    /// The placeholder, if that is what a request gets that would be held. The target is woken.
    pub(super) fn instead_of_holding(&self, head: &request::Parts) -> Option<Response<Body>> {
        let gate = &self.by.gate;
        let placeholder = self.by.asks.placeholder_at_once().filter(|_| !gate.target().is_up())?;
        gate.wake();
        Some(self.placeholder(placeholder, head))
    }

    /// The placeholder, if that is what a request gets that finds as many held as may be.
    pub(super) fn instead_of_refusing(
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
    pub(super) fn bound(&self, timeouts: &mut UpstreamTimeouts, limits: &mut Limits) {
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
    pub(super) fn fallback(&self) -> Option<Permit> {
        self.by.gate.fall_back()
    }

    fn placeholder(&self, answer: &StaticAnswer, head: &request::Parts) -> Response<Body> {
        self.by.gate.counters().answer_statically(StaticKind::Placeholder);
        static_response(answer, head, Body::full)
    }

    /// Says whether a cold start held the request, in the Add-on's word.
    pub(super) fn tell_cold_start(&self, headers: &mut HeaderMap, cold: bool) {
        headers.remove(KEDA_COLD_START);
        if self.tells_cold_start {
            headers.insert(KEDA_COLD_START, HeaderValue::from_static(if cold { "true" } else { "false" }));
        }
    }
}

/// An answer that stands in the object. `body` makes the body of what it says.
fn static_response(
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
