//! The story of a request as the API tells it.

use serde::Serialize;

use super::Event;
use crate::domain::RouteKey;

/// What happened to a request, and when.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sequence {
    /// Its `x-request-id`: the client's, or ours.
    pub request_id: String,
    /// The route that it belongs to.
    pub route: RouteKey,
    /// Absent, like the path, of a request that failed when nobody knew any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Without its query string.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The model that its body names, if that was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The trace that it is a part of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// The cold start that held it: the `id` of its record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<u64>,
    /// Wall-clock time of its arrival, RFC 3339.
    pub arrived_at: String,
    /// Whether it was admitted; false: it was refused.
    pub admitted: bool,
    /// How it ended, or why it was refused; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// The status that it counts under; absent without an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why it ended so, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// From its arrival to its end, or until now.
    pub total_ms: f64,
    /// What it heard while it waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeats: Option<Heartbeats>,
    /// What happened, in order.
    pub events: Vec<Moment>,
    /// How many events are not told, from the middle.
    #[serde(skip_serializing_if = "is_zero")]
    pub left_out: u32,
}

/// What a request heard while it waited.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Heartbeats {
    /// How many times.
    pub count: u32,
    /// When last, from its arrival.
    pub last_ms: f64,
}

/// An event and its time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moment {
    /// From the arrival.
    pub at_ms: f64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(count: &u32) -> bool {
    *count == 0
}
