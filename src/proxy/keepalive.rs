//! Keeping a waiting client informed: a 200 that goes out early, and what is in its body until the answer comes.
//!
//! The early 200 commits. Whatever fails after it is said inside the body: as an event in a stream, as the body itself
//! where there is none.

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
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use parking_lot::Mutex;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::{
    body::{Body, BodyError},
    exchange::Exchange,
    forward::SERVER_TIMING,
    heartbeat::{Heartbeat, ResponseHeartbeats},
    request_trace::EarlyAnswerTime,
};
use crate::{
    admission::{Gate, Permit},
    domain::FailureDetail,
    error::ProxyError,
    history::{Event, Story},
    hold::Spot,
    openai::{self, Dialect, OpenEvent, Shape},
};

/// What goes on while the client waits: holding, dispatching, and the head of the answer.
pub type PendingResponse =
    Pin<Box<dyn Future<Output = Result<Response<Body>, (Exchange, ProxyError)>> + Send>>;

/// What heartbeats tell of a request, and where it stands in the queue while it does.
pub struct WaitStatus {
    gate: Arc<Gate>,
    since: Instant,
    shape: Shape,
    pub(super) model: Option<Box<str>>,
    id: HeaderValue,
    dialect: Dialect,
    story: Arc<Story>,
    early: Option<EarlyAnswerTime>,
    spot: Mutex<Option<Spot<Permit>>>,
}

/// The body of an early answer.
pub struct EarlyResponse {
    state: State,
    heartbeat: Heartbeat,
    wait: Arc<WaitStatus>,
    ticks: Interval,
    /// When the last heartbeat was.
    beat: Instant,
    /// What is still to be said before the answer.
    said: Option<Bytes>,
}

enum State {
    Waiting(PendingResponse),
    /// The answer came, and fits what was begun.
    Relaying {
        /// On the heap: what still waits should not carry its room.
        body: Box<Body>,
        event: OpenEvent,
        begun: bool,
    },
    /// The answer came and is an error, or no stream: it is framed as the one thing that remains to say.
    Framing {
        status: StatusCode,
        body: Pin<Box<Framing>>,
    },
    /// Dropped with the body, by which the request is counted.
    Said(#[expect(dead_code, reason = "counts when dropped")] Option<Exchange>),
}

type Framing = dyn Future<Output = Result<Bytes, String>> + Send;

/// How much of an answer is read to be framed.
const MAX_FRAMED: usize = 1 << 20;

// === impl WaitStatus ===

impl WaitStatus {
    /// What can be told of a request.
    pub fn new(exchange: &Exchange, shape: Shape, model: Option<Box<str>>, story: Arc<Story>) -> Arc<Self> {
        Arc::new(Self {
            gate: exchange.gate().clone(),
            since: exchange.started(),
            shape,
            model,
            id: exchange.request_id.clone(),
            dialect: exchange.dialect,
            story,
            early: exchange.early(),
            spot: Mutex::default(),
        })
    }

    fn id(&self) -> &str {
        self.id.to_str().unwrap_or("anteroom")
    }

    /// It waits there now, or nowhere.
    pub fn at(&self, spot: Option<Spot<Permit>>) {
        *self.spot.lock() = spot;
    }

