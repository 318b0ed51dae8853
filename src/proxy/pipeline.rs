//! The request path, top to bottom: route, admission, hold, pick, upstream, body.

use std::{panic::AssertUnwindSafe, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Method, Request, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    Client, Proxy,
    answering::{Answering, Held, Next, Served},
    answers::{fail, json_response},
    beats::Wishes,
    body::Body,
    connection_state::UnderWay,
    exchange::Exchange,
    find::Found,
    forward,
    intake::{Unread, told_to_fit},
    reply::Reply,
    request::{ReceivedRequest, Rejection, RequestBody, RoutedRequest, check_patience, patience},
    responses::Kept,
    scan::{encoding, scan_body},
    traced::{Slot, Traced},
    upstream_request::{DispatchError, UpstreamRequest},
};
use crate::{
    error::ProxyError,
    openai::{self, Api, Dialect, Scan, ScanError},
    places::Source,
};

// === impl Proxy ===

impl Proxy {
    /// Answers a request, whatever happens.
    pub fn answer(self: Arc<Self>, client: Client, mut request: Request<Incoming>) -> Answering {
        let started = Instant::now();
        let trace =
            self.traces.as_ref().and_then(|traces| Traced::begin(traces, &client, &mut request, started));
        let under_way = client.connection.begin();
        let (head, incoming) = request.into_parts();
        let reply = Reply::new(&self, &head, &client.connection, started);
        let head = Box::new(head);
        Answering::new(Box::pin(async move {
            let mut trace = trace;
            let serving = self.serve(&client, head, incoming, started, under_way, &mut trace);
            let served = AssertUnwindSafe(serving).catch_unwind().await;
            let (gate, error) = match served {
                Ok(Ok(Served::Answer(response))) => {
                    // Still here: it was not admitted, and is ours.
                    if let Some(mut trace) = trace {
                        trace.answered(response.status().as_u16());
                    }
                    return self.finish(&reply, response);
                }
                Ok(Ok(Served::Held(held))) => return Next::Step(Box::pin(self.finish_held(held, reply))),
                Ok(Err(Rejection { gate, error })) => (gate, error),
                // The message has gone to the log by the panic hook; the account, dropped on the way, counted it.
                Err(_) => (None, ProxyError::Internal),
            };
            let response = self.reject(gate, &error, &reply, trace);
            self.finish(&reply, response)
        }))
    }

    /// The rest of a request that is held.
    async fn finish_held(self: Arc<Self>, held: Held, reply: Reply) -> Next {
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
        under_way: UnderWay,
        trace: &mut Slot,
    ) -> Result<Served, Rejection> {
        // Which route? Its body is read first if that depends on the model.
        if head.method == Method::CONNECT {
            // What follows is a body to one reader, and a tunnel to the other.
            return Err(ProxyError::Ambiguous("There are no tunnels here.".into()).into());
        }
        let host = forward::host(&head.uri, &head.headers)?;
        forward::transfer_coding(&head.headers)?;
        if self.shared.cross_site.guards_requests()
            && let Some(answer) = self.check_page(&host, &head)?
        {
            return Ok(answer.into());
        }
        let source = client.address.map_or_else(Source::default, |address| Source::of(address.ip()));
        let unread = Unread { incoming, source };
        let (gate, shape, mut body, scan, mut kept) = match self.find(&host, &head, unread).await? {
            Found::Route(gate, shape, body, scan) => (gate, shape, body, scan, None),
            Found::Kept(gate, endpoint, body) => {
                (gate, None, body, Scan::default(), Some(Box::new(Kept::at(&endpoint))))
            }
            // On the heap: what has no models should cost the others nothing.
            Found::Interceptor(interceptor, body) => {
                let received = ReceivedRequest { head, host, body, started, under_way };
                return Box::pin(self.intercept(client, interceptor, received, trace)).await;
            }
            Found::Preflight(gate, api, body) => {
                let Some(permit) = gate.enter_quietly() else {
                    if gate.target().is_up() {
                        let (route, reason) = (gate.key().clone(), "a preflight does not wait".into());
                        return Err(ProxyError::Saturated { route, reason }.into());
                    }
                    return Box::pin(self.answer_ourselves(&head, api)).await.map(Served::Answer);
                };
                let received = ReceivedRequest { head, host, body, started, under_way };
                return Ok(Box::pin(self.preflight(client, permit, received, trace)).await.into());
            }
            Found::Ours(api) => {
                return Box::pin(self.answer_ourselves(&head, api)).await.map(Served::Answer);
            }
        };
        if let RequestBody::Unread(body) = &body {
            told_to_fit(&body.incoming, &self.shared.limits.load())
                .map_err(|error| Rejection::of(&gate, &head, None, error))?;
        }
        // Also where it will not wait: what is wrong should not show only on a cold day.
        check_patience(&head.headers).map_err(|error| Rejection::of(&gate, &head, None, error))?;
        if shape.is_some() && openai::makes_response(head.uri.path()) {
            // On the heap: what keeps nothing should not carry its room.
            (body, kept) = Box::pin(self.kept(&gate, &head, body))
                .await
                .map_err(|error| Rejection::of(&gate, &head, None, error))?;
        }
        let wishes = Wishes::take(&mut head.headers, shape);
        let wishes = wishes.map_err(|error| Rejection::of(&gate, &head, None, error))?;
        let received = ReceivedRequest { head, host, body, started, under_way };
        let routed = RoutedRequest { shape, scan, wishes, kept, ..received.routed_to(gate, client) };
        self.admit(routed, trace).await
    }

