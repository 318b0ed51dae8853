//! The request path: find the route, admit, then dispatch or hold.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Method, Request, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    answering::{HeldRequest, NextStep, ResponseFuture, ServeProgress},
    answers::{fail, json_response},
    body::Body,
    client::Client,
    connection_state::RequestGuard,
    dispatch_error::DispatchError,
    exchange::{self, Exchange},
    find::Destination,
    forward,
    heartbeat::HeartbeatPreference,
    intake::{UnreadBody, check_content_length},
    memory::Owner,
    reply::ReplyContext,
    request::{ReceivedRequest, Rejection, RequestBody, RoutedRequest, check_max_wait, patience},
    request_trace::{RequestTrace, TraceSlot},
    responses::ResponseAffinity,
    scan::encoding,
    shared::Proxy,
    upstream_request::UpstreamRequest,
};
use crate::{
    error::ProxyError,
    openai::{self, Api, Dialect, RoutingFields, ScanError},
    places::Source,
};

// === impl Proxy ===

impl Proxy {
    /// Resolves to a response even if serving panics. The panic hook logs the message; dropping the `Exchange` counts the
    /// outcome.
    pub fn answer(self: Arc<Self>, client: Client, mut request: Request<Incoming>) -> ResponseFuture {
        let started = Instant::now();
        let trace = self
            .traces
            .as_ref()
            .and_then(|traces| RequestTrace::begin(traces, &client, &mut request, started));
        let under_way = client.connection.begin().on_stream(client.stream.clone());
        let (head, incoming) = request.into_parts();
        let reply = ReplyContext::new(&self, &head, &client.connection, started);
        let head = Box::new(head);
        ResponseFuture::new(Box::pin(async move {
            let mut trace = trace;
            let serving = self.serve(&client, head, incoming, started, under_way, &mut trace);
            let served = AssertUnwindSafe(serving).catch_unwind().await;
            let (gate, error) = match served {
                Ok(Ok(ServeProgress::Answer(response))) => {
                    // The trace is taken on admission, so this response is the proxy's own.
                    if let Some(mut trace) = trace {
                        trace.answered(response.status().as_u16());
                    }
                    return self.finish(&reply, response);
                }
                Ok(Ok(ServeProgress::Held(held))) => {
                    return NextStep::Continue(Box::pin(self.finish_held(held, reply)));
                }
                Ok(Err(Rejection { gate, error })) => (gate, error),
                Err(_) => (None, ProxyError::Internal),
            };
            let response = self.reject(gate, &error, &reply, trace);
            self.finish(&reply, response)
        }))
    }

    /// Awaits the response of a held request.
    async fn finish_held(self: Arc<Self>, held: HeldRequest, reply: ReplyContext) -> NextStep {
        let response = match AssertUnwindSafe(held).catch_unwind().await {
            Ok(response) => response,
            Err(_) => self.reject(None, &ProxyError::Internal, &reply, None),
        };
        self.finish(&reply, response)
    }

