//! A span under construction.

use std::{borrow::Cow, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue, Value,
    trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use tokio::time::Instant;

use super::context::{Context, new_span_id};

/// Monotonic and wall-clock time of one moment. Spans are measured monotonically and exported in wall-clock time, so
/// that clock adjustments do not distort them.
#[derive(Clone, Copy, Debug)]
pub struct ClockAnchor {
    at: Instant,
    wall: SystemTime,
}

/// Remote side of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanDirection {
    /// A client.
    Server,
    /// An endpoint.
    Client,
    /// None.
    Internal,
}

/// A span of a request.
#[derive(Clone, Debug)]
pub struct Span {
    /// Span id.
    pub id: u64,
    /// Id of the parent span; 0 for the parent of the whole request.
    pub parent: u64,
    /// Name.
    pub name: Cow<'static, str>,
    /// Remote side.
    pub kind: SpanDirection,
    /// Start.
    pub start: Instant,
    /// End; equals `start` until then.
    pub end: Instant,
    attributes: Vec<KeyValue>,
    events: Vec<(Instant, &'static str)>,
    failed: bool,
}

// === impl ClockAnchor ===

impl ClockAnchor {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self { at: Instant::now(), wall: SystemTime::now() }
    }

    /// Converts a moment, earlier or later, to wall-clock time.
    pub fn to_wall_clock(&self, at: Instant) -> SystemTime {
        match at.checked_duration_since(self.at) {
            Some(after) => self.wall + after,
            None => self.wall - (self.at - at),
        }
    }
}

// === impl Span ===

impl Span {
    /// Starts a span.
    pub fn new(name: Cow<'static, str>, kind: SpanDirection, parent: u64, start: Instant) -> Self {
        Self {
            id: new_span_id(),
            parent,
            name,
            kind,
            start,
            end: start,
            attributes: Vec::new(),
            events: Vec::new(),
            failed: false,
        }
    }

    /// Sets an attribute, replacing an earlier value.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|known| known.key.as_str() == key) {
            Some(known) => known.value = value,
            None => self.attributes.push(KeyValue::new(key, value)),
        }
    }

    /// Returns whether an attribute is set.
    pub fn has_attribute(&self, key: &'static str) -> bool {
        self.attributes.iter().any(|known| known.key.as_str() == key)
    }

    /// Adds an event.
    pub fn event(&mut self, at: Instant, name: &'static str) {
        self.events.push((at, name));
    }

    /// Marks the span as failed.
    pub const fn fail(&mut self) {
        self.failed = true;
    }

    pub(super) fn data(
        self,
        context: &Context,
        clock: &ClockAnchor,
        scope: &InstrumentationScope,
    ) -> SpanData {
        let is_first = self.parent == 0;
        let mut events = SpanEvents::default();
        events.events = self
            .events
            .into_iter()
            .map(|(at, name)| Event::new(name, clock.to_wall_clock(at), Vec::new(), 0))
            .collect();
        SpanData {
            span_context: SpanContext::new(
                TraceId::from(context.trace_id),
                SpanId::from(self.id),
                TraceFlags::new(context.flags),
                false,
                context.state.clone(),
            ),
            parent_span_id: SpanId::from(if is_first { context.parent } else { self.parent }),
            parent_span_is_remote: is_first && context.parent != 0,
            span_kind: match self.kind {
                SpanDirection::Server => SpanKind::Server,
                SpanDirection::Client => SpanKind::Client,
                SpanDirection::Internal => SpanKind::Internal,
            },
            name: self.name,
            start_time: clock.to_wall_clock(self.start),
            end_time: clock.to_wall_clock(self.end.max(self.start)),
            attributes: self.attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            // `error.type` has the cause; a description would repeat it.
            status: if self.failed { Status::error("") } else { Status::Unset },
            instrumentation_scope: scope.clone(),
        }
    }
}
