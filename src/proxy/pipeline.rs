//! The request path, top to bottom: route, admission, hold, pick, upstream, body.

use std::{
    net::SocketAddr,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER},
    request,
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until};

use super::{
    ConnectionState, Match, Model, RouteTable,
    body::{Body, Lease, Relay},
    client_io::UnderWay,
    exchange::Exchange,
    forward,
    intake::{Budget, Buffered, CutOff, Outgoing, Share, told_to_fit, within},
    keepalive::{Heartbeat, KeptAlive, Progress},
};
use crate::{
    admission::{Gate, Permit},
    config::Limits,
    error::{Outcome, ProxyError},
    hold::{Place, Released, Ticket},
    openai::{self, Api, Patience, Scan, Shape},
    telemetry::RouteCounters,
    upstream::{Dialer, MAX_WRITES, SendError, Upstream, Writes},
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
pub struct Proxy {
    shared: Arc<Shared>,
    upstream: Arc<Upstream<Outgoing>>,
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
struct Refused {
    /// The route that it belongs to, if that was found out.
    gate: Option<Arc<Gate>>,
    error: ProxyError,
}

/// A request as it goes to an endpoint, again if need be.
struct Sending {
    head: request::Parts,
    source: Source,
    writes: Writes,
}

enum Source {
    Buffered(Bytes, #[expect(dead_code, reason = "counted until it is dropped")] Share),
    /// Until it is sent.
    Streaming(Option<Incoming>),
}

/// Until when a request may be held, and what says so.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    limit: &'static str,
}

/// What an endpoint answered.
enum Answer {
    Stream(Response<Incoming>, Lease),
    /// Looked at, and so read to its end.
    Whole(Response<Bytes>),
}

/// Why there is no answer.
enum Failed {
    /// It may be tried again.
    ForNow,
    /// That was it.
    Finally(ProxyError),
}

type Answered = Result<Response<Body>, (Exchange, ProxyError)>;

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
        let head = request.method() == http::Method::HEAD;
        let served = AssertUnwindSafe(self.serve(client, request)).catch_unwind().await;
        let Refused { gate, error } = match served {
            Ok(Ok(response)) => return response,
            Ok(Err(refused)) => refused,
            // The message has gone to the log by the panic hook; the account, dropped on the way, counted it.
            Err(_) => return error_response(&ProxyError::Internal, Body::full),
        };
        if let Err(refusal) = error.ending() {
            gate.as_ref().map_or(&self.shared.unrouted, |gate| gate.counters()).refuse(refusal);
            tracing::debug!(refusal = refusal.answer().code, %error, "request refused");
        }
        error_response(&error, |body| Body::full(if head { Bytes::new() } else { body }))
    }

    async fn serve(&self, client: &Client, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let started = Instant::now();
        let under_way = client.connection.begin();
        let (mut head, incoming) = request.into_parts();

        // Which route? Its body is read first if that depends on the model.
        let host = forward::host(&head.uri, &head.headers)?;
        let shape = match self.api(&head) {
            Api::Work(shape) => Some(shape),
            Api::Stored => None,
            other => return self.answer_ourselves(&head, other),
        };
        let (gate, mut body, scan) = self.route(&host, &head, shape, incoming).await?;
        if let Intake::Unread(incoming) = &body {
            let fits = told_to_fit(incoming, &self.shared.limits.load());
            fits.map_err(|error| Refused { gate: Some(gate.clone()), error })?;
        }

        // At once, if an endpoint has room and nobody waits for one.
        let request_id = forward::request(&mut head, &host, client.address);
        if let Some((permit, place)) = gate.enter() {
            let mut exchange = self.exchange(&gate, under_way, request_id, started);
            let mut sending = Sending { head, source: body.into(), writes: Writes::default() };
            return match self.attempt(permit, &mut sending, &gate).await {
                Ok(answer) => Ok(self.respond(answer, exchange)),
                Err(Failed::Finally(error)) => Ok(fail(exchange, &error)),
                Err(Failed::ForNow) => match self.hold_again(&mut sending, &gate, place).await {
                    Ok(ticket) => self.wait(exchange, sending, ticket, shape, scan).await,
                    Err(error) => {
                        exchange.fail(&error);
                        Ok(error_response(&error, |body| Body::ending(body, exchange)))
                    }
                },
            };
        }

        // Otherwise it is held, which takes a whole body: readable to its end, countable, and to be sent again.
        let refused = |error| Refused { gate: Some(gate.clone()), error };
        if shape.is_none() && !gate.target().is_up() {
            return Err(refused(ProxyError::NotKept(head.uri.path().into())));
        }
        let scan = match body {
            Intake::Read(_) => scan,
            Intake::Unread(incoming) => {
                let read = self.read(incoming).await.map_err(refused)?;
                // What cannot be read for a hidden model can still be held: nothing needs the model here.
                let scan = match shape.filter(|_| encoding(&head.headers).is_none()) {
                    Some(shape) => scan_body(shape, &head.headers, &read.bytes).await.map_err(refused)?,
                    None => Scan::default(),
                };
                body = Intake::Read(read);
                scan
            }
        };
        let Intake::Read(mut read) = body else { unreachable!("it has just been read") };
        read.settle();
        let patience = patience(&head.headers).map_err(refused)?;
        let ticket = gate.hold(read.bytes.len(), patience.total != Some(Duration::ZERO)).map_err(refused)?;
        let exchange = self.exchange(&gate, under_way, request_id, started);
        let sending = Sending { head, source: Intake::Read(read).into(), writes: Writes::default() };
        self.wait(exchange, sending, ticket, shape, scan).await
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

    async fn read(&self, incoming: Incoming) -> Result<Buffered, ProxyError> {
        let limits = **self.shared.limits.load();
        Buffered::read(incoming, &limits, &self.shared.budget).await
    }

    /// Sends a request that has a permit.
    async fn attempt(&self, permit: Permit, sending: &mut Sending, gate: &Gate) -> Result<Answer, Failed> {
        let timeouts = gate.policy().upstream;
        let limits = **self.shared.limits.load();
        let Sending { head, source, writes } = sending;
        let body = || source.take(&limits);
        let error = match self.upstream.send(permit.endpoint(), head, body, timeouts, writes).await {
            Ok((response, connection)) => {
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    // `Upgrade` is not passed on, so nobody asked for it, and what would follow is no HTTP.
                    let (route, reason) = (gate.key().clone(), "it switched to another protocol".into());
                    return Err(Failed::Finally(ProxyError::UpstreamError { route, reason }));
                }
                let lease = Lease { connection, pool: self.upstream.clone(), permit };
                if response.status() != StatusCode::SERVICE_UNAVAILABLE {
                    lease.permit.first_byte();
                    return Ok(Answer::Stream(response, lease));
                }
                return self.unavailable(response, lease, sending, timeouts.idle_timeout.get()).await;
            }
            Err(error) => error,
        };
        if let SendError::Reset { source, .. } = &error
            && let Some(error) = cut_off(source, &limits)
        {
            return Err(Failed::Finally(error));
        }
        let again = error.is_retryable() && writes.0 < MAX_WRITES && source.is_left();
        if error.is_retryable() {
            permit.suspect();
        }
        tracing::debug!(route = %gate.key(), %error, again, "dispatch failed");
        if again {
            return Err(Failed::ForNow);
        }
        Err(Failed::Finally(ProxyError::UpstreamError {
            route: gate.key().clone(),
            reason: error.to_string(),
        }))
    }

    /// A 503: a gateway's word that it has no endpoint, or an endpoint's own answer?
    async fn unavailable(
        &self,
        response: Response<Incoming>,
        lease: Lease,
        sending: &mut Sending,
        pause: Duration,
    ) -> Result<Answer, Failed> {
        const LONGEST: u64 = 4096;
        if http_body::Body::size_hint(response.body()).upper().is_none_or(|upper| upper > LONGEST) {
            lease.permit.first_byte();
            return Ok(Answer::Stream(response, lease));
        }
        let (head, body) = response.into_parts();
        let route = lease.permit.gate().key().clone();
        let Some(Ok(body)) = within(pause, body.collect()).await else {
            lease.permit.suspect();
            return match sending.writes.0 < MAX_WRITES && sending.source.is_left() {
                true => Err(Failed::ForNow),
                false => {
                    let reason = "it broke its answer off".into();
                    Err(Failed::Finally(ProxyError::UpstreamError { route, reason }))
                }
            };
        };
        let Lease { connection, pool, permit } = lease;
        pool.put_back(connection);
        let body = body.to_bytes();
        if !openai::says_no_endpoint(&head.headers, &body) || !sending.source.is_left() {
            permit.first_byte();
            return Ok(Answer::Whole(Response::from_parts(head, body)));
        }
        // It reached a gateway, but no server.
        sending.writes.0 = sending.writes.0.saturating_sub(1);
        permit.suspect();
        Err(Failed::ForNow)
    }

    /// Takes a request into the queue again, at its old place; one that streamed is buffered for that.
    async fn hold_again(
        &self,
        sending: &mut Sending,
        gate: &Arc<Gate>,
        place: Place,
    ) -> Result<Ticket<Permit>, ProxyError> {
        if let Source::Streaming(incoming) = &mut sending.source
            && let Some(incoming) = incoming.take()
        {
            sending.source = Intake::Read(self.read(incoming).await?).into();
        }
        let bytes = match &mut sending.source {
            Source::Buffered(bytes, _) => bytes.len(),
            Source::Streaming(_) => 0,
        };
        Ok(gate.readmit(place, bytes))
    }

    /// Waits for a permit and for the answer, and keeps the client informed meanwhile.
    async fn wait(
        &self,
        exchange: Exchange,
        sending: Sending,
        ticket: Ticket<Permit>,
        shape: Option<Shape>,
        scan: Scan,
    ) -> Result<Response<Body>, Refused> {
        let gate = exchange.gate().clone();
        let policy = gate.policy();
        let patience = patience(&sending.head.headers).unwrap_or_default();
        let shape = shape.unwrap_or(Shape::Plain);
        let heartbeat = Heartbeat::of(policy.keepalive.mode, scan.stream, shape);
        let deadline = Deadline::of(&exchange, patience, policy.hold.timeout.get(), heartbeat.is_some());
        let safe = patience.safe_silence();
        let sooner = |period: Duration| safe.map_or(period, |safe| period.min(safe));
        let early = exchange.started() + sooner(policy.keepalive.after.get());
        let interval = sooner(policy.keepalive.interval.get());
        drop(policy);

        let id = exchange.request_id.clone();
        let progress = Progress::new(gate, exchange.started(), shape, scan.model, id);
        let this = Self { shared: self.shared.clone(), upstream: self.upstream.clone() };
        let waiting = this.wait_and_send(exchange, sending, ticket, deadline, progress.clone());
        // On the heap: a held request should not carry the state of its later dispatch through every layer above.
        let mut waiting: super::keepalive::Waiting = Box::pin(waiting);
        let Some(heartbeat) = heartbeat else { return Ok(answered(waiting.await)) };
        tokio::select! {
            // The answer, if there is one.
            biased;
            answer = &mut waiting => Ok(answered(answer)),
            () = sleep_until(early) => Ok(KeptAlive::answer(waiting, heartbeat, interval, progress)),
        }
    }

    async fn wait_and_send(
        self,
        mut exchange: Exchange,
        mut sending: Sending,
        mut ticket: Ticket<Permit>,
        deadline: Deadline,
        progress: Arc<Progress>,
    ) -> Answered {
        let gate = exchange.gate().clone();
        let mut timer = pin!(sleep_until(deadline.at));
        loop {
            exchange.hold(ticket.since());
            progress.at(Some(ticket.spot()));
            let released = tokio::select! {
                // A permit that came just in time is used.
                biased;
                released = ticket.released() => Some(released),
                () = &mut timer => None,
            };
            progress.at(None);
            let place = ticket.place();
            drop(ticket);
            let permit = match released {
                Some(Released::Dispatch(permit)) => permit,
                Some(Released::Failed(reason, retry_after)) => {
                    let route = gate.key().clone();
                    let retry_after = Some(retry_after);
                    return Err((exchange, ProxyError::ColdStartFailed { route, reason, retry_after }));
                }
                Some(Released::Draining) => return Err((exchange, ProxyError::Draining { admitted: true })),
                None => {
                    let error = deadline.passed(&exchange);
                    return Err((exchange, error));
                }
            };
            exchange.dispatched();
            match self.attempt(permit, &mut sending, &gate).await {
                Ok(answer) => return Ok(self.respond(answer, exchange)),
                Err(Failed::Finally(error)) => return Err((exchange, error)),
                Err(Failed::ForNow) => match self.hold_again(&mut sending, &gate, place).await {
                    Ok(again) => ticket = again,
                    Err(error) => return Err((exchange, error)),
                },
            }
        }
    }

    /// Passes an answer on.
    fn respond(&self, answer: Answer, mut exchange: Exchange) -> Response<Body> {
        let upstream = exchange.started().elapsed();
        let request_id = exchange.request_id.clone();
        let finish = |head: &mut http::response::Parts, exchange: &mut Exchange| {
            forward::response(&mut head.headers, request_id);
            exchange.first_byte(head.status.as_u16());
            if let Some(waited) = exchange.waited() {
                tell_wait(&mut head.headers, waited, upstream.saturating_sub(waited), exchange.is_cold());
            }
        };
        match answer {
            Answer::Stream(response, lease) => {
                let (mut head, incoming) = response.into_parts();
                finish(&mut head, &mut exchange);
                Response::from_parts(head, Body::Relay(Relay::new(incoming, lease, exchange)))
            }
            Answer::Whole(response) => {
                let (mut head, body) = response.into_parts();
                finish(&mut head, &mut exchange);
                exchange.end(Outcome::Completed);
                Response::from_parts(head, Body::ending(body, exchange))
            }
        }
    }
}