    async fn serve(
        &self,
        client: &Client,
        mut head: Box<request::Parts>,
        incoming: Incoming,
        started: Instant,
        under_way: RequestGuard,
        trace: &mut TraceSlot,
    ) -> Result<ServeProgress, Rejection> {
        if head.method == Method::CONNECT {
            // Proxies disagree on whether a body or a tunnel follows (request smuggling).
            return Err(ProxyError::Ambiguous("CONNECT is not supported.".into()).into());
        }
        let host = forward::host(&head.uri, &head.headers)?;
        forward::check_transfer_coding(&head.headers)?;
        if self.shared.cross_site.guards_requests()
            && let Some(answer) = self.check_page(&host, &head)?
        {
            return Ok(answer.into());
        }
        let source = client.address.map_or_else(Source::default, |address| Source::of(address.ip()));
        let unread = UnreadBody { incoming, owner: Owner { source, route: 0 } };
        let (gate, shape, mut body, scan, mut affinity) = match self.find(&host, &head, unread).await? {
            Destination::Route(gate, shape, body, scan) => (gate, shape, body, scan, None),
            Destination::StoredResponse(gate, endpoint, body) => {
                (gate, None, body, RoutingFields::default(), Some(Box::new(ResponseAffinity::at(&endpoint))))
            }
            // Boxed to keep the future of model requests small.
            Destination::Interceptor(interceptor, body) => {
                let received = ReceivedRequest { head, host, body, started, under_way };
                return Box::pin(self.intercept(client, interceptor, received, trace)).await;
            }
            Destination::Preflight(gate, api, body) => {
                let Some(permit) = gate.enter_quietly() else {
                    if gate.target().is_up() {
                        let (route, reason) = (gate.key().clone(), "a CORS preflight is not held".into());
                        return Err(ProxyError::Saturated { route, reason }.into());
                    }
                    return Box::pin(self.answer_locally(&head, api)).await.map(ServeProgress::Answer);
                };
                let received = ReceivedRequest { head, host, body, started, under_way };
                return Ok(Box::pin(self.preflight(client, permit, received, trace)).await.into());
            }
            Destination::Local(api) => {
                return Box::pin(self.answer_locally(&head, api)).await.map(ServeProgress::Answer);
            }
        };
        if let RequestBody::Unread(body) = &mut body {
            body.set_route(&gate);
            check_content_length(&body.incoming, &self.shared.limits.load())
                .map_err(|error| Rejection::of(&gate, &head, None, error))?;
        }
        // Validated on warm requests too, so that a bad header does not surface only during a cold start.
        check_max_wait(&head.headers).map_err(|error| Rejection::of(&gate, &head, None, error))?;
        if shape.is_some() && openai::creates_stored_response(head.uri.path()) {
            // Boxed to keep the future of other requests small.
            (body, affinity) = Box::pin(self.response_affinity(&gate, &head, body))
                .await
                .map_err(|error| Rejection::of(&gate, &head, None, error))?;
        }
        let heartbeats = HeartbeatPreference::take(&mut head.headers, shape);
        let heartbeats = heartbeats.map_err(|error| Rejection::of(&gate, &head, None, error))?;
        let received = ReceivedRequest { head, host, body, started, under_way };
        let routed = RoutedRequest { shape, scan, heartbeats, affinity, ..received.routed_to(gate, client) };
        self.admit(routed, trace).await
    }

    /// Admits a request: dispatches it if an endpoint has capacity and the queue is empty, else holds it.
    pub(super) async fn admit(
        &self,
        mut routed: RoutedRequest,
        trace: &mut TraceSlot,
    ) -> Result<ServeProgress, Rejection> {
        match self.shared.memory.request(&routed.head) {
            Ok(share) => routed.under_way.hold_memory(share),
            Err(max) => return Err(routed.rejected(ProxyError::BuffersFull(max))),
        }
        let Some((permit, place)) = routed.gate.enter_for(routed.pin()) else {
            // Boxed to keep the future of warm requests small.
            return Box::pin(self.hold(routed, trace)).await;
        };
        let (mut exchange, mut request, scan) = self.open_exchange(routed, trace.take());
        match self.dispatch(permit, &mut request, &mut exchange).await {
            Ok(answer) => {
                let mut response = self.forward_response(answer, exchange, request);
                response.body_mut().name_model(scan.model);
                Ok(response.into())
            }
            Err(DispatchError::Final(error)) => {
                exchange.story(&request.head, scan.model.as_deref());
                Ok(fail(exchange, &error).into())
            }
            Err(DispatchError::Retryable(failure)) => {
                exchange.record_failed_dispatch(&failure, &request.head, scan.model.as_deref());
                let over = request.intercepted.as_ref().and_then(|by| by.deadline);
                let held = exchange.started() + exchange.gate().policy().hold.timeout.get();
                let deadline = over.map_or(held, |over| over.min(held));
                match Box::pin(self.requeue(&mut request, place, failure, deadline)).await {
                    Ok(ticket) => Ok(ServeProgress::Held(self.wait(exchange, request, ticket, scan))),
                    Err(error) => Ok(fail(exchange, &error).into()),
                }
            }
        }
    }

