//! The request path, top to bottom: route, admission, hold, pick, upstream, body.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    panic::AssertUnwindSafe,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header::CONNECTION, request,
};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    ConnectionState, Connections, CrossSiteGuard, RouteTable,
    answering::{Answering, Held, Next, Served},
    answers::{error_response, fail, json_response},
    beats::Wishes,
    body::Body,
    connection_state::UnderWay,
    dispatch::{Failed, Intake, Sending},
    exchange::{self, Exchange},
    find::{Found, encoding, scan_body},
    forward,
    intake::{Unread, told_to_fit},
    intercept::Intercepted,
    memory::Memory,
    models::Catalog,
    outgoing::Outgoing,
    preflight::may_be_read,
    responses::{Kept, Responses},
    traced::{Slot, Traced},
};
use crate::{
    admission::Gate,
    config::{self, Limits},
    error::ProxyError,
    history::{History, RequestInfo},
    openai::{self, Api, Dialect, Patience, Scan, ScanError, Shape},
    places::Source,
    telemetry::{RouteCounters, traces::Traces},
    upstream::{Dialer, Upstream},
};

/// What all threads that serve requests share.
pub struct Shared {
    /// The routes.
    pub table: ArcSwap<RouteTable>,
    /// Which endpoint keeps which response.
    pub(super) responses: Responses,
    /// All models, as the last client that asked got them.
    pub(super) catalog: ArcSwapOption<Catalog>,
    /// The limits.
    pub limits: ArcSwap<Limits>,
    /// The connections of clients.
    pub connections: Arc<Connections>,
    /// What clients make us keep.
    pub memory: Arc<Memory>,
    /// What happened to requests that waited or failed.
    pub history: Arc<History>,
    /// What is counted of requests that belong to no route.
    pub unrouted: RouteCounters,
    /// We are about to stop: who keeps a connection is to come back over another one.
    pub draining: AtomicBool,
    /// Draining has cut off what was still under way.
    pub cut: AtomicBool,
    /// The routes of the cluster are not known yet.
    pub awaits_routes: AtomicBool,
    /// Stops web pages of other sites.
    pub cross_site: CrossSiteGuard,
    /// Where traces go, if they do: set before requests are served, or never.
    pub traces: OnceLock<Arc<Traces>>,
}

/// The request path of one thread.
#[derive(Clone)]
pub struct Proxy {
    pub(super) shared: Arc<Shared>,
    pub(super) upstream: Arc<Upstream<Outgoing>>,
    traces: Option<Arc<Traces>>,
}

/// Who a connection comes from.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// Its address; none for a connection in memory.
    pub address: Option<SocketAddr>,
    /// The connection.
    pub connection: Arc<ConnectionState>,
}

/// A request that was not admitted.
pub(super) struct Refused {
    /// The route that it belongs to, if that was found out, and what it asked for.
    gate: Option<(Arc<Gate>, Box<RequestInfo>)>,
    error: ProxyError,
}

/// A request that has just come in, or one of a route that serves anything. The head is on the heap from the start: it
/// is handed from step to step, and would take its room in the future of each.
pub(super) struct Arrived {
    pub(super) head: Box<request::Parts>,
    pub(super) host: HeaderValue,
    pub(super) body: Intake,
    pub(super) started: Instant,
    pub(super) under_way: UnderWay,
}

/// A request that belongs to a route, before admission.
pub(super) struct Routed {
    /// As it goes to an endpoint.
    pub(super) head: Box<request::Parts>,
    pub(super) gate: Arc<Gate>,
    pub(super) body: Intake,
    /// None: something that is of use only while a model server lives, or no request to one at all.
    pub(super) shape: Option<Shape>,
    /// What its body says, if it has been read.
    pub(super) scan: Scan,
    /// What heartbeats it may get.
    pub(super) wishes: Wishes,
    /// Its route serves anything.
    pub(super) intercepted: Option<Box<Intercepted>>,
    /// What it has to do with responses that servers keep.
    pub(super) kept: Option<Box<Kept>>,
    /// As it came.
    pub(super) version: Version,
    pub(super) request_id: HeaderValue,
    pub(super) started: Instant,
    pub(super) under_way: UnderWay,
}

