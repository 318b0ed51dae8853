//! The request path, top to bottom: route, admission, hold, pick, upstream, body.

use std::{
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::AtomicBool},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
    request,
};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{
    ConnectionState, Match, Model, RouteTable,
    answers::{error_response, fail, json_response},
    body::Body,
    client_io::UnderWay,
    dispatch::{Failed, Intake, Sending},
    exchange::Exchange,
    forward,
    intake::{Budget, Buffered, Outgoing, told_to_fit},
};
use crate::{
    admission::Gate,
    config::Limits,
    error::ProxyError,
    openai::{self, Api, Patience, Scan, Shape},
    telemetry::RouteCounters,
    upstream::{Dialer, Upstream},
};

/// What all threads that serve requests share.
pub struct Shared {
    /// The routes.
    pub table: ArcSwap<RouteTable>,
    /// The limits.
    pub limits: ArcSwap<Limits>,
    /// The bytes of all request bodies.
    pub budget: Arc<Budget>,
    /// What is counted of requests that belong to no route.
    pub unrouted: RouteCounters,
    /// Draining has cut off what was still under way.
    pub cut: Arc<AtomicBool>,
}

/// The request path of one thread.
#[derive(Clone)]
pub struct Proxy {
    pub(super) shared: Arc<Shared>,
    pub(super) upstream: Arc<Upstream<Outgoing>>,
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
    /// The route that it belongs to, if that was found out.
    gate: Option<Arc<Gate>>,
    error: ProxyError,
}

/// A request that belongs to a route, before admission.
struct Routed {
    head: request::Parts,
    gate: Arc<Gate>,
    body: Intake,
    /// None: something that is of use only while a model server lives.
    shape: Option<Shape>,
    /// What its body says, if it has been read.
    scan: Scan,
    request_id: HeaderValue,
    started: Instant,
    under_way: UnderWay,
}

// === impl Shared ===

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Shared {
    /// No routes yet.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            table: ArcSwap::default(),
            budget: Budget::new(limits.max_buffered_bytes.get()),
            limits: ArcSwap::from_pointee(limits),
            unrouted: RouteCounters::default(),
            cut: Arc::default(),
        })
    }

    /// New limits, from a reload. Connections that are open keep their time-outs.
    pub fn set_limits(&self, limits: Limits) {
        self.budget.set_max(limits.max_buffered_bytes.get());
        self.limits.store(Arc::new(limits));
    }
}

// === impl Proxy ===

