//! Heartbeats: their form, the client's preference, and their place in a response that has begun.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use tokio::time::Instant;

use super::decoder::encoding;
use crate::{
    admission::Gate,
    domain::KeepaliveMode,
    error::ProxyError,
    openai::{self, ApiFormat, ClientTimeouts, OpenEvent},
};

/// Request header that selects the heartbeats. Not forwarded.
const KEEPALIVE_HEADER: HeaderName = HeaderName::from_static("x-anteroom-keepalive");

/// Shortest interval that a client's timeout can cause.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Form of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// SSE comments, which parsers skip.
    Comment,
    /// SSE events without content.
    Chunk,
    /// Whitespace before a JSON body.
    Whitespace,
}

/// Heartbeats in a response that has begun: until its first byte and, with `keepalive.whileStreaming`, in pauses between
/// events.
pub struct ResponseHeartbeats {
    heartbeat: Heartbeat,
    shape: ApiFormat,
    model: Option<Box<str>>,
    interval: Duration,
    /// Position in the event stream. `None` unless heartbeats go on after the first byte, as tracking reads every byte.
    event: Option<OpenEvent>,
    begun: bool,
    /// Comments have been sent since the last event.
    after_comments: bool,
    /// Arrival of the last part of the response, or of its head.
    last_part: Option<Instant>,
    /// Time of the last heartbeat; `None` if a part has arrived since.
    last_heartbeat: Option<Instant>,
}

/// A client's choice of heartbeats.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeartbeatPreference {
    /// Form of the response, from the request path.
    pub shape: ApiFormat,
    /// Overrides the mode of the route.
    choice: Option<KeepaliveMode>,
}

/// Shortens a heartbeat period to the silence that the client tolerates, but not below [`MIN_INTERVAL`].
pub fn heartbeat_period(period: Duration, patience: ClientTimeouts) -> Duration {
    patience.safe_silence().map_or(period, |safe| period.min(safe.max(MIN_INTERVAL)))
}

// === impl HeartbeatPreference ===

impl HeartbeatPreference {
    /// Removes the client's choice from a request.
    ///
    /// # Errors
    /// The value is not a known mode.
    pub fn take(headers: &mut HeaderMap, shape: Option<ApiFormat>) -> Result<Self, ProxyError> {
        let shape = shape.unwrap_or_default();
        let Some(value) = headers.remove(&KEEPALIVE_HEADER) else { return Ok(Self { shape, choice: None }) };
        let choice = match value.as_bytes() {
            b"off" => KeepaliveMode::Off,
            b"comment" => KeepaliveMode::Comment,
            b"chunk" => KeepaliveMode::Chunk,
            other => {
                let other = String::from_utf8_lossy(other);
                let reason =
                    format!("{KEEPALIVE_HEADER}: \"{other}\" is not one of `off`, `comment` and `chunk`.");
                return Err(ProxyError::InvalidRequest(reason));
            }
        };
        Ok(Self { shape, choice: Some(choice) })
    }

    /// Returns the heartbeat to send until the response begins.
    pub fn before_response(self, mode: KeepaliveMode, stream: bool) -> Option<Heartbeat> {
        Heartbeat::before_response(self.choice.unwrap_or(mode), stream, self.shape)
    }

    /// Returns the heartbeats for a response with this head, or `None` if it cannot carry any.
    pub fn within_response(
        self,
        gate: &Gate,
        request: &HeaderMap,
        answer: &HeaderMap,
    ) -> Option<Box<ResponseHeartbeats>> {
        let keepalive = gate.policy().keepalive;
        let heartbeat =
            Heartbeat::within_response(self.choice.unwrap_or(keepalive.mode), self.shape, answer)?;
        // Invalid headers were rejected before admission.
        let interval =
            heartbeat_period(keepalive.interval.get(), ClientTimeouts::of(request).unwrap_or_default());
        Some(Box::new(ResponseHeartbeats::new(heartbeat, self.shape, interval, keepalive.while_streaming)))
    }
}

// === impl Heartbeat ===

impl Heartbeat {
    /// Returns the heartbeat to send before the response, whose form is known only from the request path.
    const fn before_response(mode: KeepaliveMode, stream: bool, shape: ApiFormat) -> Option<Self> {
        match mode {
            KeepaliveMode::Off => None,
            mode if stream && shape.streams_events() => Some(Self::of_events(mode, shape)),
            KeepaliveMode::Whitespace if shape.is_json() => Some(Self::Whitespace),
            _ => None,
        }
    }

    /// Returns the heartbeat that fits a response with this head.
    fn within_response(mode: KeepaliveMode, shape: ApiFormat, answer: &HeaderMap) -> Option<Self> {
        if mode == KeepaliveMode::Off || encoding(answer).is_some() {
            None
        } else if openai::is_event_stream(answer) {
            Some(Self::of_events(mode, shape))
        } else {
            (mode == KeepaliveMode::Whitespace && openai::is_json(answer)).then_some(Self::Whitespace)
        }
    }

    const fn of_events(mode: KeepaliveMode, shape: ApiFormat) -> Self {
        match mode {
            KeepaliveMode::Chunk if openai::has_empty_event(shape) => Self::Chunk,
            _ => Self::Comment,
        }
    }
}

// === impl ResponseHeartbeats ===

impl ResponseHeartbeats {
    /// Creates the heartbeats of a response.
    pub fn new(heartbeat: Heartbeat, shape: ApiFormat, interval: Duration, while_streaming: bool) -> Self {
        let event = (while_streaming && heartbeat != Heartbeat::Whitespace).then(OpenEvent::default);
        Self {
            heartbeat,
            shape,
            model: None,
            interval,
            event,
            begun: false,
            after_comments: false,
            last_part: None,
            last_heartbeat: None,
        }
    }

    /// Continues the heartbeats of an early response, the last of which was sent at `last`.
    pub fn continuing(mut self, model: Option<Box<str>>, last: Instant) -> Self {
        (self.model, self.last_heartbeat) = (model, Some(last));
        self.after_comments = self.heartbeat == Heartbeat::Comment;
        self
    }

    /// Sets the model that chunks name.
    pub fn name_model(&mut self, model: Option<Box<str>>) {
        self.model = model;
    }

    /// Records the arrival of a part.
    pub fn record_part(&mut self) {
        (self.last_part, self.last_heartbeat) = (Some(Instant::now()), None);
    }

    /// Returns the time of the next heartbeat, and the time at which the endpoint has paused for `limit`.
    pub fn due(&mut self, limit: Duration) -> (Instant, Instant) {
        let part = *self.last_part.get_or_insert_with(Instant::now);
        (self.last_heartbeat.unwrap_or(part) + self.interval, part + limit)
    }

    /// Returns the next heartbeat, or `None` inside an event. `waited`: time since the request arrived.
    pub fn beat(&mut self, id: &str, waited: Duration) -> Option<Bytes> {
        self.last_heartbeat = Some(Instant::now());
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

    /// Passes a part of the response on. After comments, an empty event goes first: parsers without support for comments
    /// (`vllm bench serve`) skip the event that follows one.
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

    /// Returns `true` if there will be no more heartbeats.
    pub const fn is_finished(&self) -> bool {
        self.begun && self.event.is_none()
    }
}
