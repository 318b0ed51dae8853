//! Heartbeats: what a client is sent while there is nothing else to send, and where in an answer there may be any.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use tokio::time::Instant;

use super::decoder::encoding;
use crate::{
    admission::Gate,
    domain::KeepaliveMode,
    error::ProxyError,
    openai::{self, OpenEvent, Patience, Shape},
};

/// The request header by which a client chooses its heartbeats. It ends here.
const KEEPALIVE: HeaderName = HeaderName::from_static("x-anteroom-keepalive");

/// The shortest interval of heartbeats that a client's SDK can bring about.
const SHORTEST: Duration = Duration::from_millis(100);

/// What a waiting client is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// Lines that SSE parsers skip.
    Comment,
    /// Events with no content.
    Chunk,
    /// White space before JSON.
    Whitespace,
}

/// Heartbeats in an answer that has begun: until its first byte and, where the route asks for that, in the pauses
/// between the events of a stream.
pub struct ResponseHeartbeats {
    heartbeat: Heartbeat,
    shape: Shape,
    model: Option<Box<str>>,
    interval: Duration,
    /// Where the stream stands. Followed only if there are heartbeats after the first byte, since it takes a look at
    /// each byte.
    event: Option<OpenEvent>,
    begun: bool,
    /// Comments have gone out since the last event.
    after_comments: bool,
    /// When the last part of the answer came, or its head.
    part: Option<Instant>,
    /// When the last heartbeat was, if no part has come since.
    beat: Option<Instant>,
}

/// What a request says of its heartbeats.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeartbeatPreference {
    /// The form of its answer, as its path has it.
    pub shape: Shape,
    /// Its client's choice, which goes before the route's.
    choice: Option<KeepaliveMode>,
}

/// A period of heartbeats, or what the client's SDK bears of silence if that is less; but a client cannot have us send as
/// fast as it likes.
pub fn sooner(period: Duration, patience: Patience) -> Duration {
    patience.safe_silence().map_or(period, |safe| period.min(safe.max(SHORTEST)))
}

// === impl HeartbeatPreference ===

impl HeartbeatPreference {
    /// Takes what a client says of its heartbeats out of its request. The path tells the shape of the answer.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn take(headers: &mut HeaderMap, shape: Option<Shape>) -> Result<Self, ProxyError> {
        let shape = shape.unwrap_or_default();
        // The usual case takes one look.
        let Some(value) = headers.remove(&KEEPALIVE) else { return Ok(Self { shape, choice: None }) };
        let choice = match value.as_bytes() {
            b"off" => KeepaliveMode::Off,
            b"comment" => KeepaliveMode::Comment,
            b"chunk" => KeepaliveMode::Chunk,
            other => {
                let other = String::from_utf8_lossy(other);
                let reason = format!("{KEEPALIVE}: \"{other}\" is none of `off`, `comment` and `chunk`.");
                return Err(ProxyError::InvalidRequest(reason));
            }
        };
        Ok(Self { shape, choice: Some(choice) })
    }

    /// What is sent before there is an answer.
    pub fn before_answer(self, mode: KeepaliveMode, stream: bool) -> Option<Heartbeat> {
        Heartbeat::before_answer(self.choice.unwrap_or(mode), stream, self.shape)
    }

    /// Heartbeats of an answer that goes out under this head, to a request with these headers; `None` where there may
    /// be none.
    pub fn beats(
        self,
        gate: &Gate,
        request: &HeaderMap,
        answer: &HeaderMap,
    ) -> Option<Box<ResponseHeartbeats>> {
        let keepalive = gate.policy().keepalive;
        let heartbeat =
            Heartbeat::within_response(self.choice.unwrap_or(keepalive.mode), self.shape, answer)?;
        // What cannot be read was refused before.
        let interval = sooner(keepalive.interval.get(), Patience::of(request).unwrap_or_default());
        Some(Box::new(ResponseHeartbeats::new(heartbeat, self.shape, interval, keepalive.while_streaming)))
    }
}

// === impl Heartbeat ===

