//! Requests of routes that proxy any HTTP application: static responses, admission, and the fallback.

use std::sync::Arc;

use http::{Response, request};

use super::{
    request::{InterceptedRequest, static_response},
    route::Interceptor,
};
use crate::{
    admission::Permit,
    domain::ResponseMode,
    error::{Outcome, ProxyError},
    proxy::{
        answering::ServeProgress,
        answers::fail,
        body::Body,
        client::Client,
        dispatch_error::{DispatchError, RetryableFailure},
        exchange::Exchange,
        forward,
        heartbeat::HeartbeatPreference,
        request::{ReceivedRequest, Rejection, RequestBody, RoutedRequest, check_max_wait},
        request_trace::TraceSlot,
        shared::Proxy,
        tunnel::Upgrade,
        upstream_request::UpstreamRequest,
    },
    telemetry::StaticKind,
};

// === impl Proxy ===

impl Proxy {
    /// Serves a request of an application route.
    pub(in crate::proxy) async fn intercept(
        &self,
        client: &Client,
        interceptor: Arc<Interceptor>,
        mut received: ReceivedRequest,
        trace: &mut TraceSlot,
    ) -> Result<ServeProgress, Rejection> {
        if let RequestBody::Unread(body) = &mut received.body {
            body.set_route(&interceptor.gate);
        }
        let started = received.started;
        let ReceivedRequest { head, host, .. } = &mut received;
        let gate = interceptor.gate.clone();
        let rejected = |head: &request::Parts, error| Rejection::of(&gate, head, None, error);
        let path = head.uri.path();
        let fixed = interceptor.static_route(host.to_str().unwrap_or_default(), path, &head.headers);
        let mut intercepted = InterceptedRequest {
            interceptor: interceptor.clone(),
            deadline: interceptor.config.request().map(|limit| started + limit.get()),
            upgrade: None,
            reports_cold_start: fixed.is_none(),
        };
        let Some(fixed) = fixed else {
            check_max_wait(&head.headers).map_err(|error| rejected(head, error))?;
            intercepted.upgrade = Upgrade::asked(head, &client.connection);
            let heartbeats =
                HeartbeatPreference::take(&mut head.headers, None).map_err(|error| rejected(head, error))?;
            let mut routed = received.routed_to(gate, client);
            if intercepted.upgrade.is_some() {
                forward::set_websocket_upgrade(&mut routed.head.headers);
            }
            let intercepted = Some(Box::new(intercepted));
            return self.admit(RoutedRequest { heartbeats, intercepted, ..routed }, trace).await;
        };
        let passed = match fixed.mode {
            ResponseMode::Always => None,
            ResponseMode::WhenUnavailable => gate.enter_quietly(),
        };
        let Some(permit) = passed else {
            gate.counters().record_static_answer(StaticKind::Static);
            return Ok(static_response(&fixed.answer, head, Body::full).into());
        };
        let routed =
            RoutedRequest { intercepted: Some(Box::new(intercepted)), ..received.routed_to(gate, client) };
        let (mut exchange, mut request, _) = self.open_exchange(routed, trace.take());
        match self.dispatch(permit, &mut request, &mut exchange).await {
            Ok(answer) => Ok(self.forward_response(answer, exchange, request).into()),
            Err(DispatchError::Final(error)) => {
                exchange.story(&request.head, None);
                Ok(fail(exchange, &error).into())
            }
            // The endpoint has become unavailable.
            Err(DispatchError::Retryable(_)) => {
                let ending = |body| {
                    exchange.end(Outcome::Completed);
                    Body::for_admitted(body, exchange)
                };
                Ok(static_response(&fixed.answer, &request.head, ending).into())
            }
        }
    }

    /// Sends a request that was not released in time to the fallback. Failures there are final.
    pub(in crate::proxy) async fn fall_back(
        &self,
        mut exchange: Exchange,
        mut request: UpstreamRequest,
        permit: Permit,
    ) -> Result<Response<Body>, (Exchange, ProxyError)> {
        let gate = exchange.gate().clone();
        exchange.story(&request.head, None);
        exchange.record_fallback();
        gate.counters().fall_back();
        if let Some(intercepted) = &mut request.intercepted {
            intercepted.reports_cold_start = false;
        }
        match self.dispatch(permit, &mut request, &mut exchange).await {
            Ok(answer) => Ok(self.forward_response(answer, exchange, request)),
            Err(DispatchError::Final(error)) => Err((exchange, error)),
            Err(DispatchError::Retryable(RetryableFailure { permit, reason, .. })) => {
                let route = gate.key().clone();
                let reason = format!("its fallback {} is unreachable: {reason}", permit.endpoint().address());
                Err((exchange, ProxyError::UpstreamError { route, reason }))
            }
        }
    }
}