/// What an answer of ours depends on, other than what it says.
struct Reply {
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

// === impl Shared ===

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Shared {
    /// No routes yet.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            table: ArcSwap::default(),
            responses: Responses::default(),
            memory: Memory::new(limits.max_buffered_bytes.get()),
            catalog: ArcSwapOption::default(),
            limits: ArcSwap::from_pointee(limits),
            connections: Arc::default(),
            unrouted: RouteCounters::default(),
            history: History::new(config::History::default().requests),
            draining: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            awaits_routes: AtomicBool::new(false),
            cross_site: CrossSiteGuard::default(),
            traces: OnceLock::new(),
        })
    }

    /// New limits, from a reload. Connections that are open keep their time-outs.
    pub fn set_limits(&self, limits: Limits) {
        self.memory.set_max(limits.max_buffered_bytes.get());
        self.limits.store(Arc::new(limits));
    }
}

// === impl Proxy ===

impl Proxy {
    /// The request path of one thread, with its own connections to endpoints.
    pub fn new(shared: Arc<Shared>, dialer: Dialer) -> Arc<Self> {
        let traces = shared.traces.get().cloned();
        Arc::new(Self { shared, upstream: Arc::new(Upstream::new(dialer)), traces })
    }

    /// What all threads share.
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Closes connections to endpoints that have been idle for too long.
    pub fn sweep(&self) {
        self.upstream.sweep();
    }