impl Heartbeat {
    /// What a request gets while the form of its answer is known by its path alone; `None`: nothing.
    const fn before_answer(mode: KeepaliveMode, stream: bool, shape: Shape) -> Option<Self> {
        match mode {
            KeepaliveMode::Off => None,
            mode if stream && shape.streams_events() => Some(Self::of_events(mode, shape)),
            KeepaliveMode::Whitespace if shape.is_json() => Some(Self::Whitespace),
            _ => None,
        }
    }

    /// What may be put into an answer with this head; `None`: nothing.
    fn within_response(mode: KeepaliveMode, shape: Shape, answer: &HeaderMap) -> Option<Self> {
        if mode == KeepaliveMode::Off || encoding(answer).is_some() {
            None
        } else if openai::is_event_stream(answer) {
            Some(Self::of_events(mode, shape))
        } else {
            (mode == KeepaliveMode::Whitespace && openai::is_json(answer)).then_some(Self::Whitespace)
        }
    }

    const fn of_events(mode: KeepaliveMode, shape: Shape) -> Self {
        match mode {
            KeepaliveMode::Chunk if openai::has_empty_event(shape) => Self::Chunk,
            _ => Self::Comment,
        }
    }
}

// === impl ResponseHeartbeats ===

impl ResponseHeartbeats {
    /// Heartbeats in an answer of this shape.
    pub fn new(heartbeat: Heartbeat, shape: Shape, interval: Duration, while_streaming: bool) -> Self {
        let event = (while_streaming && heartbeat != Heartbeat::Whitespace).then(OpenEvent::default);
        Self {
            heartbeat,
            shape,
            model: None,
            interval,
            event,
            begun: false,
            after_comments: false,
            part: None,
            beat: None,
        }
    }

    /// The same, after others that have gone out with an early head, the last of them at `beat`.
    pub fn going_on(mut self, model: Option<Box<str>>, beat: Instant) -> Self {
        (self.model, self.beat) = (model, Some(beat));
        self.after_comments = self.heartbeat == Heartbeat::Comment;
        self
    }

    /// Names the model that the request is for, which chunks have.
    pub fn name_model(&mut self, model: Option<Box<str>>) {
        self.model = model;
    }

    /// A part has come.
    pub fn came(&mut self) {
        (self.part, self.beat) = (Some(Instant::now()), None);
    }

    /// When the client is to be sent something, and when the endpoint has paused for as long as `limit`.
    pub fn due(&mut self, limit: Duration) -> (Instant, Instant) {
        let part = *self.part.get_or_insert_with(Instant::now);
        (self.beat.unwrap_or(part) + self.interval, part + limit)
    }

    /// A heartbeat of a request with this id that came so long ago; `None` within an event.
    pub fn beat(&mut self, id: &str, waited: Duration) -> Option<Bytes> {
        self.beat = Some(Instant::now());
        if self.event.is_some_and(|event| !event.is_between()) {
            return None;
        }
        let empty = match self.heartbeat {
            Heartbeat::Whitespace => return Some(Bytes::from_static(b"\n")),
            Heartbeat::Chunk => {
                openai::empty_event(self.shape, self.model.as_deref().unwrap_or_default(), id)
            }
            Heartbeat::Comment => None,
        };
        Some(empty.unwrap_or_else(|| {
            self.after_comments = true;
            let phase = if self.begun { "next_event" } else { "first_byte" };
            openai::sse_comment(&format!("waiting phase={phase} waited={}s", waited.as_secs()))
        }))
    }

    /// A part of the answer, with what has to go before it: parsers that know no comments take one together with the
    /// event after it for one thing to skip (`vllm bench serve`), and that is then an event with no content.
    pub fn pass(&mut self, part: Bytes, id: &str) -> Bytes {
        if part.is_empty() {
            return part;
        }
        self.begun = true;
        if let Some(event) = &mut self.event {
            event.pass(&part);
        }
        if part.ends_with(openai::DONE) {
            self.event = None;
        }
        if !std::mem::take(&mut self.after_comments) {
            return part;
        }
        let model = self.model.as_deref().unwrap_or_default();
        match openai::empty_event_before(&part, self.shape, model, id) {
            Some(empty) => [empty, part].concat().into(),
            None => part,
        }
    }

    /// Whether there will be no more of them.
    pub const fn are_over(&self) -> bool {
        self.begun && self.event.is_none()
    }
}
