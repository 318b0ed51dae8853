//! The story of one request, while it is being lived.

use std::{
    mem::size_of,
    time::{Duration, SystemTime},
};

use http::Method;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;

use super::{Heartbeats, Moment, Query, Sequence};
use crate::domain::RouteKey;

/// What happened to a request so far.
pub struct Story {
    number: u64,
    request_id: Box<str>,
    route: RouteKey,
    asked: Option<Asked>,
    arrived: Instant,
    arrived_at: SystemTime,
    told: Mutex<Told>,
}

/// Which request it is.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub(super) route: &'a RouteKey,
    pub(super) request_id: &'a str,
    pub(super) arrived: Instant,
}

/// What a request asked for. Never its query string, its headers or its body: they may hold secrets.
#[derive(Clone, Debug)]
pub struct Asked {
    method: Method,
    path: Box<str>,
    model: Option<Box<str>>,
    /// The trace that it is a part of, 32 hexadecimal digits.
    pub trace_id: Option<Box<str>>,
}

#[derive(Default)]
struct Told {
    /// In order, with the microseconds since the arrival.
    events: Vec<(u64, Event)>,
    left_out: u32,
    beats: u32,
    last_beat: u64,
    /// When it was held, from the first time on.
    waits: Vec<(Instant, Instant)>,
    waits_since: Option<Instant>,
    has_waited: bool,
    cold_start: Option<u64>,
    reason: Option<Box<str>>,
    ended: Option<(u64, Ending)>,
    /// Once it has ended.
    bytes: usize,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It came.
    Arrived,
    /// It waits.
    Held {
        /// Its place in the queue when it began to wait, from 1.
        position: usize,
        /// What for.
        why: Why,
    },
    /// Its 200 went out, and it hears how the wait goes.
    EarlyAnswer,
    /// Its turn came, and it goes to this endpoint.
    Dispatched {
        /// `host:port`.
        endpoint: Box<str>,
    },
    /// The endpoint did not answer, and it may be tried again.
    DispatchFailed {
        /// `host:port`.
        endpoint: Box<str>,
        /// Why.
        reason: Box<str>,
    },
    /// It waited in vain, and goes to the fallback.
    FellBack,
    /// Its answer began.
    FirstByte {
        /// The endpoint's.
        status: u16,
    },
    /// The first token of its answer came by: known of the answer that ended a cold start.
    FirstToken,
    /// It is over.
    Ended {
        /// How.
        outcome: &'static str,
        /// What the client got or, had its 200 not gone out early, would have got; absent without an answer.
        #[serde(skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
    },
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Nothing is ready.
    NothingReady,
    /// What is ready has as many as it may.
    Saturated,
    /// It has been tried: see what failed before.
    DispatchFailed,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The outcome or, of a request that was not admitted, the refusal.
    pub outcome: &'static str,
    /// Whether it had been admitted.
    pub admitted: bool,
    /// The status, if there was an answer.
    pub status: Option<u16>,
    /// Something went wrong, and not only for the client.
    pub failed: bool,
}

/// How long texts may be.
const LONGEST_ID: usize = 128;
const LONGEST_PATH: usize = 256;
const LONGEST_MODEL: usize = 128;
const LONGEST_REASON: usize = 512;

/// How many events are kept: the first half, and the last ones. A request that waits for long before an address that
/// takes no connection comes back again and again.
const MOST_EVENTS: usize = 24;

/// How many times of being held are told apart.
const MOST_WAITS: usize = 16;

// === impl Arrival ===

impl<'a> Arrival<'a> {
    /// A request to `route` that came at `arrived`.
    pub const fn new(route: &'a RouteKey, request_id: &'a str, arrived: Instant) -> Self {
        Self { route, request_id, arrived }
    }
}

// === impl Asked ===

impl Asked {
    /// What this request asks for.
    pub fn new(method: &Method, path: &str, model: Option<&str>) -> Self {
        // Methods of one's own may be long.
        let is_short = method.as_str().len() <= 16;
        Self {
            method: if is_short { method.clone() } else { Method::default() },
            path: bounded(path, LONGEST_PATH),
            model: model.map(|model| bounded(model, LONGEST_MODEL)),
            trace_id: None,
        }
    }