    /// Answers a request, whatever happens.
    pub fn answer(self: Arc<Self>, client: Client, mut request: Request<Incoming>) -> Answering {
        let started = Instant::now();
        let trace =
            self.traces.as_ref().and_then(|traces| Traced::begin(traces, &client, &mut request, started));
        // A copy: a part of the read buffer would keep all of it for as long as the request is held.
        let id = request.headers().get(forward::REQUEST_ID);
        let id = id.and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok()).map(Box::new);
        let under_way = client.connection.begin();
        let (head, incoming) = request.into_parts();
        let dialect = Dialect::of(head.uri.path(), &head.headers);
        let keep_alive_s = keep_alive_s(&head, &client.connection);
        let is_head = head.method == Method::HEAD;
        let cross_site = &self.shared.cross_site;
        let reader =
            if cross_site.guards_requests() { cross_site.listed_origin(&head.headers) } else { None };
        let reader = reader.map(Box::new);
        let reply = Reply { id, dialect, version: head.version, keep_alive_s, reader, is_head, started };
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
                Ok(Ok(Served::Held(held))) => return Next::Step(Box::pin(self.outlast(held, reply))),
                Ok(Err(Refused { gate, error })) => (gate, error),
                // The message has gone to the log by the panic hook; the account, dropped on the way, counted it.
                Err(_) => (None, ProxyError::Internal),
            };
            let mut response = self.refuse(gate, &error, &reply, trace);
            if matches!(error, ProxyError::Ambiguous(_)) && reply.version < Version::HTTP_2 {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            self.finish(&reply, response)
        }))
    }

    /// The rest of a request that is held.
    async fn outlast(self: Arc<Self>, held: Held, reply: Reply) -> Next {
        let response = match AssertUnwindSafe(held).catch_unwind().await {
            Ok(response) => response,
            Err(_) => self.refuse(None, &ProxyError::Internal, &reply, None),
        };
        self.finish(&reply, response)
    }

    /// Counts and tells why a request was not admitted, and makes its answer.
    fn refuse(
        &self,
        gate: Option<(Arc<Gate>, Box<RequestInfo>)>,
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
        let body = |body| Body::full(if reply.is_head { Bytes::new() } else { body });
        error_response(&error.for_client(detail), reply.dialect, id, body)
    }

    /// Finishes the head of an answer, and counts its body if it is ours.
    ///
    /// A connection that is closed while the next request is on its way fails that one. So when we are about to stop, it is
    /// said beforehand, and the client goes elsewhere. HTTP/2 has a frame for that.
    fn finish(&self, reply: &Reply, mut response: Response<Body>) -> Next {
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

    async fn serve(
        &self,
        client: &Client,
        mut head: Box<request::Parts>,
        incoming: Incoming,
        started: Instant,
        under_way: UnderWay,
        trace: &mut Slot,
    ) -> Result<Served, Refused> {
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
                let arrived = Arrived { head, host, body, started, under_way };
                return Box::pin(self.intercept(client, interceptor, arrived, trace)).await;
            }
            Found::Preflight(gate, api, body) => {
                let Some(permit) = gate.enter_quietly() else {
                    if gate.target().is_up() {
                        let (route, reason) = (gate.key().clone(), "a preflight does not wait".into());
                        return Err(ProxyError::Saturated { route, reason }.into());
                    }
                    return Box::pin(self.answer_ourselves(&head, api)).await.map(Served::Answer);
                };
                let arrived = Arrived { head, host, body, started, under_way };
                return Ok(Box::pin(self.preflight(client, permit, arrived, trace)).await.into());
            }
            Found::Ours(api) => {
                return Box::pin(self.answer_ourselves(&head, api)).await.map(Served::Answer);
            }
        };
        if let Intake::Unread(body) = &body {
            told_to_fit(&body.incoming, &self.shared.limits.load())
                .map_err(|error| Refused::of(&gate, &head, None, error))?;
        }
        // Also where it will not wait: what is wrong should not show only on a cold day.
        check_patience(&head.headers).map_err(|error| Refused::of(&gate, &head, None, error))?;
        if shape.is_some() && openai::makes_response(head.uri.path()) {
            // On the heap: what keeps nothing should not carry its room.
            (body, kept) = Box::pin(self.kept(&gate, &head, body))
                .await
                .map_err(|error| Refused::of(&gate, &head, None, error))?;
        }
        let wishes = Wishes::take(&mut head.headers, shape);
        let wishes = wishes.map_err(|error| Refused::of(&gate, &head, None, error))?;
        let version = head.version;
        let request_id = forward::request(&mut head, &host, client.address);
        drop(host);
        let intercepted = None;
        let routed = Routed {
            head,
            gate,
            body,
            shape,
            scan,
            wishes,
            intercepted,
            kept,
            version,
            request_id,
            started,
            under_way,
        };
        self.admit(routed, trace).await
    }

    /// Lets a request in: at once, if an endpoint has room and nobody waits for one.
    pub(super) async fn admit(&self, mut routed: Routed, trace: &mut Slot) -> Result<Served, Refused> {
        match self.shared.memory.request(&routed.head) {
            Ok(share) => routed.under_way.keep(share),
            Err(max) => {
                let error = ProxyError::BuffersFull(max);
                return Err(Refused::of(&routed.gate, &routed.head, routed.scan.model.as_deref(), error));
            }
        }
        let pin = routed.kept.as_ref().and_then(|kept| kept.pin);
        let Some((permit, place)) = routed.gate.enter_for(pin) else {
            // On the heap: a warm request should not carry the room that waiting takes.
            return Box::pin(self.hold(routed, trace)).await;
        };
        let Routed {
            head, gate, body, scan, wishes, intercepted, kept, request_id, started, under_way, ..
        } = routed;
        let mut exchange = self.exchange(&gate, &head, under_way, request_id, started, trace.take());
        exchange.asks(&scan);
        let mut sending = Sending::new(head, body, intercepted, wishes);
        sending.kept = kept;
        match self.attempt(permit, &mut sending, &gate, exchange.trace()).await {
            Ok(answer) => {
                let mut response = self.respond(answer, exchange, sending);
                response.body_mut().name_model(scan.model);
                Ok(response.into())
            }
            Err(Failed::Finally(error)) => {
                exchange.tell(&sending.head, scan.model.as_deref());
                Ok(fail(exchange, &error).into())
            }
            Err(Failed::ForNow(setback)) => {
                exchange.set_back(&setback, &sending.head, scan.model.as_deref());
                let over = sending.intercepted.as_ref().and_then(|by| by.deadline);
                let held = started + gate.policy().hold.timeout.get();
                let deadline = over.map_or(held, |over| over.min(held));
                let again = self.hold_again(&mut sending, &gate, place, setback, deadline);
                match Box::pin(again).await {
                    Ok(ticket) => Ok(Served::Held(self.wait(exchange, sending, ticket, scan))),
                    Err(error) => Ok(fail(exchange, &error).into()),
                }
            }
        }
    }

    /// Holds a request, which takes a whole body: readable to its end, countable, and to be sent again.
    async fn hold(&self, routed: Routed, trace: &mut Slot) -> Result<Served, Refused> {
        let Routed {
            mut head,
            gate,
            body,
            shape,
            scan,
            wishes,
            intercepted,
            kept,
            version,
            request_id,
            started,
            under_way,
        } = routed;
        let refused =
            |head: &request::Parts, model: Option<&str>, error| Refused::of(&gate, head, model, error);
        if let Some(intercepted) = &intercepted {
            if let Some(placeholder) = intercepted.instead_of_holding(&head) {
                return Ok(placeholder.into());
            }
        } else if shape.is_none() && !gate.target().is_up() {
            let error = ProxyError::NotKept(head.uri.path().into());
            return Err(refused(&head, None, error));
        }
        let (mut read, scan) = match body {
            Intake::Read(read) => (read, scan),
            Intake::Unread(body) => {
                let read = self.read(&head, body).await.map_err(|error| refused(&head, None, error))?;
                // What cannot be read for a hidden model can still be held: nothing needs the model here.
                let scan = match shape.filter(|_| encoding(&head.headers).is_none()) {
                    Some(shape) => match scan_body(shape, &head.headers, &read.bytes).await {
                        Err(ScanError::Charset(_)) => Scan::default(),
                        scan => scan.map_err(|error| refused(&head, None, error.into()))?,
                    },
                    None => Scan::default(),
                };
                (read, scan)
            }
        };
        // What a request came in is several times its size. The buffer of the body stays the connection's: over HTTP/1 that is
        // this request's alone.
        forward::settle(&mut head);
        let request_id = head.headers.get(forward::REQUEST_ID).cloned().unwrap_or(request_id);
        if version == Version::HTTP_2 {
            read.settle();
        }
        let patience = patience(&head.headers).map_err(|error| refused(&head, None, error))?;
        let pin = kept.as_ref().and_then(|kept| kept.pin);
        let ticket = match gate.hold_for(pin, read.bytes.len(), patience.may_wait()) {
            Ok(ticket) => ticket,
            Err(error) => {
                let by = intercepted.as_ref();
                if let Some(placeholder) = by.and_then(|by| by.instead_of_refusing(&error, &head)) {
                    return Ok(placeholder.into());
                }
                // Nothing starts the target, so that waiting for it first would be in vain.
                let paused = matches!(error, ProxyError::AutoscalingPaused { .. });
                let Some(permit) = by.filter(|_| paused).and_then(|by| by.fallback()) else {
                    return Err(refused(&head, scan.model.as_deref(), error));
                };
                gate.counters().admit();
                let exchange = self.exchange(&gate, &head, under_way, request_id, started, trace.take());
                let sending = Sending::new(head, Intake::Read(read), intercepted, wishes);
                let answered = Box::pin(self.fall_back(exchange, sending, permit)).await;
                return Ok(answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error)).into());
            }
        };
        let mut exchange = self.exchange(&gate, &head, under_way, request_id, started, trace.take());
        exchange.asks(&scan);
        let mut sending = Sending::new(head, Intake::Read(read), intercepted, wishes);
        sending.kept = kept;
        Ok(Served::Held(self.wait(exchange, sending, ticket, scan)))
    }

    pub(super) fn exchange(
        &self,
        gate: &Arc<Gate>,
        head: &request::Parts,
        under_way: UnderWay,
        request_id: HeaderValue,
        started: Instant,
        trace: Slot,
    ) -> Exchange {
        let dialect = Dialect::of(head.uri.path(), &head.headers);
        Exchange::new(gate.clone(), under_way, self.shared.clone(), request_id, dialect, started, trace)
    }

    /// What needs no model server, and wakes none.
    async fn answer_ourselves(&self, head: &request::Parts, api: Api) -> Result<Response<Body>, Refused> {
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

// === impl Refused ===

impl Refused {
    /// A request to this route, for this model if that is known.
    pub(super) fn of(
        gate: &Arc<Gate>,
        head: &request::Parts,
        model: Option<&str>,
        error: ProxyError,
    ) -> Self {
        Self { gate: Some((gate.clone(), Box::new(exchange::asked(head, model)))), error }
    }
}

impl From<ProxyError> for Refused {
    fn from(error: ProxyError) -> Self {
        Self { gate: None, error }
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

/// Whether what a request says of its patience can be read, if it says anything.
pub(super) fn check_patience(headers: &HeaderMap) -> Result<(), ProxyError> {
    if headers.contains_key(openai::MAX_WAIT) { patience(headers).map(drop) } else { Ok(()) }
}

fn patience(headers: &HeaderMap) -> Result<Patience, ProxyError> {
    Patience::of(headers).map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}