    /// Lets a request in: at once, if an endpoint has room and nobody waits for one.
    pub(super) async fn admit(
        &self,
        mut routed: RoutedRequest,
        trace: &mut Slot,
    ) -> Result<Served, Rejection> {
        match self.shared.memory.request(&routed.head) {
            Ok(share) => routed.under_way.keep(share),
            Err(max) => return Err(routed.rejected(ProxyError::BuffersFull(max))),
        }
        let Some((permit, place)) = routed.gate.enter_for(routed.pin()) else {
            // On the heap: a warm request should not carry the room that waiting takes.
            return Box::pin(self.hold(routed, trace)).await;
        };
        let (mut exchange, mut sending, scan) = self.begin_exchange(routed, trace.take());
        match self.attempt(permit, &mut sending, exchange.trace()).await {
            Ok(answer) => {
                let mut response = self.respond(answer, exchange, sending);
                response.body_mut().name_model(scan.model);
                Ok(response.into())
            }
            Err(DispatchError::Final(error)) => {
                exchange.tell(&sending.head, scan.model.as_deref());
                Ok(fail(exchange, &error).into())
            }
            Err(DispatchError::Retryable(failure)) => {
                let address = failure.permit.endpoint().address();
                exchange.set_back(address, &failure.reason, &sending.head, scan.model.as_deref());
                let over = sending.intercepted.as_ref().and_then(|by| by.deadline);
                let held = exchange.started() + exchange.gate().policy().hold.timeout.get();
                let deadline = over.map_or(held, |over| over.min(held));
                match Box::pin(self.hold_again(&mut sending, place, failure, deadline)).await {
                    Ok(ticket) => Ok(Served::Held(self.wait(exchange, sending, ticket, scan))),
                    Err(error) => Ok(fail(exchange, &error).into()),
                }
            }
        }
    }

    /// Holds a request, which takes a whole body: readable to its end, countable, and to be sent again.
    async fn hold(&self, mut routed: RoutedRequest, trace: &mut Slot) -> Result<Served, Rejection> {
        if let Some(intercepted) = &routed.intercepted {
            if let Some(placeholder) = intercepted.instead_of_holding(&routed.head) {
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
                    match scan_body(shape, &routed.head.headers, &read.bytes).await {
                        // What cannot be read for a hidden model can still be held: nothing needs the model here.
                        Err(ScanError::Charset(_)) => {}
                        scan => routed.scan = scan.map_err(|error| rejected(error.into()))?,
                    }
                }
                read
            }
        };
        // What a request came in is several times its size. The buffer of the body stays the connection's: over HTTP/1 that is
        // this request's alone.
        forward::settle(&mut routed.head);
        if let Some(id) = routed.head.headers.get(forward::REQUEST_ID) {
            routed.request_id = id.clone();
        }
        if routed.version == Version::HTTP_2 {
            read.settle();
        }
        let bytes = read.bytes.len();
        routed.body = RequestBody::Buffered(read);
        let patience = patience(&routed.head.headers).map_err(|error| routed.rejected(error))?;
        let ticket = match routed.gate.hold_for(routed.pin(), bytes, patience.may_wait()) {
            Ok(ticket) => ticket,
            Err(error) => {
                let by = routed.intercepted.as_ref();
                if let Some(placeholder) = by.and_then(|by| by.instead_of_refusing(&error, &routed.head)) {
                    return Ok(placeholder.into());
                }
                // Nothing starts the target, so that waiting for it first would be in vain.
                let paused = matches!(error, ProxyError::AutoscalingPaused { .. });
                let Some(permit) = by.filter(|_| paused).and_then(|by| by.fallback()) else {
                    return Err(routed.rejected(error));
                };
                routed.gate.counters().admit();
                let (exchange, sending, _) = self.begin_exchange(routed, trace.take());
                let answered = Box::pin(self.fall_back(exchange, sending, permit)).await;
                return Ok(answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error)).into());
            }
        };
        let (exchange, sending, scan) = self.begin_exchange(routed, trace.take());
        Ok(Served::Held(self.wait(exchange, sending, ticket, scan)))
    }

    /// Opens the account of an admitted request.
    pub(super) fn begin_exchange(
        &self,
        routed: RoutedRequest,
        trace: Slot,
    ) -> (Exchange, UpstreamRequest, Scan) {
        let RoutedRequest {
            head,
            gate,
            body,
            scan,
            wishes,
            intercepted,
            kept,
            request_id,
            started,
            under_way,
            ..
        } = routed;
        let dialect = Dialect::of(head.uri.path(), &head.headers);
        let shared = self.shared.clone();
        let mut exchange = Exchange::new(gate, under_way, shared, request_id, dialect, started, trace);
        exchange.asks(&scan);
        (exchange, UpstreamRequest::new(head, body, intercepted, wishes, kept), scan)
    }

    /// What needs no model server, and wakes none.
    async fn answer_ourselves(&self, head: &request::Parts, api: Api) -> Result<Response<Body>, Rejection> {
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