    /// How the wait goes, in `key=value` words.
    fn describe(&self) -> String {
        let cold_starts = self.gate.cold_starts();
        // Once the target may be sent to, who is in the queue waits for a turn.
        let phase = cold_starts.phase().map(|(phase, _)| phase).filter(|phase| phase.is_activation());
        let position = self.spot.lock().as_ref().map(Spot::ahead);
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

    fn beat(&self, heartbeat: Heartbeat) -> Bytes {
        self.story.heartbeat();
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

/// Words that end neither the line nor the quotation that they stand in, and not endless.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 500;
    let plain = |character: char| match character {
        '"' => '\'',
        _ if character.is_control() => ' ',
        _ => character,
    };
    text.chars().take(LONGEST).map(plain).collect()
}

const fn content_type(heartbeat: Heartbeat) -> HeaderValue {
    match heartbeat {
        Heartbeat::Comment | Heartbeat::Chunk => HeaderValue::from_static("text/event-stream; charset=utf-8"),
        Heartbeat::Whitespace => HeaderValue::from_static("application/json"),
    }
}

// === impl EarlyResponse ===

impl EarlyResponse {
    /// The early answer to a request that goes on waiting. Its first heartbeat goes out at once.
    pub fn answer(
        waiting: PendingResponse,
        heartbeat: Heartbeat,
        interval: Duration,
        wait: Arc<WaitStatus>,
    ) -> Response<Body> {
        wait.story.record(Event::EarlyAnswer);
        if let Some(early) = &wait.early {
            let _ = early.set(Instant::now());
        }
        let mut ticks = interval_at(Instant::now(), interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let kept = Self {
            state: State::Waiting(waiting),
            heartbeat,
            wait: wait.clone(),
            ticks,
            beat: Instant::now(),
            said: None,
        };
        let mut response = Response::new(Body::Early(UnsyncBoxBody::new(kept)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, content_type(heartbeat));
        headers.insert("cache-control", HeaderValue::from_static("no-cache"));
        // nginx in front of us would keep the heartbeats to itself.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        super::forward::response(headers, wait.id.clone());
        if wait.gate.cold_starts().phase().is_some() {
            super::answers::set_cold_start_headers(headers);
        }
        response
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if let Some(said) = self.said.take() {
                return Poll::Ready(Some(Ok(Frame::data(said))));
            }
            match &mut self.state {
                State::Waiting(waiting) => match waiting.as_mut().poll(cx) {
                    Poll::Ready(Ok(response)) => self.answered(response),
                    Poll::Ready(Err((mut exchange, error))) => {
                        exchange.fail(&error);
                        let said = self.error(&error);
                        self.state = State::Said(Some(exchange));
                        return Poll::Ready(Some(Ok(Frame::data(said))));
                    }
                    Poll::Pending => return self.poll_beat(cx),
                },
                State::Framing { status, body } => match body.as_mut().poll(cx) {
                    Poll::Pending => return self.poll_beat(cx),
                    Poll::Ready(Ok(bytes)) => {
                        let said = match (self.heartbeat, *status) {
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
                        self.state = State::Said(None);
                        return Poll::Ready(Some(Ok(Frame::data(said))));
                    }
                    Poll::Ready(Err(reason)) => {
                        let said = self.error(&self.upstream_error(reason));
                        self.state = State::Said(None);
                        return Poll::Ready(Some(Ok(Frame::data(said))));
                    }
                },
                State::Relaying { body, event, begun } => match ready!(Pin::new(body).poll_frame(cx)) {
                    // Its account says so already.
                    Some(Err(error)) => {
                        let (end, begun) = (event.end(), *begun);
                        let error = self.upstream_error(error.to_string());
                        let said = if begun && self.heartbeat != Heartbeat::Whitespace {
                            // Out of the event that broke off, or the two would be read as one.
                            let WaitStatus { dialect, .. } = &*self.wait;
                            let error = error.for_client(self.detail());
                            [end, &*dialect.error_event(&error, self.wait.id())].concat().into()
                        } else {
                            self.error(&error)
                        };
                        self.state = State::Said(None);
                        return Poll::Ready(Some(Ok(Frame::data(said))));
                    }
                    Some(Ok(frame)) => {
                        if let Some(data) = frame.data_ref() {
                            *begun |= !data.is_empty() && !data.starts_with(b":");
                            event.pass(data);
                        }
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    None => return Poll::Ready(None),
                },
                State::Said(_) => return Poll::Ready(None),
            }
        }
    }

    fn poll_beat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        ready!(self.ticks.poll_tick(cx));
        self.beat = Instant::now();
        Poll::Ready(Some(Ok(Frame::data(self.wait.beat(self.heartbeat)))))
    }

    fn answered(&mut self, response: Response<Body>) {
        let (head, mut body) = response.into_parts();
        self.said = self.timing(&head.headers);
        let (success, typed) = (head.status.is_success(), head.headers.contains_key(CONTENT_TYPE));
        let fits = match self.heartbeat {
            Heartbeat::Whitespace => openai::is_json(&head.headers) || (success && !typed),
            Heartbeat::Comment | Heartbeat::Chunk => success && openai::is_event_stream(&head.headers),
        };
        let frames = !success || (self.heartbeat != Heartbeat::Whitespace && is_text(&head.headers));
        let decoded = body.decode(&head.headers);
        let usable =
            decoded.and_then(|()| if fits || frames { Ok(()) } else { Err(self.other_form(&head.headers)) });
        self.state = match usable {
            Err(error) => {
                let error = self.upstream_error(body.give_up(error).to_string());
                let said = [self.said.take().unwrap_or_default(), self.error(&error)].concat();
                self.said = Some(said.into());
                State::Said(None)
            }
            Ok(()) if fits => {
                let WaitStatus { gate, shape, model, .. } = &*self.wait;
                let while_streaming = gate.policy().keepalive.while_streaming;
                let beats =
                    ResponseHeartbeats::new(self.heartbeat, *shape, self.ticks.period(), while_streaming);
                body.inform(beats.going_on(model.clone(), self.beat));
                State::Relaying { body: Box::new(body), event: OpenEvent::default(), begun: false }
            }
            Ok(()) => {
                let whole = async { http_body_util::Limited::new(body, MAX_FRAMED).collect().await };
                let body = Box::pin(async {
                    let whole = whole.await.map(http_body_util::Collected::to_bytes);
                    whole.map_err(|error| error.to_string())
                });
                State::Framing { status: head.status, body }
            }
        };
    }

    /// What is wrong with an answer that is not what the early head has told.
    fn other_form(&self, headers: &HeaderMap) -> BodyError {
        let form =
            headers.get(CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()).into_owned());
        let told = match self.heartbeat {
            Heartbeat::Whitespace => "JSON",
            Heartbeat::Comment | Heartbeat::Chunk => "a stream of events",
        };
        BodyError::Form(form.unwrap_or_default(), told)
    }

    /// What the header would have said, had it not gone out: as a comment, where there are any.
    fn timing(&self, headers: &HeaderMap) -> Option<Bytes> {
        let timings = headers.get_all(SERVER_TIMING).iter().filter_map(|timing| timing.to_str().ok());
        let timings = timings.collect::<Vec<_>>().join(", ");
        let comments = self.heartbeat == Heartbeat::Comment && !timings.is_empty();
        comments.then(|| openai::sse_comment(&format!("{SERVER_TIMING}: {timings}")))
    }

    fn upstream_error(&self, reason: String) -> ProxyError {
        ProxyError::UpstreamError { route: self.wait.gate.key().clone(), reason }
    }

    /// How much the client reads of a failure.
    fn detail(&self) -> FailureDetail {
        self.wait.gate.policy().failure.detail
    }

    /// An error in the place of the answer, in the shape of the API that the request speaks.
    fn error(&self, error: &ProxyError) -> Bytes {
        let WaitStatus { dialect, .. } = &*self.wait;
        let error = &*error.for_client(self.detail());
        match self.heartbeat {
            Heartbeat::Whitespace => dialect.error_body(error, self.wait.id()),
            Heartbeat::Comment | Heartbeat::Chunk => self.event(dialect.error_event(error, self.wait.id())),
        }
    }

    /// An event of ours in the place of an answer, with what has to be between it and comments: see [`ResponseHeartbeats::pass`].
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

/// Whether an answer may become the data of an event: JSON or other text, or so it seems.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE);
    openai::is_json(headers)
        || kind.is_none_or(|kind| {
            kind.as_bytes().get(..5).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/"))
        })
}
