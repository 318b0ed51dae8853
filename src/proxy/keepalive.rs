//! Early responses: a 200 whose body carries heartbeats until the endpoint responds.
//!
//! After an early 200, errors can only be reported in the body: as an event of a stream, else as the body itself.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::{
    body::{Body, BodyError, EarlyBody},
    exchange::Exchange,
    forward::SERVER_TIMING,
    heartbeat::{Heartbeat, ResponseHeartbeats},
};
use crate::{
    admission::{Gate, Permit},
    domain::FailureDetail,
    error::ProxyError,
    history::{Event, Story},
    hold::PositionHandle,
    openai::{self, ApiFormat, Dialect, OpenEvent},
};

/// Resolves to the response of the endpoint, after hold and dispatch.
pub type PendingResponse =
    Pin<Box<dyn Future<Output = Result<Response<Body>, (Exchange, ProxyError)>> + Send>>;

/// State of a held request that heartbeats report.
pub struct WaitStatus {
    gate: Arc<Gate>,
    since: Instant,
    shape: ApiFormat,
    pub(super) model: Option<Box<str>>,
    id: HeaderValue,
    dialect: Dialect,
    story: Arc<Story>,
    /// Position in the queue; `None` while dispatched.
    position: Mutex<Option<PositionHandle<Permit>>>,
}

/// Body of an early response.
pub struct EarlyResponse {
    state: EarlyResponseState,
    heartbeat: Heartbeat,
    wait: Arc<WaitStatus>,
    ticks: Interval,
    last_heartbeat: Instant,
    /// Sent before anything else.
    pending: Option<Bytes>,
}

enum EarlyResponseState {
    Waiting(PendingResponse),
    /// The endpoint's response has the form that the early head announced, and is passed on.
    Relaying {
        /// Boxed to keep waiting responses small.
        body: Box<Body>,
        event: OpenEvent,
        begun: bool,
    },
    /// The endpoint's response is an error or not a stream: it is read and sent as a single event.
    Framing {
        status: StatusCode,
        body: Pin<Box<ReadBody>>,
    },
    /// Complete. Drops the exchange, and so counts the request, with the body.
    Ended(#[expect(dead_code, reason = "held for its Drop")] Option<Exchange>),
}

type ReadBody = dyn Future<Output = Result<Bytes, String>> + Send;

/// Longest response sent as a single event.
const MAX_EVENT_BYTES: usize = 1 << 20;

// === impl WaitStatus ===

impl WaitStatus {
    /// Creates the status of a request that is about to be held.
    pub fn new(
        exchange: &Exchange,
        shape: ApiFormat,
        model: Option<Box<str>>,
        story: Arc<Story>,
    ) -> Arc<Self> {
        Arc::new(Self {
            gate: exchange.gate().clone(),
            since: exchange.started(),
            shape,
            model,
            id: exchange.request_id.clone(),
            dialect: exchange.dialect,
            story,
            position: Mutex::default(),
        })
    }

    fn id(&self) -> &str {
        self.id.to_str().unwrap_or("anteroom")
    }

    /// Sets the position in the queue; `None` while dispatched.
    pub fn set_position(&self, position: Option<PositionHandle<Permit>>) {
        *self.position.lock() = position;
    }

    /// Formats the status as `key=value` words.
    fn describe(&self) -> String {
        let cold_starts = self.gate.cold_starts();
        // After the activation, requests in the queue wait for capacity.
        let phase = cold_starts.phase().map(|(phase, _)| phase).filter(|phase| phase.is_activation());
        let position = self.position.lock().as_ref().map(PositionHandle::ahead);
        let what = match (phase, position) {
            (_, None) => "waiting phase=first_byte".to_owned(),
            (Some(phase), _) => format!("cold start phase={}", phase.name()),
            (None, _) => "waiting phase=queue".to_owned(),
        };
        let mut text = format!("{what} waited={}s", self.since.elapsed().as_secs());
        if let Some(ahead) = position {
            text += &format!(" position={}", ahead + 1);
        }
        if let Some(left) = phase.zip(position).and_then(|_| cold_starts.time_left()) {
            text += &format!(" left={}s", left.as_secs_f64().ceil());
        }
        if let Some(obstacle) = self.gate.target().obstacle() {
            let reason = obstacle.message.for_client(self.gate.policy().failure.detail);
            text += &format!(" reason=\"{}\"", one_line(&reason));
        }
        text
    }