    fn bytes(&self) -> usize {
        let texts = [Some(&self.path), self.model.as_ref(), self.trace_id.as_ref()];
        texts.into_iter().flatten().map(|text| text.len()).sum()
    }
}

// === impl Story ===

impl Story {
    pub(super) fn new(number: u64, arrival: Arrival<'_>, asked: Option<Asked>) -> Self {
        Self {
            number,
            request_id: bounded(arrival.request_id, LONGEST_ID),
            route: arrival.route.clone(),
            asked,
            arrived: arrival.arrived,
            arrived_at: SystemTime::now() - arrival.arrived.elapsed(),
            // Most are held once, and for long.
            told: Mutex::new(Told { events: Vec::with_capacity(1), ..Told::default() }),
        }
    }

    /// It waits from `since` on, behind so many others, and where it has not just come back: for this.
    pub fn held(&self, since: Instant, ahead: usize, why: Why) {
        let mut told = self.told.lock();
        let comes_back = matches!(told.events.last(), Some((_, Event::DispatchFailed { .. })));
        let why = if comes_back { Why::DispatchFailed } else { why };
        told.has_waited = true;
        told.waits_since = Some(since);
        told.happened(self.micros(since), Event::Held { position: ahead + 1, why });
    }

    /// It waits no more, as of `until`.
    pub fn left_the_queue(&self, until: Instant, cold_start: Option<u64>) {
        let mut told = self.told.lock();
        told.cold_start = cold_start.or(told.cold_start);
        if let Some(since) = told.waits_since.take()
            && told.waits.len() < MOST_WAITS
        {
            told.waits.push((since, until));
        }
    }

    /// It goes to this endpoint.
    pub fn dispatched(&self, endpoint: &str) {
        self.happens(Event::Dispatched { endpoint: bounded(endpoint, LONGEST_PATH) });
    }

    /// This endpoint failed it, and it may be tried again.
    pub fn dispatch_failed(&self, endpoint: &str, reason: &str) {
        let endpoint = bounded(endpoint, LONGEST_PATH);
        self.happens(Event::DispatchFailed { endpoint, reason: bounded(reason, LONGEST_PATH) });
    }

    /// Something happens to it, now.
    pub fn happens(&self, event: Event) {
        self.told.lock().happened(self.micros(Instant::now()), event);
    }

    /// It is told how the wait goes.
    pub fn beat(&self) {
        let mut told = self.told.lock();
        told.beats += 1;
        told.last_beat = self.micros(Instant::now());
    }

    /// What went wrong, in words. The first to say so knows best.
    pub fn because(&self, reason: &str) {
        self.told.lock().reason.get_or_insert_with(|| bounded(reason, LONGEST_REASON));
    }

    /// When it was held, in order.
    pub fn waits(&self) -> Vec<(Instant, Instant)> {
        self.told.lock().waits.clone()
    }

    /// Which request it was.
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// As much of an id as is kept.
    pub(super) fn id(text: &str) -> &str {
        &text[..text.floor_char_boundary(LONGEST_ID)]
    }

    pub(super) const fn route(&self) -> &RouteKey {
        &self.route
    }

    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn has_waited(&self) -> bool {
        self.told.lock().has_waited
    }

    pub(super) fn bytes(&self) -> usize {
        self.told.lock().bytes
    }

    /// When it ended; of one that has not, when it came.
    pub(super) fn latest(&self) -> Instant {
        let ended = self.told.lock().ended.map_or(0, |(at, _)| at);
        self.arrived + Duration::from_micros(ended)
    }

    pub(super) fn ended_at(&self) -> Option<SystemTime> {
        let (at, _) = self.told.lock().ended?;
        Some(self.arrived_at + Duration::from_micros(at))
    }

