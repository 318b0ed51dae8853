//! The story of one request, recorded while it runs.

use std::{
    mem::size_of,
    time::{Duration, SystemTime},
};

use http::Method;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    event::{Event, HoldReason, MAX_EVENT_TEXT_BYTES, bounded},
    query::Query,
    sequence::{Heartbeats, Sequence, TimedEvent},
};
use crate::domain::RouteKey;

/// Events of a request so far.
pub struct Story {
    number: u64,
    request_id: Box<str>,
    route: RouteKey,
    info: Option<RequestInfo>,
    arrived: Instant,
    arrived_at: SystemTime,
    state: Mutex<StoryState>,
}

/// Identity of a request at its arrival.
#[derive(Clone, Copy, Debug)]
pub struct ArrivedRequest<'a> {
    pub(super) route: &'a RouteKey,
    pub(super) request_id: &'a str,
    pub(super) arrived: Instant,
}

/// Head of a request. Never its query, headers or body: they may contain secrets.
#[derive(Clone, Debug)]
pub struct RequestInfo {
    method: Method,
    path: Box<str>,
    model: Option<Box<str>>,
    /// Trace id, 32 hexadecimal digits.
    pub trace_id: Option<Box<str>>,
}

#[derive(Default)]
struct StoryState {
    /// In order, with microseconds from the arrival.
    events: Vec<(u64, Event)>,
    left_out: u32,
    heartbeats_sent: u32,
    last_beat: u64,
    early_answer: Option<Instant>,
    /// Periods in which the request was held, from the first one on.
    waits: Vec<(Instant, Instant)>,
    waits_since: Option<Instant>,
    has_waited: bool,
    cold_start: Option<u64>,
    reason: Option<Box<str>>,
    ended: Option<(u64, Ending)>,
    /// Size of the story, set at its end.
    bytes: usize,
}

/// End of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Outcome, or the refusal of a request that was not admitted.
    pub outcome: &'static str,
    /// The request was admitted.
    pub admitted: bool,
    /// Status, if there was an answer.
    pub status: Option<u16>,
    /// Counts as a failure for [`Query::FAILED`].
    pub failed: bool,
}

/// Maximum lengths of texts kept, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;
const MAX_STORY_MODEL_BYTES: usize = 128;
const MAX_REASON_BYTES: usize = 512;

/// Maximum number of events kept: the first half, and the last ones. A request that waits for an unreachable address
/// is dispatched again and again.
const MAX_EVENTS: usize = 24;

/// Maximum number of hold periods kept.
const MAX_WAITS: usize = 16;

// === impl ArrivedRequest ===

impl<'a> ArrivedRequest<'a> {
    /// Creates the identity of a request to `route`.
    pub const fn new(route: &'a RouteKey, request_id: &'a str, arrived: Instant) -> Self {
        Self { route, request_id, arrived }
    }
}

// === impl RequestInfo ===

impl RequestInfo {
    /// Records a request's head, with bounded texts.
    pub fn new(method: &Method, path: &str, model: Option<&str>) -> Self {
        // Extension methods may be long.
        let is_short = method.as_str().len() <= 16;
        Self {
            method: if is_short { method.clone() } else { Method::default() },
            path: bounded(path, MAX_EVENT_TEXT_BYTES),
            model: model.map(|model| bounded(model, MAX_STORY_MODEL_BYTES)),
            trace_id: None,
        }
    }

    /// Returns the method; GET in place of a very long one.
    pub const fn method(&self) -> &Method {
        &self.method
    }

    /// Returns the path, possibly truncated.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the model, possibly truncated.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn bytes(&self) -> usize {
        let texts = [Some(&self.path), self.model.as_ref(), self.trace_id.as_ref()];
        texts.into_iter().flatten().map(|text| text.len()).sum()
    }
}

// === impl Story ===

impl Story {
    pub(super) fn new(number: u64, arrival: ArrivedRequest<'_>, info: Option<RequestInfo>) -> Self {
        Self {
            number,
            request_id: bounded(arrival.request_id, MAX_REQUEST_ID_BYTES),
            route: arrival.route.clone(),
            info,
            arrived: arrival.arrived,
            arrived_at: SystemTime::now() - arrival.arrived.elapsed(),
            // Most requests are held only once.
            state: Mutex::new(StoryState { events: Vec::with_capacity(1), ..StoryState::default() }),
        }
    }

    /// Records an event. A wait that follows a failed dispatch has that as its reason.
    pub fn record(&self, at: Instant, mut event: Event) {
        let mut state = self.state.lock();
        match &mut event {
            Event::Held { why, .. } => {
                if let Some((_, Event::DispatchFailed { .. })) = state.events.last() {
                    *why = HoldReason::DispatchFailed;
                }
                state.has_waited = true;
                state.waits_since = Some(at);
            }
            Event::Dequeued { cold_start } => {
                state.cold_start = cold_start.or(state.cold_start);
                let since = state.waits_since.take().filter(|_| state.waits.len() < MAX_WAITS);
                state.waits.extend(since.map(|since| (since, at)));
                return;
            }
            Event::EarlyAnswer => state.early_answer = Some(at),
            Event::Heartbeat => {
                state.heartbeats_sent += 1;
                state.last_beat = self.micros_since_arrival(at);
                return;
            }
            Event::HeadArrived { .. } | Event::AttemptEnded { .. } => return,
            _ => {}
        }
        state.push(self.micros_since_arrival(at), event);
    }

    /// Sets the reason of a failure. The first one is kept.
    pub fn set_reason(&self, reason: &str) {
        self.state.lock().reason.get_or_insert_with(|| bounded(reason, MAX_REASON_BYTES));
    }