    /// Buffers the body of a request and queues it. The whole body is needed to account for its memory and to retry.
    async fn hold(
        &self,
        mut routed: RoutedRequest,
        trace: &mut TraceSlot,
    ) -> Result<ServeProgress, Rejection> {
        if let Some(intercepted) = &routed.intercepted {
            if let Some(placeholder) = intercepted.placeholder_instead_of_hold(&routed.head) {
                return Ok(placeholder.into());
            }
        } else if routed.shape.is_none() && !routed.gate.target().is_up() {
            let error = ProxyError::NotKept(routed.head.uri.path().into());
            return Err(Rejection::of(&routed.gate, &routed.head, None, error));
        }
        let mut read = match routed.body {
            RequestBody::Buffered(read) => read,
            RequestBody::Unread(body) => {
                let rejected = |error| Rejection::of(&routed.gate, &routed.head, None, error);
                let read = self.read(&routed.head, body).await.map_err(rejected)?;
                if let Some(shape) = routed.shape.filter(|_| encoding(&routed.head.headers).is_none()) {
                    match self.shared.scanner.scan(shape, &routed.head.headers, &read.bytes).await {
                        // The route does not depend on the model, so a body in another charset can be held unread.
                        Err(ScanError::Charset(_)) => {}
                        scan => routed.scan = scan.map_err(|error| rejected(error.into()))?,
                    }
                }
                read
            }
        };
        // Read buffers are several times the size of a request, and slices keep them alive. Over HTTP/1 the body's buffer
        // belongs to this request alone, so copying it would free nothing.
        forward::detach(&mut routed.head);
        if let Some(id) = routed.head.headers.get(forward::REQUEST_ID) {
            routed.request_id = id.clone();
        }
        if routed.version == Version::HTTP_2 {
            read.detach();
        }
        let bytes = read.bytes.len();
        routed.body = RequestBody::Buffered(read);
        let patience = patience(&routed.head.headers).map_err(|error| routed.rejected(error))?;
        let ticket = match routed.gate.hold_for(routed.pin(), bytes, patience.may_wait()) {
            Ok(ticket) => ticket,
            Err(error) => {
                let by = routed.intercepted.as_ref();
                if let Some(placeholder) = by.and_then(|by| by.placeholder_on_overflow(&error, &routed.head))
                {
                    return Ok(placeholder.into());
                }
                // A paused target is never started, so the fallback is used immediately.
                let paused = matches!(error, ProxyError::AutoscalingPaused { .. });
                let Some(permit) = by.filter(|_| paused).and_then(|by| by.fallback()) else {
                    return Err(routed.rejected(error));
                };
                routed.gate.counters().admit();
                let (exchange, request, _) = self.open_exchange(routed, trace.take());
                let answered = Box::pin(self.fall_back(exchange, request, permit)).await;
                return Ok(answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error)).into());
            }
        };
        let (exchange, request, scan) = self.open_exchange(routed, trace.take());
        Ok(ServeProgress::Held(self.wait(exchange, request, ticket, scan)))
    }

    /// Starts accounting for an admitted request.
    pub(super) fn open_exchange(
        &self,
        routed: RoutedRequest,
        mut trace: TraceSlot,
    ) -> (Exchange, UpstreamRequest, RoutingFields) {
        let RoutedRequest {
            head,
            gate,
            body,
            scan,
            heartbeats,
            intercepted,
            affinity,
            request_id,
            started,
            under_way,
            ..
        } = routed;
        let dialect = Dialect::of(head.uri.path(), &head.headers);
        let shared = self.shared.clone();
        if let Some(trace) = &mut trace {
            trace.record_scan(&scan);
        }
        let mut exchange = Exchange::new(gate, under_way, shared, request_id, dialect, started, trace);
        if self.shared.access_log.load(Ordering::Relaxed) {
            exchange.log_access(exchange::summarize(&head, scan.model.as_deref()));
        }
        (exchange, UpstreamRequest::new(head, body, intercepted, heartbeats, affinity), scan)
    }

    /// Answers a request that needs no model server. Creates no demand.
    async fn answer_locally(&self, head: &request::Parts, api: Api) -> Result<Response<Body>, Rejection> {
        let path = || head.uri.path().to_owned();
        let body = match api {
            Api::Models => self.model_list().await,
            Api::Model(id) => self.model(id).await?,
            Api::Probe | Api::Root => Bytes::from_static(b"{\"status\":\"ok\"}"),
            Api::WrongMethod(allowed) => {
                return Err(ProxyError::MethodNotAllowed { path: path(), allowed }.into());
            }
            Api::Work(_) | Api::Stored(_) | Api::Server | Api::Unknown => {
                return Err(ProxyError::UnknownPath(path()).into());
            }
        };
        Ok(json_response(StatusCode::OK, Body::full(body)))
    }
}