    pub(super) fn fits(&self, outcome: Option<&str>) -> bool {
        let ending = self.told.lock().ended.map(|(_, ending)| ending);
        match (outcome, ending) {
            (Some(Query::RUNNING), ending) => ending.is_none(),
            (None, ending) => ending.is_some(),
            (Some(_), None) => false,
            (Some(Query::FAILED), Some(ending)) => ending.failed,
            (Some(outcome), Some(ending)) => ending.outcome == outcome,
        }
    }

    /// It is over. Says how many bytes it takes from now on.
    pub(super) fn end(&self, ending: Ending) -> usize {
        let mut told = self.told.lock();
        told.ended = Some((self.micros(Instant::now()), ending));
        told.events.shrink_to_fit();
        told.waits = Vec::new();
        let texts: usize = told.events.iter().map(|(_, event)| event.bytes()).sum();
        told.bytes = size_of::<Self>()
            + 2 * size_of::<usize>()
            + self.request_id.len()
            + self.asked.as_ref().map_or(0, Asked::bytes)
            + told.reason.as_ref().map_or(0, |reason| reason.len())
            + told.events.capacity() * size_of::<(u64, Event)>()
            + texts;
        told.bytes
    }

    /// As it is told.
    pub(super) fn sequence(&self) -> Sequence {
        let told = self.told.lock();
        let ms = |micros: u64| micros as f64 / 1e3;
        let moment = |at: u64, event: &Event| Moment { at_ms: ms(at), event: event.clone() };
        let now = self.micros(Instant::now());
        let mut events = vec![moment(0, &Event::Arrived)];
        events.extend(told.events.iter().map(|(at, event)| moment(*at, event)));
        if let Some((at, Ending { outcome, status, .. })) = told.ended {
            events.push(moment(at, &Event::Ended { outcome, status }));
        }
        let ending = told.ended.map(|(_, ending)| ending);
        Sequence {
            request_id: self.request_id.to_string(),
            route: self.route.clone(),
            method: self.asked.as_ref().map(|asked| asked.method.to_string()),
            path: self.asked.as_ref().map(|asked| asked.path.to_string()),
            model: self.asked.as_ref().and_then(|asked| asked.model.as_deref().map(Into::into)),
            trace_id: self.asked.as_ref().and_then(|asked| asked.trace_id.as_deref().map(Into::into)),
            cold_start: told.cold_start,
            arrived_at: humantime::format_rfc3339_millis(self.arrived_at).to_string(),
            admitted: ending.is_none_or(|ending| ending.admitted),
            outcome: ending.map(|ending| ending.outcome),
            status: ending.and_then(|ending| ending.status),
            reason: told.reason_in_words(),
            total_ms: ms(told.ended.map_or(now, |(at, _)| at)),
            heartbeats: (told.beats > 0)
                .then(|| Heartbeats { count: told.beats, last_ms: ms(told.last_beat) }),
            events,
            left_out: told.left_out,
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.arrived).as_micros()).unwrap_or(u64::MAX)
    }
}

// === impl Told ===

impl Told {
    fn happened(&mut self, at: u64, event: Event) {
        if self.events.len() == MOST_EVENTS {
            self.events.remove(MOST_EVENTS / 2);
            self.left_out += 1;
        }
        self.events.push((at, event));
    }

    /// Why it ended as it did, where nobody has said so: by what had happened until then.
    fn reason_in_words(&self) -> Option<String> {
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
            "client_gone" => Some(format!("The client hung up {when}.")),
            "client_stalled" => Some("The client stopped reading its answer (`limits.stallTimeout`).".into()),
            "draining" => Some(format!("This replica stopped {when}.")),
            "internal" => Some("A defect of Anteroom: its log has the panic.".into()),
            "completed" if failed => status.map(|status| format!("The model server answered {status}.")),
            _ => None,
        }
    }
}

// === impl Event ===

impl Event {
    const fn bytes(&self) -> usize {
        match self {
            Self::Dispatched { endpoint } => endpoint.len(),
            Self::DispatchFailed { endpoint, reason } => endpoint.len() + reason.len(),
            _ => 0,
        }
    }
}

/// A copy that is not longer.
fn bounded(text: &str, longest: usize) -> Box<str> {
    text[..text.floor_char_boundary(longest)].into()
}