    fn model(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    fn heartbeat(&self, heartbeat: Heartbeat) -> Bytes {
        self.story.record(Instant::now(), Event::Heartbeat);
        let comment = || openai::sse_comment(&self.describe());
        match heartbeat {
            Heartbeat::Comment => comment(),
            Heartbeat::Chunk => {
                openai::empty_event(self.shape, self.model(), self.id()).unwrap_or_else(comment)
            }
            Heartbeat::Whitespace => Bytes::from_static(b"\n"),
        }
    }
}

/// Makes text safe inside double quotes on one line, and truncates it.
fn one_line(text: &str) -> String {
    const MAX_REASON_CHARS: usize = 500;
    let plain = |character: char| match character {
        '"' => '\'',
        _ if character.is_control() => ' ',
        _ => character,
    };
    text.chars().take(MAX_REASON_CHARS).map(plain).collect()
}

const fn content_type(heartbeat: Heartbeat) -> HeaderValue {
    match heartbeat {
        Heartbeat::Comment | Heartbeat::Chunk => HeaderValue::from_static("text/event-stream; charset=utf-8"),
        Heartbeat::Whitespace => HeaderValue::from_static("application/json"),
    }
}

// === impl EarlyResponse ===

impl EarlyResponse {
    /// Starts an early response. The first heartbeat is sent immediately.
    pub fn start(
        response: PendingResponse,
        heartbeat: Heartbeat,
        interval: Duration,
        wait: Arc<WaitStatus>,
    ) -> Response<Body> {
        wait.story.record(Instant::now(), Event::EarlyAnswer);
        let mut ticks = interval_at(Instant::now(), interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let body = Self {
            state: EarlyResponseState::Waiting(response),
            heartbeat,
            wait: wait.clone(),
            ticks,
            last_heartbeat: Instant::now(),
            pending: None,
        };
        let mut response = Response::new(Body::Early(Box::pin(body)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, content_type(heartbeat));
        headers.insert("cache-control", HeaderValue::from_static("no-cache"));
        // nginx buffers responses, and with them the heartbeats, unless told not to.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        super::forward::prepare_response(headers, wait.id.clone());
        if wait.gate.cold_starts().phase().is_some() {
            super::answers::set_cold_start_headers(headers);
        }
        response
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if let Some(pending) = self.pending.take() {
                return Poll::Ready(Some(Ok(Frame::data(pending))));
            }
            match &mut self.state {
                EarlyResponseState::Waiting(waiting) => match waiting.as_mut().poll(cx) {
                    Poll::Ready(Ok(response)) => self.begin_response(response),
                    Poll::Ready(Err((mut exchange, error))) => {
                        exchange.fail(&error);
                        let last = self.error(&error);
                        self.state = EarlyResponseState::Ended(Some(exchange));
                        return Poll::Ready(Some(Ok(Frame::data(last))));
                    }
                    Poll::Pending => return self.poll_heartbeat(cx),
                },
                EarlyResponseState::Framing { status, body } => match body.as_mut().poll(cx) {
                    Poll::Pending => return self.poll_heartbeat(cx),
                    Poll::Ready(Ok(bytes)) => {
                        let last = match (self.heartbeat, *status) {
                            (Heartbeat::Whitespace, status) => {
                                let text = String::from_utf8_lossy(&bytes);
                                self.error(&self.upstream_error(format!("it answered {status}: {text}")))
                            }
                            (_, status) if status.is_success() => self.event(openai::sse_data(&bytes)),
                            (_, status) => {
                                let WaitStatus { dialect, .. } = &*self.wait;
                                self.event(dialect.upstream_error_event(status, &bytes, self.wait.id()))
                            }
                        };
                        self.state = EarlyResponseState::Ended(None);
                        return Poll::Ready(Some(Ok(Frame::data(last))));
                    }
                    Poll::Ready(Err(reason)) => {
                        let last = self.error(&self.upstream_error(reason));
                        self.state = EarlyResponseState::Ended(None);
                        return Poll::Ready(Some(Ok(Frame::data(last))));
                    }
                },
                EarlyResponseState::Relaying { body, event, begun } => {
                    match ready!(Pin::new(body).poll_frame(cx)) {
                        // The body has recorded the outcome.
                        Some(Err(error)) => {
                            let (end, begun) = (event.end(), *begun);
                            let error = self.upstream_error(error.to_string());
                            let last = if begun && self.heartbeat != Heartbeat::Whitespace {
                                // Ends the aborted event first, or parsers would join the two.
                                let WaitStatus { dialect, .. } = &*self.wait;
                                let error = error.for_client(self.detail());
                                [end, &*dialect.error_event(&error, self.wait.id())].concat().into()
                            } else {
                                self.error(&error)
                            };
                            self.state = EarlyResponseState::Ended(None);
                            return Poll::Ready(Some(Ok(Frame::data(last))));
                        }
                        Some(Ok(frame)) => {
                            if let Some(data) = frame.data_ref() {
                                *begun |= !data.is_empty() && !data.starts_with(b":");
                                event.pass(data);
                            }
                            return Poll::Ready(Some(Ok(frame)));
                        }
                        None => return Poll::Ready(None),
                    }
                }
                EarlyResponseState::Ended(_) => return Poll::Ready(None),
            }
        }
    }

    fn poll_heartbeat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        ready!(self.ticks.poll_tick(cx));
        self.last_heartbeat = Instant::now();
        Poll::Ready(Some(Ok(Frame::data(self.wait.heartbeat(self.heartbeat)))))
    }