    /// Returns the periods in which the request was held, in order.
    pub fn waits(&self) -> Vec<(Instant, Instant)> {
        self.state.lock().waits.clone()
    }

    /// Returns the time of the early answer.
    pub fn early_answer(&self) -> Option<Instant> {
        self.state.lock().early_answer
    }

    /// Returns the request id.
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// Truncates a request id to the length that stories keep.
    pub(super) fn truncate_request_id(text: &str) -> &str {
        &text[..text.floor_char_boundary(MAX_REQUEST_ID_BYTES)]
    }

    pub(super) const fn route(&self) -> &RouteKey {
        &self.route
    }

    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn has_waited(&self) -> bool {
        self.state.lock().has_waited
    }

    pub(super) fn bytes(&self) -> usize {
        self.state.lock().bytes
    }

    /// Returns the end, or the arrival of a running request.
    pub(super) fn latest(&self) -> Instant {
        let ended = self.state.lock().ended.map_or(0, |(at, _)| at);
        self.arrived + Duration::from_micros(ended)
    }

    pub(super) fn ended_at(&self) -> Option<SystemTime> {
        let (at, _) = self.state.lock().ended?;
        Some(self.arrived_at + Duration::from_micros(at))
    }

    pub(super) fn matches(&self, outcome: Option<&str>) -> bool {
        let ending = self.state.lock().ended.map(|(_, ending)| ending);
        match (outcome, ending) {
            (Some(Query::RUNNING), ending) => ending.is_none(),
            (None, ending) => ending.is_some(),
            (Some(_), None) => false,
            (Some(Query::FAILED), Some(ending)) => ending.failed,
            (Some(outcome), Some(ending)) => ending.outcome == outcome,
        }
    }

    /// Ends the story, and returns its size in bytes.
    pub(super) fn end(&self, ending: Ending) -> usize {
        let mut state = self.state.lock();
        state.ended = Some((self.micros_since_arrival(Instant::now()), ending));
        state.events.shrink_to_fit();
        state.waits = Vec::new();
        let texts: usize = state.events.iter().map(|(_, event)| event.bytes()).sum();
        state.bytes = size_of::<Self>()
            + 2 * size_of::<usize>()
            + self.request_id.len()
            + self.info.as_ref().map_or(0, RequestInfo::bytes)
            + state.reason.as_ref().map_or(0, |reason| reason.len())
            + state.events.capacity() * size_of::<(u64, Event)>()
            + texts;
        state.bytes
    }

    /// Returns the story for the API.
    pub(super) fn sequence(&self) -> Sequence {
        let state = self.state.lock();
        let ms = |micros: u64| micros as f64 / 1e3;
        let moment = |at: u64, event: &Event| TimedEvent { at_ms: ms(at), event: event.clone() };
        let now = self.micros_since_arrival(Instant::now());
        let mut events = vec![moment(0, &Event::Arrived)];
        events.extend(state.events.iter().map(|(at, event)| moment(*at, event)));
        if let Some((at, Ending { outcome, status, .. })) = state.ended {
            events.push(moment(at, &Event::Ended { outcome, status }));
        }
        let ending = state.ended.map(|(_, ending)| ending);
        Sequence {
            request_id: self.request_id.to_string(),
            route: self.route.clone(),
            method: self.info.as_ref().map(|info| info.method.to_string()),
            path: self.info.as_ref().map(|info| info.path.to_string()),
            model: self.info.as_ref().and_then(|info| info.model.as_deref().map(Into::into)),
            trace_id: self.info.as_ref().and_then(|info| info.trace_id.as_deref().map(Into::into)),
            cold_start: state.cold_start,
            arrived_at: humantime::format_rfc3339_millis(self.arrived_at).to_string(),
            admitted: ending.is_none_or(|ending| ending.admitted),
            outcome: ending.map(|ending| ending.outcome),
            status: ending.and_then(|ending| ending.status),
            reason: state.explain_outcome(),
            total_ms: ms(state.ended.map_or(now, |(at, _)| at)),
            heartbeats: (state.heartbeats_sent > 0)
                .then(|| Heartbeats { count: state.heartbeats_sent, last_ms: ms(state.last_beat) }),
            events,
            left_out: state.left_out,
        }
    }

    fn micros_since_arrival(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.arrived).as_micros()).unwrap_or(u64::MAX)
    }
}

// === impl StoryState ===

impl StoryState {
    fn push(&mut self, at: u64, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.remove(MAX_EVENTS / 2);
            self.left_out += 1;
        }
        self.events.push((at, event));
    }

    /// Returns the reason; derived from the events if none was set.
    fn explain_outcome(&self) -> Option<String> {
        if let Some(reason) = &self.reason {
            return Some(reason.to_string());
        }
        let (_, Ending { outcome, status, failed, .. }) = self.ended?;
        let when = match self.events.last() {
            Some((_, Event::Held { .. } | Event::EarlyAnswer)) => "while the request was held",
            Some((_, Event::FirstByte { .. } | Event::FirstToken)) => "during the answer",
            Some(_) => "before the answer began",
            None if status.is_some() => "during the answer",
            None => "before the answer began",
        };
        match outcome {
            "client_gone" => Some(format!("The client disconnected {when}.")),
            "client_stalled" => Some("The client stopped reading its answer (`limits.stallTimeout`).".into()),
            "draining" => Some(format!("This replica stopped {when}.")),
            "internal" => Some("A defect of Anteroom; see its log for the panic.".into()),
            "completed" if failed => status.map(|status| format!("The model server answered {status}.")),
            _ => None,
        }
    }
}