/// A request body before admission.
enum Intake {
    Unread(Incoming),
    Read(Buffered),
}

impl From<Intake> for Source {
    fn from(intake: Intake) -> Self {
        match intake {
            Intake::Unread(incoming) => Self::Streaming(Some(incoming)),
            Intake::Read(read) => Self::Buffered(read.bytes, read.share),
        }
    }
}

impl Source {
    fn take(&mut self, limits: &Limits) -> Option<Outgoing> {
        match self {
            Self::Buffered(bytes, _) => {
                Some(Outgoing::Full(Some(bytes.clone()).filter(|bytes| !bytes.is_empty())))
            }
            Self::Streaming(incoming) => incoming.take().map(|incoming| Outgoing::stream(incoming, limits)),
        }
    }

    /// Whether it can be sent (again).
    const fn is_left(&self) -> bool {
        matches!(self, Self::Buffered(..) | Self::Streaming(Some(_)))
    }
}

// === impl Deadline ===

impl Deadline {
    /// The least of what we, the client and, where we cannot break the silence, its SDK allow.
    fn of(exchange: &Exchange, patience: Patience, hold: Duration, heartbeats: bool) -> Self {
        let silence = patience.safe_silence().filter(|_| !heartbeats);
        let limits = [
            (Some(hold), "hold.timeout of the route"),
            (patience.total, "x-anteroom-max-wait of the request"),
            (silence, "the client's own time-out"),
        ];
        let least =
            limits.into_iter().filter_map(|(wait, limit)| Some((wait?, limit))).min_by_key(|(wait, _)| *wait);
        let (wait, limit) = least.unwrap_or((hold, limits[0].1));
        Self { at: exchange.started() + wait, limit }
    }