    fn begin_response(&mut self, response: Response<Body>) {
        let (head, mut body) = response.into_parts();
        self.pending = self.timing(&head.headers);
        let (success, typed) = (head.status.is_success(), head.headers.contains_key(CONTENT_TYPE));
        let fits = match self.heartbeat {
            Heartbeat::Whitespace => openai::is_json(&head.headers) || (success && !typed),
            Heartbeat::Comment | Heartbeat::Chunk => success && openai::is_event_stream(&head.headers),
        };
        let frames = !success || (self.heartbeat != Heartbeat::Whitespace && is_text(&head.headers));
        let decoded = body.decode(&head.headers);
        let usable = decoded
            .and_then(|()| if fits || frames { Ok(()) } else { Err(self.form_mismatch(&head.headers)) });
        self.state = match usable {
            Err(error) => {
                let error = self.upstream_error(body.give_up(error).to_string());
                let last = [self.pending.take().unwrap_or_default(), self.error(&error)].concat();
                self.pending = Some(last.into());
                EarlyResponseState::Ended(None)
            }
            Ok(()) if fits => {
                let WaitStatus { gate, shape, model, .. } = &*self.wait;
                let while_streaming = gate.policy().keepalive.while_streaming;
                let beats =
                    ResponseHeartbeats::new(self.heartbeat, *shape, self.ticks.period(), while_streaming);
                body.inform(beats.continuing(model.clone(), self.last_heartbeat));
                EarlyResponseState::Relaying {
                    body: Box::new(body),
                    event: OpenEvent::default(),
                    begun: false,
                }
            }
            Ok(()) => {
                let whole = async { http_body_util::Limited::new(body, MAX_EVENT_BYTES).collect().await };
                let body = Box::pin(async {
                    let whole = whole.await.map(http_body_util::Collected::to_bytes);
                    whole.map_err(|error| error.to_string())
                });
                EarlyResponseState::Framing { status: head.status, body }
            }
        };
    }

    /// Returns the error for a response whose form differs from the early head.
    fn form_mismatch(&self, headers: &HeaderMap) -> BodyError {
        let form =
            headers.get(CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()).into_owned());
        let announced = match self.heartbeat {
            Heartbeat::Whitespace => "JSON",
            Heartbeat::Comment | Heartbeat::Chunk => "a stream of events",
        };
        BodyError::Form(form.unwrap_or_default(), announced)
    }

    /// Formats `server-timing` as a comment, since the head has been sent.
    fn timing(&self, headers: &HeaderMap) -> Option<Bytes> {
        let timings = headers.get_all(SERVER_TIMING).iter().filter_map(|timing| timing.to_str().ok());
        let timings = timings.collect::<Vec<_>>().join(", ");
        let comments = self.heartbeat == Heartbeat::Comment && !timings.is_empty();
        comments.then(|| openai::sse_comment(&format!("{SERVER_TIMING}: {timings}")))
    }

    fn upstream_error(&self, reason: String) -> ProxyError {
        ProxyError::UpstreamError { route: self.wait.gate.key().clone(), reason }
    }

    fn detail(&self) -> FailureDetail {
        self.wait.gate.policy().failure.detail
    }

    /// Formats an error that takes the place of the response.
    fn error(&self, error: &ProxyError) -> Bytes {
        let WaitStatus { dialect, .. } = &*self.wait;
        let error = &*error.for_client(self.detail());
        match self.heartbeat {
            Heartbeat::Whitespace => dialect.error_body(error, self.wait.id()),
            Heartbeat::Comment | Heartbeat::Chunk => self.event(dialect.error_event(error, self.wait.id())),
        }
    }

    /// Formats an event that takes the place of the response. An empty event separates it from comments, see
    /// [`ResponseHeartbeats::pass`].
    fn event(&self, event: Bytes) -> Bytes {
        let WaitStatus { shape, .. } = &*self.wait;
        let empty = match self.heartbeat {
            Heartbeat::Comment => {
                openai::empty_event_before(&event, *shape, self.wait.model(), self.wait.id())
            }
            Heartbeat::Chunk | Heartbeat::Whitespace => None,
        };
        empty.map_or(event.clone(), |empty| [empty, event].concat().into())
    }
}

impl EarlyBody for EarlyResponse {
    fn relays(&self) -> bool {
        !matches!(self.state, EarlyResponseState::Waiting(_))
    }
}

impl http_body::Body for EarlyResponse {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.get_mut().poll_frame(cx)
    }
}

/// Returns `true` if a response can be sent as the data of an event: JSON, text, or untyped.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE);
    openai::is_json(headers)
        || kind.is_none_or(|kind| {
            kind.as_bytes().get(..5).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/"))
        })
}
