//! The story of a request, as serialised by the API.

use serde::Serialize;

use super::event::Event;
use crate::domain::RouteKey;

/// Events of a request with their times.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sequence {
    /// `x-request-id`, of the client or generated.
    pub request_id: String,
    /// Route of the request.
    pub route: RouteKey,
    /// Absent, like the path, if the request failed where its head was no longer available.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Path without the query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Model named by the body, if it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Trace id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// `id` of the cold start that held the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<u64>,
    /// Wall-clock time of arrival, RFC 3339.
    pub arrived_at: String,
    /// False if the request was refused.
    pub admitted: bool,
    /// Outcome or refusal; absent while the request runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// Status in the metrics; absent without an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Explanation of the outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// From arrival to end, or until now.
    pub total_ms: f64,
    /// Heartbeats sent while the request waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeats: Option<Heartbeats>,
    /// Events in order.
    pub events: Vec<TimedEvent>,
    /// Events omitted from the middle.
    #[serde(skip_serializing_if = "is_zero")]
    pub left_out: u32,
}

/// Heartbeats sent to a waiting client.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Heartbeats {
    /// Number of heartbeats.
    pub count: u32,
    /// Time of the last one, from the arrival.
    pub last_ms: f64,
}

/// An event and its time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimedEvent {
    /// Time from the arrival.
    pub at_ms: f64,
    /// The event.
    #[serde(flatten)]
    pub event: Event,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "signature required by serde")]
const fn is_zero(count: &u32) -> bool {
    *count == 0
}