    fn passed(&self, exchange: &Exchange) -> ProxyError {
        ProxyError::ColdStartTimeout {
            route: exchange.gate().key().clone(),
            waited: self.at - exchange.started(),
            limit: self.limit,
            retry_after: exchange.gate().cold_starts().time_left(),
        }
    }
}

impl From<ProxyError> for Refused {
    fn from(error: ProxyError) -> Self {
        Self { gate: None, error }
    }
}

fn answered(answered: Answered) -> Response<Body> {
    answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error))
}

fn fail(mut exchange: Exchange, error: &ProxyError) -> Response<Body> {
    exchange.fail(error);
    error_response(error, |body| Body::ending(body, exchange))
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
        (Shape::Form, Some(boundary)) => openai::scan_multipart(body.clone(), &boundary).await,
        (Shape::Form, None) => {
            let reason = "This path wants a multipart/form-data body.".into();
            return Err(ProxyError::InvalidRequest(reason));
        }
        _ => openai::scan_json(body),
    };
    scan.map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}

/// The request body itself was what broke.
fn cut_off(error: &hyper::Error, limits: &Limits) -> Option<ProxyError> {
    let causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    let cut_off = causes.into_iter().find_map(|cause| cause.downcast_ref::<CutOff>())?;
    Some(match cut_off {
        CutOff::TooLarge => ProxyError::RequestTooLarge { limit: limits.max_body_bytes.get() },
        CutOff::Paused => ProxyError::RequestTimeout(limits.body_timeout.get()),
        CutOff::Broken(_) => ProxyError::InvalidRequest("The request body broke off.".into()),
    })
}

/// What a client that waited is told.
fn tell_wait(headers: &mut HeaderMap, held: Duration, upstream: Duration, cold: bool) {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let timing = format!("hold;dur={:.1}, upstream;dur={:.1}", ms(held), ms(upstream));
    if let Ok(timing) = timing.parse() {
        headers.append("server-timing", timing);
    }
    if cold {
        headers.insert("x-anteroom-cold-start", HeaderValue::from_static("true"));
        headers.insert("x-keda-http-cold-start", HeaderValue::from_static("true"));
    }
}

fn json_response(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn error_response(error: &ProxyError, body: impl FnOnce(Bytes) -> Body) -> Response<Body> {
    let answer = error.answer();
    let mut response = json_response(answer.status, body(openai::error_body(error)));
    let headers = response.headers_mut();
    if let Some(wait) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil() as u64));
    }
    if let Some(retry) = answer.should_retry {
        headers.insert("x-should-retry", HeaderValue::from_static(if retry { "true" } else { "false" }));
    }
    if let ProxyError::MethodNotAllowed { allowed, .. } = error {
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
    }
    response
}