impl Proxy {
    /// The request path of one thread, with its own connections to endpoints.
    pub fn new(shared: Arc<Shared>, dialer: Dialer) -> Arc<Self> {
        Arc::new(Self { shared, upstream: Arc::new(Upstream::new(dialer)) })
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
    pub async fn answer(&self, client: &Client, request: Request<Incoming>) -> Response<Body> {
        let head = request.method() == Method::HEAD;
        // A copy: a part of the read buffer would keep all of it for as long as the request is held.
        let id = request
            .headers()
            .get(forward::REQUEST_ID)
            .map(HeaderValue::as_bytes)
            .map(HeaderValue::from_bytes);
        let served = AssertUnwindSafe(self.serve(client, request)).catch_unwind().await;
        let (gate, error) = match served {
            Ok(Ok(response)) => return response,
            Ok(Err(Refused { gate, error })) => (gate, error),
            // The message has gone to the log by the panic hook; the account, dropped on the way, counted it.
            Err(_) => (None, ProxyError::Internal),
        };
        let id = id.and_then(Result::ok).unwrap_or_else(forward::new_id);
        if let Err(refusal) = error.ending() {
            gate.as_ref().map_or(&self.shared.unrouted, |gate| gate.counters()).refuse(refusal);
            tracing::debug!(refusal = refusal.answer().code, %error, request_id = ?id, "request refused");
        }
        error_response(&error, id, |body| Body::full(if head { Bytes::new() } else { body }))
    }

    async fn serve(&self, client: &Client, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let started = Instant::now();
        let under_way = client.connection.begin();
        let (mut head, incoming) = request.into_parts();

        // Which route? Its body is read first if that depends on the model.
        let host = forward::host(&head.uri, &head.headers)?;
        forward::transfer_coding(&head.headers)?;
        let shape = match self.api(&head) {
            Api::Work(shape) => Some(shape),
            Api::Stored => None,
            other => return self.answer_ourselves(&head, other),
        };
        let (gate, body, scan) = self.route(&host, &head, shape, incoming).await?;
        if let Intake::Unread(incoming) = &body {
            let fits = told_to_fit(incoming, &self.shared.limits.load());
            fits.map_err(|error| Refused { gate: Some(gate.clone()), error })?;
        }
        if head.headers.contains_key(openai::MAX_WAIT) {
            // Also where it will not wait: what is wrong should not show only on a cold day.
            patience(&head.headers).map_err(|error| Refused { gate: Some(gate.clone()), error })?;
        }
        let request_id = forward::request(&mut head, &host, client.address);
        drop(host);
        let entered = gate.enter();
        let routed = Routed { head, gate, body, shape, scan, request_id, started, under_way };

        // At once, if an endpoint has room and nobody waits for one.
        let Some((permit, place)) = entered else {
            // On the heap: a warm request should not carry the room that waiting takes.
            return Box::pin(self.hold(routed)).await;
        };
        let Routed { head, gate, body, shape, scan, request_id, started, under_way } = routed;
        let exchange = self.exchange(&gate, under_way, request_id, started);
        let mut sending = Sending::new(head, body);
        match self.attempt(permit, &mut sending, &gate).await {
            Ok(answer) => Ok(self.respond(answer, exchange)),
            Err(Failed::Finally(error)) => Ok(fail(exchange, &error)),
            Err(Failed::ForNow) => {
                Box::pin(async {
                    match self.hold_again(&mut sending, &gate, place).await {
                        Ok(ticket) => Ok(self.wait(exchange, sending, ticket, shape, scan).await),
                        Err(error) => Ok(fail(exchange, &error)),
                    }
                })
                .await
            }
        }
    }

    /// Holds a request, which takes a whole body: readable to its end, countable, and to be sent again.
    async fn hold(&self, routed: Routed) -> Result<Response<Body>, Refused> {
        let Routed { mut head, gate, body, shape, scan, started, under_way, .. } = routed;
        let refused = |error| Refused { gate: Some(gate.clone()), error };
        if shape.is_none() && !gate.target().is_up() {
            return Err(refused(ProxyError::NotKept(head.uri.path().into())));
        }
        let (mut read, scan) = match body {
            Intake::Read(read) => (read, scan),
            Intake::Unread(incoming) => {
                let read = self.read(incoming).await.map_err(refused)?;
                // What cannot be read for a hidden model can still be held: nothing needs the model here.
                let scan = match shape.filter(|_| encoding(&head.headers).is_none()) {
                    Some(shape) => scan_body(shape, &head.headers, &read.bytes).await.map_err(refused)?,
                    None => Scan::default(),
                };
                (read, scan)
            }
        };
        read.settle();
        forward::settle(&mut head);
        let request_id = head.headers.get(forward::REQUEST_ID).cloned().unwrap_or_else(forward::new_id);
        let patience = patience(&head.headers).map_err(refused)?;
        let ticket = gate.hold(read.bytes.len(), patience.may_wait()).map_err(refused)?;
        let exchange = self.exchange(&gate, under_way, request_id, started);
        Ok(self.wait(exchange, Sending::new(head, Intake::Read(read)), ticket, shape, scan).await)
    }

    fn api(&self, head: &request::Parts) -> Api {
        self.shared.table.load().api(&head.method, head.uri.path())
    }

    fn exchange(
        &self,
        gate: &Arc<Gate>,
        under_way: UnderWay,
        request_id: HeaderValue,
        started: Instant,
    ) -> Exchange {
        Exchange::new(gate.clone(), under_way, self.shared.cut.clone(), request_id, started)
    }

    /// What needs no model server, and wakes none.
    fn answer_ourselves(&self, head: &request::Parts, api: Api) -> Result<Response<Body>, Refused> {
        let path = || head.uri.path().to_owned();
        let body = match api {
            Api::Models => openai::model_list(self.shared.table.load().models().iter().map(|model| &**model)),
            Api::Model(id) => {
                let table = self.shared.table.load();
                let known = table.models().binary_search_by(|model| (**model).cmp(&id)).is_ok();
                known.then(|| openai::model(&id)).ok_or(ProxyError::ModelNotFound(id))?
            }
            Api::Probe => Bytes::from_static(b"{\"status\":\"ok\"}"),
            Api::WrongMethod(allowed) => {
                return Err(ProxyError::MethodNotAllowed { path: path(), allowed }.into());
            }
            Api::Work(_) | Api::Stored | Api::Unknown => return Err(ProxyError::UnknownPath(path()).into()),
        };
        Ok(json_response(StatusCode::OK, Body::full(body)))
    }

    /// Finds the route, reading the body if that depends on the model.
    async fn route(
        &self,
        host: &HeaderValue,
        head: &request::Parts,
        shape: Option<Shape>,
        incoming: Incoming,
    ) -> Result<(Arc<Gate>, Intake, Scan), Refused> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        // A request without a body names no model.
        let model = if shape.is_some() { Model::Unread } else { Model::Read(None) };
        {
            let table = self.shared.table.load();
            match table.find(host, path, &head.headers, model) {
                Match::Route(gate) => return Ok((gate.clone(), Intake::Unread(incoming), Scan::default())),
                Match::NeedsModel => {}
                Match::Nothing => {
                    return match (shape, table.gates()) {
                        // Where there is only one route, it needs no model to be found.
                        (None, [gate]) => Ok((gate.clone(), Intake::Unread(incoming), Scan::default())),
                        _ => Err(ProxyError::UnknownPath(format!("{path} at host {host}")).into()),
                    };
                }
            }
        }
        if let Some(encoding) = encoding(&head.headers) {
            return Err(ProxyError::UnsupportedEncoding(encoding).into());
        }
        let read = self.read(incoming).await?;
        let scan = scan_body(shape.unwrap_or(Shape::Plain), &head.headers, &read.bytes).await?;
        let table = self.shared.table.load();
        match table.find(host, path, &head.headers, Model::Read(scan.model.as_deref())) {
            Match::Route(gate) => Ok((gate.clone(), Intake::Read(read), scan)),
            _ => Err(match scan.model {
                Some(model) => ProxyError::ModelNotFound(model.into()),
                None => ProxyError::InvalidRequest("The body names no `model`.".into()),
            }
            .into()),
        }
    }

    pub(super) async fn read(&self, incoming: Incoming) -> Result<Buffered, ProxyError> {
        let limits = **self.shared.limits.load();
        Buffered::read(incoming, &limits, &self.shared.budget).await
    }
}

impl From<ProxyError> for Refused {
    fn from(error: ProxyError) -> Self {
        Self { gate: None, error }
    }
}

fn patience(headers: &HeaderMap) -> Result<Patience, ProxyError> {
    Patience::of(headers).map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}

/// The encoding that hides the body, if any.
fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?;
    (!encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
        .then(|| String::from_utf8_lossy(encoding.as_bytes()).into_owned())
}

async fn scan_body(shape: Shape, headers: &HeaderMap, body: &Bytes) -> Result<Scan, ProxyError> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let scan = match (shape, openai::boundary(content_type)) {
        // On the heap: the others should not carry its room.
        (Shape::Form, Some(boundary)) => Box::pin(openai::scan_multipart(body.clone(), &boundary)).await,
        (Shape::Form, None) => {
            let reason = "This path wants a multipart/form-data body.".into();
            return Err(ProxyError::InvalidRequest(reason));
        }
        _ => openai::scan_json(body),
    };
    scan.map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}
